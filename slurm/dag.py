"""The DAG as data: every unit of work of a run and what it waits for. Used by every launcher and
by status.

`for task in tasks(config): print(task.phase, task.unit, task.needs)`
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from sarm.config import Config, Phase


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


def tasks(config: Config) -> list[Task]:
    """Every task of a run, each after all that it needs."""

    def nodes(phase: Phase) -> tuple[Node, ...]:
        return tuple(Node(phase, unit) for unit in config.units(phase))

    select = nodes("select")
    waits: list[Task] = [Task(node, ()) for node in nodes("fetch")]
    waits += [Task(node, nodes("fetch")) for node in nodes("encode")]
    waits += [Task(node, nodes("encode")) for node in nodes("probe")]
    waits += [Task(node, nodes("probe")) for node in select]
    waits += [
        Task(node, select) for phase in ("calibrate", "steer", "cards") for node in nodes(phase)
    ]
    calibrated = nodes("calibrate")
    waits += [Task(node, calibrated) for node in nodes("ppo")]
    # Base needs only calibrate, and so does steering it; a trained policy is evaluated when its own
    # training has ended.
    waits += [
        Task(node, calibrated if node.unit in ("base", "steered") else (Node("ppo", node.unit),))
        for node in nodes("evaluate")
    ]
    return [
        *waits,
        *(Task(node, tuple(task.node for task in waits), "afterany") for node in nodes("report")),
    ]
