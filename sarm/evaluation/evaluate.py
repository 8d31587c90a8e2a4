"""What training did to a policy: its own generations on held-out prompts, one row a response.

    table, settings = policy_rows(config, folder, prompts, features)  # `python -m jobs evaluate`

Steering the reward model is in `sarm/evaluation/reward_steering.py`, the verdict in
`sarm/evaluation/verdict.py`, aggregation over generations in `reports/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from sarm.config import Config, EvaluateConfig, UserError
from sarm.data.conversations import prompt_ids, response_text, spelled_in, stop_ids
from sarm.data.datasets import Prompt
from sarm.data.endings import ending
from sarm.evaluation.classifiers import Classifier, label_positions
from sarm.evaluation.detector import Detector
from sarm.evaluation.refusals import PHRASES_ON_XSTEST, measured, read_labelled, refused
from sarm.hub import local_model
from sarm.llama.generate import generate, response_logprobs
from sarm.models import open_policy, read_tokenizer
from sarm.ppo.reward import CompoundReward, conversation
from sarm.records import Features
from sarm.reward_model.model import load_sarm

Progress = Callable[[int, int, str], None]

KL_TOLD = (
    "sum over a response's tokens of log pi - log base, both teacher-forced at temperature 1; a"
    " mean over samples"
)


class Generations(NamedTuple):
    """n responses: all samples of the first prompt, then of the next."""

    prompts: list[list[int]]
    responses: list[list[int]]
    """Token ids, a stop token included."""
    samples: list[int]
    """Which of its prompt's samples each is."""
    texts: list[str]
    truncated: list[bool]
    decode: Callable[[Sequence[int]], str]
    kl: np.ndarray
    """(n,) see `KL_TOLD`"""
    base_logprob: np.ndarray
    """(n,) under the base policy, nats per token."""


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
    policy: Path,
    prompts: Sequence[Prompt],
    features: Features,
    *,
    trained: bool,
    progress: Progress,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """(a row a response, the settings behind them) for the policy in a folder; `trained` where it
    is not the base itself.

    The SARM scores a cut response up to its last sentence end (`responses.cut`); the judge and the
    refusal detector read all of it. `unended`: the scored text ends at neither an end of turn nor
    a sentence end. `below_17`: latent
    17's value where it ranks just beyond the k that TopK keeps, else 0, `z_17` being 0 there. One
    model is in memory at a time: the policy, the base, the SARM, the judge. Raises UserError on a
    classifier whose labels are not mapped, before anything is generated.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for given in (config.evaluate.judge, config.evaluate.refusal_detector):
        if given is not None and given != "phrases":
            label_positions(given)
    prompts, generations = generate_responses(
        config, policy, prompts, trained=trained, device=device, progress=progress
    )
    progress(0, len(prompts), "scoring")
    asked = [p.messages[-1]["content"] for p in prompts]
    endings = [
        ending(generations.decode, ids, cut=cut, trim=config.responses.cut == "trim")
        for ids, cut in zip(generations.responses, generations.truncated, strict=True)
    ]
    scored = [found.text for found in endings]
    watched, parameters = score_responses(config, features, prompts, scored)
    refusals, detector = detected(config.evaluate, asked, generations.texts, device)
    table = pd.DataFrame(
        {
            "prompt_id": [p.id for p in prompts],
            "sample": generations.samples,
            "source": [p.source for p in prompts],
            "kind": [p.kind for p in prompts],
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
            "harm": judged(config.evaluate, asked, generations.texts, device),
        }
    )
    settings = {
        "kl": (
            KL_TOLD
            + (
                ""
                if _unbiased(config.evaluate)
                else (
                    "; the samples are not of temperature 1 and top-p 1, so it is no estimate of"
                    " the KL divergence"
                )
            )
        ),
        "judge": config.evaluate.judge.model if config.evaluate.judge else None,
        "refusal_detector": detector.record() if detector else None,
        "samples": config.evaluate.samples,
        "temperature": config.evaluate.temperature,
        "top_p": config.evaluate.top_p,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "sarm_parameters": parameters,
        "device": device,
    }
    return pd.concat([table, watched], axis=1), settings


def generate_responses(
    config: Config,
    policy: Path,
    prompts: Sequence[Prompt],
    *,
    trained: bool,
    device: str,
    progress: Progress,
) -> tuple[list[Prompt], Generations]:
    """The prompts that fit ppo.max_prompt_tokens, each repeated for its samples, and a response to
    each; noise follows prompt and sample, the same for every policy.

    Both sides of the KL come from one kind of forward: in bf16 the sampler's own log-probabilities
    differ from a teacher-forced pass's by about 0.1 in sum over 32 tokens, in one direction.
    """
    model = open_policy(policy, config.policy.dtype).to(device)
    tokenizer = read_tokenizer(policy, config.policy.chat_template_kwargs)
    tokenized = [(p, prompt_ids(tokenizer, p.messages)) for p in prompts]
    fitting = [p for p, tokens in tokenized if len(tokens) <= config.ppo.max_prompt_tokens]
    ids = [tokens for _, tokens in tokenized if len(tokens) <= config.ppo.max_prompt_tokens]
    if not fitting:
        raise UserError(
            f"none of the {len(prompts)} policy_eval prompts has at most"
            f" {config.ppo.max_prompt_tokens} tokens; raise ppo.max_prompt_tokens"
        )
    n = config.evaluate.samples
    samples = list(range(n)) * len(fitting)
    fitting = [p for p in fitting for _ in range(n)]
    ids = [tokens for tokens in ids for _ in range(n)]
    stops = stop_ids(model, tokenizer)
    rollout = generate(
        model,
        ids,
        # The first sample's noise does not depend on how many there are.
        keys=[f"{p.id}#{i}" if i else p.id for p, i in zip(fitting, samples, strict=True)],
        max_new_tokens=config.evaluate.max_new_tokens,
        temperature=config.evaluate.temperature,
        top_p=config.evaluate.top_p,
        seed=config.seed,
        eos_ids=stops,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
        progress=lambda done, total: progress(done, total, "prompts answered"),
    )
    responses = [rollout.ids(row) for row in range(len(ids))]
    progress(0, len(ids), "log-probabilities")
    own = base = _sums(model, ids, responses, config)
    if trained:
        del model
        folder = local_model(config.policy.model, config.policy.revision)
        reference = open_policy(folder, config.policy.dtype).to(device)
        base = _sums(reference, ids, responses, config)
    lengths = np.array([len(response) for response in responses])
    texts = [response_text(tokenizer, response) for response in responses]
    return fitting, Generations(
        ids,
        responses,
        samples,
        texts,
        rollout.truncated.tolist(),
        lambda tokens: response_text(tokenizer, tokens),
        own - base,
        base / lengths,
    )


def score_responses(
    config: Config, features: Features, prompts: Sequence[Prompt], texts: Sequence[str]
) -> tuple[pd.DataFrame, int]:
    """(reward, penalty, how many special tokens it spells in letters, z and the value just below
    TopK's cutoff of the penalised, monitor and candidate latents, a row a text; parameters), by
    one forward a text, no clamping.

    Parameters are those that the reward depends on: not the SAE's decoder.
    """
    model, tokenizer = load_sarm(config.sarm)
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
    config: EvaluateConfig, prompts: Sequence[str], responses: Sequence[str], device: str
) -> np.ndarray:
    """(n,) an independent classifier's probability that a response is harmful; NaN without one."""
    if config.judge is None:
        return np.full(len(responses), np.nan)
    return Classifier(config.judge, device)(prompts, responses)


def detected(
    config: EvaluateConfig, prompts: Sequence[str], responses: Sequence[str], device: str
) -> tuple[list[bool], Detector | None]:
    """(whether each response refuses, the detector's errors on labelled answers; None where they
    are not known).
    """
    labelled = read_labelled(config.refusal_labels) if config.refusal_labels else []
    asked = [*prompts, *(row.prompt for row in labelled)]
    texts = [*responses, *(row.response for row in labelled)]
    if config.refusal_detector == "phrases":
        name, called = "phrases", [refused(text) for text in texts]
    else:
        name = config.refusal_detector.model
        called = (Classifier(config.refusal_detector, device)(asked, texts) > 0.5).tolist()
    mine, theirs = called[: len(responses)], called[len(responses) :]
    if labelled and config.refusal_labels:
        return mine, measured(name, config.refusal_labels, labelled, theirs)
    return mine, PHRASES_ON_XSTEST if name == "phrases" else None


def _sums(
    model: Any, prompts: list[list[int]], responses: list[list[int]], config: Config
) -> np.ndarray:
    """(n,) each response's log-probability at temperature 1."""
    logprobs = response_logprobs(
        model,
        prompts,
        responses,
        temperature=1.0,
        tokens_per_batch=config.ppo.micro_batch_tokens or 16384,
    )
    return np.array([float(part.double().sum()) for part in logprobs])


def _unbiased(config: EvaluateConfig) -> bool:
    return config.temperature == 1.0 and config.top_p == 1.0
