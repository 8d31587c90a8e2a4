"""Which runs can be set side by side: their reports, opened, and what differs of what has to be
the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reports.frames import Frames, read_run
from sarm.config import UserError
from sarm.records import Report
from sarm.run import RunDir

MAX_SHOWN = 60
"""Characters of a value that are shown."""


class Compared(NamedTuple):
    """One run; `name` is its folder's, made unique."""

    name: str
    run: RunDir
    figures: dict[str, Any]
    frames: Frames


def opened(paths: Sequence[str]) -> list[Compared]:
    """The runs with the figures of their reports. Raises UserError where there are fewer than two,
    or one has no report.
    """
    folders = list(dict.fromkeys(Path(path).resolve() for path in paths))
    if len(folders) < 2:
        raise UserError(
            'there is one run to compare; name two or more: make compare RUNS="outputs/a outputs/b"'
        )
    common = os.path.commonpath(folders)
    found = []
    for folder in folders:
        run = RunDir.open(folder)
        why = run.why_not_done("report")
        if why is not None:
            raise UserError(
                f"{folder} has no report that stands ({why}); write it: make report RUN={folder}"
            )
        found.append(
            Compared(
                Path(os.path.relpath(folder, common)).as_posix(),
                run,
                Report.read(run.read("report").path("report.json")).tree(),
                read_run(run),
            )
        )
    return found


def refuse_incomparable(runs: Sequence[Compared]) -> None:
    """Raises UserError naming all that differs of what has to be the same. What neither run
    recorded is not compared.
    """
    first, *others = runs
    problems = []
    for other in others:
        one, two = first.figures["comparable"], other.figures["comparable"]
        for what in one:
            if one[what] != two[what] and one[what] is not None and two[what] is not None:
                problems.append(
                    f"{first.name} and {other.name} differ in {what}:"
                    f" {_difference(one[what], two[what])}"
                )
    if problems:
        raise UserError(
            f"these runs cannot be compared: {'; '.join(problems)}; compare runs that share reward"
            " model, policy, data, evaluation and rules"
        )


def _difference(one: Any, two: Any, where: str = "") -> str:
    """The first few keys that differ, with both values."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [key for key in dict.fromkeys([*one, *two]) if one.get(key) != two.get(key)]
        told = [
            _difference(one.get(key), two.get(key), f"{where}.{key}" if where else str(key))
            for key in keys[:3]
        ]
        return ", ".join(told) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    shown = [
        text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
        for text in map(str, (one, two))
    ]
    return f"{where + ' ' if where else ''}{shown[0]} and {shown[1]}"
