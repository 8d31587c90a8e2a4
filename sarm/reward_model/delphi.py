"""Latents at the reward position in the layout of delphi's cache, whose explainers and scorers
then read them.

    write_cache(folder, ranks, windows, hookpoint="layers.14", model_name="owner/sarm", shards=8)

A folder `latents/HOOKPOINT` with config.json and one START_END.safetensors a range of latents (END
inclusive): `locations` (m, 3) of text, position and latent less START, `activations` (m,), and
`tokens` (n, w), the same in every file. As read by delphi/latents/loader.py of
https://github.com/EleutherAI/delphi (eai-delphi 0.1.3).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from sarm.reward_model.interventions import Ranks

SMALLEST = 1e-5
"""delphi keeps values whose absolute value is above this."""


def reward_windows(ids: Sequence[Sequence[int]], width: int, pad_id: int) -> NDArray[np.int64]:
    """The last `width` tokens of each text, padded on the left, (n, width): the reward position is
    the last column.
    """
    windows = np.full((len(ids), width), pad_id, dtype=np.int64)
    for row, tokens in enumerate(ids):
        end = list(tokens)[-width:]
        windows[row, width - len(end) :] = end
    return windows


def write_cache(
    folder: Path,
    ranks: Ranks,
    windows: NDArray[np.int64],
    *,
    hookpoint: str,
    model_name: str,
    shards: int,
) -> Path:
    """Write the cache and return the folder that delphi's LatentDataset takes as `raw_dir`.

    Row i of `windows` (n, w) are the tokens of text i of `ranks`, the reward position last. Only
    that position has latents: give delphi `example_ctx_len = w`, so that a text is one window.
    """
    module = folder / "latents" / hookpoint
    module.mkdir(parents=True)
    n, width = windows.shape
    latents, values = ranks.indices[:, : ranks.k].astype(np.int64), ranks.values[:, : ranks.k]
    texts = np.broadcast_to(np.arange(n)[:, None], latents.shape)
    edges = [ranks.d_sae * i // shards for i in range(shards + 1)]
    for start, stop in itertools.pairwise(edges):
        mine = (latents >= start) & (latents < stop) & (np.abs(values) > SMALLEST)
        order = np.lexsort([texts[mine], latents[mine]])
        locations = np.stack(
            [texts[mine], np.full(mine.sum(), width - 1), latents[mine] - start], axis=1
        )[order]
        small = max(n, width, stop - start) <= 2**16
        tensors = {
            "locations": locations.astype(np.uint16 if small else np.uint32),
            "activations": values[mine][order].astype(np.float32),
            "tokens": windows,
        }
        save_file(tensors, module / f"{start}_{stop - 1}.safetensors")
    config = {
        "model_name": model_name,
        "dataset_repo": "the texts of a SARM run, one a row of tokens",
        "dataset_split": "train",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": width,
        "ctx_len": width,
        "n_tokens": n * width,
        "n_splits": shards,
    }
    (module / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder / "latents"
