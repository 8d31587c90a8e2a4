"""Whose a job is: by its name and submission, never by its number, in every command alike; and the
caller's environment, which no Slurm command hears.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sarm.run import RunDir
from slurm import queue, watch
from slurm.environment import client_environment
from slurm.journal import job_name, journals, owned
from slurm.status import main as status
from slurm.submit import main as submitting
from tests.fakes.site import Site, batch_of


def strangers_job(site: Site, id_: str = "777", name: str = "mine.other-abcdef-01234567") -> None:
    """Another job of the same user's, which the suite did not make."""
    state = {"calls": 0, **site.state}
    job = {"name": name, "state": "RUNNING", "held": False, "elements": 0}
    more = {"dependency": "", "text": "#SBATCH --partition=main\n", "cluster": None}
    state["jobs"][id_] = {**job, **more}
    site.remember(state)


def run_status(site: Site, *more: str) -> int:
    return status(["--run", str(site.path), *more])


def forget_all(site: Site) -> None:
    """A controller set up anew: it knows no job, and ids begin again."""
    site.remember({"jobs": {}, "calls": 0})


OVERRULES = [
    {"SQUEUE_STATES": "RUNNING"},
    {"SQUEUE_PARTITION": "urgent"},
    {"SQUEUE_FORMAT": "%j"},
    {"SLURM_CLUSTERS": "elsewhere"},
    {"SCANCEL_STATE": "RUNNING"},
]


@pytest.mark.parametrize("shell", OVERRULES, ids=lambda env: next(iter(env)))
def test_no_command_sees_through_the_shells_filters(
    site: Site,
    shell: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site.submit()
    capsys.readouterr()
    assert run_status(site) == 1
    without = capsys.readouterr().out
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    assert run_status(site) == 1
    assert capsys.readouterr().out == without and "pending" in without
    assert site.submit() == 0 and len(site.jobs) == 14, "attached to what waits"
    assert run_status(site, "--cancel") == 0
    assert {job["state"] for job in site.jobs.values()} == {"CANCELLED"}


def test_doctor_and_submission_hear_the_same_account(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.profile.write_text(site.profile.read_text() + "account: nosuch\n")
    site.fault(flags={"--account=nosuch": "Invalid account"})
    monkeypatch.setenv("SBATCH_ACCOUNT", "sarm")
    from slurm import doctor

    words = ["--cluster", str(site.profile), "--config", str(site.config), "--run", str(site.path)]
    assert doctor.main(words) == 2 and submitting(words) == 2 and not site.jobs


def test_a_clients_environment_is_the_callers_without_what_overrules_it() -> None:
    env = {
        "PATH": "/bin",
        "SLURM_CONF": "/etc/s.conf",
        "SLURM_JOB_ID": "5",
        "SBATCH_EXPORT": "ALL",
        "SACCT_FORMAT": "x",
        "LC_ALL": "de_DE.ISO8859-1",
        "LC_TIME": "de_DE",
        "LANG": "ja_JP.eucJP",
        "KRB5CCNAME": "k",
    }
    assert client_environment(env) == {
        "PATH": "/bin",
        "SLURM_CONF": "/etc/s.conf",
        "KRB5CCNAME": "k",
        "LANG": "C",
        "LC_ALL": "C",
    }


def test_job_names_in_any_encoding_are_read(site: Site) -> None:
    site.submit()
    strangers_job(site, name="Versuch-\udce4\udcff|with|bars")  # Latin-1, as squeue hands it on
    assert len(queue.known_jobs()) == 18
    assert run_status(site, "--cancel") == 0 and site.jobs["777"]["state"] == "RUNNING"


def test_ids_that_came_again_are_another_runs(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_S", 0.0)
    assert site.submit() == 0
    first, site_config = site.path, site.run.config
    forget_all(site)
    site.path = tmp_path / "B"
    RunDir.create(site.path, site_config)
    site.do("fetch")
    assert site.submit() == 0
    others = {id_: batch_of(job) for id_, job in site.jobs.items()}
    assert "101" in others and "113" in others, "the same numbers"
    capsys.readouterr()
    assert status(["--run", str(first)]) == 3
    out = capsys.readouterr().out
    assert "pending" not in out and "nothing of" in out
    assert status(["--run", str(first), "--cancel"]) == 0
    assert "is in the queue any more" in capsys.readouterr().out
    assert {job["state"] for job in site.jobs.values()} == {"PENDING"}
    site.fault(no_sacct=False)  # accounting's numbers are no more ours
    status(["--run", str(first)])
    assert "25%" not in capsys.readouterr().out
    site.fault()
    second, site.path = site.path, first
    assert site.submit() == 0
    assert "attached" not in capsys.readouterr().out
    site.path = second
    assert {site.jobs[id_]["state"] for id_ in others} == {"PENDING"}, "B is untouched"
    assert len(site.jobs) == len(others) + 14


@pytest.mark.parametrize(
    ("says", "id_"),
    [
        ("Submitted batch job 12", "12"),
        ("Quota check for job 777 of 5 ... OK\nSubmitted batch job 12\n", "12"),
        ("Submitted batch job 12 on cluster gpu", "12"),
        ("12\n", "12"),
        ("12;gpu", "12"),
        ("hello\n12", "12"),
    ],
)
def test_the_id_in_sbatchs_answer(says: str, id_: str) -> None:
    assert queue.submitted_id(says) == id_


@pytest.mark.parametrize("says", ["", "Quota check for job 777 of 5 ... OK", "12 and more", "x12"])
def test_an_answer_that_names_no_job_is_refused(says: str) -> None:
    with pytest.raises(queue.Refused, match="names no job"):
        queue.submitted_id(says)


@pytest.mark.parametrize(
    "says",
    [
        "Quota check for job 777 OK\nSubmitted batch job {id}",
        "{id};c",
        # in words of its own: the queue knows the name
        "\x1b[32mSubmitted batch job {id}\x1b[0m",
        "{id}\nYour balance: 777 hours",
        "Job 777 is ahead of yours",
        "",
    ],
)
def test_a_sites_sbatch_that_talks(site: Site, says: str) -> None:
    strangers_job(site)
    site.fault(says=says)
    assert site.submit() == 0
    assert site.jobs["777"]["state"] == "RUNNING" and len(site.jobs) == 15


def test_an_answer_that_names_another_job_takes_all_back_and_leaves_that_one(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    strangers_job(site)
    site.fault(wrong=4, victim=777)
    assert site.submit() == 2
    assert "named job 777, and its job is 104" in capsys.readouterr().err
    states = {id_: job["state"] for id_, job in site.jobs.items()}
    assert states.pop("777") == "RUNNING" and set(states.values()) == {"CANCELLED"}


@pytest.mark.parametrize("at", [1, 4, 14])
def test_a_job_whose_answer_was_lost_is_found_by_its_name(site: Site, at: int) -> None:
    site.fault(lose=at)
    assert site.submit() == 0
    jobs = {batch_of(job): id_ for id_, job in site.jobs.items()}
    assert len(jobs) == len(site.jobs) == 14 and not any(j["held"] for j in site.jobs.values())
    (journal,) = journals(site.run)
    assert journal["jobs"] == jobs
    assert all(list(site.path.glob(f"submissions/*/{id_}*_submitted.pkl")) for id_ in jobs.values())


def test_a_job_that_comes_to_be_after_all_is_not_there_twice(site: Site) -> None:
    site.fault(hides=4)  # its answer is lost, and it is seen only when it has been sent again
    assert site.submit() == 0
    live = [batch_of(job) for job in site.jobs.values() if job["state"] != "CANCELLED"]
    assert sorted(live) == sorted(set(live)) and len(live) == 14


@pytest.mark.parametrize("command", ["sbatch", "squeue", "scontrol"])
def test_a_controller_that_is_busy_for_a_moment_is_asked_again(site: Site, command: str) -> None:
    site.submit("--phase", "encode")  # so that there is a queue to look at
    site.fault(busy={command: 2})
    assert site.submit() == 0
    assert len(site.jobs) == 14 and not any(job["held"] for job in site.jobs.values())


def test_a_controller_that_stays_away_is_not_asked_for_ever(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.fault(busy={"sbatch": 1000})
    assert site.submit() == 2
    assert "try again later" in capsys.readouterr().err
    asked = [words for words in site.state["commands"] if words[0] == "sbatch"]
    assert len(asked) == queue.TRIES and not site.jobs


def test_one_function_says_whose_a_job_is(site: Site) -> None:
    site.submit()
    (journal,) = journals(site.run)
    name = job_name(site.run, "probe.1", journal["id"])
    assert name.startswith("probe.1.dag-"), "the phase first"

    def job(id_: str, name: str, cluster: str | None = None) -> queue.QueuedJob:
        return queue.QueuedJob(id_, name, "RUNNING", 0.0, "", cluster)

    mine = job("9_1", name)  # another number than the journal's: the name tells
    foreign = [
        job("103_1", "probe.1.dag-000000-" + journal["id"]),
        job("103", name + "x"),
        job("103_1", name, "elsewhere"),
    ]
    (found,) = owned(site.run, [journal], [mine, *foreign])
    assert found.job == mine and [str(node) for node in found.nodes] == ["probe/shard-0003-of-0005"]


def test_a_run_is_the_same_by_a_link_and_once_it_was_moved(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "scratch" / "run"
    real.parent.mkdir()
    site.path.rename(real)
    site.path.symlink_to(real)
    assert site.submit() == 0
    capsys.readouterr()
    for path in (site.path, real):
        assert status(["--run", str(path)]) == 1
        assert capsys.readouterr().out.count("pending") == 17
    moved = tmp_path / "elsewhere"
    real.rename(moved)  # or another host's name for the same file system
    assert status(["--run", str(moved)]) == 1
    assert status(["--run", str(moved), "--cancel"]) == 0
    assert {job["state"] for job in site.jobs.values()} == {"CANCELLED"}


def test_a_copy_of_a_run_is_another_run(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.submit()
    copy = tmp_path / "copy"
    shutil.copytree(site.path, copy)
    assert status(["--run", str(copy), "--cancel"]) == 2
    assert "nothing was submitted for" in capsys.readouterr().err
    first, site.path = site.path, copy
    assert site.submit() == 0 and len(site.jobs) == 28
    assert status(["--run", str(copy), "--cancel"]) == 0
    states = [job["state"] for job in site.jobs.values()]
    assert states == ["PENDING"] * 14 + ["CANCELLED"] * 14
    assert status(["--run", str(first)]) == 1


def test_a_killed_submission_leaves_nothing_that_cancel_does_not_see(site: Site) -> None:
    site.submit()
    (path,) = site.path.glob("submissions/*/journal.json")
    journal: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**journal, "state": "submitting", "jobs": {}}))
    assert run_status(site, "--cancel") == 0
    assert {job["state"] for job in site.jobs.values()} == {"CANCELLED"}


def test_what_came_to_be_after_a_submission_was_taken_back_is_not_attached_to(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """An sbatch that was killed with its submission may have reached the controller before."""
    site.submit()
    (path,) = site.path.glob("submissions/*/journal.json")
    journal: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**journal, "state": "cancelled", "jobs": {}}))
    site.set_state("CANCELLED")
    state = site.state
    late = next(job for job in state["jobs"].values() if batch_of(job) == "select")
    late |= {"state": "PENDING", "held": True}
    site.remember(state)
    capsys.readouterr()
    assert site.submit() == 0
    assert "attached" not in capsys.readouterr().out
    states = [job["state"] for job in site.jobs.values()]
    assert states == ["CANCELLED"] * 14 + ["PENDING"] * 14


def test_the_phase_stands_first_in_every_name(site: Site) -> None:
    site.submit()
    for job in site.jobs.values():
        assert re.match(
            r"(encode|probe|select|steer|cards|calibrate|ppo|evaluate|report)\.", job["name"]
        )
