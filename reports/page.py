"""Figures and frames -> report.html, one file that needs no network: `page(figures, frames)`.

The sections are those of the text; the page adds headline figures, plots, sample generations and
the source of each section.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pandas as pd
from plotly.offline import get_plotlyjs

from reports import reference
from reports.distances import compared_words
from reports.frames import Frames, arm_rank
from reports.numbers import arm_name, fixed, interval
from reports.plots import PLOTS, Plot
from reports.policy_sections import verdict_figures
from reports.sections import SECTIONS, Section
from reports.text import final_report
from reports.texts import texts_words
from sarm.config import ARMS

TEMPLATES = Path(__file__).parent / "templates"
SAMPLES = {"unsafe": 80, "safe": 40}
"""At most this many prompts of each kind are shown; the tables of evaluate hold the rest."""
SAMPLE_LENGTH = 1500
"""Characters of a prompt or response that are shown."""
HEADLINES = {
    "penalised_fired": ("Penalised latents fire", "on unsafe prompts"),
    "monitors_fired": ("Monitor latents fire", "on unsafe prompts"),
    "harm": ("Harm, by the judge", "on unsafe prompts"),
    "refused": ("Refusals", "of unsafe prompts"),
    "over_refused": ("Over-refusals", "of safe look-alikes"),
}


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
        texts=texts_words(figures["texts"]),
        facts=facts(figures),
        headlines=headlines(figures),
        before=sections[:after],
        samples=samples(figures, frames.generations),
        after=sections[after:],
        plots=[plot for group in plots.values() for plot in group],
        reference=reference_text(figures),
    )


def render(template: str, **values: Any) -> str:
    """A template with the style, the script and Plotly inlined."""
    found = environment().get_template(template)
    texts = {
        name: (TEMPLATES / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")
    }
    return found.render(
        style=texts["css"], script=texts["js"], plotly=_inline(get_plotlyjs()), **values
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
    made.filters["plot_json"] = lambda plot: _inline(
        json.dumps(json.loads(plot.figure.to_json()), separators=(",", ":"))
    )
    made.filters["coded"] = _coded
    made.filters["first_part"] = lambda path: path.partition("/")[0]
    made.filters["short"] = lambda digest: (digest or "none")[:8]
    return made


def _coded(text: str) -> markupsafe.Markup:
    """What stands between backticks in the text report, as code."""
    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def _inline(text: str) -> str:
    """JSON that cannot end the script element that it stands in, nor open a comment there."""
    return text.replace("<", "\\u003c")


def section_parts(section: Section, figures: dict[str, Any], plots: list[Plot]) -> dict[str, Any]:
    sources = figures["sources"].get(section.id, [])
    return {
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


def headlines(figures: dict[str, Any]) -> list[dict[str, str]]:
    """The penalty arm's changes against the no-penalty arm, as cards."""
    found = {
        c["measure"]: c
        for c in figures["verdict"]["changes"]
        if c["arm"] == "penalty" and c["n_prompts"]
    }
    return [
        {
            "name": name,
            "on": on,
            "value": fixed(100 * found[measure]["change"], 1, sign=True),
            "interval": interval(100 * found[measure]["low"], 100 * found[measure]["high"], 1),
            "from_to": (
                f"{fixed(found[measure]['before'], 3)} to {fixed(found[measure]['after'], 3)}"
            ),
            "n": f"{found[measure]['n_prompts']} prompts, {found[measure]['n_seeds']} seeds",
            "detectable": fixed(100 * found[measure]["detectable"], 1),
        }
        for measure, (name, on) in HEADLINES.items()
        if measure in found
    ]


def samples(figures: dict[str, Any], generations: pd.DataFrame) -> dict[str, Any]:
    """Prompts with the answers of the base policy and of the first seed's arms side by side."""
    if generations.empty:
        return {"policies": [], "prompts": [], "n": 0, "length": SAMPLE_LENGTH, "sources": []}
    seed = figures["provenance"]["ppo_seeds"][0]
    untrained = [arm for arm, kind in ARMS.items() if not kind.trained]
    mine = generations[generations["arm"].isin(untrained) | (generations["seed"] == seed)]
    policies = sorted(
        mine["policy"].unique(),
        key=lambda policy: arm_rank(mine.loc[mine["policy"] == policy, "arm"].iloc[0]),
    )
    ids = (
        mine[["prompt_id", "kind"]]
        .drop_duplicates("prompt_id")
        .sort_values(["kind", "prompt_id"], ascending=[False, True])
    )
    wanted = ids.groupby("kind", sort=False).head(max(SAMPLES.values()))
    wanted = pd.concat(
        [
            group.head(SAMPLES[kind])
            for kind, group in wanted.groupby("kind", sort=False)
            if kind in SAMPLES
        ]
    )
    at = mine.set_index(["prompt_id", "policy"])
    prompts = []
    for prompt_id, kind in wanted[["prompt_id", "kind"]].itertuples(index=False):
        answers = [
            _answer(at.loc[(prompt_id, policy)])
            for policy in policies
            if (prompt_id, policy) in at.index
        ]
        first = mine[mine["prompt_id"] == prompt_id].iloc[0]
        told = {
            "id": prompt_id,
            "kind": kind,
            "category": str(first.get("category") or ""),
            "prompt": clipped(str(first.get("prompt", ""))),
        }
        prompts.append(told | {"answers": answers})
    return {
        "policies": policies,
        "prompts": prompts,
        "n": len(ids),
        "length": SAMPLE_LENGTH,
        "sources": figures["sources"].get("samples", []),
    }


def _answer(row: pd.Series) -> dict[str, Any]:
    trained = row["arm"] not in ARMS or ARMS[row["arm"]].trained
    seed = f", seed {row['seed']}" if trained else ""
    return {
        "policy": arm_name(row["arm"]) + seed,
        "text": clipped(str(row["response"])),
        "reward": fixed(row["reward"], 3),
        "fired": bool(row["penalised_fired"] == 1),
        "refused": bool(row["refused"]),
        "truncated": bool(row["truncated"]),
        "tokens": int(row["n_tokens"]),
    }


def clipped(text: str) -> str:
    return text if len(text) <= SAMPLE_LENGTH else text[:SAMPLE_LENGTH].rstrip() + " [...]"


def reference_text(figures: dict[str, Any]) -> str:
    """The reference report's part of final_report.txt."""
    head, _, _ = final_report(figures).partition("\n\nVERDICT\n")
    return head
