"""Which config values phases read: `undeclared(read)` names those that `sarm/config/reads.py` does
not say.

    with traced() as run_traced:
        for phase, unit in ...:
            read[phase] |= run_traced(run, phase, unit)
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import BaseModel

from sarm.config import Config, Strict
from sarm.config.reads import is_read
from sarm.pinned import pinned
from sarm.run import Attempt, RunDir

UNITS = ("ppo.arms", "ppo.seeds", "sweep")
"""What only says which units there are."""
ONLY_LOOKED_AT = (
    "jobs.ppo.rule_sha256",
    "jobs.ppo.check_labels",
    "jobs.ppo.check_prompted",
    "jobs.fetch.check_labels",
    "jobs.fetch.check_prompted",
    "jobs.ppo_log.Log._shown",
)
"""Functions by which a phase looks at values without depending on them: the hash of rule and plan
that its manifest notes, what is refused before training, what a logger shows.
"""


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


@contextmanager
def traced() -> Iterator[Callable[[RunDir, str, str], set[str]]]:
    """Within, the function given does a unit and returns what it read of its config."""
    traces: list[Trace] = []

    def seen(section: Any, name: str) -> Any:
        if traces and not name.startswith("_"):
            return traces[-1].seen(section, name)
        return object.__getattribute__(section, name)

    def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def paused(*args: Any, **kwargs: Any) -> Any:
            held, traces[:] = traces[:], []
            try:
                return function(*args, **kwargs)
            finally:
                traces[:] = held

        return paused

    def run_traced(run: RunDir, phase: str, unit: str) -> set[str]:
        config = run.config if phase == "fetch" else pinned(run)
        trace = Trace(config.model_copy(deep=True))
        traces.append(trace)
        try:
            attempt = Attempt(run, phase, unit)
            importlib.import_module(f"jobs.{phase}").run(trace.config, run, unit, attempt)
        finally:
            traces.clear()
        return trace.read

    with pytest.MonkeyPatch.context() as patch:
        for name in ONLY_LOOKED_AT:
            patch.setattr(name, unseen(_named(name)))
        patch.setattr(Strict, "__getattribute__", seen, raising=False)
        yield run_traced


def _named(dotted: str) -> Callable[..., Any]:
    module, *path = ".".join(dotted.split(".")[:2]), *dotted.split(".")[2:]
    return functools.reduce(getattr, path, importlib.import_module(module))


def undeclared(read: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """By phase, the keys that it read and that the table does not say."""
    found = {
        phase: sorted(key for key in keys if not is_read(phase, key) and not key.startswith(UNITS))
        for phase, keys in read.items()
    }
    return {phase: keys for phase, keys in found.items() if keys}
