"""report.html in headless Chromium, as Debian packages it: `apt-get install chromium
chromium-driver`, `make test-browser`.

A page is opened from a file, as people do who were sent one.
"""

from __future__ import annotations

import base64
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.reports.conftest import contrast, resize
from tests.reports.test_report_page import hostile_page, page_of
from tests.runs import large_run

pytestmark = pytest.mark.browser
WIDTHS = (390, 900, 1400)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    file = folder / "report.html"
    file.write_text(
        page_of(large_run(folder / "run", d_sae=8192, seeds=(0, 1, 2), steps=40, prompts=60))[0],
        encoding="utf-8",
    )
    return file


UNFOLD = "for (const part of document.querySelectorAll('details.part')) part.open = true"
DRAWN = """
    const seen = (c) => !c.closest('details:not([open])');
    return [...document.querySelectorAll('.canvas')].filter(seen)
      .every((c) => c.querySelector('.main-svg'))"""


def opened(browser: Any, file: Path, width: int = 1400, *, unfold: bool = True) -> None:
    """Open, with every section or as it is, and wait until the plots that can be seen are drawn."""
    resize(browser, width)
    browser.get(file.as_uri())
    if unfold:
        browser.execute_script(UNFOLD)
    deadline = time.monotonic() + 60
    while not browser.execute_script(DRAWN):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.05)


def test_it_answers_on_its_first_screen_and_folds_the_rest(browser, report):
    opened(browser, report, unfold=False)
    assert browser.execute_script("return document.documentElement.scrollHeight") <= 6000
    bottom = browser.execute_script(
        "return document.querySelector('.abstract').getBoundingClientRect().bottom"
    )
    assert bottom <= 1000  # the window's height
    silent = browser.execute_script(
        "return [...document.querySelectorAll('section.silent details.part')].map((d) => d.open)"
    )
    assert silent and not any(silent)
    findings = browser.execute_script(
        "return [...document.querySelectorAll('section > .part .finding')].map((f) =>"
        " f.checkVisibility() && f.textContent.trim().length)"
    )
    assert len(findings) > 10 and all(findings)


def test_a_link_to_a_folded_section_opens_it(browser, report):
    opened(browser, report, unfold=False)
    part = "return document.querySelector('#training > details').open"
    assert not browser.execute_script(part)
    browser.find_element("css selector", 'nav a[href="#training"]').click()
    deadline = time.monotonic() + 20
    while not browser.execute_script(f"{DRAWN} && document.querySelector('#training .main-svg')"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert browser.execute_script(part)
    browser.get("about:blank")
    browser.get(report.as_uri() + "#provenance")
    assert browser.execute_script("return document.querySelector('#provenance > details').open")


def test_a_rungs_interval_is_drawn_within_its_scale(browser, report):
    opened(browser, report, 390, unfold=False)
    outside = browser.execute_script("""
        return [...document.querySelectorAll('.ladder .scale')].filter((scale) => {
          const box = scale.getBoundingClientRect();
          const range = scale.querySelector('.range').getBoundingClientRect();
          return range.width <= 0 || range.left < box.left || range.right > box.right;
        }).length""")
    scales = browser.execute_script("return document.querySelectorAll('.ladder .scale').length")
    assert scales >= 1 and outside == 0


def test_every_plot_is_drawn_without_a_word_on_the_console_or_the_network(browser, report):
    opened(browser, report)
    assert [
        entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ] == []
    canvases, drawn = browser.execute_script(
        "const all = [...document.querySelectorAll('.canvas')];return [all.length, all.filter((c)"
        " => c.querySelector('.main-svg') && c.querySelector('.trace, .hm image,"
        " .barlayer')).length]"
    )
    assert canvases == drawn > 15
    assert (
        browser.execute_script(
            "return performance.getEntriesByType('resource').filter((e) =>"
            " !e.name.startsWith('data:')).length"
        )
        == 0
    )


def test_hostile_words_in_any_field_run_nothing(browser, tmp_path):
    file = tmp_path / "hostile.html"
    file.write_text(hostile_page(tmp_path), encoding="utf-8")
    opened(browser, file)
    assert "onerror" in browser.title and browser.title != "1"
    severe = [one for one in browser.get_log("browser") if one["level"] in ("SEVERE", "WARNING")]
    assert severe == []
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0


def test_tables_sort_by_number_and_say_so(browser, report):
    opened(browser, report)
    column = """
        const table = document.querySelector('#evaluation table');
        const cells = [...table.tHead.rows[0].cells];
        const head = cells.findIndex((cell) => cell.textContent.trim() === 'penalised');
        if (arguments[0]) cells[head].querySelector('button').click();
        const rows = [...table.tBodies[0].rows];
        return [rows.map((row) => parseFloat(row.cells[head].textContent)),
                cells[head].getAttribute('aria-sort')]"""
    before, _ = browser.execute_script(column, False)
    up, said_up = browser.execute_script(column, True)
    down, said_down = browser.execute_script(column, True)
    assert (up == sorted(before) and down == sorted(before, reverse=True) and before != up) or len(
        set(before)
    ) == 1
    assert (said_up, said_down) == ("ascending", "descending")


def test_an_interval_sorts_by_its_lower_end_and_unknown_comes_last(browser, report):
    opened(browser, report)
    order = browser.execute_script("""
        const table = document.querySelector('#changes table');
        const cells = [...table.tHead.rows[0].cells];
        const head = cells.findIndex((cell) => cell.textContent.startsWith('95 %'));
        table.tBodies[0].rows[0].cells[head].textContent = 'n/a';
        cells[head].querySelector('button').click();
        return [...table.tBodies[0].rows].map((row) => row.cells[head].textContent)""")
    assert order[-1] == "n/a"
    lower = [float(text[1:].split(",")[0]) for text in order[:-1]]
    assert lower == sorted(lower)


def test_links_lead_somewhere(browser, report):
    opened(browser, report)
    assert (
        browser.execute_script(
            "return [...document.querySelectorAll('a')].filter((a) => a.hash &&"
            " !document.getElementById(a.hash.slice(1))).map((a) => a.href)"
        )
        == []
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window_and_plots_keep_their_place(
    browser, report, width, tmp_path
):
    """The layout as a screenshot would be compared, but by the boxes: fonts differ between
    machines.
    """
    opened(browser, report, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    beside = browser.execute_script(
        "return document.querySelector('nav').getBoundingClientRect().right <="
        " document.querySelector('main').getBoundingClientRect().left"
    )
    assert beside == (width >= 1100)
    spilt = browser.execute_script("""
        return [...document.querySelectorAll('.canvas')].filter((c) => {
          const box = c.getBoundingClientRect(), frame = c.closest('.plot').getBoundingClientRect();
          const drawn = c.querySelector('.main-svg').getBoundingClientRect();
          return box.left < frame.left - 1 || box.right > frame.right + 1
            || drawn.width > box.width + 1;
        }).map((c) => c.dataset.plot)""")
    assert spilt == []
    columns = browser.execute_script(
        "return new Set([...document.querySelectorAll('#training .plot')].map((p) =>"
        " Math.round(p.getBoundingClientRect().left))).size"
    )
    assert columns == {390: 1, 900: 2, 1400: 3}[width]
    shot = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {})["data"])
    (tmp_path / f"{width}.png").write_bytes(shot)
    assert len(shot) > 10_000


CROWDED = """
    const apart = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1
      || a.bottom <= b.top + 2 || b.bottom <= a.top + 2;
    const boxes = (c, names) => [...c.querySelectorAll(names)]
      .filter((e) => e.textContent.trim() && getComputedStyle(e).visibility !== 'hidden')
      .map((e) => e.getBoundingClientRect());
    const found = [];
    for (const c of document.querySelectorAll('.canvas')) {
      const frame = c.getBoundingClientRect();
      const titles = '.xtitle, .ytitle, .cbtitle text, .legendtext, .annotation-text-g text';
      for (const b of boxes(c, titles))
        if (b.left < frame.left - 1 || b.right > frame.right + 1
            || b.top < frame.top - 1 || b.bottom > frame.bottom + 1)
          found.push(c.dataset.plot + ': a title is cut off');
      const groups = {ticks: '.xtick text', rows: '.ytick text', labels: '.textpoint text',
        words: '.xtitle, .ytitle, .legendtext, .annotation-text-g text, .gtitle'};
      for (const [name, those] of Object.entries(groups)) {
        const all = boxes(c, those);
        for (let i = 0; i < all.length; i++)
          for (let j = 0; j < i; j++)
            if (!apart(all[i], all[j])) found.push(c.dataset.plot + ': ' + name + ' overlap');
      }
    }
    return [...new Set(found)]"""


@pytest.mark.parametrize("width", WIDTHS)
def test_no_words_of_a_plot_overlap_or_are_cut_off_and_no_tick_is_in_nanos(browser, report, width):
    opened(browser, report, width)
    assert browser.execute_script(CROWDED) == []
    assert browser.execute_script(
        "return [...document.querySelectorAll('.textpoint text')].some((e) => e.textContent"
        " && e.style.visibility === 'visible')"
    )
    ticks = browser.execute_script(
        "return [...document.querySelectorAll('.xtick text, .ytick text')].map((t) =>"
        " t.textContent)"
    )
    assert len(ticks) > 100
    assert not [tick for tick in ticks if re.fullmatch(r"[−-]?[\d.]+[a-zA-Zµ]", tick)]


def test_dark_and_light_can_be_read_and_plots_follow(browser, report):
    opened(browser, report)
    grounds = []
    for _ in range(2):
        grounds.append(
            browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        )
        for selector in (
            "main p",
            ".told",
            "nav a",
            "small",
            "caption",
            ".finding",
            ".ladder .said",
        ):
            assert contrast(browser, selector) >= 4.5, selector
        text = browser.execute_script(
            "return [document.querySelector('.canvas').layout.font.color,"
            " getComputedStyle(document.documentElement).getPropertyValue('--text').trim()]"
        )
        assert text[0] == text[1]
        browser.execute_script("document.getElementById('theme').click()")
        time.sleep(0.5)
    assert grounds[0] != grounds[1]


def test_a_keyboard_reaches_the_controls_and_a_screen_reader_is_told_of_the_plots(browser, report):
    opened(browser, report)
    unnamed = browser.execute_script(
        """
        const named = 'button, input, select, .canvas, [role=region], section';
        return [...document.querySelectorAll(named)].filter((e) =>
          !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')
            || e.closest('label') || e.textContent.trim())).length"""
    )
    assert unnamed == 0
    assert browser.execute_script(
        "return [...document.querySelectorAll('.canvas')].every((e) => e.getAttribute('role') ==="
        " 'img' && e.getAttribute('aria-label').length > 20)"
    )
    from selenium.webdriver.common.keys import Keys

    body = browser.find_element("css selector", "body")
    body.send_keys(Keys.TAB)
    assert browser.execute_script("return document.activeElement.className") == "skip"
    button = browser.find_element("css selector", "#evaluation thead button")
    button.send_keys(Keys.ENTER)
    assert (
        browser.execute_script(
            "return document.querySelector('#evaluation thead th').getAttribute('aria-sort')"
        )
        == "ascending"
    )


def test_it_prints_its_plots_in_black_on_white_within_the_paper(browser, report, tmp_path):
    opened(browser, report)
    browser.execute_script("document.getElementById('theme').click()")
    browser.execute_script("document.querySelector('#training > details').open = false")
    made = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})[
        "data"
    ]
    (tmp_path / "report.pdf").write_bytes(base64.b64decode(made))
    assert base64.b64decode(made).startswith(b"%PDF") and len(made) > 100_000
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(
        "return [...document.querySelectorAll('.canvas')].every((c) => c.layout.width <= 680 &&"
        " c.layout.font.color === '#000')"
    )
    assert browser.execute_script("return document.querySelector('#training > details').open")
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert not browser.execute_script("return document.querySelector('#training > details').open")
