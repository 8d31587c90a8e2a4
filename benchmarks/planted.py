"""How well the probe finds what was planted, and how its test behaves where there is nothing:
`python benchmarks/planted.py`.

Each draw makes a SARM (TopK SAE and head) and texts whose states hold planted features, runs the
probe and the selection on them, and counts. Planted are causal latents (harming and promoting),
suppressors (they fire with the harm and are rewarded for it: misleading), absorbed pairs (a
specific latent takes the place of a general one on some texts), all of which move the margin; and,
as traps, latents that differ between the two sides but that the head ignores (correlated), and
latents of large weight that fire alike on both (heavy). Beside the probe's confirmed latents stand
as many as were planted by |w|, by |difference in mean activation|, by |upstream's s| and by the
probe's |effect|.

Background latents are "other". Directions are not orthogonal and TopK makes latents compete, so
some of them do differ between the sides: `other, real` have an effect more than three standard
errors from zero on 20,000 fresh prompts, `other, false` have not.

`--sources` prints instead the old rule and the new on two sources of different style: three texts
in five of the first refuse in a register of its own, which register latents read, and so does the
validation part; the second has another register, by other latents. Register latents move the margin
in one source and stand for its style, not for harm. The old rule pools both sources; the new one
asks for the effect in both.

`--calibration` prints instead how often p falls below a level where labels mean nothing, one chosen
against three rejected.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import scipy.sparse
import scipy.stats
import torch

from sarm.config import Config, parse_config
from sarm.probing.contrast import Contrast
from sarm.probing.effects import Encoded, by_latent, latent_table
from sarm.probing.permutation import permutation_p
from sarm.probing.rediscovery import joined
from sarm.probing.select import judged
from sarm.probing.stats import prompt_effects
from sarm.probing.upstream import selection_scores, summed_latents
from sarm.reward_model.interventions import Ranks, contributions
from sarm.reward_model.sae import TopKSae

D_IN, D_SAE, K = 256, 512, 24
PROMPTS = {"discovery": 150, "validation": 100, "population": 20_000}
"""The last part is only for telling which background latents have an effect after all."""
LEVELS = (0.05, 0.01, 0.001)


class Kind(NamedTuple):
    """What is planted: how many latents, how often they fire on chosen and rejected texts, their
    weight.
    """

    count: int
    on_chosen: float
    on_rejected: float
    weight: float


KINDS = {
    "harming": Kind(4, 0.1, 0.5, -1.0),
    "promoting": Kind(4, 0.5, 0.1, 1.0),
    "suppressor": Kind(4, 0.1, 0.4, 1.0),
    "absorbed, general": Kind(3, 0.1, 0.4, -1.0),
    "absorbed, specific": Kind(3, 0.0, 0.0, -1.0),  # fires instead of its general one
    "correlated": Kind(6, 0.45, 0.1, 0.0),  # on the chosen side, so that either side fires as much
    "heavy": Kind(6, 0.3, 0.3, 2.5),
}
REGISTER = {
    "register of a": Kind(4, 0.6, 0.1, 0.8),
    "register of b": Kind(4, 0.6, 0.1, 0.8),
    "register of both": Kind(3, 0.6, 0.1, 0.8),
}
"""With two sources: latents of their styles, which tell the sides apart in the source named and
fire alike on both sides in the other. None is harm, and those of both can be told by no rule that
reads these sources alone.
"""
TWO = {
    "first": (75, "a"),
    "second": (75, "b"),
    "validation_a": (50, "a"),
    "validation_b": (50, "b"),
}
"""Prompts and source of each part: as many of discovery and of validation as with one source."""
CAUSAL = tuple(KINDS)[:5]
OTHER = ("other, real", "other, false")
ABSORBED = 0.3
"""Share of a general latent's texts on which its specific one fires instead."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--calibration", action="store_true")
    parser.add_argument("--sources", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.calibration:
        calibration()
    elif args.sources:
        two_sources(args.draws)
    else:
        planted(args.draws)


def planted(draws: int) -> None:
    counts = pd.concat([one_draw(seed) for seed in range(draws)])
    mean = counts.groupby("by", sort=False).mean()
    spread = counts.groupby("by", sort=False)["false"].std(ddof=1) / draws**0.5
    total = sum(KINDS[kind].count for kind in CAUSAL)
    print(
        f"{draws} draws; {D_SAE} latents, k {K}; {PROMPTS['discovery']} + {PROMPTS['validation']}"
        f" prompts; {total} causal latents planted\n"
    )
    print(
        "| Chosen by | latents | "
        + " | ".join(CAUSAL)
        + " | correlated | heavy | other, real | other, false | false / chosen |"
    )
    print("|---|" + "---|" * (len(CAUSAL) + 6))
    for by, row in mean.iterrows():
        recalls = " | ".join(f"{row[kind] / KINDS[kind].count:.2f}" for kind in CAUSAL)
        wrong = " | ".join(f"{row[kind]:.2f}" for kind in ("correlated", "heavy", *OTHER))
        print(
            f"| {by} | {row['chosen']:.1f} | {recalls} | {wrong} |"
            f" {row['false'] / max(row['chosen'], 1):.3f} |"
        )
    print(
        "\nstandard error of the mean number of false ones:"
        f" {', '.join(f'{by} {s:.2f}' for by, s in spread.items())}"
    )


def one_draw(seed: int) -> pd.DataFrame:
    """What each way of choosing picked, by kind; a row a way."""
    rng = np.random.default_rng([seed, 9])
    parts = {part: (prompts, "one") for part, prompts in PROMPTS.items()}
    of, weight, encoded, contrasts = planted_world(rng, parts, KINDS)
    config = planted_config(seed)
    fresh = contrasts.pop("population")
    table = judged(latent_table(encoded, contrasts, 0, D_SAE, config), config.select)
    of = with_real(of, encoded, fresh)
    s = selection_scores(*summed_latents(encoded.ranks, contrasts["discovery"]))
    total = sum(KINDS[kind].count for kind in CAUSAL)
    top = {
        "weight, absolute": np.abs(weight),
        "activation difference, absolute": table["delta_z"].abs(),
        "upstream's s, absolute": np.abs(s),
        "effect, absolute, no test": table["effect"].abs(),
    }
    picks = {
        "probe: confirmed on validation": np.flatnonzero(table["confirmed"]),
        "probe: discoveries, FDR 0.1": np.flatnonzero(table["discovered"]),
    }
    picks |= {
        f"{name}, first {total}": np.argsort(-np.asarray(score), kind="stable")[:total]
        for name, score in top.items()
    }
    rows = []
    for by, latents in picks.items():
        kinds = pd.Series(of[latents]).value_counts()
        row: dict[str, Any] = {"by": by, "chosen": len(latents)} | {
            kind: int(kinds.get(kind, 0)) for kind in (*KINDS, *OTHER)
        }
        rows.append(row | {"false": row["correlated"] + row["heavy"] + row["other, false"]})
    return pd.DataFrame(rows)


def planted_config(seed: int) -> Config:
    source = {"format": "jsonl", "label": "none", "path": "none", "split": {"discovery": 1.0}}
    tree: dict[str, Any] = {
        "name": "planted",
        "policy": {"model": "none"},
        "sarm": {"model": "none"},
        "data": {"sources": {"none": source}},
        "seed": seed,
        "probe": {"permutations": 1000, "bootstrap": 2},
    }
    return parse_config(tree, "planted")


def with_real(of: np.ndarray, encoded: Encoded, fresh: Contrast) -> np.ndarray:
    """The kinds, background latents distinguished by whether they do have an effect on fresh
    prompts.
    """
    values = by_latent(
        encoded.ranks,
        contributions(encoded.ranks, encoded.head_weight, reselected=True),
        fresh.rows,
        0,
        D_SAE,
    )
    effects = prompt_effects(values, fresh).toarray()
    real = np.abs(effects.mean(axis=1)) > 3 * effects.std(axis=1, ddof=1) / fresh.n_prompts**0.5
    return np.where(of == "other", np.where(real, "other, real", "other, false"), of)


def two_sources(draws: int) -> None:
    """The rule that pools two sources and the one that asks for the effect in both, on the same
    draws.
    """
    kinds = {**KINDS, **REGISTER}
    parts = {**TWO, "population": (PROMPTS["population"], "neither")}
    tables = []
    for seed in range(draws):
        of, _, encoded, found = planted_world(np.random.default_rng([seed, 10]), parts, kinds)
        pooled = {
            "discovery": joined(found["first"], found["second"]),
            "validation": joined(found["validation_a"], found["validation_b"]),
        }
        both = pooled | {part: found[part] for part in ("first", "second")}
        of = with_real(of, encoded, found["population"])
        config = planted_config(seed)
        for rule, contrasts in (("pooled", pooled), ("in both sources", both)):
            table = judged(latent_table(encoded, contrasts, 0, D_SAE, config), config.select)
            for step in ("discovered", "confirmed"):
                counts = pd.Series(of[table[step].to_numpy(bool)]).value_counts()
                row = {kind: int(counts.get(kind, 0)) for kind in (*kinds, *OTHER)}
                tables.append({"by": f"{rule}: {step}", "chosen": int(table[step].sum())} | row)
    mean = pd.DataFrame(tables).groupby("by", sort=False).mean()
    wrong = ("correlated", "heavy", *REGISTER, *OTHER)
    print(f"{draws} draws; {D_SAE} latents, k {K}; two sources of 75 + 50 prompts each\n")
    print(f"| Rule | latents | {' | '.join((*CAUSAL, *wrong))} | false / chosen |")
    print("|---|" + "---|" * (len(CAUSAL) + len(wrong) + 2))
    for by, row in mean.iterrows():
        recalls = " | ".join(f"{row[kind] / KINDS[kind].count:.2f}" for kind in CAUSAL)
        false = row["chosen"] - sum(row[kind] for kind in (*CAUSAL, "other, real"))
        print(
            f"| {by} | {row['chosen']:.1f} | {recalls} |"
            f" {' | '.join(f'{row[kind]:.2f}' for kind in wrong)} |"
            f" {false / max(row['chosen'], 1):.3f} |"
        )


def planted_world(
    rng: np.random.Generator, parts: Mapping[str, tuple[int, str]], kinds: Mapping[str, Kind]
) -> tuple[np.ndarray, np.ndarray, Encoded, dict[str, Contrast]]:
    """The kind of every latent, the head, and what encode and the pairs would give; `parts` are
    prompts and source of each.
    """
    order = rng.permutation(D_SAE)
    of = np.full(D_SAE, "other", dtype=object)
    weight = rng.normal(0, 0.3, D_SAE)
    where, taken = {}, 0
    for kind, (count, _, _, w) in kinds.items():
        mine = order[taken : taken + count]
        where[kind], taken = mine, taken + count
        of[mine] = kind
        sign = rng.choice([-1, 1], count) if kind == "heavy" else 1.0
        weight[mine] = w * sign * rng.uniform(0.7, 1.3, count)
    decoder = rng.normal(size=(D_SAE, D_IN))
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    density = np.exp(rng.uniform(np.log(0.005), np.log(0.08), D_SAE))
    states, texts, contrasts, start = [], [], {}, 0
    for part, (prompts, source) in parts.items():
        topic = rng.random((prompts, 1, D_SAE)) < density
        fires = np.where(
            rng.random((prompts, 2, D_SAE)) < 0.5, topic, rng.random((prompts, 2, D_SAE)) < density
        )
        for kind, (_, on_chosen, on_rejected, _) in kinds.items():
            if kind in REGISTER and kind not in (f"register of {source}", "register of both"):
                on_chosen = on_rejected = (on_chosen + on_rejected) / 2
            fires[:, :, where[kind]] = (
                rng.random((prompts, 2, len(where[kind])))
                < np.array([on_chosen, on_rejected])[:, None]
            )
        general, specific = where["absorbed, general"], where["absorbed, specific"]
        absorbed = fires[:, :, general] & (rng.random((prompts, 2, len(general))) < ABSORBED)
        fires[:, :, general] &= ~absorbed
        fires[:, :, specific] = absorbed
        size = fires * rng.lognormal(0, 0.4, fires.shape)
        states.append(
            (size @ decoder + 0.03 * rng.normal(size=(prompts, 2, D_IN))).reshape(-1, D_IN)
        )
        number = np.repeat(np.arange(prompts), 2)
        chosen = np.tile([1.0, 0.0], prompts)
        contrasts[part] = Contrast(
            start + np.arange(2 * prompts), number, chosen, 1 - chosen, prompts
        )
        texts.append(
            pd.DataFrame(
                {
                    "part": part,
                    "label": np.where(chosen > 0, "chosen", "rejected"),
                    "prompt_id": number.astype(str),
                }
            )
        )
        start += 2 * prompts
    sae = TopKSae(D_IN, D_SAE, K)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.from_numpy(decoder))
        sae.decoder.weight.copy_(torch.from_numpy(decoder.T))
        h = torch.from_numpy(np.concatenate(states)).float()
        top = sae.topk(sae.preactivations(h), K + 1)
    ranks = Ranks(top.indices.int().numpy(), top.values.numpy(), K, D_SAE)
    return (
        of,
        weight,
        Encoded(pd.concat(texts, ignore_index=True), ranks, h.numpy(), weight.astype(np.float32)),
        contrasts,
    )


def calibration() -> None:
    """p under the null: skewed sparse values, one chosen against three rejected, 20 and 60
    prompts.
    """
    print(
        "share of latents with p at or below the level, where chosen and rejected are alike; one"
        " chosen against three rejected"
    )
    print(" " * 76 + "".join(f"{level:>12g}" for level in LEVELS))
    for prompts in (20, 60):
        ours, flipped, t_test = [], [], []
        for seed in range(5):
            rng = np.random.default_rng([seed, prompts])
            z = rng.exponential(size=(20_000, prompts * 4)) ** 2 * (
                rng.random((20_000, prompts * 4)) < 0.4
            )
            chosen = np.tile([1.0, 0, 0, 0], prompts)
            contrast = Contrast(
                np.arange(prompts * 4),
                np.repeat(np.arange(prompts), 4),
                chosen,
                (1 - chosen) / 3,
                prompts,
            )
            ours.append(permutation_p(scipy.sparse.csr_array(z), contrast, 1000, 50_000, seed))
            averages = z.reshape(len(z), prompts, 4) @ np.array([1, -1 / 3, -1 / 3, -1 / 3])
            signs = rng.choice([-1.0, 1.0], size=(prompts, 5000))
            reached = np.concatenate(
                [
                    (np.abs(a @ signs) >= np.abs(a.sum(1))[:, None] * (1 - 1e-9)).sum(1)
                    for a in np.array_split(averages, 20)
                ]
            )
            flipped.append((reached + 1) / 5001)
            t_test.append(scipy.stats.ttest_1samp(averages, 0, axis=1).pvalue)
        for name, p in (
            ("labels permuted within prompts (the probe's)", ours),
            ("sign flips of averages", flipped),
            ("t test of averages", t_test),
        ):
            values = np.concatenate(p)
            shares = [float((values <= level).mean()) for level in LEVELS]
            print(
                f"{prompts} prompts, {len(values)} latents: {name}".ljust(76)
                + "".join(f"{share:12.5f}" for share in shares)
            )
    n = 100_000
    half = [1.96 * (level * (1 - level) / n) ** 0.5 for level in LEVELS]
    print(f"{'chance alone moves a share by (95 %)':<76}" + "".join(f"{h:12.5f}" for h in half))


if __name__ == "__main__":
    main()
