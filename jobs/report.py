"""Write the report of whatever became of a run: `python -m jobs report --run R` ->
final_report.txt, report.html, report.json, cards.html.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime

from reports.cards import cards_page
from reports.evidence import judgement
from reports.figures import figures
from reports.frames import read_run
from reports.page import page
from reports.pareto import sweep_figures
from reports.text import final_report
from sarm.config import Config
from sarm.records import Report
from sarm.run import Attempt, Published, RunDir, patience_s, slurm_complaint, write_atomic


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Failed and missing phases are named in the report; nothing but an unwritable disk keeps it
    from being written.
    """
    frames = read_run(run, patience_s=patience_s(), failed=failed_units(run))
    for phase, name in zip(frames.phases["phase"], frames.phases["unit"], strict=True):
        if (phase, name) in frames.manifests:
            attempt.note(Published(run.folder(phase, name), frames.manifests[phase, name]))
        else:
            attempt.note_missing(phase, name)
    record = judgement(run, frames).record()
    found = figures(run, frames, record, datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
    found["sweep"] = sweep_figures(run, frames)
    attempt.path("final_report.txt").write_text(final_report(found), encoding="utf-8")
    attempt.path("report.html").write_text(page(found, frames), encoding="utf-8")
    Report(**found).write(attempt.path("report.json"))
    names = ["final_report.txt", "report.html", "report.json"]
    if frames.cards is not None:
        attempt.path("cards.html").write_text(
            cards_page(frames.cards, config.name), encoding="utf-8"
        )
        names.append("cards.html")
    published = attempt.publish(verdict=record["word"], failures=len(found["failures"]))
    for name in names:  # copies that keep their names, for people
        write_atomic(run.path / name, published.path(name).read_bytes())


def failed_units(run: RunDir) -> dict[tuple[str, str], str]:
    """How each unit ended whose job Slurm said, when this job began, had ended without success,
    `TIMEOUT` say and what Slurm wrote of it; empty where it never began. Any other may have ended
    well, its manifest not seen here yet.
    """
    states = dict(
        line.split()
        for line in os.environ.get("SARM_FAILED_JOBS", "").splitlines()
        if line.count(" ") == 1
    )
    jobs: dict[str, str] = json.loads(os.environ.get("SARM_JOBS", "{}"))
    found = {}
    for key, id_ in jobs.items():
        if id_ in states:
            phase, _, unit = key.partition("/")
            logs = run.slurm_logs(id_)
            found[phase, unit] = (
                ": ".join(filter(None, (states[id_], slurm_complaint(logs)))) if logs else ""
            )
    return found
