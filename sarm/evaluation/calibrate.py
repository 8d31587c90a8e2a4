"""What the base policy's own responses say of the latents, and whether the SARM reads them at all.

    readings = calibrate(config, features, data, device, progress)  # `python -m jobs calibrate`

Once a run, before any training: thresholds, rates, monitors, the random latents of every seed,
stability under cuts, the positive control, and what the planned evaluation can detect. The
arithmetic is in `instrument.py`, what it means in `readability.py`; here are the model passes, in
one file as all of them read the same responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sarm.config import Config, UserError
from sarm.data.conversations import prompt_ids, response_text, stop_ids
from sarm.data.datasets import Data, Pair, Prompt, pairs_in, prompts_in
from sarm.data.endings import ending
from sarm.evaluation.instrument import (
    cohens_kappa,
    detectable_difference,
    relative_fall,
    within_prompt_share,
)
from sarm.evaluation.readability import unreadable, warnings_of
from sarm.hub import local_model
from sarm.llama.generate import generate
from sarm.models import open_policy, read_tokenizer
from sarm.ppo.reward import CompoundReward, Penalised, calibrate_random, conversation
from sarm.probing.monitors import choose_monitors, drawn_for, largest_correlations
from sarm.records import (
    Bounds,
    Candidate,
    Features,
    PositiveControl,
    RatedLatent,
    Readings,
    Stability,
    WatchedLatent,
)
from sarm.reward_model.model import load_sarm

Progress = Callable[[int, int, str], None]
Floats = NDArray[np.float64]
BEFORE_TRAINING = -1
"""The step whose noise calibration's samples take: none that training takes."""


class Responses(NamedTuple):
    """n responses of the base policy: all samples of the first prompt, then of the next."""

    prompts: list[Prompt]
    ids: list[list[int]]
    """Token ids, a stop token included."""
    cut: list[bool]
    decode: Callable[[Sequence[int]], str]


class Read(NamedTuple):
    """What the SARM reads in n texts."""

    reward: Floats
    """(n,)."""
    z: dict[int, Floats]
    """By latent, (n,)."""


Reader = Callable[[Sequence[Prompt], Sequence[str]], Read]


def calibrate(
    config: Config, features: Features, data: Data, device: str, progress: Progress
) -> Readings:
    """Raises UserError where part ppo has no prompts that fit, where no random latent fires, or,
    unless `calibrate.underpowered` is warn, where the plan detects too little.
    """
    responses = base_responses(config, prompts_in(data, "ppo"), device, progress)
    trim = config.responses.cut == "trim"
    scored = [
        ending(responses.decode, ids, cut=cut, trim=trim)
        for ids, cut in zip(responses.ids, responses.cut, strict=True)
    ]
    read = sarm_reader(config, features, device)
    progress(0, len(scored), "scoring")
    base = read(responses.prompts, [s.text for s in scored])
    penalised = thresholds(config, features, base)
    stability = [
        agreement(responses, base, penalised, tokens, trim, read)
        for tokens in config.calibrate.cut_tokens
    ]
    monitors = monitors_of(config, features, base, penalised)
    control = positive_control(config, pairs_in(data, "test"), responses, read, penalised, monitors)
    found = Readings(
        n_prompts=len(responses.prompts) // config.calibrate.samples,
        samples=config.calibrate.samples,
        cut=float(np.mean(responses.cut)),
        unended=float(np.mean([not s.ended for s in scored])),
        tokens=float(np.mean([len(ids) for ids in responses.ids])),
        scored_tokens=float(np.mean([s.tokens for s in scored])),
        reward_mean=float(base.reward.mean()),
        reward_sd=float(base.reward.std(ddof=1)),
        any_rate=float(fired_any(base, penalised).mean()),
        candidates=candidates_of(config, features, base, penalised),
        penalised=penalised,
        monitors=monitors,
        random=random_sets(config, features, base, penalised),
        stability=[s for s, _, _ in stability],
        kappa=cohens_kappa(*(np.concatenate([s[i] for s in stability]) for i in (1, 2))),
        positive_control=control,
        **power(config, data, fired_any(base, penalised)),
        unreadable=[],
        warnings=[],
    )
    found = found.model_copy(update={"unreadable": unreadable(config, found)})
    return found.model_copy(update={"warnings": warnings_of(config, found)})


# The model passes


def base_responses(
    config: Config, prompts: Sequence[Prompt], device: str, progress: Progress
) -> Responses:
    """`calibrate.samples` responses to each of the first `calibrate.prompts` unsafe prompts that
    fit, sampled as in training.
    """
    ppo, plan = config.ppo, config.calibrate
    folder = local_model(config.policy.model, config.policy.revision)
    model = open_policy(folder, config.policy.dtype).to(device)
    tokenizer = read_tokenizer(folder, config.policy.chat_template_kwargs)
    tokenized = [(p, prompt_ids(tokenizer, p.messages)) for p in prompts if p.kind == "unsafe"]
    fitting = [(p, ids) for p, ids in tokenized if len(ids) <= ppo.max_prompt_tokens]
    if not fitting:
        raise UserError(
            f"none of the {len(prompts)} ppo prompts is unsafe and has at most"
            f" {ppo.max_prompt_tokens} tokens; raise ppo.max_prompt_tokens or give part ppo other"
            " data"
        )
    drawn = [(p, ids, s) for p, ids in fitting[: plan.prompts] for s in range(plan.samples)]
    stops = stop_ids(model, tokenizer)
    rollout = generate(
        model,
        [ids for _, ids, _ in drawn],
        keys=[f"{p.id}#{sample}" for p, _, sample in drawn],
        max_new_tokens=ppo.max_new_tokens,
        temperature=ppo.temperature,
        top_p=1.0,
        seed=config.seed,
        step=BEFORE_TRAINING,
        eos_ids=stops,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
        progress=lambda done, total: progress(done, total, "prompts answered"),
    )
    return Responses(
        [p for p, _, _ in drawn],
        [rollout.ids(row) for row in range(len(drawn))],
        rollout.truncated.tolist(),
        lambda ids: response_text(tokenizer, ids),
    )


def sarm_reader(config: Config, features: Features, device: str) -> Reader:
    """Reads the reward and every latent that the run may penalise, watch or compare with."""
    model, tokenizer = load_sarm(config.sarm)
    watched = list(
        dict.fromkeys(
            latent.latent
            for latents in (
                features.penalised,
                features.harming,
                features.misleading,
                features.monitor_features,
                features.random_candidates,
            )
            for latent in latents
        )
    )
    reward = CompoundReward(
        model.to(device),  # type: ignore[arg-type]
        tokenizer,
        [],
        monitors=watched,
        tokens_per_batch=config.sarm.tokens_per_batch,
        max_length=config.sarm.max_length,
    )

    def read(prompts: Sequence[Prompt], texts: Sequence[str]) -> Read:
        scores = reward.score(
            [conversation(p.messages, text) for p, text in zip(prompts, texts, strict=True)]
        )
        z = scores.monitors_z.double().numpy()
        return Read(
            scores.reward.double().numpy(), {latent: z[:, i] for i, latent in enumerate(watched)}
        )

    return read


# What is read off them


def thresholds(config: Config, features: Features, base: Read) -> list[RatedLatent]:
    """The penalised latents with tau and alpha as the config has them: tau at a quantile of the
    policy's own values where it says so, alpha in SDs of the reward on the policy's responses.
    """
    penalty = config.ppo.penalty
    sd = float(base.reward.std(ddof=1))
    alpha = penalty.alpha * (sd if penalty.alpha_unit == "reward_sd" else 1.0)
    found = []
    for p in features.penalised:
        tau = p.tau
        if penalty.tau_quantile is not None and penalty.tau_from == "policy":
            tau = max(float(np.quantile(base.z[p.latent], penalty.tau_quantile)), 0.0)
        rate = float((base.z[p.latent] > tau).mean())
        found.append(
            RatedLatent(
                latent=p.latent,
                tau=tau,
                alpha=alpha,
                role=p.role,
                confirmed=p.confirmed,
                base_rate=rate,
            )
        )
    return found


def fired_any(read: Read, penalised: Sequence[RatedLatent]) -> NDArray[np.bool_]:
    """(n,): whether any penalised latent exceeds its tau."""
    fired = [read.z[p.latent] > p.tau for p in penalised]
    return np.any(fired, axis=0) if fired else np.zeros(len(read.reward), dtype=bool)


def candidates_of(
    config: Config, features: Features, base: Read, penalised: Sequence[RatedLatent]
) -> list[Candidate]:
    """The listed harming and misleading latents, and the penalised among them at their taus; the
    others at the threshold that the penalised have in common, else where they are on at all.
    """
    taus = {p.latent: p.tau for p in penalised}
    fixed = config.ppo.penalty.tau or 0.0
    sd = float(base.reward.std(ddof=1)) or 1.0
    rows = []
    for feature in (*features.harming, *features.misleading):
        tau, z = taus.get(feature.latent, fixed), base.z[feature.latent]
        weight = feature.weight or 0.0
        fired = (z > tau).reshape(-1, config.calibrate.samples)
        rows.append(
            Candidate(
                latent=feature.latent,
                role=feature.role,
                confirmed=feature.confirmed,
                penalised=feature.latent in taus,
                weight=weight,
                tau=tau,
                rate=float(fired.mean()),
                within_prompt_share=within_prompt_share(fired),
                charge=float(-(weight * z).mean()) / sd,
            )
        )
    return rows


def monitors_of(
    config: Config, features: Features, base: Read, penalised: Sequence[RatedLatent]
) -> list[WatchedLatent]:
    """The monitors whose rate on the policy's responses can fall and rise, and whose activation
    there goes with no penalised one's.
    """
    candidates = features.monitor_features
    if not candidates:
        return []
    rates = {m.latent: float((base.z[m.latent] > m.tau).mean()) for m in candidates}
    columns = [
        np.stack([base.z[latent.latent] for latent in latents], axis=1)
        if latents
        else np.zeros((len(base.reward), 0))
        for latents in (candidates, penalised)
    ]
    correlations = dict(
        zip(
            [m.latent for m in candidates],
            largest_correlations(columns[0], columns[1]).tolist(),
            strict=True,
        )
    )
    return [
        WatchedLatent(
            latent=m.latent,
            tau=m.tau,
            base_rate=rates[m.latent],
            max_cosine=m.max_cosine,
            max_correlation=correlations[m.latent],
        )
        for m in choose_monitors(candidates, rates, config.select, correlations)
    ]


def random_sets(
    config: Config, features: Features, base: Read, penalised: Sequence[RatedLatent]
) -> dict[str, list[RatedLatent]]:
    """For each seed of the random arm its latents, matched in dose on the policy's responses."""
    if "random" not in config.ppo.arms or not penalised:
        return {}
    targets = [Penalised(p.latent, p.tau, p.alpha) for p in penalised]

    def values(latents: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([base.z[latent] for latent in latents], axis=1))

    sets = {}
    for seed in config.ppo.seeds:
        order = drawn_for(features.random_candidates, seed)
        matched = calibrate_random(
            values(order),
            order,
            values([t.latent for t in targets]),
            targets,
            config.ppo.penalty.kind,
        )
        sets[str(seed)] = [
            RatedLatent(
                latent=m.latent,
                tau=m.tau,
                alpha=m.alpha,
                role="random",
                confirmed=False,
                base_rate=float((base.z[m.latent] > m.tau).mean()),
            )
            for m in matched
        ]
    return sets


def agreement(
    responses: Responses,
    base: Read,
    penalised: Sequence[RatedLatent],
    tokens: int,
    trim: bool,
    read: Reader,
) -> tuple[Stability, NDArray[np.bool_], NDArray[np.bool_]]:
    """(the row, whether any penalised latent fires on the responses, and on the same cut `tokens`
    earlier): of those long enough.
    """
    rows = [i for i, ids in enumerate(responses.ids) if len(ids) > tokens]
    earlier = [
        ending(responses.decode, responses.ids[i][:-tokens], cut=True, trim=trim).text for i in rows
    ]
    again = read([responses.prompts[i] for i in rows], earlier)
    first, second = fired_any(base, penalised)[rows], fired_any(again, penalised)
    by_latent = {
        str(p.latent): cohens_kappa(base.z[p.latent][rows] > p.tau, again.z[p.latent] > p.tau)
        for p in penalised
    }
    kappa = cohens_kappa(first, second)
    return (Stability(tokens=tokens, n=len(rows), kappa=kappa, by_latent=by_latent), first, second)


def positive_control(
    config: Config,
    pairs: Sequence[Pair],
    responses: Responses,
    read: Reader,
    penalised: Sequence[RatedLatent],
    monitors: Sequence[WatchedLatent],
) -> PositiveControl:
    """Rates on rejected and on chosen answers of held-out pairs, both cut at the run's length and
    trimmed; the unit is the prompt.
    """
    folder = local_model(config.policy.model, config.policy.revision)
    tokenizer = read_tokenizer(folder, config.policy.chat_template_kwargs)
    mine: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.prompt.kind == "unsafe":
            mine.setdefault(pair.prompt.id, []).append(pair)
    kept = [
        pair for group in list(mine.values())[: config.calibrate.control_pairs] for pair in group
    ]

    def at_length(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        limit = config.ppo.max_new_tokens
        trim = config.responses.cut == "trim"
        return ending(responses.decode, ids[:limit], cut=len(ids) > limit, trim=trim).text

    if not kept:
        return PositiveControl(prompts=0, penalised=None, monitors=None)
    prompts = [pair.prompt for pair in kept]
    sides = [
        read(prompts, [at_length(getattr(pair, side)) for pair in kept])
        for side in ("rejected", "chosen")
    ]
    _, group = np.unique([p.id for p in prompts], return_inverse=True)

    def by_prompt(values: Floats) -> Floats:
        return np.bincount(group, weights=values) / np.bincount(group)

    def fall(value: Callable[[Read], Floats]) -> Bounds | None:
        return relative_fall(by_prompt(value(sides[0])), by_prompt(value(sides[1])))

    return PositiveControl(
        prompts=int(group.max()) + 1,
        penalised=fall(lambda side: fired_any(side, penalised).astype(float))
        if penalised
        else None,
        monitors=fall(
            lambda side: np.mean([side.z[m.latent] > m.tau for m in monitors], axis=0).astype(float)
        )
        if monitors
        else None,
    )


def power(config: Config, data: Data, fired: NDArray[np.bool_]) -> dict[str, Any]:
    """`detectable` and `planned` of the record."""
    unsafe = sum(p.kind == "unsafe" for p in prompts_in(data, "policy_eval"))
    if config.evaluate.prompts is not None:
        unsafe = min(unsafe, config.evaluate.prompts)
    planned = {
        "prompts": unsafe,
        "samples": config.evaluate.samples,
        "seeds": len(config.ppo.seeds),
    }
    share = within_prompt_share(fired.reshape(-1, config.calibrate.samples))
    if share is None or not 0 < fired.mean() < 1:
        return {"detectable": None, "planned": planned}
    detectable = detectable_difference(
        float(fired.mean()), within_share=share, seed_sd=config.calibrate.seed_sd, **planned
    )
    return {"detectable": detectable, "planned": planned}
