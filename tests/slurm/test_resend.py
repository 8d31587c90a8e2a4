"""What failed, was cancelled or was lost is sent again while others still run: with all that
follows from it, and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm import queue, submit
from slurm.dag import Node, tasks
from slurm.queue import QueuedJob
from slurm.status import main as status
from slurm.submit import to_send
from tests.fakes.site import PROFILE, Site, batch_of


def by_batch(site: Site) -> dict[str, list[str]]:
    """The ids of all jobs of a batch, the oldest first."""
    found: dict[str, list[str]] = {}
    for id_, job in site.jobs.items():
        found.setdefault(batch_of(job), []).append(id_)
    return found


def set_element(site: Site, id_: str, index: int, word: str) -> None:
    state = site.state
    state["jobs"][id_].setdefault("states", {})[str(index)] = word
    site.remember(state)


def while_training(site: Site) -> dict[str, list[str]]:
    """A run whose first arm has failed, its evaluation cancelled with it, while the other
    trains.
    """
    site.submit()
    site.do("encode", "probe", "select", "steer", "cards", "calibrate")
    for batch in ("encode", "probe", "select", "steer", "cards", "calibrate"):
        site.set_state("COMPLETED", only=batch)
    site.set_state("FAILED", only="ppo.penalty-seed1")
    site.set_state("CANCELLED", only="evaluate.penalty-seed1")
    site.set_state("RUNNING", only="ppo.no_penalty-seed1")
    return by_batch(site)


def test_a_failed_arm_is_sent_again_while_another_trains(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    before = while_training(site)
    capsys.readouterr()
    assert site.submit() == 0
    out, after = capsys.readouterr().out, by_batch(site)
    again = {batch: ids[1] for batch, ids in after.items() if len(ids) == 2}
    assert set(again) == {"ppo.penalty-seed1", "evaluate.penalty-seed1", "report"}
    assert f"ppo/no_penalty-seed1 ({before['ppo.no_penalty-seed1'][0]})" in out
    job = site.jobs[again["evaluate.penalty-seed1"]]
    assert job["dependency"] == f"afterok:{again['ppo.penalty-seed1']}"
    waits = set(site.jobs[again["report"]]["dependency"].removeprefix("afterany:").split(":"))
    still = {before[b][0] for b in ("ppo.no_penalty-seed1", "evaluate.no_penalty-seed1")}
    assert waits == {
        again["ppo.penalty-seed1"],
        again["evaluate.penalty-seed1"],
        before["evaluate.base"][0],
        *still,
    }
    assert site.jobs[before["report"][0]]["state"] == "CANCELLED", "the report is sent anew"
    assert {site.jobs[id_]["state"] for id_ in still} == {"RUNNING", "PENDING"}
    assert not any(site.jobs[id_]["held"] for id_ in again.values())
    assert site.submit() == 0 and by_batch(site) == after, "and only once"


def test_what_waits_for_a_failed_shard_is_sent_anew_with_it(site: Site) -> None:
    site.submit()
    (encode,) = by_batch(site)["encode"]
    set_element(site, encode, 0, "FAILED")
    set_element(site, encode, 1, "RUNNING")
    before = by_batch(site)
    assert site.submit() == 0
    after = by_batch(site)
    new = {batch: ids[-1] for batch, ids in after.items() if len(ids) == 2}
    assert set(new) == set(before), "the failed shard and all that follows"
    assert site.jobs[new["encode"]]["elements"] == 0, "that shard alone"
    waits = site.jobs[new["probe.0"]]["dependency"]
    assert waits == f"afterok:{new['encode']}:{encode}_1", "and the one that still runs"
    for batch, (old, *_) in before.items():
        if batch != "encode":
            assert site.jobs[old]["state"] == "CANCELLED", "what it waited for will never come"
    assert site.jobs[encode]["states"] == {"0": "FAILED", "1": "RUNNING"}


def test_refused_midway_it_leaves_what_runs_alone(site: Site) -> None:
    before = while_training(site)
    site.fault(refuse=len(site.jobs) + 2)
    assert site.submit() == 2
    assert site.jobs[before["ppo.no_penalty-seed1"][0]]["state"] == "RUNNING"
    new = [ids[1] for ids in by_batch(site).values() if len(ids) == 2]
    assert {site.jobs[id_]["state"] for id_ in new} == {"CANCELLED"}
    assert site.jobs[before["report"][0]]["state"] == "PENDING", "it stays where none replaced it"
    site.fault()
    assert site.submit() == 0


def test_one_arm_by_name(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.submit()
    before = by_batch(site)
    words = ["--run", str(site.path), "--cancel", "--unit", "ppo/penalty-seed1"]
    assert status(words) == 0
    assert "cancelled 1 job of ppo/penalty-seed1" in capsys.readouterr().out
    gone = [b for b, (id_,) in before.items() if site.jobs[id_]["state"] == "CANCELLED"]
    assert gone == ["ppo.penalty-seed1"]
    assert status(["--run", str(site.path), "--cancel", "--unit", "penalty-sed1"]) == 2
    assert "no unit is named 'penalty-sed1'; evaluate has base" in capsys.readouterr().err
    site.set_state("FAILED", only="cards")
    assert site.submit("--unit", "penalty-seed1") == 0
    twice = {batch for batch, ids in by_batch(site).items() if len(ids) == 2}
    assert twice == {"ppo.penalty-seed1", "evaluate.penalty-seed1", "report"}, "not the cards"
    assert site.submit("--unit", "penalty-seed9") == 2
    assert "no unit is named 'penalty-seed9'; evaluate has base, " in capsys.readouterr().err
    assert site.submit("--phase", "cards") == 0 and len(by_batch(site)["cards"]) == 2


def test_one_element_of_an_array_is_cancelled_alone(site: Site) -> None:
    site.submit()
    (probe,) = by_batch(site)["probe.0"]
    words = ["--run", str(site.path), "--cancel", "--unit", "probe/shard-0001-of-0005"]
    assert status(words) == 0
    assert site.jobs[probe]["states"] == {"1": "CANCELLED"} and site.jobs[probe]["state"] != (
        "CANCELLED"
    )


def test_what_slurm_started_has_what_it_needs_though_its_manifest_is_not_seen_yet(
    site: Site,
) -> None:
    config = site.run.config
    todo = {task.node for task in tasks(config) if task.node.phase not in ("fetch", "encode")}
    probes = [node for node in todo if node.phase == "probe"]
    select = QueuedJob("5", "x", "RUNNING", 1.0, "")
    live = {node: select._replace(state="PENDING") for node in todo if node not in probes}
    pending = to_send(config, todo, todo, live)
    assert set(probes) <= pending and Node("report", "all") in pending
    live[Node("select", "all")] = select
    assert to_send(config, todo, todo, live) == set()


def test_a_fetch_that_is_a_job_is_joined_by_the_rest(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "check_named", lambda config: None)  # no such model is there
    site.path = tmp_path / "new"
    site.profile.write_text(PROFILE + "fetch: job\n")
    assert site.submit("--phase", "fetch") == 0
    assert site.submit() == 0
    jobs = by_batch(site)
    assert len(jobs["fetch"]) == 1
    assert site.jobs[jobs["encode"][0]]["dependency"] == f"afterok:{jobs['fetch'][0]}"


OOM = "slurmstepd: error: StepId=1.0 exceeded memory limit (2 > 1), being killed\n"


@pytest.mark.parametrize(
    ("bound", "asked"), [("", "--mem=16G"), (", retry_mem_gb: 24", "--mem=24G")]
)
def test_out_of_memory_asks_for_more_on_the_second_try_where_the_profile_says_how_much(
    site: Site, bound: str, asked: str
) -> None:
    more = f"phases: {{ppo: {{mem_gb: 16{bound}}}}}\n"
    site.profile.write_text(PROFILE + more)
    before = while_training(site)
    first = before["ppo.penalty-seed1"][0]
    assert "--mem=16G" in site.jobs[first]["text"]
    next(site.path.glob(f"submissions/*/{first}_0_log.out")).write_text(OOM)
    assert site.submit() == 0
    ppo = by_batch(site)["ppo.penalty-seed1"][1]
    assert f"#SBATCH {asked}\n" in site.jobs[ppo]["text"]
    evaluate = by_batch(site)["evaluate.penalty-seed1"][1]
    assert "#SBATCH --mem=120G\n" in site.jobs[evaluate]["text"], "it alone"
    site.set_state("NODE_FAIL", only="ppo.penalty-seed1")
    site.set_state("CANCELLED", only="evaluate.penalty-seed1")
    assert site.submit() == 0
    third = by_batch(site)["ppo.penalty-seed1"][2]
    assert f"#SBATCH {asked}\n" in site.jobs[third]["text"], "also when it ended otherwise since"


def test_arms_are_throttled(site: Site) -> None:
    limit = "phases: {ppo: {throttle: 1}, evaluate: {throttle: 2}}\n"
    site.profile.write_text(PROFILE.replace("max_array_size: 2", "max_array_size: 8") + limit)
    assert site.submit() == 0
    jobs = {batch_of(job): (id_, job) for id_, job in site.jobs.items()}
    ppo, evaluate = jobs["ppo.arms"], jobs["evaluate.arms"]
    assert "#SBATCH --array=0-1%1\n" in ppo[1]["text"]
    assert "#SBATCH --array=0-1%2\n" in evaluate[1]["text"]
    assert evaluate[1]["dependency"] == f"aftercorr:{ppo[0]}", "each after its own training"
    # Of two throttled arms one has failed: the other's evaluation is not waited for in an array.
    site.do("encode", "probe", "select", "steer", "cards", "calibrate")
    for batch in ("encode", "probe", "select", "steer", "cards", "calibrate"):
        site.set_state("COMPLETED", only=batch)
    set_element(site, ppo[0], 0, "FAILED")
    set_element(site, ppo[0], 1, "RUNNING")
    set_element(site, evaluate[0], 0, "CANCELLED")
    assert site.submit() == 0
    after = by_batch(site)
    assert len(after["ppo.arms"]) == 2 and len(after["evaluate.arms"]) == 2
    assert site.jobs[ppo[0]]["states"]["1"] == "RUNNING"
    assert queue.known_jobs()
