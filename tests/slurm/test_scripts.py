"""The scripts that jobs run, read and run: each trap of sbatch, submitit and Apptainer that one of
them once fell into.
"""

from __future__ import annotations

import difflib
import pickletools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sarm.config import PHASES, ROOT, load_config
from sarm.run import RunDir
from slurm import images
from slurm.images import binds
from slurm.profile import Profile, flags
from slurm.profile_file import load_profile
from slurm.script import python_command, script, srun_args
from tests.fakes.site import CONFIG, PROFILE, Site, batch_of
from tests.slurm.test_submit import batch_script

EVERYTHING = """
description: every key at once
partition: gpu
account: alignment
qos: normal
constraint: nvlink
reservation: friday
licenses: sarm:1
exclude: g[2-3]
exclusive: true
pack: 4
gpu_request: gpus-per-node
gpu_type: h100
memory: mem-per-gpu
array_throttle: 1
max_array_size: 2
mail_user: me@example.org
mail_type: END,FAIL
wckey: probing
max_requeues: 2
signal_lead_s: 300
extra: {nice: "100", verbose: true, spread-job: false}
phases: {ppo: {time_min: 90, qos: long, mem_gb: 400}}
"""


def sent(site: Site, name: str) -> str:
    """The script of the one job whose name ends so."""
    return next(job["text"] for job in site.jobs.values() if batch_of(job) == name)


def test_a_dry_run_prints_what_is_sent(
    site: Site, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = tmp_path / "sarm.sif"
    image.write_bytes(b"sif")
    site.profile.write_text(PROFILE + f"container: {{image: {image}}}\n")
    assert site.submit("--dry-run") == 0
    shown = capsys.readouterr().out
    assert site.submit() == 0
    submission = next((site.path / "submissions").glob("*/")).name
    ids = {batch_of(job): id_ for id_, job in site.jobs.items()}
    shown = re.sub(r"id-of-([\w.-]+)", lambda found: ids[found.group(1)], shown).replace(
        "dry-run", submission
    )
    texts = re.findall(r"^#!/bin/bash\n.*?^exit \$rc$", shown, re.MULTILINE | re.DOTALL)
    assert len(texts) == len(site.jobs)
    for text, job in zip(texts, site.jobs.values(), strict=True):
        assert text == job["text"].rstrip("\n"), "\n".join(
            difflib.unified_diff(text.splitlines(), job["text"].splitlines())
        )


def test_every_key_reaches_sbatch(site: Site) -> None:
    site.profile.write_text(EVERYTHING)
    assert site.submit() == 0
    ppo, probe = (
        {line for line in sent(site, name).splitlines() if line.startswith("#SBATCH")}
        for name in ("ppo.penalty-seed1", "probe")
    )
    both = """--account=alignment --constraint=nvlink --reservation=friday --licenses=sarm:1
        --exclude='g[2-3]' --exclusive --gpus-per-node=h100:4 --propagate=NONE --wckey=probing
        --signal=USR2@300 --requeue --nice=100 --verbose --partition=gpu --nodes=1
        --ntasks-per-node=4 --kill-on-invalid-dep=yes --export=NONE"""
    for lines in (ppo, probe):
        assert {f"#SBATCH {flag}" for flag in both.split()} <= lines
        assert not any("spread-job" in line or "gres" in line for line in lines)
    assert {
        "#SBATCH --time=90",
        "#SBATCH --qos=long",
        "#SBATCH --mem-per-gpu=102400M",
        "#SBATCH --cpus-per-task=12",
    } <= ppo
    # Five shards, four a job: an array of two, one at a time.
    assert {
        "#SBATCH --time=60",
        "#SBATCH --qos=normal",
        "#SBATCH --mem-per-gpu=65536M",
        "#SBATCH --array=0-1%1",
    } <= probe
    assert '"$tries" -le 2 ]; then' in sent(site, "ppo.penalty-seed1")
    mailed = [batch_of(job) for job in site.jobs.values() if "--mail-" in job["text"]]
    assert mailed == ["report"], "one mail, when the run has ended"
    assert {"#SBATCH --mail-user=me@example.org", "#SBATCH --mail-type=END,FAIL"} <= set(
        sent(site, "report").splitlines()
    )


@pytest.mark.parametrize(
    ("phase", "together"),
    [("ppo", ["--kill-on-bad-exit=1"]), ("probe", ["--kill-on-bad-exit=0", "--wait=0"])],
)
def test_ranks_fall_together_and_packed_shards_do_not(phase: str, together: list[str]) -> None:
    profile = Profile(description="x", pack=4)
    assert srun_args(profile, phase) == [
        "--nodes=1",
        "--ntasks=4",
        f"--cpus-per-task={flags(profile, phase)['cpus-per-task']}",
        "--export=ALL",
        *together,
    ]  # type: ignore[arg-type]


def test_the_container_keeps_slurms_variables_and_none_of_the_home(tmp_path: Path) -> None:
    profile = Profile.model_validate(
        {"description": "x", "container": {"image": "i.sif", "binds": ("/data/b",)}}
    )
    ppo, report = (
        python_command(profile, phase, Path("/i.sif"), ["/run dir"], "unused")
        for phase in ("ppo", "report")
    )  # type: ignore[arg-type]
    # --cleanenv would take SUBMITIT_EXECUTOR and SLURM_PROCID from the job.
    assert (
        ppo == f"apptainer exec --nv --no-home --pwd {ROOT} --bind '/run dir' --bind /data/b /i.sif"
        " python3"
    )
    assert "--nv" not in report


def test_what_is_pickled_is_a_name_and_a_path(site: Site) -> None:
    site.submit()
    pickles = list((site.path / "submissions").glob("*/*_submitted.pkl"))
    assert len(pickles) == 17, "one a unit"
    for path in pickles:
        strings = [
            arg
            for op, arg, _ in pickletools.genops(path.read_bytes())
            if op.name.endswith("UNICODE")
        ]
        assert (
            "slurm.entry" in strings
            and "run_spec" in strings
            and not any("cloudpickle" in text for text in strings)
        )
        assert path.stat().st_size < 1000
    folder = pickles[0].parent
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700, (
        "submitit unpickles what lies there"
    )


def test_login_node_and_images_have_the_same_submitit() -> None:
    locks = [
        (ROOT / "requirements" / f"{name}.lock").read_text()
        for name in ("light", "report", "cpu", "cuda")
    ]
    for package in ("submitit", "cloudpickle"):
        assert (
            len({tuple(re.findall(rf"^{package}==\S+", lock, re.MULTILINE)) for lock in locks}) == 1
        ), package


def test_a_jobs_scratch_is_its_own_and_goes_with_it(site: Site, tmp_path: Path) -> None:
    scratch = tmp_path / "node scratch"
    scratch.mkdir()
    site.submit()
    srun = (
        f'echo "$TMPDIR $TRITON_CACHE_DIR $APPTAINER_BIND" >{tmp_path}/said; touch "$TMPDIR/left";'
        " exit 3"
    )
    for elsewhere in ("/no/such/folder", ""):  # a login node's, or none
        assert batch_script(site, "select", srun, TMPDIR=elsewhere) == (3, [])
        assert (tmp_path / "said").read_text().startswith("/tmp/sarm-")
    assert batch_script(site, "select", srun, TMPDIR=str(scratch)) == (3, [])
    folder, cache, bind = (
        (tmp_path / "said").read_text().replace("node scratch", "node-scratch").split()
    )
    assert (
        re.fullmatch(rf"{tmp_path}/node-scratch/sarm-\w{{6}}", folder)
        and cache == f"{folder}/triton"
        and bind == folder
    )
    assert not list(scratch.iterdir())
    assert "/local/x/sarm-XXXXXX" in script(
        Profile(description="x", scratch="/local/x"), "probe", "x"
    )
    site.profile.write_text(PROFILE + "container: {command: /opt/bin/singularity, image: x.sif}\n")
    text = script(load_profile(str(site.profile)), "probe", "x")
    assert (
        'SINGULARITY_BIND="${SINGULARITY_BIND:+$SINGULARITY_BIND,}$TMPDIR"' in text
        and "export APPTAINER_BIND" not in text
        and "APPTAINER_BIND=" not in text
    ), "which that one does not read"


def test_a_scratch_that_is_not_there_ends_the_job(site: Site) -> None:
    site.profile.write_text(PROFILE + "scratch: /no/such/place\n")
    site.submit()
    assert batch_script(site, "select", "exit 0") == (1, [])


def test_a_job_that_slurm_requeued_too_often_gives_up(site: Site) -> None:
    site.submit()
    assert batch_script(site, "select", "exit 0", tries=3, SLURM_RESTART_COUNT="6") == (0, [])
    assert batch_script(site, "select", "exit 0", tries=4, SLURM_RESTART_COUNT="4") == (1, [])


def test_a_stand_alone_script_does_one_shard_an_element() -> None:
    text = script(Profile(description="x", pack=4), "probe", "x")
    assert (
        "#SBATCH --ntasks-per-node=1\n" in text
        and "#SBATCH --gres=gpu:1\n" in text
        and "#SBATCH --mem=64G\n" in text
    )


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=$(wc -w <<<"$RANKS")
for rank in $RANKS; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!); done
worst=0
for _ in $RANKS; do
  wait -n; code=$?
  ((code == 0)) || kill "${pids[@]}"
  worst=$((code > worst ? code : worst))
done 2>/dev/null
exit $worst
"""
PHASE = """
import glob, os, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75)) if sys.argv[1] == "ppo" else None
print(*sys.argv[1:], "rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), flush=True)
open(f"up.{{os.environ.get('RANK')}}", "w").close()
while len(glob.glob("up.*")) < int(os.environ.get("WORLD_SIZE", 1)): time.sleep(0.01)
{does}
"""
TOLD = (
    "os.environ.get('RANK', '0') == '0' and os.kill({}, signal.SIGUSR2); time.sleep(2 if"
    " sys.argv[1] == 'select' else 600)"
)


def by_hand(
    tmp_path: Path, phase: str, does: str, ranks: str = "0", restarts: str = "0"
) -> tuple[int, str, list[str]]:
    """(exit code, output, calls of scontrol) of a stand-alone script on a machine where a phase
    `does` something.
    """
    for name in ("slurm", "sarm"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    files = {
        "jobs/__main__.py": PHASE.format(does=does),
        "bin/srun": SRUN,
        "bin/scontrol": f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\n',
        ".venv/bin/python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
        "calls": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    text = script(Profile(description="x", max_requeues=2), phase, "x")
    for up in tmp_path.glob("up.*"):
        up.unlink()
    env = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "CONFIG": "c",
        "RUN": "runs/a run",
    }
    slurm = {
        "SLURM_JOB_ID": "5",
        "SLURM_RESTART_COUNT": restarts,
        "SLURMD_NODENAME": "node7",
        "RANKS": ranks,
    }
    done = subprocess.run(
        ["bash"],
        input=text,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env | slurm,
        timeout=120,
    )
    return done.returncode, done.stdout, (tmp_path / "calls").read_text().splitlines()


def test_a_stand_alone_ppo_that_was_told_requeues_whatever_code_srun_returns_and_not_for_ever(
    tmp_path: Path,
) -> None:
    told = TOLD.format("os.getppid()")  # as Slurm would, here for one rank; srun ends the others
    code, said, calls = by_hand(tmp_path, "ppo", told, "0 1 2")
    assert calls == ["requeue 5"] and code == 128 + 15, said
    assert "ppo --config c --run runs/a run rank 2 of 3" in said
    assert (tmp_path / "runs/a run/submissions").stat().st_mode & 0o077 == 0, (
        "where submissions keep what jobs unpickle"
    )
    assert by_hand(tmp_path, "ppo", told, "0", restarts="2")[2] == ["requeue 5"], (
        "a restart that Slurm counts twice is one try"
    )
    assert by_hand(tmp_path, "ppo", told, "0", restarts="3")[::2] == (75, []), (
        "the third try is the last"
    )
    assert "given up" in by_hand(tmp_path, "ppo", "", "0", restarts="4")[1]


def test_a_stand_alone_ppo_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    code, said, calls = by_hand(
        tmp_path,
        "ppo",
        "os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(600)",
        "0 1 2",
    )
    assert code > 128 and calls == []
    assert "error: rank 1 of 3 on node7 was killed by SIGKILL" in said


def test_a_stand_alone_shard_outlives_the_signal_for_those_that_checkpoint(tmp_path: Path) -> None:
    for whom in ("os.getpid()", "os.getppid()"):
        code, said, calls = by_hand(tmp_path, "select", TOLD.format(whom))
        assert (code, calls) == (
            0,
            [],
        ) and "select --config c --run runs/a run rank None" in said, said


@pytest.mark.parametrize("phase", PHASES)
def test_a_stand_alone_script_without_its_image_says_so(phase: str, tmp_path: Path) -> None:
    text = (ROOT / "slurm" / f"{phase}.sbatch").read_text()
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "CONFIG": "c",
        "RUN": str(tmp_path / "run"),
    }
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=env)
    assert done.returncode == 2 and f"{tmp_path} is not the checkout" in done.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "entry.py").touch()
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=env)
    assert done.returncode == 2 and "make images" in done.stderr


def test_what_the_config_names_outside_the_checkout_is_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("policy", "store/judge", "store/data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "store")
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "not-made-yet"))
    path = tmp_path / "config.yaml"
    path.write_text(
        CONFIG.replace("{model: p}", f"{{model: {tmp_path}/policy}}").replace(
            "data/demo/pairs.jsonl", f"{tmp_path}/link/data"
        )
    )
    config = load_config(
        path,
        [
            f"evaluate.judge={{model: {tmp_path}/store/judge, labels: {{bad: harm}}}}",
            "steer.file=data/demo/pairs.jsonl",
        ],
    )
    found = binds(RunDir(tmp_path / "run", config), "evaluate")
    for place in ("policy", "link/data", "store/data", "store/judge", "not-made-yet"):
        assert f"{tmp_path / place}:{tmp_path / place}:ro" in found
    assert not any("pairs.jsonl" in bind for bind in found), "the checkout holds it"


def test_an_image_without_a_note_is_hashed_once(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, hashed = tmp_path / "sarm.sif", []
    image.write_bytes(b"sif")
    true = images.file_sha256
    monkeypatch.setattr(images, "file_sha256", lambda path: hashed.append(path) or true(path))
    site.profile.write_text(PROFILE + f"container: {{image: {image}}}\n")
    assert site.submit() == 0
    assert hashed == [image]


@pytest.mark.parametrize(
    ("uid", "apptainer", "entered"),
    [
        (0, "own", False),
        (0, "cluster's", True),
        (0, None, True),
        (1000, "own", False),
        (1000, None, False),
    ],
)
def test_only_root_without_an_apptainer_of_its_own_builds_in_the_development_cluster(
    tmp_path: Path, uid: int, apptainer: str | None, entered: bool
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "id").write_text(f"#!/bin/sh\necho {uid}\n")
    (folder / "id").chmod(0o755)
    if apptainer == "own":
        (folder / "apptainer").write_text("#!/bin/sh\n")
        (folder / "apptainer").chmod(0o755)
    # Nothing but make's own needs, so that an Apptainer of this machine is not found.
    for name in ("make", "bash"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    path = f"{folder}:{ROOT / 'tests/cluster/bin'}" if apptainer == "cluster's" else str(folder)
    done = subprocess.run(
        ["make", "-n", "images", "KIND=light"],
        cwd=ROOT,
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("in-cluster" in done.stdout) == entered and "containers/build" in done.stdout
