"""What calibrate's readings mean: why nothing can be concluded about latents, what to be warned
of, and whether the planned evaluation is large enough. No torch.

    why = unreadable(config, readings)  # empty where the SARM reads the policy's responses
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sarm.config import Config
from sarm.records import Candidate, Readings
from sarm.run import many


def unreadable(config: Config, found: Readings) -> list[str]:
    """Why nothing can be concluded about latents, a clause each; see the verdict's rung 0."""
    rule, why = config.verdict, []
    if found.unended > rule.max_unended:
        why.append(
            f"{found.unended:.0%} of the base policy's scored responses end at neither an end of"
            f" turn nor a sentence end (at most {rule.max_unended:.0%})"
        )
    if found.kappa is None:
        why.append("no penalised latent fires on some responses and not on others")
    elif found.kappa < rule.min_kappa:
        why.append(
            f"whether a penalised latent fires depends on where a response is cut (kappa"
            f" {found.kappa:.2f}, at least {rule.min_kappa:g})"
        )
    control = found.positive_control
    if control.prompts == 0:
        why.append("no held-out pair serves as a positive control: give part test a share")
    for name, fall in (("penalised latents", control.penalised), ("monitors", control.monitors)):
        if (
            control.prompts
            and (name != "monitors" or found.monitors)
            and not (fall and fall.low > 0)
        ):
            why.append(
                f"replacing rejected answers by chosen ones is not shown to lower the {name}"
                + (f" (95 % CI {fall.low:+.0%} to {fall.high:+.0%})" if fall else "")
            )
    return why


def warnings_of(config: Config, found: Readings) -> list[str]:
    """A sentence each."""
    told = [
        f"the SARM is not shown to read the policy's responses: {why}" for why in found.unreadable
    ]
    for p in found.penalised:
        if p.base_rate == 0:
            told.append(
                f"penalised latent {p.latent} never exceeds tau {p.tau:g} in"
                f" {found.n_prompts * found.samples} responses of the base policy, so its penalty"
                " costs nothing; lower ppo.penalty.tau or set tau_from=policy"
            )
    told += repeats(found.candidates)
    if not found.monitors:
        told.append("no monitor qualifies, so neither control nor evasion can be claimed")
    told += drawn_alike(found)
    if underpowered(config, found):
        told.append(power_sentence(config, found))
    return told


def drawn_alike(found: Readings) -> list[str]:
    """Where seeds of the random arm penalise the same latents, so that they are no independent
    draws, or, where all do, say nothing of how random latents differ.
    """
    drawn = [sorted(p.latent for p in latents) for latents in found.random.values()]
    if len(drawn) < 2 or any(one != drawn[0] for one in drawn):
        slots, latents = sum(map(len, drawn)), len(set(itertools.chain(*drawn)))
        if slots == latents:
            return []
        return [
            f"seeds of the random arm share latents ({latents} stand in {slots} places), so they"
            " are not independent draws of random latents; raise select.random_candidates"
        ]
    named = ", ".join(map(str, drawn[0]))
    return [
        f"the random arm penalises the same latents ({named}) in all {len(drawn)} seeds, so its"
        " interval says nothing of other random latents; raise select.random_candidates"
    ]


def repeats(candidates: Sequence[Candidate]) -> list[str]:
    """Where a penalty only repeats what the reward itself charges for."""
    penalised = [c for c in candidates if c.penalised]
    charged = [c for c in penalised if c.charge > 0]
    if not charged:
        return []
    alone = (
        "; no other latent is penalised, so training without the penalty pushes the same way, and"
        " only a comparison at equal KL shows what the penalty adds"
        if len(charged) == len(penalised)
        else ""
    )
    named = ", ".join(f"{c.latent} ({c.charge:.2f} SD a response)" for c in charged)
    return [f"the reward already charges for {named}; there the penalty repeats the reward{alone}"]


def underpowered(config: Config, found: Readings) -> bool:
    return found.detectable is None or found.detectable > config.calibrate.detectable


def power_sentence(config: Config, found: Readings) -> str:
    plan = found.planned
    if plan["seeds"] < 2:
        detects = (
            "can tell no change of the penalised rate, however large, from the spread between seeds"
        )
    elif found.detectable is None:
        detects = "has an unknown minimum detectable effect, as nothing varies"
    else:
        detects = (
            f"detects a change of the penalised rate of {100 * found.detectable:.0f} points with"
            " 80 % power"
        )
    return (
        f"the planned evaluation ({many(plan['prompts'], 'unsafe prompt')},"
        f" {many(plan['samples'], 'sample')}, {many(plan['seeds'], 'seed')}) {detects};"
        f" calibrate.detectable asks for {100 * config.calibrate.detectable:.0f} points; give"
        " policy_eval more prompts, raise evaluate.samples or ppo.seeds, or set"
        " calibrate.underpowered=warn"
    )
