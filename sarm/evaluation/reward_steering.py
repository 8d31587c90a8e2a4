"""What an intervention set does to the reward model's rewards of fixed texts; never a policy.

    rows, pairs = steering_rows(encoded, test_pairs, steps)          # `python -m jobs steer`
    summary = steering_summary(rows, pairs, labels, draws, seed)

`python -m pytest tests/evaluation/test_reward_steering.py` compares with brute force.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sarm.config import UserError
from sarm.data.datasets import Pair, text_id
from sarm.evaluation.intervals import clustered_interval
from sarm.probing.effects import Encoded
from sarm.reward_model.interventions import (
    Ablate,
    AfterTopK,
    Intervention,
    Ranks,
    Scale,
    reward_changes,
    rewards_of,
)


def steering_rows(
    encoded: Encoded, pairs: Sequence[Pair], steps: Sequence[Intervention]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row per text, a row per pair) of the test part: reward and margin before, after, and
    after TopK re-selection.

    The re-selected variant removes before TopK the latents that `steps` multiply by 0, so it is NaN
    for other steps, and where the set is larger than the ranks that encode kept.
    """
    test = (encoded.texts["part"] == "test").to_numpy()
    ranks = Ranks(
        encoded.ranks.indices[test],
        encoded.ranks.values[test],
        encoded.ranks.k,
        encoded.ranks.d_sae,
    )
    before = rewards_of(ranks, encoded.head_weight)
    rows = encoded.texts.loc[test, ["text_id", "prompt_id", "source", "label"]].reset_index(
        drop=True
    )
    rows["before"] = before
    rows["after"] = before + reward_changes(steps, ranks, encoded.head_weight)
    rows["after_reselected"] = before + _reselected_changes(steps, ranks, encoded.head_weight)
    at = {id_: i for i, id_ in enumerate(rows["text_id"])}
    try:
        chosen = [at[f"{_response_id(pair, pair.chosen)}-c"] for pair in pairs]
        rejected = [at[f"{_response_id(pair, pair.rejected)}-r"] for pair in pairs]
    except KeyError as error:
        raise UserError(
            f"text {error} of a test pair was not encoded; the data changed since: run encode again"
            " in a new run"
        ) from None
    margins = {
        "pair_id": [p.id for p in pairs],
        "prompt_id": [p.prompt.id for p in pairs],
        "source": [p.source for p in pairs],
    }
    for name in ("before", "after", "after_reselected"):
        margins[f"margin_{name}"] = (
            rows[name].to_numpy()[chosen] - rows[name].to_numpy()[rejected]
        ).tolist()
    return rows, pd.DataFrame(margins)


def _reselected_changes(
    steps: Sequence[Intervention], ranks: Ranks, weight: np.ndarray
) -> np.ndarray:
    removed = [step.latent for step in steps if isinstance(step, Scale) and step.factor == 0]
    if len(removed) < len(steps):
        return np.full(len(ranks.indices), np.nan)
    try:
        return reward_changes([Ablate(tuple(removed), before_topk=True)], ranks, weight)
    except UserError:
        return np.full(len(ranks.indices), np.nan)


def _response_id(pair: Pair, response: str) -> str:
    return text_id((*pair.prompt.messages, {"role": "assistant", "content": response}))


def steering_summary(
    rows: pd.DataFrame, pairs: pd.DataFrame, labels: Mapping[str, str], draws: int, seed: int
) -> dict[str, Any]:
    """Means, Deltas, margins, pair accuracy and rank flips by source, with prompt-clustered 95 %
    intervals.

    `labels` gives each source its name in tables, and their order. A margin above 0 counts as
    right; a flip is a pair that is right on one side of the intervention alone.
    """
    texts, margins = [], []
    for source, name in labels.items():
        for label in ("chosen", "rejected"):
            mine = rows[(rows["source"] == source) & (rows["label"] == label)]
            if len(mine):
                texts.append({"source": name, "label": label, **_means(mine, "", draws, seed)})
        mine = pairs[pairs["source"] == source]
        if len(mine):
            right, right_after = mine["margin_before"] > 0, mine["margin_after"] > 0
            accuracy = {
                f"accuracy_{side}": float((mine[f"margin_{side}"] > 0).mean())
                for side in ("before", "after", "after_reselected")
            }
            if mine["margin_after_reselected"].isna().any():
                del accuracy["accuracy_after_reselected"]
            flips = {
                "to_wrong": int((right & ~right_after).sum()),
                "to_right": int((~right & right_after).sum()),
            }
            margins.append(
                {"source": name, **_means(mine, "margin_", draws, seed), **accuracy, **flips}
            )
    return {"texts": texts, "pairs": margins}


def _means(table: pd.DataFrame, prefix: str, draws: int, seed: int) -> dict[str, Any]:
    """Before, after and Delta of one column over a table's rows, the Delta with its interval; None
    for what is not known.
    """
    before, after, reselected = (
        table[f"{prefix}{name}"].to_numpy(float) for name in ("before", "after", "after_reselected")
    )
    clusters = table["prompt_id"].to_numpy(str)
    low, high = clustered_interval(after - before, clusters, draws, seed)
    numbers = {
        "before": before.mean(),
        "after": after.mean(),
        "delta": (after - before).mean(),
        "delta_low": low,
        "delta_high": high,
        "delta_reselected": (reselected - before).mean(),
    }
    known = {
        f"{prefix}{name}": float(number) if np.isfinite(number) else None
        for name, number in numbers.items()
    }
    return {"n": len(table), "n_prompts": len(np.unique(clusters)), **known}


def describe(steps: Sequence[AfterTopK]) -> str:
    """The intervention in words."""
    if all(isinstance(step, Scale) and step.factor == 0 for step in steps):
        return "times 0 after TopK"
    words = [f"{step.latent} {step.words}" for step in steps]
    return "after TopK " + ", ".join(words)
