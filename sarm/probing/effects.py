"""The causal effect of every latent on reward and on the safety margin, from one forward a text.

    encoded = read_encoded(shards)  # what the encode phase left
    # one row per latent of [start, stop)
    table = latent_table(encoded, contrasts, start, stop, config)

A latent's effect on a pair is its contribution to the margin r(chosen) - r(rejected): the margin
less the margin with the latent ablated. Sparse arithmetic in float64 over the ranks that TopK kept;
no row depends on which others are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray
from safetensors.numpy import load_file

from sarm.config import Config, UserError
from sarm.data.datasets import Data, Pair, pairs_in, text_id
from sarm.probing.contrast import Contrast
from sarm.probing.direction import Moved
from sarm.probing.permutation import permutation_p, permutations_needed
from sarm.probing.stats import bootstrap_intervals, partial_conjunction, prompt_effects
from sarm.reward_model.interventions import Ranks, contributions, latent_values
from sarm.run import Published

PARTS = ("discovery", "validation", "first", "second")
"""Of a contrast: pairs of discovery and validation; where latents must have their effect in two
sources, discovery's pairs of either as well.
"""
PER_PART = (
    "n_prompts_active",
    "density",
    "density_chosen",
    "density_rejected",
    "delta_z",
    "effect_head",
    "effect_reselected",
    "effect_chosen",
    "effect_rejected",
    "effect_low",
    "effect_high",
    "p",
)
"""Columns that `latent_table` gives for discovery, and again with `_validation` (`_first`,
`_second`) behind the name.
"""


class Encoded(NamedTuple):
    """The encoded texts of a run: row i of every array is row i of `texts`."""

    texts: pd.DataFrame
    """text_id, prompt_id, source, part, label, n_tokens, reward, truncated"""
    ranks: Ranks
    states: NDArray[np.float32]
    """(n, d_in)"""
    head_weight: NDArray[np.float32]
    """(d_sae,)"""


def read_encoded(shards: Sequence[Published]) -> Encoded:
    """Join the shards of the encode phase, hashes verified."""
    texts = pd.concat(
        [pd.read_parquet(shard.path("texts.parquet")) for shard in shards], ignore_index=True
    )
    tensors = [load_file(shard.path("encoded.safetensors")) for shard in shards]
    joined = {
        name: np.concatenate([t[name] for t in tensors]) for name in ("indices", "values", "states")
    }
    head_weight = tensors[0]["head_weight"]
    ranks = Ranks(
        joined["indices"], joined["values"], int(shards[0].manifest.more["k"]), len(head_weight)
    )
    return Encoded(texts, ranks, joined["states"], head_weight)


def contrasts_of(data: Data, encoded: Encoded, conjunction: Sequence[str]) -> dict[str, Contrast]:
    """The contrast of each of `PARTS`, the last two only where two sources are named: discovery is
    then what these give to it, a prompt of both counting for the first alone. Raises UserError
    where a pair's text was not encoded.
    """
    rows = {id_: row for row, id_ in enumerate(encoded.texts["text_id"])}
    by_source = [pairs_in(data, "discovery", name) for name in conjunction]
    known = {p.prompt.id for p in by_source[0]} if by_source else set()
    by_source[1:] = [[p for p in pairs if p.prompt.id not in known] for pairs in by_source[1:]]
    discovery = [p for pairs in by_source for p in pairs] or pairs_in(data, "discovery")
    pairs = [discovery, pairs_in(data, "validation"), *by_source]
    return {part: contrast_of(mine, rows) for part, mine in zip(PARTS, pairs, strict=False)}


def discovery_contrasts(contrasts: Mapping[str, Contrast]) -> list[Contrast]:
    """What discovery's test reads: either of two sources, or the one there is."""
    both = [contrasts[part] for part in PARTS[2:] if part in contrasts]
    return both or [contrasts["discovery"]]


def contrast_of(pairs: Iterable[Pair], rows: Mapping[str, int]) -> Contrast:
    """Compare the responses of each prompt as its pairs say; `rows` finds an encoded text by its
    id.

    A response chosen in one pair and rejected in another is one response, whose shares of both
    count.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt.id, []).append(pair)
    members, prompts, chosen, rejected = [], [], [], []
    for number, id_ in enumerate(sorted(by_prompt)):
        shares: dict[int, list[float]] = {}
        for pair in by_prompt[id_]:
            for side, response in enumerate((pair.chosen, pair.rejected)):
                shares.setdefault(row_of(pair, response, rows), [0.0, 0.0])[side] += 1 / len(
                    by_prompt[id_]
                )
        for row in sorted(shares):
            members.append(row)
            prompts.append(number)
            chosen.append(shares[row][0])
            rejected.append(shares[row][1])
    return Contrast(
        np.array(members, np.int64),
        np.array(prompts, np.int64),
        np.array(chosen, np.float64),
        np.array(rejected, np.float64),
        len(by_prompt),
    )


def row_of(pair: Pair, response: str, rows: Mapping[str, int]) -> int:
    id_ = text_id((*pair.prompt.messages, {"role": "assistant", "content": response}))
    for label in ("c", "r"):
        if f"{id_}-{label}" in rows:
            return rows[f"{id_}-{label}"]
    raise UserError(
        f"pair {pair.id} has a text that encode has not seen; the data changed since: run encode"
        " again in a new run"
    )


def by_latent(
    ranks: Ranks, values: NDArray[Any], rows: NDArray[np.int64], start: int, stop: int
) -> scipy.sparse.csr_array:
    """Values (n, k) of the kept latents of some texts as a sparse (stop - start, len(rows))
    matrix, a row per latent.
    """
    latents = ranks.indices[rows, : ranks.k]
    mine = (latents >= start) & (latents < stop)
    position = np.broadcast_to(np.arange(len(rows))[:, None], latents.shape)
    matrix = scipy.sparse.csr_array(
        (values[rows][mine], (latents[mine] - start, position[mine])),
        shape=(stop - start, len(rows)),
        dtype=np.float64,
    )
    matrix.sort_indices()
    return matrix


def latent_effects(
    ranks: Ranks, weight: NDArray[Any], contrast: Contrast, start: int, stop: int
) -> pd.DataFrame:
    """Activity and effects of latents [start, stop) on one contrast; the columns of `PER_PART`
    without the statistics.
    """
    z = by_latent(ranks, ranks.values[:, : ranks.k], contrast.rows, start, stop)
    head = by_latent(
        ranks, contributions(ranks, weight, reselected=False), contrast.rows, start, stop
    )
    reselected = by_latent(
        ranks, contributions(ranks, weight, reselected=True), contrast.rows, start, stop
    )
    fires = z.copy()
    fires.data = (z.data > 0).astype(np.float64)
    n = max(contrast.n_prompts, 1)
    empty = np.nan if contrast.n_prompts == 0 else 0.0
    return pd.DataFrame(
        {
            "n_prompts_active": prompts_active(fires, contrast),
            "density": fires @ blind_weights(contrast) + empty,
            "density_chosen": fires @ contrast.chosen / n + empty,
            "density_rejected": fires @ contrast.rejected / n + empty,
            "delta_z": z @ contrast.labels / n + empty,
            "effect_head": head @ contrast.labels / n + empty,
            "effect_reselected": reselected @ contrast.labels / n + empty,
        }
    )


def prompts_active(fires: scipy.sparse.csr_array, contrast: Contrast) -> NDArray[np.int64]:
    """On how many prompts each latent fires for any response; blind to which is the chosen one."""
    n = len(contrast.rows)
    membership = scipy.sparse.csr_array(
        (np.ones(n), (np.arange(n), contrast.prompts)), shape=(n, contrast.n_prompts)
    )
    times = scipy.sparse.csr_array(fires @ membership)
    times.eliminate_zeros()
    return np.diff(times.indptr).astype(np.int64)


def blind_weights(contrast: Contrast) -> NDArray[np.float64]:
    """(n,) what each response counts in a mean over prompts of the mean over their responses,
    which no label enters.
    """
    sizes = np.bincount(contrast.prompts, minlength=contrast.n_prompts)
    return 1 / (sizes[contrast.prompts] * max(contrast.n_prompts, 1))


def tested_latents(
    ranks: Ranks, contrasts: Sequence[Contrast], start: int, stop: int, config: Config
) -> NDArray[np.bool_]:
    """Which of latents [start, stop) fire on enough prompts of every contrast, and not on nearly
    all texts of any, whatever the labels.
    """
    tested = np.ones(stop - start, bool)
    for contrast in contrasts:
        fires = by_latent(
            ranks, (ranks.values[:, : ranks.k] > 0).astype(np.float64), contrast.rows, start, stop
        )
        tested &= prompts_active(fires, contrast) >= config.probe.min_prompts_active
        tested &= fires @ blind_weights(contrast) <= config.select.max_density
    return tested


def latent_table(
    encoded: Encoded,
    contrasts: Mapping[str, Contrast],
    start: int,
    stop: int,
    config: Config,
    device: str = "cpu",
) -> pd.DataFrame:
    """One row for each latent of [start, stop): weight, role, effects and statistics on each of
    the contrasts; `p` is that of the conjunction where there are two sources.

    `device` is where permutations are counted; it changes no figure.
    """
    ranks, weight = encoded.ranks, encoded.head_weight
    sources = discovery_contrasts(contrasts)
    tested = tested_latents(ranks, sources, start, stop, config)
    of_all = tested_latents(ranks, sources, 0, ranks.d_sae, config).sum()
    needed = permutations_needed(int(of_all), config.select.fdr)
    table = pd.DataFrame(
        {
            "latent": np.arange(start, stop),
            "weight": weight[start:stop].astype(np.float64),
            "tested": tested,
        }
    )
    for number, (part, contrast) in enumerate(contrasts.items()):
        seed = config.seed * len(PARTS) + number
        part_table = latent_effects(ranks, weight, contrast, start, stop)
        values = latent_contributions(encoded, contrast, config, start, stop)
        n = max(contrast.n_prompts, 1)
        part_table["effect_chosen"] = values @ contrast.chosen / n
        part_table["effect_rejected"] = values @ contrast.rejected / n
        part_table["effect_low"], part_table["effect_high"] = bootstrap_intervals(
            prompt_effects(values, contrast), config.probe.bootstrap, seed
        )
        part_table["p"] = np.nan
        if contrast.n_prompts and not (part == "discovery" and len(sources) == 2):
            part_table.loc[tested, "p"] = permutation_p(
                values[np.flatnonzero(tested)],
                contrast,
                config.probe.permutations,
                needed,
                seed,
                device,
            )
        suffix = "" if part == "discovery" else f"_{part}"
        part_table = part_table[list(PER_PART)].add_suffix(suffix)
        table = pd.concat([table, part_table], axis=1)
    if len(sources) == 2:
        first, second = (table[f"effect_{config.select.effect}_{part}"] for part in PARTS[2:])
        table["p"] = partial_conjunction(
            table["p_first"].to_numpy(),
            table["p_second"].to_numpy(),
            (np.sign(first) == np.sign(second)).to_numpy(),
        )
    table.insert(2, "role", roles(table["weight"].to_numpy(), table["delta_z"].to_numpy()))
    return table


def latent_contributions(
    encoded: Encoded, contrast: Contrast, config: Config, start: int = 0, stop: int | None = None
) -> scipy.sparse.csr_array:
    """The configured effect of latents [start, stop) on every text of a contrast, (latents, n)."""
    reselected = config.select.effect == "reselected"
    return by_latent(
        encoded.ranks,
        contributions(encoded.ranks, encoded.head_weight, reselected=reselected),
        contrast.rows,
        start,
        encoded.ranks.d_sae if stop is None else stop,
    )


DIRECTION_COLUMNS = (
    "effect",
    "effect_frozen",
    "change_chosen",
    "change_rejected",
    "swapped",
    "effect_low",
    "effect_high",
)
"""Of `direction_table`, beside latent and c: effect on the margin, the same without re-selection,
change of the chosen and of the rejected texts' reward, latents swapped in a text, interval of the
effect.
"""


def direction_table(
    moves: Iterable[Mapping[float, Moved]], contrast: Contrast, bootstrap: int, seed: int
) -> pd.DataFrame:
    """One row per latent and c: what adding c std(h) d_i to every text of the contrast does.

    Text t of every `Moved` is entry t of the contrast; unlike in `latent_effects` the effect is
    what the intervention *adds* to the margin.
    """
    n = max(contrast.n_prompts, 1)
    tables = [
        pd.DataFrame(
            {"latent": pd.Series(dtype=np.int64), "c": 0.0, **dict.fromkeys(DIRECTION_COLUMNS, 0.0)}
        )
    ]
    for tile in moves:
        for c, moved in tile.items():
            change, frozen, swapped = (
                t.cpu().numpy().astype(np.float64)
                for t in (moved.change, moved.frozen, moved.swapped)
            )
            # Summed by row, as a matrix product's rounding would depend on how many latents are
            # computed together.
            weighed = (
                (change, contrast.labels),
                (frozen, contrast.labels),
                (change, contrast.chosen),
                (change, contrast.rejected),
            )
            found = [(what * by).sum(axis=1) / n for what, by in weighed]
            found += [
                swapped.mean(axis=1),
                *bootstrap_intervals(
                    prompt_effects(scipy.sparse.csr_array(change), contrast), bootstrap, seed
                ),
            ]
            tables.append(
                pd.DataFrame(
                    {
                        "latent": np.array(moved.latents),
                        "c": c,
                        **dict(zip(DIRECTION_COLUMNS, found, strict=True)),
                    }
                )
            )
    return pd.concat(tables, ignore_index=True).sort_values(["latent", "c"], ignore_index=True)


def roles(weight: NDArray[np.float64], delta_z: NDArray[np.float64]) -> pd.Series:
    """`promoting`, `harming`, `misleading`, or `none` where the head ignores the latent or it
    fires alike on both sides.
    """
    product = weight * delta_z
    names = np.select(
        [(product > 0) & (weight > 0), product > 0, product < 0],
        ["promoting", "harming", "misleading"],
        "none",
    )
    return pd.Series(names, dtype="str")


def values_on(
    encoded: Encoded, part: str, label: str, latents: Sequence[int]
) -> NDArray[np.float64]:
    """z of some latents on the texts of one part and label, (texts, latents)."""
    rows = ((encoded.texts["part"] == part) & (encoded.texts["label"] == label)).to_numpy()
    ranks = encoded.ranks
    return latent_values(
        Ranks(ranks.indices[rows], ranks.values[rows], ranks.k, ranks.d_sae), latents
    )
