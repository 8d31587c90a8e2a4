"""report.html without a browser: it is one file, says what the text says, names its sources, and
takes any run.
"""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from reports import evidence, plots
from reports.blocks import Table
from reports.chart import Chart
from reports.figures import figures
from reports.findings import FINDINGS, NOT_RUN, finding
from reports.frames import Frames, read_run
from reports.page import environment, page
from reports.pareto import sweep_figures
from reports.plots import OTHER, STYLES, Plot, style
from reports.sections import SECTIONS
from sarm.config import ARMS
from sarm.evaluation.verdict import decide
from sarm.run import RunDir
from tests.runs import (
    CALIBRATED,
    HARMING,
    STEERING,
    evaluated_run,
    features,
    large_run,
    reference_config,
    reference_run,
    run_kept_at_distances,
)

VOID = {"meta", "link", "input", "br"}


class Outline(HTMLParser):
    """Ids, anchors, outside references and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.hrefs: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        self.hrefs += [found[name] for name in ("href", "src") if found.get(name)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(run: RunDir) -> tuple[str, dict, Frames]:
    read = read_run(run)
    instrument = evidence.instrument(run, read)._replace(**CALIBRATED)
    verdict = decide(evidence.compared_arms(run, read), run.config.verdict, instrument)
    found = figures(run, read, verdict.record(), "2026-01-31 12:00:00 UTC")
    return page(found, read), found, read


def visible(text: str) -> str:
    """The page's words: no scripts, styles or tags."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return page_of(
        large_run(
            tmp_path_factory.mktemp("large") / "run",
            d_sae=70_000,
            seeds=(0, 1),
            steps=30,
            prompts=60,
        )
    )


def test_it_is_one_well_formed_file_with_every_anchor_in_it(finished):
    text, _, _ = finished
    outline = Outline(text)
    assert outline.open == [] and len(set(outline.ids)) == len(outline.ids)
    assert all(
        href in ("data:,", "generations.html") or (href.startswith("#") and href[1:] in outline.ids)
        for href in outline.hrefs
    )
    assert {section.id for section in SECTIONS} | {"generations", "text"} <= set(outline.ids)


def test_it_says_the_verdict_first_and_the_same_figures_as_the_text(finished):
    text, found, _ = finished
    words = visible(text)
    assert words.index(found["verdict"]["word"].capitalize()) < words.index(
        "Policy evaluation own generations"
    )
    change = next(
        c
        for c in found["verdict"]["changes"]
        if (c["measure"], c["arm"]) == ("penalised_fired", "penalty")
    )
    assert f"{100 * change['change']:+.1f}" in words
    for row in found["policies"]:
        assert f"{row['policy']} {row['n_unsafe']} {row['n_safe']} {row['reward']:.3f}" in words


def test_words_between_backticks_are_code_and_what_they_hold_is_escaped(finished):
    assert "<code>detectable</code> is the minimum detectable effect" in finished[0]
    assert str(environment().filters["coded"]("`a<b` & c`")) == "<code>a&lt;b</code> &amp; c`"


def test_figures_say_on_hover_where_they_come_from_and_why_they_are_not_known(finished):
    text, _, _ = finished
    assert (
        'title="evaluate/*/generations.parquet: penalised_fired (z above tau); 60 unsafe and 60'
        ' safe prompts"' in text
    )
    assert 'title="ppo/*/metrics.jsonl: objective/kl; the last tenth of 30 steps"' in text
    table = Table(
        ["Policy", "monitors", "KL"],
        [["a", "n/a", "0.5"]],
        "",
        {"KL": "f: kl"},
        ["3"],
        {"monitors": "none qualifies"},
    )
    assert [table.hover(0, i) for i in range(3)] == ["", "n/a: none qualifies", "f: kl; 3"]


class Cells(HTMLParser):
    """(section, header, text, what it says on hover) of every cell of a section's tables, those
    that list its source files left out.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.section, self.sources, self.found = "", False, list[list[str]]()
        self.header: list[str] = []
        self.row, self.inside = 0, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "section":
            self.section = given.get("id") or ""
        self.sources |= tag == "details" and given.get("class") == "sources"
        if tag == "table":
            self.header = []
        if tag == "tr":
            self.row = 0
        if tag in ("td", "th"):
            self.inside = tag
            if tag == "th" and given.get("scope") == "col":
                self.header.append("")
            elif not self.sources:
                at = self.header[self.row] if self.row < len(self.header) else ""
                self.found.append([self.section, at, "", given.get("title") or "", tag])
            self.row += 1

    def handle_endtag(self, tag: str) -> None:
        self.sources &= tag != "details"
        self.inside = "" if tag in ("td", "th") else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside == "td" and not self.sources and self.found:
            self.found[-1][2] += data
        elif self.inside == "th" and self.header and self.row == len(self.header):
            self.header[-1] += data.strip()


NO_N = {"phases", "provenance"}
"""Sections of single units, whose figures are of no number of anything."""


def unexplained(text: str) -> list[list[str]]:
    """Cells with a figure, or with n/a, that do not say where it comes from and of how many."""
    return [
        cell
        for cell in Cells(text).found
        if cell[4] == "td"
        and (re.search(r"\d", cell[2]) or cell[2] == "n/a")
        and not re.search(r": " if cell[0] in NO_N or cell[2] == "n/a" else r": .*; \S", cell[3])
    ]


def with_every_table(found: dict) -> dict:
    """Figures with what only some runs have: validity checks, directions, a steered policy, an
    earlier report, a card of the SARM.
    """
    null = {"effect": 0.25, "null": 0.1, "null_low": 0.0, "null_high": 0.2, "p": 0.01}
    validity = {
        "matched_null": [{"role": "harming", "latents": 3, **null}],
        "shuffled_labels": [],
        "replication": [
            {
                "from": "RB2",
                "to": "RMB",
                "prompts": 150,
                "discovered": 20,
                "replicated": 6,
                "opposite_and_significant": 1,
                "rank_correlation_discovered": None,
                "not_replicated": [12, 40],
            }
        ],
        "confirmed_replication": [],
        "baselines": [
            {"on": "RMB", "score": "words", "accuracy": 0.75, "standard_error": 0.02, "pairs": 88}
        ],
        "words_alone": "",
        "sensitivity": [{"what": "another seed", "discoveries": 60, "overlap": 0.5, "again": None}],
    }
    ranking = {"ranking": "weight", "role": "harming", "latents": [1, 2], "shared_with_effect": 1}
    ranking["tested"] = 2
    ranking |= {"of_role": 2, "confirmed": 1, "mean_effect_validation": 0.001}
    moved = {"c": 0.5, "swapped": 3.5, "largest_effect": 0.25, "texts": 64, "part": "validation"}
    moved |= {"rank_correlation_with_ablation": 0.5, "sign_changed_by_reselection": 0.02}
    moved |= {"mismatches": 0, "checked": 10}
    push = {"role": "harming", "name": "48659", "kind": "latent", "c": 0.5, "beyond_random": True}
    push |= {"reward": -0.1, "reward_low": -0.2, "reward_high": 0.0, "z": 0.5, "refused": 0.01}
    push |= {"over_refused": None, "n_tokens": -1.5}
    here = {"before": -0.1, "after": -0.2, "delta": -0.1, "n": 113}
    step = {"reward": -0.1, "penalty": 0.1, "loss": 0.03}
    latent = {"latent": 48659, "seed_role": "harming", "seed_rank": 1, "list": "harming", "rank": 2}
    latent |= {"role": "harming", "effect": 0.25, "confirmed": True, "overall": 1234}
    row = {"what": "accuracy", "published": 0.75, "found": 0.745, "tolerance": 0.02, "off": False}
    suggested = {"latent": 48659, "quantile": 0.9, "tau": 3.0}
    return found | {
        "features": found["features"]
        | {
            "validity": validity,
            "conjunction": ["RB2", "RMB"],
            "rankings": [ranking],
            "directions": [moved],
            "tau_suggestions": [suggested | {"rate_rejected": 0.1, "rate_chosen": 0.05}],
        },
        "steered": {"rows": [push], "source_layer": 16, "n_prompts": 40},
        "seed": {
            "problem": None,
            "source": "An earlier report",
            "latents": [latent, latent | {"list": None, "effect": None, "overall": None}],
            "penalised": {"seed": [48659], "run": [48659]},
            "progression": [{"step": 10, "seed": step, "run": step}],
            "steering": [
                {"dataset": "RB2 Chosen", "seed": here, "run": here},
                {"dataset": "RB2 Rejected", "seed": here, "run": None},
            ],
        },
        "check_sarm": {
            "verdict": "as published",
            "source": "its card: so",
            "rows": [row | {"prompts": 450}],
            "causes": [],
            "missing": [],
        },
    }


def test_every_figure_of_every_table_says_its_file_and_column_and_of_how_many(tmp_path):
    _, found, read = page_of(run_kept_at_distances(tmp_path / "run", seeds=(0, 1, 2)))
    found["sweep"] = sweep_figures(RunDir.open(tmp_path / "run"), read)
    text = page(with_every_table(found), read)
    told = {cell[0] for cell in Cells(text).found if cell[3]}
    without = {"failures", "cards"}  # no table
    assert told == {section.id for section in SECTIONS} - without
    assert unexplained(text) == []
    assert unexplained(text.replace("; 225 discovery and 112 validation prompts", "")), (
        "a figure without its N is seen"
    )


def test_every_section_has_a_finding_and_stands_folded_but_one(finished):
    text, found, _ = finished
    assert set(FINDINGS) == {section.id for section in SECTIONS}
    assert text.count('<details class="part" open>') == 1
    words = visible(text)
    for section in SECTIONS:
        assert (finding(section.id, found) or NOT_RUN) in words, section.id
    kl = [row["kl"] for row in found["training"] if row["arm"] == "penalty"]
    assert f"penalty {sum(kl) / 2:.3f} (2 seeds)" in finding("training", found)


def test_each_plot_has_its_data_and_a_sentence(finished):
    text, found, read = finished
    drawn = [plot for make in plots.PLOTS.values() for plot in make(found, read)]
    assert {plot.id for plot in drawn} >= {
        "changes",
        "effects",
        "steering",
        "run-graph",
        *(f"latent-{i}" for i in HARMING[:3]),
    }
    for plot in drawn:
        data = re.search(
            rf'<script type="application/json" id="plot-{plot.id}">(.*?)</script>', text, re.DOTALL
        )
        assert data and json.loads(data.group(1))["data"] and plot.told


def checked(plot: Plot) -> go.Figure:
    """By Plotly's own classes, which raise ValueError on what its script does not know."""
    return go.Figure({"data": plot.figure.data, "layout": plot.figure.layout})


def test_plotly_knows_all_that_plots_say(finished, tmp_path):
    _, found, read = finished
    sweep = {"tau": [1.0], "alpha": [0.5, 2.0], "seeds": [0, 1]}
    run = run_kept_at_distances(tmp_path / "run", seeds=(0, 1), sections={"sweep": sweep})
    (run.folder("evaluate", "random-seed0") / "manifest.json").unlink()
    _, more, kept = page_of(run)
    more["sweep"] = sweep_figures(run, kept)
    seen = set()
    for known, frames in ((found, read), (more, kept)):
        for section, make in plots.PLOTS.items():
            for plot in make(known, frames):
                figure = checked(plot)
                seen.add(section)
                # numbers, as bytes in the page, are those that Plotly would have written itself
                assert (
                    json.loads(plot.figure.json())["data"] == json.loads(figure.to_json())["data"]
                )
    assert seen == set(plots.PLOTS)


def test_bands_span_the_seeds_and_lines_are_their_mean(finished):
    _, found, read = finished
    curve = next(
        plot for plot in plots.training(found, read) if plot.title == "Reward, without penalty"
    )
    penalty = [trace for trace in checked(curve).data if trace.legendgroup == "penalty"]
    mine = read.training[read.training["arm"] == "penalty"].pivot(
        index="step", columns="seed", values="objective/scores"
    )
    expected_lines = (mine.max(axis=1), mine.min(axis=1), mine.mean(axis=1), mine[0], mine[1])
    for trace, expected in zip(penalty, expected_lines, strict=True):
        assert np.asarray(trace.y) == pytest.approx(expected.to_numpy(), rel=1e-6)


def test_every_latent_is_drawn_as_a_point_or_counted(finished):
    _, found, read = finished
    (effects,) = map(checked, plots.effects(found, read))
    counted = next(trace for trace in effects.data if trace.type == "heatmap")
    points = next(trace for trace in effects.data if trace.name == "tested")
    assert (
        len(points.x) == plots.MAX_POINTS
        and np.asarray(counted.customdata).sum() == 70_000 - plots.MAX_POINTS
    )
    drawn = {row[0] for row in points.customdata}
    assert set(HARMING) <= drawn  # the least q
    smallest = read.probe.nsmallest(plots.MAX_POINTS, "q")["latent"]
    assert drawn == set(smallest)


def test_roles_can_be_seen_and_labels_do_not_overlap(finished):
    _, found, read = finished
    (effects,) = map(checked, plots.effects(found, read))
    listed = [t for t in effects.data if t.name.startswith("listed as")]
    assert {t.name: t.marker.color for t in listed} == {
        "listed as promoting": plots.ROLES["promoting"][0],
        "listed as harming": plots.ROLES["harming"][0],
        "listed as misleading": plots.ROLES["misleading"][0],
    }
    assert len({t.marker.symbol for t in listed}) == 3
    assert all(t.marker.symbol.endswith("-open") for t in listed)
    assert effects.layout.xaxis.ticktext[1] == "0.01%"
    assert effects.layout.yaxis.exponentformat == "power"


def test_a_label_stands_where_it_overlaps_no_larger_ones():
    drawn = pd.DataFrame({"activity": [0.001, 1.0], "effect": [0.0, 1.0]})  # 3 decades, 0 to 1
    listed = pd.DataFrame(
        {"activity": [0.1, 0.11, 0.1, 0.5], "effect": [0.9, 0.89, 0.5, -0.88]}, index=[4, 5, 6, 7]
    )
    assert plots.labelled(listed, drawn) == {4, 6, 7}
    assert plots.labelled(listed.iloc[:0], drawn) == set()


def test_a_histograms_shares_add_up_to_one(finished):
    _, found, read = finished
    histogram = next(
        plot for plot in plots.histograms(found, read) if plot.id == f"latent-{HARMING[0]}"
    )
    histogram = checked(histogram)
    base = next(trace for trace in histogram.data if trace.name == "base")
    assert float(sum(base.y)) == pytest.approx(1) and float(base.y[0]) == pytest.approx(0.1)
    assert any(shape.x0 == 3.0 for shape in histogram.layout.shapes)


def test_every_source_is_named_with_manifest_commit_and_image(finished):
    text, found, read = finished
    words = visible(text)
    source = found["sources"]["features"][0]
    assert source["file"] in words and source["manifest_sha256"][:8] in words
    outputs = read.manifests["select", "all"].outputs
    assert {s["sha256"] for s in found["sources"]["features"]} == {
        outputs[n].sha256 for n in ("features.json", "table.parquet")
    }


@pytest.mark.parametrize("label", ["<!-- demo", "</script>", "<!--<script>", "a\\u003cb\u2028"])
def test_a_label_cannot_break_out_of_a_plots_json(label):
    figure = Chart()
    figure.add("scatter", x=[1], y=[1], name=label)
    text = environment().filters["plot_json"](Plot("x", "t", "t", figure))
    assert "<" not in text and json.loads(text)["data"][0]["name"] == label


def test_every_arm_has_looks_of_its_own():
    looks = [style(arm) for arm in ARMS]
    assert set(STYLES) == set(ARMS)
    assert len({(s.colour, s.dash, s.symbol) for s in (*looks, *OTHER)}) == len(looks) + len(OTHER)


HOSTILE = '"></details><img src=x onerror="document.title=1"><script>alert(1)</script>{{ 7*7 }}`'
FREE = (
    "run",
    "policy",
    "reward_model",
    "hardware",
    "cause",
    "log",
    "device",
    "host",
    "judge",
    "source",
    "dataset",
    "path",
    "what",
    "file",
    "folder",
    "job_id",
    "warnings",
    "sentences",
    "said",
    "reason",
    "label",
    "shown",
    "ended_early",
)
"""Keys of figures whose words come from configs, data, logs and machines."""


def hostile(value, free=False):
    """Figures with a hostile string in every field of free words."""
    if isinstance(value, dict):
        return {key: hostile(of, free or key in FREE) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [hostile(of, free) for of in value]
    return f"{value}{HOSTILE}" if free and isinstance(value, str) else value


def hostile_page(folder) -> str:
    _, found, read = page_of(run_kept_at_distances(folder / "run", seeds=(0, 1)))
    found["failures"] = [
        {"phase": "steer", "unit": "all", "status": "failed", "cause": "x", "log": "y"}
    ]
    # an arm of the figures is looked up by its name, and its policy's is made of that
    words = {name: rows for name, rows in found.items() if name not in ("training", "policies")}
    return page(found | hostile(words), read)


def test_hostile_words_in_any_field_stay_words(tmp_path):
    text = hostile_page(tmp_path)
    markup = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    assert "<img" not in markup and "<script" not in markup and Outline(text).open == []
    assert text.count("onerror=") > 50 and "{{ 7*7 }}" in text
    for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL):
        assert "<" not in data


@pytest.mark.parametrize("missing", ["select", "steer", "ppo", "evaluate"])
def test_a_missing_phase_leaves_a_page_that_says_so(tmp_path, missing):
    run = evaluated_run(tmp_path / "run")
    for unit in run.config.units(missing):
        (run.folder(missing, unit) / "manifest.json").unlink()
    text, found, _ = page_of(run)
    assert Outline(text).open == []
    assert f"{len(found['failures'])} part" in visible(text) and "Incomplete." in visible(text)


def test_an_empty_run_and_odd_numbers_have_a_page(tmp_path):
    assert "No verdict" in visible(
        page_of(RunDir.create(tmp_path / "empty", reference_config()))[0]
    )
    cells = STEERING | {
        ("RB2 Safety", "chosen"): (1e12, math.nan),
        ("RB2 Safety", "rejected"): (-1e-9, -math.inf),
    }
    rows = {1: (-0.0, 0.0, math.nan), 2: (1e30, math.nan, -1e-9), 3: (math.inf, 0.5, 1e9)}
    none = features(promoting=[], harming=[], penalised=[], monitors=[])
    text, _, _ = page_of(
        reference_run(tmp_path / "odd", steering=cells, progression=rows, features=none)
    )
    assert not re.search(r"-0\.0+\b", visible(text))
    for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL):
        json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
