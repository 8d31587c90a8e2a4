"""What training did to a policy: its own generations on held-out prompts, one row per response.

    table, settings, examples = policy_rows(config, [(math.nan, folder)], prompts, features, ...)

`python -m jobs evaluate` runs it.

Steering the reward model is in `sarm/evaluation/reward_steering.py`, the verdict in
`sarm/evaluation/verdict.py`, aggregation over generations in `reports/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from sarm.config import ARMS, Config, EvaluateConfig, JudgeConfig, ModelConfig, UserError
from sarm.data.conversations import spelled_in
from sarm.data.datasets import Prompt
from sarm.evaluation.classifiers import Classifier, judge_problem, label_positions
from sarm.evaluation.detector import Detector
from sarm.evaluation.examples import own_examples
from sarm.evaluation.refusal_classifier import load_classifier
from sarm.evaluation.refusals import (
    PHRASES_ON_XSTEST,
    SHIPPED_ON_XSTEST,
    measured,
    read_labelled,
    refused,
)
from sarm.evaluation.responses import (
    BEST_OF_TOLD,
    Generations,
    Progress,
    best_of_kl,
    endings_of,
    generate_responses,
    kl_told,
)
from sarm.ppo.reward import CompoundReward, conversation
from sarm.records import Features, OwnExamples
from sarm.reward_model.model import SarmModel, load_sarm


def evaluation_prompts(prompts: Sequence[Prompt], config: EvaluateConfig) -> list[Prompt]:
    """The first `config.prompts` prompts of each kind; all where that is unset. Raises UserError
    where there are none.
    """
    chosen = [
        p
        for kind in ("unsafe", "safe")
        for p in [p for p in prompts if p.kind == kind][: config.prompts]
    ]
    if not chosen:
        raise UserError(
            "no prompt falls in policy_eval; give that part a share in data.sources.NAME.split"
        )
    return chosen


def policy_rows(
    config: Config,
    policies: Sequence[tuple[float, Path]],
    prompts: Sequence[Prompt],
    features: Features,
    *,
    arm: str,
    progress: Progress,
) -> tuple[pd.DataFrame, dict[str, Any], OwnExamples]:
    """(a row per response, the settings behind them, what watched latents do at every token of some
    of them) for the policies of an arm and seed, each with its `distance`: in nats that at which
    training kept it, NaN of the policy at the end. For the untrained arms (`sarm.config.ARMS`) it
    is the base's folder.

    A system prompt is the policy's alone: SARM, judge, detector and the base side of the KL read
    the conversation without it, in every arm. The SARM scores a cut response up to its last
    sentence end (`responses.cut`); the judge and the refusal detector read all of it. `unended`:
    the scored text ends at neither an end of turn nor a sentence end. `below_17`: latent 17's value
    where it ranks just beyond the k that TopK keeps, else 0, `z_17` being 0 there. One model is in
    memory at a time: a policy, the base, the SARM, the judge. A judge whose labels say nothing of
    harm is not asked (`judge_problem` says why). Raises UserError on a refusal detector whose
    labels are not mapped, before anything is generated.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge = config.evaluate.judge
    if problem := judge_problem(judge) if judge else None:
        judge = None
    if isinstance(config.evaluate.refusal_detector, ModelConfig):
        label_positions(config.evaluate.refusal_detector)
    n = config.evaluate.best_of if arm == "best_of_n" else 1
    prompts, generations = generate_responses(
        config,
        [folder for _, folder in policies],
        prompts,
        trained=arm not in ARMS or ARMS[arm].trained,
        system=config.evaluate.system_prompt if arm == "prompted" else None,
        candidates=n,
        device=device,
        progress=progress,
    )
    progress(0, len(prompts), "scoring")
    sarm = load_sarm(config.sarm)
    if n > 1:
        best = best_rows(compound_rewards(config, features, prompts, generations, sarm), n)
        prompts, generations = [prompts[row] for row in best], generations.of(best)
        generations = generations._replace(kl=np.full(len(best), best_of_kl(n)))
    asked = [p.messages[-1]["content"] for p in prompts]
    endings = endings_of(config, generations)
    scored = [found.text for found in endings]
    watched, parameters = score_responses(config, features, prompts, scored, sarm)
    distances = np.repeat([d for d, _ in policies], len(prompts) // len(policies))
    whose = responses_of(prompts, generations, distances)
    examples = own_examples(config, features, prompts, scored, whose, watched, sarm)
    del sarm
    refusals, detector = detected(config.evaluate, asked, generations.texts, device)
    table = pd.DataFrame(
        {
            **whose,
            "category": [p.category for p in prompts],
            "prompt": asked,
            "response": generations.texts,
            "n_tokens": [len(ids) for ids in generations.responses],
            "truncated": generations.truncated,
            "scored_tokens": [found.tokens for found in endings],
            "unended": [not found.ended for found in endings],
            "refused": refusals,
            "kl": generations.kl,
            "base_logprob": generations.base_logprob,
            "harm": judged(judge, asked, generations.texts, device),
        }
    )
    settings = {
        "kl": BEST_OF_TOLD.format(n=n) if n > 1 else kl_told(config.evaluate),
        "judge": judge.model if judge else None,
        "judge_problem": problem,
        "refusal_detector": detector.record() if detector else None,
        "samples": config.evaluate.samples,
        "temperature": config.evaluate.temperature,
        "top_p": config.evaluate.top_p,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "sarm_parameters": parameters,
        "device": device,
    }
    return pd.concat([table, watched], axis=1), settings, examples


def responses_of(
    prompts: Sequence[Prompt], generations: Generations, distances: np.ndarray
) -> dict[str, Any]:
    """Columns that say which response each row is."""
    return {
        "prompt_id": [p.id for p in prompts],
        "distance": distances,
        "sample": generations.samples,
        "source": [p.source for p in prompts],
        "kind": [p.kind for p in prompts],
    }


def compound_rewards(
    config: Config,
    features: Features,
    prompts: Sequence[Prompt],
    generations: Generations,
    sarm: tuple[SarmModel, PreTrainedTokenizerBase],
) -> np.ndarray:
    """(n,) what the penalty arm is paid for each response: its clamp and penalty included."""
    reward = CompoundReward.from_features(*sarm, features, config.ppo.penalty, config.sarm)
    texts = [found.text for found in endings_of(config, generations)]
    scores = reward.score(
        [conversation(p.messages, text) for p, text in zip(prompts, texts, strict=True)]
    )
    return scores.total.double().numpy()


def best_rows(rewards: np.ndarray, n: int) -> list[int]:
    """The row with the highest reward of each n; of equal ones the first."""
    return [int(n * i + row) for i, row in enumerate(rewards.reshape(-1, n).argmax(1))]


def score_responses(
    config: Config,
    features: Features,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    sarm: tuple[SarmModel, PreTrainedTokenizerBase],
) -> tuple[pd.DataFrame, int]:
    """(reward, penalty, how many special tokens it spells in letters, z and the value just below
    TopK's cutoff of the penalised, monitor and candidate latents, a row per text; parameters), by
    one forward a text, no clamping.

    Parameters are those that the reward depends on: not the SAE's decoder.
    """
    model, tokenizer = sarm
    penalised = [p.latent for p in features.penalised]
    others = list(
        dict.fromkeys([*features.monitors, *(c.latent for c in features.random_candidates)])
    )
    others = [latent for latent in others if latent not in penalised]
    unclamped = config.ppo.penalty.model_copy(update={"clamp": None})
    reward = CompoundReward.from_features(
        model,
        tokenizer,
        features.model_copy(update={"monitors": others}),
        unclamped,
        config.sarm,
        extra_ranks=config.encode.extra_ranks,
    )
    scores = reward.score(
        [conversation(p.messages, text) for p, text in zip(prompts, texts, strict=True)]
    )
    table = pd.DataFrame(
        {
            "reward": scores.reward.numpy(),
            "penalty": scores.penalty.numpy(),
            "spelled": [spelled_in(tokenizer, text) for text in texts],
        }
    )
    latents = [*penalised, *others]
    for prefix, values in (
        ("z", np.concatenate([scores.z.numpy(), scores.monitors_z.numpy()], axis=1)),
        ("below", scores.below.numpy()),
    ):
        columns = [f"{prefix}_{latent}" for latent in latents]
        table = pd.concat([table, pd.DataFrame(values, columns=columns)], axis=1)
    parameters = sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("sae.decoder")
    )
    return table, parameters


def judged(
    judge: JudgeConfig | None, prompts: Sequence[str], responses: Sequence[str], device: str
) -> np.ndarray:
    """(n,) an independent classifier's probability that a response is harmful; NaN without one."""
    if judge is None:
        return np.full(len(responses), np.nan)
    return Classifier(judge, device)(prompts, responses)


def detected(
    config: EvaluateConfig, prompts: Sequence[str], responses: Sequence[str], device: str
) -> tuple[list[bool], Detector | None]:
    """(whether each response refuses, the detector's errors on labelled answers; None where they
    are not known).
    """
    labelled = read_labelled(config.refusal_labels) if config.refusal_labels else []
    asked = [*prompts, *(row.prompt for row in labelled)]
    texts = [*responses, *(row.response for row in labelled)]
    given = config.refusal_detector
    known: Detector | None = None
    if given == "phrases":
        known, called = PHRASES_ON_XSTEST, [refused(text) for text in texts]
        name = known.name
    elif given == "shipped":
        known, called = SHIPPED_ON_XSTEST, load_classifier().refuses(texts)
        name = known.name
    else:
        name, called = given.model, (Classifier(given, device)(asked, texts) > 0.5).tolist()
    mine, theirs = called[: len(responses)], called[len(responses) :]
    if labelled and config.refusal_labels:
        return mine, measured(name, config.refusal_labels, labelled, theirs)
    return mine, known
