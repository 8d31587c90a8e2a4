"""What speaks for and against a selection: matched nulls, shuffled labels, replication, dense
baselines, sensitivity.

    features["validity"] = validity(table, encoded, data, config, device)

All of it is computed after the selection and changes nothing in it. Each function returns plain
rows for features.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import scipy.stats
from numpy.typing import NDArray
from scipy.special import expit

from sarm.config import Config
from sarm.data.datasets import ENCODED_PARTS, Data, Pair, pairs_in
from sarm.probing.effects import (
    Encoded,
    by_latent,
    contrast_of,
    contrasts_of,
    row_of,
    tested_latents,
)
from sarm.probing.permutation import (
    Contrast,
    Floats,
    Ints,
    permutation_p,
    permutations_needed,
    permuted_labels,
)
from sarm.probing.stats import benjamini_hochberg, bootstrap_intervals, holm, prompt_effects
from sarm.reward_model.interventions import contributions

NULL_DRAWS = 1000
NEAREST = 20
"""Matched latents to draw from, for each latent of a role."""
FIRST = 1000
"""Permutations after which latents that chance matched often stop, in the repeated tests here."""
FEWEST_PROMPTS = 20
"""A source with fewer prompts neither replicates nor is replicated."""
REPLICATED_P = 0.05
SIZES = (0.25, 0.5, 0.75)
FOLDS, L2 = 5, (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the logistic probe."""


def validity(
    table: pd.DataFrame, encoded: Encoded, data: Data, config: Config, device: str = "cpu"
) -> dict[str, Any]:
    """`table` as `sarm.probing.select.judged` gives it, a row a latent."""
    contrasts = contrasts_of(data, encoded)
    return {
        "matched_null": matched_null(table, config),
        "shuffled_labels": shuffled_labels(encoded, contrasts, config, device),
        "replication": replication(encoded, data, config, device),
        "baselines": baselines(table, encoded, data, config),
        "sensitivity": sensitivity(table, encoded, contrasts, config, device),
    }


class Found(NamedTuple):
    """One run of the discovery on one contrast; all (d_sae,)."""

    tested: NDArray[np.bool_]
    effect: Floats
    p: Floats
    """NaN where not tested"""
    discovered: NDArray[np.bool_]


def discover(encoded: Encoded, contrast: Contrast, config: Config, seed: int, device: str) -> Found:
    """What the probe does for discovery, with early stopping after `FIRST` permutations."""
    ranks, d_sae = encoded.ranks, encoded.ranks.d_sae
    tested = tested_latents(ranks, contrast, 0, d_sae, config.probe.min_prompts_active)
    values = latent_contributions(encoded, contrast, config)
    p = np.full(d_sae, np.nan)
    if tested.any():
        needed = permutations_needed(int(tested.sum()), config.select.fdr)
        p[tested] = permutation_p(
            values[np.flatnonzero(tested)], contrast, FIRST, needed, seed, device
        )
    effect = np.asarray(values @ contrast.labels) / max(contrast.n_prompts, 1)
    return Found(tested, effect, p, benjamini_hochberg(p) <= config.select.fdr)


def latent_contributions(
    encoded: Encoded, contrast: Contrast, config: Config
) -> scipy.sparse.csr_array:
    """The configured effect of every latent on every text of a contrast, (d_sae, n)."""
    reselected = config.select.effect == "reselected"
    return by_latent(
        encoded.ranks,
        contributions(encoded.ranks, encoded.head_weight, reselected=reselected),
        contrast.rows,
        0,
        encoded.ranks.d_sae,
    )


# Nulls


def matched_null(table: pd.DataFrame, config: Config) -> list[dict[str, Any]]:
    """The confirmed latents of each role against as many others matched on activity and |w|: mean
    effect on validation.

    The others come from all tested latents, discoveries of other roles included, so the null is no
    easier than it should be.
    """
    rows = []
    tiny = 1e-9
    activity = (table["density_chosen"] + table["density_rejected"]).to_numpy() / 2
    matched_on = np.stack(
        [np.log(activity + tiny), np.log(table["weight"].abs().to_numpy() + tiny)], axis=1
    )
    effect = table["effect_validation"].to_numpy()
    for role in ("promoting", "harming", "misleading"):
        mine = table.index[
            table["confirmed"] & table["candidate"] & (table["role"] == role)
        ].to_numpy(np.int64)
        pool = (
            table.index[table["tested"] & (table["weight"] != 0)]
            .difference(list(mine))
            .to_numpy(np.int64)
        )
        if not len(mine) or len(pool) < len(mine) or np.isnan(effect[pool]).all():
            continue
        rng = np.random.default_rng([config.seed, 4])
        observed, nearest = float(effect[mine].mean()), _nearest(mine, pool, matched_on)
        null = np.array([effect[_one_each(nearest, rng)].mean() for _ in range(NULL_DRAWS)])
        low, high = np.quantile(null, [0.025, 0.975])
        p = (1 + int((np.abs(null) >= abs(observed)).sum())) / (1 + NULL_DRAWS)
        rows.append(
            {
                "role": role,
                "latents": len(mine),
                "effect": observed,
                "null": float(null.mean()),
                "null_low": float(low),
                "null_high": float(high),
            }
        )
        rows[-1]["p"] = p
    return rows


def _nearest(targets: Ints, pool: Ints, features: Floats) -> list[Ints]:
    """For each target the `NEAREST` of the pool most like it, every feature in units of its
    spread.
    """
    scaled = features / np.maximum(features[[*targets, *pool]].std(axis=0), 1e-12)
    return [
        pool[
            np.argsort(np.square(scaled[pool] - scaled[target]).sum(axis=1), kind="stable")[
                :NEAREST
            ]
        ]
        for target in targets
    ]


def _one_each(nearest: Sequence[Ints], rng: np.random.Generator) -> list[int]:
    """One latent for each target, none twice while there are others."""
    drawn: list[int] = []
    for latents in nearest:
        free = latents[~np.isin(latents, drawn)]
        drawn.append(int(rng.choice(free if len(free) else latents)))
    return drawn


def shuffled_labels(
    encoded: Encoded, contrasts: Mapping[str, Contrast], config: Config, device: str
) -> list[dict[str, Any]]:
    """Discoveries, and confirmations of them, when chosen and rejected are dealt anew within
    prompts: all of them false.
    """
    draws = config.select.stability_repeats
    if not draws or not contrasts["discovery"].n_prompts:
        return []
    dealt = {
        part: next(permuted_labels(contrast, draws, config.seed + 101))
        for part, contrast in contrasts.items()
        if contrast.n_prompts
    }
    rows = []
    for draw in range(draws):
        shuffled = {
            part: _relabelled(contrasts[part], labels[:, draw]) for part, labels in dealt.items()
        }
        found = discover(encoded, shuffled["discovery"], config, config.seed, device)
        confirmed = (
            confirm(encoded, found, shuffled["validation"], config, device)
            if "validation" in shuffled
            else found.discovered & False
        )
        rows.append({"discoveries": int(found.discovered.sum()), "confirmed": int(confirmed.sum())})
    return rows


def _relabelled(contrast: Contrast, labels: Floats) -> Contrast:
    return contrast._replace(chosen=np.maximum(labels, 0), rejected=np.maximum(-labels, 0))


def confirm(
    encoded: Encoded, found: Found, contrast: Contrast, config: Config, device: str
) -> NDArray[np.bool_]:
    """Which discoveries have the same sign and Holm p < 0.05 on another contrast, (d_sae,)."""
    effect, p = tested_again(encoded, np.flatnonzero(found.discovered), contrast, config, device)
    confirmed = np.zeros(len(found.tested), bool)
    confirmed[found.discovered] = (holm(p) < REPLICATED_P) & (
        np.sign(effect) == np.sign(found.effect[found.discovered])
    )
    return confirmed


def tested_again(
    encoded: Encoded, latents: Ints, contrast: Contrast, config: Config, device: str
) -> tuple[Floats, Floats]:
    """Effect and p of some latents on another contrast. One that never fires there has an effect
    of 0 and p 1.
    """
    values = latent_contributions(encoded, contrast, config)[latents]
    effect = np.asarray(values @ contrast.labels) / max(contrast.n_prompts, 1)
    needed = permutations_needed(max(len(latents), 1), REPLICATED_P)
    return effect, permutation_p(values, contrast, FIRST, 20 * needed, config.seed + 7, device)


# Replication


def replication(encoded: Encoded, data: Data, config: Config, device: str) -> list[dict[str, Any]]:
    """From every source to every other: latents found on all pairs of the one that replicate on
    all pairs of the other.

    *Replicates* = same sign and Holm p < 0.05 over the first's discoveries. A prompt in both counts
    for the first alone.
    """
    pairs = {
        name: [p for part in ENCODED_PARTS for p in pairs_in(data, part, name)]
        for name in config.data.sources
    }
    pairs = {
        name: mine
        for name, mine in pairs.items()
        if len({p.prompt.id for p in mine}) >= FEWEST_PROMPTS
    }
    if len(pairs) < 2:
        return []
    rows_of = {id_: row for row, id_ in enumerate(encoded.texts["text_id"])}
    found = {
        name: discover(encoded, contrast_of(mine, rows_of), config, config.seed, device)
        for name, mine in pairs.items()
    }
    result = []
    for first, second in itertools.permutations(pairs, 2):
        known = {p.prompt.id for p in pairs[first]}
        contrast = contrast_of([p for p in pairs[second] if p.prompt.id not in known], rows_of)
        if contrast.n_prompts < FEWEST_PROMPTS:
            continue
        a, b = found[first], found[second]
        latents = np.flatnonzero(a.discovered)
        effect, p = tested_again(encoded, latents, contrast, config, device)
        adjusted = holm(p)
        replicates = (adjusted < REPLICATED_P) & (np.sign(effect) == np.sign(a.effect[latents]))
        both = a.tested & b.tested
        result.append(
            {
                "from": config.data.sources[first].label,
                "to": config.data.sources[second].label,
                "prompts": contrast.n_prompts,
                "discovered": len(latents),
                "replicated": int(replicates.sum()),
                "same_sign": int((np.sign(effect) == np.sign(a.effect[latents])).sum()),
                "opposite_and_significant": int(
                    (
                        (adjusted < REPLICATED_P) & (np.sign(effect) == -np.sign(a.effect[latents]))
                    ).sum()
                ),
                "rank_correlation": rank_correlation(a.effect[both], b.effect[both]),
                "latents_in_both": int(both.sum()),
                "rank_correlation_discovered": rank_correlation(a.effect[latents], effect),
                "not_replicated": [int(latent) for latent in latents[~replicates]],
            }
        )
    return result


def feature_replication(
    features: Sequence[dict[str, Any]], encoded: Encoded, data: Data, config: Config, device: str
) -> dict[int, list[dict[str, Any]]]:
    """The listed latents on each source that neither discovery nor validation read, by latent;
    Holm over the listed ones.
    """
    rows_of = {id_: row for row, id_ in enumerate(encoded.texts["text_id"])}
    latents = np.array(sorted({f["latent"] for f in features}), np.int64)
    sign = {f["latent"]: np.sign(f["effect_discovery"]) for f in features}
    result: dict[int, list[dict[str, Any]]] = {int(latent): [] for latent in latents}
    for name, source in config.data.sources.items():
        pairs = pairs_in(data, "test", name)
        if (
            not len(latents)
            or not pairs
            or source.split.get("discovery")
            or source.split.get("validation")
        ):
            continue
        contrast = contrast_of(pairs, rows_of)
        effect, p = tested_again(encoded, latents, contrast, config, device)
        low, high = bootstrap_intervals(
            prompt_effects(latent_contributions(encoded, contrast, config)[latents], contrast),
            config.probe.bootstrap,
            config.seed,
        )
        for latent, *numbers, adjusted in zip(
            latents.tolist(), effect, low, high, p, holm(p), strict=True
        ):
            known = {
                key: None if np.isnan(x) else float(x)
                for key, x in zip(
                    ("effect", "effect_low", "effect_high", "p"), numbers, strict=True
                )
            }
            replicates = bool(adjusted < REPLICATED_P and np.sign(numbers[0]) == sign[latent])
            result[latent].append(
                {
                    "source": source.label,
                    "prompts": contrast.n_prompts,
                    **known,
                    "p_holm": float(adjusted),
                    "replicates": replicates,
                }
            )
    return result


def rank_correlation(x: Floats, y: Floats) -> float | None:
    """Spearman's; None where it is not defined."""
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return None
    return float(scipy.stats.spearmanr(x, y).statistic)


# Baselines beside the SAE


def baselines(
    table: pd.DataFrame, encoded: Encoded, data: Data, config: Config
) -> list[dict[str, Any]]:
    """Pair accuracy of the SARM, of parts of it, and of two probes on the dense states fitted on
    discovery's pairs.

    On validation and on the test pairs of every source; standard errors are clustered by prompt.
    """
    from sarm.training.train import clustered_accuracy, pair_points  # brings transformers

    rows_of = {id_: row for row, id_ in enumerate(encoded.texts["text_id"])}
    x = encoded.states.astype(np.float64)
    x = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    fit = pair_rows(pairs_in(data, "discovery"), rows_of)
    difference = x[fit.chosen] - x[fit.rejected]
    confirmed = table.index[table["confirmed"]].to_numpy(np.int64)
    ranks, w = encoded.ranks, encoded.head_weight.astype(np.float64)
    kept = ranks.indices[:, : ranks.k]
    part = np.where(np.isin(kept, confirmed), w[kept] * ranks.values[:, : ranks.k], 0.0).sum(axis=1)
    reward = (w[kept] * ranks.values[:, : ranks.k]).sum(axis=1)
    scores = {
        "SARM reward": reward,
        f"its {len(confirmed)} confirmed latents": part,
        "SARM reward without them": reward - part,
        "difference in means": x @ (fit.weight @ difference),
        "logistic probe": x @ logistic_probe(difference, fit.weight, fit.prompts),
    }
    sets = {"validation": pairs_in(data, "validation")}
    sets |= {
        f"{source.label}, test": pairs_in(data, "test", name)
        for name, source in config.data.sources.items()
    }
    result = []
    for where, pairs in sets.items():
        if not pairs:
            continue
        rows = pair_rows(pairs, rows_of)
        for name, score in scores.items():
            accuracy = clustered_accuracy(
                pair_points(score[rows.chosen] - score[rows.rejected]), [p.prompt.id for p in pairs]
            )
            result.append(
                {
                    "on": where,
                    "score": name,
                    "accuracy": accuracy.mean,
                    "standard_error": accuracy.standard_error,
                }
            )
            result[-1] |= {"pairs": accuracy.pairs, "prompts": accuracy.prompts}
    return result


def logistic_probe(difference: Floats, weight: Floats, prompts: Ints) -> Floats:
    """The direction w (d_in,) of a Bradley-Terry fit to differences (n_pairs, d_in), its L2
    strength chosen over prompt folds.
    """
    folds = prompts % FOLDS
    l2 = L2[0]
    if len(np.unique(folds)) == FOLDS:
        losses = np.zeros(len(L2))
        for fold, (number, strength) in itertools.product(range(FOLDS), enumerate(L2)):
            out = folds == fold
            margin = difference[out] @ bradley_terry(
                difference[~out], weight[~out] / weight[~out].sum(), strength
            )
            losses[number] += weight[out] @ np.logaddexp(0, -margin)
        l2 = L2[int(losses.argmin())]
    return bradley_terry(difference, weight, l2)


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


# Sensitivity


def sensitivity(
    table: pd.DataFrame,
    encoded: Encoded,
    contrasts: Mapping[str, Contrast],
    config: Config,
    device: str,
) -> list[dict[str, Any]]:
    """How the discoveries move with the permutations' seed, with the split and with the number of
    prompts.

    `overlap` is shared discoveries over all of either (Jaccard) with the selection's; `again` the
    share of the selection's confirmed latents that are discovered anew, or confirmed anew where the
    split is.
    """
    draws, discovery, validation = (
        config.select.stability_repeats,
        contrasts["discovery"],
        contrasts["validation"],
    )
    if not draws or not discovery.n_prompts:
        return []
    chosen, confirmed = table["discovered"].to_numpy(), table["confirmed"].to_numpy()
    effect = table["effect"].to_numpy()
    rows = []

    def row(what: str, found: Found, prompts: int, again: NDArray[np.bool_]) -> None:
        either = int((found.discovered | chosen).sum())
        both = found.tested & table["tested"].to_numpy()
        rows.append(
            {
                "what": what,
                "prompts": prompts,
                "discoveries": int(found.discovered.sum()),
                "overlap": int((found.discovered & chosen).sum()) / either if either else None,
                "again": (
                    int((again & confirmed).sum()) / int(confirmed.sum())
                    if confirmed.any()
                    else None
                ),
                "rank_correlation": rank_correlation(found.effect[both], effect[both]),
            }
        )

    for draw in range(1, draws + 1):
        found = discover(encoded, discovery, config, config.seed + 1000 * draw, device)
        row("seed", found, discovery.n_prompts, found.discovered)
    rng = np.random.default_rng([config.seed, 5])
    together = joined(discovery, validation)
    for _ in range(draws if validation.n_prompts else 0):
        mine = rng.permutation(together.n_prompts) < discovery.n_prompts
        found = discover(encoded, of_prompts(together, mine), config, config.seed, device)
        row(
            "split",
            found,
            discovery.n_prompts,
            confirm(encoded, found, of_prompts(together, ~mine), config, device),
        )
    for size in SIZES:
        for _ in range(draws):
            some = rng.permutation(discovery.n_prompts) < round(size * discovery.n_prompts)
            found = discover(encoded, of_prompts(discovery, some), config, config.seed, device)
            row(f"{size:.0%} of the prompts", found, int(some.sum()), found.discovered)
    return rows


def joined(a: Contrast, b: Contrast) -> Contrast:
    """Two contrasts as one; they share no prompt."""
    rows, prompts = (
        np.concatenate([a.rows, b.rows]),
        np.concatenate([a.prompts, b.prompts + a.n_prompts]),
    )
    chosen, rejected = (
        np.concatenate([a.chosen, b.chosen]),
        np.concatenate([a.rejected, b.rejected]),
    )
    return Contrast(rows, prompts, chosen, rejected, a.n_prompts + b.n_prompts)


def of_prompts(contrast: Contrast, some: NDArray[np.bool_]) -> Contrast:
    """The contrast on some of its prompts, (n_prompts,) of bool."""
    mine = some[contrast.prompts]
    number = np.cumsum(some) - 1
    return Contrast(
        contrast.rows[mine],
        number[contrast.prompts[mine]],
        contrast.chosen[mine],
        contrast.rejected[mine],
        int(some.sum()),
    )
