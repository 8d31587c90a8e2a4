"""Policies kept on the way: whole or not at all, once each, known to the attempt that goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sarm.config import UserError
from sarm.ppo.kept import Kept, remove_others
from sarm.records import KeptPolicies
from sarm.run import Attempt, RunDir
from tests.tiny import tiny_config

UNIT = "penalty-seed0"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", tiny_config(tmp_path))


def writes(text: str):  # type: ignore[no-untyped-def]
    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "model.safetensors").write_text(text)
        (folder / "adapter" / "adapter_model.safetensors").write_text(text[::-1])

    return write


def test_what_two_attempts_kept_is_published_by_the_second(run: RunDir) -> None:
    first = Kept(Attempt(run, "ppo", UNIT))
    first.add(0.5, step=12, kl=0.53, write=writes("near"))
    known = list(first.state)
    first.add(1.0, step=20, kl=1.2, write=writes("after the checkpoint"))
    killed = run.folder("ppo", UNIT) / f".kept.{first.attempt.id}.kl-2.0.tmp"
    killed.mkdir()  # while it wrote a third

    second = Attempt(run, "ppo", UNIT)
    kept = Kept(second, known)
    kept.add(1.0, step=21, kl=1.1, write=writes("far"))
    kept.publish()
    second.publish()

    published = run.read("ppo", UNIT)
    entries = KeptPolicies.read(published.path("kept.json")).kept
    assert [tuple(entry.tree().values()) for entry in entries] == [
        (0.5, 12, 0.53, "kept/kl-0.5"),
        (1.0, 21, 1.1, "kept/kl-1.0"),
    ]
    found = {entry.distance: published.directory(entry.path) for entry in entries}
    for distance, text in ((0.5, "near"), (1.0, "far")):
        assert (found[distance] / "model.safetensors").read_text() == text
        adapter = found[distance] / "adapter" / "adapter_model.safetensors"
        assert adapter.read_text() == text[::-1]
    assert "kept/kl-0.5/adapter/adapter_model.safetensors" in published.manifest.outputs

    remove_others(published.folder, published.manifest.attempt)
    assert [folder.name for folder in published.folder.glob("*kept*/")] == [f"kept.{second.id}"]
    assert run.done("ppo", UNIT)


def test_half_a_policy_is_none(run: RunDir) -> None:
    attempt = Attempt(run, "ppo", UNIT)
    kept = Kept(attempt)

    def breaks(folder: Path) -> None:
        (folder / "model.safetensors").write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        kept.add(0.5, step=12, kl=0.53, write=breaks)
    assert kept.state == [] and not list(attempt.directory("kept").iterdir())


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: os.truncate(file, 1)])
def test_an_attempt_does_not_go_on_without_a_policy_that_its_checkpoint_names(
    run: RunDir, harm
) -> None:  # type: ignore[no-untyped-def]
    first = Kept(Attempt(run, "ppo", UNIT))
    first.add(0.5, step=12, kl=0.53, write=writes("near"))
    harm(next(run.folder("ppo", UNIT).glob("kept.*/kl-0.5/model.safetensors")))
    with pytest.raises(UserError, match=r"kl-0.5/model.safetensors, a policy kept .* remove"):
        Kept(Attempt(run, "ppo", UNIT), first.state)


def test_without_hard_links_files_are_copied(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Kept(Attempt(run, "ppo", UNIT))
    first.add(0.5, step=12, kl=0.53, write=writes("near"))

    def refused(*_: str) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    second = Attempt(run, "ppo", UNIT)
    Kept(second, first.state)
    copied = second.directory("kept") / "kl-0.5" / "model.safetensors"
    assert copied.read_text() == "near" and copied.stat().st_nlink == 1


def test_what_another_run_kept_is_copied_and_known_as_ones_own(run: RunDir, tmp_path: Path) -> None:
    """A parent's files stay its own; of a unit's own earlier attempt they are the same files."""
    parent = RunDir.create(tmp_path / "parent", run.config)
    first = Kept(Attempt(parent, "ppo", UNIT))
    first.add(2.5, step=12, kl=2.625, write=writes("near"))
    entry = {"distance": 2.5, "step": 12, "kl": 2.625, "path": "kept/kl-2.5"}
    sizes = {"adapter/adapter_model.safetensors": 4, "model.safetensors": 4}
    theirs = f"kept.{first.attempt.id}/kl-2.5"
    assert first.state == [{"entry": entry, "folder": theirs, "bytes": sizes}]
    mine = Kept(Attempt(run, "ppo", UNIT), first.state, copied_from=first.attempt.folder)
    folder = f"kept.{mine.attempt.id}/kl-2.5"
    assert mine.state == [{"entry": entry, "folder": folder, "bytes": sizes}]
    copied = mine.attempt.folder / folder / "model.safetensors"
    assert copied.read_text() == "near" and copied.stat().st_nlink == 1
    again = Kept(Attempt(run, "ppo", UNIT), mine.state)
    linked = again.attempt.folder / again.state[0]["folder"] / "model.safetensors"
    assert linked.samefile(copied) and copied.stat().st_nlink == 2
    assert not list(again.attempt.folder.glob(".kept*")), "nothing unfinished is left"
    copied.unlink()
    with pytest.raises(UserError) as refused:
        Kept(Attempt(run, "ppo", UNIT), mine.state)
    assert str(refused.value) == (
        f"{copied}, a policy kept at a KL distance, is missing; remove the folder checkpoints in"
        f" {run.folder('ppo', UNIT)} to train from the beginning"
    )


def test_only_what_other_attempts_kept_is_removed(tmp_path: Path) -> None:
    for name in ("kept.a", "kept.b", ".kept.a.kl-1.0.tmp", "policy.b", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "kept.json").write_text("{}")
    remove_others(tmp_path, "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "kept.a", "kept.json", "policy.b"]
