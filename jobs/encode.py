"""Score every text once, keeping states and TopK ranks: `python -m jobs encode --config C --run R
--unit shard-0000-of-0001`.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
from safetensors.torch import save_file

from sarm.config import Config, UserError, shard_range
from sarm.data.conversations import spelled_special_tokens
from sarm.data.datasets import load_data, texts_to_encode
from sarm.reward_model.model import load_sarm
from sarm.reward_model.scoring import encode_texts
from sarm.run import Attempt, RunDir


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Encode this shard's share of the discovery, validation and test texts."""
    attempt.read("fetch")  # what was fetched, by hash, is where this run's provenance begins
    texts = texts_to_encode(load_data(config.data))
    if not texts:
        raise UserError(
            "no pair falls in discovery, validation or test; give those parts a share in"
            " data.sources.NAME.split"
        )
    start, stop = shard_range(unit, len(texts))
    mine = texts[start:stop]
    model, tokenizer = load_sarm(config.sarm)
    encoded = encode_texts(
        model,
        tokenizer,
        [text.messages for text in mine],
        extra_ranks=config.encode.extra_ranks,
        tokens_per_batch=config.sarm.tokens_per_batch,
        max_length=config.sarm.max_length,
        progress=lambda done, total: attempt.progress(done, total, "texts"),
    )
    table = pd.DataFrame(
        {
            "row": np.arange(start, stop),
            "text_id": [text.id for text in mine],
            "prompt_id": [text.prompt_id for text in mine],
            "source": [text.source for text in mine],
            "part": [text.part for text in mine],
            "label": [text.label for text in mine],
            "n_tokens": encoded.n_tokens.numpy(),
            "reward": encoded.rewards.numpy(),
            "truncated": encoded.truncated.numpy(),
            "spelled": [spelled_special_tokens(tokenizer, text.messages) for text in mine],
        }
    )
    table.to_parquet(attempt.path("texts.parquet"), index=False)
    tensors = {
        "indices": encoded.indices,
        "values": encoded.values,
        "rewards": encoded.rewards,
        "states": encoded.states,
    }
    tensors["head_weight"] = model.head_weight.detach().float().cpu()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        attempt.path("encoded.safetensors"),
    )
    spelling = int((table["spelled"] > 0).sum())
    if spelling:
        print(
            f"note: {spelling} of {len(table)} texts spell special tokens of the SARM's tokenizer,"
            f" such as {table.loc[table['spelled'] > 0, 'text_id'].iloc[0]}; they are read as the"
            " letters that they are",
            file=sys.stderr,
        )
    attempt.publish(
        range_=(start, stop),
        total=len(texts),
        device=str(model.device),
        k=model.k,
        d_sae=model.d_sae,
        spelling_texts=spelling,
    )
