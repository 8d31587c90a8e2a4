"""What a site's profile asks for, on a real Slurm in real images: `make test-faults`, or pytest -m
cluster on a cluster that is up.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from sarm.config import ROOT, load_config
from sarm.run import RunDir
from slurm.profile_file import CLUSTERS
from tests.cluster.harness import CONFIG, RUNS, STATE, ClusterRun, inside, stand_alone, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (STATE / "pid").exists(), reason="no cluster is up; make test-faults"),
]
needs_accounting = pytest.mark.skipif(
    not (STATE / "accounting").exists() or (STATE / "accounting").read_text().strip() == "0",
    reason="needs a cluster with ACCOUNTING=1",
)


class SiteRun(ClusterRun):
    """A new run of the tiny config under a profile that begins as the development cluster's and
    changes some keys.
    """

    def __init__(self, name: str, *overrides: str, **changed: Any) -> None:
        super().__init__(name)
        self.overrides = overrides
        self.dir = RunDir(self.path, load_config(ROOT / CONFIG, overrides))
        inside("rm", "-rf", str(self.path))
        inside("mkdir", "-p", str(RUNS))
        self.profile = RUNS / f"{name}.yaml"
        shipped = yaml.safe_load((CLUSTERS / "development.yaml").read_text())
        phases = {
            phase: {**keys, **changed.get("phases", {}).get(phase, {})}
            for phase, keys in shipped["phases"].items()
        }
        self.profile.write_text(yaml.safe_dump({**shipped, **changed, "phases": phases}))

    def send(self, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        words = [
            "--cluster",
            str(self.profile),
            "--config",
            CONFIG,
            "--run",
            str(self.path),
            *self.overrides,
            *more,
        ]
        return inside("python", "-m", "slurm.submit", *words, check=check)

    def shown(self, batch: str) -> dict[str, str]:
        """What `scontrol show job` says of a batch, of an array's first element."""
        line = inside(
            "scontrol", "show", "job", "--oneliner", self.jobs[batch]
        ).stdout.splitlines()[0]
        return dict(word.partition("=")[::2] for word in line.split())

    def is_done(self, *units: str) -> bool:
        return all(self.dir.done(*unit.split("/")) for unit in units)


def nothing_is_queued() -> bool:
    return not inside("squeue", "--noheader", "--user=sarm").stdout.strip()


@pytest.fixture
def module() -> Iterator[None]:
    """A site's modules, after whose start-up file, itself ending badly, Apptainer has a name that
    one of them puts on PATH; and a scratch.
    """
    lines = """
        mkdir -p /opt/site/bin && mkdir -p -m 1777 /opt/scratch
        ln -sfn "$(command -v apptainer)" /opt/site/bin/site-apptainer
        load='[ "$*" = "load apptainer/1.4" ] && PATH=/opt/site/bin:$PATH'
        echo "module() { $load; }; false" >/etc/profile.d/zz-module.sh"""
    inside("bash", "-ec", lines, root=True)
    yield
    inside("rm", "/etc/profile.d/zz-module.sh", root=True)


@pytest.fixture
def reservation() -> Iterator[None]:
    """All nodes, with a feature, for one user's jobs that name it."""
    lines = """
        scontrol update NodeName=g1,g2 AvailableFeatures=nvlink ActiveFeatures=nvlink
        scontrol create reservation ReservationName=friday Users=sarm StartTime=now Duration=1-0 \\
            Nodes=c1,c2,g1,g2 Flags=OVERLAP,IGNORE_JOBS >/dev/null"""
    inside("bash", "-ec", lines, root=True)
    yield
    inside("scontrol", "delete", "reservation", "friday", root=True)


def test_slurm_takes_every_key_for_what_it_says(reservation: None) -> None:
    accounted = (STATE / "accounting").read_text().strip() != "0"
    run = SiteRun(
        "keys",
        "probe.shards=5",
        **{"account": "sarm", "qos": "normal"} if accounted else {},
        constraint="nvlink",
        reservation="friday",
        licenses="sarm:1",
        exclude="g2",
        exclusive=True,
        pack=2,
        gpu_request="gpus-per-node",
        memory="mem-per-gpu",
        array_throttle=1,
        max_array_size=2,
        mail_user="me@example.org",
        mail_type="END,FAIL",
        wckey="probing",
        max_requeues=2,
        partition="gpu",
        extra={"nice": "100", "begin": "now+1hour"},
        phases={"probe": {"gpus": 1, "time_min": 7}, "ppo": {"mem_gb": 6}},
    )
    run.send()
    try:
        ppo, probe, single, select = (
            run.shown(batch) for batch in ("ppo.penalty-seed0", "probe.0", "probe.1", "select")
        )
        for job in (ppo, probe):
            assert (
                job["Partition"],
                job["Features"],
                job["Reservation"],
                job["Licenses"],
                job["ExcNodeList"],
            ) == ("gpu", "nvlink", "friday", "sarm:1", "g2")
            assert job["OverSubscribe"] == "NO" and "MailUser" not in job
            assert (job["Nice"], job["Requeue"], job["KillOInInvalidDependent"]) == (
                "100",
                "1",
                "Yes",
            )
            assert re.fullmatch(r"(ppo|probe)\.\S+\.tiny-\w{6}-\w{8}", job["JobName"]) and (
                not accounted or (job["Account"], job["QOS"]) == ("sarm", "normal")
            )
            assert job["WCKey"] == "probing", job
        assert (ppo["TresPerNode"], ppo["MemPerTres"], ppo["TimeLimit"]) == (
            "gres/gpu:h100:4",
            "gres/gpu:1536",
            "00:20:00",
        ), ppo
        assert (probe["TresPerNode"], probe["MemPerTres"], probe["TimeLimit"]) == (
            "gres/gpu:h100:2",
            "gres/gpu:2048",
            "00:07:00",
        ), probe
        # Five shards, two a job: an array of two, one at a time, and a job that is no array.
        assert probe["ArrayTaskId"] == "0-1%1" and "ArrayTaskId" not in single
        assert all(
            f"afterok:{run.jobs[chunk]}" in select["Dependency"] for chunk in ("probe.0", "probe.1")
        ), select["Dependency"]
        report = run.shown("report")
        assert report["MailUser"] == "me@example.org" and {"END", "FAIL"} <= set(
            report["MailType"].split(",")
        )
        assert set(re.findall(r"afterany:(\d+)", run.shown("report")["Dependency"])) == set(
            run.jobs.values()
        ) - {run.jobs["report"]}
        assert (
            run.shown("fetch")["Reason"] != "JobHeldUser"
            and run.shown("fetch")["Dependency"] == "(null)"
        ), "not released"
    finally:
        run.make("cancel")
    assert until("an empty queue", nothing_is_queued)


def test_whole_nodes_carry_shards_side_by_side_and_one_that_dies_takes_no_other(
    module: None,
) -> None:
    run = SiteRun(
        "nodes",
        "encode.shards=5",
        exclusive=True,
        pack=2,
        max_array_size=2,
        modules=["apptainer/1.4"],
        scratch="/opt/scratch",
        mail_user="me@example.org",
        mail_type="END",
        environment={"OMP_NUM_THREADS": "1", "SITE_SAYS": "hello"},
        container={
            "command": "site-apptainer",
            "image": "outputs/images/sarm-cpu.sif",
            "light_image": "outputs/images/sarm-light.sif",
            "nv": False,
            "binds": ["/opt/site"],
        },
        phases={"encode": {"gpus": 1, "partition": "gpu"}},
    )
    run.send()
    pair = [f"shard-{i:04d}-of-0005" for i in (0, 1)]
    for unit in pair:
        run.signal_phase("STOP", "encode", unit)
    devices = set()
    for unit in pair:
        pid = inside(
            "pgrep",
            "--oldest",
            "-f",
            "--",
            f"-m jobs encode --run {run.path} --unit {unit}",
            root=True,
        ).stdout.strip()
        said = inside("cat", f"/proc/{pid}/environ", root=True).stdout.split("\0")
        env = dict(pair.partition("=")[::2] for pair in said)
        devices.add(env["CUDA_VISIBLE_DEVICES"])
        assert env["SITE_SAYS"] == "hello" and re.fullmatch(
            r"/opt/scratch/sarm-\w{6}", env["TMPDIR"]
        )
        seen = inside(
            "ls", f"/proc/{pid}/root{env['TMPDIR']}/..", f"/proc/{pid}/root/opt/site/bin", root=True
        ).stdout
        assert "sarm-" in seen and "site-apptainer" in seen, (
            "scratch and binds are in the image too"
        )
    assert devices == {"0", "1"}
    node = run.shown("encode.0")
    assert (node["OverSubscribe"], node["NumCPUs"]) == ("NO", "8"), (
        "the node is not the job's alone"
    )
    assert "submitit" not in node.get("WCKey", ""), (
        "submitit's own, which a profile did not ask for"
    )
    run.signal_phase("KILL", "encode", pair[0])
    run.signal_phase("CONT", "encode", pair[1])
    run.wait()
    rest = [f"encode/shard-{i:04d}-of-0005" for i in range(1, 5)]
    assert run.is_done(*rest) and not run.is_done(f"encode/{pair[0]}"), run.attempts()
    assert pair[0] in run.report()
    assert inside("ls", "/opt/scratch").stdout == ""
    mail = rf"Job_id={run.jobs['report']}.* me@example\.org"
    until(
        "a mail",
        lambda: re.search(mail, inside("cat", "/var/log/mail", root=True, check=False).stdout),
    )
    before = run.attempts()
    run.send()
    try:
        until("the shard done again", lambda: run.is_done(f"encode/{pair[0]}"))
        assert {unit: run.attempts()[unit] for unit in rest} == {
            unit: before[unit] for unit in rest
        }
    finally:
        run.make("cancel")
    assert until("an empty queue", nothing_is_queued)


def test_what_slurm_would_refuse_is_found_before_anything_is_sent() -> None:
    cases: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
        (
            {"phases": {"ppo": {"partition": "gpus"}}},
            (),
            "ppo jobs: .*Invalid partition name.*one that sinfo shows",
        ),
        (
            {"max_array_size": 2000},
            ("encode.shards=1500",),
            "encode jobs: .*Invalid job array.*lower max_array_size",
        ),
        ({"constraint": "nosuch"}, (), "Invalid feature.*set constraint"),
        ({"reservation": "nosuch"}, (), "reservation is invalid.*set reservation"),
        ({"gpu_type": "a100"}, (), "ppo jobs: .*node configuration is not available.*gpu_type"),
        ({"extra": {"nosuchflag": "x"}}, (), "unrecognized option '--nosuchflag=x'"),
    ]
    accounted = (STATE / "accounting").read_text().strip() != "0"
    unknown = (
        ({"account": "nobody"}, "Invalid account.*sacctmgr"),
        ({"qos": "nosuch"}, "Invalid qos.*set qos"),
    )
    cases += [(changed, (), says) for changed, says in unknown if accounted]
    for changed, overrides, says in cases:
        run = SiteRun("refused", *overrides, **changed)
        done = run.send(check=False)
        errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
        assert done.returncode == 2 and len(errors) == 1 and re.search(says, errors[0]), done.stderr
        assert nothing_is_queued() and not run.path.exists()
    if not accounted:
        run = SiteRun("unchecked", account="nobody", qos="high", extra={"begin": "now+1hour"})
        assert "account nobody, QOS high went unchecked" in run.send().stderr
        run.make("cancel")


@needs_accounting
def test_a_limit_on_jobs_that_a_site_sets_stops_a_submission_whole() -> None:
    inside(
        "sacctmgr", "-i", "add", "qos", "tight", "MaxSubmitJobsPerUser=4", root=True, check=False
    )
    inside("sacctmgr", "-i", "modify", "user", "sarm", "set", "qos+=tight", root=True, check=False)
    done = SiteRun("limit", qos="tight").send(check=False)
    assert (
        done.returncode == 2
        and "nothing runs" in done.stderr
        and "fewer encode.shards" in done.stderr
    ), done.stderr
    assert until("an empty queue", nothing_is_queued)


def test_a_sharded_script_by_hand_is_an_array(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("handmade", "probe/shard-0000-of-0002", "probe/shard-0001-of-0002")
    export = f"--export=ALL,CONFIG={CONFIG},RUN={run.path}"
    inside(
        "sbatch",
        f"--output={run.path}/hand-%a.log",
        export,
        "--array=0-1",
        stand_alone("probe.sbatch"),
    )
    until("its end", nothing_is_queued)
    logs = [path.read_text() for path in run.path.glob("hand-*.log")]
    assert run.dir.done("probe", "shard-0000-of-0002") and run.dir.done(
        "probe", "shard-0001-of-0002"
    ), logs
    assert len(logs) == 2, "an element a shard"
