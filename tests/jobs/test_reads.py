"""The table of which config values each phase reads, against what a tiny pipeline really reads.

`test_pipeline.py` traces the same of its own run, with the fast tests.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sarm.config import NON_PHASE_JOBS, PHASES, ROOT
from sarm.config.reads import READS
from sarm.run import RunDir
from tests.tiny import tiny_config
from tests.tracing import traced, undeclared

READ_AT_TIMES = {
    ("select", "sarm"),
    ("calibrate", "select.monitors"),
    ("calibrate", "select.monitor_max_cosine"),
    ("calibrate", "select.monitor_max_correlation"),
}
"""Of latents that might be monitors, where there are any."""
MORE = {
    "check_sarm.measure": True,
    "steer.policy": {"latents": 1, "random": 1, "strengths": [2.0]},
    "sweep": {"tau": [0.5], "alpha": [0.5]},
    "data.sources.demo.split": {
        "sarm_train": 0.2,
        "discovery": 0.4,
        "validation": 0.1,
        "test": 0.1,
        "ppo": 0.1,
        "policy_eval": 0.1,
    },
    "ppo.penalty.tau": 0.0,
    "ppo.penalty.tau_quantile": None,
    "ppo.held_out": {"every": 2, "prompts": 2, "completions": 1},
    "ppo.kl_distances": [0.01],
    "ppo.log_to": "tensorboard",
    "evaluate.arms": ["prompted", "best_of_n"],
}
"""Beside what `configs/tiny.yaml` asks for: more of what a phase may read."""


@pytest.mark.slow
def test_no_phase_reads_what_the_table_does_not_say_nor_lists_what_none_reads(
    tmp_path: Path,
) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text(
        "".join(
            json.dumps({"prompt": "How?", "response": text, "refused": refused}) + "\n"
            for text, refused in (("I cannot help you with that.", True), ("So.", False))
        )
    )
    more = MORE | {"evaluate.refusal_labels": str(labels)}
    run = RunDir.create(tmp_path / "run", tiny_config(tmp_path, **more))
    read: dict[str, set[str]] = {}
    with traced() as run_traced:
        for phase in (*PHASES[:-1], *NON_PHASE_JOBS):
            for unit in run.config.units(phase) if phase in PHASES else ("all",):  # type: ignore[arg-type]
                read.setdefault(phase, set()).update(run_traced(run, phase, unit))
    assert undeclared(read) == {}
    unread = {
        phase: [
            entry
            for entry in READS[phase]
            if not entry.startswith("!")
            and (phase, entry) not in READ_AT_TIMES
            and entry != "encode.shards"  # read where shards are merged, by the run's own config
            and not any(key == entry or key.startswith(entry + ".") for key in keys)
        ]
        for phase, keys in read.items()
    }
    assert not any(unread.values()), {phase: keys for phase, keys in unread.items() if keys}


def test_jobs_read_the_config_that_they_are_given() -> None:
    """`run.config` would go past the trace."""
    for file in sorted((ROOT / "jobs").glob("*.py")):
        if file.stem not in ("report", "fetched", "__main__"):
            assert "run.config" not in file.read_text(encoding="utf-8"), file
