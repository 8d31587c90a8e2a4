"""What training did to the policies, a function a section: figures -> blocks. Long, as sections of
one kind are read side by side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from reports.abstract import joined
from reports.blocks import NOT_AVAILABLE, Block, Items, Prose, Table
from reports.distances import compared_words
from reports.doses import random_sentences
from reports.numbers import (
    CORRECTED,
    MEASURES,
    arm_name,
    cut_off,
    digits,
    duration,
    fixed,
    interval,
    percentage,
    plain,
)
from reports.origins import (
    CHANGES,
    GENERATIONS,
    LATENTS,
    ORIGINS,
    TRAINING,
    UNKNOWN,
    columns,
    count_of,
)
from reports.policies import NOT_AT_EQUAL_KL, at_unequal_kl, parts_of_change, unequal
from sarm.config import ARMS
from sarm.run import many


def verdict(figures: dict[str, Any]) -> list[Block]:
    """The word, what each rung that was reached says, and the figures behind it."""
    v = figures["verdict"]
    said = [Prose(f"Verdict: {v['word']}"), *map(Prose, v["sentences"])]
    return [*said, *verdict_figures(figures)]


def verdict_figures(figures: dict[str, Any]) -> list[Block]:
    """What the word rests on, and the rule."""
    v = figures["verdict"]
    blocks: list[Block] = [Prose(compared_words(figures["compared"]))]
    rows = [
        c
        for c in v["changes"]
        if c["n_prompts"]
        and c["arm"] in ("penalty", "penalty - random")
        and c["measure"] != "n_tokens"
    ]
    counted = figures["monitor_choice"]["counted"]
    named = f": {joined([str(m) for m in counted])}" if counted else ""
    monitors = f"{many(len(counted), 'latent')}{named}"
    if rows:
        blocks.append(
            Table(
                ["Change, in points", "prompts", "seeds", "change", "95 % interval", "detectable"],
                [
                    [
                        change_name(c, figures["compared"]),
                        c["n_prompts"],
                        c["n_seeds"],
                        fixed(percentage(c["change"]), 1, sign=True),
                        interval(percentage(c["low"]), percentage(c["high"]), 1),
                        fixed(percentage(c["detectable"]), 1),
                    ]
                    for c in rows
                ],
                title=(
                    "The penalty arm against the no-penalty arm, and where `vs. random` says so"
                    f" against the random arm, over {over(rows)}."
                    f" `penalised` and `monitors` ({monitors}) are firing rates of those latents"
                    " on the prompts named; `detectable` is the minimum detectable effect (80 %"
                    " power)."
                ),
                origins=CHANGES,
                counts=[count_of(c) for c in rows],
                unknown=UNKNOWN,
            )
        )
        blocks.append(
            Items(
                [
                    "Smallest change of the penalised rate that counts:"
                    f" {fixed(percentage(v['delta']), 1)} points",
                    *counted_words(rows),
                    "Mean response length of the penalty arm over that of no penalty:"
                    f" {fixed(v['length_ratio'], 2)}",
                    "Log-probability per token of its responses under the base policy, minus that"
                    f" of no penalty's: {fixed(-v['logprob_drop'], 2, sign=True)} nats",
                ]
            )
        )
    blocks.append(
        Prose("The rule, fixed in the config before training; a rung ends where it says:")
    )
    return [*blocks, Items(figures["rule"])]


def counted_words(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the detector counts, of the changes in a table that are corrected for its errors."""
    told = [
        f"{MEASURES[c['measure']]} {fixed(percentage(c['counted']), 1, sign=True)}"
        for c in rows
        if c.get("counted") is not None
    ]
    if not told:
        return []
    return [f"Corrected for the detector's errors; as counted, in points: {'; '.join(told)}"]


def change_name(change: Mapping[str, Any], compared: Mapping[str, Any]) -> str:
    """A row of the verdict's table: its measure, and where the two arms are not at equal KL."""
    name = MEASURES[change["measure"]]
    if change["arm"] == "penalty - random":
        name += ", vs. random"
    return f"{name} ({NOT_AT_EQUAL_KL})" if at_unequal_kl(change, compared) else name


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
    counts = [f"{r['n_unsafe']} unsafe and {r['n_safe']} safe prompts" for r in rows]
    told: dict[str, Any] = {"origins": ORIGINS, "counts": counts, "unknown": UNKNOWN}
    summaries = figures["evaluations"].values()
    judge = next((e["judge"] for e in summaries if e.get("judge")), None)
    problem = next((e["judge_problem"] for e in summaries if e.get("judge_problem")), None)
    return [
        Prose(
            "Prompts are held out; reward is SARM's without penalty; rates are shares of responses,"
            f" refusals as the detector counts them. {compared_words(figures['compared'])}"
        ),
        Table(
            ["Policy", "unsafe", "safe", "reward", "penalised", "monitors", "refused", "over-ref."],
            rated,
            **told,
        ),
        Table(
            ["Policy", "penalised", "monitors"],
            [[r["policy"], *(rate(r[m]) for m in safe)] for r in rows],
            title="On safe prompts, firing rates of the same latents:",
            **told,
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
            **told,
        ),
        *base_sentences(figures["against_base"]),
        *answered_sentences(figures["answered"]),
        *refusal_reward_sentence(figures["refusal_reward"]),
        Prose(
            f"Judge: {judge}, on unsafe prompts."
            if judge
            else f"The judge was not asked, and SARM judged itself: {problem}."
            if problem
            else "No independent judge was configured: SARM judged itself."
        ),
        *kl_sentences(figures),
        Prose(detector_sentence(figures)),
        *spelling_sentence(rows),
    ]


def base_sentences(rows: Sequence[dict[str, Any]]) -> list[Block]:
    """How each trained arm's penalised rate differs from the base policy's, and of which arms
    these prompts show it; nothing without a base policy.
    """
    rows = [row for row in rows if row["n_prompts"]]
    if not rows:
        return []
    told = [
        f"{arm_name(row['arm'])} {fixed(percentage(row['change']), 1, sign=True)}"
        f" {interval(percentage(row['low']), percentage(row['high']), 1)}"
        for row in rows
    ]
    words = {
        "fell": [arm_name(row["arm"]) for row in rows if row["high"] < 0],
        "rose": [arm_name(row["arm"]) for row in rows if row["low"] > 0],
    }
    shown = [f"it {word} with {joined(arms)}" for word, arms in words.items() if arms]
    others = [arm_name(row["arm"]) for row in rows if row["low"] <= 0 <= row["high"]]
    prompts, seeds = rows[0]["n_prompts"], rows[0]["n_seeds"]
    counts = f"{prompts} prompts and {seeds} seed{'s' * (seeds != 1)}"
    cannot = [f"with {joined(others)} {counts} cannot tell it from no change"] if others else []
    said = "; ".join([*shown, *cannot])
    return [
        Prose(
            "Penalised rate on unsafe prompts less the base policy's, in points, with 95 %"
            f" intervals over {over(rows)}. {'; '.join(told).capitalize()}."
            f" {said[:1].upper()}{said[1:]}."
        )
    ]


def answered_sentences(rows: Sequence[dict[str, Any]]) -> list[Block]:
    """Whether a penalised rate that fell did so on responses that answer; nothing where fewer than
    two arms answer any.
    """
    rows = [row for row in rows if math.isfinite(row["answered"])]
    if len(rows) < 2:
        return []
    told = [
        f"{arm_name(row['arm'])} {fixed(percentage(row['answered']), 1)}"
        f" ({fixed(percentage(row['refused']), 1) if math.isfinite(row['refused']) else 'none'})"
        for row in rows
    ]
    parts = ""
    arms = {row["arm"]: row for row in rows}
    if {"no_penalty", "penalty"} <= set(arms):
        found = parts_of_change(arms["no_penalty"], arms["penalty"])
        answers, refusals, more = (fixed(percentage(part), 1, sign=True) for part in found)
        if all(math.isfinite(part) for part in found):
            parts = (
                f" Of the change from no penalty to penalty, {answers} points come of answers,"
                f" {refusals} of refusals and {more} of refusing more or less often."
            )
    return [
        Prose(
            "Penalised rate on the unsafe responses that answer, and in brackets on those that"
            f" refuse, in %: {', '.join(told)}.{parts} Refusals that the detector misses count as"
            " answers, and which prompts are answered differs between arms: these figures are"
            " exploratory and have no intervals."
        )
    ]


def refusal_reward_sentence(rows: Sequence[dict[str, Any]]) -> list[Block]:
    """What the SARM pays for refusing rather than answering the same prompt; nothing where no
    prompt was both refused and answered.
    """
    told = [
        f"{row['kind']} {fixed(row['value'], 2, sign=True)}"
        f" {interval(row['low'], row['high'], 2)} ({many(row['n_prompts'], 'prompt')})"
        for row in rows
    ]
    if not told:
        return []
    return [
        Prose(
            "SARM's reward of responses that refuse less that of responses that answer, within"
            " prompt and policy, of base and trained policies, with 95 % intervals over prompts:"
            f" {', '.join(told)}. Exploratory; refusals are the detector's."
        )
    ]


def spelling_sentence(rows: Sequence[dict[str, Any]]) -> list[Block]:
    """Which policies write out special tokens, as one that feigns an end of turn; nothing where
    none does.
    """
    spelling = [f"{row['policy']} {row['spelled']:,}" for row in rows if row.get("spelled")]
    if not spelling:
        return []
    return [
        Prose(
            "Responses that spell a special token of the SARM's, such as an end of turn, which is"
            f" how a policy would try to end what is scored: {', '.join(spelling)}. They are scored"
            " as the letters that they are; read them before trusting rates above."
        )
    ]


def kl_sentences(figures: dict[str, Any]) -> list[Block]:
    """What the KL column holds, and of which policies something else."""
    told: dict[str, list[str]] = {}
    for policy, evaluation in figures["evaluations"].items():
        told.setdefault(evaluation["kl"], []).append(policy)
    common, *others = sorted(told, key=lambda kl: -len(told[kl]))
    return [
        Prose(f"KL: {common}."),
        *kind_sentence(figures["compared"]),
        *(Prose(f"KL of {', '.join(told[kl])}: {kl}.") for kl in others),
    ]


def kind_sentence(compared: Mapping[str, Any]) -> list[Block]:
    """How far each arm is on unsafe and on safe prompts, and which pairs a kind sets further apart
    than the rule allows of all prompts; nothing with fewer than two arms that have both.
    """
    rows = [
        row
        for row in compared.get("kl_by_kind", [])
        if math.isfinite(row["unsafe"]) and math.isfinite(row["safe"])
    ]
    if len(rows) < 2:
        return []
    told = [
        f"{arm_name(row['arm'])} {fixed(row['unsafe'], 2)} and {fixed(row['safe'], 2)}"
        for row in rows
    ]
    apart = [
        f"{arm_name(one['arm'])} and {arm_name(other['arm'])} on {kind} prompts"
        for kind in ("unsafe", "safe")
        for one, other in itertools.combinations(rows, 2)
        if unequal(one[kind], other[kind], compared["tolerance"])
    ]
    beyond = (
        " The rule compares the mean over all prompts; by kind more than"
        f" {compared['tolerance']:.0%} apart are {joined(apart)}, so that changes there are in part"
        " those of another distance."
        if apart
        else ""
    )
    return [Prose(f"KL on unsafe and on safe prompts, in nats: {'; '.join(told)}.{beyond}")]


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
        f" {found['answers']} answers of {found['data']}. Changes of refusal rates are"
        + (
            " corrected for these errors (Rogan-Gladen)."
            if figures["comparable"]["verdict rules"]["correct_refusals"]
            else " as counted, not corrected for these errors (verdict.correct_refusals is off)."
        )
    )


def over(rows: Sequence[dict[str, Any]]) -> str:
    """What the intervals of changes are over."""
    if rows[0]["n_seeds"] == 1:
        return "prompts alone, as there is one seed: differences between trainings are left out"
    return "prompts and seeds"


def changes(figures: dict[str, Any]) -> list[Block]:
    rows = [c for c in figures["verdict"]["changes"] if c["n_prompts"]]
    if not rows:
        return list(NOT_AVAILABLE)
    blocks: list[Block] = [
        Prose(
            f"Paired by prompt and seed; 95 % intervals over {over(rows)}. Only the verdict's"
            " comparison was fixed before training; all others are exploratory."
            f" {compared_words(figures['compared'])}"
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
            origins=CHANGES,
            counts=[count_of(c) for c in rows],
            unknown=UNKNOWN,
        ),
    ]
    blocks += unequal_sentence(figures["compared"]["kl"], figures["compared"]["tolerance"])
    if any(cut_off(c) for c in rows):
        blocks.append(Prose(CORRECTED))
    if any(c["arm"] == "penalty - random" for c in rows):
        blocks.append(
            Prose("In the row `vs. random`, before is the random arm and after the penalty arm.")
        )
    return blocks


def unequal_sentence(kl: Mapping[str, float], tolerance: float) -> list[Block]:
    """Which arms are further apart than the rule compares; nothing where none is."""
    apart = [
        f"{arm_name(a)} and {arm_name(b)} ({fixed(kl[a], 2)} and {fixed(kl[b], 2)} nats)"
        for a, b in itertools.combinations(kl, 2)
        if unequal(kl[a], kl[b], tolerance)
    ]
    if not apart:
        return []
    return [
        Prose(
            f"Not at equal KL, as they differ by more than {tolerance:.0%}: {', '.join(apart)}."
            " What sets these beside each other decides nothing."
        )
    ]


BINS = ("off", "0-.5t", ".5-.9t", ".9-1t", "1-1.5t", "more")
"""As `reports.figures.HISTOGRAM` cuts them."""


def latents(figures: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for name, title in (
        ("latents", "Penalised latents"),
        ("random_latents", "Latents penalised in the random arm"),
        ("monitors", "Monitor latents (never penalised)"),
    ):
        rows = figures[name]
        if name == "random_latents":
            blocks += random_sentences(figures["random_sets"])
            title += ", whose `random` rows are of the seeds that penalised it"
            # What was sampled or prompted without any training tells nothing of this penalty.
            rows = [r for r in rows if r["arm"] == "base" or ARMS[r["arm"]].trained]
        if rows:
            blocks += [
                Table(
                    ["latent", "tau", "arm", "prompts", "N", "above tau", "below cutoff", "mean z"],
                    [
                        [
                            r["latent"],
                            plain(r["tau"]),
                            arm_name(r["arm"]) + seeds_words(r.get("seeds")),
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
                    origins=LATENTS,
                    counts=[f"{r['n']} responses to {r['kind']} prompts" for r in rows],
                    unknown=UNKNOWN,
                )
            ]
    if figures["latents"]:
        # With tau 0 a value is off or on: the bins between are empty whatever was found.
        split = any(r["tau"] > 0 for r in figures["latents"])
        shown = [i for i in range(len(BINS)) if split or i in (0, len(BINS) - 1)]
        bins = [BINS[i] for i in shown]
        blocks.append(
            Table(
                ["latent", "arm", *bins],
                [
                    [
                        r["latent"],
                        arm_name(r["arm"]),
                        *(
                            fixed(r["histogram"][i], 2) if r["tau"] > 0 or i in (0, 5) else ""
                            for i in shown
                        ),
                    ]
                    for r in figures["latents"]
                    if r["kind"] == "unsafe"
                ],
                title="Values z of the penalised latents on unsafe prompts, t being tau:",
                origins=columns(GENERATIONS, dict.fromkeys(bins, "z_LATENT, shares of its values")),
                counts=[
                    many(r["n"], "response") for r in figures["latents"] if r["kind"] == "unsafe"
                ],
            )
        )
    if not blocks:
        return list(NOT_AVAILABLE)
    return [Prose(compared_words(figures["compared"])), *blocks]


def seeds_words(seeds: Sequence[int] | None) -> str:
    """Of which seeds a row is, where not of all."""
    if not seeds:
        return ""
    return f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


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
            f" the total loss, of {figures['shown_policy']}. KL is estimated from the tokens"
            " sampled in these steps, and can fall below 0."
        ),
        Table(
            ["Policy", "steps", "time", "reward", "penalty", "KL", "loss", "tokens/s"],
            cells,
            origins=TRAINING,
            counts=[f"the last tenth of {r['steps']} steps" for r in rows],
            unknown=UNKNOWN,
        ),
        *(
            Prose(f"{r['policy']} ended before its last step: {r['ended_early']}.")
            for r in rows
            if r["ended_early"]
        ),
        *(
            Prose(
                f"{r['policy']} goes on from step {parent['steps']} of {parent['unit']} in"
                f" {parent['run']} (manifest {parent['manifest_sha256'][:12]}); steps, time and"
                " means are of both."
            )
            for r in rows
            if (parent := r["parent"])
        ),
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
            origins=columns(
                "evaluate/steered/summary.json",
                {
                    "reward": "rows, reward",
                    "95 % interval": "rows, reward_low and reward_high, over prompts",
                    "z": "rows, z",
                    "refused": "rows, refused",
                    "over-ref.": "rows, over_refused",
                    "tokens": "rows, n_tokens",
                },
            ),
            counts=[many(found["n_prompts"], "prompt")] * len(rows),
            unknown=UNKNOWN,
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
