"""Validity checks of the selection of latents: nulls, replication, baselines, sensitivity and
the direction probe, figures -> blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reports.blocks import NOT_AVAILABLE, Block, Prose, Table
from reports.numbers import fixed, general, percentage
from reports.origins import FEATURES, UNKNOWN, columns
from sarm.run import many


def trust(figures: dict[str, Any]) -> list[Block]:
    """Nulls, replication, baselines, sensitivity and the direction probe of the selection; what
    does not replicate is named.
    """
    found = figures["features"]
    if found is None or not found["validity"]:
        return list(NOT_AVAILABLE)
    v = found["validity"]
    return [
        Prose(conjunction_sentence(found["conjunction"])),
        *nulls(found),
        *replication(found),
        *dense_baselines(v["baselines"]),
        *([Prose(v["words_alone"])] if v["words_alone"] else []),
        *sensitivity(v["sensitivity"]),
        *directions(found),
    ]


def conjunction_sentence(sources: list[str]) -> str:
    if not sources:
        return (
            "Discovery read one data set, fewer than two sources for a conjunction: what tells its"
            " two sides apart may be its style."
        )
    return (
        f"Discovered means: the same effect in {sources[0]} and in {sources[1]} (the larger of the"
        " one-sided p, then Benjamini-Hochberg). Confirmed means: the same sign and Holm p < 0.05"
        " on validation's prompts, which discovery did not read. They come from the run's own"
        " sources: whether a latent holds in another style, only replication says."
    )


def nulls(found: dict[str, Any]) -> list[Block]:
    v, n_prompts = found["validity"], found["n_prompts"]
    blocks: list[Block] = []
    if v["matched_null"]:
        rows = [
            [
                n["role"],
                n["latents"],
                *(general(n[m]) for m in ("effect", "null", "null_low", "null_high", "p")),
            ]
            for n in v["matched_null"]
        ]
        title = (
            "Mean effect on the test part of the confirmed latents, and of others put through the"
            " same selection but for its significance, matched on activity and |weight|:"
        )
        names = ("latents", "effect", "random", "low", "high", "p")
        blocks.append(
            Table(
                ["role", *names],
                rows,
                title=title,
                origins=columns(FEATURES, dict.fromkeys(names, "validity, matched_null")),
                counts=[f"{n_prompts.get('test', 0):,} test prompts"] * len(rows),
            )
        )
    else:
        blocks.append(
            Prose(
                "No confirmed latents to compare with matched ones on a test part: none was"
                " confirmed, too few like them passed the rest of the selection, or the test part"
                " has fewer than 10 prompts."
            )
        )
    if v["shuffled_labels"]:
        each = ", ".join(
            f"{row['discoveries']} ({row['confirmed']})" for row in v["shuffled_labels"]
        )
        blocks.append(
            Prose(
                f"With labels shuffled within prompts, where every discovery is false: {each}"
                f" discoveries (of them confirmed), beside {found['n_discoveries']}"
                f" ({found['n_confirmed']}) with the labels as they are."
            )
        )
    return blocks


def replication(found: dict[str, Any]) -> list[Block]:
    rows = found["validity"]["replication"]
    blocks: list[Block] = []
    if not rows:
        blocks.append(
            Prose("Replication across data sets: none tried, as only one source has enough pairs.")
        )
    else:
        blocks.append(across_sources(rows))
        for row in rows:
            if missing := named_first(row["not_replicated"], found):
                where = f"From {row['from']} to {row['to']}"
                blocks.append(Prose(f"{where} these do not replicate: {missing}."))
    for r in found["validity"]["confirmed_replication"]:
        told = (
            f"{r['replicated']} of the {r['confirmed']} confirmed latents replicate on"
            f" {r['prompts']} prompts of {r['source']}, which neither discovery nor validation read"
            f" (95 % interval {r['low']:.0%} to {r['high']:.0%}); were effects there as on"
            " validation, which confirmed them and so overstates some,"
            f" {r['expected']:.1f} would be expected"
        )
        missing = named_first(r["not_replicated"], found)
        more = f"; these do not: {missing}" if missing else ""
        blocks.append(Prose(f"{told}{more}."))
    listed = [
        f
        for role in ("promoting", "harming", "misleading")
        for f in found[role]
        if f.get("replication")
    ]
    for source in dict.fromkeys(r["source"] for f in listed for r in f["replication"]):
        states = {
            f["latent"]: next(r["replicates"] for r in f["replication"] if r["source"] == source)
            for f in listed
        }
        failing = [str(latent) for latent, replicates in states.items() if not replicates]
        confirmed = sum(f["confirmed"] for f in listed)
        told = (
            f"Of the {len(states)} listed latents, {confirmed} of them confirmed,"
            f" {len(states) - len(failing)} replicate on {source}, which neither discovery nor"
            " validation read"
        )
        blocks.append(Prose(f"{told}{'; these do not: ' + ', '.join(failing) if failing else ''}."))
    return blocks


def named_first(latents: Sequence[int], found: Mapping[str, Any]) -> str:
    """`penalised 3671; monitors 3367; listed 2150, 863; 110 others`: those that the run is about by
    name, the others by their number; all by name where there are few.
    """
    left, told = list(latents), []
    for name, mine in named_latents(found).items():
        those = [latent for latent in left if latent in mine]
        left = [latent for latent in left if latent not in mine]
        if those:
            told.append(f"{name} {', '.join(map(str, those))}")
    if left:
        told.append(", ".join(map(str, left)) if len(left) <= FEW else f"{len(left)} others")
    return "; ".join(told)


FEW = 6
"""As many latents that the run is not about are still named."""


def named_latents(found: Mapping[str, Any]) -> dict[str, set[int]]:
    """The latents that a run is about, by what they are to it."""
    return {
        "penalised": {p["latent"] for p in found["penalised"]},
        "monitors": set(found["monitors"]),
        "listed": {
            f["latent"] for role in ("promoting", "harming", "misleading") for f in found[role]
        },
    }


def unreplicated(found: Mapping[str, Any] | None) -> list[str]:
    """Where penalised latents or monitors fail to replicate, a clause for all directions and
    sources in which the same fail: `monitor 3426 not shown to replicate from A to B, on C`.
    """
    if not found or not found["validity"]:
        return []
    tried = [
        *((f"from {r['from']} to {r['to']}", r) for r in found["validity"]["replication"]),
        *((f"on {r['source']}", r) for r in found["validity"]["confirmed_replication"]),
    ]
    places: dict[str, list[str]] = {}
    named = named_latents(found)
    for where, row in tried:
        missing = set(row["not_replicated"])
        told = [
            f"{one}{'s' * (len(those) > 1)} {', '.join(map(str, sorted(those)))}"
            for name, one in (("penalised", "penalised latent"), ("monitors", "monitor"))
            if (those := named[name] & missing)
        ]
        if told:
            places.setdefault(" and ".join(told), []).append(where)
    return [f"{who} not shown to replicate {', '.join(where)}" for who, where in places.items()]


def across_sources(rows: list[dict[str, Any]]) -> Table:
    """From every source to every other."""
    title = (
        "How alike the sources are, which chose nothing: found on all pairs of one alone, confirmed"
        " or not, and tried on all of another. `replicate`: same sign and Holm p < 0.05;"
        " `opposite`: as significant the other way; `rank corr.`: of the effects of those found:"
    )
    names = ("prompts", "found", "replicate", "opposite", "rank corr.")
    keys = ("prompts", "discovered", "replicated", "opposite_and_significant")
    return Table(
        ["from, to", *names],
        [
            [
                f"{r['from']}, {r['to']}",
                *(r[key] for key in keys),
                fixed(r["rank_correlation_discovered"], 2, sign=True),
            ]
            for r in rows
        ],
        title=title,
        origins=columns(FEATURES, dict.fromkeys(names, "validity, replication")),
        counts=[many(r["prompts"], "prompt") for r in rows],
        unknown=UNKNOWN,
    )


def dense_baselines(rows: list[dict[str, Any]]) -> list[Block]:
    title = (
        "Pair accuracy beside the SAE; the two probes on dense states and the words' TF-IDF are"
        " fitted to discovery's pairs:"
    )
    cells = [
        [
            f"{r['on']}: {r['score']}",
            fixed(r["accuracy"], 3),
            fixed(r["standard_error"], 3),
            r["pairs"],
        ]
        for r in rows
    ]
    names = ("accuracy", "std. error", "pairs")
    made = Table(
        ["on: score", *names],
        cells,
        title=title,
        origins=columns(FEATURES, dict.fromkeys(names, "validity, baselines")),
        counts=[many(r["pairs"], "pair") for r in rows],
    )
    return [made] if rows else []


def sensitivity(rows: list[dict[str, Any]]) -> list[Block]:
    if not rows:
        return []
    cells = []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        known = {
            key: [row[key] for row in mine if row[key] is not None]
            for key in ("discoveries", "overlap", "again")
        }
        mean = {key: sum(values) / len(values) if values else None for key, values in known.items()}
        cells.append(
            [
                what,
                len(mine),
                fixed(mean["discoveries"], 1),
                *(fixed(mean[key], 2) for key in ("overlap", "again")),
            ]
        )
    title = (
        "Selection stability under another seed, split or share of discovery's prompts, means. Most"
        " of the prompts are the selection's own, so this is no replication; `recovered` is the"
        " share of the confirmed latents that are discovered again, under another split confirmed"
        " again:"
    )
    names = ("times", "discoveries", "overlap", "recovered")
    return [
        Table(
            ["what", *names],
            cells,
            title=title,
            origins=columns(FEATURES, dict.fromkeys(names, "validity, sensitivity")),
            counts=[many(cell[1], "repetition") for cell in cells],
            unknown=UNKNOWN,
        )
    ]


def directions(found: dict[str, Any]) -> list[Block]:
    rows = found.get("directions")
    if not rows:
        return []
    cells = [
        [
            f"{r['c']:+g}",
            fixed(r["swapped"], 1),
            general(r["largest_effect"]),
            fixed(r["rank_correlation_with_ablation"], 2),
            fixed(percentage(r["sign_changed_by_reselection"]), 1),
        ]
        for r in rows
    ]
    first = rows[0]
    exact = (
        f"{sum(r['mismatches'] for r in rows)} of {sum(r['checked'] for r in rows)} results differ"
        " from a recomputation"
    )
    title = (
        f"Every latent's decoder direction added to the {first['texts']} {first['part']} texts'"
        " states, c standard deviations; all that follows recomputed:"
    )
    header = [
        "c",
        "latents swapped",
        "largest effect",
        "rank corr. with ablating",
        "sign flips after TopK re-selection (%)",
    ]
    made = Table(
        header,
        cells,
        title=title,
        origins=columns(FEATURES, dict.fromkeys(header[1:], "directions")),
        counts=[many(r["texts"], "text") for r in rows],
        unknown=UNKNOWN,
    )
    return [made, Prose(f"Of those checked, {exact}.")]
