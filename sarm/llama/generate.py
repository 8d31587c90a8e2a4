"""Responses of a policy, and the log-probabilities of what was sampled.

    rollout = generate(model, prompts, keys=ids, max_new_tokens=64, temperature=1.0, top_p=1.0,
                       seed=0, eos_ids=..., pad_id=...)

`decoders.py` has the loops, `sampling.py` says which token is drawn. `python -m pytest
tests/llama/test_generate.py` compares with `generate` of transformers.

Notation: b rows, s positions of one forward, t response positions, v the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sarm.llama.decoders import Decoder, Sampling, decoder_for
from sarm.llama.logprobs import logprobs_from_hidden
from sarm.llama.sampling import row_keys
from sarm.llama.weights import base_model


class Rollout(NamedTuple):
    """Of b prompts, in the order given; on the CPU."""

    prompts: list[list[int]]
    responses: Tensor
    """(b, t) int64, right-padded; a stop token is part of the response."""
    mask: Tensor
    """(b, t) bool, True at response tokens."""
    logprobs: Tensor
    """(b, t) float32, of the sampled tokens under softmax(logits / temperature), before top-p; 0
    at padding.
    """
    truncated: Tensor
    """(b,) bool: no stop token within max_new_tokens."""

    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and response."""
        return [len(p) + n for p, n in zip(self.prompts, self.mask.sum(1).tolist(), strict=True)]

    def ids(self, row: int) -> list[int]:
        """A row's response tokens."""
        return self.responses[row][self.mask[row]].tolist()

    def first(self, tokens: Sequence[int]) -> Rollout:
        """The first so many response tokens of each row; the others count no more."""
        longest = max(tokens)
        mask = self.mask & (torch.arange(self.mask.shape[1]) < torch.tensor(tokens)[:, None])
        logprobs = torch.where(mask, self.logprobs, 0.0)
        return self._replace(
            responses=self.responses[:, :longest],
            mask=mask[:, :longest],
            logprobs=logprobs[:, :longest],
        )


# --- sampling


@torch.no_grad()
def generate(
    model: nn.Module | Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    step: int = 0,
    eos_ids: Sequence[int],
    pad_id: int,
    max_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """One response to each prompt, at most `max_rows` at a time, or as many as suit the decoder.

    `keys` name the rows' noise: the same key, seed and step give the same response in any batch, up
    to the rounding of the model's own arithmetic. Give two samples of one prompt two keys.
    `progress(done, total)` is called now and then.
    """
    decoder: Decoder = decoder_for(model) if isinstance(model, nn.Module) else model
    if isinstance(model, nn.Module):
        model.eval()
    sampling = Sampling(max_new_tokens, temperature, top_p, tuple(eos_ids))
    decoded = decoder.decode(prompts, row_keys(seed, step, keys), sampling, max_rows, progress)
    longest = int(decoded.lengths.max()) if len(prompts) else 0
    mask = torch.arange(longest) < decoded.lengths[:, None]
    responses = torch.where(mask, decoded.responses[:, :longest], pad_id)
    last = decoded.responses.gather(1, (decoded.lengths[:, None] - 1).clamp(min=0)).squeeze(1)
    truncated = ~torch.isin(last, torch.tensor(list(eos_ids), dtype=torch.int64))
    return Rollout(
        [list(p) for p in prompts],
        responses,
        mask,
        torch.where(mask, decoded.logprobs[:, :longest], 0.0),
        truncated,
    )


# --- the log-probabilities of given responses


def packs(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each of at most `tokens` padded tokens
    or of one row.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


class Steps(NamedTuple):
    """What sizes are rounded up to, so that batches of like size have one shape."""

    positions: int
    tokens: int


EXACT = Steps(1, 1)


class Teacher(NamedTuple):
    """Prompts and their responses as one right-padded batch; what `forced` makes. Causal attention
    needs no mask.
    """

    ids: Tensor
    """(b, s) int64."""
    predicts: Tensor
    """(n,) int64: positions of `ids.flatten()` whose next token is a response token, row by row."""
    labels: Tensor
    """(n,) int64, those tokens."""


def forced(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
    steps: Steps = EXACT,
) -> Teacher:
    """The batch for teacher forcing, its positions and response tokens rounded up to whole `steps`.

    What is added is `pad_id`, and 0 in `predicts` and `labels`.
    """
    s = _rounded_up(
        max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), steps.positions
    )
    ids = torch.full((len(prompts), s), pad_id)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : len(p) + len(r)] = torch.tensor([*p, *r])
        predicts[row, len(p) - 1 : len(p) + len(r) - 1] = True
    labels = torch.tensor([token for r in responses for token in r], dtype=torch.int64)
    room = (0, _rounded_up(len(labels), steps.tokens) - len(labels))
    # As numbers: indexing with booleans on a GPU would wait for it to count them.
    return Teacher(
        ids.to(device),
        F.pad(predicts.flatten().nonzero().squeeze(1), room).to(device),
        F.pad(labels, room).to(device),
    )


def _rounded_up(n: int, step: int) -> int:
    return -(-n // step) * step


@torch.no_grad()
def response_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float,
    tokens_per_batch: int,
) -> list[Tensor]:
    """Each response's (t,) float32 log-probabilities, on the CPU; the language-model head sees
    response positions only.
    """
    model.eval()
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    device = next(model.parameters()).device
    for batch in packs(
        [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], tokens_per_batch
    ):
        teacher = forced([prompts[i] for i in batch], [responses[i] for i in batch], 0, device)
        base: Any = base_model(model)
        hidden = (
            base.model(input_ids=teacher.ids, use_cache=False)
            .last_hidden_state.flatten(0, 1)
            .index_select(0, teacher.predicts)
        )
        logprobs = logprobs_from_hidden(
            hidden, base.lm_head, teacher.labels, temperature
        ).logprobs.cpu()
        for i, part in zip(batch, logprobs.split([len(responses[i]) for i in batch]), strict=True):
            found[i] = part
    return found
