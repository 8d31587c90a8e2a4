"""Conversations to sparse latents, states and rewards, in batches: `encode_texts`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sarm.config import UserError
from sarm.data.conversations import Messages, Tokenized, tokenize_conversations
from sarm.llama.packed import Packed, pack
from sarm.reward_model.model import SarmModel

GROUPS_AT_ONCE = 64
"""Prompts whose texts are tokenised together: enough for all cores, few enough that a GPU soon has
its first batch.
"""


Tokenize = Callable[[PreTrainedTokenizerBase, Sequence[Messages], int], list[Tokenized]]


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
    tokenize: Tokenize = tokenize_conversations,
) -> Encoded:
    """Encode and score conversations, in batches of at most `tokens_per_batch` tokens or of one
    conversation.

    Responses to one prompt go into one batch where they fit, so that their prompt is computed once.
    Which batch a text falls in changes its figures by rounding alone. `progress` hears of (texts
    done, texts). Raises UserError where TopK is off or a state is not finite.
    """
    if not model.config.use_topk:
        raise UserError(
            f"{model.config.name_or_path} runs no TopK before its head, so it has no sparse latents"
            " to encode; use a TopK SARM"
        )
    n, ranks, dtype = (
        len(conversations),
        min(model.k + extra_ranks, model.d_sae),
        model.sae.pre_bias.dtype,
    )
    encoded = Encoded(
        indices=torch.empty(n, ranks, dtype=torch.int32),
        values=torch.empty(n, ranks, dtype=dtype),
        rewards=torch.empty(n, dtype=dtype),
        states=torch.empty(n, model.config.hidden_size, dtype=dtype),
        n_tokens=torch.empty(n, dtype=torch.int32),
        truncated=torch.empty(n, dtype=torch.bool),
        eot_appended=torch.empty(n, dtype=torch.bool),
    )
    done = 0
    with torch.inference_mode():
        batches = _packed_batches(
            tokenizer, conversations, tokens_per_batch, max_length, model.device, tokenize
        )
        batch = next(batches, None)
        while batch is not None:
            states = model.packed_states(batch.packed)
            following = next(batches, None)  # tokenised while a GPU is at work on this one
            latents = model.sae.topk(model.sae.preactivations(states), ranks)
            rewards = model.rewards(latents.values[:, : model.k], latents.indices[:, : model.k])
            rows, finite, states = batch.rows, states.isfinite().all(-1).cpu(), states.cpu()
            if not finite.all():
                bad = rows[int((~finite).nonzero()[0])]
                where = (
                    f"{model.config.name_or_path} gives a state that is not finite on conversation"
                    f" {bad}"
                )
                raise UserError(f"{where}; set sarm.dtype to float32 or check its weights")
            encoded.indices[rows], encoded.values[rows] = (
                latents.indices.cpu().int(),
                latents.values.cpu(),
            )
            encoded.rewards[rows], encoded.states[rows] = rewards.cpu(), states
            encoded.n_tokens[rows] = torch.tensor(
                [len(t.ids) for t in batch.texts], dtype=torch.int32
            )
            encoded.truncated[rows] = torch.tensor([t.truncated for t in batch.texts])
            encoded.eot_appended[rows] = torch.tensor([t.eot_appended for t in batch.texts])
            done += len(rows)
            if progress is not None:
                progress(done, n)
            batch = following
    return encoded


class _Batch(NamedTuple):
    rows: list[int]
    """Which conversations."""
    texts: list[Tokenized]
    packed: Packed


def _packed_batches(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    tokens_per_batch: int,
    max_length: int,
    device: torch.device,
    tokenize: Tokenize,
) -> Iterator[_Batch]:
    """All conversations, each batch made when it is asked for."""

    def tokenized() -> Iterator[tuple[list[int], list[Tokenized]]]:
        groups = prompt_groups(conversations)
        for at in range(0, len(groups), GROUPS_AT_ONCE):
            piece = groups[at : at + GROUPS_AT_ONCE]
            texts = iter(
                tokenize(
                    tokenizer, [conversations[row] for rows in piece for row in rows], max_length
                )
            )
            yield from ((rows, list(islice(texts, len(rows)))) for rows in piece)

    for rows, texts in batched(tokenized(), tokens_per_batch):
        yield _Batch(rows, texts, pack([text.ids for text in texts], device))


def prompt_groups(conversations: Sequence[Messages]) -> list[list[int]]:
    """The conversations that differ in their last turn alone, together; the longest, by letters,
    first.
    """
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for row, messages in enumerate(conversations):
        groups.setdefault(tuple((m["role"], m["content"]) for m in messages[:-1]), []).append(row)
    # What does not fit in memory is to fail at once.
    letters = {
        rows[0]: max(sum(len(m["content"]) for m in conversations[row]) for row in rows)
        for rows in groups.values()
    }
    return sorted(groups.values(), key=lambda rows: -letters[rows[0]])


def batched(
    groups: Iterable[tuple[list[int], list[Tokenized]]], tokens_per_batch: int
) -> Iterator[tuple[list[int], list[Tokenized]]]:
    """Groups in batches of at most `tokens_per_batch` tokens or of one text; only a group larger
    than a batch is split.
    """
    rows: list[int] = []
    texts: list[Tokenized] = []
    room = tokens_per_batch
    for group, group_texts in groups:
        if rows and sum(len(text.ids) for text in group_texts) > room:
            yield rows, texts
            rows, texts, room = [], [], tokens_per_batch
        for row, text in zip(group, group_texts, strict=True):
            if rows and len(text.ids) > room:
                yield rows, texts
                rows, texts, room = [], [], tokens_per_batch
            rows.append(row)
            texts.append(text)
            room -= len(text.ids)
    if rows:
        yield rows, texts
