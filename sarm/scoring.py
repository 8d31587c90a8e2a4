"""Conversations to sparse latents, states and rewards, in batches: `encode_texts`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sarm.config import UserError
from sarm.model import SarmModel
from sarm.tokens import Messages, tokenize_conversations


class Encoded(NamedTuple):
    """What a SARM makes of n conversations, in the order they were given; on the CPU."""

    indices: Tensor
    """(n, k + extra) int32"""
    values: Tensor
    """(n, k + extra) float32, descending; ranks beyond k are runners-up, no latents"""
    rewards: Tensor
    """(n,) float32"""
    states: Tensor
    """(n, d_in) float32, at the reward position"""
    n_tokens: Tensor
    """(n,) int32, after truncation"""
    truncated: Tensor
    """(n,) bool: oldest tokens dropped to fit"""
    eot_appended: Tensor
    """(n,) bool: the last turn was left open"""


def encode_texts(
    model: SarmModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    *,
    extra_ranks: int,
    tokens_per_batch: int,
    max_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Encode and score conversations, in batches of like length of at most `tokens_per_batch` padded tokens.

    Which batch a text falls in changes its figures by rounding alone. `progress` hears of (texts done, texts).
    Raises UserError where TopK is off or a state is not finite.
    """
    if not model.config.use_topk:
        raise UserError(f"{model.config.name_or_path} runs no TopK before its head, so it has no sparse latents to encode; use a TopK SARM")
    tokenized = tokenize_conversations(tokenizer, conversations, max_length)
    n, ranks = len(tokenized), min(model.k + extra_ranks, model.d_sae)
    dtype = model.sae.pre_bias.dtype
    states = torch.empty(n, model.config.hidden_size, dtype=dtype)
    values, indices = torch.empty(n, ranks, dtype=dtype), torch.empty(n, ranks, dtype=torch.int32)
    rewards, done = torch.empty(n, dtype=dtype), 0
    with torch.inference_mode():
        for rows in length_batches([len(t.ids) for t in tokenized], tokens_per_batch):
            batch = [tokenized[row] for row in rows]
            ids = torch.tensor([id_ for t in batch for id_ in t.ids])
            h = model.packed_states(ids.to(model.device), [len(t.ids) for t in batch])
            if not h.isfinite().all():
                bad = rows[int((~h.isfinite().all(-1)).nonzero()[0])]
                where = f"{model.config.name_or_path} gives a state that is not finite on conversation {bad}"
                raise UserError(f"{where}; set sarm.dtype to float32 or check its weights")
            top = model.sae.topk(model.sae.preactivations(h), ranks)
            states[rows], values[rows], indices[rows] = h.cpu(), top.values.cpu(), top.indices.cpu().int()
            rewards[rows] = model.rewards(top.values[:, : model.k], top.indices[:, : model.k]).cpu()
            done += len(rows)
            if progress is not None:
                progress(done, n)
    return Encoded(
        indices,
        values,
        rewards,
        states,
        torch.tensor([len(t.ids) for t in tokenized], dtype=torch.int32),
        torch.tensor([t.truncated for t in tokenized], dtype=torch.bool),
        torch.tensor([t.eot_appended for t in tokenized], dtype=torch.bool),
    )


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Rows in batches of like length, longest first, each padded to at most `tokens_per_batch` tokens or of one row."""
    rows: list[int] = []
    # Longest first: what does not fit in memory fails at once.
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if rows and lengths[rows[0]] * (len(rows) + 1) > tokens_per_batch:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
