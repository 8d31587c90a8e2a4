"""Runs side by side: `make compare RUNS="outputs/a outputs/b"`, or `python -m reports.compare RUN
RUN ... --out FOLDER`.

Reads what each run's report was made of and writes compare.txt and compare.html. Runs whose figures
are about different things are refused, with what differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reports.blocks import Block, Items, Prose, Table, lines
from reports.comparable import MAX_SHOWN, Compared, opened, refuse_incomparable
from reports.distances import compared_words
from reports.numbers import (
    CORRECTED,
    MEASURES,
    arm_name,
    cut_off,
    duration,
    fixed,
    interval,
    percentage,
    plain,
)
from reports.page import render
from reports.plots import ABOVE, OTHER, STYLES, TRAINING, Plot, figure
from reports.text import RULE, section
from sarm.config import UserError
from sarm.run import RunDir, differences, write_atomic


def main(argv: list[str] | None = None) -> int:
    """0 where both files are written, 2 where the runs cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m reports.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument(
        "--out", default="outputs/compare", help="folder to write to (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        runs = opened(args.runs)
        refuse_incomparable(runs)
        text, html = compare_text(runs), compare_page(runs)
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "compare.txt", text.encode())
        write_atomic(folder / "compare.html", html.encode())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    print(f"written: compare.txt and {folder / 'compare.html'}")
    return 0


def settings(runs: Sequence[Compared]) -> list[Block]:
    """The keys of the configs that differ, a column per run."""
    keys = sorted(
        {key for other in runs[1:] for key in differences(runs[0].run.config, other.run.config)}
        - {"name"}
    )
    commits = [
        ", ".join(dict.fromkeys(commit[:8] for commit in r.figures["provenance"]["git_commits"]))
        or "unknown"
        for r in runs
    ]
    rows = [[key, *(_value(r.run, key) for r in runs)] for key in keys]
    rows.append(["commit", *commits])
    blocks: list[Block] = [Table(["Setting", *(r.name for r in runs)], rows)]
    if len(set(commits)) > 1:
        blocks.append(
            Prose("The runs were made by different commits: a difference may be the code's.")
        )
    return blocks


def _value(run: RunDir, dotted: str) -> str:
    tree: Any = run.config.model_dump(mode="json")
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    text = json.dumps(tree)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def verdicts(runs: Sequence[Compared]) -> list[Block]:
    words = [
        f"{r.name}: {r.figures['verdict']['word']}. {' '.join(r.figures['verdict']['sentences'])}"
        for r in runs
    ]
    failed = [
        f"{r.name} is incomplete: {len(r.figures['failures'])} of its parts failed or are missing."
        for r in runs
        if r.figures["failures"]
    ]
    compared = [f"{r.name}: {compared_words(r.figures['compared'])}" for r in runs]
    return [Items(words), Items(compared), *map(Prose, failed)]


def penalties(runs: Sequence[Compared]) -> list[Block]:
    """What each run penalised; rates of different latents are different measures."""
    rows = []
    for r in runs:
        penalty = r.figures["penalty"]
        numbers = (", ".join(map(plain, penalty[m])) or "none" for m in ("taus", "alphas"))
        rows.append(
            [r.name, penalty["kind"], ", ".join(map(str, penalty["latents"])) or "none", *numbers]
        )
    blocks: list[Block] = [Table(["Run", "kind", "latents", "tau", "alpha"], rows)]
    if (
        len(
            {
                (tuple(r.figures["penalty"]["latents"]), tuple(r.figures["penalty"]["taus"]))
                for r in runs
            }
        )
        > 1
    ):
        blocks.append(
            Prose(
                "The runs penalise different latents, or at another tau: each one's penalised rate"
                " is its own measure."
            )
        )
    return blocks


def changes(runs: Sequence[Compared]) -> list[Block]:
    """Each run's penalty arm against its own no-penalty arm, in points."""
    tables: list[Block] = []
    for measure, name in MEASURES.items():
        if measure == "n_tokens":
            continue
        mine = [
            (r, c)
            for r in runs
            for c in r.figures["verdict"]["changes"]
            if (c["measure"], c["arm"]) == (measure, "penalty") and c["n_prompts"]
        ]
        rows = [[r.name, c["n_prompts"], *_points(c)] for r, c in mine]
        if rows:
            tables.append(
                Table(
                    ["Run", "prompts", "before", "after", "change", "95 % interval", "detectable"],
                    rows,
                    title=f"{name.capitalize()}, in points:",
                )
            )
        if any(cut_off(c) for _, c in mine):
            tables.append(Prose(CORRECTED))
    return tables or [Prose("not available: no run has a penalty and a no-penalty arm")]


def _points(change: dict[str, Any]) -> list[str]:
    value = {
        m: percentage(change[m]) for m in ("before", "after", "change", "low", "high", "detectable")
    }
    numbers = [
        fixed(value["before"], 1),
        fixed(value["after"], 1),
        fixed(value["change"], 1, sign=True),
    ]
    return [*numbers, interval(value["low"], value["high"], 1), fixed(value["detectable"], 1)]


def policies(runs: Sequence[Compared]) -> list[Block]:
    names = {
        "reward": 3,
        "penalised_fired": 3,
        "monitors_fired": 3,
        "refused": 3,
        "over_refused": 3,
        "kl": 3,
        "n_tokens": 1,
    }
    rows = [
        [f"{r.name} {p['policy']}", *(fixed(p[m], d) for m, d in names.items())]
        for r in runs
        for p in r.figures["policies"]
    ]
    if not rows:
        return [Prose("not available: no policy was evaluated")]
    return [
        Table(
            [
                "Run, policy",
                "reward",
                "penalised",
                "monitors",
                "refused",
                "over-ref.",
                "KL",
                "tokens",
            ],
            rows,
        )
    ]


def training(runs: Sequence[Compared]) -> list[Block]:
    names = ("reward", "penalty", "kl", "loss")
    rows = [
        [
            f"{r.name} {t['policy']}",
            t["steps"],
            duration(t["training_s"]),
            *(fixed(t[m], 3) for m in names),
        ]
        for r in runs
        for t in r.figures["training"]
    ]
    if not rows:
        return [Prose("not available: nothing was trained")]
    return [
        Prose("Means over the last tenth of the steps."),
        Table(["Run, policy", "steps", "time", "reward", "penalty", "KL", "loss"], rows),
    ]


SECTIONS = {
    "verdicts": ("Verdicts", verdicts),
    "settings": ("What differs", settings),
    "penalties": ("Penalties", penalties),
    "changes": ("Changes against the no-penalty arm", changes),
    "policies": ("Policies", policies),
    "training": ("Training", training),
}


def compare_text(runs: Sequence[Compared]) -> str:
    blocks = [[RULE, f"COMPARISON OF {len(runs)} RUNS", RULE]]
    blocks += [section(title.upper(), lines(make(runs))) for title, make in SECTIONS.values()]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks) + "\n"


def compare_page(runs: Sequence[Compared]) -> str:
    plots = {"changes": change_plot(runs), "training": curves(runs)}
    sections = [
        {
            "id": id_,
            "title": title,
            "note": "",
            "blocks": make(runs),
            "plots": plots.get(id_, []),
            "sources": [],
            "finding": "",
            "silent": False,
            "open": True,
        }
        for id_, (title, make) in SECTIONS.items()
    ]
    return render(
        "compare.html",
        title=f"Comparison of {len(runs)} runs",
        names=[r.name for r in runs],
        sections=sections,
        plots=[plot for group in plots.values() for plot in group],
    )


# Plots


def looks(position: int) -> Any:
    """How a run looks: as the arms do, one after another."""
    styles = [STYLES["penalty"], STYLES["no_penalty"], STYLES["random"], *OTHER, STYLES["base"]]
    return styles[position % len(styles)]


def change_plot(runs: Sequence[Compared]) -> list[Plot]:
    measures = [m for m in MEASURES if m != "n_tokens"]
    made = figure("change, in points", "", 110 + 30 * len(runs) * len(measures), legend=ABOVE)
    shown: list[str] = []
    for position, r in enumerate(runs):
        found = {
            c["measure"]: c
            for c in r.figures["verdict"]["changes"]
            if c["arm"] == "penalty" and c["n_prompts"]
        }
        mine = [m for m in measures if m in found and found[m]["low"] is not None]
        if not mine:
            continue
        shown += [m for m in mine if m not in shown]
        value, low, high = (
            np.array([100 * found[m][key] for m in mine], float)
            for key in ("change", "low", "high")
        )
        made.add(
            "scatter",
            x=value,
            y=[-measures.index(m) - 0.6 * position / len(runs) for m in mine],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": high - value,
                "arrayminus": value - low,
            },
            mode="markers",
            name=r.name,
            marker={"color": looks(position).colour, "symbol": looks(position).symbol, "size": 10},
            customdata=[
                [MEASURES[m], interval(100 * found[m]["low"], 100 * found[m]["high"], 1)]
                for m in mine
            ],
            hovertemplate="%{customdata[0]}: %{x:+.1f} points %{customdata[1]}",
        )
    if not shown:
        return []
    middle = 0.3 * (len(runs) - 1) / len(runs)
    made.yaxis(
        tickvals=[-measures.index(m) - middle for m in shown],
        ticktext=[MEASURES[m] for m in shown],
        showgrid=False,
    )
    made.vline(0, {"color": "#7f868f", "width": 1.5})
    return [
        Plot(
            "changes",
            "The penalty arm against the no-penalty arm",
            "Change of each rate by run, with 95 % intervals. The tables have the numbers.",
            made,
        )
    ]


def curves(runs: Sequence[Compared]) -> list[Plot]:
    """The penalty arm's metrics, mean over seeds, a line per run."""
    plots = []
    for i, (metric, (title, unit)) in enumerate(TRAINING.items()):
        made = figure("step", unit, 270, showlegend=True, legend=ABOVE)
        for position, r in enumerate(runs):
            table = r.frames.training
            if metric not in table:
                continue
            mine = table[table["arm"] == "penalty"]
            mean = pd.to_numeric(mine[metric], errors="coerce").groupby(mine["step"]).mean()
            line = {"color": looks(position).colour, "dash": looks(position).dash, "width": 1.8}
            made.add(
                "scatter",
                x=mean.index.to_numpy(np.int32),
                y=mean.to_numpy(np.float32),
                mode="lines",
                name=r.name,
                line=line,
            )
        if made.data:
            told = f"{title} of the {arm_name('penalty')} arm, mean over its seeds, a line per run."
            plots.append(Plot(f"training-{i}", title, told, made, wide=False))
    return plots


if __name__ == "__main__":
    sys.exit(main())
