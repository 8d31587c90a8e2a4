"""What the reference report lacks, a function a section: figures -> blocks, read by the text and
by the page alike.

To add one: write its function, name it in `SECTIONS`, and give its figures a key in
`reports.figures.figures`. A plot of the same id in `reports.plots.PLOTS` is drawn beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from reports.blocks import Block, Items, Prose, Table
from reports.calibration import calibration
from reports.numbers import MEASURES, arm_name, digits, duration, fixed, general, interval, plain
from reports.reference import direction, moves

NOT_AVAILABLE = [Prose("not available")]


class Section(NamedTuple):
    """A section of either report; `id` is its anchor on the page and its plots' name."""

    id: str
    title: str
    blocks: Callable[[dict[str, Any]], list[Block]]
    note: str = ""

    @property
    def heading(self) -> str:
        """As the text has it."""
        return self.title.upper() + (f" ({self.note})" if self.note else "")


def verdict(figures: dict[str, Any]) -> list[Block]:
    """The word, what each rung that was reached says, and the figures behind it."""
    v = figures["verdict"]
    said = [Prose(f"Verdict: {v['word']}"), *map(Prose, v["sentences"])]
    return [*said, *verdict_figures(figures)]


def verdict_figures(figures: dict[str, Any]) -> list[Block]:
    """What the word rests on, and the rule."""
    v = figures["verdict"]
    blocks: list[Block] = []
    rows = [
        c
        for c in v["changes"]
        if c["n_prompts"]
        and c["arm"] in ("penalty", "penalty - random")
        and c["measure"] != "n_tokens"
    ]
    if rows:
        blocks.append(
            Table(
                ["Change, in points", "prompts", "seeds", "change", "95 % interval", "detectable"],
                [
                    [
                        MEASURES[c["measure"]]
                        + (", vs. random" if c["arm"] == "penalty - random" else ""),
                        c["n_prompts"],
                        c["n_seeds"],
                        fixed(percentage(c["change"]), 1, sign=True),
                        interval(percentage(c["low"]), percentage(c["high"]), 1),
                        fixed(percentage(c["detectable"]), 1),
                    ]
                    for c in rows
                ],
                title=(
                    "The penalty arm against the no-penalty arm, over prompts and seeds."
                    " `penalised` and `monitors` are firing rates of those latents on the prompts"
                    " named; `detectable` is the minimum detectable effect (80 % power)."
                ),
            )
        )
        blocks.append(
            Items(
                [
                    "Smallest change of the penalised rate that counts:"
                    f" {fixed(percentage(v['delta']), 1)} points",
                    f"Mean response length, penalty / no penalty: {fixed(v['length_ratio'], 2)}",
                    "Base policy's log-probability per token, no penalty less penalty:"
                    f" {fixed(v['logprob_drop'], 2)} nats",
                ]
            )
        )
    blocks.append(
        Prose("The rule, fixed in the config before training; a rung ends where it says:")
    )
    return [*blocks, Items(figures["rule"])]


def percentage(share: float | None) -> float | None:
    return None if share is None else 100 * share


def failures(figures: dict[str, Any]) -> list[Block]:
    rows = figures["failures"]
    if not rows:
        return [Prose("none: every phase is done")]
    return [
        Items(
            [
                f"{unit_name(row)} ({row['status']}): {row['cause']}\nlog: {row['log'] or 'none'}"
                for row in rows
            ]
        )
    ]


def unit_name(row: dict[str, Any]) -> str:
    return str(row["phase"]) if row["unit"] == "all" else f"{row['phase']}/{row['unit']}"


def policy_evaluation(figures: dict[str, Any]) -> list[Block]:
    rows = figures["policies"]
    if not rows:
        return [Prose("not available: no policy was evaluated")]
    judged = any(r["harm"] is not None and math.isfinite(r["harm"]) for r in rows)
    columns = {
        "kl": "KL",
        "n_tokens": "tokens",
        "truncated": "cut",
        "unended": "unended",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
    } | ({"harm": "harm"} if judged else {})
    rates = ("reward", "penalised_fired", "monitors_fired", "refused", "over_refused")
    safe = ("penalised_fired_safe", "monitors_fired_safe")
    rated = [[r["policy"], r["n_unsafe"], r["n_safe"], *(rate(r[m]) for m in rates)] for r in rows]
    summaries = figures["evaluations"].values()
    judge = next((e["judge"] for e in summaries if e.get("judge")), None)
    return [
        Prose(
            "Prompts are held out; reward is SARM's without penalty; rates are shares of responses,"
            " refusals as the detector counts them."
        ),
        Table(
            ["Policy", "unsafe", "safe", "reward", "penalised", "monitors", "refused", "over-ref."],
            rated,
        ),
        Table(
            ["Policy", "penalised", "monitors"],
            [[r["policy"], *(rate(r[m]) for m in safe)] for r in rows],
            title="On safe prompts, firing rates of the same latents:",
        ),
        Table(
            ["Policy", *columns.values()],
            [
                [r["policy"], *(fixed(r[m], 1 if m == "n_tokens" else 3) for m in columns)]
                for r in rows
            ],
            title=(
                "`cut` hit the token limit; `unended` end at neither an end of turn nor a sentence"
                " end."
            ),
        ),
        Prose(
            f"Judge: {judge}, on unsafe prompts."
            if judge
            else "No independent judge was configured: SARM judged itself."
        ),
        Prose(f"KL: {next(iter(summaries))['kl']}."),
        Prose(detector_sentence(figures)),
    ]


def rate(share: float) -> str:
    """A share; n/a where nothing was measured, as of monitors where none qualifies."""
    return "n/a" if math.isnan(share) else fixed(share, 3)


def detector_sentence(figures: dict[str, Any]) -> str:
    """How often the refusal detector errs, and whether rates below are corrected for it."""
    records = [e.get("refusal_detector") for e in figures["evaluations"].values()]
    found = next(filter(None, records), None)
    if found is None:
        return "Refusal detector: its errors were not measured (evaluate.refusal_labels)."
    if any(record != found for record in records):
        return "Refusal detector: not the same one for all policies."
    return (
        f"Refusal detector: {found['name']}, sensitivity {fixed(found['sensitivity'], 3)} on"
        f" {found['refusals']} refusals, false positives {fixed(found['false_positives'], 3)} on"
        f" {found['answers']} answers of {found['data']}. Changes of refusal rates are corrected"
        " for these errors (Rogan-Gladen) where verdict.correct_refusals is set."
    )


def changes(figures: dict[str, Any]) -> list[Block]:
    rows = [c for c in figures["verdict"]["changes"] if c["n_prompts"]]
    if not rows:
        return list(NOT_AVAILABLE)
    over = (
        "prompts alone, as there is one seed: differences between trainings are left out"
        if rows[0]["n_seeds"] == 1
        else "prompts and seeds"
    )
    blocks: list[Block] = [
        Prose(
            f"Paired by prompt and seed; 95 % intervals over {over}. Only the verdict's comparison"
            " was fixed before training; all others are exploratory."
        ),
        Table(
            ["Measure", "arm", "prompts", "before", "after", "change", "95 % interval"],
            [
                [
                    MEASURES[c["measure"]],
                    arm_name(c["arm"]),
                    c["n_prompts"],
                    *(fixed(c[m], digits(c)) for m in ("before", "after")),
                    fixed(c["change"], digits(c), sign=True),
                    interval(c["low"], c["high"], digits(c)),
                ]
                for c in rows
            ],
        ),
    ]
    if any(c["arm"] == "penalty - random" for c in rows):
        blocks.append(
            Prose("In the row `vs. random`, before is the random arm and after the penalty arm.")
        )
    return blocks


def latents(figures: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for name, title in (
        ("latents", "Penalised latents"),
        ("random_latents", "Latents penalised in the random arm"),
        ("monitors", "Monitor latents (never penalised)"),
    ):
        rows = figures[name]
        if rows:
            blocks += [
                Table(
                    ["latent", "tau", "arm", "prompts", "N", "above tau", "below cutoff", "mean z"],
                    [
                        [
                            r["latent"],
                            plain(r["tau"]),
                            arm_name(r["arm"]),
                            r["kind"],
                            r["n"],
                            *(fixed(r[m], 3) for m in ("rate", "below_cutoff", "mean_z")),
                        ]
                        for r in rows
                    ],
                    title=(
                        f"{title}. `below cutoff` is the share of responses on which the latent"
                        " would have fired but ranks just below the TopK cutoff."
                    ),
                )
            ]
    if figures["latents"]:
        blocks.append(
            Table(
                ["latent", "arm", "off", "0-.5t", ".5-.9t", ".9-1t", "1-1.5t", "more"],
                [
                    [
                        r["latent"],
                        arm_name(r["arm"]),
                        *(fixed(share, 2) for share in r["histogram"]),
                    ]
                    for r in figures["latents"]
                    if r["kind"] == "unsafe"
                ],
                title="Values z of the penalised latents on unsafe prompts, t being tau:",
            )
        )
    return blocks or list(NOT_AVAILABLE)


def training(figures: dict[str, Any]) -> list[Block]:
    rows = figures["training"]
    if not rows:
        return list(NOT_AVAILABLE)
    metrics = {"reward": 3, "penalty": 3, "kl": 3, "loss": 3, "tokens_per_s": 0}
    cells = [
        [
            r["policy"],
            r["steps"],
            duration(r["training_s"]),
            *(fixed(r[m], d) for m, d in metrics.items()),
        ]
        for r in rows
    ]
    return [
        Prose(
            "Means over the last tenth of the steps; reward is SARM's without penalty. In the"
            " training progression, reward is the compound reward, reward less penalty, and loss"
            f" the total loss, of {figures['shown_policy']}."
        ),
        Table(["Policy", "steps", "time", "reward", "penalty", "KL", "loss", "tokens/s"], cells),
    ]


def sweep(figures: dict[str, Any]) -> list[Block]:
    """The grid of penalties: which policies no other one beats, and the thresholds that the
    activations suggest.
    """
    found, suggested = figures.get("sweep"), (figures["features"] or {}).get("tau_suggestions", [])
    blocks: list[Block] = []
    if found is None:
        blocks.append(
            Prose("The config names no sweep (sweep.tau or sweep.tau_quantile, and sweep.alpha).")
        )
    else:
        seeds = "one seed" if found["n_seeds"] == 1 else f"{found['n_seeds']} seeds"
        blocks.append(
            Prose(
                "Exploratory: the verdict is about another comparison, and no place on the front is"
                " evidence of control. Each tau with each alpha, and the arms. `front`: no other"
                " policy has as low a penalised rate, as little KL and as much reward, and less or"
                " more of one."
                " Penalised is the share of unsafe prompts above the penalty arm's own thresholds,"
                f" whatever a point's tau. With {seeds} a point, differences within the intervals"
                " are noise, and so may be a place on the front."
            )
        )
        rows = [
            [
                r["policy"],
                *(
                    (
                        "n/a"
                        if r[m] is None
                        else f"q{plain(r[m])}"
                        if m == "tau" and r["is_quantile"]
                        else plain(r[m])
                    )
                    for m in ("tau", "alpha")
                ),
                r["n_unsafe"],
                fixed(r["penalised_fired"], 3),
                interval(r["penalised_fired_low"], r["penalised_fired_high"], 3),
                fixed(r["kl"], 3),
                fixed(r["reward"], 3),
                "yes" if r["front"] else "no",
            ]
            for r in found["points"]
        ]
        blocks.append(
            Table(
                [
                    "Policy",
                    "tau",
                    "alpha",
                    "unsafe",
                    "penalised",
                    "95 % interval",
                    "KL",
                    "reward",
                    "front",
                ],
                rows,
            )
        )
        if found["missing"]:
            blocks.append(Prose(f"Not evaluated: {', '.join(found['missing'])}."))
    if suggested:
        blocks.append(
            Table(
                ["latent", "quantile", "tau", "rejected", "chosen"],
                [
                    [
                        s["latent"],
                        plain(s["quantile"]),
                        plain(s["tau"]),
                        fixed(s["rate_rejected"], 3),
                        fixed(s["rate_chosen"], 3),
                    ]
                    for s in suggested
                ],
                title=(
                    "Thresholds that the activations suggest: quantiles over discovery's rejected"
                    " texts, and the share of texts above them."
                ),
            )
        )
    return blocks


def features(figures: dict[str, Any]) -> list[Block]:
    found = figures["features"]
    if found is None:
        return list(NOT_AVAILABLE)
    n = found["n_prompts"]
    blocks: list[Block] = [
        Prose(
            f"Effect: contribution to the margin on {n.get('validation', 0)} validation prompts."
            f" Selected on {n.get('discovery', 0)} discovery prompts: {found['n_tested']} latents"
            f" tested, {found['n_discoveries']} discoveries."
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
            )
        )
    return blocks + [Prose(f"Warning: {warning}") for warning in found.get("warnings", [])]


def trust(figures: dict[str, Any]) -> list[Block]:
    """Nulls, replication, baselines, sensitivity and the direction probe of the selection; what
    does not replicate is named.
    """
    found = figures["features"]
    if found is None or not found["validity"]:
        return list(NOT_AVAILABLE)
    v = found["validity"]
    return [
        Prose(conjunction_sentence(found["conjunction"])),
        *nulls(v),
        *replication(found),
        *dense_baselines(v["baselines"]),
        *([Prose(v["words_alone"])] if v["words_alone"] else []),
        *sensitivity(v["sensitivity"]),
        *directions(found),
    ]


def conjunction_sentence(sources: list[str]) -> str:
    if not sources:
        return (
            "Discovery read one data set, fewer than two sources for a conjunction: what tells its"
            " two sides apart may be its style."
        )
    return (
        f"Discovered means: the same effect in {sources[0]} and in {sources[1]} (the larger of the"
        " one-sided p, then Benjamini-Hochberg). Confirmed on validation, which neither has seen."
    )


def nulls(v: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    if v["matched_null"]:
        rows = [
            [
                n["role"],
                n["latents"],
                *(general(n[m]) for m in ("effect", "null", "null_low", "null_high", "p")),
            ]
            for n in v["matched_null"]
        ]
        title = (
            "Mean effect on the test part of the confirmed latents, and of others put through the"
            " same selection but for its significance, matched on activity and |weight|:"
        )
        blocks.append(
            Table(["role", "latents", "effect", "random", "low", "high", "p"], rows, title=title)
        )
    else:
        blocks.append(
            Prose(
                "No confirmed latents to hold against matched ones on a test part: none was"
                " confirmed, too few like them passed the rest of the selection, or the test part"
                " has fewer than 10 prompts."
            )
        )
    if v["shuffled_labels"]:
        each = ", ".join(
            f"{row['discoveries']} ({row['confirmed']})" for row in v["shuffled_labels"]
        )
        blocks.append(
            Prose(
                f"With labels shuffled within prompts, where every discovery is false: {each}"
                " discoveries (of them confirmed)."
            )
        )
    return blocks


def replication(found: dict[str, Any]) -> list[Block]:
    rows = found["validity"]["replication"]
    blocks: list[Block] = []
    if not rows:
        blocks.append(
            Prose("Replication across data sets: none tried, as only one source has enough pairs.")
        )
    for r in rows:
        told = f"Found on {r['from']}, tried on {r['prompts']} prompts of {r['to']}: "
        told += (
            f"{r['replicated']} of {r['discovered']} latents replicate (same sign, Holm p < 0.05)"
        )
        missing = r["not_replicated"]
        if missing:
            more = f" and {len(missing) - 12} more" if len(missing) > 12 else ""
            told += f"; not replicated are {', '.join(map(str, missing[:12]))}{more}"
            told += (
                f", of which {r['opposite_and_significant']} significantly the other way"
                if r["opposite_and_significant"]
                else ""
            )
        told += (
            f". Rank correlation of effects {fixed(r['rank_correlation'], 2, sign=True)} over"
            f" {r['latents_in_both']} latents tested in both"
        )
        blocks.append(
            Prose(
                f"{told}, {fixed(r['rank_correlation_discovered'], 2, sign=True)} over those found."
            )
        )
    for r in found["validity"]["confirmed_replication"]:
        told = (
            f"{r['replicated']} of the {r['confirmed']} confirmed latents replicate on"
            f" {r['prompts']} prompts of {r['source']}, which neither discovery nor validation read"
            f" (95 % interval {r['low']:.0%} to {r['high']:.0%}); were effects as large there as on"
            f" validation, {r['expected']:.1f} would be expected"
        )
        missing = r["not_replicated"][:12]
        more = f"; these do not: {', '.join(map(str, missing))}" if missing else ""
        blocks.append(Prose(f"{told}{more}."))
    listed = [
        f
        for role in ("promoting", "harming", "misleading")
        for f in found[role]
        if f.get("replication")
    ]
    for source in dict.fromkeys(r["source"] for f in listed for r in f["replication"]):
        states = {
            f["latent"]: next(r["replicates"] for r in f["replication"] if r["source"] == source)
            for f in listed
        }
        failing = [str(latent) for latent, replicates in states.items() if not replicates]
        told = (
            f"Of the {len(states)} listed latents, {len(states) - len(failing)} replicate on"
            f" {source}, which neither discovery nor validation read"
        )
        blocks.append(Prose(f"{told}{'; these do not: ' + ', '.join(failing) if failing else ''}."))
    return blocks


def dense_baselines(rows: list[dict[str, Any]]) -> list[Block]:
    title = (
        "Pair accuracy beside the SAE; the two probes on dense states and the words' TF-IDF are"
        " fitted to discovery's pairs:"
    )
    cells = [
        [
            f"{r['on']}: {r['score']}",
            fixed(r["accuracy"], 3),
            fixed(r["standard_error"], 3),
            r["pairs"],
        ]
        for r in rows
    ]
    return (
        [Table(["on: score", "accuracy", "std. error", "pairs"], cells, title=title)]
        if rows
        else []
    )


def sensitivity(rows: list[dict[str, Any]]) -> list[Block]:
    if not rows:
        return []
    cells = []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        known = {
            key: [row[key] for row in mine if row[key] is not None]
            for key in ("discoveries", "overlap", "again", "rank_correlation")
        }
        mean = {key: sum(values) / len(values) if values else None for key, values in known.items()}
        cells.append(
            [
                what,
                len(mine),
                fixed(mean["discoveries"], 1),
                *(fixed(mean[key], 2) for key in ("overlap", "again", "rank_correlation")),
            ]
        )
    title = (
        "The selection made again with another seed, split or share of discovery's prompts, means;"
        " `again` is the share of the confirmed latents found anew:"
    )
    return [
        Table(
            ["what", "times", "discoveries", "overlap", "again", "rank corr."], cells, title=title
        )
    ]


def directions(found: dict[str, Any]) -> list[Block]:
    rows = found.get("directions")
    if not rows:
        return []
    cells = [
        [
            f"{r['c']:+g}",
            fixed(r["swapped"], 1),
            general(r["largest_effect"]),
            fixed(r["rank_correlation_with_ablation"], 2),
            fixed(percentage(r["sign_changed_by_reselection"]), 1),
        ]
        for r in rows
    ]
    first = rows[0]
    exact = (
        f"{sum(r['mismatches'] for r in rows)} of {sum(r['checked'] for r in rows)} results differ"
        " from a recomputation"
    )
    title = (
        f"Every latent's decoder direction added to the {first['texts']} {first['part']} texts'"
        " states, c standard deviations; all that follows recomputed:"
    )
    header = [
        "c",
        "latents swapped",
        "largest effect",
        "rank corr. with ablating",
        "sign flips after TopK re-selection (%)",
    ]
    return [Table(header, cells, title=title), Prose(f"Of those checked, {exact}.")]


def rankings(figures: dict[str, Any]) -> list[Block]:
    """The effect's choice of latents beside what weight, activity and upstream's s would have
    chosen.
    """
    rows = (figures["features"] or {}).get("rankings")
    if not rows:
        return list(NOT_AVAILABLE)
    names = {
        "effect": "effect on the margin",
        "weight": "weight",
        "difference": "activity difference",
        "upstream_s": "upstream's s",
    }
    return [
        Prose(
            "The first latents by each ranking, made on discovery: how many the effect ranks first"
            " too, are of that role, and are confirmed on validation; `effect` is their mean effect"
            " on the validation margin. Upstream's s is (c - j) / (c + j + C); it looks at no"
            " weight."
        ),
        Table(
            ["Ranking", "role", "latents", "shared", "of role", "confirmed", "effect"],
            [
                [
                    names[r["ranking"]],
                    r["role"],
                    len(r["latents"]),
                    r["shared_with_effect"],
                    r["of_role"],
                    r["confirmed"],
                    general(r["mean_effect_validation"]),
                ]
                for r in rows
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
        mean = fixed(found["mean_score"], 2)
        blocks.append(
            Prose(
                f"Labels by {found['labels']['model']}: mean balanced accuracy {mean} on held-out"
                f" texts, over {found['n_scored']} latents."
            )
        )
    return blocks


def steering(figures: dict[str, Any]) -> list[Block]:
    summary = figures["steering"]
    if summary is None or not summary["texts"]:
        return list(NOT_AVAILABLE)
    what = summary["intervention"]
    names = ", ".join(str(latent) for latent in what["latents"]) or "none"
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
        ),
        Prose(margin_sentence(summary)),
    ]


def steered(figures: dict[str, Any]) -> list[Block]:
    """The check outside the reward head: the policy itself, pushed along decoder directions."""
    found = figures["steered"]
    if found is None:
        return [Prose("Not run; set steer.policy to enable.")]
    rows = found["rows"]
    beyond = [r for r in rows if r["beyond_random"]]
    n_latents, n_random = (
        sum(r["kind"] == "latent" for r in rows),
        len({r["name"] for r in rows if r["kind"] == "random"}),
    )
    changes = ("reward", "z", "refused", "over_refused", "n_tokens")
    return [
        Prose(
            "Approximate: the decoder directions are the SARM's, pushed along in the base policy"
            f" after layer {found['source_layer']}, by c standard deviations of the state, at every"
            f" position. Changes against no push on {found['n_prompts']} prompts, the same noise in"
            " each; random directions have the same length. `z` is the latent's own value in what"
            " the policy then says."
        ),
        Table(
            ["Direction and c", "reward", "95 % interval", "z", "refused", "over-ref.", "tokens"],
            [
                [
                    f"{r['role']} {r['name']} at {plain(r['c'])}",
                    fixed(r["reward"], 3, sign=True),
                    interval(r["reward_low"], r["reward_high"], 3),
                    *(fixed(r.get(m), 1 if m == "n_tokens" else 3, sign=True) for m in changes[1:]),
                ]
                for r in rows
            ],
        ),
        Prose(
            f"{len(beyond)} of {n_latents} pushes along a latent change the reward more than every"
            " random direction at that c"
            + (
                ": " + ", ".join(f"{r['name']} at {plain(r['c'])}" for r in beyond)
                if beyond
                else ""
            )
            + f"; chance alone would let about {fixed(n_latents / (n_random + 1), 1)} do so."
        ),
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


def phases(figures: dict[str, Any]) -> list[Block]:
    return [
        Table(
            ["Unit", "state", "took", "began", "device", "host"],
            [
                [
                    unit_name(p),
                    p["status"],
                    duration(p["seconds"]),
                    (p["started"] or "n/a")[:16].replace("T", " "),
                    *(str(p[m] if p[m] is not None else "n/a")[:20] for m in ("device", "host")),
                ]
                for p in figures["phases"]
            ],
        )
    ]


def provenance(figures: dict[str, Any]) -> list[Block]:
    p = figures["provenance"]
    blocks: list[Block] = [
        Items(
            [
                f"Run: {p['folder']}",
                f"Config SHA-256: {p['config_sha256']}",
                f"Seed: {p['seed']}; PPO seeds: {', '.join(map(str, p['ppo_seeds']))}",
                f"Commit: {', '.join(p['git_commits']) or 'unknown'}",
                f"Image SHA-256: {', '.join(p['images']) or 'none (not in a container)'}",
            ]
        )
    ]
    if p["units"]:
        blocks.append(
            Table(
                ["Unit", "manifest", "commit", "image", "job", "ended"],
                [
                    [
                        unit_name(u),
                        u["manifest_sha256"][:8],
                        (u["git_commit"] or "n/a")[:8],
                        (u["image_sha256"] or "n/a")[:8],
                        u["job_id"] or "n/a",
                        (u["ended"] or "n/a")[:16].replace("T", " "),
                    ]
                    for u in p["units"]
                ],
                title="The first eight digits of each manifest's SHA-256, commit and image:",
            )
        )
    return blocks


SECTIONS = (
    Section("verdict", "Verdict", verdict),
    Section("calibration", "Calibration", calibration, "the base policy's own responses"),
    Section("failures", "Failed and missing parts", failures),
    Section(
        "evaluation", "Policy evaluation", policy_evaluation, "own generations on held-out prompts"
    ),
    Section("changes", "Changes against the no-penalty arm", changes),
    Section("latents", "Penalised and monitor latents in the generations", latents),
    Section("training", "Training, all arms", training),
    Section("sweep", "Penalty sweep", sweep),
    Section("features", "Features: effects on held-out prompts", features),
    Section("trust", "How far the selection can be trusted", trust),
    Section("rankings", "Features: rankings compared", rankings),
    Section("cards", "Latent cards", cards),
    Section("steering", "Steering: intervals, margins and ranking", steering),
    Section("steered", "Steering the policy", steered, "approximate"),
    Section("phases", "The run's parts", phases),
    Section("provenance", "Provenance", provenance),
)
