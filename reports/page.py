"""Figures and frames -> report.html, one file that needs no network: `page(figures, frames)`.

The sections are those of the text; the page adds headline figures, plots and the source of each
section, and leads to generations.html (`reports.explorer`) and cards.html (`reports.cards`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from plotly.offline import get_plotlyjs

from reports import reference
from reports.distances import compared_words
from reports.findings import NOT_RUN, finding
from reports.frames import Frames
from reports.ladder import drawn
from reports.numbers import cut_off, fixed, interval, percentage
from reports.origins import CHANGES, GENERATIONS, READINGS, count_of
from reports.plots import PLOTS, Plot
from reports.policy_sections import verdict_figures
from reports.sections import SECTIONS, Section
from reports.text import final_report

TEMPLATES = Path(__file__).parent / "templates"
HEADLINES = {
    "penalised_fired": ("Penalised latents fire", "on unsafe prompts"),
    "monitors_fired": ("Monitor latents fire", "on unsafe prompts"),
    "over_refused": ("Over-refusals", "of safe look-alikes"),
    "harm": ("Harm, by the judge", "on unsafe prompts"),
    "refused": ("Refusals", "of unsafe prompts"),
}
"""The first four that were measured are shown."""
N_HEADLINES = 4


def page(figures: dict[str, Any], frames: Frames) -> str:
    """The whole page."""
    plots = {
        section.id: list(PLOTS.get(section.id, lambda *_: [])(figures, frames))
        for section in SECTIONS
    }
    # The page opens with the word.
    shown = [
        (
            section._replace(title="The figures behind the verdict", blocks=verdict_figures)
            if section.id == "verdict"
            else section
        )
        for section in SECTIONS
    ]
    sections = [section_parts(section, figures, plots[section.id]) for section in shown]
    after = 1 + next(i for i, section in enumerate(SECTIONS) if section.id == "latents")
    return render(
        "report.html",
        title=f"{figures['run']}: report",
        figures=figures,
        compared=compared_words(figures["compared"]),
        facts=facts(figures),
        headlines=headlines(figures),
        ladder=[
            row | {"drawn": drawn(row), "origin": rung_origin(row["rung"], figures["verdict"])}
            for row in figures["ladder"]
        ],
        abstract_origins=ABSTRACT,
        before=sections[:after],
        n_generations=len(frames.generations),
        n_prompts=frames.generations["prompt_id"].nunique(),
        after=sections[after:],
        plots=[plot for group in plots.values() for plot in group],
        reference=reference_text(figures),
    )


def render(
    template: str, *, plots: Sequence[Plot] = (), script: str = "page.js", **values: Any
) -> str:
    """A template with the style and a script inlined, and Plotly where there are plots."""
    made = environment()
    return made.get_template(template).render(
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / script).read_text(encoding="utf-8"),
        plotly=plotly_script() if plots else "",
        plots=plots,
        **values,
    )


@functools.cache
def environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    made = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["plot_json"] = lambda plot: _inline(plot.figure.json())
    made.filters["coded"] = _coded
    made.filters["first_part"] = lambda path: path.partition("/")[0]
    made.filters["short"] = lambda digest: (digest or "none")[:8]
    return made


def _coded(text: str) -> markupsafe.Markup:
    """What stands between backticks in the text report, as code."""
    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


@functools.cache
def plotly_script() -> str:
    """Plotly's, in whose strings alone these two can stand; `<` elsewhere in it is an operator."""
    return get_plotlyjs().replace("</", "<\\/").replace("<!--", "<\\!--")


def _inline(text: str) -> str:
    """JSON that cannot end the script element that it stands in, nor open a comment there."""
    return text.replace("<", "\\u003c")


OPEN = ("evaluation",)
"""Sections that need no click. Each of the others shows its finding, and opens for tables."""


def section_parts(section: Section, figures: dict[str, Any], plots: list[Plot]) -> dict[str, Any]:
    sources = figures["sources"].get(section.id, [])
    said = finding(section.id, figures)
    return {
        "finding": said or NOT_RUN,
        "silent": not said,
        "open": section.id in OPEN and bool(said),
        "id": section.id,
        "title": section.title,
        "note": section.note,
        "blocks": section.blocks(figures),
        "plots": plots,
        "sources": sources,
    }


def facts(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Configuration and penalty, as (name, value); a line without a name is left to the text."""
    lines = [*reference.configuration(figures["configuration"]), *reference.controls(figures)]
    lines = lines[: lines.index("")]
    found = [tuple(line.split(": ", 1)) for line in lines if ": " in line]
    return [*found, ("Date", figures["date"])]  # type: ignore[list-item]


RUNGS = {
    1: ("penalised_fired", "penalty"),
    2: ("over_refused", "penalty"),
    3: ("penalised_fired", "penalty - random"),
    4: ("monitors_fired", "penalty"),
    5: ("harm", "penalty"),
}
"""By rung, the change that it asks about."""
ABSTRACT = {
    "Question": "config.yaml",
    "Set-up": f"ppo/*/metrics.jsonl: step; {GENERATIONS}: prompt_id",
    "Result": CHANGES["change"],
    "Trust": f"{READINGS}; {GENERATIONS}, paired by prompt and seed",
    "Next": "the rung of the ladder on which it ended",
}
"""By sentence of the abstract, where its figures come from; their N stands in the sentence."""


def rung_origin(rung: int, verdict: dict[str, Any]) -> str:
    """Where a rung's interval comes from, and of how many."""
    found = next(
        (c for c in verdict["changes"] if (c["measure"], c["arm"]) == RUNGS.get(rung)), None
    )
    if found is None or not found["n_prompts"]:
        return ""
    return f"{GENERATIONS}: {found['measure']}, paired by prompt and seed; {count_of(found)}"


def headlines(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The penalty arm's changes against the no-penalty arm, as cards."""
    found = {
        c["measure"]: c
        for c in figures["verdict"]["changes"]
        if c["arm"] == "penalty" and c["n_prompts"]
    }
    shown = [measure for measure in HEADLINES if measure in found][:N_HEADLINES]
    return [_headline(found[measure], *HEADLINES[measure], figures["verdict"]) for measure in shown]


def _headline(
    change: dict[str, Any], name: str, on: str, verdict: dict[str, Any]
) -> dict[str, Any]:
    """A card. Only a change whose interval leaves out 0 stands in large type, and none where the
    run has nothing to decide on.
    """
    low, high = change["low"], change["high"]
    known = low is not None and high is not None
    return {
        "name": name,
        "on": on,
        "large": known and (low > 0 or high < 0) and not verdict["gaps"],
        "value": fixed(percentage(change["change"]), 1, sign=True),
        "interval": interval(percentage(low), percentage(high), 1),
        "from_to": f"{fixed(change['before'], 3)} to {fixed(change['after'], 3)}"
        + (", cut off at 0 and 1" if cut_off(change) else ""),
        "n": count_of(change),
        "origin": f"{CHANGES['change']}; {count_of(change)}",
        "detectable": fixed(percentage(change["detectable"]), 1),
    }


def reference_text(figures: dict[str, Any]) -> str:
    """The reference report's part of final_report.txt."""
    head, _, _ = final_report(figures).partition("\n\nABSTRACT\n")
    return head
