"""A policy's own responses to held-out prompts, and how likely they are to it and to the base.

    prompts, generations = generate_responses(config, folder, prompts, trained=True, ...)

`sarm/evaluation/evaluate.py` scores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarm.config import Config, EvaluateConfig, UserError
from sarm.data.conversations import prompt_ids, response_text, stop_ids
from sarm.data.datasets import Prompt
from sarm.data.endings import Ending, ending
from sarm.data.fields import Messages
from sarm.hub import local_model
from sarm.llama.generate import generate, response_logprobs
from sarm.models import open_policy, read_tokenizer

Progress = Callable[[int, int, str], None]

KL_TOLD = (
    "sum over a response's tokens of log pi - log base, both teacher-forced at the sampling"
    " temperature; a mean over samples"
)
BEST_OF_TOLD = (
    "at most log n - (n - 1) / n nats for the best of n = {n} responses by the compound reward"
    " (arXiv 2401.01879); this bound stands for the KL, which is not measured"
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
    """(n,) under the base policy at temperature 1, nats per token."""

    def of(self, rows: Sequence[int]) -> Generations:
        """Those responses alone."""

        def some(values: list[Any]) -> list[Any]:
            return [values[row] for row in rows]

        return Generations(
            some(self.prompts),
            some(self.responses),
            some(self.samples),
            some(self.texts),
            some(self.truncated),
            self.decode,
            self.kl[list(rows)],
            self.base_logprob[list(rows)],
        )


def generate_responses(
    config: Config,
    policy: Path,
    prompts: Sequence[Prompt],
    *,
    trained: bool,
    device: str,
    progress: Progress,
    system: str | None = None,
    candidates: int = 1,
) -> tuple[list[Prompt], Generations]:
    """The prompts that fit ppo.max_prompt_tokens, each repeated for its samples and their
    `candidates`, and a response to each; noise follows prompt, sample and candidate, the same for
    every policy. `system` is put before the conversation, or before its own system prompt.

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
    draws = [(i, j) for i in range(config.evaluate.samples) for j in range(candidates)]
    samples = [i for i, _ in draws] * len(fitting)
    # The first sample's noise does not depend on how many there are, nor its first candidate's.
    keys = [
        p.id + (f"#{i}" if i else "") + (f"/{j}" if j else "") for p in fitting for i, j in draws
    ]
    told = ids
    if system is not None:
        told = [prompt_ids(tokenizer, under(system, p.messages)) for p in fitting]
    fitting = [p for p in fitting for _ in draws]
    ids, told = ([tokens for tokens in rows for _ in draws] for rows in (ids, told))
    stops = stop_ids(model, tokenizer)
    rollout = generate(
        model,
        told,
        keys=keys,
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
    temperature = config.evaluate.temperature or 1.0
    own = base = _sums(model, told, responses, config, temperature)
    if trained:
        del model
        folder = local_model(config.policy.model, config.policy.revision)
        model = open_policy(folder, config.policy.dtype).to(device)
    if trained or system is not None:
        base = _sums(model, ids, responses, config, temperature)
    plain = base if temperature == 1.0 else _sums(model, ids, responses, config, 1.0)
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
        plain / lengths,
    )


def under(system: str, messages: Messages) -> Messages:
    """A conversation under a system prompt, which goes before one that it has already."""
    first, *rest = messages
    if first["role"] == "system":
        return ({"role": "system", "content": f"{system}\n\n{first['content']}"}, *rest)
    return ({"role": "system", "content": system}, *messages)


def endings_of(config: Config, generations: Generations) -> list[Ending]:
    """What of each response the SARM scores."""
    trim = config.responses.cut == "trim"
    return [
        ending(generations.decode, ids, cut=cut, trim=trim)
        for ids, cut in zip(generations.responses, generations.truncated, strict=True)
    ]


def _sums(
    model: Any,
    prompts: list[list[int]],
    responses: list[list[int]],
    config: Config,
    temperature: float,
) -> np.ndarray:
    """(n,) each response's log-probability."""
    logprobs = response_logprobs(
        model,
        prompts,
        responses,
        temperature=temperature,
        tokens_per_batch=config.ppo.micro_batch_tokens or 16384,
    )
    return np.array([float(part.double().sum()) for part in logprobs])


def kl_told(config: EvaluateConfig) -> str:
    """What the KL that is measured is, in words."""
    if config.temperature > 0 and config.top_p == 1.0:
        return KL_TOLD
    greedy = "greedy" if config.temperature == 0 else "of a top-p below 1"
    return f"{KL_TOLD}; the samples are {greedy}, so it is no estimate of the KL divergence"


def best_of_kl(n: int) -> float:
    """What the KL of the best of n to the sampled policy is at most, in nats (Beirami et al.
    2024).
    """
    return math.log(n) - (n - 1) / n
