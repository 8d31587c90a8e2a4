"""What some latents do at every token of a text, before and after TopK.

    found = token_activations(model, tokenizer, conversations, [3, 17], max_length=2048)

The reward reads the last position alone; the others say where in a text a latent begins to fire.
There the SAE may never have been trained, so that their size is a hint and no measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sarm.data.conversations import tokenize_conversations
from sarm.data.formats import Messages
from sarm.reward_model.model import SarmModel

WINDOW = 160
"""Tokens of a text that are kept: those that end at the reward position."""


class TokenActivations(NamedTuple):
    """Of one text, its last tokens up to the reward position."""

    tokens: list[str]
    """(t,) joined, they are the text, but for characters that are several tokens."""
    a: NDArray[np.float32]
    """(t, latents) preactivations"""
    kept: NDArray[np.bool_]
    """(t, latents) whether TopK keeps it"""

    def of(self, place: int) -> dict[str, Any]:
        """One latent as JSON holds it: `a` by token, and the places at which it is `kept`."""
        return {
            "a": [round(float(value), 4) for value in self.a[:, place]],
            "kept": np.flatnonzero(self.kept[:, place]).tolist(),
        }


def token_activations(
    model: SarmModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    latents: Sequence[int],
    *,
    max_length: int,
    window: int = WINDOW,
) -> list[TokenActivations]:
    """One forward a text, as they are few."""
    found = []
    wanted = torch.tensor(list(latents), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        for text in tokenize_conversations(tokenizer, conversations, max_length):
            a = model.sae.preactivations(every_state(model, text.ids)[-window:])
            kept = torch.zeros_like(a, dtype=torch.bool)
            kept.scatter_(1, model.sae.topk(a).indices, True)
            tokens = [
                str(tokenizer.decode([id_], clean_up_tokenization_spaces=False))
                for id_ in text.ids[-window:]
            ]
            found.append(
                TokenActivations(
                    tokens, a[:, wanted].float().cpu().numpy(), kept[:, wanted].cpu().numpy()
                )
            )
    return found


def every_state(model: SarmModel, ids: Sequence[int]) -> Tensor:
    """The residual stream after the source layer at every position of one row, (t, d_in); the
    final norm is not applied.
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        caught.append(output if isinstance(output, Tensor) else output[0])

    handle = model.model.layers[-1].register_forward_hook(catch)
    try:
        model.model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        handle.remove()
    return caught[0][0]
