"""Records: what is written reads back, NaN is null, and another schema is refused by name by every
reader.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from jobs.__main__ import main
from reports.frames import read_run
from sarm import records
from sarm.config import UserError
from sarm.records import Cards, Features, File, StepMetrics, json_text, plain
from sarm.run import RunDir, file_sha256
from tests.runs import CARDS, HARMING, evaluated_run, features, fetched, publish

FILES = [
    kind
    for kind in vars(records).values()
    if isinstance(kind, type) and issubclass(kind, File) and hasattr(kind, "NAME")
]


def republish(run: RunDir, phase: str, name: str, **changes: Any) -> None:
    """Change keys of a published JSON file, its manifest following."""
    manifest = run.folder(phase) / "manifest.json"
    tree = json.loads(manifest.read_text())
    entry = tree["outputs"][name]
    file = run.folder(phase) / entry["file"]
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    entry |= {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    manifest.write_text(json.dumps(tree))


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    for written in (features(), CARDS, fetched("f" * 64)):
        written.write(tmp_path / "file.json")
        assert type(written).read(tmp_path / "file.json") == written
        assert json.loads((tmp_path / "file.json").read_text())["schema"] == type(written).SCHEMA
    assert Features.read(features_file(tmp_path)).penalised[1].latent == HARMING[1]


def features_file(folder: Path, **changes: Any) -> Path:
    file = folder / "features.json"
    file.write_text(json.dumps(features().tree() | changes))
    return file


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("number", [0, 9, "1", None, 1.5])
def test_another_schema_is_refused_by_name(kind: type[File], number: Any, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(json.dumps({"schema": number}))
    with pytest.raises(UserError) as raised:
        kind.read(file)
    told = str(raised.value)
    assert f"{file}: {kind.NAME} of schema {number!r}" in told
    assert f"reads schema {kind.SCHEMA}" in told and f"python -m jobs {kind.REDO} " in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": None}, r"k: input should be a valid integer"),
        ({"k": "192"}, r"k: input should be a valid integer"),
        ({"added": 1}, r"it has the unknown key added"),
        ({"penalised": [{"latent": 3}]}, r"it lacks penalised.0.tau; it lacks penalised.0.alpha"),
    ],
)
def test_a_key_of_a_wrong_kind_is_named(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        Features.read(features_file(tmp_path, **changes))
    for content in ("[]", "null", "{", "", '{"schema": 1}'):
        (tmp_path / "features.json").write_text(content)
        with pytest.raises(UserError, match=r"features\.json"):
            Features.read(tmp_path / "features.json")


def test_a_writer_that_forgets_a_key_or_adds_one_fails() -> None:
    tree = features().tree()
    with pytest.raises(ValidationError):
        Features(**{key: value for key, value in tree.items() if key != "reward_sd"})
    with pytest.raises(ValidationError):
        Features(**tree, more=1)


# NaN


def test_nan_is_null_wherever_it_stands() -> None:
    odd = {
        "a": math.nan,
        "b": [1.5, math.inf, (np.float32("nan"), np.int64(3))],
        "c": np.array([[1.0, -math.inf]]),
        "d": pd.NaT,
        5: pd.DataFrame({"x": [1.0, math.nan]}).to_dict("records"),
        "e": np.bool_(True),
    }
    assert json.loads(json_text(odd)) == {
        "a": None,
        "b": [1.5, None, [None, 3]],
        "c": [[1.0, None]],
        "d": None,
        "5": [{"x": 1.0}, {"x": None}],
        "e": True,
    }
    assert plain(("a", 1)) == ["a", 1]


def test_records_hold_no_nan(tmp_path: Path) -> None:
    found = features(harming=[dict(features().harming[0].tree(), effect=math.nan)])
    assert found.harming[0].effect is None
    with pytest.raises(ValidationError, match="reward_sd"):
        features(reward_sd=math.nan)
    line = StepMetrics(step=3, **{"loss/total": math.nan, "objective/kl": 0.5}).line()
    assert json.loads(line) == {"schema": 1, "step": 3, "loss/total": None, "objective/kl": 0.5}
    assert Cards(**CARDS.tree() | {"minimal_edits": {"n": math.nan}}).minimal_edits == {"n": None}


# Every reader


@pytest.mark.parametrize("phase", ["steer", "cards", "ppo", "evaluate", "export"])
def test_every_phase_refuses_features_of_another_schema(
    phase: str, selected_run: RunDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(selected_run.path, tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    republish(run, "select", "features.json", schema=7)
    unit = {"ppo": "penalty-seed0", "evaluate": "base"}.get(phase, "all")
    assert main([phase, "--run", str(run.path), "--unit", unit]) == 2
    told = capfd.readouterr().err
    assert f"features.json of schema 7, and this version reads schema {Features.SCHEMA}" in told
    assert not run.done(phase, unit)


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        ("select", "features.json"),
        ("steer", "summary.json"),
        ("cards", "cards.json"),
        ("fetch", "models.json"),
    ],
)
def test_the_report_names_a_file_of_another_schema(phase: str, name: str, tmp_path: Path) -> None:
    run = evaluated_run(tmp_path / "run")
    if phase == "fetch":
        fetch = run.folder("fetch") / "manifest.json"
        fetch.unlink()
        publish(run, "fetch", files={"models.json": fetched("0" * 64)})
    republish(run, phase, name, schema=7)
    phases = read_run(run).phases.set_index("phase")
    assert phases.at[phase, "status"] == "damaged"
    assert "of schema 7, and this version reads schema" in phases.at[phase, "cause"]


def test_a_line_of_the_training_log_of_another_schema_is_named(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0, "objective/kl": 0.25}\n\n{"schema": 2, "step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:3: a line of metrics\.jsonl of schema 2"):
        records.read_training_log(log)
    log.write_text('{"step": 0, "objective/kl": 0.25}\n{"schema": 1, "step": 1}\n')
    assert records.read_training_log(log) == [{"step": 0, "objective/kl": 0.25}, {"step": 1}]


def test_fixtures_have_every_key() -> None:
    assert set(features().tree()) == {
        "schema" if name == "schema_number" else name for name in Features.model_fields
    }


def test_labels_of_the_first_schema_keep_their_scores() -> None:
    """Labels cost calls to an endpoint; schema 1 scored them by detection alone."""
    old = {
        "text": "lists of steps",
        "score": 0.75,
        "true_positive": 1.0,
        "true_negative": 0.5,
        "n_active": 3,
        "n_silent": 4,
        "unreadable": 1,
    }
    found = records.scored_by_fuzzing_too(old)
    assert found["text"] == "lists of steps"
    assert found["detection"] == {
        "score": 0.75,
        "true_positive": 1.0,
        "true_negative": 0.5,
        "n_fitting": 3,
        "n_others": 4,
        "unreadable": 1,
    }
    assert found["fuzzing"]["score"] is None and found["fuzzing"]["n_fitting"] == 0
    assert records.scored_by_fuzzing_too(found) is found
    assert records.scored_by_fuzzing_too(None) is None
    assert 1 in records.Cards.OLDER
