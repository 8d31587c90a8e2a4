"""Every step of a submission by itself: what is decided, written down, said and taken back, from
jobs made by hand.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from sarm.config import UserError
from slurm import submit as submitting
from slurm.checks import own_run
from slurm.dag import Node, tasks
from slurm.journal import Owned, journals, record
from slurm.plan import Batch
from slurm.profile_file import load_profile
from slurm.queue import QueuedJob, Refused
from slurm.submit import Asked, Decision
from tests.fakes.site import PROFILE, Site

ENCODE = [Node("encode", f"shard-000{i}-of-0002") for i in range(2)]
PENALTY, PLAIN = Node("ppo", "penalty-seed1"), Node("ppo", "no_penalty-seed1")
AFTER = Node("evaluate", "penalty-seed1")
SELECT, REPORT = Node("select", "all"), Node("report", "all")


def queued(id_: str, name: str = "x", state: str = "RUNNING", cluster: str = "c2") -> QueuedJob:
    return QueuedJob(id_, name, state, 1.0, "None", cluster)


def batch_of(*nodes: Node, name: str = "", **more: Any) -> Batch:
    elements = tuple((node.unit,) for node in nodes)
    return Batch(name or nodes[0].phase, nodes[0].phase, elements, (), "afterok", **more)


def journal_of(site: Site, id_: str, number: int = 1, **changes: Any) -> dict[str, Any]:
    """A submission of two encode jobs in one array and of one policy, to another cluster."""
    batches = [batch_of(*ENCODE), batch_of(PENALTY, name="ppo.penalty-seed1")]
    journal = {
        "id": id_,
        "number": number,
        "place": "here",
        "state": "submitting",
        "cluster": "c2",
        "batches": [batch._asdict() for batch in batches],
        "jobs": {"encode": "11", "ppo.penalty-seed1": "12"},
        **changes,
    }
    record(site.run, journal)
    return journal


class Queue:
    """A pretended controller: the jobs it knows, what it was asked and what it was told to end."""

    def __init__(self, jobs: list[QueuedJob], monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs = jobs
        self.asked: list[Any] = []
        self.cancelled: list[Any] = []
        self.released: list[Any] = []
        monkeypatch.setattr("slurm.queue.known_jobs", self.known_jobs)
        monkeypatch.setattr("slurm.queue.cancel", self.cancel)
        monkeypatch.setattr("slurm.queue.release", lambda *of: self.released.append(of))

    def known_jobs(self, cluster: str | None = None, *, patient: bool = False) -> list[QueuedJob]:
        self.asked.append((cluster, patient))
        return [job for job in self.jobs if job.cluster == cluster]

    def cancel(self, jobs: Any, among: Any = None) -> None:
        of = tuple(None if some is None else [j.id for j in some] for some in (jobs, among))
        self.cancelled.append(of)


# What is decided


def test_units_are_asked_for_by_phase_and_name_with_the_report_of_a_whole_run(site: Site) -> None:
    config = site.run.config
    assert Asked().of(config) == {task.node for task in tasks(config)}
    assert Asked(phase="encode").of(config) == set(ENCODE)
    assert Asked(unit="penalty-seed1").of(config) == {PENALTY, AFTER, REPORT}
    assert Asked("ppo", "penalty-seed1").of(config) == {PENALTY}
    with pytest.raises(UserError, match="no unit is named 'penalty-seed9'; ppo has"):
        Asked("ppo", "penalty-seed9").of(config)


def test_what_is_sent_waits_for_whole_arrays_by_their_id_and_for_others_one_by_one() -> None:
    array, policy = batch_of(*ENCODE), batch_of(PENALTY)
    both = [Owned(queued(f"11_{i}", "encode-aa"), "aa", array, (ENCODE[i],)) for i in range(2)]
    one = Owned(queued("12", "ppo-aa", "PENDING"), "aa", policy, (PENALTY,))
    ended = Owned(queued("13", "select-aa", "FAILED"), "aa", batch_of(SELECT), (SELECT,))
    expected = {ENCODE[0]: "11", ENCODE[1]: "11", PENALTY: "12"}
    assert submitting.waited_for([*both, one, ended], set()) == expected
    alone = both[1]._replace(job=queued("11_1", "encode-aa", "COMPLETED"))
    assert submitting.waited_for([both[0], alone], set()) == {ENCODE[0]: "11_0"}
    assert submitting.waited_for(both, {ENCODE[1]}) == {ENCODE[0]: "11_0"}, "one is sent anew"


def test_what_is_sent_are_undone_units_without_a_job_and_all_that_follows(site: Site) -> None:
    config = site.run.config
    every = {task.node for task in tasks(config)}
    todo = every - {Node("fetch", "all"), *ENCODE}
    probes = {node for node in todo if node.phase == "probe"}
    waiting = {node: queued("5", state="PENDING") for node in todo}

    def sent(live: dict[Node, QueuedJob], wanted: set[Node] = every) -> set[Node]:
        return submitting.to_send(config, todo, wanted, live)

    assert sent(waiting) == set()
    assert sent({}) == todo and sent({}, {PENALTY, REPORT}) == {PENALTY, REPORT}
    without = {node: job for node, job in waiting.items() if node != PENALTY}
    assert sent(without) == {PENALTY, AFTER, REPORT}
    lost = {node: job for node, job in waiting.items() if node not in probes}
    assert probes < sent(lost)
    assert sent(lost | {SELECT: queued("5")}) == set(), "probe is done: select runs"
    lost |= {REPORT: queued("5")}
    assert probes < sent(lost), "a report runs whatever became of the rest"


def test_what_lacks_its_needs_is_refused_with_their_names(site: Site) -> None:
    config, profile = site.run.config, load_profile(str(site.profile))
    every = {task.node for task in tasks(config)}
    probes = {node for node in every if node.phase == "probe"}

    def check(asked: Asked, sent: set[Node], todo: set[Node] = every, live: Any = ()) -> str:
        try:
            submitting.check_needs(config, profile, asked, todo, sent, live)
        except UserError as error:
            return str(error)
        return ""

    done = every - {Node("fetch", "all")}
    assert check(Asked(phase="select"), {SELECT}, done) == (
        "select needs probe done first; submit those, or everything with make submit-all"
    )
    probe = min(probes)
    assert check(Asked(unit=probe.unit), {probe}, done) == (
        f"{probe.unit} needs encode done first; submit those, or everything with make submit-all"
    )
    assert check(Asked(phase="select"), {SELECT}, done, probes) == "", "they run"
    assert check(Asked(phase="select"), {SELECT, *probes}, done - set(ENCODE)) == ""
    assert check(Asked(phase="select"), {SELECT}, done - probes) == ""
    assert check(Asked(phase="report"), {REPORT}, done) == "", "it runs whatever became of the rest"
    assert check(Asked(), every) == (
        "models and data are not fetched yet; run make fetch with the same CONFIG and RUN where"
        " there is a network, then submit again"
    )
    site.profile.write_text(PROFILE + "fetch: job\n")
    profile = load_profile(str(site.profile))
    assert check(Asked(), every) == ""


def test_who_ran_out_of_memory_is_known_by_any_of_its_jobs(site: Site) -> None:
    first, later = journal_of(site, "aa"), journal_of(site, "bb", 2)
    out = "slurmstepd: error: StepId=1.0 exceeded memory limit (2 > 1), being killed\n"
    late = "slurmstepd: error: *** JOB 12 CANCELLED AT T DUE TO TIME LIMIT ***\n"
    for name, text in (
        ("aa/11_1_0_log.out", out),
        ("aa/12_0_log.out", out),
        ("bb/12_0_log.out", late),
        ("bb/11_0_0_log.out", late),
    ):
        (site.path / "submissions" / name).write_text(text)

    def found(sent: list[Node]) -> set[Node]:
        return submitting.ran_out_of_memory(site.run, [first, later], sent)

    assert found([*ENCODE, PENALTY]) == {ENCODE[1], PENALTY}
    assert found([ENCODE[1]]) == {ENCODE[1]} and found([ENCODE[0]]) == set()


def test_a_decision_tells_jobs_to_join_from_those_to_replace(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, run = load_profile(str(site.profile)), site.run
    site.do("encode", "probe", "select", "steer", "cards", "calibrate")
    chain = [PENALTY, PLAIN, AFTER, REPORT]
    batches = [batch_of(node, name=f"{node.phase}.{i}") for i, node in enumerate(chain)]
    jobs = {batch.name: str(20 + i) for i, batch in enumerate(batches)}
    journal_of(site, "aa", batches=[b._asdict() for b in batches], jobs=jobs, state="submitted")
    states = ["FAILED", "RUNNING", "PENDING", "PENDING"]
    known = [
        queued(jobs[b.name], f"{b.name}.dag-here-aa", state)
        for b, state in zip(batches, states, strict=True)
    ]
    queue = Queue([*known, queued("99", "another's")], monkeypatch)
    (site.path / "submissions" / "aa" / "20_0_log.out").write_text("oom_kill event\n")
    found = submitting.decide(run, profile, Asked())
    assert queue.asked == [("c2", True)]
    assert found.attached == {PLAIN: known[1]} and found.mine == known
    assert found.superseded == [known[2], known[3]]
    of = {batch.nodes[0]: batch for batch in found.batches}
    assert set(of) == {
        PENALTY,
        AFTER,
        Node("evaluate", "base"),
        Node("evaluate", "no_penalty-seed1"),
        REPORT,
    }
    assert {node for node, batch in of.items() if batch.retry} == {PENALTY}
    assert of[Node("evaluate", "no_penalty-seed1")].after == ("21",)
    only = submitting.decide(run, profile, Asked(unit="no_penalty-seed1"))
    assert set(only.attached) == {PLAIN}, "the report is sent anew"
    read = []
    monkeypatch.setattr(type(run), "done", lambda self, *node, hashes: read.append(hashes) or True)
    submitting.decide(run, profile, Asked(), hashes=False)
    assert set(read) == {False}
    read.clear()
    assert submitting.decide(run, profile, Asked()) == Decision([], {}, known, [])
    assert set(read) == {True}


def test_a_look_without_slurm_sends_no_fetch_that_is_no_job(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = own_run(tmp_path / "new", site.run.config)
    queue = Queue([], monkeypatch)
    monkeypatch.setattr("shutil.which", lambda name: None)
    for line, fetched in (("", False), ("fetch: job\n", True)):
        site.profile.write_text(PROFILE + line)
        found = submitting.decide(run, load_profile(str(site.profile)), Asked(), dry=True)
        assert ("fetch" in {batch.phase for batch in found.batches}) is fetched
    journal_of(site, "aa", state="submitted")
    profile = load_profile(str(site.profile))
    assert submitting.decide(site.run, profile, Asked(), dry=True).mine == []
    assert queue.asked == []
    submitting.decide(site.run, profile, Asked())
    assert queue.asked == [("c2", True)], "a real one asks all the same"


# What is sent and written down


def test_the_journal_of_a_submission(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.profile.write_text(PROFILE + "clusters: c2\nphases: {encode: {time_min: 45}}\n")
    profile = load_profile(str(site.profile))
    journal_of(site, "aa", 6, state="submitted", batches=[], jobs={})
    queue = Queue([], monkeypatch)
    monkeypatch.setattr(submitting, "git_commit", lambda: "c" * 40)
    monkeypatch.setattr(submitting, "now", lambda: "2026-01-31T12:00:00+00:00")
    sent: list[Any] = []

    def send(run: Any, profile: Any, batch: Any, journal: Any, jobs: Any, *, last: bool) -> str:
        (written,) = (j for j in journals(run) if j["id"] == journal["id"])
        sent.append((batch.name, dict(written["jobs"]), sorted(map(str, jobs)), last))
        return str(40 + len(sent))

    monkeypatch.setattr(submitting, "send", send)
    decision, journal = submitting.submit(site.run, profile, Asked(phase="encode"))
    assert journal is not None
    (batch,) = decision.batches
    assert len(journal["id"]) == 8 and int(journal["id"], 16) >= 0
    assert journal == {
        "id": journal["id"],
        "number": 7,
        "at": "2026-01-31T12:00:00+00:00",
        "place": submitting.place_of(site.run),
        "state": "submitted",
        "cluster": "c2",
        "config_sha256": site.run.config.sha256,
        "git_commit": "c" * 40,
        "images": [],
        "batches": [batch._asdict()],
        "gpus": {"encode": 1},
        "time_min": {"encode": 45},
        "jobs": {"encode": "41"},
    }
    (written,) = (j for j in journals(site.run) if j["number"] == 7)
    assert {k: v for k, v in written.items() if k != "inode"} == json.loads(json.dumps(journal))
    assert sent == [("encode", {}, [], True)]
    assert queue.released == [(["41"], "c2")] and queue.cancelled[-1] == ([], [])
    decision, journal = submitting.submit(site.run, profile)
    assert journal is not None and journal["number"] == 8
    assert [last for *_, last in sent[1:]] == [False] * (len(sent) - 2) + [True]
    assert [set(known) for _, known, _, _ in sent[1:]] == [
        {b.name for b in decision.batches[:i]} for i in range(len(decision.batches))
    ]
    assert {str(n) for n in ENCODE} <= set(sent[1][2]), "jobs of earlier submissions are known"
    roots = [journal["jobs"][b.name] for b in decision.batches if not b.needs]
    assert queue.released[-1] == (roots, "c2")
    monkeypatch.setattr(type(site.run), "done", lambda self, *node, hashes: True)
    decision, journal = submitting.submit(site.run, profile)
    assert decision.batches == [] and journal is None


def test_a_job_under_another_s_number_is_refused_and_one_that_came_twice_is_cancelled(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = journal_of(site, "aa", place=submitting.place_of(site.run))
    name = submitting.job_name(site.run, "encode", "aa")
    other = submitting.job_name(site.run, "ppo.penalty-seed1", "aa")
    mine = [queued("11_0", name), queued("11_1", name), queued("12", other)]
    queue = Queue(mine, monkeypatch)
    submitting.check_names(site.run, journal)
    assert queue.cancelled == [([], None)] and queue.asked == [("c2", True)]
    queue.jobs = [*mine, queued("15_0", name), queued("16_1", name, "FAILED")]
    submitting.check_names(site.run, journal)
    assert queue.cancelled[-1] == (["15_0"], None)
    queue.jobs = [queued("17", other), queued("16", other), *mine[:2]]
    with pytest.raises(UserError) as refused:
        submitting.check_names(site.run, journal)
    assert str(refused.value) == (
        "sbatch's answer for ppo.penalty-seed1 named job 12, and its job is 16, 17"
    )
    queue.jobs = []  # none is in the queue yet
    submitting.check_names(site.run, journal)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "it was interrupted"),
        (UserError("sbatch failed: sbatch: error: no\n  room"), "sbatch failed: no room"),
        (UserError("sbatch: Batch job refused"), "Batch job refused"),
        (
            UserError("Invalid qos specification"),
            "Invalid qos specification; set qos in the profile to one that your account has",
        ),
    ],
)
def test_the_cause_is_in_sbatch_s_words_with_what_to_do(error: BaseException, said: str) -> None:
    assert submitting.cause(error) == said


# What is taken back


def test_a_submission_is_cancelled_by_name_on_its_cluster(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = journal_of(site, "aa")
    jobs = [
        queued("11_0", "encode.dag-here-aa"),
        queued("11_1", "encode.dag-here-aa", "COMPLETED"),
        queued("12", "ppo.penalty-seed1.dag-here-aa", "PENDING"),
        queued("13", "encode.dag-here-bb"),
    ]
    queue = Queue(jobs, monkeypatch)
    assert submitting.taken_back(site.run, journal) == (
        "those it took were cancelled, nothing runs"
    )
    assert queue.asked == [("c2", True)] and queue.cancelled == [(["11_0", "12"], None)]
    assert [j["state"] for j in journals(site.run)] == ["cancelled"]

    def deaf(*_: Any, **__: Any) -> None:
        raise Refused("squeue failed: no")

    journal_of(site, "aa")
    monkeypatch.setattr("slurm.queue.known_jobs", deaf)
    assert submitting.taken_back(site.run, journal) == (
        "those it took could not be cancelled either (squeue failed: no); submit again once it"
        " answers, which takes them back first"
    )
    assert [j["state"] for j in journals(site.run)] == ["submitting"], "so that the next does it"


def test_unfinished_submissions_are_taken_back_before_another(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"aa": "submitted", "bb": "submitting", "cc": "cancelled", "dd": "cancelled"}
    known = [journal_of(site, id_, n, state=s) for n, (id_, s) in enumerate(states.items())]
    jobs = [
        queued("1", "ppo.penalty-seed1.dag-here-aa"),
        queued("3", "ppo.penalty-seed1.dag-here-cc", "FAILED"),
        queued("4", "ppo.penalty-seed1.dag-here-dd"),
    ]
    Queue(jobs, monkeypatch)
    gone: list[str] = []
    monkeypatch.setattr(
        submitting, "cancel_submission", lambda run, journal: gone.append(journal["id"])
    )
    submitting.take_back_unfinished(site.run, known)
    assert gone == ["bb", "dd"], "also one whose job came to be after it was taken back"


def test_what_is_refused_midway_names_the_cause_and_is_taken_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_profile(str(site.profile))
    Queue([], monkeypatch)
    for error, said in (
        (Refused("sbatch failed: QOSMaxSubmit"), "sbatch failed: QOSMaxSubmit; your site bounds"),
        (OSError("disk full"), "disk full"),
        (KeyboardInterrupt(), "it was interrupted"),
    ):

        def send(*_: Any, error: BaseException = error, **__: Any) -> str:
            raise error

        monkeypatch.setattr(submitting, "send", send)
        with pytest.raises(UserError) as refused:
            submitting.submit(site.run, profile)
        assert str(refused.value).startswith(f"Slurm did not take every job ({said}")
        assert str(refused.value).endswith("); those it took were cancelled, nothing runs")
        assert {j["state"] for j in journals(site.run)} == {"cancelled"}

    def broken(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(submitting, "send", broken)
    with pytest.raises(ZeroDivisionError):
        submitting.submit(site.run, profile)
    assert {j["state"] for j in journals(site.run)} == {"cancelled"}, "a defect leaves nothing too"


def test_a_config_that_changes_under_live_jobs_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal_of(site, "aa", state="submitted")
    queue = Queue([queued("12", "ppo.penalty-seed1.dag-here-aa")], monkeypatch)
    changes = {"encode": {"shards": 3}}
    tree = site.run.config.model_dump(mode="json") | changes
    other = own_run(site.path, type(site.run.config).model_validate(tree))
    submitting.refuse_live_change(site.run)
    assert queue.asked == [], "nothing changes"
    with pytest.raises(UserError) as refused:
        submitting.refuse_live_change(other)
    assert str(refused.value) == (
        f"jobs of {site.path} still run or wait with another config; make cancel first, or use"
        " another RUN"
    )
    queue.jobs = [queued("12", "ppo.penalty-seed1.dag-here-aa", "FAILED")]
    submitting.refuse_live_change(other)


# The command


def test_the_command_s_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        submitting.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(
        "usage: python -m slurm.submit [-h] [--cluster CLUSTER] [--config CONFIG]"
    )
    assert "Submit a run's undone work as dependent Slurm jobs" in out
    for option in (
        "[key=value ...] ",
        "--cluster CLUSTER a profile in slurm/clusters/, or a path",
        "--config CONFIG YAML; where left out, the run's own",
        "} this phase alone, its needs done already",
        "--unit UNIT this unit of every phase alone, such as penalty-seed0",
        "--dry-run",
    ):
        assert option in out
    with pytest.raises(SystemExit):
        submitting.main(["--phase", "bake", "--run", "x"])
    assert "invalid choice: 'bake'" in capsys.readouterr().err
    given = submitting.arguments("m", "d").parse_args(["--run", "r", "a=1", "b=2"])
    assert vars(given) == {
        "cluster": "generic",
        "config": None,
        "run": "r",
        "overrides": ["a=1", "b=2"],
    }
    with pytest.raises(SystemExit):
        submitting.arguments("m", "d").parse_args([])
    assert "required: --run" in capsys.readouterr().err


def test_the_command_hands_all_of_it_on_and_a_kill_takes_back_what_was_sent(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    seen: list[Any] = []
    monkeypatch.setattr(submitting, "submit_or_show", lambda args: seen.append(args) or 7)
    try:
        words = ["--phase", "encode", "--unit", "u", "--dry-run", "encode.shards=3"]
        assert site.submit(*words) == 7
        now = {signum: signal.getsignal(signum) for signum in before}
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert set(now.values()) == {signal.default_int_handler}
    assert vars(seen[0]) == {
        "cluster": str(site.profile),
        "config": str(site.config),
        "run": str(site.path),
        "phase": "encode",
        "unit": "u",
        "dry_run": True,
        "overrides": ["encode.shards=3"],
    }
