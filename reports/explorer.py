"""Every generation of a run, arms and seeds side by side -> generations.html, one file that needs
no network: `explorer_page(figures, frames)`.

The page filters, sorts and compares in the browser (`templates/explorer.js`); here its data are
packed: JSON, deflated, in base64. Whose texts the frames hold is for `reports.texts` to say.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reports.distances import compared_words
from reports.frames import Frames, arm_rank
from reports.numbers import arm_name
from reports.page import render
from reports.texts import texts_words
from sarm.config import ARMS

MAX_BYTES = 9_500_000
"""Of the packed data, so that the page stays below 10 MB."""
LENGTHS = (20_000, 4000, 2000, 1000, 500)
"""Characters of a text that are shown: the first of these that fits."""
FIRED, REFUSED, CUT, UNENDED = 1, 2, 4, 8
"""Bits of a response's flags."""


class Packed(NamedTuple):
    """What fits in a page."""

    text: str
    n_prompts: int
    length: int
    """Characters at which texts end."""


def explorer_page(figures: dict[str, Any], frames: Frames) -> str:
    """The whole page. Where all texts do not fit they are clipped, then prompts are left out, and
    the page says so.
    """
    latents = watched_latents(figures)
    data = explorer_data(frames.generations, latents)
    packed = fitted(data)
    arms = list(dict.fromkeys(policy["arm"] for policy in data["policies"]))
    return render(
        "explorer.html",
        script="explorer.js",
        title=f"{figures['run']}: generations",
        run=figures["run"],
        date=figures["date"],
        compared=compared_words(figures["compared"]),
        texts=texts_words(figures["texts"]),
        arms=[(arm, arm_name(arm)) for arm in arms],
        before=first_of(arms, ("base", "no_penalty")),
        after=first_of(arms, ("penalty", "random", "no_penalty")),
        seeds=sorted({p["seed"] for p in data["policies"] if p["trained"]}),
        latents=latents,
        has_cards=bool(figures["cards"] and figures["cards"]["n"]),
        sources=figures["sources"].get("samples", []),
        n=len(frames.generations),
        n_prompts=len(data["prompts"]),
        packed=packed,
    )


def first_of(arms: Sequence[str], wanted: Sequence[str]) -> str:
    return next((arm for arm in wanted if arm in arms), arms[0] if arms else "")


def watched_latents(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The latents whose values the generations hold, with tau: penalised, then monitors."""
    found: dict[int, dict[str, Any]] = {}
    for name, role in (("latents", "penalised"), ("monitors", "monitor")):
        for row in figures[name]:
            one = {"latent": row["latent"], "tau": row["tau"], "role": role}
            found.setdefault(row["latent"], one)
    return list(found.values())


def explorer_data(generations: pd.DataFrame, latents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Policies, latents, and prompts with every answer: (policy, sample, text, reward, tokens,
    flags, KL, harm, [(latent, z) that fire], [latents that rank just below TopK's cutoff]), in
    which policies and latents stand as positions.
    """
    if generations.empty:
        return {"policies": [], "latents": list(latents), "prompts": []}
    found = generations[["policy", "arm", "seed"]].drop_duplicates("policy")
    policies = [
        {
            "name": policy,
            "arm": arm,
            "words": arm_name(arm),
            "seed": int(seed),
            "trained": arm not in ARMS or ARMS[arm].trained,
        }
        for policy, arm, seed in sorted(
            found.itertuples(index=False), key=lambda row: (arm_rank(str(row.arm)), row.seed)
        )
    ]
    place = {policy["name"]: i for i, policy in enumerate(policies)}
    answers = list(
        zip(
            generations["policy"].map(place),
            column(generations, "sample", 0).astype(int),
            generations["response"].astype(str),
            rounded(column(generations, "reward")),
            generations["n_tokens"].astype(int),
            flags(generations),
            rounded(column(generations, "kl"), 2),
            rounded(column(generations, "harm"), 2),
            above(generations, latents, "z"),
            [[i for i, _ in row] for row in above(generations, latents, "below")],
            strict=True,
        )
    )
    prompts: dict[str, dict[str, Any]] = {}
    texts = generations["prompt"] if "prompt" in generations else generations["prompt_id"]
    categories = generations["category"] if "category" in generations else texts.map(lambda _: "")
    for id_, kind, category, text, answer in zip(
        generations["prompt_id"], generations["kind"], categories, texts, answers, strict=True
    ):
        one = prompts.setdefault(
            str(id_),
            {
                "id": str(id_),
                "kind": kind,
                "category": str(category or ""),
                "prompt": str(text),
                "answers": [],
            },
        )
        one["answers"].append(answer)
    # Unsafe and safe by turns, so that what is left out at the end is some of both.
    by_kind: dict[str, int] = {}
    order = []
    for id_ in sorted(prompts):
        kind = prompts[id_]["kind"]
        by_kind[kind] = by_kind.get(kind, 0) + 1
        order.append((by_kind[kind], kind != "unsafe", id_))
    ordered = [prompts[id_] for _, _, id_ in sorted(order)]
    for prompt in ordered:
        prompt["answers"].sort(key=lambda answer: answer[:2])
    return {"policies": policies, "latents": list(latents), "prompts": ordered}


def column(table: pd.DataFrame, name: str, absent: float = np.nan) -> pd.Series:
    if name not in table:
        return pd.Series(absent, table.index)
    return pd.to_numeric(table[name], errors="coerce").astype(float)


def rounded(values: pd.Series, digits: int = 3) -> list[float | None]:
    return [round(v, digits) if np.isfinite(v) else None for v in values.astype(float)]


def flags(table: pd.DataFrame) -> list[int]:
    names = {"penalised_fired": FIRED, "refused": REFUSED, "truncated": CUT, "unended": UNENDED}
    bits = [(column(table, name).fillna(0).to_numpy() > 0) * bit for name, bit in names.items()]
    return [int(value) for value in np.sum(bits, axis=0)]


def above(
    table: pd.DataFrame, latents: Sequence[dict[str, Any]], prefix: str
) -> list[list[tuple[int, float]]]:
    """By row: the positions and values of the latents above their tau."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(len(table))]
    for i, entry in enumerate(latents):
        values = column(table, f"{prefix}_{entry['latent']}").to_numpy()
        for row in np.flatnonzero(values > entry["tau"]):
            found[row].append((i, round(float(values[row]), 3)))
    return found


def fitted(data: dict[str, Any], most: int = MAX_BYTES) -> Packed:
    """The data with texts as long as they can be, and as many prompts."""
    kept = data["prompts"]
    for length in LENGTHS:
        text = pack(data | {"prompts": [clipped(prompt, length) for prompt in kept]})
        if len(text) <= most:
            return Packed(text, len(kept), length)
    while len(text) > most:
        kept = kept[: max(1, int(0.9 * len(kept) * most / len(text)))]
        text = pack(data | {"prompts": [clipped(prompt, LENGTHS[-1]) for prompt in kept]})
    return Packed(text, len(kept), LENGTHS[-1])


def clipped(prompt: dict[str, Any], length: int) -> dict[str, Any]:
    answers = [(*a[:2], clip(a[2], length), *a[3:]) for a in prompt["answers"]]
    return prompt | {"prompt": clip(prompt["prompt"], length), "answers": answers}


def clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length].rstrip() + " [...]"


def pack(data: dict[str, Any]) -> str:
    """JSON, deflated, in base64: nothing in it can end the element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii")
