"""Going on from a finished run as a new one: to the bit where nothing differs but the length, and
the parent as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.__main__ import run_unit
from jobs.ppo import made_with
from sarm.config import UserError
from sarm.records import KeptPolicies, Readings
from sarm.run import Attempt, RunDir, file_sha256
from tests.jobs.test_ppo import UNIT, a_run, logged, stopping_after
from tests.runs import publish

SETTINGS = {
    "ppo.steps": 10,
    "ppo.learning_rate": 0.02,
    "ppo.lr_schedule": "constant",
    "ppo.kl_distances": [0.02, 0.5, 1.0, 1.5, 2.0, 500.0],
    "ppo.held_out": {"every": 3, "prompts": 3, "completions": 1},
    "ppo.log_to": "none",
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Six steps."""
    run = a_run(tmp_path_factory.mktemp("parent"), **SETTINGS | {"ppo.steps": 6})
    run_unit(run, "ppo", UNIT)
    return run


@pytest.fixture
def beside(parent: RunDir, tmp_path: Path) -> Callable[..., RunDir]:
    """A run on the parent's models."""
    return lambda name, **settings: a_run(
        parent.path.parent, f"{tmp_path.name}-{name}", **SETTINGS | settings
    )


@pytest.fixture
def child(parent: RunDir, beside: Callable[..., RunDir]) -> Callable[..., RunDir]:
    return lambda **settings: beside("child", **{"ppo.continue_from": str(parent.path)} | settings)


def files_of(run: RunDir) -> dict[str, tuple[str, float, int]]:
    return {
        str(file): (
            hashlib.sha256(file.read_bytes()).hexdigest(),
            file.stat().st_mtime,
            file.stat().st_nlink,
        )
        for file in run.path.rglob("*")
        if file.is_file()
    }


def test_with_more_steps_it_is_the_longer_run_to_the_bit(
    parent: RunDir,
    beside: Callable[..., RunDir],
    child: Callable[..., RunDir],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = beside("whole")
    run_unit(whole, "ppo", UNIT)
    before = files_of(parent)
    longer = child()
    with monkeypatch.context() as patch:  # and interrupted on the way
        stopping_after(patch, 2)
        with pytest.raises(SystemExit):
            run_unit(longer, "ppo", UNIT)
    run_unit(longer, "ppo", UNIT)
    assert files_of(parent) == before

    made, uninterrupted = (run.read("ppo", UNIT) for run in (longer, whole))
    assert logged(longer, "metrics.jsonl") == logged(whole, "metrics.jsonl")
    assert made.manifest.more["steps"] == 10
    weights = "policy/model.safetensors"
    assert made.manifest.outputs[weights].sha256 == uninterrupted.manifest.outputs[weights].sha256
    # The parent was evaluated at its end besides.
    steps = [line["step"] for line in logged(longer, "held_out.jsonl")]
    assert steps == [0, 3, 6, 9, 10]
    kept, kept_whole = (
        [
            (k.distance, k.step, k.kl, file_sha256(p.directory(k.path) / "model.safetensors"))
            for k in KeptPolicies.read(p.path("kept.json")).kept
        ]
        for p in (made, uninterrupted)
    )
    assert kept == kept_whole and min(k[1] for k in kept) <= 6 < max(k[1] for k in kept)

    told = made.manifest.more["parent"]
    manifest = parent.folder("ppo", UNIT) / "manifest.json"
    assert told == {
        "run": str(parent.path),
        "unit": UNIT,
        "steps": 6,
        "manifest_sha256": file_sha256(manifest),
    }
    assert made.manifest.inputs[f"/{manifest}"] == file_sha256(manifest)
    assert uninterrupted.manifest.more["parent"] is None


def test_another_learning_rate_holds_from_there_on(
    parent: RunDir, child: Callable[..., RunDir]
) -> None:
    fewer = SETTINGS["ppo.kl_distances"][1:]
    run = child(**{"ppo.learning_rate": 0.001, "ppo.steps": 8, "ppo.kl_distances": fewer})
    run_unit(run, "ppo", UNIT)
    lines = logged(run, "metrics.jsonl")
    assert [line["lr"] for line in lines] == [0.02] * 6 + [0.001] * 2
    assert lines[:6] == logged(parent, "metrics.jsonl")
    # A policy that the parent kept at a distance that is asked for no more is not copied.
    kept, kept_before = (
        [k.distance for k in KeptPolicies.read(of.read("ppo", UNIT).path("kept.json")).kept]
        for of in (run, parent)
    )
    assert kept_before[0] == 0.02 and len(kept_before) > 1 and 0.02 not in kept


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ppo.steps": 6}, "has made 6 steps, and ppo.steps 6 counts them"),
        ({"ppo.batch_size": 4, "ppo.gamma": 0.9}, "another ppo.batch_size, ppo.gamma; only"),
        ({"ppo.lora.rank": 2}, "another ppo.lora.rank"),
        ({"ppo.continue_from": "outputs/none"}, "outputs/none is not a run directory"),
    ],
)
def test_what_is_not_the_same_training_is_refused(
    child: Callable[..., RunDir], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run_unit(child(**settings), "ppo", UNIT)


def test_other_thresholds_are_refused(child: Callable[..., RunDir]) -> None:
    run = child()
    found = Readings.read(run.read("calibrate").path("readings.json"))
    (first, *others) = found.random["0"]
    moved = {"0": [first.model_copy(update={"tau": first.tau + 0.01}), *others]}
    publish(run, "calibrate", files={"readings.json": found.model_copy(update={"random": moved})})
    with pytest.raises(UserError, match="penalised latents, thresholds or weights that are not"):
        run_unit(run, "ppo", UNIT)
    # What rewards are divided by.
    scaled = found.model_copy(update={"reward_sd": 2.0 * (found.reward_sd or 1.0)})
    publish(run, "calibrate", files={"readings.json": scaled})
    with pytest.raises(UserError, match="penalised latents, thresholds or weights that are not"):
        run_unit(run, "ppo", UNIT)


def test_a_checkpoint_is_of_one_parent(child: Callable[..., RunDir]) -> None:
    run = child()
    attempt = Attempt(run, "ppo", UNIT)
    parents = (None, SimpleNamespace(manifest_sha256="a"), SimpleNamespace(manifest_sha256="b"))
    assert len({made_with(run.config, attempt, of) for of in parents}) == 3


def test_a_parent_that_is_not_done_or_kept_no_state_is_refused(
    beside: Callable[..., RunDir], child: Callable[..., RunDir]
) -> None:
    settings = {"ppo.steps": 1, "ppo.keep_state": False, "ppo.held_out": {}}
    forgetful = beside("forgetful", **settings)
    from_it = {"ppo.continue_from": str(forgetful.path)}
    with pytest.raises(UserError, match=rf"ppo/{UNIT} in .*forgetful is not done: no manifest"):
        run_unit(child(**from_it), "ppo", UNIT)
    run_unit(forgetful, "ppo", UNIT)
    assert not any(
        name.startswith("state/") for name in forgetful.read("ppo", UNIT).manifest.outputs
    )
    with pytest.raises(UserError, match=r"kept no optimizer state .* ppo.keep_state=true"):
        run_unit(child(**from_it), "ppo", UNIT)


def test_a_damaged_state_is_told(parent: RunDir, child: Callable[..., RunDir]) -> None:
    published = parent.read("ppo", UNIT)
    (name,) = [n for n in published.manifest.outputs if n.endswith("rank-00000.safetensors")]
    file = published.folder / published.manifest.outputs[name].file
    data = file.read_bytes()
    try:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match="does not match its SHA-256"):
            run_unit(child(), "ppo", UNIT)
    finally:
        file.write_bytes(data)


def test_the_report_names_the_parent() -> None:
    from reports.policy_sections import training

    row = {
        "policy": UNIT,
        "steps": 10,
        "training_s": 60.0,
        "reward": 1.0,
        "penalty": 0.1,
        "kl": 0.5,
        "loss": 0.2,
        "tokens_per_s": 9.0,
        "ended_early": "the mean KL reached 4",
        "parent": {"run": "outputs/a", "unit": UNIT, "steps": 6, "manifest_sha256": "ab" * 32},
    }
    plain = row | {"policy": "penalty-seed0", "ended_early": None, "parent": None}
    blocks = training({"training": [row, plain], "shown_policy": UNIT})
    told = [str(block) for block in blocks]
    assert (
        sum(
            f"{UNIT} goes on from step 6 of {UNIT} in outputs/a (manifest abababababab)" in t
            for t in told
        )
        == 1
    )
    assert sum("ended before its last step: the mean KL reached 4." in t for t in told) == 1
    assert not any("penalty-seed0 goes on" in t or "penalty-seed0 ended" in t for t in told)
