"""The table of which config values each phase reads, against what a tiny pipeline really reads."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from sarm.config import NON_PHASE_JOBS, PHASES, ROOT, Config, Strict
from sarm.config.reads import READS, is_read
from sarm.run import Attempt, RunDir

UNITS = ("ppo.arms", "ppo.seeds", "sweep")
"""What only says which units there are."""
READ_AT_TIMES = {("select", "sarm")}
"""For the directions of latents that might be monitors, where there are any."""


class Trace:
    """Records the dotted keys whose values are read from one config, sections left out."""

    def __init__(self, config: Config) -> None:
        self.config, self.read = config, set[str]()
        self.places: dict[int, str] = {}
        self.kept: list[Any] = []  # so that no other object gets the number of one of these
        self._place(config, "")

    def _place(self, section: Any, where: str) -> None:
        if isinstance(section, BaseModel):
            self.places[id(section)] = where
            self.kept.append(section)
            children = section.__dict__.items()
        elif isinstance(section, dict):
            children = section.items()
        else:
            return
        for name, value in children:
            self._place(value, f"{where}.{name}" if where else name)

    def seen(self, section: Any, name: str) -> Any:
        """The attribute, noted where the section is one of this config, or a copy of one."""
        value = object.__getattribute__(section, name)
        where = self.places.get(id(section))
        if where is None:
            return value
        if name in type(section).model_fields:
            if not isinstance(value, BaseModel) and not _sections(value):
                self.read.add(f"{where}.{name}" if where else name)
        elif name == "model_dump":
            self.read.add(where)
        elif name == "model_copy":
            return lambda **change: self._copied(value(**change), where)
        return value

    def _copied(self, copy: Any, where: str) -> Any:
        self._place(copy, where)
        return copy


def _sections(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values())


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Trace]]:
    """The trace at the end of the list is told of every attribute of a config that is read."""
    traces: list[Trace] = []

    def seen(section: Any, name: str) -> Any:
        if traces and not name.startswith("_"):
            return traces[-1].seen(section, name)
        return object.__getattribute__(section, name)

    monkeypatch.setattr(Strict, "__getattribute__", seen, raising=False)
    yield traces
    traces.clear()


@pytest.mark.slow
def test_no_phase_reads_what_the_table_does_not_say_nor_lists_what_none_reads(
    tmp_path: Path, traced: list[Trace]
) -> None:
    from tests.tiny import tiny_config

    more = {
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
    }
    config = tiny_config(tmp_path, **more)
    run = RunDir.create(tmp_path / "run", config)
    read: dict[str, set[str]] = {}
    for phase in (*PHASES[:-1], *NON_PHASE_JOBS):
        for unit in config.units(phase) if phase in PHASES else ("all",):  # type: ignore[arg-type]
            attempt = Attempt(run, phase, unit)
            given = config.model_copy(deep=True)
            traced.append(Trace(given))
            importlib.import_module(f"jobs.{phase}").run(given, run, unit, attempt)
            read.setdefault(phase, set()).update(traced.pop().read)
    unsaid = {
        phase: sorted(key for key in keys if not is_read(phase, key) and not key.startswith(UNITS))
        for phase, keys in read.items()
    }
    assert not any(unsaid.values()), {phase: keys for phase, keys in unsaid.items() if keys}
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
