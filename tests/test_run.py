"""The run directory: what counts as done, what a killed or late writer leaves behind, and what a
merge refuses.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors import SafetensorError

import sarm.run
from jobs.__main__ import run_unit
from sarm.cli import ended
from sarm.config import (
    ROOT,
    Config,
    PenaltyConfig,
    PpoConfig,
    Strict,
    UserError,
    parse_config,
    set_key,
)
from sarm.config.reads import values, values_sha256
from sarm.launched import latest
from sarm.records import json_text
from sarm.run import (
    Attempt,
    Published,
    RunDir,
    config_of,
    differences,
    exact_cover,
    without_progress,
    write_atomic,
)

BASE = """
name: base
policy: {model: outputs/policy}
sarm: {model: outputs/sarm}
encode: {shards: 3}
data:
  sources:
    demo:
      {format: jsonl, label: Demo, path: data/demo/pairs.jsonl, split: {discovery: 0.5, test: 0.5}}
"""


@pytest.fixture(autouse=True)
def _no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking git for the commit costs two processes a manifest."""
    monkeypatch.setenv("SARM_GIT_COMMIT", "0" * 40)


def config(*overrides: str) -> Config:
    tree: dict[str, Any] = yaml.safe_load(BASE)
    for override in overrides:
        set_key(tree, override)
    return parse_config(tree, "base.yaml")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", config())


def publish(
    run: RunDir,
    phase: str = "select",
    unit: str = "all",
    text: str = "{}",
    *,
    after: tuple[str, ...] = (),
    **more: Any,
) -> Published:
    """A small unit: one file, one folder, and the units it read."""
    attempt = Attempt(run, phase, unit)
    for upstream in after:
        attempt.read(upstream)  # type: ignore[arg-type]
    attempt.path("features.json").write_text(text)
    folder = attempt.directory("policy")
    (folder / "inner").mkdir()
    (folder / "weights.safetensors").write_bytes(b"w" * 1000)
    (folder / "inner" / "notes.txt").write_text("notes")
    return attempt.publish(**more)


# What counts as done


def test_a_published_unit_is_done_and_reads_back(run: RunDir) -> None:
    assert run.why_not_done("select") == "no manifest"
    publish(run, text='{"a": 1}')
    assert run.done("select")
    found = run.read("select")
    assert found.json("features.json") == {"a": 1}
    assert (found.directory("policy") / "inner" / "notes.txt").read_text() == "notes"
    assert sorted(found.manifest.outputs) == [
        "features.json",
        "policy/inner/notes.txt",
        "policy/weights.safetensors",
    ]
    assert {
        "config_sha256",
        "inputs",
        "git_commit",
        "image_sha256",
        "seed",
        "host",
        "device",
        "started",
        "ended",
        "job_id",
    } <= set(found.manifest.tree())
    with pytest.raises(UserError, match=r"no output 'table.parquet'; it has features.json"):
        found.path("table.parquet")
    with pytest.raises(UserError, match="no output folder 'model'"):
        found.directory("model")


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o022, 0o644)])
def test_outputs_have_the_permissions_that_the_umask_asks_for(
    run: RunDir, mask: int, mode: int
) -> None:
    """Libraries that make a file by renaming a temporary one leave it its owner's alone."""
    before = os.umask(mask)
    try:
        attempt = Attempt(run, "select", "all")
        for path in (attempt.path("features.json"), attempt.directory("policy") / "weights"):
            path.write_text("{}")
            path.chmod(0o600)
        published = attempt.publish()
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    for path in (published.path("features.json"), published.directory("policy") / "weights"):
        assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    "name", ["features.json", "policy/weights.safetensors", "policy/inner/notes.txt"]
)
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes instead of"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\n"), "bytes instead of"),
        (
            lambda file: file.write_bytes(
                bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
            ),
            "does not match its SHA-256",
        ),
    ],
    ids=["missing", "shorter", "longer", "one bit"],
)
def test_damage_is_found_and_named(
    run: RunDir, name: str, harm: Callable[[Path], None], words: str
) -> None:
    published = publish(run)
    harm(published.path(name))
    assert run.why_not_done("select") == f"{name} {words}" or words in str(
        run.why_not_done("select")
    )
    assert str(run.why_not_done("select")).startswith(name)
    with pytest.raises(UserError, match=words):
        run.read("select").path(name) if "/" not in name else run.read("select").directory("policy")
    publish(run)
    assert run.done("select")


def test_sizes_alone_do_not_see_a_flipped_bit(run: RunDir) -> None:
    file = publish(run).path("features.json")
    file.write_text("[]")
    assert run.done("select", hashes=False)
    assert not run.done("select")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"x" * 100_000])
def test_a_manifest_that_is_none_means_not_done(run: RunDir, content: bytes) -> None:
    folder = publish(run).folder
    (folder / "manifest.json").write_bytes(content)
    assert run.why_not_done("select") == "no manifest"
    with pytest.raises(UserError, match="select/all is not done"):
        run.read("select")


def test_a_changed_input_undoes_what_was_made_from_it_and_no_more(run: RunDir) -> None:
    publish(run, "select", text="1")
    publish(run, "steer", after=("select",))
    publish(run, "fetch")
    assert run.done("steer")
    publish(run, "select", text="1")
    assert run.done("steer"), "the same content again is no change"
    publish(run, "select", text="2")
    assert run.why_not_done("steer") == "its input select/all/features.json has changed"
    assert run.done("fetch") and run.done("select")
    (run.folder("select") / "manifest.json").unlink()
    assert run.why_not_done("steer") == "its input select/all is not done"


def test_going_without_a_unit_is_noted(run: RunDir) -> None:
    attempt = Attempt(run, "report")
    attempt.note_missing("ppo", "penalty-seed0")
    attempt.path("final_report.txt").write_text("partial")
    attempt.publish()
    assert run.done("report")
    publish(run, "ppo", "penalty-seed0")
    assert "has been done since" in str(run.why_not_done("report"))


def test_what_was_gone_without_counts_once_it_is_done_not_while_its_own_needs_are_missing(
    run: RunDir,
) -> None:
    publish(run, "select")
    publish(run, "steer", after=("select",))
    (run.folder("select") / "manifest.json").unlink()
    attempt = Attempt(run, "report")
    for phase in ("select", "steer"):
        attempt.note_missing(phase, "all")
    attempt.path("final_report.txt").write_text("partial")
    attempt.publish()
    assert run.manifest("steer") and run.why_not_done("report") is None
    publish(run, "select")
    assert "has been done since" in str(run.why_not_done("report"))


def test_a_file_outside_the_run_is_noted_by_hash(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    attempt = Attempt(run, "encode", "shard-0000-of-0003")
    attempt.note_file(tmp_path / "data.jsonl")
    manifest = attempt.publish(range_=(0, 1), total=3).manifest
    assert manifest.inputs == {
        f"/{tmp_path / 'data.jsonl'}": (
            "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        )
    }
    assert run.done("encode", "shard-0000-of-0003")


# One run, one config


def test_another_config_takes_the_place_of_the_stored_one_which_is_kept(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    stored = (run.path / "config.yaml").read_bytes()
    assert RunDir.create(run.path, config()).config == run.config
    assert capfd.readouterr().err == "" and not (run.path / "configs").exists()
    changed = RunDir.create(run.path, config("ppo.steps=7", "ppo.lora=null"))
    told = capfd.readouterr().err
    assert "(ppo.lora.alpha, ppo.lora.rank, ppo.steps): nothing done reads that" in told
    assert RunDir.open(run.path).config == changed.config == config("ppo.steps=7", "ppo.lora=null")
    assert [file.read_bytes() for file in (run.path / "configs").iterdir()] == [stored]
    assert differences(config(), config("data.sources.demo.limit=5")) == ["data.sources.demo.limit"]
    assert differences(config(), config()) == []


def test_a_changed_value_undoes_the_phases_that_read_it_and_no_other(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    for phase, unit in (("select", "all"), ("ppo", "penalty-seed0"), ("steer", "all")):
        publish(run, phase, unit)
    publish(run, "encode", "shard-0000-of-0003", range_=(0, 1), total=1)
    changed = RunDir.create(run.path, config("ppo.penalty.tau=2.0", "ppo.seeds=[0, 1]"))
    assert "ppo/penalty-seed0, select/all will be done again" in capfd.readouterr().err
    assert changed.why_not_done("select") == "made with another config (ppo.penalty.tau)"
    with pytest.raises(UserError, match=r"select/all in .* is made with another config"):
        changed.read("select")
    assert not changed.done("ppo", "penalty-seed0")
    assert changed.done("steer") and changed.done("encode", "shard-0000-of-0003")
    again = RunDir.create(run.path, config())
    assert again.done("select") and again.done("ppo", "penalty-seed0")
    assert len(list((run.path / "configs").iterdir())) == 2


def test_a_path_can_be_corrected_while_nothing_is_done(run: RunDir) -> None:
    assert RunDir.create(run.path, config("name=other", "sarm.model=outputs/right")).config.name
    publish(RunDir.open(run.path))
    with pytest.raises(UserError, match=r"a run of the config 'other', and this one is 'base'"):
        RunDir.create(run.path, config())
    assert RunDir.open(run.path).config.name == "other"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        RunDir.open(tmp_path)


def test_the_runs_own_config_serves_where_none_is_given(run: RunDir, tmp_path: Path) -> None:
    assert config_of(run.path) == run.config
    assert config_of(run.path, None, ["ppo.steps=7"]) == config("ppo.steps=7")
    (tmp_path / "other.yaml").write_text(BASE.replace("name: base", "name: other"))
    assert config_of(run.path, tmp_path / "other.yaml").name == "other"
    with pytest.raises(UserError, match="is not a run directory"):
        config_of(tmp_path / "none", None, ["ppo.steps=7"])


# Runs of other versions


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> type[Config]:
    """The schema of a later version: sections have new keys with defaults, and there is a new
    section.
    """

    class Penalty(PenaltyConfig):
        added: float = 0.5

    class Ppo(PpoConfig):
        penalty: Penalty = Penalty()
        also: str | None = None

    class Audit(Strict):
        samples: int = 4

    class Later(Config):
        ppo: Ppo = Ppo()
        audit: Audit = Audit()

    monkeypatch.setattr("sarm.config.reading.Config", Later)
    return Later


def test_a_key_that_a_later_version_adds_redoes_nothing(run: RunDir, later: type[Config]) -> None:
    """The run was published by today's version; the stored config lacks the keys."""
    for phase, unit in (("select", "all"), ("ppo", "penalty-seed0"), ("report", "all")):
        publish(run, phase, unit)
    opened = RunDir.open(run.path)
    assert opened.config.ppo.penalty.added == 0.5  # type: ignore[attr-defined]
    for phase, unit in (("select", "all"), ("ppo", "penalty-seed0"), ("report", "all")):
        assert opened.done(phase, unit), opened.why_not_done(phase, unit)
    set_now = RunDir.create(run.path, config("ppo.penalty.added=0.75"))
    assert set_now.why_not_done("select") == "made with another config (ppo.penalty.added)"
    assert values_sha256("ppo", opened.config) == values_sha256("ppo", run.config)
    assert values_sha256("ppo", set_now.config) != values_sha256("ppo", run.config)


def test_values_under_names_of_an_earlier_version_are_the_same_values(run: RunDir) -> None:
    file = publish(run).folder / "manifest.json"
    tree = json.loads(file.read_text())
    tree["config"]["select"]["redraws"] = tree["config"]["select"].pop("stability_repeats")
    tree["config"]["ppo"]["penalty"]["kind"] = "count"
    tree["config"]["select"]["since_dropped"] = 3
    file.write_text(json.dumps(tree))
    assert run.why_not_done("select") is None
    tree["config"]["select"]["redraws"] += 1
    file.write_text(json.dumps(tree))
    assert run.why_not_done("select") == ("made with another config (select.stability_repeats)")


def as_schema_1(run: RunDir, phase: str, config_sha256: str) -> None:
    """A manifest as the first versions wrote it: the hash of the whole config, as stored."""
    file = run.folder(phase) / "manifest.json"
    tree = json.loads(file.read_text())
    tree.pop("config", None)
    file.write_text(json.dumps(tree | {"schema": 1, "config_sha256": config_sha256}))


def test_a_run_of_the_first_versions_is_opened(run: RunDir) -> None:
    """Their stored config has keys under names of that time, and lacks those added since."""
    tree = yaml.safe_load((run.path / "config.yaml").read_text())
    tree["select"]["redraws"] = tree["select"].pop("stability_repeats")
    tree["ppo"]["penalty"]["kind"] = "count"
    del tree["cards"]["controls"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(tree))
    told = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    opened = RunDir.open(run.path)
    for phase in ("select", "cards"):
        publish(opened, phase)
        as_schema_1(opened, phase, told)
    assert opened.done("select") and opened.done("cards")
    assert opened.read("select").json("features.json") == {}
    changed = RunDir.create(run.path, config("ppo.penalty.tau=2.0"))
    assert changed.why_not_done("select") == "made with another config (ppo.penalty.tau)"
    assert changed.done("cards")
    as_schema_1(changed, "cards", "0" * 64)
    assert "an earlier version with a config that is no longer" in str(
        changed.why_not_done("cards")
    )


@pytest.mark.parametrize("number", [0, 3, None, "2"])
def test_a_manifest_of_another_schema_is_named(run: RunDir, number: Any) -> None:
    file = publish(run).folder / "manifest.json"
    publish(run, "steer", after=("select",))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": number}))
    told = f"manifest.json of schema {number!r}, and this version reads schema 2"
    assert told in str(run.why_not_done("select"))
    assert told in str(run.why_not_done("steer"))
    with pytest.raises(UserError, match="and this version reads schema 2"):
        run.read("select")
    with pytest.raises(UserError, match="and this version reads schema 2"):
        run_unit(run, "select", "all")


def test_what_is_done_again_is_said_with_its_reason(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(run)
    changed = RunDir.create(run.path, config("select.listed=3"))
    monkeypatch.setattr("jobs.select.run", lambda config, run, unit, attempt: attempt.publish())
    run_unit(changed, "select", "all")
    said = capsys.readouterr().out
    assert "done again" in said and "made with another config (select.listed)" in said


def test_a_file_outside_the_run_that_changed_undoes_what_read_it(
    run: RunDir, tmp_path: Path
) -> None:
    (tmp_path / "steering.json").write_text("{}")
    attempt = Attempt(run, "steer")
    attempt.note_file(tmp_path / "steering.json")
    attempt.publish()
    assert run.done("steer")
    (tmp_path / "steering.json").write_text('{"1": ["*", 0.0]}')
    assert run.why_not_done("steer") == f"its input {tmp_path / 'steering.json'} has changed"
    (tmp_path / "steering.json").unlink()
    assert run.done("steer"), "a file that is not on this machine tells nothing"


# The merge


def shard(run: RunDir, index: int, start: int, stop: int, total: int = 30) -> Published:
    return publish(
        run, "encode", run.config.units("encode")[index], range_=(start, stop), total=total
    )


def merge_error(run: RunDir) -> str:
    with pytest.raises(UserError) as raised:
        run.read_shards("encode")
    return str(raised.value)


def test_shards_that_cover_once_are_read_in_order(run: RunDir) -> None:
    for index, (start, stop) in ((2, (0, 10)), (0, (10, 25)), (1, (25, 30))):
        shard(run, index, start, stop)
    assert [s.manifest.range for s in run.read_shards("encode")] == [[0, 10], [10, 25], [25, 30]]


def test_empty_shards_are_no_gap(run: RunDir) -> None:
    for index, (start, stop) in enumerate([(0, 0), (0, 1), (1, 1)]):
        shard(run, index, start, stop, total=1)
    assert len(run.read_shards("encode")) == 3


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 10), (12, 20), (20, 30)], ["gap [10, 12)"]),
        ([(1, 10), (10, 20), (20, 30)], ["gap [0, 1)"]),
        ([(0, 10), (10, 20), (20, 29)], ["gap [29, 30)"]),
        ([(0, 10), (8, 20), (20, 30)], ["overlap [8, 10) at shard-0001-of-0003"]),
        ([(0, 10), (0, 10), (10, 30)], ["overlap [0, 10) at shard-0001-of-0003"]),
        (
            [(0, 30), (10, 20), (20, 30)],
            ["overlap [10, 20) at shard-0001-of-0003", "overlap [20, 30) at shard-0002-of-0003"],
        ),
        ([(0, 12), (10, 20), (25, 29)], ["overlap [10, 12)", "gap [20, 25)", "gap [29, 30)"]),
        ([(0, 10), (10, 20), (20, 31)], ["past the end [30, 31) at shard-0002-of-0003"]),
    ],
)
def test_gaps_and_overlaps_are_named(
    run: RunDir, ranges: list[tuple[int, int]], words: list[str]
) -> None:
    for index, (start, stop) in enumerate(ranges):
        shard(run, index, start, stop)
    message = merge_error(run)
    assert "shards of encode do not cover [0, 30) once" in message
    for word in words:
        assert word in message
    assert message.count("gap") + message.count("overlap") + message.count("past") == len(words)


def test_a_foreign_shard_is_named(run: RunDir) -> None:
    other = RunDir(run.path, config("sarm.max_length=99"))
    shard(run, 0, 0, 10)
    shard(other, 1, 10, 20)
    shard(run, 2, 20, 30)
    assert "encode/shard-0001-of-0003" in merge_error(run) and "another config" in merge_error(run)


def test_a_missing_shard_is_named(run: RunDir) -> None:
    shard(run, 0, 0, 10)
    shard(run, 2, 20, 30)
    assert "encode/shard-0001-of-0003 is not done" in merge_error(run)


def test_a_shard_copied_over_another_is_found(run: RunDir) -> None:
    shard(run, 0, 0, 10)
    shard(run, 2, 20, 30)
    (run.folder("encode", "shard-0000-of-0003")).rename(run.folder("encode", "shard-0001-of-0003"))
    shard(run, 0, 0, 10)
    message = merge_error(run)
    assert "shard-0001-of-0003" in message and "really encode/shard-0000-of-0003" in message


def test_shards_of_different_totals_are_refused(run: RunDir) -> None:
    for index in range(3):
        shard(run, index, index * 10, index * 10 + 10, total=30 + (index == 2))
    assert "disagree on how many items there are: [30, 31]" in merge_error(run)


def test_exact_cover_accepts_every_partition_and_refuses_every_subset_of_it(run: RunDir) -> None:
    rng, standing = random.Random(0), shard(run, 0, 0, 1)
    for _ in range(50):
        total = rng.randint(1, 40)
        cuts = (
            sorted(rng.sample(range(1, total), rng.randint(0, min(5, total - 1))))
            if total > 1
            else []
        )
        edges = [0, *cuts, total]
        shards = [
            Published(
                run.path,
                standing.manifest.model_copy(
                    update={"unit": f"u{i}", "range": [a, b], "total": total}
                ),
            )
            for i, (a, b) in enumerate(itertools.pairwise(edges))
        ]
        rng.shuffle(shards)
        assert [s.manifest.range[0] for s in exact_cover(shards, "probe")] == edges[:-1]
        if len(shards) > 1:
            with pytest.raises(UserError, match="gap"):
                exact_cover(shards[1:], "probe")
            with pytest.raises(UserError, match="overlap"):
                exact_cover([*shards, shards[0]], "probe")


# Attempts that end badly


def in_child(work: Callable[[], None]) -> int:
    """The wait status of a forked child that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_at_step(n: int, work: Callable[[], None]) -> bool:
    """Whether `work`, killed by SIGKILL at its n-th touch of the file system, was still at it."""

    def doomed() -> None:
        left = [n]

        def step(event: str = "fsync", *_: Any) -> None:
            if event in (
                "open",
                "os.rename",
                "os.mkdir",
                "os.remove",
                "os.scandir",
                "os.listdir",
                "fsync",
            ):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        fsync = os.fsync
        os.fsync = lambda descriptor: (step(), fsync(descriptor))[1]  # type: ignore[assignment, func-returns-value]
        sys.addaudithook(step)
        work()

    status = in_child(doomed)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def test_a_writer_killed_at_any_step_leaves_a_unit_done_or_undone_and_never_in_between(
    tmp_path: Path,
) -> None:
    outcomes = []
    for n in range(1, 200):
        run = RunDir.create(tmp_path / f"run{n}", config())
        killed = killed_at_step(n, lambda: publish(run, text="new"))  # noqa: B023
        if run.done("select"):
            assert run.read("select").path("features.json").read_text() == "new"
        else:
            assert run.why_not_done("select") == "no manifest"
        outcomes.append(run.done("select"))
        publish(run, text="resumed")
        assert run.read("select").path("features.json").read_text() == "resumed"
        assert run.done("select")
        if not killed:
            break
    assert outcomes == sorted(outcomes), "once the manifest is there the unit stays done"
    assert outcomes[-1] and outcomes.count(False) > 10


def test_a_writer_killed_at_any_step_of_doing_a_unit_again_leaves_the_old_one(
    tmp_path: Path,
) -> None:
    run = RunDir.create(tmp_path / "run", config())
    for n in range(1, 200):
        publish(run, text="old")
        killed = killed_at_step(n, lambda: publish(run, text="new"))
        assert run.done("select")
        assert run.read("select").path("features.json").read_text() in (
            {"old", "new"} if killed else {"new"}
        )
        if not killed:
            break
    assert n > 10


def test_a_stand_alone_script_may_have_begun_the_folder(tmp_path: Path) -> None:
    """It notes its ranks there before its phase makes the run; submissions of a run whose config is
    gone are another matter.
    """
    (tmp_path / "new/submissions/by-hand").mkdir(parents=True)
    assert RunDir.create(tmp_path / "new", config()).config == config()
    (tmp_path / "lost/submissions/20261128-1").mkdir(parents=True)
    (tmp_path / "lost/submissions/by-hand").mkdir()
    with pytest.raises(UserError, match=r"holds submissions and no config\.yaml"):
        RunDir.create(tmp_path / "lost", config())


def test_a_folder_that_is_no_runs_does_not_become_one(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "ppo").mkdir(parents=True)
    (home / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"holds thesis\.txt and no config\.yaml"):
        RunDir.create(home, config())
    assert sorted(p.name for p in home.iterdir()) == ["ppo", "thesis.txt"]
    (home / "thesis.txt").unlink()
    assert RunDir.create(home, config()).config == config(), "what a run leaves may be there"
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for no_folder in (tmp_path / "file", tmp_path / "link", Path("/proc/none")):
        with pytest.raises(UserError, match="can be no run's folder"):
            RunDir.create(no_folder, config())
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match="no config"):
        RunDir.create("", config())  # RUN= as make hands an unset variable on: where it was called


def test_a_run_whose_creation_was_killed_at_any_step_can_be_created(tmp_path: Path) -> None:
    for n in range(1, 100):
        path = tmp_path / f"run{n}"
        killed = killed_at_step(n, lambda: RunDir.create(path, config()) and None)  # noqa: B023
        assert RunDir.create(path, config()).config == config()
        if not killed:
            break
    assert n > 3


WRITER = """
import itertools, os, sys
from sarm.run import Attempt, RunDir
run = RunDir.open(sys.argv[1])
print("ready", flush=True)
for i in itertools.count():
    attempt = Attempt(run, "probe", f"unit-{i % 5}")
    for name in ("a.bin", "b.bin"):
        with open(attempt.path(name), "wb") as file:
            for _ in range(20):
                file.write(os.urandom(50_000))
    attempt.progress(i, i + 1, "units")
    attempt.publish(round=i)
"""


def test_a_writer_killed_at_random_times_is_resumed_cleanly(tmp_path: Path) -> None:
    rng = random.Random(0)
    run = RunDir.create(tmp_path / "run", config())
    finished = 0
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run.path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.25))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        for i in range(5):
            why = run.why_not_done("probe", f"unit-{i}")
            assert why in (None, "no manifest")
            finished += why is None
    assert finished
    for i in range(5):
        publish(run, "probe", f"unit-{i}")
        assert run.done("probe", f"unit-{i}")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_a_failure_that_leaves_the_old_unit(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    publish(run, text="old")
    before = sorted(p.name for p in run.folder("select").iterdir())

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=os.strerror(code)):
            publish(run, text="new")
        with pytest.raises(OSError, match=os.strerror(code)):
            write_atomic(run.folder("select") / "manifest.json", b"{}")
    assert run.read("select").path("features.json").read_text() == "old"
    left = {p.name for p in run.folder("select").iterdir()} - set(before)
    assert not [name for name in left if name.endswith(".tmp")]
    publish(run, text="new")
    assert run.read("select").path("features.json").read_text() == "new"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("write", ["safetensors", "parquet", "text"])
def test_a_full_disk_is_told_in_one_sentence_whoever_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: str
) -> None:
    path = tmp_path / "file"
    path.symlink_to("/dev/full")

    def work() -> int:
        if write == "safetensors":  # as it says on a full tmpfs; it will not write to a device
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        elif write == "parquet":
            pd.DataFrame({"x": np.random.default_rng(0).random(100_000)}).to_parquet(path)
        else:
            path.write_text("x")
        return 0

    assert ended(work, "there") == 2
    assert "no space left on device; no room left on its file system" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        ended(lambda: 1 // 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_device_that_is_full_publishes_nothing(run: RunDir) -> None:
    attempt = Attempt(run, "select")
    attempt.path("features.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        attempt.path("features.json").write_text("{}")
    assert run.why_not_done("select") == "no manifest"


def test_the_kernel_refusing_bytes_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_atomic(file, b"old")

    def over_the_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_atomic(file, b"x" * 100_000)
        except OSError as error:
            assert error.errno == errno.EFBIG
            return
        raise AssertionError("the write went through")

    assert in_child(over_the_limit) == 0
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_flushed_is_passed_over_only_for_einval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def for_folders(code: int) -> Callable[[int], None]:
        def flush(descriptor: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        return flush

    monkeypatch.setattr(os, "fsync", for_folders(errno.EINVAL))
    write_atomic(tmp_path / "a", b"1")
    monkeypatch.setattr(os, "fsync", for_folders(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(tmp_path / "a", b"2")


# Several writers


def test_a_late_writer_of_a_lost_attempt_spoils_nothing(run: RunDir) -> None:
    late = Attempt(run, "select")
    late.path("features.json").write_text("late, half")
    publish(run, text="second")
    publish(run, "steer", after=("select",))
    late.path("features.json").write_text("late, whole")
    assert run.read("select").path("features.json").read_text() == "second"
    standing = late.publish()
    assert standing.manifest.attempt != late.id
    assert run.read("select").path("features.json").read_text() == "second"
    assert run.done("select") and run.done("steer")


def test_a_late_writer_replaces_what_is_damaged(run: RunDir) -> None:
    late = Attempt(run, "select")
    late.path("features.json").write_text("late")
    publish(run, text="second").path("features.json").unlink()
    late.publish()
    assert run.read("select").path("features.json").read_text() == "late"


def test_doing_a_unit_again_replaces_it(run: RunDir) -> None:
    publish(run, text="first")
    publish(run, text="again")
    assert run.read("select").path("features.json").read_text() == "again"


def test_attempts_never_share_a_file_name(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for restart in ("0", "1"):
        for rank in ("0", "1"):
            monkeypatch.setenv("SARM_ATTEMPT", f"77-{restart}-{rank}")
            names += [Attempt(run, "ppo").path("metrics.jsonl").name for _ in range(2)]
    assert len(set(names)) == 8
    assert names[-1].startswith("metrics.77-1-1-") and names[-1].endswith(".jsonl")


def test_readers_beside_writers_see_whole_files(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    contents = [json.dumps({"i": i, "pad": "x" * 50_000 * (i % 2)}).encode() for i in range(2)]
    write_atomic(file, contents[0], durable=False)
    stop = threading.Event()

    def write() -> None:
        i = 0
        while not stop.is_set():
            write_atomic(file, contents[i % 2], durable=False)
            i += 1

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        seen = {file.read_bytes() for _ in range(2000)}
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert seen <= set(contents)
    assert list(tmp_path.iterdir()) == [file]


def test_a_reader_waits_for_a_manifest_that_is_on_its_way(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            publish(run)

    monkeypatch.setattr(sarm.run.time, "sleep", nap)
    assert run.read("select", patience_s=60).manifest.phase == "select"
    assert len(naps) == 3
    assert sarm.run.patience_s() == 0.0
    monkeypatch.setenv("SARM_PATIENCE_S", "70")
    assert sarm.run.patience_s() == 70.0


def test_progress_is_told_at_most_once_a_second_and_always_at_the_end(run: RunDir) -> None:
    attempt = Attempt(run, "encode", "shard-0000-of-0003")
    seen = []
    for i in range(1, 51):
        attempt.progress(i, 50, "texts")
        seen.append(
            json.loads(run.progress_file("encode", "shard-0000-of-0003").read_text())["done"]
        )
    assert seen[0] == 1 and seen[-1] == 50
    assert len(set(seen)) <= 5


def test_progress_says_who_tells_it_and_how_long_it_has_taken_since_its_first(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, clock = Attempt(run, "encode", "shard-0000-of-0003"), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    attempt.progress(3, 50, "texts")
    clock[0] = 107.26
    attempt.progress(9, 50, "texts", tokens=7)
    told = json.loads(run.progress_file("encode", "shard-0000-of-0003").read_text())
    known = {"attempt": attempt.id, "pid": os.getpid(), "host": socket.gethostname()}
    assert told == known | {
        "at": told["at"],
        "started": attempt.started,
        "done": 9,
        "total": 50,
        "what": "texts",
        "from": 3,
        "seconds": 7.3,
        "tokens": 7,
    }
    clock[0] = 120.0
    attempt.progress(1, 4, "prompts")
    told = json.loads(run.progress_file("encode", "shard-0000-of-0003").read_text())
    assert (told["from"], told["seconds"]) == (1, 0.0)


def test_a_progress_bar_is_no_line_of_a_log_and_what_follows_it_is() -> None:
    bar = "Loading weights:  47%|####      | 10/21 [00:01<00:01]"
    lines = ["  indented", bar, f"{bar} Killed ", "10it [00:01, 9.8it/s]", "", "  end "]
    assert without_progress(lines) == ["  indented", "Killed", "  end "]


def test_shards_are_waited_for_as_long_as_the_caller_says(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def read(phase: str, unit: str, *, patience_s: float = 0.0) -> None:
        waited.append(patience_s)
        raise LookupError

    monkeypatch.setattr(run, "read", read)
    with pytest.raises(LookupError):
        run.read_shards("encode", patience_s=7.5)
    monkeypatch.setenv("SARM_PATIENCE_S", "2.5")
    with pytest.raises(LookupError):
        Attempt(run, "probe").read_shards("encode")
    assert waited == [7.5, 2.5]


# In whole words


def refusal(of: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        of()
    return str(refused.value)


def test_the_manifest_in_whole(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.txt").write_text("b")
    upstream = publish(run, "fetch", text="[]")
    monkeypatch.setenv("SARM_IMAGE_SHA256", "image")
    monkeypatch.setenv("SARM_IMAGE_COMMIT", "built from")
    monkeypatch.setenv("SARM_JOB", "12_3")
    monkeypatch.setenv("SARM_ATTEMPT", "12-1-0")
    monkeypatch.setattr(sarm.run, "now", iter(["began", "ended"]).__next__)
    monkeypatch.setattr(sarm.run, "git_commit", lambda: "0" * 40)  # found once a process
    attempt = Attempt(run, "ppo", "penalty-seed0", seed=5)
    assert attempt.id[:7] == "12-1-0-" and len(attempt.id) == 15
    assert attempt.read("fetch").manifest == upstream.manifest
    attempt.note_missing("select", "all")
    attempt.note_file(tmp_path / "b.txt")
    attempt.path("a.tar.gz").write_text("one")
    assert attempt.written("a.tar.gz") == attempt.folder / f"a.{attempt.id}.tar.gz"
    attempt.path("plain").write_text("")
    (attempt.directory("policy") / "inner").mkdir()
    (attempt.directory("policy") / "inner" / "x.txt").write_text("two!")
    found = attempt.publish(range_=(0, 4), total=9, device="cuda:1", steps=7)

    def output(file: str, text: str) -> dict[str, Any]:
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"file": file, "bytes": len(text), "sha256": digest}

    want = {
        "schema": found.manifest.SCHEMA,
        "phase": "ppo",
        "unit": "penalty-seed0",
        "attempt": attempt.id,
        "config": values("ppo", run.config),
        "config_sha256": values_sha256("ppo", run.config),
        "inputs": {
            f"/{tmp_path / 'b.txt'}": hashlib.sha256(b"b").hexdigest(),
            **{f"fetch/all/{name}": o.sha256 for name, o in upstream.manifest.outputs.items()},
            "select/all/": "",
        },
        "outputs": {
            "a.tar.gz": output(f"a.{attempt.id}.tar.gz", "one"),
            "plain": output(f"plain.{attempt.id}", ""),
            "policy/inner/x.txt": output(f"policy.{attempt.id}/inner/x.txt", "two!"),
        },
        "range": [0, 4],
        "total": 9,
        "git_commit": "0" * 40,
        "image_sha256": "image",
        "image_commit": "built from",
        "job_id": "12_3",
        "seed": 5,
        "host": socket.gethostname(),
        "device": "cuda:1",
        "started": "began",
        "ended": "ended",
        "steps": 7,
    }
    assert found.manifest.tree() == want
    assert list(found.manifest.inputs) == sorted(want["inputs"])
    stored = (attempt.folder / "manifest.json").read_text()
    assert stored == json_text(want) and json.loads(stored) == want
    assert run.manifest("ppo", "penalty-seed0") == found.manifest
    monkeypatch.undo()
    monkeypatch.delenv("SARM_ATTEMPT", raising=False)
    plain = Attempt(run, "select")
    assert plain.seed == run.config.seed and plain.id.startswith("local-0-0-")
    made = plain.publish().manifest
    assert (made.range, made.total, made.device, made.job_id) == (None, None, "cpu", None)


def test_what_is_refused_in_whole_words(run: RunDir, tmp_path: Path) -> None:
    published = publish(run, "select", text='{"a": 1}')
    at = run.path
    assert refusal(lambda: published.path("b")) == (
        f"{at}/select/all has no output 'b'; it has features.json, policy/inner/notes.txt,"
        " policy/weights.safetensors"
    )
    assert refusal(lambda: published.directory("pol")) == (
        f"{at}/select/all has no output folder 'pol'"
    )
    file = published.folder / published.manifest.outputs["features.json"].file
    file.write_text("{}")
    assert refusal(lambda: published.path("features.json")) == (
        f"{file} has 2 bytes instead of 8; run its phase again, it will be redone"
    )
    assert refusal(lambda: run.read("ppo", "penalty-seed0")) == (
        f"ppo/penalty-seed0 is not done in {at}; run: python -m jobs ppo --run {at} --unit"
        " penalty-seed0"
    )
    other = RunDir(at, config("ppo.penalty.tau=2.0"))
    assert refusal(lambda: other.read("select")) == (
        f"select/all in {at} is made with another config (ppo.penalty.tau); run its phase again"
    )
    assert refusal(lambda: RunDir.open(tmp_path)) == (
        f"{tmp_path} is not a run directory (no config.yaml); start one with make demo or make"
        " submit-all, or give a CONFIG"
    )
    file.write_text('{"a": 1}')
    assert refusal(lambda: RunDir.create(at, config("name=new", "ppo.steps=7"))) == (
        f"{at} is a run of the config 'base', and this one is 'new' (name, ppo.steps); use another"
        " RUN or the stored config"
    )
    for name in "abcdefgh":
        (tmp_path / "full" / name).mkdir(parents=True)
    assert refusal(lambda: RunDir.create(tmp_path / "full", config())) == (
        f"{tmp_path}/full holds a, b, c, d, e, f and 2 more and no config.yaml, so it is no run;"
        " give a new folder as RUN, or put the run's config.yaml back"
    )
    (tmp_path / "file").write_text("")
    assert refusal(lambda: RunDir.create(tmp_path / "file", config())) == (
        f"{tmp_path}/file can be no run's folder (File exists); use another RUN"
    )


def test_why_a_unit_is_not_done_in_whole_words(run: RunDir, tmp_path: Path) -> None:
    published = publish(run, "select", text='{"a": 1}')
    weights = published.folder / published.manifest.outputs["policy/weights.safetensors"].file
    weights.write_bytes(b"x" * 1000)
    why = run.why_not_done
    assert why("select") == "policy/weights.safetensors does not match its SHA-256"
    assert why("select", hashes=False) is None and not run.done("select")
    weights.unlink()
    assert why("select", hashes=False) == "policy/weights.safetensors is missing"
    assert why("select", tensors=False) is None
    publish(run, "select", text="{}")
    (tmp_path / "data.jsonl").write_text("{}")
    attempt = Attempt(run, "report")
    attempt.note_missing("ppo", "penalty-seed0")
    attempt.note_file(tmp_path / "data.jsonl")
    attempt.path("r.txt").write_text("r")
    attempt.publish()
    assert why("report") is None
    (tmp_path / "data.jsonl").write_text("[]")
    assert why("report") == f"its input {tmp_path}/data.jsonl has changed"
    assert why("report", hashes=False) is None
    (tmp_path / "data.jsonl").unlink()
    assert why("report") is None, "it may be gone"
    publish(run, "ppo", "penalty-seed0")
    assert why("report") == "ppo/penalty-seed0, which it went without, has been done since"
    moved = run.folder("encode", "shard-0001-of-0003")
    (run.folder("steer")).parent.mkdir(exist_ok=True)
    publish(run, "encode", "shard-0000-of-0003")
    run.folder("encode", "shard-0000-of-0003").rename(moved)
    assert why("encode", "shard-0001-of-0003") == (
        "really encode/shard-0000-of-0003, moved or copied there"
    )


def test_a_change_of_config_in_whole_words(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    publish(run, "select")
    publish(run, "ppo", "penalty-seed0")
    assert RunDir(run.path, run.config).change() == ""
    one = config("ppo.penalty.tau=2.0", "ppo.steps=7")
    told = (
        f"note: the config of {run.path} changes (ppo.penalty.tau, ppo.steps): ppo/penalty-seed0,"
        " select/all will be done again"
    )
    assert RunDir(run.path, one).change() == told
    before = (run.path / "config.yaml").read_bytes()
    RunDir.create(run.path, one)
    assert capfd.readouterr() == ("", f"{told}\n")
    (kept,) = (run.path / "configs").iterdir()
    assert kept.name == f"{hashlib.sha256(before).hexdigest()[:12]}.yaml"
    other = RunDir(run.path, config("ppo.penalty.tau=2.0", "ppo.steps=7", "evaluate.samples=3"))
    assert other.change() == (
        f"note: the config of {run.path} changes (evaluate.samples): nothing done reads that"
    )
    assert run.published() == [("ppo", "penalty-seed0"), ("select", "all")]
    (run.path / "notes" / "all").mkdir(parents=True)
    (run.path / "notes" / "all" / "manifest.json").write_text("{}")
    assert len(run.published()) == 2, "no phase's"
    assert RunDir(run.path.parent / "none", one).change() == ""


def test_shards_that_do_not_cover_in_whole_words(run: RunDir) -> None:
    for index, (start, stop) in enumerate([(2, 12), (10, 20), (25, 31)]):
        shard(run, index, start, stop)
    assert merge_error(run) == (
        "shards of encode do not cover [0, 30) once: gap [0, 2); overlap [10, 12) at"
        " shard-0001-of-0003; gap [20, 25); past the end [30, 31) at shard-0002-of-0003; run those"
        " shards again"
    )
    shard(run, 0, 0, 12, total=29)
    assert merge_error(run) == (
        "shards of encode disagree on how many items there are: [29, 30]; run the odd ones again"
    )
    # without ranges and totals there is nothing to cover
    nothing = [Published(run.path, publish(run, "fetch").manifest)]
    assert exact_cover(nothing, "fetch") == nothing


def test_a_log_of_several_jobs_is_read_from_the_last() -> None:
    lines = ["a", "=== job 1 ===", "b", "=== job 2 ===", "c", " === job 3", "d"]
    assert latest(lines) == ["c", " === job 3", "d"]
    assert latest(lines[:1]) == ["a"] and latest([]) == []


def test_the_commit_is_that_of_the_checkout_and_says_where_it_was_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    answers = {"rev-parse": "c0ffee\n", "status": ""}

    def git(words: list[str], **how: Any) -> Any:
        asked.append(words)
        assert how == {"capture_output": True, "text": True, "check": True}
        if answers[words[3]] is None:
            raise subprocess.CalledProcessError(128, words)
        return subprocess.CompletedProcess(words, 0, answers[words[3]], "")

    def commit() -> str | None:
        sarm.run.git_commit.cache_clear()
        return sarm.run.git_commit()

    try:
        monkeypatch.setattr(subprocess, "run", git)
        assert commit() == "0" * 40 and not asked
        monkeypatch.delenv("SARM_GIT_COMMIT")
        assert commit() == "c0ffee"
        assert asked == [
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            ["git", "-C", str(ROOT), "status", "--porcelain", "-uno"],
        ]
        answers["status"] = " M sarm/run.py\n"
        assert commit() == "c0ffee+"
        answers["rev-parse"] = None  # type: ignore[assignment]
        assert commit() is None
    finally:
        sarm.run.git_commit.cache_clear()


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_flushed_where_it_should_last(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda n: flushed.append(os.readlink(f"/proc/self/fd/{n}")))
    write_atomic(tmp_path / "a.txt", b"new", durable=durable)
    assert (tmp_path / "a.txt").read_bytes() == b"new"
    assert [Path(name).name.startswith(".a.txt.") for name in flushed] == (
        [True, False] if durable else []
    )
    assert flushed[1:] == ([str(tmp_path)] if durable else [])
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
