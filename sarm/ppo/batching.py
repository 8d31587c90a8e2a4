"""Which prompts a step draws, and which rows an update takes: pure functions of seed and step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from sarm.config import PpoConfig, UserError
from sarm.data.conversations import prompt_ids
from sarm.data.datasets import Prompt


class Fitting(NamedTuple):
    """The prompts to train on, their tokens, and how many were too long."""

    prompts: list[Prompt]
    ids: list[list[int]]
    too_long: int


def fitting_prompts(
    ppo: PpoConfig,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
) -> Fitting:
    """Those of at most `ppo.max_prompt_tokens`, the others as `ppo.long_prompts` says; `context` is
    the policy's. Raises UserError where none is left or one too long is refused.
    """
    limit, way = ppo.max_prompt_tokens, ppo.long_prompts
    if context is not None and limit + ppo.max_new_tokens > context:
        raise UserError(
            f"ppo.max_prompt_tokens {limit} and max_new_tokens {ppo.max_new_tokens} exceed"
            f" the policy's context of {context}; lower one"
        )
    found = [(p, prompt_ids(tokenizer, p.messages)) for p in prompts]
    too_long = [p.id for p, ids in found if len(ids) > limit]
    if too_long and way == "refuse":
        raise UserError(
            f"{len(too_long)} of the {len(prompts)} ppo prompts have more than"
            f" ppo.max_prompt_tokens={limit} tokens ({', '.join(too_long[:5])} ...); raise it"
            " or set ppo.long_prompts to skip or truncate"
        )
    if way == "truncate":
        found = [
            (p, ids if len(ids) <= limit else [*ids[:1], *ids[len(ids) - limit + 1 :]])
            for p, ids in found
        ]
    found = [(p, ids) for p, ids in found if len(ids) <= limit]
    if not found:
        raise UserError(
            f"none of the {len(prompts)} ppo prompts has at most {limit} tokens; raise"
            " ppo.max_prompt_tokens or give part ppo other data"
        )
    return Fitting([p for p, _ in found], [ids for _, ids in found], len(too_long))


class Mix(NamedTuple):
    """Safe and other prompts, by row, and how many of those drawn are safe."""

    safe: list[int]
    unsafe: list[int]
    share: Fraction


def mix_of(ppo: PpoConfig, prompts: Sequence[Prompt]) -> Mix | None:
    """None where prompts are drawn as they come. Raises UserError where a kind that is to be drawn
    is missing.
    """
    if ppo.safe_share is None:
        return None
    share = Fraction(repr(ppo.safe_share))
    safe = [row for row, p in enumerate(prompts) if p.kind == "safe"]
    unsafe = [row for row, p in enumerate(prompts) if p.kind != "safe"]
    for kind, rows, wanted in (("safe", safe, share), ("unsafe", unsafe, 1 - share)):
        if wanted and not rows:
            raise UserError(
                f"ppo.safe_share is {ppo.safe_share}, and part ppo has no {kind} prompts that fit;"
                f" give a source of kind {kind} a `ppo` fraction in data.sources, or leave"
                " safe_share out"
            )
    return Mix(safe, unsafe, share)


@lru_cache(maxsize=4)
def _epoch_order(ids: tuple[str, ...], seed: int, epoch: int) -> list[int]:
    return sorted(
        range(len(ids)), key=lambda i: hashlib.sha256(f"{seed}/{epoch}/{ids[i]}".encode()).digest()
    )


def rows_of_step(
    ids: Sequence[str],
    seed: int,
    step: int,
    batch_size: int,
    samples: int = 1,
    mix: Mix | None = None,
) -> list[int]:
    """Which prompts step `step` draws, `samples` times each, side by side: pass after pass over all
    of them, each pass in an order of its own. With a `mix`, so for either kind, safe prompts in
    their share of all that were ever drawn, to within one.
    """
    prompts = batch_size // samples
    rows = []
    for at in range(step * prompts, (step + 1) * prompts):
        group: Sequence[int] = range(len(ids))
        if mix is not None:
            safe = floor(at * mix.share)  # drawn before
            is_safe = floor((at + 1) * mix.share) > safe
            group, at = (mix.safe, safe) if is_safe else (mix.unsafe, at - safe)
        order = _epoch_order(tuple(ids[row] for row in group), seed, at // len(group))
        rows.append(group[order[at % len(group)]])
    return [row for row in rows for _ in range(samples)]


def mini_batches(n: int, parts: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """`n` rows in `parts` equal random parts; as they are where there is one part."""
    if parts == 1:
        return [list(range(n))]
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}/{step}/{epoch}".encode()).digest()[:6], "little")
    )
    order = torch.randperm(n, generator=generator).tolist()
    return [order[part * n // parts : (part + 1) * n // parts] for part in range(parts)]
