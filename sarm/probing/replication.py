"""Whether what was found on some texts is there on others that took no part in choosing it.

    rows = replication(encoded, data, config, device)           # from every source to every other
    rows = confirmed_replication(table, encoded, data, config, device)         # on unread sources
    by_latent = feature_replication(listed, encoded, data, config, device)

*Replicates* = same sign and Holm p < 0.05.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from sarm.config import Config
from sarm.data.datasets import ENCODED_PARTS, Data, pairs_in
from sarm.probing.contrast import Contrast, Floats
from sarm.probing.effects import Encoded, contrast_of, latent_contributions
from sarm.probing.rediscovery import REPLICATED_P, discover, rank_correlation, tested_again
from sarm.probing.stats import bootstrap_intervals, holm, prompt_effects

FEWEST_PROMPTS = 20
"""A source with fewer prompts neither replicates nor is replicated."""


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
        name: discover(encoded, [contrast_of(mine, rows_of)], config, config.seed, device)
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


def unread(encoded: Encoded, data: Data, config: Config) -> Iterator[tuple[str, Contrast]]:
    """Label and test pairs of every source that gave neither discovery nor validation a pair."""
    rows_of = {id_: row for row, id_ in enumerate(encoded.texts["text_id"])}
    for name, source in config.data.sources.items():
        pairs = pairs_in(data, "test", name)
        if pairs and not source.split.get("discovery") and not source.split.get("validation"):
            yield source.label, contrast_of(pairs, rows_of)


def confirmed_replication(
    table: pd.DataFrame, encoded: Encoded, data: Data, config: Config, device: str
) -> list[dict[str, Any]]:
    """A row an unread source: how many of all confirmed latents replicate there, with the exact
    95 % interval of the share, and how many would if each prompt's effect were drawn as on
    validation.
    """
    latents = table.index[table["confirmed"]].to_numpy(np.int64)
    sign = np.sign(table.loc[latents, "effect"].to_numpy())
    rows_of = {id_: row for row, id_ in enumerate(encoded.texts["text_id"])}
    validation = contrast_of(pairs_in(data, "validation"), rows_of)
    known = prompt_effects(latent_contributions(encoded, validation, config)[latents], validation)
    rows = []
    for label, contrast in unread(encoded, data, config) if len(latents) else ():
        effect, p = tested_again(encoded, latents, contrast, config, device)
        replicated = (holm(p) < REPLICATED_P) & (np.sign(effect) == sign)
        count = int(replicated.sum())
        low, high = scipy.stats.binomtest(count, len(latents)).proportion_ci(0.95)
        power = power_of(known.toarray(), contrast.n_prompts)
        rows.append(
            {
                "source": label,
                "prompts": contrast.n_prompts,
                "confirmed": len(latents),
                "replicated": count,
                "low": float(low),
                "high": float(high),
                "expected": float(power.sum()),
                "same_sign": int((np.sign(effect) == sign).sum()),
                "not_replicated": [int(latent) for latent in latents[~replicated]],
            }
        )
    return rows


def power_of(known: Floats, prompts: int) -> Floats:
    """The chance of each latent to reach the smallest of Holm's thresholds on so many new prompts
    whose effects have mean and spread of the known ones, (latents, known prompts): normal.

    The spread is not that of the new source: where a latent hardly fires it is small, and an effect
    as large as on texts that it does fire on would look certain to be seen.
    """
    error = known.std(axis=1, ddof=1) / prompts**0.5
    needed = scipy.stats.norm.isf(REPLICATED_P / 2 / len(known))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(known.mean(axis=1)) / error
    return np.where(error > 0, scipy.stats.norm.sf(needed - ratio), 0.0)


def feature_replication(
    features: Sequence[dict[str, Any]], encoded: Encoded, data: Data, config: Config, device: str
) -> dict[int, list[dict[str, Any]]]:
    """The listed latents on each source that neither discovery nor validation read, by latent;
    Holm over the listed ones.
    """
    latents = np.array(sorted({f["latent"] for f in features}), np.int64)
    sign = {f["latent"]: np.sign(f["effect_discovery"]) for f in features}
    result: dict[int, list[dict[str, Any]]] = {int(latent): [] for latent in latents}
    for label, contrast in unread(encoded, data, config) if len(latents) else ():
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
                    "source": label,
                    "prompts": contrast.n_prompts,
                    **known,
                    "p_holm": float(adjusted),
                    "replicates": replicates,
                }
            )
    return result
