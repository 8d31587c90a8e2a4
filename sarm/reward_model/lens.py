"""Which words a latent's decoder direction would make more and less likely, were it added to the
last layer's state: the logit lens (nostalgebraist 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru).

`lens_words(policy_folder, directions, tokenizer)`. The layers between the SARM's and the last are
left out, so that it is a hint, the better the later the SARM's layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sarm.model_files import Weights

WORDS = 10
UNEMBEDDINGS = ("lm_head.weight", "model.embed_tokens.weight")
"""The second where the two are tied."""
NORM = "model.norm.weight"


def lens_words(
    folder: Path, directions: Tensor, tokenizer: PreTrainedTokenizerBase, n: int = WORDS
) -> tuple[list[dict[str, Any]], str]:
    """(a row a direction (m, d_in) with the n words that gain most and lose most, each with its
    logit for a unit direction; why there are none, or an empty string).
    """
    weights = Weights(folder)
    name = next((name for name in UNEMBEDDINGS if name in weights), None)
    if name is None or NORM not in weights:
        return [], "the policy's files hold no unembedding under a Llama's names"
    unembedding, norm = weights.read(name), weights.read(NORM)
    if unembedding.shape[1] != directions.shape[1]:
        return [], "the policy's states are not as wide as the SARM's"
    logits = (directions.float() * norm.float()) @ unembedding.float().T
    rows = []
    for row in logits:
        up, down = row.topk(n), (-row).topk(n)
        rows.append(
            {
                "up": [
                    {"word": tokenizer.decode([int(i)]), "logit": float(row[i])} for i in up.indices
                ],
                "down": [
                    {"word": tokenizer.decode([int(i)]), "logit": float(row[i])}
                    for i in down.indices
                ],
            }
        )
    return rows, ""
