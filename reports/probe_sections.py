"""What probe and select found, and what steering does to the reward model, a function a section:
figures -> blocks.
"""

from __future__ import annotations

from typing import Any

from reports.blocks import NOT_AVAILABLE, Block, Prose, Table
from reports.monitors import monitors_sentence
from reports.numbers import fixed, general, interval
from reports.origins import FEATURES, SELECTED, STEER, UNKNOWN, columns, on_prompts
from reports.reference import direction, moves
from sarm.run import many


def features(figures: dict[str, Any]) -> list[Block]:
    found = figures["features"]
    if found is None:
        return list(NOT_AVAILABLE)
    n = found["n_prompts"]
    blocks: list[Block] = [
        Prose(
            f"Effect: contribution to the margin on {n.get('validation', 0)} validation prompts."
            f" Selected on {n.get('discovery', 0)} discovery prompts: {found['n_tested']} latents"
            f" tested, {found['n_discoveries']} discoveries. Roles are those on discovery. Each"
            " interval is for one latent by itself; those of confirmed latents lie somewhat too far"
            " from 0, as the same prompts confirmed them."
        )
    ]
    for role in ("promoting", "harming", "misleading"):
        if not found[role]:
            blocks.append(Prose(f"{role.capitalize()}: none"))
            continue
        blocks.append(
            Table(
                ["latent", "weight", "delta z", "effect", "95 % interval", "q", "confirmed"],
                [
                    [
                        f["latent"],
                        *(general(f.get(m)) for m in ("weight", "delta_z", "effect")),
                        f"[{general(f.get('effect_low'))}, {general(f.get('effect_high'))}]",
                        general(f.get("q")),
                        "yes" if f["confirmed"] else "no",
                    ]
                    for f in found[role]
                ],
                title=f"{role.capitalize()}:",
                origins=SELECTED,
                counts=[on_prompts(n, "discovery", "validation")] * len(found[role]),
                unknown=UNKNOWN,
            )
        )
    blocks += [Prose(f"Warning: {warning}") for warning in found.get("warnings", [])]
    monitors = monitors_sentence(figures["monitor_choice"])
    return [*blocks, Prose(monitors)] if monitors else blocks


def rankings(figures: dict[str, Any]) -> list[Block]:
    """The effect's choice of latents beside what weight, activity and upstream's s would have
    chosen.
    """
    rows = (figures["features"] or {}).get("rankings")
    if not rows:
        return list(NOT_AVAILABLE)
    names = {
        "effect": "effect",
        "weight": "weight",
        "difference": "activity",
        "upstream_s": "upstream's s",
    }
    return [
        Prose(
            "The first latents by each ranking, made on discovery (effect on the margin, weight,"
            " difference of activity, upstream's s): how many the effect ranks first"
            " too, were tested, are of that role, and are confirmed on validation; `effect` is"
            " their mean effect on the validation margin. Only what was tested and discovered by"
            " its effect can be confirmed, so that this column favours the first ranking."
            " Upstream's s is (c - j) / (c + j + C); it looks at no weight."
        ),
        Table(
            ["Ranking", "role", "latents", "shared", "tested", "of role", "confirmed", "effect"],
            [
                [
                    names[r["ranking"]],
                    r["role"],
                    len(r["latents"]),
                    r["shared_with_effect"],
                    r["tested"],
                    r["of_role"],
                    r["confirmed"],
                    general(r["mean_effect_validation"]),
                ]
                for r in rows
            ],
            origins=columns(
                FEATURES,
                dict.fromkeys(
                    ("latents", "shared", "tested", "of role", "confirmed", "effect"), "rankings"
                ),
            ),
            counts=[
                on_prompts(figures["features"]["n_prompts"], "discovery", "validation")
                for _ in rows
            ],
        ),
    ]


def cards(figures: dict[str, Any]) -> list[Block]:
    """Where the cards are, and whether the data could test what in a text sets a latent off."""
    found = figures["cards"]
    if found is None:
        return list(NOT_AVAILABLE)
    edits = found["minimal_edits"]
    blocks: list[Block] = [
        Prose(
            f"{found['n']} latents have a card in cards.html: texts they fire on, near misses,"
            " random texts, histogram and effect."
        )
    ]
    if edits["enough"]:
        blocks.append(
            Prose(
                f"{edits['n']} pairs of responses differ by a small edit; each card shows the edits"
                " that move its latent."
            )
        )
    else:
        blocks.append(
            Prose(
                f"{edits['n']} pairs of responses differ by a small edit, of {edits['needed']}"
                " needed: what in a text sets a latent off was not tested, only what the latent"
                " does to the reward."
            )
        )
    if found["labels"]:
        blocks.append(Prose(labels_sentence(found)))
    return blocks


def labels_sentence(found: dict[str, Any]) -> str:
    """How well the labels tell held-out texts apart."""
    asked = {
        "detection": "which texts the latent fires on",
        "fuzzing": "whether the tokens marked in a text are those at which it is active",
    }
    told = [
        f"{fixed(score['mean'], 2)} by {how} ({asked[how]}), over {many(score['n'], 'latent')}"
        for how, score in found["label_scores"].items()
    ]
    return (
        f"Labels by {found['labels']['model']}, scored on held-out texts: mean balanced accuracy"
        f" {'; '.join(told)}. 0.5 is chance."
    )


def steering(figures: dict[str, Any]) -> list[Block]:
    summary = figures["steering"]
    if summary is None or not summary["texts"]:
        return list(NOT_AVAILABLE)
    what = summary["intervention"]
    names = ", ".join(str(latent) for latent in what["latents"]) or "none"
    pairs = [
        f"{many(p['n'], 'pair')} of {many(p['n_prompts'], 'prompt')}" for p in summary["pairs"]
    ]
    return [
        Prose(
            f"Intervention: {what['what']}, latents {names}. The texts are the fixed ones of the"
            " test part."
        ),
        Table(
            ["Dataset", "texts", "prompts", "Delta", "95 % interval", "re-selected"],
            [
                [
                    f"{t['source']} {t['label'].capitalize()}",
                    t["n"],
                    t["n_prompts"],
                    fixed(t["delta"], 4, sign=True),
                    interval(t["delta_low"], t["delta_high"], 4),
                    fixed(t["delta_reselected"], 4, sign=True),
                ]
                for t in summary["texts"]
            ],
            origins=columns(
                STEER,
                {
                    "texts": "texts, n",
                    "prompts": "texts, n_prompts",
                    "Delta": "texts, delta",
                    "95 % interval": "texts, delta_low and delta_high, over prompts",
                    "re-selected": "texts, delta_reselected",
                },
            ),
            counts=[
                f"{many(t['n'], 'text')} of {many(t['n_prompts'], 'prompt')}"
                for t in summary["texts"]
            ],
        ),
        Table(
            ["Dataset", "pairs", "Before", "After", "Delta", "95 % interval"],
            [
                [
                    p["source"],
                    p["n"],
                    fixed(p["margin_before"], 4),
                    fixed(p["margin_after"], 4),
                    fixed(p["margin_delta"], 4, sign=True),
                    interval(p["margin_delta_low"], p["margin_delta_high"], 4),
                ]
                for p in summary["pairs"]
            ],
            title="Margin r(chosen) - r(rejected), over pairs:",
            origins=columns(
                STEER,
                {
                    "pairs": "pairs, n",
                    "Before": "pairs, margin_before",
                    "After": "pairs, margin_after",
                    "Delta": "pairs, margin_delta",
                    "95 % interval": "pairs, margin_delta_low and _high, over prompts",
                },
            ),
            counts=pairs,
        ),
        Table(
            ["Dataset", "prompts", "Before", "After", "to wrong", "to right"],
            [
                [
                    p["source"],
                    p["n_prompts"],
                    fixed(p["accuracy_before"], 4),
                    fixed(p["accuracy_after"], 4),
                    p["to_wrong"],
                    p["to_right"],
                ]
                for p in summary["pairs"]
            ],
            title="Pair accuracy and rank flips:",
            origins=columns(
                STEER,
                {
                    "prompts": "pairs, n_prompts",
                    "Before": "pairs, accuracy_before",
                    "After": "pairs, accuracy_after",
                    "to wrong": "pairs, to_wrong",
                    "to right": "pairs, to_right",
                },
            ),
            counts=pairs,
        ),
        Prose(margin_sentence(summary)),
    ]


def margin_sentence(summary: dict[str, Any]) -> str:
    """What the Deltas mean for the reward model."""
    said = {
        "down": "The margin falls",
        "up": "The margin rises",
        "both": "The margin falls in some data sets and rises in others",
        "none": "The margin does not move",
        "unknown": "The margin is not known",
    }[direction([p["margin_delta"] for p in summary["pairs"]])]
    if said == "The margin falls" and moves(summary, "rejected") == "up":
        what = (
            "the intervention"
            if summary["intervention"].get("file")
            else "suppressing harm detectors"
        )
        said += f": {what} raises the scores of rejected texts"
        if moves(summary, "chosen") == "none":
            said += (
                ", so what the interpretation above, in the reference report's words, "
                "calls improvement is the reward model telling unsafe from safe texts less well"
            )
        elif moves(summary, "chosen") == "down":
            said += " and, here, lowers those of chosen ones"
        elif moves(summary, "chosen") == "up":
            said += " more than those of chosen ones"
    return f"{said}. This table measures the reward model on fixed texts, never the policy."
