"""What tells the two sides apart without the SAE: probes on the dense states, and the words alone.

rows = baselines(table, encoded, data, config)     # pair accuracies
said = words_alone(rows)                           # a sentence where words do as well
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray
from scipy.special import expit

from sarm.config import Config
from sarm.data.datasets import Data, Pair, pairs_in
from sarm.probing.contrast import Floats, Ints
from sarm.probing.effects import Encoded, row_of

FOLDS, L2 = 5, (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the two logistic regressions."""
SARM, WORDS = "SARM reward", "TF-IDF of the words"


def baselines(
    table: pd.DataFrame, encoded: Encoded, data: Data, config: Config
) -> list[dict[str, Any]]:
    """Pair accuracy of the SARM, of parts of it, of two probes on the dense states and of TF-IDF on
    the responses' words, the last three fitted on discovery's pairs and on nothing else.

    On validation and on the test pairs of every source; standard errors are clustered by prompt.
    `behind` is the SARM's accuracy less the row's, with its own standard error. Where no latent is
    confirmed there are no rows for the SARM's parts.
    """
    from sarm.training.heads import clustered_accuracy, pair_points  # brings transformers

    rows_of = {id_: row for row, id_ in enumerate(encoded.texts["text_id"])}
    x = encoded.states.astype(np.float64)
    x = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    discovery = pairs_in(data, "discovery")
    fit = pair_rows(discovery, rows_of)
    difference = x[fit.chosen] - x[fit.rejected]
    confirmed = table.index[table["confirmed"]].to_numpy(np.int64)
    ranks, w = encoded.ranks, encoded.head_weight.astype(np.float64)
    kept = ranks.indices[:, : ranks.k]
    part = np.where(np.isin(kept, confirmed), w[kept] * ranks.values[:, : ranks.k], 0.0).sum(axis=1)
    reward = (w[kept] * ranks.values[:, : ranks.k]).sum(axis=1)
    scores = {
        SARM: reward,
        **(
            {
                f"its {len(confirmed)} confirmed latents": part,
                "SARM reward without them": reward - part,
            }
            if len(confirmed)
            else {}
        ),
        "difference in means": x @ (fit.weight @ difference),
        "logistic probe": x @ logistic_probe(difference, fit.weight, fit.prompts),
    }
    words = word_scores(discovery, fit.weight, fit.prompts)
    sets = {"validation": pairs_in(data, "validation")}
    sets |= {
        f"{source.label}, test": pairs_in(data, "test", name)
        for name, source in config.data.sources.items()
    }
    result = []
    for where, pairs in sets.items():
        if not pairs:
            continue
        rows, prompts = pair_rows(pairs, rows_of), [p.prompt.id for p in pairs]
        points = {
            name: pair_points(score[rows.chosen] - score[rows.rejected])
            for name, score in scores.items()
        }
        points[WORDS] = pair_points(
            words([p.chosen for p in pairs]) - words([p.rejected for p in pairs])
        )
        for name, mine in points.items():
            accuracy = clustered_accuracy(mine, prompts)
            behind = clustered_accuracy(points[SARM] - mine, prompts, (-1.0, 1.0))
            result.append(
                {
                    "on": where,
                    "score": name,
                    "accuracy": accuracy.mean,
                    "standard_error": accuracy.standard_error,
                    "pairs": accuracy.pairs,
                    "prompts": accuracy.prompts,
                    "behind": behind.mean,
                    "behind_error": behind.standard_error,
                }
            )
    return result


def words_alone(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What validation's rows of `baselines` say of the words: a sentence where the SARM is not
    shown to do better than they, which says whether they are shown to do better than it.
    """
    on = {row["score"]: row for row in rows if row["on"] == "validation"}
    if WORDS not in on or on[WORDS]["behind"] > 1.96 * on[WORDS]["behind_error"]:
        return None
    ahead, margin = -on[WORDS]["behind"], 1.96 * on[WORDS]["behind_error"]
    known = (
        f"(pair accuracy {on[WORDS]['accuracy']:.2f} against {on[SARM]['accuracy']:.2f} on"
        f" validation, {ahead:+.2f}, 95 % CI {ahead - margin:+.2f} to {ahead + margin:+.2f})"
    )
    if ahead > margin:
        said = (
            "The words of the responses alone, fitted to discovery's pairs, tell chosen from"
            f" rejected better than the SARM does {known}"
        )
    else:
        said = (
            "The words of the responses alone, fitted to discovery's pairs, are not shown to tell"
            f" chosen from rejected less well than the SARM does {known}"
        )
    return f"{said}, so what moves the margin may be register, such as refusing, and not harm."


def word_scores(
    pairs: Sequence[Pair], weight: Floats, prompts: Ints
) -> Callable[[Sequence[str]], Floats]:
    """Scores of texts, from a Bradley-Terry fit to TF-IDF of words and pairs of words of the
    pairs' responses, its L2 strength chosen over prompt folds; `weight` (n_pairs,) and `prompts`
    (n_pairs,), a number each.

    TF-IDF as scikit-learn's default: smoothed idf, rows of length 1.
    """
    from sarm.training.heads import fit_head

    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    frequency = Counter(word for text in {*chosen, *rejected} for word in set(words_of(text)))
    column = {word: i for i, word in enumerate(sorted(frequency))}
    n = len({*chosen, *rejected})
    idf = np.array([math.log((1 + n) / (1 + frequency[word])) + 1 for word in column])

    def tf_idf(texts: Sequence[str]) -> scipy.sparse.csr_array:
        counts = [Counter(w for w in words_of(text) if w in column) for text in texts]
        lengths = [len(count) for count in counts]
        matrix = scipy.sparse.csr_array(
            (
                np.array([c for count in counts for c in count.values()], np.float64),
                np.array([column[w] for count in counts for w in count], np.int64),
                np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            ),
            shape=(len(texts), len(column)),
        )
        matrix = scipy.sparse.csr_array(matrix * idf)
        norm = np.sqrt(np.asarray(matrix.power(2).sum(axis=1)))
        return scipy.sparse.csr_array(
            scipy.sparse.diags_array(1 / np.where(norm > 0, norm, 1)) @ matrix
        )

    difference = scipy.sparse.csr_array(tf_idf(chosen) - tf_idf(rejected))

    def head(rows: NDArray[np.bool_], l2: float) -> Floats:
        return fit_head(difference[rows], weight[rows], l2, max_steps=200)

    w = head(np.ones(len(pairs), bool), chosen_l2(difference, weight, prompts, head))
    return lambda texts: tf_idf(texts) @ w


def words_of(text: str) -> list[str]:
    """Words of two letters or more, and neighbouring two of them."""
    words = re.findall(r"\b\w\w+\b", text.lower())
    return [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]


def chosen_l2(
    difference: Any,
    weight: Floats,
    prompts: Ints,
    fit: Callable[[NDArray[np.bool_], float], Floats],
) -> float:
    """The strength of `L2` whose fits do best on the prompts of other folds; `fit` takes which
    pairs, and a strength. The least where there are too few prompts for folds.
    """
    folds = prompts % FOLDS
    if len(np.unique(folds)) < FOLDS:
        return L2[0]
    losses = np.zeros(len(L2))
    for fold, (number, strength) in itertools.product(range(FOLDS), enumerate(L2)):
        out = folds == fold
        margin = difference[out] @ fit(~out, strength)
        losses[number] += weight[out] @ np.logaddexp(0, -margin)
    return L2[int(losses.argmin())]


def logistic_probe(difference: Floats, weight: Floats, prompts: Ints) -> Floats:
    """The direction w (d_in,) of a Bradley-Terry fit to differences (n_pairs, d_in), its L2
    strength chosen over prompt folds.
    """

    def fit(rows: NDArray[np.bool_], l2: float) -> Floats:
        return bradley_terry(difference[rows], weight[rows] / weight[rows].sum(), l2)

    everything = np.ones(len(difference), bool)
    return fit(everything, chosen_l2(difference, weight, prompts, fit))


def bradley_terry(difference: Floats, weight: Floats, l2: float) -> Floats:
    """The w that minimises `sum_p weight_p softplus(-w . difference_p) + l2/2 |w|^2`, by Newton's
    method with step halving.

    It lies in the span of the differences, so with fewer pairs than dimensions it is sought there.
    """
    basis = np.linalg.qr(difference.T)[0] if len(difference) < difference.shape[1] else None
    x = difference @ basis if basis is not None else difference
    w = np.zeros(x.shape[1])

    def loss(w: Floats) -> float:
        return float(weight @ np.logaddexp(0, -(x @ w)) + l2 / 2 * (w @ w))

    for _ in range(100):
        off = expit(-(x @ w))
        gradient = l2 * w - x.T @ (weight * off)
        step = np.linalg.solve(
            l2 * np.eye(len(w)) + x.T @ ((weight * off * (1 - off))[:, None] * x), gradient
        )
        if gradient @ step < 1e-14:
            break
        size = 1.0
        while size > 1e-6 and loss(w - size * step) > loss(w) - 1e-4 * size * (gradient @ step):
            size /= 2
        w = w - size * step
    return w if basis is None else basis @ w


class PairRows(NamedTuple):
    """Pairs as rows of the encoded texts; all (n_pairs,)."""

    chosen: Ints
    rejected: Ints
    prompts: NDArray[Any]
    weight: Floats
    """one over the pairs of the prompt, adding up to one over all"""


def pair_rows(pairs: Sequence[Pair], rows_of: Mapping[str, int]) -> PairRows:
    sides = [
        np.array(
            [row_of(p, response, rows_of) for p, response in zip(pairs, texts, strict=True)],
            np.int64,
        )
        for texts in _responses(pairs)
    ]
    prompts, number, count = np.unique(
        [p.prompt.id for p in pairs], return_inverse=True, return_counts=True
    )
    return PairRows(sides[0], sides[1], number, 1 / count[number] / max(len(prompts), 1))


def _responses(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    return [p.chosen for p in pairs], [p.rejected for p in pairs]
