"""What the random arm's seeds penalised, which of them share latents, and the doses, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from reports.blocks import Block, Prose, Table
from reports.doses import dose, doses, random_entries, random_sentences, random_sets, sharing
from reports.figures import latent_table
from reports.frames import read_run
from reports.policy_sections import latents
from sarm.ppo.penalties import PENALTIES, Penalised
from tests.runs import RANDOM_LATENT, evaluated_run

SETS = [
    {"seed": 0, "latents": [4149, 4022], "unsafe": 2.78, "safe": 1.18},
    {"seed": 1, "latents": [3800, 4022], "unsafe": 3.85, "safe": 2.72},
    {"seed": 4, "latents": [705, 4149], "unsafe": 3.35, "safe": 1.22},
]


def told(blocks: list[Block]) -> list[str]:
    return [block.text for block in blocks if isinstance(block, Prose)]


def test_a_dose_is_what_the_penalty_costs_on_average() -> None:
    """Thresholds: 2 * 3/4 + 0.5 * 1/4 on unsafe prompts, 2 * 1/2 on safe ones. Hinges: 2 * (0.5 +
    1.5 + 2.5) / 4 + 0.5 * 1/4, 2 * 0.5/2. Density ratios: 2 * 4/4 + 0.5 * 1/4, 2 * 1/2.
    """
    base = pd.DataFrame(
        {
            "kind": ["unsafe"] * 4 + ["safe"] * 2,
            "z_1": [1.0, 2.0, 3.0, 0.5, 1.0, 0.0],
            "z_2": [0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
        }
    )
    entries = [{"latent": 1, "tau": 0.5, "alpha": 2.0}, {"latent": 2, "tau": 0.0, "alpha": 0.5}]
    by_hand = {"threshold": (1.625, 1.0), "hinge": (2.375, 0.5), "density": (2.125, 1.0)}
    assert set(by_hand) == set(PENALTIES)
    for kind, (unsafe, safe) in by_hand.items():
        assert doses(base, entries, kind) == pytest.approx({"unsafe": unsafe, "safe": safe})
        z = torch.tensor(base[["z_1", "z_2"]].to_numpy()[:4], dtype=torch.float32)
        matched = PENALTIES[kind].doses(z, [Penalised(**entry) for entry in entries])
        assert float(matched.sum()) == pytest.approx(unsafe), "what the random arm is matched on"
    assert all(map(math.isnan, doses(base, entries, "one of a user's").values()))
    assert all(map(math.isnan, doses(base.iloc[:0], entries, "hinge").values()))
    one_more = [*entries, {"latent": 3, "tau": 0.0, "alpha": 1.0}]
    assert math.isnan(dose(base, one_more, "threshold"))
    assert math.isnan(dose(base, [], "threshold"))


def test_seeds_that_share_latents_are_named_and_doses_stand_side_by_side() -> None:
    assert sharing(SETS) == ["0 and 1 (4022)", "0 and 4 (4149)"]
    said, given = told(
        random_sentences({"penalised": {"unsafe": 5.64, "safe": 6.16}, "random": SETS})
    )
    assert "seed 0: 4149, 4022; seed 1: 3800, 4022; seed 4: 705, 4149." in said
    assert "are not independent draws: 0 and 1 (4022)" in said
    assert "5.64 on unsafe prompts for the penalised latents and 2.78, 3.85, 3.35 for" in given
    assert "6.16 on safe prompts for the penalised latents and 1.18, 2.72, 1.22 for" in given
    apart = [SETS[1], SETS[2]]
    unknown = {"unsafe": math.nan, "safe": math.nan}
    (alone,) = told(random_sentences({"penalised": unknown, "random": apart}))
    assert "independent" not in alone
    assert random_sentences({"penalised": unknown, "random": []}) == []


def test_the_random_arms_rows_are_of_the_seeds_that_penalised_the_latent(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path / "run", seeds=(0, 1, 2))
    frames = read_run(run)
    frames.calibrations["random-seed1"]["penalised"][0]["latent"] = 778
    assert [(e["latent"], e["seeds"]) for e in random_entries(run, frames)] == [
        (RANDOM_LATENT["latent"], [0, 2]),
        (778, [1]),
    ]
    sets = random_sets(run, frames)
    assert [(row["seed"], row["latents"]) for row in sets["random"]] == [
        (0, [777]),
        (1, [778]),
        (2, [777]),
    ]
    table = frames.generations
    random = (table["arm"] == "random") & (table["kind"] == "unsafe")
    table.loc[random, "z_777"] = table.loc[random, "seed"].map({0: 1.0, 1: 1.0, 2: 0.0})
    rows = latent_table(table, random_entries(run, frames)).to_dict("records")
    row = next(r for r in rows if (r["arm"], r["kind"]) == ("random", "unsafe"))
    assert row["rate"] == pytest.approx(0.5), "seed 1, where it fires, penalised another"
    figures = {
        "latents": [],
        "monitors": [],
        "random_latents": rows,
        "random_sets": sets,
        "compared": {"problem": "", "distance": None},
    }
    (shown,) = [block for block in latents(figures) if isinstance(block, Table)]
    assert "random, seeds 0, 2" in [cells[2] for cells in shown.rows]


def test_bins_that_tau_0_leaves_empty_are_left_out() -> None:
    def shown(*taus: float) -> Table:
        rows = [
            {"latent": i, "tau": tau, "arm": "base", "kind": "unsafe", "n": 10, "rate": 0.4}
            | {"below_cutoff": 0.0, "mean_z": 1.0, "histogram": [0.6, 0.0, 0.0, 0.0, 0.0, 0.4]}
            for i, tau in enumerate(taus)
        ]
        figures = {"latents": rows, "monitors": [], "random_latents": []}
        sets = {"penalised": {}, "random": []}
        compared = {"problem": "", "distance": None}
        blocks = latents(figures | {"random_sets": sets, "compared": compared})
        return next(b for b in reversed(blocks) if isinstance(b, Table))

    assert shown(0.0).header == ["latent", "arm", "off", "more"]
    assert shown(0.0).rows == [[0, "base", "0.60", "0.40"]]
    assert len(shown(0.0, 2.0).header) == 8
    assert shown(0.0, 2.0).rows[0][2:] == ["0.60", "", "", "", "", "0.40"]
    assert shown(0.0, 2.0).rows[1][2:] == ["0.60", "0.00", "0.00", "0.00", "0.00", "0.40"]
