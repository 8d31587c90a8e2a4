"""The DAG as data: every unit of work of a run and what it waits for. Used by every launcher and
by status.

`for task in tasks(config): print(task.phase, task.unit, task.needs)`
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from sarm.config import Config, Phase, UserError


class Node(NamedTuple):
    phase: Phase
    unit: str

    def __str__(self) -> str:
        return self.phase if self.unit == "all" else f"{self.phase}/{self.unit}"


class Task(NamedTuple):
    """One unit of work. `afterany` runs whatever became of its needs, `afterok` only if all ended
    well.
    """

    node: Node
    needs: tuple[Node, ...]
    when: Literal["afterok", "afterany"] = "afterok"


NEEDS: dict[Phase, tuple[Phase, ...]] = {
    "fetch": (),
    "check_sarm": ("fetch",),
    "encode": ("fetch",),
    "probe": ("encode", "check_sarm"),
    "select": ("probe",),
    "steer": ("select",),
    "cards": ("select",),
    "calibrate": ("select",),
    "ppo": ("calibrate",),
    "evaluate": ("calibrate",),
}
"""The phases whose every unit each unit of a phase needs, all but the report's, in order. Of
evaluate it holds for policies that nobody trains; a trained one needs its own training alone."""


def tasks(config: Config) -> list[Task]:
    """Every task of a run, each after all that it needs."""
    of = {phase: tuple(Node(phase, unit) for unit in config.units(phase)) for phase in NEEDS}
    needs = {phase: tuple(n for need in NEEDS[phase] for n in of[need]) for phase in NEEDS}
    trained = {node.unit: node for node in of["ppo"]}
    found = [
        Task(node, (trained[node.unit],))
        if node.phase == "evaluate" and node.unit in trained
        else Task(node, needs[phase])
        for phase, nodes in of.items()
        for node in nodes
    ]
    every = tuple(task.node for task in found)
    report = [Task(Node("report", u), every, "afterany") for u in config.units("report")]
    return [*found, *report]


def named(config: Config, unit: str | None = None, phase: str | None = None) -> set[Node]:
    """The units of this name, `penalty-seed0` or `ppo/penalty-seed0`, of one phase where it is
    given; all where no name is. Raises UserError where there is none.
    """
    of_phase = [task.node for task in tasks(config) if phase in (None, task.node.phase)]
    found = {node for node in of_phase if unit in (None, node.unit, str(node))}
    if not found:
        units = sorted({n.unit for n in of_phase if n.phase == (phase or "evaluate")})
        raise UserError(f"no unit is named {unit!r}; {phase or 'evaluate'} has {', '.join(units)}")
    return found
