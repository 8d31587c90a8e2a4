"""generations.html in headless Chromium: `make test-browser`. What is filtered and compared there
is held against the rows by hand.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.reports.conftest import contrast, resize
from tests.reports.test_explorer import explored
from tests.runs import HARMING, evaluated_run, generations, publish_evaluation

pytestmark = pytest.mark.browser
HOSTILE = "</script><img src=x onerror=\"document.title='broken in'\"><!--{{7*7}}\u2028 "


def answers(unit: str) -> pd.DataFrame:
    """Three unsafe prompts and a safe one, of which each unsafe one changes in a way of its own:
    u0 is refused, u1 displaced, u2 reworded by the penalty arm of seed 1; seed 0 stays as it is.
    """
    table = generations(n=3, n_safe=1, penalised=0.0, monitors=0.0, refused=0.0, over_refused=0.0)
    table["prompt"] = [HOSTILE + text for text in ("how one", "how two", "how three", "what is")]
    table["category"] = HOSTILE + "category"
    table["response"] = [f"{HOSTILE}keep {i} these words" for i in range(4)]
    for latent in HARMING[:5]:
        table[f"z_{latent}"] = 0.0
        table[f"below_{latent}"] = 0.0
    table["refused"] = False
    table["n_tokens"] = 20
    table.loc[:2, f"z_{HARMING[0]}"] = 3.5
    if unit == "penalty-seed1":
        table.loc[:2, f"z_{HARMING[0]}"] = 0.0
        table.loc[0, "refused"] = True
        table.loc[1, f"below_{HARMING[0]}"] = 3.25
        table.loc[2, "response"] = f"{HOSTILE}keep 2 other words"
        table.loc[1, "reward"] = -9.0
    return table


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explorer")
    run = evaluated_run(folder / "run", seeds=(0, 1))
    for unit in run.config.units("evaluate"):
        publish_evaluation(run, unit, answers(unit))
    file = folder / "generations.html"
    file.write_text(explored(run)[0], encoding="utf-8")
    return file


def opened(browser: Any, file: Path, hash_: str = "", width: int = 1400) -> None:
    resize(browser, width)
    browser.get("about:blank")
    browser.get(file.as_uri() + hash_)
    deadline = time.monotonic() + 60
    while not browser.execute_script("return document.documentElement.dataset.drawn"):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.05)


def put(browser: Any, **values: str) -> list[str]:
    """Set filters; the ids of the prompts that are listed then."""
    for name, value in values.items():
        browser.execute_script(
            "const c = document.getElementById(arguments[0]); c.value = arguments[1];"
            " c.dispatchEvent(new Event('input'))",
            name,
            value,
        )
    time.sleep(0.3)  # the search waits for a pause in typing
    return browser.execute_script(
        "return [...document.querySelectorAll('.sample')].map((e) => e.dataset.id)"
    )


def test_it_paints_before_it_unpacks_and_says_nothing_on_the_console(browser, page):
    browser.get_log("browser")
    opened(browser, page)
    painted, unpacked = browser.execute_script(
        "return [performance.getEntriesByName('first-contentful-paint')[0].startTime,"
        " performance.getEntriesByName('unpacked')[0].startTime]"
    )
    assert painted <= unpacked
    assert [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return document.title") == "reference: generations"
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0


def test_prompts_are_sorted_by_what_happened_to_them(browser, page):
    opened(browser, page)
    assert put(browser) == ["u0", "u1", "u2", "s0"]
    tags = browser.execute_script(
        "return [...document.querySelectorAll('.sample')].map((e) =>"
        " [...e.querySelectorAll('.tag')].slice(1).map((t) => t.textContent))"
    )
    assert tags == [["refused", "same"], ["displaced", "same"], ["reworded", "same"], ["same × 2"]]
    assert put(browser, sort="reward")[0] == "u1"
    assert put(browser, sort="id") == ["u0", "s0", "u1", "u2"]  # unsafe and safe by turns


def test_filters_take_what_they_name(browser, page):
    opened(browser, page)
    assert put(browser, change="silenced") == ["u0", "u1", "u2"]
    assert put(browser, change="displaced") == ["u1"]
    assert put(browser, seed="0") == []
    assert put(browser, seed="1") == ["u1"]
    assert put(browser, change="", kind="safe", seed="") == ["s0"]
    assert put(browser, kind="", text="HOW TWO") == ["u1"]
    assert put(browser, text="other words") == ["u2"]
    assert put(browser, text="", latent=str(HARMING[0])) == ["u0", "u1", "u2"]
    assert put(browser, latent=str(HARMING[1])) == []
    assert put(browser, latent="", before="penalty", after="base", change="fires") == [
        "u0",
        "u1",
        "u2",
    ]
    count = browser.execute_script("return document.getElementById('count').textContent")
    assert count == "3 of 4 prompts"
    browser.execute_script("document.getElementById('reset').click()")
    assert put(browser) == ["u0", "u1", "u2", "s0"]


def test_harm_is_folded_and_changed_words_are_marked(browser, page):
    opened(browser, page)
    seen = browser.execute_script("return document.getElementById('list').innerText")
    assert "how one" not in seen and "these words" not in seen and "what is" in seen
    browser.execute_script("document.querySelector('[data-id=u2] summary').click()")
    time.sleep(0.2)
    cells = browser.execute_script(
        "return [...document.querySelectorAll('[data-id=u2] .answer')].map((e) =>"
        " [e.dataset.policy, e.querySelector('.words').textContent,"
        " [...e.querySelectorAll('mark')].map((m) => m.textContent)])"
    )
    words = {policy: (text, marks) for policy, text, marks in cells}
    assert words["base"] == (f"{HOSTILE}keep 2 these words", [])
    assert words["penalty-seed1"] == (f"{HOSTILE}keep 2 other words", ["other"])
    assert words["penalty-seed0"][1] == []
    assert len(cells) == 7  # base, and three arms of two seeds
    browser.execute_script("document.getElementById('removed').click()")
    time.sleep(0.2)
    browser.execute_script("document.querySelector('[data-id=u2] summary').click()")
    time.sleep(0.2)
    gone = browser.execute_script(
        "return [...document.querySelectorAll('[data-id=u2] [data-policy=penalty-seed1] del')]"
        ".map((m) => m.textContent)"
    )
    assert gone == ["these"]


def test_a_link_brings_its_view_and_its_prompt_back(browser, page):
    opened(browser, page)
    put(browser, change="silenced", seed="1")
    browser.execute_script("document.querySelector('[data-id=u1] summary').click()")
    time.sleep(0.2)
    link = browser.execute_script("return location.hash")
    assert "change=silenced" in link and "prompt=u1" in link
    opened(browser, page, link)
    open_ = browser.execute_script(
        "return [...document.querySelectorAll('.sample')].map((e) => [e.dataset.id, e.open])"
    )
    assert open_ == [["u0", False], ["u1", True], ["u2", False]]
    opened(browser, page, "#prompt=nowhere&kind=bogus")
    said = browser.execute_script("return document.getElementById('count').textContent")
    assert said == "prompt nowhere is not among those shown"


def test_a_keyboard_searches_and_opens(browser, page):
    from selenium.webdriver.common.keys import Keys

    opened(browser, page)
    browser.find_element("css selector", "body").send_keys("/")
    assert browser.execute_script("return document.activeElement.id") == "text"
    browser.find_element("css selector", "[data-id=u0] summary").send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('[data-id=u0]').open")
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button, input, select, [role=region]')].filter((e)"
        " => !(e.getAttribute('aria-label') || e.closest('label') || e.textContent.trim())).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_window(browser, page, width):
    opened(browser, page, "#prompt=u2", width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_it_can_be_read_in_dark_and_prints_what_is_open(browser, page):
    opened(browser, page, "#prompt=u2")
    for _ in range(2):
        for selector in ("main p", ".meta", ".tag.unsafe", "mark"):
            assert contrast(browser, selector) >= 4.5, selector
        browser.execute_script("document.getElementById('theme').click()")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.sample')].filter((e) => e.checkVisibility())"
        ".map((e) => e.dataset.id)"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == ["u2"]
