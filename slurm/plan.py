"""What a submission would send: batches of units, each after those it needs. Pure: touches no disk,
no Slurm.

`plan(config, profile, todo)` groups the DAG's undone tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from sarm.config import Config, Phase
from slurm.dag import Node, tasks
from slurm.profile import Profile, packed, throttle


class Batch(NamedTuple):
    """One sbatch: a job, or an array with an element for each tuple of units."""

    name: str
    phase: Phase
    elements: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...]
    """Names of the batches it waits for."""
    when: str
    """afterok, afterany, or aftercorr: each element waits for its like in the one array needed."""
    after: tuple[str, ...] = ()
    """Ids of jobs of earlier submissions that it waits for in the same way."""
    retry: bool = False
    """Its units ran out of memory before: they get the profile's `retry_mem_gb`."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node(self.phase, unit) for element in self.elements for unit in element)


def undone(config: Config, done: Callable[[Node], bool]) -> set[Node]:
    """Tasks to do: those without a valid manifest, and everything downstream of them."""
    todo: set[Node] = set()
    for task in tasks(config):
        if not done(task.node) or any(need in todo for need in task.needs):
            todo.add(task.node)
    return todo


def plan(
    config: Config, profile: Profile, todo: Iterable[Node], live: Mapping[Node, str] | None = None
) -> list[Batch]:
    """The batches that do `todo`, each after those it needs, and after the `live` jobs of earlier
    submissions that it needs, by their ids. What is done already is not waited for.

    Shards go into arrays of at most `max_array_size` elements, `pack` units an element; a dependent
    waits for every chunk. Policies are jobs of their own, so that each is evaluated as soon as its
    own training has ended; those of a sweep, and all where the profile throttles them, are an
    array, and each is evaluated by the element of another array that waits for it alone
    (aftercorr).
    """
    todo, live = set(todo), live or {}
    batch_of: dict[Node, str] = {}
    batches: list[Batch] = []
    needs_of = {task.node: task.needs for task in tasks(config)}
    when_of = {task.node: task.when for task in tasks(config)}
    for name, phase, elements in _groups(config, profile, todo, live):
        nodes = [Node(phase, unit) for element in elements for unit in element]
        needs = dict.fromkeys(
            batch_of[need] for node in nodes for need in needs_of[node] if need in todo
        )
        after = dict.fromkeys(
            live[need]
            for node in nodes
            for need in needs_of[node]
            if need in live and need not in todo
        )
        when: str = when_of[nodes[0]]
        if len(needs) == 1 and len(elements) > 1:
            needed = next(batch for batch in batches if batch.name in needs)
            if [
                tuple(need for unit in element for need in needs_of[Node(phase, unit)])
                for element in elements
            ] == [
                tuple(Node(needed.phase, unit) for unit in element) for element in needed.elements
            ]:
                when = "aftercorr"
        batches.append(Batch(name, phase, elements, tuple(needs), when, tuple(after)))
        batch_of.update({node: name for node in nodes})
    return batches


def _groups(
    config: Config, profile: Profile, todo: set[Node], live: Mapping[Node, str]
) -> list[tuple[str, Phase, tuple[tuple[str, ...], ...]]]:
    phases = dict.fromkeys(task.node.phase for task in tasks(config))
    throttled = throttle(profile, "ppo") or throttle(profile, "evaluate")
    together = ("arms", "arms-trained") if throttled else ("sweep", "swept")
    groups: list[tuple[str, Phase, tuple[tuple[str, ...], ...]]] = []
    for phase in phases:
        units = [unit for unit in config.units(phase) if Node(phase, unit) in todo]
        if phase in ("ppo", "evaluate"):
            # A policy that an earlier submission still trains is waited for alone.
            many: set[str] = set(config.units("ppo") if throttled else config.sweep_points())
            many -= {unit for unit in units if phase == "evaluate" and Node("ppo", unit) in live}
            groups += [(f"{phase}.{unit}", phase, ((unit,),)) for unit in units if unit not in many]
            # What is trained in this submission is evaluated element by element, what was trained
            # before at once.
            trains = [unit for unit in units if unit in many and Node("ppo", unit) in todo]
            trained = [unit for unit in units if unit in many and Node("ppo", unit) not in todo]
            for name, mine in (
                (f"{phase}.{together[0]}", trains),
                (f"{phase}.{together[1]}", trained),
            ):
                groups += _arrays(name, phase, [(unit,) for unit in mine], profile)
            continue
        pack = packed(profile, phase)
        elements = [tuple(units[i : i + pack]) for i in range(0, len(units), pack)]
        groups += _arrays(phase, phase, elements, profile)
    return groups


def _arrays(
    name: str, phase: Phase, elements: Sequence[tuple[str, ...]], profile: Profile
) -> list[tuple[str, Phase, tuple[tuple[str, ...], ...]]]:
    """Elements in arrays of at most `max_array_size`, numbered where there are several."""
    chunks = [
        tuple(elements[i : i + profile.max_array_size])
        for i in range(0, len(elements), profile.max_array_size)
    ]
    return [
        (name if len(chunks) == 1 else f"{name}.{n}", phase, chunk)
        for n, chunk in enumerate(chunks)
    ]
