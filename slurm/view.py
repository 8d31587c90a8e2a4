"""How a run in progress is shown: a live screen on a terminal, plain lines without one. For the
local launcher, status and watch.

`with View(run) as view: view.update(units)`
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sarm.launched import latest
from sarm.run import RunDir, without_progress
from slurm.dag import Node

PLAIN_EVERY_S = 20.0
BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-~=+*#"
COLOURS = {
    "done": "green",
    "skipped": "green",
    "running": "cyan",
    "waiting": "dim",
    "pending": "dim",
    "not": "dim",
}


class Unit(NamedTuple):
    """One unit of work as it stands."""

    node: Node
    state: str
    """By its first word: done, skipped, running, waiting, pending, `not run`; anything else is
    a failure.
    """
    note: str = ""
    """What there is to say besides: how long it took, why it waits or failed."""

    @property
    def kind(self) -> str:
        word = self.state.split()[0] if self.state else "waiting"
        return word if word in COLOURS else "failed"


class Progress(NamedTuple):
    """How far a running unit was when it last said so."""

    done: int
    total: int
    what: str
    attempt: str
    left_s: float | None
    """At this attempt's pace; None before there is one."""
    whole_s: float | None
    """From the attempt's start to its end, by the same pace."""
    reward: float | None
    penalty: float | None

    def __str__(self) -> str:
        """`step 12/100, reward 1.234, 40 s left`."""
        words = (
            f"{self.what} {self.done}/{self.total}"
            if self.total > 0 and self.done > 0
            else self.what
        )
        words += "".join(
            f", {name} {value:.3f}"
            for name, value in (("reward", self.reward), ("penalty", self.penalty))
            if value is not None
        )
        return words + (f", {span(self.left_s)} left" if self.left_s is not None else "")


def read_progress(run: RunDir, node: Node) -> Progress | None:
    """How far a unit says it is; None where it has not said so yet."""
    try:
        file: dict[str, Any] = json.loads(run.progress_file(*node).read_text())
        done, total, first, seconds = (
            int(file["done"]),
            int(file["total"]),
            int(file["from"]),
            float(file["seconds"]),
        )
        left = seconds * (total - done) / (done - first) if done > first else None
        began, said = (datetime.fromisoformat(str(file[key])) for key in ("started", "at"))
        whole = None if left is None else (said - began).total_seconds() + left
        more = (
            file.get(key) if isinstance(file.get(key), (int, float)) else None
            for key in ("reward", "penalty")
        )
        return Progress(done, total, str(file["what"]), str(file["attempt"]), left, whole, *more)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_curves(run: RunDir, node: Node) -> dict[str, list[float]]:
    """Reward and penalty of every step so far of a training unit; empty where there are none."""
    progress = read_progress(run, node)
    manifest = run.manifest(*node)
    attempt = manifest.attempt if manifest else progress.attempt if progress else ""
    curves: dict[str, list[float]] = {"reward": [], "penalty": []}
    try:
        lines = (
            (run.folder(*node) / f"metrics.{attempt}.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
    except OSError:
        return curves
    for line in lines:
        try:
            step = json.loads(line)
        except ValueError:
            continue  # the last line may be half written
        for name, key in (("reward", "objective/scores"), ("penalty", "objective/penalty")):
            if isinstance(step.get(key), (int, float)):
                curves[name].append(float(step[key]))
    return curves


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """The values as a row of at most `width` blocks, from the least to the most; each block the
    mean of its share of them.
    """
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    return "".join(
        blocks[round((value - low) / (high - low) * (len(blocks) - 1)) if high > low else 0]
        for value in means
    )


def span(seconds: float) -> str:
    """`40 s`, `12 min` or `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines that the last job wrote to a log, where causes stand, submitit's own and
    progress bars left out; none where the log is gone.
    """
    try:
        lines = [
            line.rstrip()
            for line in log.read_text(errors="replace").splitlines()
            if line.strip() and not line.startswith("submitit ")
        ]
    except OSError:
        return []
    return without_progress(latest(lines))[-count:]


class View:
    """Shows units as they change. On a terminal a screen that repaints itself, else a line a
    change and now and then where things stand.
    """

    def __init__(self, run: RunDir, console: Console | None = None) -> None:
        self.run = run
        self.console = console or Console()
        live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if live else None
        self.seen: dict[Node, str] = {}
        self.began, self.spoke = time.monotonic(), time.monotonic()

    def __enter__(self) -> View:
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.live.__exit__(*error)

    def update(self, units: Sequence[Unit], left: str = "") -> None:
        """Say what has changed since the last time, and show how it stands, with how long all of
        it still takes.
        """
        # On a screen the first look is all there; without one it is said line by line.
        line_by_line = bool(self.seen) or self.live is None
        for unit in units:
            kind = "waiting" if unit.kind == "pending" else unit.kind
            if line_by_line and self.seen.get(unit.node, "waiting") != kind:
                self.say(f"{unit.node!s:28} {unit.state}{f', {unit.note}' if unit.note else ''}")
            self.seen[unit.node] = kind
        if self.live:
            self.live.update(
                screen(self.run, units, self.console, time.monotonic() - self.began, left),
                refresh=True,
            )
        elif time.monotonic() - self.spoke > PLAIN_EVERY_S:
            self.spoke = time.monotonic()
            for unit in units:
                if unit.kind == "running":
                    self.say(
                        f"{unit.node!s:28}"
                        f" {read_progress(self.run, unit.node) or unit.note or 'running'}"
                    )
            if left:
                self.say(f"{self.run.config.name}: {left}")

    def say(self, line: str) -> None:
        if self.live:
            self.console.print(Text(line))
        else:
            print(line, flush=True)


def screen(
    run: RunDir, units: Sequence[Unit], console: Console, watched_s: float, left: str = ""
) -> RenderableType:
    """The live screen: a line of totals, one of how long it still takes, a line per phase with a
    bar, and beneath it one for each unit that runs or failed.
    """
    ascii_only = console.options.ascii_only
    counts = {
        kind: sum(unit.kind == kind for unit in units)
        for kind in ("done", "skipped", "running", "failed")
    }
    head = (
        f"{run.config.name}  {counts['done'] + counts['skipped']} of {len(units)} done,"
        f" {counts['running']} running"
    )
    head += f", {counts['failed']} failed" if counts["failed"] else ""
    rows: list[tuple[str, Text, str]] = []

    def add(name: str, state: str, kind: str, unit: Unit | None) -> None:
        notes = unit_lines(run, unit, ascii_only) if unit else [""]
        notes = ["  ".join(notes)] if console.width >= 120 else notes
        rows.append((name, Text(state, COLOURS.get(kind, "red")), notes[0]))
        rows.extend(("", Text(""), line) for line in notes[1:])

    for phase, group in groupby(units, key=lambda unit: unit.node.phase):
        members = list(group)
        ended = sum(unit.kind in ("done", "skipped") for unit in members)
        kinds = {unit.kind for unit in members}
        kind = next(
            (k for k in ("failed", "running", "pending", "waiting", "not") if k in kinds), "done"
        )
        lone = members[0] if len(members) == 1 else None
        add(
            f"{phase:8} {bar(ended, len(members), ascii_only)}",
            lone.state if lone else "not run" if kind == "not" else kind,
            kind,
            lone,
        )
        for unit in members if lone is None else []:
            if unit.kind in ("running", "failed"):
                add(f"  {unit.node.unit}", unit.state, unit.kind, unit)
    room = max(4, console.height - 3 - bool(left))
    table = Table(box=None, show_header=False, padding=(0, 1), expand=True)
    for ratio in (None, None, 1):  # what there is to say gets the room that is left
        table.add_column(no_wrap=True, overflow="crop" if ascii_only else "ellipsis", ratio=ratio)
    for name, word, note in rows[:room]:
        table.add_row(Text(name), word, Text(note))
    more = (
        Text(f"  and {len(rows) - room} more lines; make this terminal taller", "dim")
        if len(rows) > room
        else Text("")
    )
    total = [Text(left)] if left else []
    return Group(Text(f"{head}, watched for {span(watched_s)}", "bold"), *total, table, more)


def unit_lines(run: RunDir, unit: Unit, ascii_only: bool) -> list[str]:
    """What a unit has to say: its progress, sparklines of reward and penalty beneath, or the end
    of its log where it failed.
    """
    if unit.kind == "failed":
        return [" ".join(last_lines(run.log(*unit.node), 1)) or unit.note]
    progress = read_progress(run, unit.node) if unit.kind == "running" else None
    if progress is None:
        return [unit.note]
    if unit.node.phase != "ppo":
        return [str(progress)]
    curves = [
        f"{name} {sparkline(curve, 12, ascii_only=ascii_only)} {curve[-1]:.3f}"
        for name, curve in read_curves(run, unit.node).items()
        if curve
    ]
    return [
        str(progress._replace(reward=None, penalty=None)),
        *(["  ".join(curves)] if curves else []),
    ]


def bar(done: int, total: int, ascii_only: bool, width: int = 8) -> str:
    """`━━━━──── 2/4`."""
    full = width * done // total
    return (
        "#" * full + "." * (width - full) if ascii_only else "━" * full + "─" * (width - full)
    ) + f" {done}/{total}"
