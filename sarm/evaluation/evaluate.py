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
from sarm.data.conversations import prompt_ids, response_text, stop_ids
from sarm.data.datasets import Prompt
from sarm.evaluation.judge import judged
from sarm.evaluation.refusals import detector_quality, refused
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
    """Of n prompts, in their order."""

    prompts: list[list[int]]
    responses: list[list[int]]
    """Token ids, a stop token included."""
    texts: list[str]
    truncated: list[bool]
    kl: np.ndarray
    """(n,) see `KL_TOLD`"""


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
    """(a row a prompt, the settings behind them) for the policy in a folder; `trained` where it is
    not the base itself.

    One model is in memory at a time: the policy, the base, the SARM, the judge.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts, generations = generate_responses(
        config, policy, prompts, trained=trained, device=device, progress=progress
    )
    progress(0, len(prompts), "scoring")
    watched, scores, parameters = score_responses(config, features, prompts, generations.texts)
    table = pd.DataFrame(
        {
            "prompt_id": [p.id for p in prompts],
            "source": [p.source for p in prompts],
            "kind": [p.kind for p in prompts],
            "category": [p.category for p in prompts],
            "prompt": [p.messages[-1]["content"] for p in prompts],
            "response": generations.texts,
            "n_tokens": [len(ids) for ids in generations.responses],
            "truncated": generations.truncated,
            "reward": scores.reward.numpy(),
            "penalty": scores.penalty.numpy(),
            "refused": [refused(text) for text in generations.texts],
            "kl": generations.kl,
            "harm": judged(config.evaluate.judge, prompts, generations.texts, device),
        }
    )
    z = np.concatenate([scores.z.numpy(), scores.monitors_z.numpy()], axis=1)
    table = pd.concat(
        [table, pd.DataFrame(z, columns=[f"z_{latent}" for latent in watched])], axis=1
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
        "refusal_detector": detector_quality(),
        "temperature": config.evaluate.temperature,
        "top_p": config.evaluate.top_p,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "sarm_parameters": parameters,
        "device": device,
    }
    return table, settings


def generate_responses(
    config: Config,
    policy: Path,
    prompts: Sequence[Prompt],
    *,
    trained: bool,
    device: str,
    progress: Progress,
) -> tuple[list[Prompt], Generations]:
    """The prompts that fit ppo.max_prompt_tokens, and one response each; noise follows the prompt,
    the same for every policy.

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
    stops = stop_ids(model, tokenizer)
    rollout = generate(
        model,
        ids,
        keys=[p.id for p in fitting],
        max_new_tokens=config.evaluate.max_new_tokens,
        temperature=config.evaluate.temperature,
        top_p=config.evaluate.top_p,
        seed=config.seed,
        eos_ids=stops,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
        progress=lambda done, total: progress(done, total, "prompts answered"),
    )
    responses = [rollout.ids(row) for row in range(len(ids))]
    kl = np.zeros(len(ids))
    if trained:
        progress(0, len(ids), "log-probabilities")
        own = _sums(model, ids, responses, config)
        del model
        base = local_model(config.policy.model, config.policy.revision)
        reference = open_policy(base, config.policy.dtype).to(device)
        kl = own - _sums(reference, ids, responses, config)
    texts = [response_text(tokenizer, response) for response in responses]
    return fitting, Generations(ids, responses, texts, rollout.truncated.tolist(), kl)


def score_responses(
    config: Config, features: Features, prompts: Sequence[Prompt], texts: Sequence[str]
) -> tuple[list[int], Any, int]:
    """(latents, scores, parameters): z of the penalised, monitor and candidate latents by one
    forward a text, no clamping.

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
        model, tokenizer, features.model_copy(update={"monitors": others}), unclamped, config.sarm
    )
    scores = reward.score(
        [conversation(p.messages, text) for p, text in zip(prompts, texts, strict=True)]
    )
    parameters = sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("sae.decoder")
    )
    return [*penalised, *others], scores, parameters


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
