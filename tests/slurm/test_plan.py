"""What a submission would send: whole plans written out by hand, and laws that hold of every one:
each undone unit once, in any order of asking, after all that it needs and after nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarm.config import Config
from slurm.dag import Node, tasks
from slurm.plan import Batch, plan, undone
from slurm.profile import Profile
from slurm.queue import QueuedJob
from slurm.submit import to_send

SOURCE = {
    "format": "jsonl",
    "label": "Demo",
    "path": "data/demo/pairs.jsonl",
    "split": {"test": 1.0},
}


def config_of(**sections: Any) -> Config:
    return Config.model_validate(
        {
            "name": "dag",
            "policy": {"model": "p"},
            "sarm": {"model": "s"},
            "data": {"sources": {"demo": SOURCE}},
            "check_sarm": {"measure": True},
            "encode": {"shards": 5},
            "probe": {"shards": 3},
            "ppo": {"arms": ["penalty", "no_penalty"], "seeds": [4, 2]},
            "evaluate": {"arms": ["prompted"], "system_prompt": "Be good."},
        }
        | sections
    )


SWEEP = {"tau": [0.5], "alpha": [2.0, 1.0, 3.0], "seeds": [7]}


def profile_of(**keys: Any) -> Profile:
    return Profile.model_validate({"description": "test", **keys})


def told(batches: list[Batch]) -> list[str]:
    """A line a batch: its name, its elements' units, and what it waits for."""
    lines = []
    for batch in batches:
        units = " ".join("+".join(map(_short, element)) for element in batch.elements)
        waits = [*batch.needs, *(f"#{id_}" for id_ in batch.after)]
        lines.append(f"{batch.name} [{units}] {batch.when} {' '.join(waits)}".rstrip())
    return lines


def _short(unit: str) -> str:
    """`shard-0002-of-0005` is `2`."""
    return unit.split("-")[1].lstrip("0") or "0" if unit.startswith("shard-") else unit


def every(config: Config) -> set[Node]:
    return {task.node for task in tasks(config)}


def test_packed_shards_in_short_arrays_and_policies_by_themselves() -> None:
    config = config_of()
    batches = plan(config, profile_of(pack=2, max_array_size=2), every(config))
    policies = [f"{arm}-seed{seed}" for seed in (4, 2) for arm in ("penalty", "no_penalty")]
    assert told(batches) == [
        "fetch [all] afterok",
        "check_sarm [all] afterok fetch",
        "encode.0 [0+1 2+3] afterok fetch",
        "encode.1 [4] afterok fetch",
        "probe [0+1 2] afterok encode.0 encode.1 check_sarm",
        "select [all] afterok probe",
        "steer [all] afterok select",
        "cards [all] afterok select",
        "calibrate [all] afterok select",
        *(f"ppo.{unit} [{unit}] afterok calibrate" for unit in policies),
        "evaluate.base [base] afterok calibrate",
        "evaluate.prompted [prompted] afterok calibrate",
        *(f"evaluate.{unit} [{unit}] afterok ppo.{unit}" for unit in policies),
        "report [all] afterany fetch check_sarm encode.0 encode.1 probe select steer cards"
        " calibrate"
        + "".join(f" ppo.{unit}" for unit in policies)
        + " evaluate.base evaluate.prompted"
        + "".join(f" evaluate.{unit}" for unit in policies),
    ]
    assert [batch.phase for batch in batches[2:5]] == ["encode", "encode", "probe"]
    assert not any(batch.retry for batch in batches)


def test_a_sweep_is_an_array_beside_the_arms_and_what_is_trained_waits_for_nothing() -> None:
    """Of three points one is trained and one is training; of the arms as many."""
    points = [f"sweep-tau0.5-alpha{alpha!r}-seed7" for alpha in (2.0, 1.0, 3.0)]
    config = config_of(sweep=SWEEP, ppo={"arms": ["penalty", "no_penalty"], "seeds": [4]})
    later = {
        *(Node("ppo", unit) for unit in (points[0], "penalty-seed4")),
        *(Node("evaluate", unit) for unit in (*points, "penalty-seed4", "no_penalty-seed4")),
        Node("report", "all"),
    }
    live = {Node("ppo", points[1]): "31_1", Node("ppo", "no_penalty-seed4"): "32"}
    assert told(plan(config, profile_of(), later, live)) == [
        "ppo.penalty-seed4 [penalty-seed4] afterok",
        f"ppo.sweep [{points[0]}] afterok",
        "evaluate.penalty-seed4 [penalty-seed4] afterok ppo.penalty-seed4",
        "evaluate.no_penalty-seed4 [no_penalty-seed4] afterok #32",
        f"evaluate.{points[1]} [{points[1]}] afterok #31_1",
        f"evaluate.sweep [{points[0]}] afterok ppo.sweep",
        f"evaluate.swept [{points[2]}] afterok",
        "report [all] afterany ppo.penalty-seed4 ppo.sweep evaluate.penalty-seed4"
        f" evaluate.no_penalty-seed4 evaluate.sweep evaluate.{points[1]} evaluate.swept #32 #31_1",
    ]


@pytest.mark.parametrize("phase", ["ppo", "evaluate"])
def test_throttled_policies_are_an_array_with_the_sweep_and_each_is_evaluated_after_its_own(
    phase: str,
) -> None:
    points = [f"sweep-tau0.5-alpha{alpha!r}-seed7" for alpha in (2.0, 1.0, 3.0)]
    config = config_of(sweep=SWEEP, ppo={"arms": ["penalty", "no_penalty"], "seeds": [4]})
    trained = {Node("ppo", unit) for unit in ("no_penalty-seed4", points[2])}
    todo = {node for node in every(config) if node.phase in ("ppo", "evaluate")} - trained
    profile = profile_of(max_array_size=2, phases={phase: {"throttle": 1}})
    assert told(plan(config, profile, todo)) == [
        f"ppo.arms.0 [penalty-seed4 {points[0]}] afterok",
        f"ppo.arms.1 [{points[1]}] afterok",
        "evaluate.base [base] afterok",
        "evaluate.prompted [prompted] afterok",
        f"evaluate.arms.0 [penalty-seed4 {points[0]}] aftercorr ppo.arms.0",
        f"evaluate.arms.1 [{points[1]}] afterok ppo.arms.1",
        f"evaluate.arms-trained [no_penalty-seed4 {points[2]}] afterok",
    ]


def test_elements_that_wait_for_more_than_their_like_wait_for_whole_arrays() -> None:
    """As many elements as the array needed, in its order, but each needs all of them; or each
    needs another's besides, of a job that runs.
    """
    config = config_of(encode={"shards": 3}, probe={"shards": 3}, check_sarm={})
    shards = {node for node in every(config) if node.phase in ("encode", "probe")}
    assert told(plan(config, profile_of(), shards)) == [
        "encode [0 1 2] afterok",
        "probe [0 1 2] afterok encode",
    ]
    running = {Node("encode", "shard-0001-of-0003"): "8_1"}
    assert told(plan(config, profile_of(), shards - set(running), running)) == [
        "encode [0 2] afterok",
        "probe [0 1 2] afterok encode #8_1",
    ]


def test_a_job_that_runs_is_not_waited_for_where_its_unit_is_sent_again() -> None:
    config = config_of()
    select, calibrate = Node("select", "all"), Node("calibrate", "all")
    live = {select: "5", Node("probe", "shard-0000-of-0003"): "6_0", calibrate: "7"}
    assert told(plan(config, profile_of(), [calibrate, select], live)) == [
        "select [all] afterok #6_0",
        "calibrate [all] afterok select",
    ]


# --- laws
# ------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    config: Config
    profile: Profile
    todo: set[Node]
    live: dict[Node, str]
    """The ids of what an earlier submission still runs; none of it is to do."""


@st.composite
def cases(draw: Any) -> Case:
    """Any shape of run, any part of it done, any part of it running."""
    few = st.integers(1, 5)
    seeds = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
    arms = draw(st.permutations(["penalty", "no_penalty", "random"]))[: draw(st.integers(1, 3))]
    alphas = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), max_size=3, unique=True))
    sweep = {"alpha": alphas, "tau": [0.25], "seeds": [3]} if alphas else {}
    config = config_of(
        check_sarm={"measure": draw(st.booleans())},
        encode={"shards": draw(few)},
        probe={"shards": draw(few)},
        ppo={"arms": arms, "seeds": seeds},
        sweep=sweep,
    )
    throttled = draw(st.sampled_from([{}, {"ppo": {"throttle": 2}}, {"evaluate": {"throttle": 1}}]))
    profile = profile_of(
        pack=draw(st.integers(1, 3)), max_array_size=draw(st.integers(1, 4)), phases=throttled
    )
    nodes = [task.node for task in tasks(config)]
    lost = draw(st.sets(st.sampled_from(nodes), max_size=6))
    todo = undone(config, lambda node: node not in lost)
    running = draw(st.sets(st.sampled_from(nodes), max_size=6)) & todo
    jobs = {
        node: QueuedJob(f"{100 + n}", "a job", "PENDING", 0.0, "")
        for n, node in enumerate(sorted(running))
    }
    sent = to_send(config, todo, todo, jobs)
    live = {node: job.id for node, job in jobs.items() if node not in sent}
    return Case(config, profile, sent, live)


LAWS = settings(max_examples=150, deadline=None)


@LAWS
@given(cases(), st.randoms(use_true_random=False))
def test_every_unit_is_sent_once_in_the_order_of_the_run_however_it_is_asked_for(
    case: Case, random: Any
) -> None:
    batches = plan(*case)
    sent = [node for batch in batches for node in batch.nodes]
    assert len(sent) == len(set(sent)) and set(sent) == case.todo
    assert len({batch.name for batch in batches}) == len(batches)
    shuffled = sorted(case.todo)
    random.shuffle(shuffled)
    ids = sorted(case.live.items())
    random.shuffle(ids)
    assert plan(case.config, case.profile, shuffled, dict(ids)) == batches
    for batch in batches:
        assert 1 <= len(batch.elements) <= case.profile.max_array_size
        assert {node.phase for node in batch.nodes} == {batch.phase}
        pack = case.profile.pack if batch.phase in ("encode", "probe") else 1
        assert all(1 <= len(element) <= pack for element in batch.elements)
        assert all(len(element) == pack for element in batch.elements[:-1])
        order = case.config.units(batch.phase)
        places = [order.index(node.unit) for node in batch.nodes]
        assert places == sorted(places)


@LAWS
@given(cases())
def test_every_unit_waits_for_all_that_it_needs_and_a_policy_for_its_own_training_alone(
    case: Case,
) -> None:
    needs_of = {task.node: set(task.needs) for task in tasks(case.config)}
    when_of = {task.node: task.when for task in tasks(case.config)}
    sent: dict[str, Batch] = {}
    for batch in plan(*case):
        assert set(batch.needs) <= set(sent), "what is waited for was sent before"
        assert len(set(batch.needs)) == len(batch.needs)
        needs = {need for node in batch.nodes for need in needs_of[node]}
        assert {case.live[need] for need in needs if need in case.live} == set(batch.after)
        for at, element in enumerate(batch.elements):
            if batch.when == "aftercorr":
                (needed,) = (sent[name] for name in batch.needs)
                assert len(needed.elements) == len(batch.elements) > 1
                ended = {Node(needed.phase, unit) for unit in needed.elements[at]}
            else:
                ended = {node for name in batch.needs for node in sent[name].nodes}
            for unit in element:
                node = Node(batch.phase, unit)
                assert batch.when in ("aftercorr", when_of[node])
                assert needs_of[node] & case.todo <= ended
                if needs_of[node] == {Node("ppo", unit)}:
                    assert ended == needs_of[node] & case.todo
                    assert set(batch.after) == {
                        case.live[n] for n in needs_of[node] & set(case.live)
                    }
        for name in batch.needs:
            assert needs & set(sent[name].nodes), "nothing is waited for that is not needed"
        sent[batch.name] = batch


@LAWS
@given(cases(), st.data())
def test_what_is_undone_is_what_is_not_done_and_all_that_follows_from_it(
    case: Case, data: Any
) -> None:
    all_tasks = tasks(case.config)
    nodes = [task.node for task in all_tasks]
    lost = data.draw(st.sets(st.sampled_from(nodes)))
    todo = undone(case.config, lambda node: node not in lost)
    assert lost <= todo
    for task in all_tasks:
        follows = bool(todo.intersection(task.needs))
        assert (task.node in todo) == (follows or task.node in lost)
    fewer = data.draw(st.sets(st.sampled_from(sorted(lost)))) if lost else set()
    assert undone(case.config, lambda node: node not in fewer) <= todo
