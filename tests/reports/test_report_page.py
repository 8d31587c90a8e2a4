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
from reports.figures import figures
from reports.findings import FINDINGS, NOT_RUN, finding
from reports.frames import Frames, read_run
from reports.page import environment, page
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


def test_bands_span_the_seeds_and_lines_are_their_mean(finished):
    _, found, read = finished
    curve = next(
        plot for plot in plots.training(found, read) if plot.title == "Reward, without penalty"
    ).figure
    penalty = [trace for trace in curve.data if trace.legendgroup == "penalty"]
    mine = read.training[read.training["arm"] == "penalty"].pivot(
        index="step", columns="seed", values="objective/scores"
    )
    expected_lines = (mine.max(axis=1), mine.min(axis=1), mine.mean(axis=1), mine[0], mine[1])
    for trace, expected in zip(penalty, expected_lines, strict=True):
        assert np.asarray(trace.y) == pytest.approx(expected.to_numpy(), rel=1e-6)


def test_every_latent_is_drawn_as_a_point_or_counted(finished):
    _, found, read = finished
    (effects,) = plots.effects(found, read)
    counted = next(trace for trace in effects.figure.data if trace.type == "heatmap")
    points = next(trace for trace in effects.figure.data if trace.name == "tested")
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
    (effects,) = plots.effects(found, read)
    listed = [t for t in effects.figure.data if t.name.startswith("listed as")]
    assert {t.name: t.marker.color for t in listed} == {
        "listed as promoting": plots.ROLES["promoting"][0],
        "listed as harming": plots.ROLES["harming"][0],
        "listed as misleading": plots.ROLES["misleading"][0],
    }
    assert len({t.marker.symbol for t in listed}) == 3
    assert all(t.marker.symbol.endswith("-open") for t in listed)
    assert effects.figure.layout.xaxis.ticktext[1] == "0.01%"
    assert effects.figure.layout.yaxis.exponentformat == "power"


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
    ).figure
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
    figure = go.Figure(go.Scatter(x=[1], y=[1], name=label))
    text = environment().filters["plot_json"](Plot("x", "t", "t", figure))
    assert "<" not in text and json.loads(text)["data"][0]["name"] == label


def test_every_arm_has_looks_of_its_own():
    looks = [style(arm) for arm in ARMS]
    assert set(STYLES) == set(ARMS)
    assert len({(s.colour, s.dash, s.symbol) for s in (*looks, *OTHER)}) == len(looks) + len(OTHER)


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
