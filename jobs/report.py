"""Write the report of whatever became of a run: `python -m jobs report --run R` ->
final_report.txt, report.html, report.json, generations.html, cards.html.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from reports.cards import cards_page
from reports.evidence import judgement
from reports.explorer import explorer_page
from reports.figures import figures
from reports.frames import Frames, read_run
from reports.page import page
from reports.pareto import sweep_figures
from reports.text import final_report
from reports.texts import shown_frames, texts_words
from sarm.config import PHASES, Config, UserError
from sarm.records import Report
from sarm.run import Attempt, Published, RunDir, listed, patience_s, write_atomic


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Failed and missing phases are named in the report; nothing but an unwritable disk keeps it
    from being written.
    """
    frames = read_run(run, patience_s=patience_s(), failed=failed_units())
    lost = lost_units(run, frames)
    for phase, name in zip(frames.phases["phase"], frames.phases["unit"], strict=True):
        if (phase, name) in frames.manifests:
            attempt.note(Published(run.folder(phase, name), frames.manifests[phase, name]))
        else:
            attempt.note_missing(phase, name)
    record = judgement(run, frames).record()
    found = figures(run, frames, record, datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
    found["sweep"] = sweep_figures(run, frames)
    attempt.path("final_report.txt").write_text(final_report(found), encoding="utf-8")
    shown = shown_frames(frames, config.report)
    attempt.path("report.html").write_text(page(found, shown), encoding="utf-8")
    Report(**found).write(attempt.path("report.json"))
    names = ["final_report.txt", "report.html", "report.json"]
    if len(shown.generations):
        text = explorer_page(found, shown)
        attempt.path("generations.html").write_text(text, encoding="utf-8")
        names.append("generations.html")
    if shown.cards is not None:
        text = cards_page(
            shown.cards,
            config.name,
            texts_words(found["texts"]),
            examples=shown.examples,
            distance=shown.compared.distance,
        )
        attempt.path("cards.html").write_text(text, encoding="utf-8")
        names.append("cards.html")
    if lost:
        keep_beside(run, attempt, names, lost)
        return
    published = attempt.publish(verdict=record["word"], failures=len(found["failures"]))
    for name in names:  # copies that keep their names, for people
        write_atomic(run.path / name, published.path(name).read_bytes())
    for name in names:
        lacking(run, name).unlink(missing_ok=True)  # what one lacked is there now
    if config.report.texts != "all":
        remove_earlier(run, published)


def remove_earlier(run: RunDir, published: Published) -> None:
    """Remove reports that this one takes the place of: they may hold texts that are not shown."""
    stands = {published.path(name) for name in published.manifest.outputs}
    for stem in ("final_report", "report", "generations", "cards"):
        for file in (*published.folder.glob(f"{stem}.*"), *run.path.glob(f"{stem}.incomplete.*")):
            if file not in stands:
                file.unlink(missing_ok=True)


def lost_units(run: RunDir, frames: Frames) -> list[str]:
    """Units that the standing report was made with, and that this one would lack."""
    try:
        standing = run.manifest("report")
    except UserError:
        return []
    if standing is None:
        return []
    had = {"/".join(key.split("/")[:2]) for key, sha256 in standing.inputs.items() if sha256}
    asked = {f"{phase}/{unit}" for phase in PHASES for unit in run.config.units(phase)}
    has = {f"{phase}/{unit}" for phase, unit in frames.manifests}
    return sorted((had & asked) - has)


def lacking(run: RunDir, name: str) -> Path:
    """Where a report that lacks what the standing one has keeps this file."""
    stem, _, suffix = name.partition(".")
    return run.path / f"{stem}.incomplete.{suffix}"


def keep_beside(run: RunDir, attempt: Attempt, names: list[str], lost: list[str]) -> None:
    """Leave a report that lacks what the standing one has beside that, under names of its own.

    Raises UserError, as the report is then not done.
    """
    for name in names:
        write_atomic(lacking(run, name), attempt.written(name).read_bytes())
    raise UserError(
        f"the report in {run.path} was made with {listed(lost)}, which"
        f" {'is' if len(lost) == 1 else 'are'} not done now, so it is kept, and this one is"
        " final_report.incomplete.txt; do those again (make status says why), or remove"
        f" {run.folder('report')} to have it replaced"
    )


def failed_units() -> dict[tuple[str, str], str]:
    """How each unit ended of which the launcher says, in SARM_FAILED_UNITS, that its job ended
    without success, `TIMEOUT: ...` say; empty where it never began. Any other may have ended well,
    its manifest not seen here yet.
    """
    said: dict[str, str] = json.loads(os.environ.get("SARM_FAILED_UNITS", "{}"))
    return {(key.partition("/")[0], key.partition("/")[2]): why for key, why in said.items()}
