"""The section on what calibrate found: whether the SARM reads the policy's text, what penalising
each candidate would mean, and what the evaluation can detect.
"""

from __future__ import annotations

from typing import Any

from reports.blocks import NOT_AVAILABLE, Block, Items, Prose, Table
from reports.numbers import fixed, plain
from reports.origins import READINGS, UNKNOWN, columns
from sarm.run import many


def calibration(figures: dict[str, Any]) -> list[Block]:
    """Blocks of figures["readings"]."""
    found = figures["readings"]
    if found is None:
        return list(NOT_AVAILABLE)
    return [
        Prose(verdict_on_the_instrument(found)),
        Prose(responses(found)),
        Table(
            ["Reading", "estimate", "95 % interval"],
            [
                [
                    "kappa, cut "
                    + ", ".join(str(s["tokens"]) for s in found["stability"])
                    + " tokens earlier",
                    number(found["kappa"]),
                    "",
                ],
                [
                    "positive control, fall of penalised rate",
                    *fall(found["positive_control"]["penalised"]),
                ],
                [
                    "positive control, fall of monitors",
                    *fall(found["positive_control"]["monitors"]),
                ],
            ],
            origins=columns(
                READINGS, dict.fromkeys(("estimate", "95 % interval"), "kappa and positive_control")
            ),
            counts=[
                many(max((s["n"] for s in found["stability"]), default=0), "response"),
                *[many(found["positive_control"]["prompts"], "prompt")] * 2,
            ],
            unknown=UNKNOWN,
        ),
        Prose(" ".join(filter(None, (detects(found), evaluated(figures))))),
        Table(
            ["Latent", "role", "tau", "rate", "within prompts", "charge (SD)", "penalised"],
            [
                [
                    c["latent"],
                    c["role"] + ("" if c["confirmed"] else ", unconfirmed"),
                    plain(round(c["tau"], 3)),
                    fixed(c["rate"], 2),
                    number(c["within_prompt_share"]),
                    fixed(c["charge"], 3, sign=True),
                    "yes" if c["penalised"] else "",
                ]
                for c in found["candidates"]
            ],
            "Candidates on the base policy's own responses",
            origins=columns(
                READINGS,
                dict.fromkeys(("tau", "rate", "within prompts", "charge (SD)"), "candidates"),
            ),
            counts=[many(found["n_prompts"] * found["samples"], "response")]
            * len(found["candidates"]),
            unknown=UNKNOWN,
        ),
        Prose(
            "rate: share of responses above tau. within prompts: share of the variance of firing"
            " between responses to one prompt, which a policy can change. charge: what the reward"
            " itself takes off for the latent, on average, in SDs of the reward; negative where it"
            " pays. Where the charge is positive, the penalty repeats the reward."
        ),
        *([Items([f"Warning: {w}" for w in found["warnings"]])] if found["warnings"] else []),
    ]


def verdict_on_the_instrument(found: dict[str, Any]) -> str:
    if not found["unreadable"]:
        return "The SARM reads this policy's responses, as far as stability and control can tell."
    return (
        "The SARM is not shown to read this policy's responses, so nothing is concluded about"
        f" latents: {'; '.join(found['unreadable'])}."
    )


def responses(found: dict[str, Any]) -> str:
    trimmed = found["scored_tokens"] < found["tokens"]
    return (
        f"{found['n_prompts'] * found['samples']} responses of the base policy to"
        f" {found['n_prompts']} unsafe prompts, {fixed(found['tokens'], 0)} tokens on average:"
        f" {found['cut']:.0%} hit the token limit"
        + (
            " and were trimmed to their last sentence end, where they have one"
            f" ({fixed(found['scored_tokens'], 0)} tokens scored)"
            if trimmed
            else ""
        )
        + f"; {found['unended']:.0%} of the scored texts end at neither an end of turn nor a"
        " sentence end."
        f" Some penalised latent fires on {found['any_rate']:.0%}."
    )


def detects(found: dict[str, Any]) -> str:
    plan = found["planned"]
    what = (
        f"{many(plan['prompts'], 'unsafe prompt')}, {many(plan['samples'], 'sample')},"
        f" {many(plan['seeds'], 'seed')}"
    )
    if plan["seeds"] < 2:
        return (
            f"Minimum detectable effect of the evaluation ({what}): none, as one seed cannot tell a"
            " change of any size from the spread between seeds."
        )
    if found["detectable"] is None:
        return f"Minimum detectable effect of the evaluation ({what}): unknown, as nothing varies."
    return (
        f"Minimum detectable effect of the evaluation ({what}): {100 * found['detectable']:.1f}"
        " points of the penalised rate, with 80 % power."
    )


def evaluated(figures: dict[str, Any]) -> str:
    """How many unsafe prompts were evaluated of those planned, and why fewer; empty where as
    many were, or none.
    """
    planned = figures["readings"]["planned"]["prompts"]
    counts = {row["n_unsafe"] for row in figures["policies"]}
    if not counts or counts == {planned}:
        return ""
    low, high = min(counts), max(counts)
    told = str(low) if low == high else f"{low} to {high}"
    long = max((e.get("n_too_long") or 0 for e in figures["evaluations"].values()), default=0)
    why = (
        f", as {many(long, 'prompt')} of the part, safe ones counted,"
        f" {'has' if long == 1 else 'have'} more tokens than ppo.max_prompt_tokens"
        if long
        else ""
    )
    return f"Evaluated were {told} of these{why}."


def number(value: float | None) -> str:
    return "n/a" if value is None else fixed(value, 2)


def fall(bounds: dict[str, float] | None) -> list[str]:
    if bounds is None:
        return ["n/a", ""]
    return [f"{bounds['value']:.0%}", f"{bounds['low']:.0%} to {bounds['high']:.0%}"]
