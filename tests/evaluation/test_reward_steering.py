"""Steering tables against brute force and by hand."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from sarm.config import UserError
from sarm.data.datasets import Pair, Prompt, text_id
from sarm.evaluation.intervals import clustered_interval
from sarm.evaluation.reward_steering import describe, steering_rows, steering_summary
from sarm.probing.effects import Encoded
from sarm.reward_model.interventions import Add, Ranks, Scale

K, D_SAE, DEPTH = 3, 12, 6


def made_up(n: int = 8) -> tuple[Encoded, list[Pair], np.ndarray]:
    """(encoded texts of n/2 test prompts, their pairs, the dense pre-activations (n, d_sae) behind
    them).
    """
    rng = np.random.default_rng(0)
    dense = rng.normal(1, 1, (n, D_SAE)).astype(np.float32)
    order = np.argsort(-dense, axis=1)[:, :DEPTH]
    pairs, rows = [], []
    for i in range(n // 2):
        prompt = Prompt(
            f"p{i}",
            ({"role": "user", "content": f"question {i}"},),
            "a" if i < 2 else "b",
            "unsafe",
            "",
            "test",
        )
        pairs.append(Pair(f"x{i}", prompt, prompt.source, f"good {i}", f"bad {i}"))
        for label, response in (("chosen", f"good {i}"), ("rejected", f"bad {i}")):
            id_ = text_id((*prompt.messages, {"role": "assistant", "content": response}))
            rows.append(
                {
                    "text_id": f"{id_}-{label[0]}",
                    "prompt_id": prompt.id,
                    "source": prompt.source,
                    "part": "test",
                    "label": label,
                }
            )
    ranks = Ranks(order.astype(np.int32), np.take_along_axis(dense, order, axis=1), K, D_SAE)
    return (
        Encoded(
            pd.DataFrame(rows),
            ranks,
            np.zeros((n, 2), np.float32),
            rng.normal(size=D_SAE).astype(np.float32),
        ),
        pairs,
        dense,
    )


def brute_rewards(
    dense: np.ndarray, weight: np.ndarray, change=lambda z: z, hidden: tuple[int, ...] = ()
) -> np.ndarray:
    """TopK over all latents but the hidden ones, `change` applied to the dense z, head."""
    seen = dense.astype(np.float64).copy()
    seen[:, list(hidden)] = -np.inf
    kept = seen >= np.sort(seen, axis=1)[:, [-K]]
    return change(np.where(kept, seen, 0.0)) @ weight.astype(np.float64)


def times_zero(z: np.ndarray) -> np.ndarray:
    z = z.copy()
    z[:, [4, 7]] = 0
    return z


def test_steering_rows_agree_with_brute_force():
    encoded, pairs, dense = made_up()
    rows, margins = steering_rows(encoded, pairs, [Scale(4, 0.0), Scale(7, 0.0)])
    w = encoded.head_weight
    assert rows["before"].to_numpy() == pytest.approx(brute_rewards(dense, w))
    assert rows["after"].to_numpy() == pytest.approx(brute_rewards(dense, w, times_zero))
    assert rows["after_reselected"].to_numpy() == pytest.approx(
        brute_rewards(dense, w, hidden=(4, 7))
    )
    assert not np.allclose(rows["after"], rows["before"]) and not np.allclose(
        rows["after"], rows["after_reselected"]
    )
    assert margins["margin_after"].to_numpy() == pytest.approx(
        rows["after"].to_numpy()[::2] - rows["after"].to_numpy()[1::2]
    )


def test_only_test_texts_are_steered_and_additions_have_no_reselected_variant():
    encoded, pairs, _ = made_up()
    encoded.texts.loc[:1, "part"] = "validation"
    rows, _ = steering_rows(encoded, pairs[1:], [Add(2, 1.5)])
    assert len(rows) == 6
    # ungated
    assert (rows["after"] - rows["before"]).to_numpy() == pytest.approx(
        np.full(6, 1.5 * encoded.head_weight[2])
    )
    assert rows["after_reselected"].isna().all()
    assert steering_rows(encoded, pairs[1:], [Scale(2, 2.0)])[0]["after_reselected"].isna().all()
    summary = steering_summary(
        rows, steering_rows(encoded, pairs[1:], [Add(2, 1.5)])[1], {"a": "A", "b": "B"}, 50, 0
    )
    assert (
        summary["texts"][0]["delta_reselected"] is None
        and "accuracy_after_reselected" not in summary["pairs"][0]
    )
    json.dumps(summary, allow_nan=False)


def test_a_set_beyond_the_ranks_kept_has_no_reselected_variant():
    encoded, pairs, _ = made_up()
    rows, _ = steering_rows(encoded, pairs, [Scale(i, 0.0) for i in range(D_SAE)])
    assert rows["after_reselected"].isna().all() and rows["after"].to_numpy() == pytest.approx(
        np.zeros(8), abs=1e-9
    )


def test_a_pair_that_encode_has_not_seen_is_named():
    encoded, pairs, _ = made_up()
    with pytest.raises(UserError, match="was not encoded"):
        steering_rows(encoded, [pairs[0]._replace(chosen="another")], [Scale(4, 0.0)])


def test_steering_summary_by_hand():
    rows = pd.DataFrame(
        {
            "prompt_id": ["p", "p", "q", "q"],
            "source": "s",
            "label": ["chosen", "rejected"] * 2,
            "before": [1.0, 0.0, 0.5, 0.7],
            "after": [1.0, 1.5, 0.5, 0.2],
            "after_reselected": [1.0, 0.5, 0.5, 0.6],
        }
    )
    pairs = pd.DataFrame(
        {
            "prompt_id": ["p", "q"],
            "source": "s",
            "margin_before": [1.0, -0.2],
            "margin_after": [-0.5, 0.3],
            "margin_after_reselected": [0.5, -0.1],
        }
    )
    summary = steering_summary(rows, pairs, {"absent": "None", "s": "RB2 Safety"}, 2000, 0)
    chosen, rejected = summary["texts"]
    assert chosen == {
        "source": "RB2 Safety",
        "label": "chosen",
        "n": 2,
        "n_prompts": 2,
        "before": 0.75,
        "after": 0.75,
        "delta": 0.0,
        "delta_low": None,  # two prompts that agree bound nothing
        "delta_high": None,
        "delta_reselected": 0.0,
    }
    assert (rejected["before"], rejected["after"], rejected["delta"]) == pytest.approx(
        (0.35, 0.85, 0.5)
    )
    # two prompts: one of them alone
    assert (rejected["delta_low"], rejected["delta_high"]) == pytest.approx((-0.5, 1.5))
    (pair,) = summary["pairs"]
    assert pair["source"] == "RB2 Safety"
    assert (pair["margin_before"], pair["margin_after"], pair["margin_delta"]) == pytest.approx(
        (0.4, -0.1, -0.5)
    )
    assert (
        pair["accuracy_before"],
        pair["accuracy_after"],
        pair["to_wrong"],
        pair["to_right"],
    ) == (0.5, 0.5, 1, 1)


def test_describe():
    assert describe([Scale(4, 0.0), Scale(7, 0.0)]) == "times 0 after TopK"
    assert describe([Scale(4, 2.0), Add(9, 1.0)]) == "after TopK 4 times 2, 9 plus 1"


def test_a_tie_is_not_right():
    margins = {"margin_before": [0.0, 0.5], "margin_after": [0.25, 0.0]}
    pairs = pd.DataFrame(
        {"prompt_id": ["p", "q"], "source": "s", **margins, "margin_after_reselected": [0.0, 0.0]}
    )
    rows = pd.DataFrame(columns=["prompt_id", "source", "label"])
    (pair,) = steering_summary(rows, pairs, {"s": "S"}, 20, 0)["pairs"]
    assert (pair["accuracy_before"], pair["accuracy_after"]) == (0.5, 0.5)
    assert pair["accuracy_after_reselected"] == 0.0
    assert (pair["to_wrong"], pair["to_right"]) == (1, 1)


def test_rows_and_margins_in_whole():
    """In the order of texts and of pairs, which is another one."""
    encoded, pairs, dense = made_up()
    encoded.texts.index = range(10, 18)
    pairs = [pairs[2], pairs[0]._replace(source="elsewhere")]
    steps = [Scale(4, 0.0), Scale(7, 0.5)]
    rows, margins = steering_rows(encoded, pairs, steps)
    before = brute_rewards(dense, encoded.head_weight)

    def change(z: np.ndarray) -> np.ndarray:
        z = z.copy()
        z[:, 4], z[:, 7] = 0, z[:, 7] / 2
        return z

    after = brute_rewards(dense, encoded.head_weight, change)
    want = encoded.texts.reset_index(drop=True).drop(columns="part")
    want = want.assign(before=before, after=after, after_reselected=np.nan)
    pd.testing.assert_frame_equal(rows, want)
    pd.testing.assert_frame_equal(
        margins,
        pd.DataFrame(
            {
                "pair_id": ["x2", "x0"],
                "prompt_id": ["p2", "p0"],
                "source": ["b", "elsewhere"],
                "margin_before": [before[4] - before[5], before[0] - before[1]],
                "margin_after": [after[4] - after[5], after[0] - after[1]],
                "margin_after_reselected": [np.nan, np.nan],
            }
        ),
    )
    missing = pairs[0]._replace(rejected="another")
    id_ = text_id((*missing.prompt.messages, {"role": "assistant", "content": "another"}))
    with pytest.raises(UserError) as refused:
        steering_rows(encoded, [missing], steps)
    assert str(refused.value) == (
        f"text '{id_}-r' of a test pair was not encoded; the data changed since: run encode again"
        " in a new run"
    )


def test_a_summary_in_whole():
    """Three prompts of which one has two texts a label, two sources in the order of their names;
    of the second no text was reselected.
    """
    rng = np.random.default_rng(0)
    prompts = ["p", "p", "q", "r"]
    texts = pd.DataFrame(
        [
            {"prompt_id": p, "source": s, "label": label}
            for s in ("s", "t")
            for label in ("rejected", "chosen")
            for p in prompts
        ]
    )
    pairs = pd.DataFrame([{"prompt_id": p, "source": s} for s in ("s", "t") for p in prompts])
    names = ("before", "after", "after_reselected")
    for name in names:
        texts[name] = rng.normal(size=16)
        pairs[f"margin_{name}"] = rng.normal(size=8)
    texts.loc[texts["source"] == "t", "after_reselected"] = np.nan
    pairs.loc[pairs["source"] == "t", "margin_after_reselected"] = np.nan
    found = steering_summary(texts, pairs, {"t": "T", "s": "S", "u": "U"}, 60, 9)

    def numbers(mine: pd.DataFrame, prefix: str) -> dict[str, object]:
        before, after, again = (mine[f"{prefix}{name}"].to_numpy() for name in names)
        low, high = clustered_interval(after - before, np.array(prompts), 60, 9)
        reselected = (again - before).mean()
        return {
            "n": 4,
            "n_prompts": 3,
            f"{prefix}before": before.mean(),
            f"{prefix}after": after.mean(),
            f"{prefix}delta": (after - before).mean(),
            f"{prefix}delta_low": low,
            f"{prefix}delta_high": high,
            f"{prefix}delta_reselected": None if np.isnan(reselected) else reselected,
        }

    assert found["texts"] == [
        {
            "source": s.upper(),
            "label": label,
            **numbers(texts[(texts["source"] == s) & (texts["label"] == label)], ""),
        }
        for s in ("t", "s")
        for label in ("chosen", "rejected")
    ]
    want = []
    for s in ("t", "s"):
        mine = pairs[pairs["source"] == s]
        sides = {name: (mine[f"margin_{name}"] > 0).to_numpy() for name in names}
        accuracy = {f"accuracy_{name}": right.mean() for name, right in sides.items()}
        if s == "t":
            del accuracy["accuracy_after_reselected"]
        was, is_ = sides["before"], sides["after"]
        flips = {"to_wrong": (was & ~is_).sum(), "to_right": (~was & is_).sum()}
        want.append({"source": s.upper(), **numbers(mine, "margin_"), **accuracy, **flips})
    assert found["pairs"] == want
    assert [list(row) for row in found["pairs"]] == [list(row) for row in want]
    assert sorted(found) == ["pairs", "texts"]
    assert [(p["to_wrong"], p["to_right"]) for p in want] == [(1, 2), (0, 1)]
