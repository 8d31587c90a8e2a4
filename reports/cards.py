"""The latents' pages: `cards_page(cards, examples, run_name)` -> cards.html, whole in itself.

Texts may be harmful: each is folded behind a click, and everything is escaped. What latents do at
every token was stored by cards and evaluate; here it is only drawn. The script
(`templates/cards.js`) searches and sorts; the page can be read without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe

from reports.frames import arm_rank
from reports.numbers import arm_name, fixed, general, percent
from reports.page import render
from sarm.config import ARMS, arm_and_seed

DENSE = 0.5
"""A latent that fires on a larger share of texts is warned of."""


def cards_page(
    cards: dict[str, Any],
    run_name: str,
    texts: str = "",
    *,
    examples: Mapping[str, Mapping[str, Any]] | None = None,
    distance: float = math.nan,
) -> str:
    """The page of what the cards phase published as cards.json, and evaluate as examples.json by
    policy, of the policies at the compared `distance`; `texts` says whose texts it shows.
    """
    own = own_by_latent(examples or {}, distance)
    return render(
        "cards.html",
        script="cards.js",
        title=f"{run_name}: latents",
        run=run_name,
        cards=cards,
        texts=texts,
        own=own,
        tops={
            card["latent"]: largest(card, own.get(card["latent"], [])) for card in cards["cards"]
        },
        known={card["latent"] for card in cards["cards"]},
        dense=DENSE,
        bars=bars,
        marked=marked,
        general=general,
        fixed=fixed,
        percent=lambda share: "n/a" if share is None else percent(share),
    )


def own_by_latent(
    examples: Mapping[str, Mapping[str, Any]], distance: float
) -> dict[int, list[dict[str, Any]]]:
    """By latent: examples of each arm's first seed and of the untrained policies, in the order of
    the arms, with the text that each is of.
    """
    first: dict[str, str] = {}
    for policy in sorted(
        examples, key=lambda p: (arm_rank(arm_and_seed(p)[0]), arm_and_seed(p)[1])
    ):
        first.setdefault(arm_and_seed(policy)[0], policy)
    found: dict[int, list[dict[str, Any]]] = {}
    for arm, policy in first.items():
        trained = arm not in ARMS or ARMS[arm].trained
        words = arm_name(arm) + (f", seed {arm_and_seed(policy)[1]}" if trained else "")
        for example in examples[policy]["examples"]:
            text = examples[policy]["texts"][example["text"]]
            at = math.nan if text["distance"] is None else text["distance"]
            if not trained or at == distance or (math.isnan(at) and math.isnan(distance)):
                found.setdefault(example["latent"], []).append({**text, **example, "policy": words})
    return found


def largest(card: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> float:
    """The largest value by token of a latent's examples, which has the full colour."""
    shown = [*card["top"], *card["near_misses"], *card["controls"], *own]
    return max((a for example in shown for a in example.get("a", ())), default=0.0)


def marked(tokens: Sequence[str], example: Mapping[str, Any], top: float) -> markupsafe.Markup:
    """A text whose tokens are shaded by the latent's value before TopK, those underlined on which
    TopK keeps it; what is not above 0 stands as it is.
    """
    if not tokens or "a" not in example:
        return markupsafe.Markup("<em>not shown</em>")
    kept = set(example["kept"])
    parts: list[str] = []
    plain: list[str] = []
    for place, (token, a) in enumerate(zip(tokens, example["a"], strict=True)):
        last = place == len(tokens) - 1
        if a <= 0 and place not in kept and not last:
            plain.append(token)
            continue
        parts.append(str(markupsafe.escape("".join(plain))))
        plain = []
        names = "t" + " k" * (place in kept) + " end" * last
        share = max(0.0, min(1.0, a / top)) if top > 0 else 0.0
        told = f"{a:.3g}" + (", kept" if place in kept else ", not kept")
        parts.append(
            f'<span class="{names}" style="--v:{share:.2f}" title="{told}">'
            f"{markupsafe.escape(token)}</span>"
        )
    return markupsafe.Markup("".join([*parts, str(markupsafe.escape("".join(plain)))]))


def bars(histogram: dict[str, Any]) -> list[dict[str, Any]]:
    """A bar a bin: its range, its counts, and their heights in percent of the tallest bar."""
    tallest = (
        max(
            [c + r for c, r in zip(histogram["chosen"], histogram["rejected"], strict=True)],
            default=0,
        )
        or 1
    )
    return [
        {
            "low": low,
            "high": high,
            "chosen": c,
            "rejected": r,
            "chosen_height": 100 * c / tallest,
            "rejected_height": 100 * r / tallest,
        }
        for low, high, c, r in zip(
            histogram["edges"],
            histogram["edges"][1:],
            histogram["chosen"],
            histogram["rejected"],
            strict=False,
        )
    ]
