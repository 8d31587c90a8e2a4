"""How long the rest of a run takes: sums by hand, on a DAG of the pretended site."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sarm.config import ROOT, load_config
from sarm.cost import REFERENCE_GPUS, counts, planned, shapes
from sarm.run import RunDir
from slurm import left
from slurm.dag import Node, tasks
from slurm.left import Left, Rest, makespan
from slurm.view import Unit
from tests.fakes.site import Site


def took(run: RunDir, node: Node, seconds: float, device: str = "cpu") -> None:
    """A manifest of a unit that took so long."""
    file = run.folder(*node) / "manifest.json"
    manifest = json.loads(file.read_text())
    ended = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
    began = ended - timedelta(seconds=seconds)
    manifest |= {"started": began.isoformat(), "ended": ended.isoformat(), "device": device}
    file.write_text(json.dumps(manifest))


def tells(run: RunDir, node: Node, done: int, total: int, seconds: float, since: float) -> None:
    """A unit that did `done` steps in so many seconds, and began `since` seconds ago."""
    now = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
    told = {"done": done, "total": total, "what": "step", "attempt": "a", "from": 0}
    told |= {"seconds": seconds, "at": now.isoformat()}
    told |= {"started": (now - timedelta(seconds=since)).isoformat()}
    run.progress_file(*node).parent.mkdir(exist_ok=True)
    run.progress_file(*node).write_text(json.dumps(told))


def units(run: RunDir, **kinds: str) -> list[Unit]:
    """Every unit, waiting where its phase has no other state here."""
    nodes = [task.node for task in tasks(run.config)]
    return [Unit(node, kinds.get(node.phase, "waiting")) for node in nodes]


def test_what_is_left_runs_along_the_longest_chain_of_what_siblings_took(site: Site) -> None:
    site.do("encode", "probe", "select")
    run = site.run
    for task in tasks(run.config):
        if task.node.phase in ("fetch", "encode", "probe", "select"):
            took(run, task.node, 10.0)
    shown = [
        Unit(u.node, "done" if u.node.phase in ("fetch", "encode", "probe", "select") else u.state)
        for u in units(run)
    ]
    trained, other = Node("ppo", "penalty-seed1"), Node("ppo", "no_penalty-seed1")
    shown = [u._replace(state="running") if u.node == trained else u for u in shown]
    tells(run, trained, done=40, total=100, seconds=20.0, since=50.0)  # 30 s left, 80 in all
    found = Rest(run).left(shown)
    # the other arm has a chain of its own, and takes as long as the first in all
    assert found is not None and found.seconds == pytest.approx(80.0)
    assert found.unknown == ("steer", "cards", "calibrate", "evaluate", "report")
    assert str(found) == (
        "at least 80 s left, and steer, cards, calibrate and 2 more, of which nothing is known yet"
    )
    one_by_one = Rest(run).left(shown, workers=1)
    assert one_by_one is not None and one_by_one.seconds == pytest.approx(110.0)
    done = [u._replace(state="done") for u in shown]
    assert Rest(run).left(done) is None
    half = [u._replace(state="done") if u.node in (trained, other) else u for u in shown]
    assert Rest(run).left(half) is None, "nothing is known of anything that is left"


def test_the_mean_of_those_that_are_done_stands_for_the_others(site: Site) -> None:
    site.do("encode", "probe", but=("probe/shard-0003-of-0005", "probe/shard-0004-of-0005"))
    run = site.run
    probes = [task.node for task in tasks(run.config) if task.node.phase == "probe"]
    # 10, 20 and 60 s: 30 s each
    for node, seconds in zip(probes, (10.0, 20.0, 60.0), strict=False):
        took(run, node, seconds)
    ended = {"fetch": "done", "encode": "done"}
    shown = [
        u._replace(state="done" if u.node in probes[:3] else ended.get(u.node.phase, u.state))
        for u in units(run)
    ]
    rest = Rest(run)
    found = rest.left(shown, workers=2)
    assert found is not None and found.seconds == pytest.approx(30.0)  # two beside each other
    alone = Rest(run).left(shown, workers=1)
    assert alone is not None and alone.seconds == pytest.approx(60.0)


def test_what_failed_and_what_needs_it_is_not_waited_for(site: Site) -> None:
    run = site.run
    tells(run, Node("report", "all"), done=1, total=2, seconds=5.0, since=5.0)
    shown = units(run, fetch="done", encode="FAILED", report="running")
    found = Rest(run).left(shown)
    assert found == Left(5.0, (), False)  # probe and all after it will not run
    assert Rest(run).left(units(run, fetch="done", encode="FAILED", report="done")) is None


def test_on_gpus_the_plan_stands_for_what_never_ran(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.do("encode")
    run = site.run
    for task in tasks(run.config):
        if task.node.phase in ("fetch", "encode"):
            took(run, task.node, 10.0, device="cuda:0")
    monkeypatch.setattr(Rest, "planned", lambda self: {"probe": 100.0, "encode": 7.0})
    shown = units(run, fetch="done", encode="done", probe="pending")
    found = Rest(run).left(shown)
    assert found is not None and found.seconds == pytest.approx(100.0) and found.queued
    assert "probe" not in found.unknown and "wait in the queue is not in it" in str(found)
    for task in tasks(run.config):
        if task.node.phase in ("fetch", "encode"):
            took(run, task.node, 10.0, device="cpu")
    found = Rest(run).left(shown)
    assert found is None, "nothing is known of anything that is left"


def test_the_plan_is_that_of_make_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs" / "llama31-8b.yaml")
    run = RunDir.create(tmp_path / "run", config)
    policy, sarm = shapes(config)
    assert policy is not None and sarm is not None
    costs = planned(config, policy, sarm, counts(None, None), REFERENCE_GPUS)
    found = Rest(run).planned()
    assert found["ppo"] == next(c.seconds for c in costs if c.phase == "ppo") > 300
    assert {c.phase for c in costs} | {"fetch", "select", "report"} <= set(found)
    monkeypatch.setattr(left, "shapes", lambda config: (None, None))
    assert Rest(run).planned() == {}


def test_a_span_of_work_is_scheduled_as_the_launcher_does(site: Site) -> None:
    plan = tasks(site.run.config)
    probes = [task for task in plan if task.node.phase == "probe"]
    select = next(task for task in plan if task.node.phase == "select")
    lasts = {task.node: 10.0 for task in probes} | {select.node: 5.0}
    alive = [*probes, select]
    assert makespan(alive, lasts, set(), None) == 15.0
    assert makespan(alive, lasts, set(), 2) == 35.0  # five by two: 10, 10, 10, then select
    assert makespan(alive, lasts, {probes[4].node}, 1) == 55.0
    assert makespan([], {}, set(), 1) == 0.0
