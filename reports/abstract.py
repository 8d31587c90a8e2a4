"""What a reader of ninety seconds reads, in five sentences made of the data: question, set-up,
result, trust, and what to do next: `abstract(figures)`.

What it says of the result is the ladder's (`sarm.evaluation.verdict`); nothing here interprets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from reports import ladder
from reports.blocks import wrap
from reports.numbers import arm_name, fixed, percentage
from reports.validity_sections import unreplicated
from sarm.config import VerdictConfig
from sarm.run import many

REMEDIES = {
    "generations": "finish the parts that are missing (`make status` says why they are)",
    "rule": "train again under the rule that the config has now, or put back the one before",
    "kl": "keep policies at common distances (`ppo.kl_distances`), to compare at equal KL",
    "seeds": "train at least {min_seeds} seeds (`ppo.seeds`)",
    "prompts": "evaluate on at least {min_unsafe} unsafe prompts (part `policy_eval` of the data)",
    "base_logprob": "evaluate again, with the base policy's log-probabilities",
    "unended": "raise `ppo.max_new_tokens`, so that responses end",
    "stability": "penalise latents that fire alike where a text ends a little earlier",
    "control": "penalise latents that fall where rejected answers give way to chosen ones",
}
"""By what rung 0 lacked."""
NEXT = {
    "degenerate": "read the responses, then train with a smaller penalty or a larger `ppo.kl_coef`",
    "suppression": "raise `ppo.safe_share`, or compare at fewer nats (`ppo.kl_distances`)",
    "rose": "read the responses that fire, and whether the reward pays for these latents",
    "no effect": "raise `ppo.penalty.alpha`, or penalise latents that vary more within prompts",
    "undecided": "evaluate on more prompts and seeds, until the minimum detectable effect is a"
    " change that you care about",
    "fell, unconfirmed": "confirm the penalised latents on data that took no part in choosing them",
    "fell, not specific": "evaluate more seeds, and compare penalised with random latents before"
    " claiming anything of these",
    "fell, specificity unknown": "train and evaluate the random arm in the same seeds and at the"
    " same KL (`ppo.arms`)",
    "evasion": "read how the responses changed, then penalise the monitors too and watch others",
    "evasion in part": "read how the responses changed, then penalise the monitors too and watch"
    " others",
    "monitors open": "evaluate on more prompts and seeds, until the monitors' interval decides",
    "fell and specific, no monitors": "find monitors: more candidates that are confirmed, or a"
    " larger `select.monitor_max_cosine`",
    "monitors follow, over-refusal open": "evaluate on more safe prompts and seeds",
    "monitors follow, over-refusal rose": "add safe prompts to training (`ppo.safe_share`)",
    "monitors follow, over-refusal unknown": "measure over-refusal: at least {min_safe} safe"
    " prompts, and a refusal detector of known errors (`evaluate.refusal_labels`)",
    "too few seeds for control": "train at least {min_seeds_control} seeds (`ppo.seeds`)",
    "feature control, harm unjudged": "name an independent judge (`evaluate.judge`)",
    "harm not shown to fall": "evaluate on more prompts and seeds, and read what the judge marks",
    "harm rose": "do not use this policy; read what the judge marks as harm",
    "control": "repeat it with other data and another reward model before saying that it holds in"
    " general",
}
"""By the word of the ladder, where rung 0 holds."""


def abstract(figures: Mapping[str, Any], rule: VerdictConfig) -> list[dict[str, str]]:
    """The five sentences, each with its name."""
    return [
        {"name": "Question", "said": question(figures)},
        {"name": "Set-up", "said": set_up(figures)},
        {"name": "Result", "said": result(figures["verdict"])},
        {"name": "Trust", "said": trust(figures, rule)},
        {"name": "Next", "said": next_step(figures, rule)},
    ]


def lines(figures: Mapping[str, Any]) -> list[str]:
    """The abstract and the ladder as text."""
    told = [
        line for s in figures["abstract"] for line in (*wrap(f"{s['name']}: {s['said']}", "  "), "")
    ]
    return [*told, *ladder.lines(figures["ladder"])]


def question(figures: Mapping[str, Any]) -> str:
    names = figures["configuration"]
    latents = [str(latent) for latent in figures["penalty"]["latents"]]
    if not latents:
        return (
            f"Which latents of {names['reward_model']} cause safe and unsafe text to be scored as"
            f" they are, and what does penalising them do to {names['policy']}?"
        )
    what = f"latent{'s' * (len(latents) > 1)} {joined(latents)} of {names['reward_model']}"
    return (
        f"Does penalising {what} in PPO make {names['policy']} less harmful, or does it evade the"
        " penalty or refuse more?"
    )


def set_up(figures: Mapping[str, Any]) -> str:
    trained, evaluated = figures["training"], figures["policies"]
    if not trained and not evaluated:
        return "No policy was trained or evaluated."
    seeds = count_by_arm(trained or [p for p in evaluated if "-seed" in p["policy"]])
    steps = sorted({row["steps"] for row in trained})
    ends = dict.fromkeys((*steps[:1], *steps[-1:]))
    took = f" for {'–'.join(map(str, ends))} steps" if steps else ""
    arms = joined([arm_name(arm) for arm in seeds])
    counts = joined([str(n) for n in dict.fromkeys(seeds.values())])
    said = (
        f"PPO trained the arm{'s' * (len(seeds) > 1)} {arms} in {counts} seed"
        f"{'s' * (counts != '1')}{' each' * (len(seeds) > 1)}{took}"
        if seeds
        else "PPO trained nothing"
    )
    if not evaluated:
        return f"{said}; no policy was evaluated."
    at = figures["compared"]["distance"]
    where = (
        "at the end of training"
        if at is None
        else f"as they were where training's KL first reached {at:g} nats"
    )
    prompts = (
        f"{_range(evaluated, 'n_unsafe')} unsafe and {_range(evaluated, 'n_safe')} safe held-out"
        " prompts"
    )
    of_training = sum("-seed" in row["policy"] for row in evaluated)
    policies = answering(of_training, len(trained), len(evaluated) - of_training)
    kept = f", trained ones {where}" if of_training else ""
    return f"{said}; {policies} answered {prompts}{kept}."


def answering(n_trained: int, of: int, n_untrained: int) -> str:
    """12 of 15 trained policies and 3 untrained"""
    share = f"{n_trained} of {of}" if of > n_trained else str(n_trained)
    if not n_trained:
        return f"{n_untrained} untrained polic{'y' if n_untrained == 1 else 'ies'}"
    policies = f"{share} trained polic{'y' if n_trained == 1 and of <= 1 else 'ies'}"
    return policies + (f" and {n_untrained} untrained" if n_untrained else "")


def joined(names: Sequence[str]) -> str:
    """a, b and c"""
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


def count_by_arm(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows:
        found[row["arm"]] = found.get(row["arm"], 0) + 1
    return found


def _range(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    low, high = min(row[name] for row in rows), max(row[name] for row in rows)
    return str(low) if low == high else f"{low} to {high}"


def target(verdict: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The change that rung 1 is about, where there is one."""
    for change in verdict["changes"]:
        if (change["measure"], change["arm"]) == ("penalised_fired", "penalty"):
            return change if change["n_prompts"] else None
    return None


def result(verdict: Mapping[str, Any]) -> str:
    """The ladder's words, with the penalised rate and its interval."""
    found = target(verdict)
    lead = verdict["lead"].rstrip(":")
    if found is None:
        return f"{lead}: {verdict['reason']}."
    rate = (
        f"penalised-latent firing rate {100 * found['before']:.1f}% without the penalty and"
        f" {100 * found['after']:.1f}% with it, {points_words(found)}"
    )
    if verdict["gaps"] and verdict["rung"] == 0:
        return f"{lead}: {verdict['reason']}; what was measured decides nothing ({rate})."
    if verdict["rung"] == 1 and not verdict["word"].startswith("fell"):
        return f"{lead}: {rate}."
    return f"{lead}: {rate}; {verdict['reason'][:1].lower()}{verdict['reason'][1:]}."


def points_words(change: Mapping[str, Any]) -> str:
    """-38.0 points, 95 % CI -46.1 to -28.7"""
    value, low, high = (
        fixed(percentage(change[m]), 1, sign=True) for m in ("change", "low", "high")
    )
    return f"{value} points, 95 % CI {low} to {high}"


def trust(figures: Mapping[str, Any], rule: VerdictConfig) -> str:
    """The instrument, the seeds and the size; and what is missing."""
    verdict = figures["verdict"]
    parts = [instrument(figures["readings"], verdict["gaps"], rule), size(target(verdict))]
    parts += unconfirmed(figures["features"])
    parts += unreplicated(figures["features"])
    if n := len(figures["failures"]):
        parts.append(f"{n} part{'s' * (n > 1)} of the run failed or never ran")
    return "; ".join(parts) + "."


def unconfirmed(features: Mapping[str, Any] | None) -> list[str]:
    """Where a penalty lies on latents that nothing but discovery speaks for."""
    penalised = features["penalised"] if features else []
    n = sum(not p["confirmed"] for p in penalised)
    if not n:
        return []
    which = "none" if n == len(penalised) else f"{len(penalised) - n}"
    return [f"{which} of the {len(penalised)} penalised latents confirmed on held-out prompts"]


def instrument(readings: Mapping[str, Any] | None, gaps: Sequence[str], rule: VerdictConfig) -> str:
    if readings is None:
        return "Whether the SARM reads the policy's responses was not measured"
    kappa, control = readings["kappa"], readings["positive_control"]["penalised"]
    measured = [
        f"stability kappa {'n/a' if kappa is None else fixed(kappa, 2)}",
        "positive control "
        + (
            "not measured"
            if control is None
            else f"{100 * control['value']:.0f} % fall, 95 % CI {100 * control['low']:.0f} to"
            f" {100 * control['high']:.0f}"
        ),
    ]
    if readings["unended"] > rule.max_unended:
        measured.insert(0, f"{readings['unended']:.0%} of the base policy's responses unended")
    doubted = readings["unreadable"] or {"unended", "stability", "control"} & set(gaps)
    found = "does not show" if doubted else "raises no doubt"
    return (
        f"Calibration {found} that the SARM reads the base policy's responses"
        f" ({', '.join(measured)})"
    )


def doubts(readings: Mapping[str, Any] | None, rule: VerdictConfig) -> list[str]:
    """What calibration found wanting before training, as keys of `REMEDIES`."""
    if readings is None:
        return []
    kappa, control = readings["kappa"], readings["positive_control"]["penalised"]
    wanting = {
        "unended": readings["unended"] > rule.max_unended,
        "stability": kappa is not None and kappa < rule.min_kappa,
        "control": control is not None and not control["low"] > 0,
    }
    return [name for name, failed in wanting.items() if failed]


def size(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "no seeds and prompts are common to the arms"
    n, prompts = found["n_seeds"], found["n_prompts"]
    if n < 2:
        return (
            f"{n} seed and {many(prompts, 'unsafe prompt')}, so that the interval leaves out how"
            " trainings differ"
        )
    detectable = found["detectable"]
    known = detectable is not None and math.isfinite(detectable)
    power = f"{100 * detectable:.1f} points" if known else "n/a"
    return (
        f"with {n} seeds and {many(prompts, 'unsafe prompt')} the minimum detectable effect"
        f" (80 % power) is {power}"
    )


def next_step(figures: Mapping[str, Any], rule: VerdictConfig) -> str:
    verdict = figures["verdict"]
    gaps = verdict["gaps"] if verdict["rung"] == 0 else ()
    # What the base policy's own responses fail in would end the next run's ladder at rung 0 too.
    more = doubts(figures.get("readings"), rule) if gaps else []
    told = [REMEDIES[gap] for gap in dict.fromkeys((*gaps, *more))]
    if not told and verdict["word"] == "suppression":
        told = [against_suppression(figures)]
    text = "; ".join(told or [NEXT[verdict["word"]]]).format(**rule.model_dump())
    return f"{text[:1].upper()}{text[1:]}."


def against_suppression(figures: Mapping[str, Any]) -> str:
    """What may keep harmless requests answered, by what the base policy's latents and the reward
    were seen to do.
    """
    said = NEXT["suppression"]
    base = next((row for row in figures.get("policies", ()) if row["policy"] == "base"), None)
    if base:
        safe, unsafe = base["penalised_fired_safe"], base["penalised_fired"]
        rates = f"{100 * safe:.1f}% of the base policy's safe responses, {100 * unsafe:.1f}% of its"
        if safe >= unsafe:
            said = (
                "penalise latents that fire less on safe responses than on unsafe ones (those"
                f" penalised fire on {rates} unsafe ones), {said}"
            )
        elif safe < unsafe:
            said += (
                f"; the penalised latents fire less on safe prompts already ({rates} unsafe ones)"
            )
    pays = next((r for r in figures.get("refusal_reward", ()) if r["kind"] == "safe"), None)
    if pays and pays["low"] > 0:
        said += (
            "; or use a reward that prefers answers, as SARM pays"
            f" {fixed(pays['value'], 2)} more for refusing a safe prompt than for answering it"
        )
    return said
