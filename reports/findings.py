"""What each section comes to in one sentence, which the page shows before any table:
`finding("evaluation", figures)`. Counts and numbers alone; what they mean is the ladder's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reports import beside, seed
from reports.blocks import Block, Prose
from reports.calibration import verdict_on_the_instrument
from reports.numbers import MEASURES, arm_name, duration, fixed
from sarm.run import listed

Figures = Mapping[str, Any]
NOT_RUN = "Not part of this run."


def finding(section: str, figures: Figures) -> str:
    """Empty where the section has nothing to say."""
    return FINDINGS[section](figures) if section in FINDINGS else ""


def calibration(figures: Figures) -> str:
    return verdict_on_the_instrument(figures["readings"]) if figures["readings"] else ""


def verdict(figures: Figures) -> str:
    found = figures["verdict"]
    return f"{found['word'].capitalize()}, rung {found['rung']} of 5."


def failures(figures: Figures) -> str:
    rows = figures["failures"]
    if not rows:
        return "Every phase is done."
    names = [r["phase"] if r["unit"] == "all" else f"{r['phase']}/{r['unit']}" for r in rows]
    return f"{len(rows)} failed or missing: {listed(names, 4)}."


def evaluation(figures: Figures) -> str:
    rates = by_arm(figures["policies"], "penalised_fired")
    return f"Penalised latents fire on unsafe prompts: {rates}." if rates else ""


def by_arm(rows: Sequence[Mapping[str, Any]], measure: str) -> str:
    """`base 0.550, penalty 0.120 (5 seeds)`: means over the seeds of each arm."""
    told: dict[str, list[float]] = {}
    for row in rows:
        told.setdefault(row["arm"], []).append(row[measure])
    return ", ".join(
        f"{arm_name(arm)} {fixed(sum(values) / len(values), 3)}"
        + (f" ({len(values)} seeds)" if len(values) > 1 else "")
        for arm, values in told.items()
    )


def changes(figures: Figures) -> str:
    rows = [c for c in figures["verdict"]["changes"] if c["n_prompts"]]
    if not rows:
        return ""
    apart = [
        f"{MEASURES[c['measure']]} ({arm_name(c['arm'])})"
        for c in rows
        if c["low"] is not None and (c["low"] > 0 or c["high"] < 0)
    ]
    return f"{len(apart)} of {len(rows)} intervals leave out 0{': ' * bool(apart)}{listed(apart)}."


def distances(figures: Figures) -> str:
    rows = [row for row in figures["distances"] if row["distance"] is not None]
    if not rows:
        return ""
    reached = sum(row["state"] != "not reached" for row in rows)
    return f"{reached} of {len(rows)} policies at KL distances were reached."


def latents(figures: Figures) -> str:
    counts = [
        f"{len({row['latent'] for row in figures[name]})} {words}"
        for name, words in (
            ("latents", "penalised"),
            ("random_latents", "of the random arm"),
            ("monitors", "monitors"),
        )
        if figures[name]
    ]
    return f"Rates and values of {', '.join(counts)}, by arm." if counts else ""


def training(figures: Figures) -> str:
    kl = by_arm([row for row in figures["training"] if row["kl"] is not None], "kl")
    return f"KL to the base policy in the last tenth of the steps: {kl}." if kl else ""


def sweep(figures: Figures) -> str:
    points = (figures.get("sweep") or {}).get("points", [])
    front = [point["label"] for point in points if point["front"]]
    return f"{len(front)} of {len(points)} on the front: {listed(front, 4)}." if points else ""


def opened(figures: Figures) -> str:
    return first_words(beside.opened(dict(figures))) if figures["check_sarm"] else ""


def beside_seed(figures: Figures) -> str:
    return first_words(seed.beside_seed(dict(figures))) if figures["seed"] else ""


def first_words(blocks: Sequence[Block]) -> str:
    return next((block.text for block in blocks if isinstance(block, Prose)), "")


def cost(figures: Figures) -> str:
    rows = figures["cost"]
    if not rows:
        return ""
    used, planned = (sum(row[name] or 0.0 for row in rows) for name in ("used", "planned"))
    known = any(row["planned"] is not None for row in rows)
    return f"{fixed(used, 2)} GPU-hours used" + f" of {fixed(planned, 2)} planned" * known + "."


def features(figures: Figures) -> str:
    found = figures["features"]
    if found is None:
        return ""
    return (
        f"{found['n_discoveries']} of {found['n_tested']} tested latents are discoveries,"
        f" {found['n_confirmed']} of them confirmed on held-out prompts."
    )


def trust(figures: Figures) -> str:
    validity = (figures["features"] or {}).get("validity")
    if not validity:
        return ""
    shuffled = validity["shuffled_labels"]
    if not shuffled:
        return "Nulls, baselines and stability of the selection."
    false = ", ".join(str(row["discoveries"]) for row in shuffled)
    found = figures["features"]["n_discoveries"]
    return f"Discoveries with shuffled labels, where each is false: {false}; as they are: {found}."


def rankings(figures: Figures) -> str:
    rows = (figures["features"] or {}).get("rankings") or []
    mine = [r for r in rows if r["ranking"] == "effect"]
    told = [f"{r['confirmed']} of {len(r['latents'])} {r['role']}" for r in mine]
    return f"Confirmed among the first by effect: {', '.join(told)}." if told else ""


def cards(figures: Figures) -> str:
    found = figures["cards"]
    return f"{found['n']} latents have a page, in cards.html." if found and found["n"] else ""


def steering(figures: Figures) -> str:
    summary = figures["steering"]
    pairs = summary["pairs"] if summary else []
    told = [f"{p['source']} {fixed(p['margin_delta'], 4, sign=True)}" for p in pairs]
    return f"Change of the margin between chosen and rejected: {', '.join(told)}." if told else ""


def steered(figures: Figures) -> str:
    found = figures["steered"]
    if found is None:
        return ""
    rows = [row for row in found["rows"] if row["kind"] == "latent"]
    beyond = sum(row["beyond_random"] for row in rows)
    return f"{beyond} of {len(rows)} pushes move the reward more than every random direction."


def phases(figures: Figures) -> str:
    rows = figures["phases"]
    took = sum(row["seconds"] or 0 for row in rows)
    done = sum(row["status"] == "done" for row in rows)
    return f"{done} of {len(rows)} parts are done, {duration(took)} of work in all."


def provenance(figures: Figures) -> str:
    p = figures["provenance"]
    commits = ", ".join(commit[:8] for commit in p["git_commits"]) or "unknown"
    return f"Commit {commits}, config {p['config_sha256'][:8]}, seed {p['seed']}."


FINDINGS: dict[str, Callable[[Figures], str]] = {
    "calibration": calibration,
    "verdict": verdict,
    "failures": failures,
    "evaluation": evaluation,
    "changes": changes,
    "distances": distances,
    "latents": latents,
    "training": training,
    "sweep": sweep,
    "opened": opened,
    "seed": beside_seed,
    "cost": cost,
    "features": features,
    "trust": trust,
    "rankings": rankings,
    "cards": cards,
    "steering": steering,
    "steered": steered,
    "phases": phases,
    "provenance": provenance,
}
"""By the id of the section."""
