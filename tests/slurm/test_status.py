"""What status says, word by word: every line, record and command from states made by hand, without
a Slurm to ask.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sarm.config import UserError
from sarm.run import Attempt
from slurm import status as told
from slurm.dag import Node
from slurm.journal import record
from slurm.plan import Batch
from slurm.queue import PastJob, QueuedJob
from slurm.state import Look, Slurm
from slurm.status import Row
from slurm.view import Unit
from tests.fakes.site import Site

ENCODE = [Node("encode", f"shard-000{i}-of-0002") for i in range(2)]
PENALTY, PLAIN = Node("ppo", "penalty-seed1"), Node("ppo", "no_penalty-seed1")
SELECT = Node("select", "all")


def submitted(site: Site, id_: str, number: int = 1, **changes: Any) -> dict[str, Any]:
    """The journal of a submission of two encode jobs in one array, and of PPO's two policies."""
    batches = [
        Batch("encode", "encode", tuple((n.unit,) for n in ENCODE), (), "afterok"),
        Batch("ppo.penalty-seed1", "ppo", ((PENALTY.unit,),), ("encode",), "afterok"),
        Batch("ppo.no_penalty-seed1", "ppo", ((PLAIN.unit,),), ("encode",), "afterok"),
    ]
    journal = {
        "id": id_,
        "number": number,
        "place": "here",
        "state": "submitted",
        "cluster": None,
        "batches": [batch._asdict() for batch in batches],
        "gpus": {"encode": 1, "ppo.penalty-seed1": 4, "ppo.no_penalty-seed1": 2},
        "time_min": {"encode": 30, "ppo.penalty-seed1": 120, "ppo.no_penalty-seed1": 90},
        "jobs": {"encode": "11", "ppo.penalty-seed1": "12", "ppo.no_penalty-seed1": "13"},
        **changes,
    }
    record(site.run, journal)
    return journal


def queued(id_: str, state: str = "RUNNING", elapsed_s: float = 0.0) -> QueuedJob:
    return QueuedJob(id_, "x", state, elapsed_s, "None")


def past(
    id_: str, elapsed_s: int, cpu: float | None, memory: float | None, state: str = "FAILED"
) -> PastJob:
    return PastJob(id_, "x", state, "1:0", elapsed_s, cpu, memory)


def lasting(site: Site, node: Node, seconds: int, job: str | None = None) -> None:
    """Publish a unit that took so long, by this job."""
    attempt = Attempt(site.run, *node)
    attempt.path("x.json").write_text("{}")
    attempt.publish()
    file = site.run.folder(*node) / "manifest.json"
    more = {"started": "2026-01-31T12:00:00+00:00", "job_id": job}
    more["ended"] = f"2026-01-31T12:{seconds // 60:02d}:{seconds % 60:02d}+00:00"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def damage(site: Site, node: Node) -> None:
    """Other bytes of the same number."""
    manifest = site.run.manifest(*node)
    assert manifest is not None
    (site.run.folder(*node) / manifest.outputs["x.json"].file).write_text("[]")


# Lines and commands


def test_hashing_says_how_much_was_looked_at_and_what_is_damaged(site: Site) -> None:
    for node in ENCODE:
        lasting(site, node, 5)
    extra = Attempt(site.run, "select")
    for name in ("x.json", "y.json"):
        extra.path(name).write_text("{}")
    extra.publish()
    nodes = [*ENCODE, SELECT, PLAIN]  # one of which is not published

    def line() -> str:
        return told.verified_line(Look(site.run), [Unit(node, "done") for node in nodes])

    assert line() == "hashed 4 files of 3 units: all are as published"
    damage(site, ENCODE[1])
    damage(site, SELECT)
    assert line() == (
        "hashed 4 files of 3 units: not as published are encode/shard-0001-of-0002, select, of"
        " which the table says why"
    )
    nodes = [ENCODE[0]]
    assert line() == "hashed 1 file of 1 unit: all are as published"


def test_exports_and_trained_sarms_have_a_line_where_they_were_published(site: Site) -> None:
    assert told.non_phase_units(Look(site.run)) == []
    export, trained = Node("export", "all"), Node("train_sarm", "all")  # type: ignore[arg-type]
    lasting(site, trained, 90)
    lasting(site, export, 120)
    assert told.non_phase_units(Look(site.run, hashes=True)) == [
        Unit(trained, "done", "90 s"),
        Unit(export, "done", "2 min"),
    ]
    damage(site, trained)
    assert [u.state for u in told.non_phase_units(Look(site.run))] == ["done", "done"]
    assert told.non_phase_units(Look(site.run, hashes=True)) == [
        Unit(trained, "not done", "x.json does not match its SHA-256"),
        Unit(export, "done", "2 min"),
    ]


def test_the_exit_code_tells_what_there_is_to_wait_for(site: Site) -> None:
    def code(*states: str) -> int:
        return told.exit_code(Look(site.run), [Unit(SELECT, state) for state in states])

    assert code("done", "done") == 0 and code("done", "failed") == 3
    assert code("done", "not run") == 1, "nothing was sent"
    submitted(site, "aa")
    assert code("done", "skipped") == 0
    for failed in (["done", "TIMEOUT", "running"], ["done", "not run"], ["not run", "waiting"]):
        assert code(*failed) == 3, failed
    for on in (["not run", "running"], ["not run", "pending"], ["done", "waiting"], ["pending"]):
        assert code(*on) == 1, on


def test_the_last_line_is_what_helps_now(site: Site) -> None:
    look, again = (
        Look(site.run),
        f"make submit-all RUN={site.path}, with the same CLUSTER and CONFIG",
    )
    idle, busy = Slurm({}, {}), Slurm({SELECT: queued("7")}, {})

    def line(states: str, slurm: Slurm = idle, local: bool = False) -> str:
        return told.help_line(look, [Unit(SELECT, s) for s in states.split()], slurm, local)

    report = site.path / "final_report.txt"
    assert line("done skipped") == f"done; the report, with report.html beside it: {report}"
    assert line("done waiting", Slurm({}, {}, heard=False), True) == (
        f"the queue gave no answer; make status RUN={site.path} asks again"
    )
    assert line("done failed TIMEOUT waiting", busy) == (
        f"2 failed while others go on; sent again by {again}"
    )
    assert line("failed waiting", idle, True) == f"make watch RUN={site.path}"
    assert line("running waiting", busy) == f"make watch RUN={site.path}"
    assert line("done failed waiting waiting") == (
        f"nothing of {site.path} is in the queue, 3 of 4 are not done; {again}, or make run goes on"
        " from what is done"
    )


# One unit


def test_a_unit_s_line_by_what_is_known_of_it(site: Site) -> None:
    lasting(site, ENCODE[0], 70, job="11_0")
    log = site.run.log(*PENALTY)
    log.parent.mkdir(exist_ok=True)
    log.touch()
    progress = site.run.progress_file(*PENALTY)
    progress.parent.mkdir(exist_ok=True)
    times = {"started": "2026-01-31T12:00:00+00:00", "at": "2026-01-31T12:00:25+00:00"}
    said = {"done": 4, "total": 10, "what": "step", "attempt": "a", "from": 0, "seconds": 20.0}
    progress.write_text(json.dumps(said | times))
    look = Look(site.run)
    slurm = Slurm(
        {PENALTY: queued("12", elapsed_s=110.0), SELECT: queued("14", "PENDING")},
        {
            ENCODE[0]: past("11_0", 75, 0.256, 0.5, "COMPLETED"),
            ENCODE[1]: past("11_1", 80, None, 0.254),
            PENALTY: past("12", 110, 0.5, 0.5, "RUNNING"),
            PLAIN: past("13", 9, None, None),
        },
        ids={ENCODE[0]: "21_0", ENCODE[1]: "11_1", PENALTY: "12", PLAIN: "13"},
    )

    def line(unit: Unit) -> Row:
        return told.row(look, unit, slurm)

    done = Unit(ENCODE[0], "done", "70 s")
    assert line(done) == Row(done, "11_0", "", "70 s", "26%, 50%", "")
    failed = Unit(ENCODE[1], "FAILED", "exit code 1")
    assert line(failed) == Row(failed, "11_1", "", "", "-, 25%", "")
    running = Unit(PENALTY, "running")
    words, logs = "step 4/10, 30 s left", "logs/ppo.penalty-seed1.log"
    assert line(running) == Row(running, "12", words, "2 min so far", "", logs)
    stopped = Unit(PENALTY, "failed", "no manifest")
    assert line(stopped) == Row(stopped, "12", words, "", "", logs), "how far it came"
    for state in ("pending", "waiting", "done"):
        assert line(Unit(PENALTY, state)).progress == ""
    short = Unit(PLAIN, "FAILED")
    assert line(short) == Row(short, "13", "", "", "", ""), "too short to tell shares of"
    pending = Unit(SELECT, "pending", "Priority")
    assert line(pending) == Row(pending, "14", "", "", "", "")
    unsent = Unit(Node("report", "all"), "waiting", "no manifest")
    assert line(unsent) == Row(unsent, "", "", "", "", "")


ROWS = [
    Row(Unit(ENCODE[0], "done", "70 s"), "11_0", "", "70 s", "26%, 50%", "logs/a.log"),
    Row(Unit(PENALTY, "running", "by hand"), "12", "step 4/10", "9 s so far", "-, 25%", "logs/b"),
    Row(Unit(SELECT, "pending", ""), "", "", "", "", ""),
]


@pytest.mark.parametrize("logs", [True, False])
def test_the_table_has_every_cell_in_its_column(logs: bool) -> None:
    found = told.table(ROWS, logs)
    columns = {str(c.header): [str(cell) for cell in c.cells] for c in found.columns}
    assert columns == {
        "phase": ["encode/shard-0000-of-0002", "ppo/penalty-seed1", "select"],
        "job": ["11_0", "12", ""],
        "state": ["done", "running: by hand", "pending"],
        "progress": ["", "step 4/10", ""],
        "took": ["70 s", "9 s so far", ""],
        "CPU, memory": ["26%, 50%", "-, 25%", ""],
        **({"log": ["logs/a.log", "logs/b", ""]} if logs else {}),
    }
    assert [c.no_wrap for c in found.columns][:5] == [True, True, False, False, True]
    assert {c.overflow for c in found.columns} == {"fold"}
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True, color_system="standard").print(found)
    header, first, *_ = out.getvalue().splitlines()
    assert header.startswith("\x1b[1mphase") and not first.startswith("\x1b[")
    assert first.startswith("encode/shard-0000-of-0002 11_0 done"), "one blank between columns"


def test_status_for_programs_is_one_whole_record(site: Site) -> None:
    submitted(site, "aa")
    rows = [ROWS[1], Row(Unit(SELECT, "not run", "cancelled"), "", "", "", "", "")]
    slurm = Slurm({PENALTY: queued("12", elapsed_s=900.0)}, {}, heard=False)
    found = told.record_of(Look(site.run), rows, slurm, 3)
    assert found == {
        "run": str(site.path),
        "state": "failed",
        "queue_answered": False,
        "gpu_hours": {"used": 1.0, "planned": 12.0},
        "units": [
            {
                "phase": "ppo",
                "unit": "penalty-seed1",
                "state": "running",
                "kind": "running",
                "note": "by hand",
                "job": "12",
                "progress": "step 4/10",
                "log": "logs/b",
            },
            {
                "phase": "select",
                "unit": "all",
                "state": "not run",
                "kind": "not",
                "note": "cancelled",
                "job": None,
                "progress": None,
                "log": None,
            },
        ],
    }
    states = [told.record_of(Look(site.run), [], slurm, code)["state"] for code in (0, 1)]
    assert states == ["done", "running"]


def test_of_what_failed_the_last_lines_are_shown_unbroken(site: Site) -> None:
    submitted(site, "aa")
    lines = ["one", "two", "error: a very long line " + "x" * 60, "[hint] give more"]
    log = site.run.log(*PENALTY)
    log.parent.mkdir(exist_ok=True)
    log.write_text("\n".join(lines))
    written = site.path / "submissions" / "aa" / "11_1_0_log.out"
    written.write_text("from Slurm\n")
    shown = [
        Unit(ENCODE[0], "done"),
        Unit(ENCODE[1], "TIMEOUT"),
        Unit(PENALTY, "failed"),
        Unit(PLAIN, "FAILED"),
    ]
    out = io.StringIO()
    console = Console(file=out, width=30, force_terminal=True, color_system="standard")
    told.say_causes(Look(site.run), shown, console)
    bold, dim, end = "\x1b[1m", "\x1b[2m", "\x1b[0m"
    assert out.getvalue().splitlines() == [
        f"{bold}encode/shard-0001-of-0002: {written}{end}",
        f"{dim}  from Slurm{end}",
        f"{bold}ppo/penalty-seed1: {log}{end}",
        *(f"{dim}  {line}{end}" for line in lines[1:]),
        f"{bold}ppo/no_penalty-seed1: no log says why{end}",
    ]


# GPU-hours


def test_gpu_hours_are_those_of_all_submissions_by_the_best_source(site: Site) -> None:
    assert told.gpu_hours(Look(site.run), Slurm({}, {})) is None, "nothing was sent"
    submitted(site, "aa", 1, gpus=dict.fromkeys(("encode", *PPO), 0))
    assert told.gpu_hours(Look(site.run), Slurm({}, {})) is None, "nothing asked for a GPU"
    submitted(site, "bb", 2)
    # encode: 2 x 30 min on one GPU; PPO: 120 min on four and 90 on two
    assert told.gpu_hours(Look(site.run), Slurm({}, {})) == (0.0, pytest.approx(1 + 8 + 3))
    lasting(site, PLAIN, 1800, job="13")
    slurm = Slurm(
        {PENALTY: queued("12", elapsed_s=900.0)},
        {ENCODE[0]: past("11_0", 360, None, None), PENALTY: past("12", 5, None, None)},
        ids={PLAIN: "13"},
    )
    # 15 min of four GPUs, six of one, and 30 of two by the manifest
    assert told.gpu_hours(Look(site.run), slurm) == (pytest.approx(1 + 0.1 + 1), pytest.approx(12))
    submitted(site, "cc", 3)
    assert told.gpu_hours(Look(site.run), slurm) == (pytest.approx(2.1), pytest.approx(24)), (
        "counted once"
    )


PPO = ("ppo.penalty-seed1", "ppo.no_penalty-seed1")


def test_packed_units_take_their_job_s_gpus_as_long_as_the_longest(site: Site) -> None:
    packed = Batch("encode", "encode", (tuple(n.unit for n in ENCODE),), (), "afterok")
    submitted(site, "aa", batches=[packed._asdict()], jobs={"encode": "11"})
    slurm = Slurm({}, {n: past("11", 360 * i, None, None) for i, n in enumerate(ENCODE, 1)})
    assert told.gpu_hours(Look(site.run), slurm) == (pytest.approx(0.2), pytest.approx(0.5))


def test_a_unit_took_what_the_queue_accounting_or_its_manifest_says(site: Site) -> None:
    lasting(site, PLAIN, 45, job="13")
    look = Look(site.run)
    live, gone = {PLAIN: queued("13", elapsed_s=7.0)}, {PLAIN: past("13", 30, None, None)}
    assert told.elapsed(look, PLAIN, Slurm(live, gone, {PLAIN: "13"})) == 7.0
    assert told.elapsed(look, PLAIN, Slurm({}, gone, {PLAIN: "13"})) == 30.0
    assert told.elapsed(look, PLAIN, Slurm({}, {}, {PLAIN: "13"})) == 45.0
    assert told.elapsed(look, PLAIN, Slurm({}, {}, {PLAIN: "14"})) == 0.0, "another job did it"
    assert told.elapsed(look, PENALTY, Slurm({}, {}, {PENALTY: "12"})) == 0.0
    lasting(site, SELECT, 45)  # on this machine, by no job
    assert told.elapsed(Look(site.run), SELECT, Slurm({}, {})) == 0.0


# Cancelling


class Queue:
    """A queue of a run's jobs, and what it was asked and told."""

    def __init__(self, jobs: list[QueuedJob], monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs, self.asked, self.cancelled = jobs, [], []  # type: ignore[var-annotated]
        monkeypatch.setattr("slurm.queue.known_jobs", self.known_jobs)
        monkeypatch.setattr("slurm.queue.cancel", self.cancel)

    def known_jobs(self, cluster: str | None = None, *, patient: bool = False) -> list[QueuedJob]:
        self.asked.append((cluster, patient))
        return [job for job in self.jobs if job.cluster == cluster]

    def cancel(self, jobs: Any, among: Any = None) -> None:
        of = [None if some is None else [j.id for j in some] for some in (jobs, among)]
        self.cancelled.append(of)


def of_submission(batch: str, id_: str, submission: str, state: str = "RUNNING") -> QueuedJob:
    return QueuedJob(id_, f"{batch}.dag-here-{submission}", state, 1.0, "None", "c2")


def test_cancel_ends_what_lives_and_writes_down_what_that_was(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as refused:
        told.cancel(site.run)
    assert str(refused.value) == (
        f"nothing was submitted for {site.path}; a local run is stopped with Ctrl-C"
    )
    submitted(site, "aa", 1, cluster="c2", cancelled=["select"])
    jobs = [
        of_submission("encode", "11_0", "aa"),
        of_submission("encode", "11_1", "aa", "FAILED"),
        of_submission("ppo.penalty-seed1", "12", "aa", "PENDING"),
        QueuedJob("99", "another's", "RUNNING", 1.0, "None", "c2"),
    ]
    queue = Queue(jobs, monkeypatch)
    with pytest.raises(UserError, match="no unit is named 'penalty-seed9'"):
        told.cancel(site.run, "penalty-seed9")
    assert queue.cancelled == [] and not (site.path / "submit.lock").exists()
    assert told.cancel(site.run, "penalty-seed1") == (
        f"cancelled 1 job of penalty-seed1 of {site.path}; make submit-all goes on from what is"
        " done"
    )
    every = [job.id for job in jobs]
    assert queue.cancelled == [[["12"], every]] and queue.asked[-1] == ("c2", True)
    (journal,) = Look(site.run).journals
    assert journal["cancelled"] == ["ppo/penalty-seed1", "select"]
    assert told.cancel(site.run) == (
        f"cancelled 2 jobs of {site.path}; make submit-all goes on from what is done"
    )
    assert queue.cancelled[1] == [["11_0", "12"], every]
    (journal,) = Look(site.run).journals
    assert journal["state"] == "submitted"
    assert journal["cancelled"] == ["encode/shard-0000-of-0002", "ppo/penalty-seed1", "select"]
    queue.jobs = jobs[1:2]
    assert told.cancel(site.run) == f"nothing of {site.path} is in the queue any more"
    assert told.cancel(site.run, "penalty-seed1") == (
        f"nothing of penalty-seed1 of {site.path} is in the queue any more"
    )
    asked = []
    monkeypatch.setattr(told, "held", lambda *words: asked.append(words) or _Nothing())
    told.cancel(site.run)
    assert asked == [(site.path / "submit.lock", f"a submission of {site.path}")]


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_what_is_cancelled_is_written_into_the_journals_that_have_it(site: Site) -> None:
    first = submitted(site, "aa", 1, cancelled=["select"])
    other = submitted(site, "bb", 2, batches=[], jobs={})
    begun = submitted(site, "cc", 3, state="submitting")

    def noted(nodes: set[str], unit: str | None) -> list[tuple[Any, Any]]:
        told.note_cancelled(site.run, [first, other, begun], nodes, unit)
        return [(j["state"], j.get("cancelled")) for j in Look(site.run).journals]

    assert noted({str(PLAIN)}, "no_penalty-seed1") == [
        ("submitted", ["ppo/no_penalty-seed1", "select"]),
        ("submitted", None),
        ("submitting", ["ppo/no_penalty-seed1"]),
    ]
    assert noted(set(), None) == [
        ("submitted", ["ppo/no_penalty-seed1", "select"]),
        ("submitted", None),
        ("cancelled", []),
    ]


# The command


def test_the_command_s_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        told.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(
        "usage: python -m slurm.status [-h] --run RUN [--hashes] [--json] [--cancel] [--unit UNIT]"
        " What of a run is done, what runs, and why the rest is not"
    )
    for option in (
        "--hashes hash every published file instead of comparing sizes",
        "--json for programs: one object",
        "--cancel cancel the run's jobs",
        "--unit UNIT cancel this unit's job alone, such as penalty-seed0",
    ):
        assert option in out
    with pytest.raises(SystemExit):
        told.main([])
    assert "the following arguments are required: --run" in capsys.readouterr().err


def test_all_that_is_said_of_a_run(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(site, "aa")
    for node in ENCODE:
        lasting(site, node, 5)
    damage(site, ENCODE[1])
    slurm = Slurm({PENALTY: queued("12", elapsed_s=900.0)}, {}, heard=False)
    monkeypatch.setattr(told, "ask_slurm", lambda look: slurm)
    assert told.main(["--run", str(site.path), "--hashes"]) == 1
    out, err = capsys.readouterr()
    assert err == "warning: the queue gave no answer; showing manifests alone\n"
    lines = out.splitlines()
    assert lines[0].split() == "phase job state progress took CPU, memory log".split()
    assert [line.split()[0] for line in lines[1:3]] == ["fetch", str(ENCODE[0])]
    (bad,) = [line for line in lines if line.startswith("encode/shard-0001")]
    assert "not done: x.json does not match its SHA-256" in bad
    assert lines[-3:] == [
        "GPU-hours: 1.0 used of 12.0 planned",
        "hashed 3 files of 3 units: not as published are encode/shard-0001-of-0002, of which the"
        " table says why",
        f"the queue gave no answer; make status RUN={site.path} asks again",
    ]
    assert told.main(["--run", str(site.path)]) == 1
    quick = capsys.readouterr().out
    assert "hashed" not in quick and "SHA-256" not in quick, "sizes alone"
    assert told.main(["--run", str(site.path), "--json"]) == 1
    found = capsys.readouterr().out
    assert found.startswith('{\n "run": ') and json.loads(found)["queue_answered"] is False
    nowhere = Path(f"{site.path}-nowhere")
    assert told.main(["--run", str(nowhere)]) == 2


def test_a_local_run_is_seen_and_logs_have_a_column_where_there_is_room(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(told, "ask_slurm", lambda look: Slurm({}, {}))
    monkeypatch.setattr(told, "local_states", lambda run: {SELECT: "running"})
    for wide, logs in ((1000, True), (1001, False)):  # of a pipe's 1000 columns
        monkeypatch.setattr(told, "WIDE", wide)
        assert told.main(["--run", str(site.path)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split()[-1] == ("log" if logs else "memory")
        (line,) = [line.split() for line in lines if line.startswith("select ")]
        assert line == ["select", "running"]
        assert lines[-1] == f"make watch RUN={site.path}"
        assert not any(line.startswith(("GPU-hours", "hashed")) for line in lines)
