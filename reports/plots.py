"""Plots of a report, by section: `PLOTS["training"](figures, frames)` gives Plotly figures, each
with what it shows in words.

Colours are Okabe and Ito's, which colour-blind people can tell apart; a dash or a symbol says the
same again. Long, as there is a function a plot, in the order of the sections. The page sets the
colours of text, axes and ground, which differ between light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reports.chart import Chart
from reports.frames import Frames, arm_rank
from reports.numbers import MEASURES, arm_name, fixed, general, interval, percentage, plain
from reports.origins import CHANGES, GENERATIONS, MANIFEST, STEER, count_of, on_prompts
from reports.policies import NOT_AT_EQUAL_KL, at_unequal_kl
from sarm.run import many

MAX_POINTS = 5000
"""Latents drawn one by one; a browser that draws more becomes slow. The others are drawn as
counts.
"""
GRID = (90, 60)
"""Cells of the counts, across and up."""
SHARES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Ticks of an axis of shares, in logarithmic steps."""
LABEL_BOX = (0.08, 0.05)
"""Width and height that a latent's label takes, as shares of the plot."""
N_BINS = 30
"""Bins of z in a histogram of a latent."""


ABOVE = {"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0}
"""Where a legend stands: it takes no width."""


class Style(NamedTuple):
    """How an arm looks everywhere."""

    colour: str
    dash: str
    symbol: str


STYLES = {
    "base": Style("#7f868f", "dot", "square"),
    "prompted": Style("#56b4e9", "longdashdot", "cross"),
    "best_of_n": Style("#e69f00", "dot", "x"),
    "no_penalty": Style("#0072b2", "dash", "diamond"),
    "penalty": Style("#d55e00", "solid", "circle"),
    "random": Style("#009e73", "dashdot", "triangle-up"),
}
OTHER = (
    Style("#cc79a7", "longdash", "star"),
    Style("#b8a300", "longdashdot", "hexagon"),
    Style("#5c6bc0", "dot", "bowtie"),
)
ROLES = {
    "promoting": ("#0072b2", "triangle-up"),
    "harming": ("#d55e00", "circle"),
    "misleading": ("#cc79a7", "x"),
    "none": ("#7f868f", "circle"),
}
STATES = {"done": "#0072b2", "failed": "#d55e00", "damaged": "#d55e00", "not run": "#7f868f"}


class Drawn(NamedTuple):
    """A metric: its title, what its axis counts, and the column of its file."""

    title: str
    unit: str
    column: str


TRAINING = {
    "objective/scores": ("Reward, without penalty", "SARM reward"),
    "objective/penalty": ("Penalty", "SARM reward"),
    "objective/compound": ("Compound reward", "SARM reward"),
    "objective/kl": ("KL to the base policy", "nats"),
    "loss/total": ("Total loss", "loss"),
    "loss/policy_avg": ("Policy loss", "loss"),
    "loss/value_avg": ("Value loss", "loss"),
    "objective/entropy": ("Entropy", "nats per response"),
    "response/length": ("Response length", "tokens"),
    "response/cut": ("Responses cut at the token limit", "share"),
}
"""The trainer's metrics that are drawn, with what their axis counts; per-latent rates follow."""
MEASURED = {
    "penalised_fired": Drawn("Penalised rate, unsafe prompts", "share fired", "penalised_fired"),
    "monitors_fired": Drawn("Monitors' rate, unsafe prompts", "share fired", "monitors_fired"),
    "reward": Drawn("Reward without penalty", "SARM reward", "reward"),
    "over_refused": Drawn("Over-refusal of safe look-alikes", "share refused", "refused"),
    "kl": Drawn("KL to the base policy", "nats", "kl"),
}
"""What is drawn of the policies' own generations."""
DISTANCES = ("penalised_fired", "monitors_fired", "reward", "over_refused")
"""Of those, against the KL of the policies that were kept on their way."""
FRONT = ("kl", "reward", "over_refused")
"""Of those, against the penalised rate: what one pays for it."""


class Plot(NamedTuple):
    """One plot; `told` says in words what it shows, `origin` the file and column that it is drawn
    from and of how many.
    """

    id: str
    title: str
    told: str
    figure: Chart
    wide: bool = True
    origin: str = ""


def style(arm: str) -> Style:
    """An arm's looks; arms that have none of their own share a few."""
    return STYLES.get(arm, OTHER[sum(map(ord, arm)) % len(OTHER)])


def figure(x: str, y: str, height: int = 360, **layout: Any) -> Chart:
    """An empty figure with titled axes."""
    margin = {"l": 64, "r": 16, "t": 40, "b": 52}
    made = Chart(height=height, margin=margin, **layout)
    plain_ticks = {"exponentformat": "power", "minexponent": 4}  # never 5n or -20µ
    made.xaxis(title={"text": x}, automargin=True, **plain_ticks)
    made.yaxis(title={"text": y}, automargin=True, **plain_ticks)
    return made


# Changes against the no-penalty arm


def changes(figures: dict[str, Any], frames: Frames) -> list[Plot]:
    rows = [
        c for c in figures["verdict"]["changes"] if c["n_prompts"] and c["measure"] != "n_tokens"
    ]
    if not rows:
        return []
    names = [MEASURES[m] for m in MEASURES if any(c["measure"] == m for c in rows)]
    arms = list(dict.fromkeys(c["arm"] for c in rows))
    made = figure("change, in points", "", 120 + 64 * len(names), legend=ABOVE)
    for i, arm in enumerate(arms):
        looks = style("penalty" if arm == "penalty - random" else arm)
        mine = [c for c in rows if c["arm"] == arm]
        shift = (len(arms) - 1) / 2 - i
        unequal = [at_unequal_kl(c, figures["compared"]) for c in mine]
        value, low, high = (np.array([100 * c[m] for c in mine]) for m in ("change", "low", "high"))
        made.add(
            "scatter",
            x=value,
            y=[len(names) - 1 - names.index(MEASURES[c["measure"]]) + 0.22 * shift for c in mine],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": high - value,
                "arrayminus": value - low,
            },
            mode="markers+text",
            text=[NOT_AT_EQUAL_KL if apart else "" for apart in unequal],
            textposition="top center",
            textfont={"size": 10},
            name=(
                "penalty - random" if arm == "penalty - random" else f"{arm_name(arm)} - no penalty"
            ),
            marker={
                "color": looks.colour,
                "symbol": "circle-open" if arm == "penalty - random" else looks.symbol,
                "size": 10,
            },
            customdata=[
                [
                    MEASURES[c["measure"]],
                    interval(100 * c["low"], 100 * c["high"], 1),
                    c["n_prompts"],
                    fixed(percentage(c["detectable"]), 1),
                ]
                for c in mine
            ],
            hovertemplate=(
                "%{customdata[0]}: %{x:+.1f} points %{customdata[1]}<br>%{customdata[2]} prompts,"
                " minimum detectable effect %{customdata[3]}"
            ),
        )
    made.yaxis(
        tickvals=list(range(len(names))),
        ticktext=names[::-1],
        range=[-0.6, len(names) - 0.4],
        showgrid=False,
    )
    made.vline(0, {"color": "#7f868f", "width": 1.5})
    of = dict.fromkeys(count_of(c) for c in rows if c["measure"] == "penalised_fired")
    told = (
        "Change of each rate against the no-penalty arm, and of the penalty arm against the random"
        " one, with its 95 % interval"
        + (" over prompts alone, as there is one seed" if one_seed(rows) else "")
        + ". One that covers 0 leaves open whether there is a change, and of which sign; it is no"
        " evidence that there is none. Only the verdict's comparison was fixed before training."
    )
    origin = f"{CHANGES['change']}; {' or '.join(of)}"
    return [Plot("changes", "Changes with 95 % intervals", told, made, origin=origin)]


def one_seed(rows: Sequence[dict[str, Any]]) -> bool:
    return all(c["n_seeds"] == 1 for c in rows)


# Policies kept at KL distances


def distances(figures: dict[str, Any], frames: Frames) -> list[Plot]:
    """Each arm's way: the rates, the reward and over-refusal against the KL."""
    rows = [row for row in figures["distances"] if row["state"] == "evaluated"]
    plots = []
    for i, measure in enumerate(DISTANCES if rows else ()):
        title, unit, column = MEASURED[measure]
        made = figure("KL to the base policy, nats", unit, 300, showlegend=True, legend=ABOVE)
        ends = []
        for arm in dict.fromkeys(row["arm"] for row in rows):
            table = pd.DataFrame([row for row in rows if row["arm"] == arm])
            table["at"] = table["distance"].fillna(math.inf)
            at = table.groupby("at")[["kl", measure]].mean().sort_index()
            looks = style(arm)
            made.add(
                "scatter",
                x=at["kl"].to_numpy(float),
                y=at[measure].to_numpy(float),
                mode="lines+markers",
                name=arm_name(arm),
                line={"color": looks.colour, "dash": looks.dash, "width": 1.8},
                marker={"color": looks.colour, "symbol": looks.symbol, "size": 9},
                text=["end" if math.isinf(d) else f"{d:g}" for d in at.index],
                hovertemplate=(
                    f"{arm_name(arm)}, distance %{{text}}: KL %{{x:.3f}}, %{{y:.3f}}<extra></extra>"
                ),
            )
            kl, value = (at[name].iloc[-1] for name in ("kl", measure))
            ends.append(f"{arm_name(arm)} {fixed(value, 3)} at KL {fixed(kl, 2)}")
        told = (
            "Means over the seeds that reached each distance, so that points of one line may be of"
            " different seeds; no interval is drawn, and the table has every seed. In the end:"
            f" {'; '.join(ends)}."
        )
        origin = f"{GENERATIONS}: {column} and kl; {many(len({r['seed'] for r in rows}), 'seed')}"
        title = f"{title}, against KL"
        plots.append(Plot(f"distances-{i}", title, told, made, wide=False, origin=origin))
    return plots


# The sweep


def sweep(figures: dict[str, Any], frames: Frames) -> list[Plot]:
    """The front: the penalised rate against each of what it is bought with."""
    points = (figures.get("sweep") or {}).get("points", [])
    plots = []
    for measure in FRONT:
        shown = [p for p in points if math.isfinite(p[measure])]
        if shown:
            plots.append(_front(shown, measure))
    return plots


def _front(points: Sequence[dict[str, Any]], measure: str) -> Plot:
    title, unit, column = MEASURED[measure]
    made = figure("penalised rate on unsafe prompts", unit, 340, showlegend=True, legend=ABOVE)
    arms = dict.fromkeys(p["arm"] for p in points if p["tau"] is None)
    groups = {arm: [p for p in points if p["arm"] == arm] for arm in arms}
    groups["sweep"] = [p for p in points if p["tau"] is not None]
    for name, mine in groups.items():
        if not mine:
            continue
        looks = style(name)
        x, low, high = (
            np.array([p[f"penalised_fired{end}"] for p in mine], float)
            for end in ("", "_low", "_high")
        )
        known = np.isfinite(low) & np.isfinite(high)
        made.add(
            "scatter",
            x=x,
            y=[p[measure] for p in mine],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": np.where(known, high - x, 0.0),
                "arrayminus": np.where(known, x - low, 0.0),
                "thickness": 0.8,
                "width": 2,
            },
            mode="markers",
            name=arm_name(name),
            marker={
                "symbol": [looks.symbol if p["front"] else f"{looks.symbol}-open" for p in mine],
                "size": 10,
                "color": looks.colour,
            },
            customdata=[
                [
                    p["label"],
                    interval(p["penalised_fired_low"], p["penalised_fired_high"], 3),
                    f"{many(p['n_unsafe'], 'unsafe prompt')}, {many(p['n_seeds'], 'seed')}",
                ]
                for p in mine
            ],
            hovertemplate=(
                f"%{{customdata[0]}}<br>penalised %{{x:.3f}} %{{customdata[1]}}, {title} %{{y:.3f}}"
                "<br>%{customdata[2]}<extra></extra>"
            ),
        )
    told = (
        "Exploratory. A point an arm or penalty and distance, over its seeds, with the 95 %"
        " interval of its rate. Filled points are on the front: no other is as good in rate, KL,"
        " reward and over-refusal and better in one. Of points whose differences are within the"
        " noise, which are on it is chance."
    )
    sizes = sorted({p["n_unsafe"] for p in points})
    of = f"{'–'.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} unsafe prompts"
    origin = f"{GENERATIONS}: penalised_fired and {column}; {of}"
    named = f"{title}, against the penalised rate"
    return Plot(f"sweep-{measure}", named, told, made, wide=False, origin=origin)


# Training


def training(figures: dict[str, Any], frames: Frames) -> list[Plot]:
    table = frames.training
    drawn = [
        (name, title, unit)
        for name, (title, unit) in TRAINING.items()
        if name in table and table[name].notna().any()
    ]
    plots = [
        _curve(table, name, title, unit, f"training-{i}")
        for i, (name, title, unit) in enumerate(drawn)
    ]
    listed = figures["penalty"]["latents"]
    rates = sorted(
        (name for name in map(str, table) if name.startswith("rate/")),
        key=lambda name: (int(name[5:]) not in listed, int(name[5:])),
    )
    for name in rates:
        latent = int(name[5:])
        whose = "penalised" if latent in listed else "not penalised by the penalty arm"
        plots.append(
            _curve(
                table,
                name,
                f"Latent {latent}, {whose}",
                "share above tau",
                f"training-rate-{latent}",
            )
        )
    return plots


def _curve(table: pd.DataFrame, name: str, title: str, unit: str, id_: str) -> Plot:
    """One metric over the steps: a line an arm, the mean over its seeds, a thin one a seed, and the
    range of the seeds as a band.
    """
    made = figure("step", unit, 270, showlegend=True, legend=ABOVE)
    ends, several = [], False
    for arm in sorted(table["arm"].unique(), key=arm_rank):
        mine = table[table["arm"] == arm]
        by_step = pd.to_numeric(mine[name], errors="coerce").groupby(mine["step"])
        mean, low, high = by_step.mean(), by_step.min(), by_step.max()
        if not np.isfinite(mean).any():
            continue
        looks, steps, n_seeds = style(arm), mean.index.to_numpy(np.int32), mine["seed"].nunique()
        if n_seeds > 1:
            band = {
                "x": steps,
                "mode": "lines",
                "line": {"width": 0},
                "hoverinfo": "skip",
                "showlegend": False,
                "legendgroup": arm,
            }
            made.add("scatter", y=high.to_numpy(np.float32), **band)
            made.add(
                "scatter",
                y=low.to_numpy(np.float32),
                fill="tonexty",
                fillcolor=_faint(looks.colour),
                **band,
            )
        made.add(
            "scatter",
            x=steps,
            y=mean.to_numpy(np.float32),
            mode="lines" if len(steps) > 1 else "markers",
            name=arm_name(arm),
            legendgroup=arm,
            line={"color": looks.colour, "dash": looks.dash, "width": 1.8},
            hovertemplate=f"{arm_name(arm)}, step %{{x}}: %{{y:.4g}}<extra></extra>",
        )
        several |= n_seeds > 1
        for seed, own in mine.groupby("seed") if n_seeds > 1 else ():
            made.add(
                "scatter",
                x=own["step"].to_numpy(np.int32),
                y=pd.to_numeric(own[name], errors="coerce").to_numpy(np.float32),
                mode="lines",
                name=f"{arm_name(arm)}, seed {seed}",
                legendgroup=arm,
                showlegend=False,
                opacity=0.45,
                line={"color": looks.colour, "width": 0.7},
                hoverinfo="skip",
            )
        ends.append(
            f"{arm_name(arm)} from {general(float(mean.iloc[0]))} to"
            f" {general(float(mean.iloc[-1]))}{f' over {n_seeds} seeds' if n_seeds > 1 else ''}"
        )
    told = f"First to last step: {'; '.join(ends) or 'no finite value'}."
    told += (
        " Thick: the mean of the seeds; thin: each seed; the band is their range, no interval."
        if several
        else " One seed: how trainings differ is not shown."
    )
    of = f"{many(int(table['seed'].nunique()), 'seed')}, {many(int(table['step'].max()), 'step')}"
    origin = f"ppo/*/metrics.jsonl: {name}; {of}"
    return Plot(id_, title, told, made, wide=False, origin=origin)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


# Latents


def effects(figures: dict[str, Any], frames: Frames) -> list[Plot]:
    """Effect against activity of all latents that fire."""
    table, features = frames.probe, figures["features"]
    if features is None or table.empty or "q" not in table:
        return []
    validated = table["effect_validation"].notna().any()
    points = pd.DataFrame(
        {
            "latent": table["latent"].to_numpy(np.int64),
            "effect": table["effect_validation" if validated else "effect"].to_numpy(float),
            "activity": ((table["density_chosen"] + table["density_rejected"]) / 2).to_numpy(float),
            "q": table["q"].to_numpy(float),
            "weight": table["weight"].to_numpy(float),
            "role": table["role"].to_numpy(str),
        }
    )
    n = len(points)
    points = points[(points["activity"] > 0) & np.isfinite(points["effect"])]
    order = np.lexsort([-points["effect"].abs().to_numpy(), points["q"].fillna(2.0).to_numpy()])
    single, rest = points.iloc[order[:MAX_POINTS]], points.iloc[order[MAX_POINTS:]]
    made = figure("share of texts it fires on", "effect on the margin", 520, legend=ABOVE)
    made.xaxis(type="log", tickvals=list(SHARES), ticktext=[f"{100 * s:g}%" for s in SHARES])
    if len(rest):
        made.add("heatmap", **_counts(rest))
    untested = single[single["q"].isna()]
    tested = single[single["q"].notna()]
    if len(untested):
        marker = {"color": "#9aa0a6", "size": 4, "opacity": 0.6}
        made.add("scatter", **_points(untested, "too rarely active to be tested", marker))
    if len(tested):
        strength = -np.log10(np.maximum(tested["q"].to_numpy(float), 1e-12))
        scale = [[0.0, "#9aa0a6"], [0.3, "#56b4e9"], [0.65, "#7b5cc4"], [1.0, "#d55e00"]]
        top = max(2.0, float(strength.max()))
        ticks = list(range(0, math.floor(top) + 1))
        bar = {
            "title": {"text": "q"},
            "tickvals": ticks,
            "ticktext": [f"{10.0**-t:g}" for t in ticks],
            "thickness": 12,
        }
        marker = {
            "color": strength.astype(np.float32),
            "colorscale": scale,
            "cmin": 0,
            "cmax": top,
            "colorbar": bar,
            "size": 6,
        }
        made.add("scatter", **_points(tested, "tested", marker))
    listed = points.set_index("latent")
    chosen = [f["latent"] for role in ROLES for f in features.get(role, ())]
    labels = labelled(listed.loc[[latent for latent in chosen if latent in listed.index]], single)
    for role in ("promoting", "harming", "misleading"):
        mine = [f["latent"] for f in features[role] if f["latent"] in listed.index]
        if mine:
            # of an open symbol, the colour is that of its outline
            marker = {
                "color": ROLES[role][0],
                "size": 13,
                "symbol": f"{ROLES[role][1]}-open",
                "line": {"width": 2.5},
            }
            trace = _points(listed.loc[mine].reset_index(), f"listed as {role}", marker)
            names = [str(latent) if latent in labels else "" for latent in mine]
            named = {"mode": "markers+text", "text": names, "textposition": "top center"}
            made.add("scatter", **trace | named)
    made.hline(0, {"color": "#7f868f", "width": 1})
    shown = (
        f"{len(single):,} of them as points, the others as counts"
        if len(rest)
        else "each as a point"
    )
    on = "validation" if validated else "discovery"
    told = (
        f"Effect on {on} prompts against activity. Of {n:,} latents, {len(points):,} fire on"
        f" discovery texts and are shown, {shown}; colour is the q-value on discovery."
        f" {features['n_discoveries']} of {features['n_tested']} tested are discoveries. The tables"
        " list the selected ones."
    )
    of = on_prompts(features["n_prompts"], "discovery", on)
    origin = f"select/all/table.parquet: effect, density and q; {of}"
    return [Plot("effects", "Effect and activity of every latent", told, made, origin=origin)]


def _points(table: pd.DataFrame, name: str, marker: dict[str, Any]) -> dict[str, Any]:
    details = [
        [int(i), general(None if math.isnan(q) else q), general(w), role]
        for i, q, w, role in table[["latent", "q", "weight", "role"]].itertuples(index=False)
    ]
    return dict(
        x=table["activity"].to_numpy(np.float32),
        y=table["effect"].to_numpy(np.float32),
        mode="markers",
        name=name,
        marker=marker,
        customdata=details,
        hovertemplate=(
            "latent %{customdata[0]} (%{customdata[3]})<br>effect %{y:.3g}, active on %{x:.1%}<br>"
            "q %{customdata[1]}, weight %{customdata[2]}<extra></extra>"
        ),
    )


def _counts(table: pd.DataFrame) -> dict[str, Any]:
    """Latents a cell of the effect plot, the activity in logarithmic steps."""
    x, y = np.log10(table["activity"].to_numpy(float)), table["effect"].to_numpy(float)
    counts, x_edges, y_edges = np.histogram2d(x, y, bins=GRID)
    return dict(
        x=10 ** ((x_edges[1:] + x_edges[:-1]) / 2),
        y=(y_edges[1:] + y_edges[:-1]) / 2,
        z=np.where(counts > 0, np.log10(np.maximum(counts, 1)), np.nan).T.astype(np.float32),
        customdata=counts.T.astype(np.int32),
        colorscale=[[0.0, "rgba(127,134,143,0.15)"], [1.0, "rgba(127,134,143,0.85)"]],
        showscale=False,
        name="other latents, counted",
        hovertemplate=(
            "%{customdata} latents near effect %{y:.2g}, active on %{x:.2%}<extra></extra>"
        ),
    )


def labelled(listed: pd.DataFrame, drawn: pd.DataFrame) -> set[int]:
    """The latents, largest |effect| first, whose labels overlap no other's; the hover names all."""
    x, y = np.log10(listed["activity"].to_numpy(float)), listed["effect"].to_numpy(float)
    spans = (
        [
            max(float(np.ptp(values)), 1e-12)
            for values in (
                np.log10(drawn["activity"].to_numpy(float)),
                drawn["effect"].to_numpy(float),
            )
        ]
        if len(drawn)
        else [1.0, 1.0]
    )
    kept: list[int] = []
    for i in np.argsort(-np.abs(y), kind="stable"):
        if all(
            abs(x[i] - x[j]) > LABEL_BOX[0] * spans[0] or abs(y[i] - y[j]) > LABEL_BOX[1] * spans[1]
            for j in kept
        ):
            kept.append(int(i))
    return {int(listed.index[i]) for i in kept}


def histograms(figures: dict[str, Any], frames: Frames) -> list[Plot]:
    """z of each penalised latent in the policies' own generations on unsafe prompts."""
    table = frames.generations
    unsafe = table[table["kind"] == "unsafe"] if "kind" in table else table.iloc[:0]
    plots = []
    for latent, tau in dict.fromkeys((row["latent"], row["tau"]) for row in figures["latents"]):
        plots.append(_histogram(unsafe, latent, float(tau)))
    return plots


def _histogram(unsafe: pd.DataFrame, latent: int, tau: float) -> Plot:
    """Shares of generations by z, base as bars and the others as outlines; where the latent is off
    stands apart, to the left.
    """
    column = f"z_{latent}"
    z_all = unsafe[column].dropna().to_numpy(float)
    top = max(1.5 * tau, float(z_all[np.isfinite(z_all)].max(initial=0.0)), 1e-6)
    edges = np.linspace(0, top, N_BINS + 1)
    width = top / N_BINS
    off = -3 * width
    centres = (edges[1:] + edges[:-1]) / 2
    made = figure("z", "share of responses", 310, legend=ABOVE)
    told, tallest = [], 0.0
    for arm in sorted(unsafe["arm"].unique(), key=arm_rank):
        z = unsafe.loc[unsafe["arm"] == arm, column].dropna().to_numpy(float)
        if not len(z):
            continue
        silent, shares = float((z <= 0).mean()), np.histogram(z[z > 0], edges)[0] / len(z)
        tallest = max(tallest, silent, float(shares.max()))
        looks, name = style(arm), arm_name(arm)
        hover = f"{name}, z near %{{x:.2f}}: %{{y:.1%}}<extra></extra>"
        shared = {
            "name": name,
            "legendgroup": arm,
            "visible": True if arm in ("base", "penalty") else "legendonly",
        }
        if arm == "base":
            x, y = np.r_[off, centres], np.r_[silent, shares].astype(np.float32)
            made.add(
                "bar",
                x=x,
                y=y,
                width=[3 * width, *[width] * N_BINS],
                marker={"color": looks.colour},
                opacity=0.55,
                hovertemplate=hover,
                **shared,
            )
        else:
            line = {"color": looks.colour, "dash": looks.dash, "width": 2, "shape": "hvh"}
            made.add(
                "scatter",
                x=centres,
                y=shares.astype(np.float32),
                mode="lines",
                line=line,
                hovertemplate=hover,
                **shared,
            )
            marker = {"color": looks.colour, "symbol": looks.symbol, "size": 10}
            hover = f"{name}, off: %{{y:.1%}}<extra></extra>"
            made.add(
                "scatter",
                x=[off],
                y=[silent],
                mode="markers",
                marker=marker,
                hovertemplate=hover,
                **(shared | {"showlegend": False}),
            )
        told.append(f"{name} {fixed(float((z > tau).mean()), 3)} of {len(z):,}")
    made.vline(tau, {"color": "#b3261e", "dash": "dash", "width": 2}, f"τ = {plain(tau)}")
    made.yaxis(range=[0, 1.2 * tallest or 1])  # room for tau's name above the bars
    ticks = np.linspace(0, top, 4)
    made.xaxis(
        tickvals=[off, *ticks], ticktext=["off", *(general(float(t)) for t in ticks)], tickangle=0
    )
    return Plot(
        f"latent-{latent}",
        f"Latent {latent}, before and after",
        f"Share of responses to unsafe prompts above tau: {'; '.join(told)}. The seeds of an arm"
        " are taken together; the changes by prompt and seed, with their intervals, stand above.",
        made,
        wide=False,
        origin=f"{GENERATIONS}: {column}; {many(len(z_all), 'response')}",
    )


# Steering, the run


def steering(figures: dict[str, Any], frames: Frames) -> list[Plot]:
    summary = figures["steering"]
    if summary is None or not summary["texts"]:
        return []
    groups = {
        "chosen": [
            (f"{t['source']} chosen", t["delta"], t["delta_low"], t["delta_high"])
            for t in summary["texts"]
            if t["label"] == "chosen"
        ],
        "rejected": [
            (f"{t['source']} rejected", t["delta"], t["delta_low"], t["delta_high"])
            for t in summary["texts"]
            if t["label"] == "rejected"
        ],
        "margin": [
            (
                f"{p['source']} margin",
                p["margin_delta"],
                p["margin_delta_low"],
                p["margin_delta_high"],
            )
            for p in summary["pairs"]
        ],
    }
    looks = {
        "chosen": ("#0072b2", "circle"),
        "rejected": ("#d55e00", "diamond"),
        "margin": ("#009e73", "square"),
    }
    names = [name for rows in groups.values() for name, *_ in rows]
    made = figure("Delta", "", 130 + 34 * len(names), legend=ABOVE)
    for group, rows in groups.items():
        known = [
            (name, *(math.nan if v is None else v for v in numbers)) for name, *numbers in rows
        ]
        value = np.array([row[1] for row in known], float)
        low, high = (np.array([row[i] for row in known], float) for i in (2, 3))
        whiskers = (
            {"array": high - value, "arrayminus": value - low}
            if np.isfinite(value).all()
            else {"array": []}
        )
        made.add(
            "scatter",
            x=value,
            y=[row[0] for row in known],
            error_x={"type": "data", "symmetric": False, **whiskers},
            mode="markers",
            name=group,
            marker={"color": looks[group][0], "symbol": looks[group][1], "size": 10},
            customdata=[interval(a, b, 4) for a, b in zip(low, high, strict=True)],
            hovertemplate="%{y}: %{x:+.4f} %{customdata}<extra></extra>",
        )
    made.yaxis(categoryorder="array", categoryarray=names[::-1])
    made.vline(0, {"color": "#7f868f", "width": 1.5})
    told = (
        "Delta of each data set's mean reward and margin, r(chosen) - r(rejected), with 95 %"
        " intervals by a bootstrap over prompts. It is of the reward model on fixed texts, of no"
        " policy. The tables have the numbers."
    )
    of = "; ".join(f"{p['source']} {many(p['n_prompts'], 'prompt')}" for p in summary["pairs"])
    origin = f"{STEER}: delta and margin_delta; {of}"
    return [Plot("steering", "Deltas with 95 % intervals", told, made, origin=origin)]


def run_graph(figures: dict[str, Any], frames: Frames) -> list[Plot]:
    """Every unit over time, and a line from each to those that read its outputs."""
    units = figures["phases"]
    names = [u["phase"] if u["unit"] == "all" else f"{u['phase']}/{u['unit']}" for u in units]
    row = {f"{u['phase']}/{u['unit']}": i for i, u in enumerate(units)}
    began = {i: datetime.fromisoformat(u["started"]) for i, u in enumerate(units) if u["started"]}
    first = min(began.values(), default=None)
    start = [
        (began.get(i, first) - first).total_seconds() / 60 if first else 0.0
        for i in range(len(units))
    ]
    length = [(u["seconds"] or 0.0) / 60 for u in units]
    made = figure("minutes", "", 90 + 24 * len(units), legend=ABOVE)
    lines_x: list[float | None] = []
    lines_y: list[float | None] = []
    for i, unit in enumerate(units):
        for need in unit["needs"]:
            if need in row:
                lines_x += [start[row[need]] + length[row[need]], start[i], None]
                lines_y += [row[need], i, None]
    made.add(
        "scatter",
        x=lines_x,
        y=lines_y,
        mode="lines",
        line={"width": 1, "color": "rgba(127,134,143,0.6)"},
        hoverinfo="skip",
        name="reads the outputs of",
    )
    for state, colour in STATES.items():
        mine = [i for i, unit in enumerate(units) if unit["status"] == state]
        if mine and state == "done":
            made.add(
                "bar",
                x=[length[i] for i in mine],
                y=mine,
                base=[start[i] for i in mine],
                orientation="h",
                name=state,
                marker={"color": colour},
                customdata=[
                    [
                        names[i],
                        units[i]["seconds"],
                        units[i]["device"],
                        units[i]["started"],
                        ", ".join(units[i]["needs"]) or "nothing",
                    ]
                    for i in mine
                ],
                hovertemplate=(
                    "%{customdata[0]}: %{customdata[1]:.0f} s on %{customdata[2]}<br>began"
                    " %{customdata[3]}<br>reads %{customdata[4]}<extra></extra>"
                ),
            )
        elif mine:
            made.add(
                "scatter",
                x=[0.0] * len(mine),
                y=mine,
                mode="markers+text",
                text=[state] * len(mine),
                textposition="middle right",
                marker={
                    "color": colour,
                    "symbol": "x" if state != "not run" else "circle-open",
                    "size": 10,
                },
                name=state,
                hovertemplate=f"{state}<extra></extra>",
            )
    made.yaxis(
        tickvals=list(range(len(names))), ticktext=names, autorange="reversed", showgrid=False
    )
    counts = {state: sum(unit["status"] == state for unit in units) for state in STATES}
    became = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    told = (
        f"{became}. Bars show when each part ran, in minutes from the start of the first, lines who"
        " reads whose outputs. The table has the times."
    )
    origin = f"{MANIFEST}: started, ended and inputs; {many(len(units), 'unit')}"
    return [Plot("run-graph", "Run graph", told, made, origin=origin)]


PLOTS: dict[str, Callable[[dict[str, Any], Frames], Sequence[Plot]]] = {
    "changes": changes,
    "distances": distances,
    "latents": histograms,
    "training": training,
    "sweep": sweep,
    "features": effects,
    "steering": steering,
    "phases": run_graph,
}
"""By the id of the section that they stand in."""
