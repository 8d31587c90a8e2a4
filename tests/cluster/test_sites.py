"""Whose a job is, what a login environment brings, and what else only a real Slurm shows: `make
test-faults`, or pytest -m cluster on a cluster that is up.

Most jobs here begin in two hours, and none of them needs an image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from slurm.profile_file import CLUSTERS
from tests.cluster.harness import CONFIG, RUNS, STATE, ClusterRun, inside, until
from tests.cluster.test_profiles import SiteRun, needs_accounting, nothing_is_queued

PPO = "penalty-seed0"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (STATE / "pid").exists(), reason="no cluster is up; make test-faults"),
]


def pending(name: str, **changed: Any) -> SiteRun:
    """A run whose jobs wait for two hours."""
    return SiteRun(name, container=None, extra={"begin": "now+2hours"}, **changed)


def queue_of(run: ClusterRun) -> dict[str, str]:
    """Every job in the queue by its name, whosever it is: its state."""
    lines = inside("squeue", "--noheader", "--format=%j|%T").stdout.splitlines()
    return dict(line.rsplit("|", 1) for line in lines)


@pytest.fixture
def emptied(tiny_models: None) -> Iterator[None]:
    yield
    inside("bash", "-c", "scancel --user=sarm")
    until("an empty queue", nothing_is_queued)


def reset_controller() -> None:
    """As a site that sets its controller up anew: it has forgotten all, and ids begin again."""
    lines = """
        kill -KILL $(cat /run/slurmctld.pid); sleep 1; rm -rf /var/spool/slurm/ctld; slurmctld -c
        until [[ $(sinfo -h -N -o %T | sort -u) == idle ]]; do sleep 0.3; done"""
    inside("bash", "-ec", lines, root=True)


def test_two_runs_side_by_side_and_one_after_a_controller_reset(emptied: None) -> None:
    reset_controller()
    first, beside = pending("side-a"), pending("side-b")
    first.send()
    mine = first.jobs
    beside.send()
    assert first.make("cancel").stdout.startswith("cancelled ")
    left = queue_of(beside)
    assert left and set(left.values()) == {"PENDING"}, "the other run is touched"
    assert set(beside.jobs.values()) <= set(
        inside("squeue", "--noheader", "--format=%F").stdout.split()
    )
    beside.make("cancel")
    first.send()
    reset_controller()
    second = pending("side-c")
    second.send()
    assert set(second.jobs.values()) & set(mine.values()), "ids did not come again"
    before = queue_of(second)
    shown = inside("make", "status", f"RUN={first.path}", check=False).stdout
    assert "pending" not in shown and "nothing of" in shown, shown
    assert "is in the queue any more" in first.make("cancel").stdout
    first.send()
    now = queue_of(second)
    assert {name: now.get(name) for name in before} == before
    assert len(now) == 2 * len(before)


def test_a_shells_squeue_filters_are_not_seen_through(emptied: None) -> None:
    run = pending("filters")
    run.send()

    def states(text: str) -> list[str]:
        return re.findall(r"^\S+ +\d\S* +\w+", text, re.MULTILINE)

    plain = states(inside("make", "status", f"RUN={run.path}").stdout)
    assert len([line for line in plain if line.endswith("pending")]) > 10
    for setting in ("SQUEUE_STATES=RUNNING", "SQUEUE_PARTITION=urgent", "SQUEUE_FORMAT=%j"):
        shown = inside("env", setting, "make", "status", f"RUN={run.path}").stdout
        assert states(shown) == plain, setting
    inside("env", "SQUEUE_STATES=RUNNING", "make", "cancel", f"RUN={run.path}")
    assert until("an empty queue", nothing_is_queued)


def test_sbatch_that_talks_of_another_job(emptied: None) -> None:
    words = ["sbatch", "--parsable", "--begin=now+2hours", "--output=/dev/null", "--wrap", "true"]
    victim = inside(*words).stdout.strip()
    folder = RUNS / "wrap"
    inside("mkdir", "-p", str(folder))
    wrapper = folder / "sbatch"
    wrapper.write_text(
        '#!/bin/bash\n[[ " $* " == *--test-only* ]] ||'
        f' echo "Quota check for job {victim} of 5 ... OK"\n'
        'exec /usr/bin/sbatch "$@"\n'
    )
    wrapper.chmod(0o755)
    run, path = pending("wrapped"), inside("bash", "-c", "echo $PATH").stdout.strip()
    submit = ["python", "-m", "slurm.submit", "--cluster", str(run.profile), "--config", CONFIG]
    inside("env", f"PATH={folder}:{path}", *submit, "--run", str(run.path))
    assert victim not in run.jobs.values() and len(queue_of(run)) == 1 + len(run.jobs)
    wrapper.write_text(
        '#!/bin/bash\nout=$(/usr/bin/sbatch "$@") || exit\necho "${out##* }"\n'  # the bare id
    )
    run.make("cancel")
    inside("env", f"PATH={folder}:{path}", *submit, "--run", str(run.path))
    run.make("cancel")
    state = inside("squeue", "--noheader", f"--jobs={victim}", "--format=%T").stdout.strip()
    assert state == "PENDING", "the other job is gone"


def test_a_cancelled_arm_is_sent_again_while_the_rest_waits(emptied: None) -> None:
    run = pending("arm")
    run.send()
    before = run.jobs
    inside("make", "cancel", f"RUN={run.path}", "UNIT=ppo/penalty-seed0")
    gone = before["evaluate.penalty-seed0"]
    until(
        "its evaluation's end",
        lambda: not inside("squeue", "--noheader", f"--jobs={gone}", check=False).stdout.strip(),
    )
    said = run.send().stdout
    changed = {batch for batch, id_ in run.jobs.items() if before[batch] != id_}
    assert changed == {"ppo.penalty-seed0", "evaluate.penalty-seed0", "report"}, said
    assert "attached to what still runs or waits" in said and "cancelled, since sent anew" in said


def test_a_job_that_cannot_write_its_log_is_told_as_failed(emptied: None) -> None:
    run = SiteRun("nolog", container=None, extra={"begin": "now+10"})
    run.send()
    (folder,) = (path.parent for path in run.path.glob("submissions/*/journal.json"))
    inside("chmod", "500", str(folder))
    job = run.jobs["fetch"]
    try:
        until(
            "its end",
            lambda: (
                "FAILED"
                in inside("squeue", "--noheader", "--states=all", f"--jobs={job}", "-o%T").stdout
            ),
        )
    finally:
        inside("chmod", "700", str(folder))
    shown = inside("make", "status", f"RUN={run.path}", check=False)
    assert re.search(r"fetch +\d+ +FAILED: .*left no log; could it write in", shown.stdout), shown
    assert shown.returncode != 0


def test_slurm_in_a_folder_of_its_own(emptied: None) -> None:
    """/opt/slurm/bin, put on PATH by /etc/profile.d alone; one job goes as far as srun's log."""
    tools = "sbatch srun squeue scontrol scancel sinfo sacct"
    there = f"""mkdir -p /opt/slurm/bin; for b in {tools}; do mv /usr/bin/$b /opt/slurm/bin/; done
        echo 'export PATH=/opt/slurm/bin:$PATH' >/etc/profile.d/slurm.sh"""
    back = f"""for b in {tools}; do mv /opt/slurm/bin/$b /usr/bin/; done
        rm /etc/profile.d/slurm.sh"""
    inside("bash", "-ec", there, root=True)
    try:
        run = SiteRun("elsewhere", container=None)
        path = "/opt/slurm/bin:" + inside("bash", "-c", "echo $PATH").stdout.strip()
        words = ["--cluster", str(run.profile), "--config", CONFIG, "--run", str(run.path)]
        env = ["env", f"PATH={path}", "python", "-m"]
        doctor = inside(*env, "slurm.doctor", *words, check=False).stdout
        assert "ok        node: it finds srun, scontrol" in doctor, doctor
        inside(*env, "slurm.submit", *words, "--phase", "fetch")
        log = run.path / "logs" / "fetch.all.log"
        until("the phase's own log", lambda: log.exists() and "=== job" in log.read_text())
    finally:
        inside("bash", "-ec", back, root=True)


def test_by_hand_inside_an_salloc(emptied: None) -> None:
    """The allocation's own sizes reach sbatch by --export=ALL, and srun would take them."""
    run, profile = RUNS / "salloc", pending("salloc-profile").profile
    inside("rm", "-rf", str(run))
    inside("mkdir", "-p", str(run))
    out = RUNS / "scripts"
    inside("python", "-m", "slurm.sbatch", "--cluster", str(profile), "--out", str(out))
    # only srun's way to its command is looked at, and now
    text = (out / "fetch.sbatch").read_text().replace("now+2hours", "now")
    short = out / "salloc.sbatch"
    inside(
        "bash",
        "-c",
        f"cat >{short} <<'END'\n{text.replace('.venv/bin/python -m', 'echo ran -m')}\nEND",
    )
    sbatch = f"sbatch --wait --output={run}/log --export=ALL,CONFIG={CONFIG},RUN={run} {short}"
    inside("salloc", "--mem-per-cpu=500", "-n2", "bash", "-c", sbatch, check=False)
    assert "ran -m slurm.entry" in (run / "log").read_text(), (run / "log").read_text()


SECOND = r"""
mkdir -p /etc/slurm-gpu
port=$(sed -n s/SlurmctldPort=//p /etc/slurm/slurm.conf)
sed -e s/^ClusterName=.*/ClusterName=gpu/ -e s/^SlurmctldPort=.*/SlurmctldPort=$((port + 6))/ \
  -e 's#^\(StateSaveLocation\|SlurmdSpoolDir\)=/var/spool/slurm/#&gpu-#' \
  -e 's#^\(SlurmctldPidFile\|SlurmdPidFile\)=/run/#&gpu-#' \
  -e 's#^\(SlurmctldLogFile\|SlurmdLogFile\)=/var/log/slurm/#&gpu-#' \
  -e /^NodeName=/d -e s/^PartitionName=/#/ /etc/slurm/slurm.conf >/etc/slurm-gpu/slurm.conf
cat >>/etc/slurm-gpu/slurm.conf <<END
NodeName=x1 NodeHostname=login Port=$((port + 7)) CPUs=8 RealMemory=32000 Gres=gpu:h100:4
PartitionName=cpu Nodes=x1 Default=YES
PartitionName=gpu Nodes=x1
END
cp /etc/slurm/cgroup.conf /etc/slurm-gpu/
echo 'NodeName=x1 Name=gpu Type=h100 File=/dev/fakegpu[0-3]' >/etc/slurm-gpu/gres.conf
sacctmgr -iQ add cluster gpu
sacctmgr -iQ add account sarm Cluster=gpu
sacctmgr -iQ add user sarm Account=sarm Cluster=gpu
export SLURM_CONF=/etc/slurm-gpu/slurm.conf
slurmctld -c
slurmd -N x1
until [[ $(sinfo -h -N -o %T | sort -u) == idle ]]; do sleep 0.3; done
until sinfo -M gpu -h; do sleep 0.3; done
"""


@pytest.fixture
def second_cluster() -> Iterator[None]:
    """Another cluster, `gpu`, of one node, in the same accounting; ids begin anew on both."""
    reset_controller()
    inside("env", "-u", "SLURM_CONF", "bash", "-ec", SECOND, root=True)
    yield
    inside("bash", "-c", "scancel --user=sarm; scancel --clusters=gpu --user=sarm")
    lines = """kill -KILL $(cat /run/gpu-slurmctld.pid) $(cat /run/gpu-slurmd-x1.pid)
        rm -r /etc/slurm-gpu /var/spool/slurm/gpu-*; sacctmgr -iQ delete cluster gpu"""
    inside("bash", "-c", lines, root=True, check=False)


def on(cluster: str) -> dict[str, str]:
    words = ["squeue", f"--clusters={cluster}", "--noheader", "--format=%j|%T"]
    lines = [line for line in inside(*words).stdout.splitlines() if "|" in line]
    return dict(line.rsplit("|", 1) for line in lines)


@needs_accounting
def test_two_clusters_whose_ids_are_the_same(emptied: None, second_cluster: None) -> None:
    dev = inside("bash", "-c", "sed -n s/^ClusterName=//p /etc/slurm/slurm.conf").stdout.strip()
    here, there = pending("here"), pending("there", clusters="gpu")
    said = inside(
        *["env", "SLURM_CLUSTERS=gpu", "python", "-m", "slurm.doctor"],
        *["--cluster", str(here.profile), "--config", CONFIG, "--run", str(here.path)],
        check=False,
    ).stdout
    assert "ok        Slurm: it would take all" in said, said
    here.send()
    there.send()
    assert set(here.jobs.values()) & set(there.jobs.values()), "ids are not the same"
    assert set(on(dev).values()) == set(on("gpu").values()) == {"PENDING"}
    for run, other in ((here, "gpu"), (there, dev)):
        words = ["env", f"SLURM_CLUSTERS={other}", "make", "status", f"RUN={run.path}"]
        assert inside(*words).stdout.count("pending") > 10
    before = on(dev)
    words = ["env", f"SLURM_CLUSTERS={dev}", "make", "cancel", f"RUN={there.path}"]
    assert inside(*words).stdout.startswith("cancelled ")
    until("an empty queue", lambda: not on("gpu"))
    assert on(dev) == before, "the run on the other cluster is touched"
    there.send()
    here.make("cancel")
    assert len(on("gpu")) == len(there.jobs)
    there.make("cancel")
    # and one that starts there, as far as its phase's own log
    ran = SiteRun("ran-there", container=None, clusters="gpu")
    ran.send("--phase", "fetch")
    log = ran.path / "logs" / "fetch.all.log"
    until("the phase's own log", lambda: log.exists() and "=== job" in log.read_text())


LOGIN = """
export PYTHONHOME=/opt/conda APPTAINERENV_PYTHONHOME=/opt/conda APPTAINER_CLEANENV=1
export APPTAINER_CONTAINALL=1 APPTAINERENV_PATH=/opt/conda/bin:/usr/bin:/bin PYTHONPATH=/elsewhere
export SQUEUE_STATES=RUNNING APPTAINER_BIND=/srv SLURM_CLUSTERS=nowhere TMPDIR=/nowhere
export APPTAINERENV_TMPDIR=/nowhere APPTAINERENV_HF_HUB_OFFLINE=0 APPTAINERENV_SLURM_PROCID=3
export APPTAINERENV_HF_TOKEN=hf_canary CUDA_VISIBLE_DEVICES=7
"""


def test_a_login_environment_changes_nothing_in_a_real_image(
    undisturbed: ClusterRun, emptied: None
) -> None:
    run = undisturbed.copy("login", "steer/all", "evaluate/base", "report/all")
    home = STATE / "home" / ".bash_profile"
    inside("bash", "-c", f"cat >{home} <<'END'\n{LOGIN}END")
    try:
        limits = f"ulimit -St 3; make submit-all CLUSTER=development CONFIG={CONFIG} RUN={run.path}"
        inside("bash", "-c", limits)
        run.wait()
    finally:
        inside("rm", str(home))
    assert "undone" not in run.attempts().values(), run.report()
    assert run.figures() == undisturbed.figures()


def on_two_nodes(undisturbed: ClusterRun, name: str) -> tuple[ClusterRun, str]:
    """A run whose policy is trained on two nodes, two ranks each, and its job."""
    run = undisturbed.copy(name, f"ppo/{PPO}")
    shipped = yaml.safe_load((CLUSTERS / "development.yaml").read_text())
    shipped["phases"]["ppo"] |= {"nodes": 2, "gpus": 2}
    profile = RUNS / f"{name}.yaml"
    profile.write_text(yaml.safe_dump(shipped))
    words = ["--cluster", str(profile), "--config", CONFIG, "--run", str(run.path)]
    assert "2 nodes, 4 tasks, 4 GPUs" in inside("python", "-m", "slurm.submit", *words).stdout
    return run, run.jobs[f"ppo.{PPO}"]


def test_ppo_on_two_nodes_trains_as_four_ranks_on_one(
    undisturbed: ClusterRun, emptied: None
) -> None:
    run, _ = on_two_nodes(undisturbed, "twonodes")
    run.wait()
    manifest = run.dir.manifest("ppo", PPO)
    assert manifest is not None and manifest.more["ranks"] == 4
    assert run.figures() == undisturbed.figures()
    shown = inside("python", "-m", "slurm.status", "--run", str(run.path), "--json").stdout
    assert json.loads(shown)["state"] == "done"


OF_NODE = """
import os, pathlib, sys

def of(pid, what):
    try:
        return pathlib.Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""

node, pids = sys.argv[1].encode(), [int(name) for name in os.listdir("/proc") if name.isdigit()]
daemons = [pid for pid in pids if of(pid, "cmdline").startswith(b"slurmd\\0-N\\0" + node)]
found = {pid for pid in pids if b"SLURMD_NODENAME=" + node in of(pid, "environ").split(b"\\0")}
for pid in list(found):
    while pid > 1 and of(pid, "comm").strip() != b"slurmstepd":
        found.add(pid)
        pid = int((of(pid, "stat").rpartition(b")")[2].split() or [0, 0])[1])
    daemons += [pid] if pid > 1 else []
print(*dict.fromkeys(daemons), *found)
"""
"""The processes of a node, its daemons first, which would tell of the others' end."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["KILL", "STOP"])
def test_a_dead_node_is_named_and_its_job_goes_on_from_its_checkpoint(
    undisturbed: ClusterRun, emptied: None, how: str
) -> None:
    """All of g2 at once, slurmd too: its connections are closed, or, as of a machine without
    power, only silent.
    """
    run, job = on_two_nodes(undisturbed, f"deadnode-{how.lower()}")
    log = run.path / "logs" / f"ppo.{PPO}.log"
    until(
        "a checkpoint",
        lambda: list((run.path / "ppo" / PPO).glob("checkpoints/step-*/manifest.json")),
        every_s=0.005,
    )
    victims = inside("python3", "-c", OF_NODE, "g2", root=True).stdout.split()
    assert len(victims) > 6, "slurmd, a slurmstepd, and of each rank at least Apptainer and entry"
    try:
        inside("kill", f"-{how}", *victims, root=True, check=False)
        said = "no sign of life from node g2 (ranks 2, 3)"
        until("the word on the node", lambda: said in log.read_text())
        until(
            "the requeue",
            lambda: (
                inside("squeue", "--noheader", f"--jobs={job}", "--format=%T").stdout.strip()
                == "PENDING"
            ),
        )
    finally:
        inside("kill", "-KILL", *victims, root=True, check=False)
        inside("slurmd", "-N", "g2", root=True)
    run.wait()
    attempt = run.attempts()[f"ppo/{PPO}"]
    assert attempt.startswith(f"{job}-") and not attempt.startswith(f"{job}-0-")
    stopped, went_on = run.steps(PPO, f"{job}-0-"), run.steps(PPO, attempt.rpartition("-")[0])
    assert 0 < len(stopped) < len(went_on) == run.dir.config.ppo.steps
    assert run.figures() == undisturbed.figures()


def test_share_group_lets_a_colleague_read_results_and_nothing_that_is_run(
    tiny_models: None, emptied: None
) -> None:
    run = SiteRun("shared", share="group")
    words = ["--cluster", str(run.profile), "--config", CONFIG, "--run", str(run.path)]
    inside("bash", "-c", f"umask 002; python -m slurm.submit {' '.join(words)}")
    run.wait()
    assert "undone" not in run.attempts().values(), run.report()
    modes = {path: path.stat().st_mode & 0o777 for path in [run.path, *run.path.rglob("*")]}
    private = {path for path in modes if "submissions" in path.relative_to(run.path).parts}
    assert any(path.suffix == ".pkl" for path in private)
    for path, mode in modes.items():
        assert not mode & 0o027, f"{path} is {mode:o}"
        if path not in private:
            assert mode & 0o040 and path.suffix not in (".pkl", ".py", ".sh", ".pt", ".so"), path
    # the folders above, which are the site's
    for folder in (STATE / "home", RUNS):
        inside("chmod", "g+x", str(folder))
    inside("useradd", "--no-create-home", "--groups", "sarm", "colleague", root=True)
    try:
        colleague = ["setpriv", "--reuid=colleague", "--regid=colleague", "--init-groups"]
        shown = inside(*colleague, "cat", f"{run.path}/final_report.txt", root=True).stdout
        assert shown == run.report()
        listed = inside(*colleague, "find", str(run.path), "-type", "f", root=True, check=False)
        assert "submissions" not in listed.stdout and "Permission denied" in listed.stderr
        kept = len([p for p in modes if p.is_file() and p not in private])
        assert listed.stdout.count("\n") == kept
    finally:
        inside("userdel", "colleague", root=True)
        for folder in (STATE / "home", RUNS):
            inside("chmod", "g-x", str(folder))
