"""What failed, what ran and where it comes from, a function a section: figures -> blocks."""

from __future__ import annotations

from typing import Any

from reports.blocks import Block, Items, Prose, Table
from reports.numbers import duration
from reports.origins import UNITS, UNKNOWN
from reports.texts import texts_words
from sarm.run import listed


def failures(figures: dict[str, Any]) -> list[Block]:
    rows = figures["failures"]
    if not rows:
        return [Prose("none: every phase is done")]
    return [
        Items(
            [
                f"{unit_name(row)} ({row['status']}): {row['cause']}\nlog: {row['log'] or 'none'}"
                for row in rows
            ]
        )
    ]


def unit_name(row: dict[str, Any]) -> str:
    return str(row["phase"]) if row["unit"] == "all" else f"{row['phase']}/{row['unit']}"


def phases(figures: dict[str, Any]) -> list[Block]:
    return [
        Table(
            ["Unit", "state", "took", "began", "device", "host"],
            [
                [
                    unit_name(p),
                    p["status"],
                    duration(p["seconds"]),
                    (p["started"] or "n/a")[:16].replace("T", " "),
                    *(str(p[m] if p[m] is not None else "n/a")[:20] for m in ("device", "host")),
                ]
                for p in figures["phases"]
            ],
            origins=UNITS,
            unknown=UNKNOWN,
        )
    ]


def commits_words(commits: list[str]) -> str:
    changed = " (+: with uncommitted changes)" if any(c.endswith("+") for c in commits) else ""
    return (", ".join(commits) or "unknown") + changed


def removed_words(units: list[dict[str, Any]]) -> str:
    removed = [unit_name(u) for u in units if u["removed"]]
    return (
        f"Weights or encoded states of {len(removed)} units had been removed when this was"
        f" written, and nothing of what is reported is read from them: {listed(removed, 4)}"
    )


def provenance(figures: dict[str, Any]) -> list[Block]:
    p = figures["provenance"]
    blocks: list[Block] = [
        Items(
            [
                f"Run: {p['folder']}",
                f"Config SHA-256: {p['config_sha256']}",
                f"Seed: {p['seed']}; PPO seeds: {', '.join(map(str, p['ppo_seeds']))}",
                f"Commit: {commits_words(p['git_commits'])}",
                f"Image SHA-256: {', '.join(p['images']) or 'none (not in a container)'}",
                texts_words(figures["texts"]),
                *([removed_words(p["units"])] if any(u["removed"] for u in p["units"]) else []),
                *(
                    f"{c['repository']}: commit {c['commit']}"
                    + (f", where {c['revision']} stood" if c["revision"] != c["commit"] else "")
                    for c in p["commits"]
                ),
            ]
        )
    ]
    if p["units"]:
        blocks.append(
            Table(
                ["Unit", "manifest", "commit", "image", "job", "ended"],
                [
                    [
                        unit_name(u),
                        u["manifest_sha256"][:8],
                        (u["git_commit"] or "n/a")[:8],
                        (u["image_sha256"] or "n/a")[:8],
                        u["job_id"] or "n/a",
                        (u["ended"] or "n/a")[:16].replace("T", " "),
                    ]
                    for u in p["units"]
                ],
                title="The first eight digits of each manifest's SHA-256, commit and image:",
                origins=UNITS,
                unknown=UNKNOWN,
            )
        )
    return blocks
