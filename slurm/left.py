"""How long the rest of a run takes, as far as it can be known from what its parts took so far: for
the local launcher and watch.

`Rest(run).left(units)` -> `about 12 min left`, or `at least 12 min left, and evaluate, of which
nothing is known yet`.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from sarm.config import UserError
from sarm.cost import LIGHT_S, REFERENCE_GPUS, counts, planned, shapes
from sarm.records import Manifest
from sarm.run import RunDir, listed
from slurm.dag import Node, Task, tasks
from slurm.view import Unit, read_progress, span


class Left(NamedTuple):
    """What is left of a run."""

    seconds: float
    unknown: tuple[str, ...]
    """Phases of which nothing is known yet; they are not in it."""
    queued: bool
    """Whether jobs wait in a queue, and nobody knows for how long."""

    def __str__(self) -> str:
        told = f"{'at least' if self.unknown else 'about'} {span(self.seconds)} left"
        if self.unknown:
            told += f", and {listed(list(self.unknown), 3)}, of which nothing is known yet"
        return told + ("; the time that jobs wait in the queue is not in it" if self.queued else "")


class Rest:
    """Estimates what is left of a run from what its units took, and keeps what does not change."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.tasks = run, tasks(run.config)
        self.manifests: dict[Node, Manifest] = {}
        self.since: dict[Node, float] = {}
        """When a unit was first seen to run, by this process's clock."""
        self.plan: dict[str, float] | None = None

    def left(self, units: Sequence[Unit], workers: int | None = None) -> Left | None:
        """None where all has ended, or nothing is known of what is left; `workers` is how many
        units run side by side, None where a queue decides.
        """
        kinds = {unit.node: unit.kind for unit in units}
        alive = self.alive(kinds)
        if not alive:
            return None
        self.see(units)
        typical = self.typical(units)
        lasts: dict[Node, float] = {}
        unknown: dict[str, None] = {}
        for task in alive:
            seconds = self.remaining(task.node, kinds[task.node], typical)
            if seconds is None:
                unknown[task.node.phase] = None
            lasts[task.node] = seconds or 0.0
        running = {node for node in lasts if kinds[node] == "running"}
        seconds = makespan(alive, lasts, running, workers)
        if unknown and seconds < 1:
            return None
        return Left(seconds, tuple(unknown), "pending" in kinds.values())

    def alive(self, kinds: Mapping[Node, str]) -> list[Task]:
        """What runs or is still to run: what needs something that failed will not."""
        dead = {node for node, kind in kinds.items() if kind in ("failed", "not")}
        found = []
        for task in self.tasks:
            kind = kinds.get(task.node, "done")
            if kind in ("running", "pending"):
                found.append(task)
            elif kind == "waiting":
                if task.when == "afterok" and dead & set(task.needs):
                    dead.add(task.node)
                else:
                    found.append(task)
        return found

    def see(self, units: Sequence[Unit]) -> None:
        """Take note of what ended well and of what began to run since the last look."""
        for unit in units:
            if unit.kind in ("done", "skipped") and unit.node not in self.manifests:
                try:
                    manifest = self.run.manifest(*unit.node)
                except UserError:
                    manifest = None
                if manifest is not None:
                    self.manifests[unit.node] = manifest
            if unit.kind == "running":
                self.since.setdefault(unit.node, time.monotonic())
            else:
                self.since.pop(unit.node, None)

    def typical(self, units: Sequence[Unit]) -> dict[str, float]:
        """Seconds of one unit by phase: the mean of those that are done, else of what those that
        run say of themselves, else the plan's where this run is on GPUs.
        """
        took: dict[str, list[float]] = {}
        for node, manifest in self.manifests.items():
            began, ended = map(datetime.fromisoformat, (manifest.started, manifest.ended))
            took.setdefault(node.phase, []).append((ended - began).total_seconds())
        told: dict[str, list[float]] = {}
        for unit in units:
            progress = read_progress(self.run, unit.node) if unit.kind == "running" else None
            if progress is not None and progress.whole_s is not None:
                told.setdefault(unit.node.phase, []).append(progress.whole_s)
        on_gpus = any(one.device.startswith("cuda") for one in self.manifests.values())
        means = {phase: sum(of) / len(of) for phase, of in (told | took).items()}
        return (self.planned() if on_gpus else {}) | means

    def planned(self) -> dict[str, float]:
        """Seconds of one unit by phase at an H100's rates; empty where sizes are not known here."""
        if self.plan is None:
            self.plan = {}
            policy, sarm = shapes(self.run.config)
            if policy is not None and sarm is not None:
                try:
                    costs = planned(
                        self.run.config, policy, sarm, counts(None, None), REFERENCE_GPUS
                    )
                except UserError:  # it does not fit those GPUs
                    costs = []
                self.plan = dict(LIGHT_S) | {cost.phase: cost.seconds for cost in costs}
        return self.plan

    def remaining(self, node: Node, kind: str, typical: Mapping[str, float]) -> float | None:
        """Seconds that a unit still takes once it runs; None where nothing is known."""
        if kind != "running":
            return typical.get(node.phase)
        progress = read_progress(self.run, node)
        if progress is not None and progress.left_s is not None:
            return progress.left_s
        whole = typical.get(node.phase)
        if whole is None:
            return None
        return max(0.0, whole - (time.monotonic() - self.since[node]))


def makespan(
    alive: Sequence[Task], lasts: Mapping[Node, float], running: set[Node], workers: int | None
) -> float:
    """Seconds until the last of these tasks ends, each begun when its needs have ended and a worker
    is free, those first that can begin first.
    """
    needs = {task.node: {need for need in task.needs if need in lasts} for task in alive}
    after: dict[Node, list[Node]] = {}
    for node, its in needs.items():
        for need in its:
            after.setdefault(need, []).append(node)
    order = {task.node: place for place, task in enumerate(alive)}
    # What runs has its worker already, whatever it waited for.
    ready = [
        (0.0, node not in running, order[node], node) for node, its in needs.items() if not its
    ]
    ready += [(0.0, False, order[node], node) for node in running if needs[node]]
    heapq.heapify(ready)
    free = [0.0] * max(workers or len(alive), len(running), 1)
    ends: dict[Node, float] = {}
    while ready:
        begins, _, _, node = heapq.heappop(ready)
        if node in ends:
            continue
        ends[node] = max(begins, heapq.heappop(free)) + lasts[node]
        heapq.heappush(free, ends[node])
        for later in after.get(node, ()):
            if later not in ends and needs[later] <= ends.keys():
                begins = max(ends[need] for need in needs[later])
                heapq.heappush(ready, (begins, True, order[later], later))
    return max(ends.values(), default=0.0)
