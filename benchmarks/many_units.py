"""A run of a thousand units: what a submission, a second one, status and cancel take, on the
pretended Slurm of the tests, whose every command is a Python process.

    python benchmarks/many_units.py

Wanted: status under 5 s, submission under 30 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sarm.config import ROOT, load_config
from sarm.run import Attempt, RunDir
from tests.fakes import slurm as fake
from tests.fakes.site import CONFIG, PROFILE


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slurm").mkdir()
        path = f"{fake.install(folder / 'bin')}:{os.environ['PATH']}"
        os.environ |= {"FAKE_SLURM": str(folder / "slurm"), "PATH": path}
        os.environ |= {"HF_HOME": str(folder / "hf"), "SARM_CACHE": str(folder / "cache")}
        config, profile = folder / "config.yaml", folder / "site.yaml"
        sizes = CONFIG.replace("{shards: 2}", "{shards: 200}").replace(
            "{shards: 5}", "{shards: 800}"
        )
        config.write_text(sizes)
        profile.write_text(PROFILE.replace("max_array_size: 2", "max_array_size: 1000"))
        run = RunDir.create(folder / "run", load_config(config))
        publish(run, "fetch")
        where = ["--cluster", str(profile), "--config", str(config), "--run", str(run.path)]
        status = ["slurm.status", "--run", str(run.path)]
        timed("submission", ["slurm.submit", *where])
        timed("status, all waiting", status)
        timed("submission again", ["slurm.submit", *where])
        timed("cancel", [*status, "--cancel"])
        timed("status, cancelled", status)
        for phase in ("encode", "probe", "select"):
            publish(run, phase)
        timed("status, a thousand done", status)
    return 0


def publish(run: RunDir, phase: str) -> None:
    """Every unit of a phase, small; select with all shards of probe as its inputs."""
    for unit in run.config.units(phase):  # type: ignore[arg-type]
        attempt = Attempt(run, phase, unit)
        for need in run.config.units("probe") if phase == "select" else ():
            attempt.note(run.read("probe", need))
        attempt.path("x.json").write_text("{}")
        attempt.publish()


def timed(what: str, words: list[str]) -> None:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    took = time.perf_counter() - began
    print(f"{what:24} {took:6.2f} s, exit code {done.returncode}{done.stderr[-200:]}")


if __name__ == "__main__":
    sys.exit(main())
