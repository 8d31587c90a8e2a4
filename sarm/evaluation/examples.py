"""Which of a policy's own responses show what a watched latent does, and what it does there at
every token: `own_examples(config, features, prompts, texts, whose, watched, sarm)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from sarm.config import Config
from sarm.data.datasets import Prompt
from sarm.ppo.reward import conversation
from sarm.records import Features, OwnExamples
from sarm.reward_model.model import SarmModel
from sarm.reward_model.token_activations import token_activations

EMPTY: dict[str, Any] = {"texts": [], "examples": []}
MOST = {"top": 3, "below": 2, "random": 2}
"""Responses of each kind, by latent and policy."""


def own_examples(
    config: Config,
    features: Features,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    whose: Mapping[str, Any],
    watched: pd.DataFrame,
    sarm: tuple[SarmModel, PreTrainedTokenizerBase],
) -> OwnExamples:
    """`texts` are the responses as they are scored, row by row, `whose` the columns that say which
    they are, `watched` the latents' values.
    """
    latents = list(dict.fromkeys([*(p.latent for p in features.penalised), *features.monitors]))
    chosen = chosen_rows(pd.DataFrame(whose), watched, latents, config.seed)
    rows = sorted({row for row, _, _ in chosen})
    if not rows:
        return OwnExamples(**EMPTY)
    model, tokenizer = sarm
    read = token_activations(
        model,
        tokenizer,
        [tuple(conversation(prompts[row].messages, texts[row])) for row in rows],
        latents,
        max_length=config.sarm.max_length,
    )
    place = {row: i for i, row in enumerate(rows)}
    found: dict[str, Any] = {
        "texts": [
            {name: column[row] for name, column in whose.items()} | {"tokens": read[i].tokens}
            for i, row in enumerate(rows)
        ],
        "examples": [
            {
                "latent": latent,
                "what": what,
                "text": place[row],
                "z": float(watched[f"z_{latent}"].iloc[row]),
                **read[place[row]].of(latents.index(latent)),
            }
            for row, latent, what in chosen
        ],
    }
    return OwnExamples(**found)


def chosen_rows(
    whose: pd.DataFrame, watched: pd.DataFrame, latents: Sequence[int], seed: int
) -> list[tuple[int, int, str]]:
    """(row, latent, what) by distance: the largest z, the largest value just below TopK's cutoff,
    and of the silent ones some at random; at most one a prompt and kind.
    """
    found = []
    for _, mine in whose.groupby("distance", dropna=False, sort=True):
        rows = mine.index.to_numpy()
        for latent in latents:
            z = watched[f"z_{latent}"].to_numpy(float)[rows]
            below = watched[f"below_{latent}"].to_numpy(float)[rows]
            shuffled = np.random.default_rng([seed, latent]).permutation(len(rows))
            for what, order, wanted in (
                ("top", np.argsort(-z, kind="stable"), z > 0),
                ("below", np.argsort(-below, kind="stable"), below > 0),
                ("random", shuffled, (z <= 0) & (below <= 0)),
            ):
                taken: dict[str, int] = {}
                for i in order[wanted[order]]:
                    if len(taken) < MOST[what]:
                        taken.setdefault(str(mine["prompt_id"].iloc[i]), int(rows[i]))
                found += [(row, latent, what) for row in taken.values()]
    return found
