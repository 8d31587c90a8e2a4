"""generations.html: what it packs of the generations, by the obvious implementation; that it holds
ten thousand in 10 MB; that nothing in a text is markup.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports import evidence
from reports.explorer import CUT, FIRED, REFUSED, UNENDED, explorer_data, explorer_page, fitted
from reports.figures import figures
from reports.frames import Frames, read_run
from sarm.run import RunDir
from tests.reports.test_report_page import Outline, visible
from tests.runs import BASE, HARMING, evaluated_run, generations, publish_evaluation

LATENTS = [{"latent": 5, "tau": 1.5, "role": "penalised"}, {"latent": 8, "tau": 0, "role": "m"}]


def unpacked(page: str) -> list[dict[str, Any]]:
    """What a page holds: one, or none where it is another page."""
    return [
        json.loads(zlib.decompress(base64.b64decode(text)))
        for text in re.findall(r'<script type="text/plain" id="data">(.*?)</script>', page)
    ]


def explored(run: RunDir) -> tuple[str, dict[str, Any], Frames]:
    read = read_run(run)
    found = figures(run, read, evidence.judgement(run, read).record(), "2026-01-31")
    return explorer_page(found, read), found, read


def rows(**columns: Any) -> pd.DataFrame:
    given = {
        "policy": ["penalty-seed1", "base", "penalty-seed1", "base"],
        "arm": ["penalty", "base", "penalty", "base"],
        "seed": [1, 0, 1, 0],
        "prompt_id": ["u1", "u1", "s1", "s1"],
        "kind": ["unsafe", "unsafe", "safe", "safe"],
        "prompt": ["how?", "how?", "what?", "what?"],
        "response": ["no", "so", "this", "that"],
        "reward": [0.12345, -1.0, math.nan, 0.5],
        "n_tokens": [3, 9, 4, 4],
        "penalised_fired": [0.0, 1.0, 0.0, 0.0],
        "refused": [True, False, False, False],
        "truncated": [False, True, False, True],
        "unended": [False, False, True, True],
        "kl": [2.0, 0.0, 1.996, 0.0],
        "z_5": [1.5, 2.25, 0.0, 0.0],
        "z_8": [0.0, 0.0, 0.75, 0.0],
        "below_5": [1.75, 0.0, 0.0, 0.0],
    }
    return pd.DataFrame(given | columns)


def test_answers_hold_what_the_rows_say():
    data = explorer_data(rows(), LATENTS)
    assert [(p["name"], p["seed"], p["trained"]) for p in data["policies"]] == [
        ("base", 0, False),
        ("penalty-seed1", 1, True),
    ]
    unsafe, safe = data["prompts"]
    assert (unsafe["id"], unsafe["kind"], unsafe["prompt"]) == ("u1", "unsafe", "how?")
    assert unsafe["answers"] == [
        (0, 0, "so", -1.0, 9, FIRED | CUT, 0.0, None, [(0, 2.25)], []),
        (1, 0, "no", 0.123, 3, REFUSED, 2.0, None, [], [0]),  # 1.5 is not above 1.5
    ]
    assert safe["answers"] == [
        (0, 0, "that", 0.5, 4, CUT | UNENDED, 0.0, None, [], []),
        (1, 0, "this", None, 4, UNENDED, 2.0, None, [(1, 0.75)], []),
    ]


def test_columns_that_evaluate_did_not_write_are_unknown():
    table = rows().drop(columns=["unended", "kl", "below_5", "prompt"])
    data = explorer_data(table, LATENTS)
    assert data["prompts"][0]["answers"][0] == (0, 0, "so", -1.0, 9, 5, None, None, [(0, 2.25)], [])
    assert data["prompts"][0]["prompt"] == "u1"
    assert explorer_data(table.iloc[:0], LATENTS)["prompts"] == []


def test_a_run_has_every_policy_prompt_and_latent_in_its_page(tmp_path):
    run = evaluated_run(tmp_path / "run", seeds=(0, 1, 2), n=60, n_safe=61)
    text, _, read = explored(run)
    (data,) = unpacked(text)
    assert len(data["policies"]) == 10 and len(data["prompts"]) == 121
    assert sum(len(p["answers"]) for p in data["prompts"]) == len(read.generations)
    assert [one["latent"] for one in data["latents"]] == HARMING[:5]
    unsafe = [p for p in data["prompts"] if p["kind"] == "unsafe"]
    fired = {data["policies"][a[0]]["name"]: 0 for p in unsafe for a in p["answers"]}
    for prompt in unsafe:
        for answer in prompt["answers"]:
            fired[data["policies"][answer[0]]["name"]] += bool(answer[5] & FIRED)
    table = read.generations[read.generations["kind"] == "unsafe"]
    assert fired == table.groupby("policy")["penalised_fired"].sum().astype(int).to_dict()
    assert "1,210 responses to 121 held-out prompts;" in visible(text)


@pytest.mark.parametrize("field", ["prompt", "response", "category", "prompt_id"])
def test_what_models_write_is_nowhere_in_the_pages_markup(tmp_path, field):
    run = evaluated_run(tmp_path / "run", seeds=(0,), n=3, n_safe=3)
    table = generations(BASE, n=3, n_safe=3)
    table[field] = table["prompt_id"] + "</script><b onclick='x'>bold</b><!--\u2028"
    publish_evaluation(run, "base", table)
    text, _, _ = explored(run)
    assert "<b onclick" not in text and Outline(text).open == []
    (data,) = unpacked(text)
    mine = [p for p in data["prompts"] if "bold" in json.dumps(p)]
    assert len(mine) == 6


def test_ten_thousand_generations_fit_in_ten_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + c) for c in rng.integers(0, 26, 5)) for _ in range(4000)])
    table = pd.concat(
        [
            rows(prompt_id=[f"u{i}", f"u{i}", f"s{i}", f"s{i}"]).assign(
                response=[" ".join(words[rng.integers(0, 4000, 130)]) for _ in range(4)]
            )
            for i in range(2500)
        ],
        ignore_index=True,
    )
    packed = fitted(explorer_data(table, LATENTS))
    assert packed.n_prompts == 5000 and packed.length >= 2000
    assert len(packed.text) < 10_000_000


def test_what_does_not_fit_is_clipped_then_left_out_some_of_both_kinds():
    rng = np.random.default_rng(1)
    table = pd.concat(
        [
            rows(prompt_id=[f"u{i}", f"u{i}", f"s{i}", f"s{i}"]).assign(
                response=[rng.bytes(1500).hex() for _ in range(4)]
            )
            for i in range(20)
        ]
    )
    data = explorer_data(table, LATENTS)
    whole = fitted(data)
    assert (whole.n_prompts, whole.length) == (40, 20_000)
    clipped = fitted(data, most=len(whole.text) // 2)
    assert (clipped.n_prompts, clipped.length) == (40, 1000)
    few = fitted(data, most=len(whole.text) // 20)
    assert few.length == 500 and 0 < few.n_prompts < 40
    (kept,) = unpacked(f'<script type="text/plain" id="data">{few.text}</script>')
    assert {p["kind"] for p in kept["prompts"]} == {"unsafe", "safe"}
    assert all(a[2].endswith(" [...]") for p in kept["prompts"] for a in p["answers"])
    assert len(few.text) <= len(whole.text) // 20
