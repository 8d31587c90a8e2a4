"""What a run that goes on from a finished one is told of it, and when it is refused: each word, on
records that stand for the parent's. Whole runs are in tests/jobs/test_continue.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sarm.config import Config, UserError
from sarm.ppo import parent as module
from sarm.ppo.parent import Parent, parent_of
from sarm.run import file_sha256
from tests.tiny import tiny_config

UNIT = "penalty-seed0"
FOLDER = Path("/runs/a/ppo") / UNIT


def parent(config: Config, made_with: dict[str, Any] | None = None, **outputs: str) -> Parent:
    """Of six steps, with these output files by name; `made_with` as its manifest has the config."""
    manifest = SimpleNamespace(
        more={"steps": "6"},
        unit=UNIT,
        config=made_with,
        outputs={name: SimpleNamespace(file=file) for name, file in outputs.items()},
    )
    published: Any = SimpleNamespace(
        folder=FOLDER,
        manifest=manifest,
        path=lambda name: FOLDER / name,
        directory=lambda name: pytest.fail(f"{name} was hashed"),
    )
    run: Any = SimpleNamespace(path=Path("/runs/a"), config=config)
    return Parent(run, published, "ff")


def test_what_the_manifest_is_told_of_the_parent(tmp_path: Path) -> None:
    one = parent(tiny_config(tmp_path))
    assert one.told() == {"run": "/runs/a", "unit": UNIT, "steps": 6, "manifest_sha256": "ff"}
    assert (one.folder, one.manifest_file) == (FOLDER, FOLDER / "manifest.json")
    assert one.holds(FOLDER / "state.x" / "step-6") and not one.holds(FOLDER)
    assert not one.holds(FOLDER.parent / "penalty-seed1" / "step-6")


def test_its_state_is_opened_where_it_lies_and_hashed_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.checkpoint, "opened", lambda path: ("opened", path))
    one = parent(tiny_config(tmp_path), **{"state/manifest.json": "state.17/manifest.json"})
    assert one.loaded(verify=False) == ("opened", FOLDER / "state.17")
    hashed: list[str] = []
    one.published.directory = hashed.append  # type: ignore[misc]
    assert one.loaded(verify=True) == ("opened", FOLDER / "state.17") and hashed == ["state"]
    with pytest.raises(UserError) as refused:
        parent(tiny_config(tmp_path), state="x").loaded(verify=False)
    assert str(refused.value) == (
        f"{FOLDER} kept no optimizer state to go on from; train it again with ppo.keep_state=true"
    )


def test_only_what_changes_no_step_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_config(tmp_path)
    monkeypatch.setattr(module, "pinned", lambda run: run.config)
    alike = {
        "ppo.continue_from": "/runs/a",
        "ppo.keep_state": True,
        "ppo.steps": 7,
        "ppo.learning_rate": 0.5,
        "ppo.value_learning_rate": 0.25,
        "ppo.lr_schedule": "cosine",
        "ppo.warmup_steps": 2,
        "ppo.kl_distances": [0.5],
        "ppo.stop_at_kl": 9.0,
        "ppo.held_out.every": 3,
        "ppo.held_out.prompts": 2,
        "ppo.log_to": "tensorboard",
        "ppo.checkpoint_every": 3,
        "ppo.keep_last": 2,
        "ppo.unreadable": "stop",
        "select.unconfirmed": "stop",
        "ppo.micro_batch_tokens": 99,
        "ppo.gradient_checkpointing": True,
        "ppo.zero_stage": 0,
        "report.texts": "none",
    }
    # in its manifest, or, of an old one, in its run
    for given in (parent(made), parent(made, made.model_dump(mode="json"))):
        given.check_config(tiny_config(tmp_path, **alike))
        with pytest.raises(UserError) as refused:
            given.check_config(tiny_config(tmp_path, **alike | {"ppo.lam": 0.5, "ppo.gamma": 0.5}))
        assert str(refused.value) == (
            "ppo.continue_from: /runs/a was trained with another ppo.gamma, ppo.lam; only the"
            " steps, the learning rates and what changes no step may differ"
        )
    other = made.model_dump(mode="json")
    other["ppo"]["gamma"] = 0.5
    with pytest.raises(UserError, match=r"another ppo\.gamma; only"):
        parent(made, other).check_config(tiny_config(tmp_path, **alike))
    for steps in (5, 6):
        with pytest.raises(UserError) as refused:
            parent(made).check_config(tiny_config(tmp_path, **alike | {"ppo.steps": steps}))
        assert str(refused.value) == (
            f"ppo.continue_from: /runs/a has made 6 steps, and ppo.steps {steps} counts them;"
            " raise it"
        )


def test_a_branch_and_the_commit_that_was_found_there_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent's config names a branch, this run's the commit; fetch says what the branch was."""
    branch, commit, moved = (
        tiny_config(tmp_path, **{"policy.revision": name, "ppo.steps": 9})
        for name in ("main", "c0ffee", "beef")
    )
    monkeypatch.setattr(module, "pinned", lambda run: commit if run.path else None)
    parent(branch).check_config(commit)
    with pytest.raises(UserError, match=r"another policy\.revision; only"):
        parent(branch).check_config(moved)
    # of what is no revision only the configs count
    apart = tiny_config(tmp_path, **{"policy.revision": "c0ffee", "ppo.steps": 9, "ppo.gamma": 0.5})
    with pytest.raises(UserError, match=r"another ppo\.gamma; only"):
        parent(branch).check_config(apart)


def test_another_penalty_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = SimpleNamespace(penalised=[{"latent": 3}], reward_sd=0.5)
    monkeypatch.setattr(
        module.Calibration,
        "read",
        lambda path: theirs if path == FOLDER / "calibration.json" else None,
    )
    one = parent(tiny_config(tmp_path))
    same: Any = SimpleNamespace(penalised=[{"latent": 3}], reward_sd=0.5)
    one.check_penalty(same)
    for changes in ({"penalised": [{"latent": 4}]}, {"reward_sd": 0.25}):
        other: Any = SimpleNamespace(**vars(same) | changes)
        with pytest.raises(UserError) as refused:
            one.check_penalty(other)
        assert str(refused.value) == (
            "ppo.continue_from: /runs/a penalised latents, thresholds or weights that are not this"
            " run's; copy its folders select and calibrate, and those they read, into this run"
        )


def test_the_unit_of_the_same_name_is_taken_where_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_config(tmp_path, **{"ppo.steps": 9})
    assert parent_of(made, UNIT) is None
    (tmp_path / "manifest.json").write_text("of the parent")
    asked: list[Any] = []
    problem: list[str] = []
    published = parent(made).published
    published.folder = tmp_path  # type: ignore[misc]

    def why_not_done(*given: Any, **how: Any) -> str | None:
        asked.append((given, how))
        return problem[0] if problem else None

    run = SimpleNamespace(
        path=Path("/runs/a"),
        config=made,
        why_not_done=why_not_done,
        read=lambda *given: published if given == ("ppo", UNIT) else None,
    )
    folders: list[Path] = []
    monkeypatch.setattr(module, "pinned", lambda run: run.config)
    monkeypatch.setattr(
        module, "RunDir", SimpleNamespace(open=lambda path: folders.append(path) or run)
    )
    going_on = tiny_config(tmp_path, **{"ppo.steps": 9, "ppo.continue_from": "outputs/a"})
    found = parent_of(going_on, UNIT)
    assert found == Parent(run, published, file_sha256(tmp_path / "manifest.json"))  # type: ignore[arg-type]
    assert folders == [module.ROOT / "outputs" / "a"]
    assert asked == [(("ppo", UNIT), {"hashes": False})]
    monkeypatch.setenv("HOME", "/home/me")
    parent_of(tiny_config(tmp_path, **{"ppo.steps": 9, "ppo.continue_from": "~/a"}), UNIT)
    assert folders[1:] == [Path("/home/me/a")]
    short = tiny_config(tmp_path, **{"ppo.steps": 6, "ppo.continue_from": "outputs/a"})
    with pytest.raises(UserError, match="has made 6 steps"):
        parent_of(short, UNIT)
    problem.append("it never ran")
    with pytest.raises(UserError) as refused:
        parent_of(going_on, UNIT)
    assert str(refused.value) == (
        f"ppo.continue_from: ppo/{UNIT} in /runs/a is not done: it never ran; finish it first"
    )
