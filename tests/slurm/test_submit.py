"""Submission, on a pretended Slurm: what is sent, all or nothing, again and again, and what must
never be sent.
"""

import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sarm.config import PHASES, ROOT, Config, UserError
from sarm.run import Attempt
from slurm import plan as planning
from slurm import submit as submitting
from slurm.dag import Node, tasks
from slurm.profile import Profile, flags
from slurm.profile_file import load_profile
from slurm.script import script
from slurm.status import main as status
from tests.fakes.site import CANARY, CONFIG, PROFILE, Site, batch_of


def test_the_whole_dag_goes_in_with_its_dependencies(site: Site) -> None:
    assert site.submit() == 0
    jobs = {batch_of(job): (id_, job) for id_, job in site.jobs.items()}
    assert len(jobs) == 1 + 3 + 1 + 1 + 1 + 1 + 2 + 3 + 1
    ids = {name: id_ for name, (id_, _) in jobs.items()}
    assert jobs["calibrate"][1]["dependency"] == f"afterok:{ids['select']}"
    assert jobs["ppo.penalty-seed1"][1]["dependency"] == f"afterok:{ids['calibrate']}"
    assert jobs["encode"][1]["elements"] == 2 and jobs["encode"][1]["dependency"] == ""
    # Five shards in arrays of at most two: three submissions, the last of one element and so no
    # array.
    assert [jobs[f"probe.{n}"][1]["elements"] for n in range(3)] == [2, 2, 0]
    assert jobs["select"][1]["dependency"] == "afterok:" + ":".join(
        ids[f"probe.{n}"] for n in range(3)
    )
    assert jobs["evaluate.penalty-seed1"][1]["dependency"] == f"afterok:{ids['ppo.penalty-seed1']}"
    assert jobs["report"][1]["dependency"].startswith("afterany:")
    assert set(jobs["report"][1]["dependency"].removeprefix("afterany:").split(":")) == set(
        ids.values()
    ) - {ids["report"]}
    assert not any(job["held"] for _, job in jobs.values())
    assert {name for name, (_, job) in jobs.items() if "#SBATCH --hold\n" in job["text"]} == {
        "encode"
    }, "what waits for nothing goes in held"
    for _, job in jobs.values():
        assert "--kill-on-invalid-dep=yes" in job["text"] and "--export=NONE" in job["text"]
        assert "wckey" not in job["text"]


def test_ppo_sees_all_gpus_of_the_node_and_requeues_a_bounded_number_of_times(site: Site) -> None:
    site.submit()
    text = next(job["text"] for job in site.jobs.values() if batch_of(job).startswith("ppo."))
    assert (
        "--gres=gpu:h100:4" in text
        and "--ntasks-per-node=4" in text
        and "gpus-per-task" not in text
    )
    assert "scontrol requeue" in text and '"$tries" -le 3 ]; then' in text
    assert text.rstrip().endswith("exit $rc")
    assert "signalled." not in next(
        job["text"] for job in site.jobs.values() if batch_of(job) == "select"
    ), "it has no checkpoint to go on from"


@pytest.mark.parametrize("at", [1, 4, 14])
def test_all_or_nothing(site: Site, at: int, capsys: pytest.CaptureFixture[str]) -> None:
    site.fault(refuse=at)
    assert site.submit() == 2
    assert {job["state"] for job in site.jobs.values()} <= {"CANCELLED"}
    assert "nothing runs" in capsys.readouterr().err
    site.fault()
    assert site.submit() == 0
    assert sum(job["state"] == "PENDING" for job in site.jobs.values()) == 14


def test_a_submission_that_cannot_be_taken_back_says_so_and_the_next_one_does_it(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    # The queue answers before anything is sent, and no more afterwards.
    site.fault(refuse=4, deaf=["scancel"])
    assert site.submit() == 2
    assert "could not be cancelled either" in capsys.readouterr().err
    first = set(site.jobs)
    assert not any(job["state"] == "CANCELLED" for job in site.jobs.values())
    site.fault()
    assert site.submit() == 0
    assert {site.jobs[id_]["state"] for id_ in first} == {"CANCELLED"} and len(
        set(site.jobs) - first
    ) == 14


def test_submitting_again_attaches_to_what_is_running(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.submit()
    sent = capsys.readouterr().out.splitlines()[-1]
    assert sent == f"sent 14 submissions; make watch RUN={site.path} shows how they go"
    before = set(site.jobs)
    assert site.submit() == 0
    assert set(site.jobs) == before
    out = capsys.readouterr().out
    assert "attached to what still runs or waits: encode/shard-0000-of-0002 (101_0)" in out
    assert "nothing else was submitted" in out


def test_one_phase_that_runs_is_joined_by_the_rest(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.submit("--phase", "encode") == 0
    (encode,) = site.jobs
    capsys.readouterr()
    assert site.submit() == 0
    assert f"encode/shard-0000-of-0002 ({encode}_0)" in capsys.readouterr().out
    rest = {batch_of(job): job for id_, job in site.jobs.items() if id_ != encode}
    assert len(rest) == 13 and "encode" not in rest
    assert rest["probe.0"]["dependency"] == f"afterok:{encode}", "the array of the other submission"
    assert rest["report"]["dependency"].startswith("afterany:")
    assert encode in rest["report"]["dependency"].split(":")
    assert not any(job["held"] for job in site.jobs.values())
    assert site.submit("--phase", "encode") == 0 and len(site.jobs) == 14, "attached to"


def test_a_cancelled_run_whose_jobs_are_still_ending_is_submitted_anew(site: Site) -> None:
    site.submit()
    site.set_state("CANCELLED")
    site.set_state("COMPLETING", only="encode")
    assert site.submit() == 0
    assert len(site.jobs) == 28


def test_two_at_once_submit_once(site: Site) -> None:
    words = [
        sys.executable,
        "-m",
        "slurm.submit",
        "--cluster",
        str(site.profile),
        "--config",
        str(site.config),
        "--run",
        str(site.path),
    ]
    both = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [(process.communicate(), process.returncode) for process in both]
    assert len(site.jobs) == 14, ends
    assert {code for _, code in ends} <= {0, 2}


def test_only_failed_ranges_and_what_follows_are_sent_again(site: Site) -> None:
    site.submit()
    site.do("encode")
    site.do("probe", but=("probe/shard-0003-of-0005",))
    site.set_state("CANCELLED")
    site.set_state("PENDING", only="report")
    first = set(site.jobs)
    assert site.submit() == 0
    new = {id_: job for id_, job in site.jobs.items() if id_ not in first}
    names = {batch_of(job) for job in new.values()}
    assert "encode" not in names and "probe" in names and "select" in names
    probe = next(job for job in new.values() if batch_of(job) == "probe")
    assert probe["elements"] == 0 and probe["dependency"] == ""
    specs = [
        json.loads(p.read_text())
        for p in (site.path / "submissions").glob("*/probe.shard-0003*.json")
    ]
    assert any("shard-0003-of-0005" in spec["commands"][0]["argv"] for spec in specs)
    assert all(site.jobs[id_]["state"] == "CANCELLED" for id_ in first), (
        "the earlier pending report is cancelled first"
    )


def test_a_submission_whose_client_died_is_taken_back_before_another(site: Site) -> None:
    site.submit()
    (path,) = site.path.glob("submissions/*/journal.json")
    journal = json.loads(path.read_text())
    # As it stands right after the sbatch of the report, whose answer was never written down.
    journal["state"] = "submitting"
    del journal["jobs"]["report"]
    path.write_text(json.dumps(journal))
    first = set(site.jobs)
    assert site.submit() == 0
    assert {site.jobs[id_]["state"] for id_ in first} == {"CANCELLED"}
    assert len(set(site.jobs) - first) == len(first)


def test_what_the_shell_sets_for_sbatch_overrules_no_script(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a shell inside an array job of another account.
    for name in (
        "SBATCH_EXPORT",
        "SBATCH_ACCOUNT",
        "SLURM_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_CPUS_PER_TASK",
    ):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert site.submit() == 0
    for job in site.jobs.values():
        assert {name for name in job["environment"] if name.startswith(("SBATCH", "SLURM"))} == {
            "SLURM_CONF"
        }


def batch_script(
    site: Site, name: str, srun: str, *, tries: int = 0, **env: str
) -> tuple[int, list[str]]:
    """(exit code, calls of scontrol) of a submitted script whose srun does `srun`, after so many
    tries of the job.
    """
    next((site.path / "submissions").glob("*/")).joinpath("tries.5").write_text("\n" * tries)
    text = next(job["text"] for job in site.jobs.values() if batch_of(job) == name)
    bin_ = site.home / "bin"
    bin_.mkdir(exist_ok=True)
    (site.home / "calls").write_text("")
    (bin_ / "srun").write_text(f"#!/bin/bash\n{srun}\n")
    (bin_ / "scontrol").write_text(f'#!/bin/bash\necho "$*" >>{site.home}/calls\n')
    for tool in ("srun", "scontrol"):
        (bin_ / tool).chmod(0o755)
    text = text.replace("export PATH=", f"export PATH={bin_}:")
    done = subprocess.run(
        ["bash"], input=text, text=True, env={"SLURM_JOB_ID": "5", "PATH": "/usr/bin:/bin", **env}
    )
    return done.returncode, (site.home / "calls").read_text().splitlines()


def test_a_batch_script_hands_on_its_failure_and_requeues_only_who_was_told(site: Site) -> None:
    site.submit()
    folder = next((site.path / "submissions").glob("*/"))
    assert batch_script(site, "select", "exit 3") == (3, [])
    assert batch_script(site, "select", "exit 75") == (75, [])
    assert batch_script(site, "select", "exit 140") == (140, ["requeue 5"]), (
        "preempted before Python was up"
    )
    assert batch_script(site, "ppo.penalty-seed1", "exit 0") == (0, [])
    # Cancelled, or a defect: srun returns the highest of the ranks' codes, whatever that is.
    for code in (75, 137, 143):
        assert batch_script(site, "ppo.penalty-seed1", f"exit {code}") == (code, [])
    assert batch_script(site, "ppo.penalty-seed1", f"touch {folder}/signalled.5.0; exit 137") == (
        137,
        ["requeue 5"],
    )
    assert batch_script(site, "ppo.penalty-seed1", "exit 140") == (140, ["requeue 5"]), (
        "the signal came before Python was up"
    )
    # Slurm counts a preemption that was answered by a requeue twice.
    assert batch_script(
        site,
        "ppo.penalty-seed1",
        f"touch {folder}/signalled.5.4; exit 75",
        tries=2,
        SLURM_RESTART_COUNT="4",
    )[1] == ["requeue 5"]
    assert batch_script(
        site,
        "ppo.penalty-seed1",
        f"touch {folder}/signalled.5.6; exit 75",
        tries=3,
        SLURM_RESTART_COUNT="6",
    ) == (75, [])


def test_modules_are_loaded_after_path_is_set_and_a_missing_one_ends_the_job(site: Site) -> None:
    site.profile.write_text(PROFILE + "modules: [apptainer/1.4]\n")
    site.submit()
    ran = site.home / "ran"
    # As a login's start-up files leave it: a function of bash's.
    assert (
        batch_script(site, "select", f"touch {ran}", **{"BASH_FUNC_module%%": "() { return 3; }"})
        == (3, [])
        and not ran.exists()
    )
    assert batch_script(
        site, "select", f"echo $PATH >{ran}", **{"BASH_FUNC_module%%": "() { PATH=/of/$2:$PATH; }"}
    ) == (0, [])
    assert ran.read_text().startswith("/of/apptainer/1.4:")
    text = next(job["text"] for job in site.jobs.values() if batch_of(job) == "select")
    assert (
        text.index("export PATH=") < text.index("module load apptainer/1.4") < text.index("set +e")
    )
    assert "set -u" not in text and "-eu" not in text, "module systems use unset variables"


def test_everything_done_submits_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.do(*PHASES)
    assert site.submit() == 0
    assert not site.jobs and "everything in" in capsys.readouterr().out


def test_a_phase_that_is_done_says_so_of_itself_alone(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.do("fetch", "encode", "probe")
    assert site.submit("--phase", "probe") == 0
    out = capsys.readouterr().out
    assert not site.jobs and "all of probe in" in out and "everything" not in out


def test_one_phase_by_itself_wants_its_needs_done(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.submit("--phase", "probe") == 2
    assert "encode" in capsys.readouterr().err
    site.do("encode")
    assert site.submit("--phase", "probe") == 0
    assert {batch_of(job) for job in site.jobs.values()} == {"probe.0", "probe.1", "probe.2"}


def test_a_secret_of_the_submitting_shell_goes_nowhere(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.submit("--dry-run") == 0
    out = capsys.readouterr().out
    assert site.submit() == 0
    out += capsys.readouterr().out
    assert CANARY not in out
    assert not any(CANARY in job["text"] for job in site.jobs.values())
    files = [path for path in site.path.rglob("*") if path.is_file()]
    assert files and not any(CANARY.encode() in path.read_bytes() for path in files)


def test_a_dry_run_needs_no_slurm_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    assert (
        submitting.main(["--config", str(path), "--run", str(tmp_path / "run"), "--dry-run"]) == 0
    )
    out = capsys.readouterr().out
    assert out.count("#!/bin/bash") == 12 and "GPU-hours" in out
    assert not (tmp_path / "run").exists()


def test_unfetched_models_are_named(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.path = tmp_path / "other"
    assert site.submit() == 2
    assert "make fetch" in capsys.readouterr().err and not site.jobs


def test_a_missing_image_is_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for names, target in (
        ("image: none.sif", "make images,"),
        ("image: no/sarm-cpu.sif, light_image: no/sarm-light.sif", 'make images KIND="cpu light",'),
    ):
        site.profile.write_text(PROFILE + f"container: {{{names}}}\n")
        assert site.submit() == 2
        assert f"build with {target}" in capsys.readouterr().err and not site.jobs


def test_a_partition_slurm_does_not_know_is_found_before_anything_is_sent(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.fault(unknown_partition=True)
    assert site.submit() == 2
    assert "invalid partition" in capsys.readouterr().err and not site.jobs


def test_a_world_writable_run_is_refused(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.path.chmod(site.path.stat().st_mode | stat.S_IWOTH)
    assert site.submit() == 2
    assert "writable by everybody" in capsys.readouterr().err


def test_another_config_is_refused(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.submit("name=other") == 2
    assert "a run of the config 'dag'" in capsys.readouterr().err and not site.jobs
    assert site.submit("encode.shards=3", "--dry-run") == 0
    assert site.run.config.encode.shards == 2, "a look changes nothing"


def test_a_config_does_not_change_under_jobs_that_go_on_with_it(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.submit() == 0
    sent = len(site.jobs)
    assert site.submit("encode.shards=3") == 2
    assert "still run or wait with another config; make cancel" in capsys.readouterr().err
    assert site.run.config.encode.shards == 2 and len(site.jobs) == sent


def test_a_submit_limit_is_kept(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.profile.write_text(PROFILE + "submit_limit: 10\n")
    assert site.submit() == 2
    assert "submit_limit" in capsys.readouterr().err and not site.jobs


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("partitoin: x", "unknown key"),
        ("partition: 'x; rm -rf ~'", "allowed"),
        ('account: "a\\nb"', "allowed"),
        ("environment: {X: '$(id)'}", "allowed"),
        ("environment: {HF_TOKEN: abc}", "secret"),
        ("extra: {dependency: 'afterok:1'}", "launcher manages"),
        ("extra: {part: gpu}", "part is sbatch's --partition"),
        ("extra: {wait: true}", "launcher manages"),
        ("extra: {nice: 100}", "extra.nice: must be text; put .* in quotes$"),
        ("environment: {http_proxy: 'http://me:pass@proxy:3128'}", "password"),
        ("modules: apptainer", "must be a list"),
        ("container: {image: x, bind: [/a]}", "container.bind: unknown key .did you mean binds"),
        ("partition: a\npartition: b", "given twice"),
        ("phases: {ppo: {time_min: 3}}", "over half of ppo's time limit"),
        ("max_array_size: 0", "greater"),
        ("phases: {probes: {time_min: 1}}", "phases"),
    ],
)
def test_a_bad_profile_is_refused(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"description: x\n{line}\n")
    with pytest.raises(UserError, match=says):
        load_profile(str(path))


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((ROOT / "slurm" / "clusters").glob("*.yaml"))]
)
def test_shipped_profiles_load_and_render(name: str) -> None:
    profile = load_profile(name)
    for phase in PHASES:
        text = script(profile, phase, name)
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize("phase", PHASES)
def test_the_checked_in_sbatch_files_are_the_generic_profile(phase: Any) -> None:
    text = (ROOT / "slurm" / f"{phase}.sbatch").read_text()
    profile = load_profile("generic")
    assert text == script(profile, phase, "generic")
    for flag, value in flags(profile, phase).items():
        if flag != "export":
            assert (
                f"#SBATCH --{flag}\n" in text
                if value is True
                else f"#SBATCH --{flag}={value}\n" in text
            )


@pytest.mark.parametrize(
    ("memory", "flag"),
    [
        ("mem", "mem=256G"),
        ("mem-per-cpu", "mem-per-cpu=8192M"),
        ("mem-per-gpu", "mem-per-gpu=65536M"),
        ("none", None),
    ],
)
def test_memory_is_asked_for_as_the_site_wants(memory: Any, flag: str | None) -> None:
    found = flags(Profile(description="x", memory=memory, pack=4), "encode")
    asked = [f"{key}={value}" for key, value in found.items() if key.startswith("mem")]
    assert asked == ([flag] if flag else [])


def test_packed_shards_share_whole_nodes() -> None:
    config = Config.model_validate({**RAW, "probe": {"shards": 10}})
    todo = {task.node for task in tasks(config)}
    batches = {
        batch.name: batch for batch in planning.plan(config, Profile(description="x", pack=4), todo)
    }
    assert [len(element) for element in batches["probe"].elements] == [4, 4, 2]
    assert flags(Profile(description="x", pack=4), "probe")["gres"] == "gpu:4"


RAW: dict[str, Any] = {
    "name": "dag",
    "policy": {"model": "p"},
    "sarm": {"model": "s"},
    "data": {
        "sources": {
            "demo": {
                "format": "jsonl",
                "label": "Demo",
                "path": "data/demo/pairs.jsonl",
                "split": {"test": 1.0},
            }
        }
    },
}


def test_status_reads_manifests_first_then_the_queue_then_accounting(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.submit()
    site.do("encode")
    site.set_state("RUNNING", only="probe.0")
    site.set_state("FAILED", only="probe.1")
    site.fault(no_sacct=False)
    site.run.log("probe", "shard-0002-of-0005").parent.mkdir(exist_ok=True)
    site.run.log("probe", "shard-0002-of-0005").write_text("Traceback\nMemoryError: no room\n")
    capsys.readouterr()
    assert status(["--run", str(site.path)]) == 3
    out = capsys.readouterr().out
    assert (
        "done" in out and "running" in out and "26 h 3 min so far" in out and "MemoryError" in out
    )
    assert "25%, 50%" in out, "half a CPU of two, two tasks of half a GB of two"
    site.fault(no_sacct=False, elapsed=9)
    status(["--run", str(site.path)])
    assert "-, 50%" in capsys.readouterr().out, "whole seconds tell nothing of so short a job"
    assert (
        "FAILED: exit code 1" in out and "pending: Dependency" in out and "in the queue" not in out
    )
    next(site.path.glob("submissions/*/103_0_0_log.out")).write_text(
        "slurmstepd: error: StepId=103.0 exceeded memory limit (2 > 1), being killed\n"
    )
    site.fault(no_sacct=True)
    site.remember({"jobs": {}, "calls": 0})
    assert status(["--run", str(site.path)]) == 3
    out = capsys.readouterr().out
    assert out.count("done") >= 3 and "failed: StepId=103.0 exceeded memory limit (2 > 1)" in out
    assert "not run: needs 5 of probe" in out and "nothing of" in out, "select never began"


def test_status_knows_the_jobs_of_what_was_done_before_the_last_submission(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.submit()
    encode = next(id_ for id_, job in site.jobs.items() if batch_of(job) == "encode")
    site.set_state("COMPLETED", only="encode")
    monkeypatch.setenv("SARM_JOB", f"{encode}_1")
    site.do("encode")
    Attempt(site.run, "report").publish()
    monkeypatch.delenv("SARM_JOB")
    assert status(["--run", str(site.path), "--cancel"]) == 0
    assert site.submit() == 0
    site.fault(no_sacct=False)
    capsys.readouterr()
    status(["--run", str(site.path)])
    lines = capsys.readouterr().out.splitlines()
    assert re.search(
        rf"^encode/\S+ +{encode}_1 +done .* 25%, 50%",
        next(line for line in lines if line.startswith("encode/shard-0001")),
    )
    assert re.search(
        r"^report +\d+ +pending: Dependency +$",
        next(line for line in lines if line.startswith("report ")),
    ), "the one that stands is no longer it"


def test_cancel_cancels_the_submission(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["--run", str(site.path), "--cancel"]) == 2
    site.submit()
    assert status(["--run", str(site.path), "--cancel"]) == 0
    assert {job["state"] for job in site.jobs.values()} == {"CANCELLED"}
    site.set_state("COMPLETING", only="encode")
    capsys.readouterr()
    assert status(["--run", str(site.path), "--cancel"]) == 0
    assert "is in the queue any more" in capsys.readouterr().out, (
        "what is ending is cancelled already"
    )


def test_undone_work_takes_everything_downstream_with_it() -> None:
    config = Config.model_validate(RAW)
    todo = planning.undone(config, lambda node: node != Node("select", "all"))
    assert Node("encode", "shard-0000-of-0001") not in todo
    assert {"select", "steer", "cards", "calibrate", "ppo", "evaluate", "report"} == {
        node.phase for node in todo
    }


def test_elements_wait_for_their_like_only_where_all_are_the_same() -> None:
    """Arms that the profile throttles: an array, each evaluated once its own training has ended."""
    tree = {**RAW, "ppo": {"seeds": [0, 1], "arms": ["penalty", "no_penalty"]}}
    config = Config.model_validate(tree)
    profile = Profile.model_validate({"description": "x", "phases": {"ppo": {"throttle": 2}}})
    nodes = {task.node for task in tasks(config)}
    batches = {batch.name: batch for batch in planning.plan(config, profile, nodes)}
    trained, evaluated = batches["ppo.arms"], batches["evaluate.arms"]
    assert len(trained.elements) == 4 and evaluated.elements == trained.elements
    assert (evaluated.needs, evaluated.when) == (("ppo.arms",), "aftercorr")
    assert trained.when == "afterok" and len(trained.needs) == 1
    encoded = Config.model_validate({**tree, "encode": {"shards": 3}, "probe": {"shards": 3}})
    todo = {task.node for task in tasks(encoded)}
    for batch in planning.plan(encoded, Profile(description="x"), todo):
        assert batch.when in ("afterok", "afterany"), batch


def test_the_table_shows_ids_as_they_are(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.fault(first=91)  # a colon, 100 and a colon are an emoji to rich, here
    assert site.submit() == 0
    assert ":92:93:94:95:96:97:98:99:100:101:" in capsys.readouterr().out
