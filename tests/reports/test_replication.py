"""What does not replicate is named: latents that the run is about first, and in the abstract."""

from __future__ import annotations

from typing import Any

from reports.abstract import trust
from reports.blocks import Prose
from reports.validity_sections import named_first, replication, unreplicated
from sarm.config import VerdictConfig
from tests.evaluation.test_verdict import verdict_of


def features(across: list[int], unread: list[int]) -> dict[str, Any]:
    row = {"from": "A", "to": "B", "prompts": 286, "discovered": 155, "replicated": 33}
    more = {"opposite_and_significant": 5, "rank_correlation_discovered": 0.5}
    held = {"source": "C", "prompts": 90, "confirmed": 25, "replicated": 9, "low": 0.1}
    found = {
        "replication": [row | more | {"not_replicated": across}],
        "confirmed_replication": [held | {"high": 0.5, "expected": 7.0, "not_replicated": unread}],
    }
    return {
        "penalised": [{"latent": 3671, "confirmed": True}],
        "monitors": [3367, 21],
        "promoting": [{"latent": 2150}],
        "harming": [{"latent": 3671}, {"latent": 3367}, {"latent": 863}],
        "misleading": [],
        "validity": found,
    }


def test_penalised_monitor_and_listed_latents_that_fail_stand_first() -> None:
    many = [12, 36, 863, 2150, 3367, 3671, *range(5000, 5110)]
    said = named_first(many, features([], []))
    assert said == "penalised 3671; monitors 3367; listed 863, 2150; 112 others"
    assert named_first([12, 3671], features([], [])) == "penalised 3671; 12"
    assert named_first([], features([], [])) == ""
    blocks = replication(features(many, [863, 40]))
    told = [block.text for block in blocks if isinstance(block, Prose)]
    assert f"From A to B these do not replicate: {said}." in told
    assert any(text.endswith("; these do not: listed 863; 40.") for text in told)


def test_the_abstract_tells_of_a_penalised_latent_or_monitor_that_fails_somewhere() -> None:
    found = features([12, 863, 3367], [3671, 21])
    clauses = [
        "monitor 3367 not shown to replicate from A to B",
        "penalised latent 3671 and monitor 21 not shown to replicate on C",
    ]
    assert unreplicated(found) == clauses
    figures = {"features": found, "readings": None, "failures": []}
    said = trust(figures | {"verdict": verdict_of().record()}, VerdictConfig())
    assert said.endswith(f"; {'; '.join(clauses)}.")
    assert unreplicated(features([21, 3671], [21, 12, 3671])) == [
        "penalised latent 3671 and monitor 21 not shown to replicate from A to B, on C"
    ]
    assert unreplicated(features([12, 863], [])) == [] == unreplicated(None)
    assert unreplicated({"validity": {}}) == []
