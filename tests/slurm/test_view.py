"""How a run in progress is shown: figures by hand, a terminal of a known size, and plain lines
where there is none.
"""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from sarm.config import PHASES, ROOT
from sarm.run import Attempt, RunDir
from slurm import view, watch
from slurm.dag import Node
from slurm.lock import held
from slurm.state import Look, Slurm, local_states, unit_state, write_local_states
from slurm.view import Unit, View, read_curves, read_progress, screen, span, sparkline
from tests.fakes.site import Site

PPO = Node("ppo", "penalty-seed1")


def tell(run: RunDir, node: Node, **told: object) -> None:
    file = run.progress_file(*node)
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        json.dumps(
            {
                "done": 40,
                "total": 100,
                "what": "step",
                "attempt": "a",
                "from": 0,
                "seconds": 20.0,
                "started": "2026-01-31T12:00:00+00:00",
                "at": "2026-01-31T12:00:25+00:00",
                **told,
            }
        )
    )


def test_a_sparkline_runs_from_the_least_to_the_most() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0], 8, ascii_only=True) == "#_"
    assert sparkline([0, 0, 7, 7], 2) == "▁█", "each block is the mean of its share"
    assert sparkline([3, 3, 3], 5) == "▁▁▁" and sparkline([], 5) == ""


def test_a_span_is_in_the_unit_that_is_read_most_easily() -> None:
    assert [span(s) for s in (0.4, 99, 100, 5999, 12000)] == [
        "0 s",
        "99 s",
        "2 min",
        "1 h 40 min",
        "3 h 20 min",
    ]


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({}, "step 40/100, 30 s left"),  # 20 s for 40, so 30 s for 60
        # a resumed attempt: 20 s for 10, so 120 s for 60
        ({"from": 30}, "step 40/100, 2 min left"),
        ({"from": 40}, "step 40/100"),
        (
            {"reward": 1.23456, "penalty": 0.1},
            "step 40/100, reward 1.235, penalty 0.100, 30 s left",
        ),
        ({"done": 0, "what": "data"}, "data"),
    ],
)
def test_what_is_left_follows_from_this_attempts_pace(
    site: Site, told: dict[str, object], says: str
) -> None:
    tell(site.run, PPO, **told)
    assert str(read_progress(site.run, PPO)) == says


def test_a_progress_file_that_is_no_such_thing_tells_nothing(site: Site) -> None:
    assert read_progress(site.run, PPO) is None
    tell(site.run, PPO)
    for text in ("", "{}", "[]", '{"done": "x"}'):
        site.run.progress_file(*PPO).write_text(text)
        assert read_progress(site.run, PPO) is None


def test_an_attempt_tells_where_it_began(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(site.run, *PPO)
    attempt.progress(30, 100, "step")
    monkeypatch.setattr(attempt, "_last_progress", 0.0)
    time.sleep(0.2)
    attempt.progress(32, 100, "step")
    told = read_progress(site.run, PPO)
    assert told is not None and told.left_s is not None and 0.1 / 2 * 68 <= told.left_s <= 60
    attempt.progress(100, 100, "written")  # another activity has a pace of its own
    told = read_progress(site.run, PPO)
    assert told is not None and told.left_s is None


def write_curve(run: RunDir) -> None:
    run.folder(*PPO).mkdir(parents=True, exist_ok=True)
    steps = [
        {"step": i, "objective/scores": float(i), "objective/penalty": 1.0 - i / 10}
        for i in range(8)
    ]
    text = "".join(json.dumps(step) + "\n" for step in steps)
    (run.folder(*PPO) / "metrics.a.jsonl").write_text(text + '{"step": 8, "objective/sco')


def test_curves_are_those_of_the_attempt_that_runs_and_stop_before_a_half_written_line(
    site: Site,
) -> None:
    assert read_curves(site.run, PPO) == {"reward": [], "penalty": []}
    tell(site.run, PPO)
    write_curve(site.run)
    (site.run.folder(*PPO) / "metrics.older.jsonl").write_text('{"objective/scores": 99.0}\n')
    assert read_curves(site.run, PPO)["reward"] == [float(i) for i in range(8)]


def painted(
    run: RunDir, units: list[Unit], width: int, height: int = 40, encoding: str = "utf-8"
) -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None)
    console.print(screen(run, units, console, 5, "about 12 min left"))
    file.flush()
    return [line.rstrip() for line in file.buffer.getvalue().decode(encoding).splitlines()]  # type: ignore[attr-defined]


UNITS = [
    Unit(Node("fetch", "all"), "done", "3 s"),
    *(
        Unit(
            Node("probe", f"shard-{i:04d}-of-0004"),
            "done" if i < 2 else "running" if i == 2 else "pending",
        )
        for i in range(4)
    ),
    Unit(PPO, "running"),
    Unit(Node("ppo", "no_penalty-seed1"), "TIMEOUT", "exit 0:15"),
    Unit(Node("report", "all"), "waiting", "no manifest"),
]


def test_the_screen_shows_phases_shards_steps_and_curves(site: Site) -> None:
    tell(site.run, PPO)
    write_curve(site.run)
    site.run.log("ppo", "no_penalty-seed1").parent.mkdir(exist_ok=True)
    site.run.log("ppo", "no_penalty-seed1").write_text(
        "step 3\nslurmstepd: DUE TO TIME [LIMIT]\n\n"
    )
    lines = painted(site.run, UNITS, 120)
    assert lines[0].startswith("dag  3 of 8 done, 2 running, 1 failed")
    assert lines[1] == "about 12 min left"
    probe = next(line for line in lines if " probe " in line)
    assert "━━━━──── 2/4" in probe and "running" in probe
    ppo = next(line for line in lines if "penalty-seed1" in line and "step" in line)
    assert (
        "step 40/100, 30 s left" in ppo
        and "reward ▁▂▃▄▅▆▇█ 7.000" in ppo
        and "penalty █▇▆▅▄▃▂▁ 0.300" in ppo
    )
    assert any("TIMEOUT" in line and "DUE TO TIME [LIMIT]" in line for line in lines)
    assert not any("shard-0000" in line for line in lines), (
        "of shards only those that run or failed have a line"
    )
    assert max(map(len, lines)) <= 120


def test_the_screen_fits_small_terminals_and_those_without_unicode(site: Site) -> None:
    tell(site.run, PPO)
    write_curve(site.run)
    narrow = painted(site.run, UNITS, 80)
    below = next(i for i, line in enumerate(narrow) if "step 40/100, 30 s left" in line) + 1
    assert "reward ▁▂▃▄▅▆▇█ 7.000  penalty █▇▆▅▄▃▂▁ 0.300" in narrow[below]
    lines = painted(site.run, UNITS, 60, height=8)
    assert (
        max(map(len, lines)) <= 60
        and len(lines) <= 8
        and any("more lines" in line for line in lines)
    )
    assert "####.... 2/4" in "\n".join(painted(site.run, UNITS, 100, encoding="ascii"))


def test_without_a_terminal_there_is_a_line_a_change_and_now_and_then_one_of_progress(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(site.run, PPO)
    with View(site.run) as shown:
        shown.update(UNITS)
        first = capsys.readouterr().out.splitlines()
        assert len(first) == 6 and first[0].split() == ["fetch", "done,", "3", "s"]
        shown.update(UNITS)
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(view, "PLAIN_EVERY_S", 0.0)
        shown.update(UNITS, "about 12 min left")
        out = capsys.readouterr().out
        assert "ppo/penalty-seed1            step 40/100, 30 s left" in out
        assert out.endswith("dag: about 12 min left\n")


def test_a_launchers_word_counts_only_while_it_is_at_work(site: Site) -> None:
    node = Node("encode", "shard-0000-of-0002")
    write_local_states(site.run, {node: "running"})
    assert local_states(site.run) == {}
    with held(site.run.path / "run.lock", "a run"):
        assert local_states(site.run) == {node: "running"}
        assert state_of(site.run, node) == "running"
    assert state_of(site.run, node) == "waiting"


def state_of(run: RunDir, node: Node) -> str:
    look = Look(run)
    task = next(task for task in look.tasks if task.node == node)
    return unit_state(look, task, Slurm({}, {}), local_states(run)).state


def test_watching_a_submission_ends_with_it_and_tells_what_failed(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_S", 0.05)
    monkeypatch.setattr(watch, "ASK_SLURM_EVERY_S", 0.0)
    assert site.submit() == 0
    site.set_state("RUNNING", only="encode")
    site.run.log("encode", "shard-0001-of-0002").parent.mkdir(exist_ok=True)
    site.run.log("encode", "shard-0001-of-0002").write_text("error: the disk of the moon is full\n")

    def go_on() -> None:
        time.sleep(0.5)
        site.do("encode", but=("encode/shard-0001-of-0002",))
        site.fault(no_sacct=False)
        site.set_state("CANCELLED")
        site.set_state("FAILED", only="encode")

    threading.Thread(target=go_on).start()
    assert watch.main(["--run", str(site.path)]) == 3
    out = capsys.readouterr().out
    assert (
        "encode/shard-0000-of-0002    running" in out and "encode/shard-0000-of-0002    done" in out
    )
    assert "disk of the moon" in out and "make submit-all" in out


def test_a_controller_that_does_not_answer_is_not_taken_for_an_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    monkeypatch.setattr(watch, "ASK_SLURM_EVERY_S", 0.0)
    assert site.submit() == 0
    answers = iter(
        [watch.ask_slurm(Look(site.run)), Slurm({}, {}, heard=False), Slurm({}, {}, heard=False)]
    )
    monkeypatch.setattr(watch, "ask_slurm", lambda run: next(answers, Slurm({}, {})))
    assert watch.main(["--run", str(site.path)]) == 1
    assert next(answers, None) is None


def test_a_run_that_is_done_says_where_its_report_is(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.do(*PHASES[1:])
    assert watch.main(["--run", str(site.path)]) == 0
    assert str(site.path / "final_report.txt") in capsys.readouterr().out
    assert watch.main(["--run", str(site.path / "nowhere")]) == 2


def test_on_a_terminal_ctrl_c_leaves_the_run_and_the_screen_alone(
    site: Site, tmp_path: Path
) -> None:
    """A real pseudo-terminal, as ssh gives one."""
    assert site.submit() == 0
    ours, theirs = pty.openpty()
    env = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLUMNS": "100",
        "LINES": "30",
        "PYTHONIOENCODING": "utf-8",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "slurm.watch", "--run", str(site.path)],
        cwd=ROOT,
        env=env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        # ignored under nohup, and inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    shown = b""
    while b"report" not in shown:
        shown += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    try:
        while more := os.read(ours, 65536):
            shown += more
    except OSError:  # the other side has closed
        pass
    text = shown.decode()
    assert (
        process.wait(timeout=20) == 0
        and " 1 of " in text
        and "\x1b[" in text
        and "the run goes on" in text
    )
    assert {job["state"] for job in site.jobs.values()} == {"PENDING"}
