"""A policy's own responses to held-out prompts, and how likely they are to it and to the base.

    prompts, generations = generate_responses(config, [folder], prompts, trained=True, ...)

`sarm/evaluation/evaluate.py` scores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarm.config import Config, EvaluateConfig, UserError
from sarm.data.conversations import check_system, prompt_ids, response_text, stop_ids
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
    """n responses: all samples of the first prompt, then of the next; and all of the first policy,
    then of the next.
    """

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
    policies: Sequence[Path],
    prompts: Sequence[Prompt],
    *,
    trained: bool,
    device: str,
    progress: Progress,
    system: str | None = None,
    candidates: int = 1,
) -> tuple[list[Prompt], Generations]:
    """The prompts that fit ppo.max_prompt_tokens, each repeated for its samples and their
    `candidates`, and that for each policy, and a response to each; noise follows prompt, sample and
    candidate, the same for every policy. `system` is put before the conversation, or before its own
    system prompt. Policies, with tokenizers that are alike, are in memory one at a time.

    Both sides of the KL come from one kind of forward: in bf16 the sampler's own log-probabilities
    differ from a teacher-forced pass's by about 0.1 in sum over 32 tokens, in one direction.
    """
    tokenizer = read_tokenizer(policies[0], config.policy.chat_template_kwargs)
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
        check_system(tokenizer)
        told = [prompt_ids(tokenizer, under(system, p.messages)) for p in fitting]
    fitting = [p for p in fitting for _ in draws]
    ids, told = ([tokens for tokens in rows for _ in draws] for rows in (ids, told))
    temperature = config.evaluate.temperature or 1.0
    responses, cut, own = [], [], []
    model: Any = None
    for i, policy in enumerate(policies):
        model = None  # the one before goes before the next comes
        model = open_policy(policy, config.policy.dtype).to(device)
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
            progress=lambda done, total, i=i: progress(  # type: ignore[misc]
                i * total + done, len(policies) * total, "prompts answered"
            ),
        )
        mine = [rollout.ids(row) for row in range(len(ids))]
        progress((i + 1) * len(ids), len(policies) * len(ids), "log-probabilities")
        own.append(_sums(model, told, mine, config, temperature))
        responses += mine
        cut += rollout.truncated.tolist()
    if trained:
        model = None
        folder = local_model(config.policy.model, config.policy.revision)
        model = open_policy(folder, config.policy.dtype).to(device)
    ids, fitting, samples = ids * len(policies), fitting * len(policies), samples * len(policies)
    at_temperature = np.concatenate(own)
    base = at_temperature
    if trained or system is not None:
        base = _sums(model, ids, responses, config, temperature)
    plain = base if temperature == 1.0 else _sums(model, ids, responses, config, 1.0)
    return fitting, Generations(
        ids,
        responses,
        samples,
        [response_text(tokenizer, response) for response in responses],
        cut,
        lambda tokens: response_text(tokenizer, tokens),
        at_temperature - base,
        plain / np.array([len(response) for response in responses]),
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
