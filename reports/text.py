"""Figures -> final_report.txt: `final_report(figures(...))`.

The first part keeps the sections, labels, column widths and number formats of the reference report;
what that lacks follows, the abstract first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from reports import abstract, reference
from reports.blocks import lines
from reports.sections import SECTIONS

RULE = "=" * 70


def final_report(figures: dict[str, Any]) -> str:
    """The whole text."""
    blocks = [
        [
            RULE,
            "SARM FEATURE CONTROL PPO TRAINING - FINAL REPORT",
            RULE,
            f"Date: {figures['date']}",
        ],
        section("CONFIGURATION", reference.configuration(figures["configuration"])),
        section("PHASE 2: CAUSAL FEATURE DISCOVERY", reference.discovery(figures["features"])),
        section("PHASE 3: PPO WITH FEATURE CONTROLS", reference.controls(figures)),
        section("RESULTS", reference.results(figures)),
        section("STEERING EVALUATION (Pre-PPO)", reference.steering(figures["steering"])),
        section("OUTPUT FILES", reference.output_files(figures["outputs"])),
        [RULE],
        section("ABSTRACT", abstract.lines(figures)),
        *(section(s.heading, lines(s.blocks(figures))) for s in SECTIONS),
        [RULE],
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks) + "\n"


def section(title: str, body: Iterable[str]) -> list[str]:
    return [title, "-" * len(title), *body]
