"""Latent cards: what each selected latent fires on, what it nearly fires on, and what it does to
the reward.

    # what `python -m jobs cards` publishes
    found = latent_cards(encoded, features, table, responses, config)

Examples are taken over discovery, validation and test, at the reward position, at most one a
prompt. A near miss is a text on which the latent ranks just below the TopK cutoff, by `gap`. Plain
values throughout; `reports.cards` makes the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sarm.config import CardsConfig
from sarm.data.datasets import Text
from sarm.probing.edits import ENOUGH, Edit, edit_effects, minimal_edits
from sarm.probing.effects import Encoded
from sarm.records import Features

BINS = 20


class Activity(NamedTuple):
    """One latent on n texts."""

    z: NDArray[np.float64]
    """(n,) after TopK"""
    gap: NDArray[np.float64]
    """(n,) how far below the k-th value it stayed, where the ranks that encode kept reach it; else
    infinite
    """


class Listed(NamedTuple):
    """A selected latent: what select says of it, and in which lists it stands."""

    latent: int
    lists: tuple[str, ...]
    figures: dict[str, Any]


def selected_latents(features: Features) -> list[Listed]:
    """Every listed, penalised and monitor latent of features.json, once, in that order."""
    figures: dict[int, dict[str, Any]] = {}
    lists: dict[int, list[str]] = {}
    for name in ("harming", "promoting", "misleading", "penalised", "monitor_features"):
        for entry in getattr(features, name):
            latent = entry.latent
            figures[latent] = {**entry.tree(), **figures.get(latent, {})}
            lists.setdefault(latent, []).append("monitor" if name == "monitor_features" else name)
    return [Listed(latent, tuple(lists[latent]), figures[latent]) for latent in figures]


def activity(encoded: Encoded, latents: Sequence[int]) -> dict[int, Activity]:
    """z and gap of some latents on every text."""
    ranks, n = encoded.ranks, len(encoded.ranks.indices)
    found = {latent: Activity(np.zeros(n), np.full(n, np.inf)) for latent in latents}
    rows, places = np.nonzero(np.isin(ranks.indices, list(latents)))
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        mine = found[int(ranks.indices[row, place])]
        if place < ranks.k:
            mine.z[row] = ranks.values[row, place]
        else:
            mine.gap[row] = float(ranks.values[row, ranks.k - 1]) - float(ranks.values[row, place])
    return found


def latent_cards(
    encoded: Encoded,
    features: Features,
    table: pd.DataFrame,
    texts: Sequence[Text],
    config: CardsConfig,
    seed: int,
) -> dict[str, Any]:
    """The contents of cards.json. `texts` are those of `encoded.texts`, row by row; `table` is
    select's, a row per latent.
    """
    selected = selected_latents(features)
    found = activity(encoded, [s.latent for s in selected])
    edits = minimal_edits([(text.prompt_id, text.messages[-1]["content"]) for text in texts])
    rows: dict[int, Any] = {
        int(row["latent"]): row
        for _, row in table[table["latent"].isin([s.latent for s in selected])].iterrows()
    }
    cards = [
        _card(s, found[s.latent], encoded, edits, rows[s.latent], config, seed) for s in selected
    ]
    shown = sorted(
        {
            e["row"]
            for card in cards
            for kind in ("top", "near_misses", "controls")
            for e in card[kind]
        }
        | _edited(cards)
    )
    return {
        "n_texts": len(texts),
        "n_prompts": len({text.prompt_id for text in texts}),
        "minimal_edits": {"n": len(edits), "enough": len(edits) >= ENOUGH, "needed": ENOUGH},
        "labels": None,
        "why_no_words": "",
        "cards": cards,
        "texts": {str(row): _text(texts[row], encoded.texts.iloc[row]) for row in shown},
    }


def _card(
    s: Listed,
    mine: Activity,
    encoded: Encoded,
    edits: Sequence[Edit],
    row: pd.Series,
    config: CardsConfig,
    seed: int,
) -> dict[str, Any]:
    chosen = (encoded.texts["label"] == "chosen").to_numpy()
    prompts = encoded.texts["prompt_id"].to_numpy(str)
    z, gap, weight = mine.z, mine.gap, float(row["weight"])
    top = first_of_each(np.argsort(-z, kind="stable"), z > 0, prompts, config.top)
    near = first_of_each(np.argsort(gap, kind="stable"), np.isfinite(gap), prompts, config.controls)
    shuffled = np.random.default_rng([seed, s.latent]).permutation(len(z))
    controls = first_of_each(shuffled, (z == 0) & ~np.isfinite(gap), prompts, config.controls)
    moved = edit_effects(edits, z)
    return {
        "latent": s.latent,
        "lists": list(s.lists),
        "weight": weight,
        "role": str(row["role"]),
        "upstream_s": float(row["upstream_s"]),
        "figures": s.figures,
        "density": {
            name: float((z[rows] > 0).mean()) if rows.any() else None
            for name, rows in _by_label(chosen)
        },
        "histogram": histogram(z, chosen),
        "top": [{"row": i, "z": float(z[i]), "reward": weight * float(z[i])} for i in top],
        "near_misses": [{"row": i, "gap": float(gap[i])} for i in near],
        "controls": [{"row": i} for i in controls],
        "n_active": int((z > 0).sum()),
        "n_near_misses": int(np.isfinite(gap).sum()),
        "edits": {
            **moved._asdict(),
            "largest": [
                {
                    "before": e.before,
                    "after": e.after,
                    "removed": e.removed,
                    "added": e.added,
                    "z_before": float(z[e.before]),
                    "z_after": float(z[e.after]),
                }
                for e in (edits[i] for i in moved.largest)
            ],
        },
        "label": None,
        "siblings": {},
        "words": None,
    }


class LabelRows(NamedTuple):
    """Rows to name a latent by, of discovery, and rows of the other parts to score the name on; at
    most one a prompt and list.
    """

    active: list[int]
    silent: list[int]
    held_active: list[int]
    held_silent: list[int]


def label_rows(
    mine: Activity, encoded: Encoded, config: CardsConfig, held_out: int, seed: int
) -> LabelRows:
    """Shown: the top texts, near misses and random ones. Held out: texts drawn at random, half of
    the silent ones near misses.
    """
    prompts = encoded.texts["prompt_id"].to_numpy(str)
    shown = (encoded.texts["part"] == "discovery").to_numpy()
    fires, near = mine.z > 0, np.isfinite(mine.gap)
    shuffled = np.random.default_rng([seed, 1]).permutation(len(fires))

    def silent(rows: NDArray[np.bool_], n: int) -> list[int]:
        nearly = first_of_each(shuffled, rows & near, prompts, n // 2)
        others = rows & ~fires & ~near & ~np.isin(prompts, prompts[nearly])
        return [*nearly, *first_of_each(shuffled, others, prompts, n - len(nearly))]

    return LabelRows(
        first_of_each(np.argsort(-mine.z, kind="stable"), shown & fires, prompts, config.top),
        silent(shown, 2 * config.controls),
        first_of_each(shuffled, ~shown & fires, prompts, held_out),
        silent(~shown, held_out),
    )


def first_of_each(
    order: NDArray[np.int64], wanted: NDArray[np.bool_], prompts: NDArray[Any], n: int
) -> list[int]:
    """The first n wanted rows in an order, one a prompt."""
    taken: dict[str, int] = {}
    for row in order[wanted[order]].tolist():
        if len(taken) == n:
            break
        taken.setdefault(prompts[row], row)
    return list(taken.values())


def histogram(z: NDArray[np.float64], chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """Counts of z > 0 in equal bins up to the largest, by label, and how often it is off (0, or
    kept below zero).
    """
    edges = np.linspace(0.0, max(float(z.max(initial=0.0)), 1e-9), BINS + 1)
    counts = {
        name: np.histogram(z[rows & (z > 0)], edges)[0].tolist()
        for name, rows in _by_label(chosen)[1:]
    }
    return {"edges": edges.tolist(), **counts, "off": int((z <= 0).sum())}


def _by_label(chosen: NDArray[np.bool_]) -> list[tuple[str, NDArray[np.bool_]]]:
    return [("all", np.ones_like(chosen)), ("chosen", chosen), ("rejected", ~chosen)]


def _edited(cards: Sequence[Mapping[str, Any]]) -> set[int]:
    return {
        edit[side]
        for card in cards
        for edit in card["edits"]["largest"]
        for side in ("before", "after")
    }


def _text(text: Text, row: pd.Series) -> dict[str, Any]:
    return {
        "prompt": text.messages[-2]["content"],
        "earlier_turns": len(text.messages) - 2,
        "response": text.messages[-1]["content"],
        "label": text.label,
        "part": text.part,
        "source": text.source,
        "reward": float(row["reward"]),
    }
