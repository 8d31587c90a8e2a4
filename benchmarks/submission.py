"""Submitting the whole DAG against as many bare sbatch calls, and a job's way to its phase: on a
Slurm that is there.

    make cluster-up; tests/cluster/in-cluster python benchmarks/submission.py --cluster development

Bare sbatch is the peer: the same number of calls, in the same run, in turns. What is submitted
stays held and is cancelled, but for the start-up jobs, which the launcher's own script takes to
where `jobs` begins, before torch is imported. Needs the profile's images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from submitit.core.utils import DelayedSubmission

from sarm.config import ROOT, Phase, load_config
from sarm.run import RunDir
from slurm import queue, submit
from slurm.checks import check_batches, header
from slurm.display import show_sent
from slurm.entry import run_spec
from slurm.images import check_images, image_of, make_caches
from slurm.journal import journals
from slurm.plan import Batch, plan, undone
from slurm.profile import Profile
from slurm.profile_file import load_profile
from slurm.sending import text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", default="development")
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / "runs", help="seen by every node"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    profile, config = load_profile(args.cluster), load_config(args.config)
    if profile.fetch != "job":
        # Nothing is fetched for a benchmark: the job that would is submitted with the rest, and
        # cancelled with it.
        profile = profile.model_copy(update={"fetch": "job"})
    make_caches()
    folder = args.folder / f"bench-{uuid.uuid4().hex[:6]}"
    ours, bare = [], []
    for i in range(args.repeats):
        run = RunDir.create(folder / f"run-{i}", config)
        calls = len(plan(config, profile, undone(config, lambda node: False)))
        ours.append(submit_all(run, profile))
        bare.append(submit_bare(folder, profile, calls))
    more = [a - b for a, b in zip(ours, bare, strict=True)]
    print(
        f"submission, {calls} sbatch calls, {args.repeats} times in turns: whole DAG"
        f" {statistics.median(ours):.2f} s, bare {statistics.median(bare):.2f} s"
    )
    print(
        f"  more by {statistics.median(more):.2f} s [{min(more):.2f}, {max(more):.2f}], ratio"
        f" {statistics.median(ours) / statistics.median(bare):.2f}"
    )
    phases: tuple[Phase, ...] = ("encode", "report")
    for phase in phases:
        waits = [start_up(folder, profile, run, phase) for _ in range(args.repeats)]
        image = image_of(profile, phase)
        where = image.name if image else "no image"
        spread = f"{statistics.median(waits):.2f} s [{min(waits):.2f}, {max(waits):.2f}]"
        print(f"job's start to its phase, {phase} in {where}: {spread}")
    shutil.rmtree(folder)
    return 0


def submit_all(run: RunDir, profile: Profile) -> float:
    """Seconds of a whole submission, from the start of Python through all its checks to its table;
    cancelled afterwards.
    """
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import slurm.submit"], cwd=ROOT, check=True)
    with contextlib.redirect_stdout(io.StringIO()):
        check_images(profile)
        check_batches(profile, submit.decide(run, profile, submit.Asked()).batches)
        _, journal = submit.submit(run, profile)
        assert journal is not None
        show_sent(run, profile, journal)
    took = time.perf_counter() - began
    submit.cancel_submission(run, journals(run)[-1])
    return took


def submit_bare(folder: Path, profile: Profile, calls: int) -> float:
    """Seconds of as many sbatch calls of jobs that do nothing."""
    script = folder / "bare.sh"
    script.write_text(header(profile, "report"))
    began = time.perf_counter()
    ids = [
        queue.call(["sbatch", "--parsable", "--hold", "--output=/dev/null", str(script)]).strip()
        for _ in range(calls)
    ]
    took = time.perf_counter() - began
    queue.call(["scancel", *ids])
    return took


def start_up(folder: Path, profile: Profile, run: RunDir, phase: Phase) -> float:
    """Seconds from a job's first line through srun, image, submitit and `slurm.entry` to where
    `jobs` would import its phase.
    """
    code = (
        "import sys, time; import jobs.__main__; assert 'torch' not in sys.modules;"
        " open(sys.argv[1], 'w').write(str(time.time()))"
    )
    out = run.path / f"start-{uuid.uuid4().hex[:6]}"
    spec = Path(f"{out}.json")
    command = {"argv": ["-c", code, f"{out}.entered"], "log": f"{out}.log"}
    spec.write_text(
        json.dumps(
            {"commands": [command], "cwd": str(ROOT), "env": {}, "ranks": False, "grace_s": 60}
        )
    )
    batch = Batch(f"bench-{phase}", phase, (("all",),), (), "afterok")
    name, folder = uuid.uuid4().hex[:6], run.path / "submissions"
    (folder / name).mkdir(parents=True)
    call = DelayedSubmission(run_spec, str(spec))
    call.set_timeout(10, 0)
    script = folder / name / "start.sh"
    lines = text(run, profile, batch, {}, name, last=False).splitlines()
    at = lines.index("# setup") + 1
    script.write_text("\n".join([*lines[:at], f"date +%s.%N >{out}.began", *lines[at:]]) + "\n")
    job = queue.submitted_id(queue.call(["sbatch", str(script)]))
    call.dump(folder / name / f"{job}_submitted.pkl")
    queue.release([job])
    while any(found.id == job and found.live for found in queue.known_jobs()):
        time.sleep(0.5)
    return float(Path(f"{out}.entered").read_text()) - float(Path(f"{out}.began").read_text())


if __name__ == "__main__":
    sys.exit(main())
