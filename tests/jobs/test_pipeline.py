"""The whole pipeline on tiny models: every phase for real, then by the local launcher again, then
repaired.

The launcher's jobs import torch one by one, which is most of their time. So the phases run in one
process here; `python -m pytest -m slow tests/jobs/test_pipeline.py` and `make demo` have the
launcher start all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import run_unit
from sarm.config import ROOT, load_config
from sarm.run import RunDir
from slurm.dag import tasks
from tests.tiny import write_tiny_policy, write_tiny_sarm
from tests.tracing import traced, undeclared

OVERRIDES = (
    "ppo.arms=[penalty, no_penalty]",
    "ppo.steps=2",
    "encode.shards=1",
    "probe.shards=2",
    "evaluate.prompts=4",
)


def overrides(folder: Path) -> list[str]:
    """The config's, with the models in `folder`."""
    return [f"policy.model={folder / 'policy'}", f"sarm.model={folder / 'sarm'}", *OVERRIDES]


def launch(folder: Path, run: str = "run", *more: str) -> subprocess.CompletedProcess[str]:
    words = ["--config", "configs/tiny.yaml", "--run", str(folder / run)]
    return subprocess.run(
        [sys.executable, "-m", "slurm.local", *words, *overrides(folder), *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def figures(text: str) -> str:
    """What a report says of latents, training, calibration and the verdict: no paths, no times."""
    first = text.partition("PHASE 2")[2].partition("OUTPUT FILES")[0]
    return first + text.partition("ABSTRACT")[2].partition("FAILED AND MISSING")[0]


@pytest.fixture(scope="module")
def read() -> dict[str, set[str]]:
    """The config's keys that each phase read, once the run is finished."""
    return {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, read: dict[str, set[str]]) -> Path:
    """A folder with tiny models and a finished run."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_tiny_policy(folder / "policy")
    write_tiny_sarm(folder / "sarm")
    config = load_config(ROOT / "configs" / "tiny.yaml", overrides(folder))
    run = RunDir.create(folder / "run", config)
    with traced() as run_traced:
        for task in tasks(config):
            phase, unit = task.node
            if phase == "report":
                run_unit(run, phase, unit)
            else:
                read.setdefault(phase, set()).update(run_traced(run, phase, unit))
    return folder


@pytest.mark.slow
def test_the_launcher_starts_every_phase_and_writes_the_same_figures(finished: Path) -> None:
    done = launch(finished, "launched")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("final_report.txt")
    ours, theirs = (finished / run / "final_report.txt" for run in ("launched", "run"))
    assert figures(ours.read_text()) == figures(theirs.read_text()) != ""


def test_no_phase_reads_what_the_table_does_not_say(
    finished: Path, read: dict[str, set[str]]
) -> None:
    """`test_reads.py` asks for more of what may be read."""
    assert {"fetch", "encode", "probe", "select", "calibrate", "ppo", "evaluate"} <= read.keys()
    assert undeclared(read) == {}


def test_the_report_is_read_from_job_outputs(finished: Path) -> None:
    run = RunDir.open(finished / "run")
    text = (run.path / "final_report.txt").read_text()
    assert text == run.read("report").path("final_report.txt").read_text()
    features = run.read("select").json("features.json")
    metrics = [
        json.loads(line)
        for line in run.read("ppo", "penalty-seed0").path("metrics.jsonl").read_text().splitlines()
    ]
    assert (
        "Features Penalized: " + ", ".join(str(p["latent"]) for p in features["penalised"]) in text
    )
    assert (
        f"Step {metrics[-1]['step'] + 1}: reward={metrics[-1]['objective/compound']:.3f},"
        f" penalty={metrics[-1]['objective/penalty']:.3f}" in text
    )
    assert "every phase is done" in text and "Verdict: " in text
    assert run.config.sha256 in text


def test_a_second_run_skips_everything_and_says_so(finished: Path) -> None:
    again = launch(finished)
    assert again.returncode == 0
    assert again.stdout.count("skipped, done already") == 14
    assert again.stdout.count("running") == 0
    assert again.stdout.rstrip().endswith("final_report.txt")


def test_a_config_of_another_name_is_refused_for_the_same_run(finished: Path) -> None:
    other = launch(finished, "run", "name=other")
    assert other.returncode == 2
    assert other.stderr.count("\n") == 1 and "a run of the config 'tiny'" in other.stderr


def test_a_flipped_bit_upstream_redoes_what_it_touches_with_the_same_numbers(
    finished: Path,
) -> None:
    run = RunDir.open(finished / "run")
    before = (run.path / "final_report.txt").read_text()
    shard = run.read("probe", "shard-0001-of-0002").path("table.parquet")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    again = launch(finished)
    assert again.returncode == 0, again.stderr
    assert "probe/shard-0000-of-0002     skipped, done already" in again.stdout
    assert "probe/shard-0001-of-0002     done" in again.stdout
    after = (run.path / "final_report.txt").read_text()
    assert figures(after) == figures(before)
