"""cards.html in headless Chromium: `make test-browser`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from reports.cards import cards_page
from tests.reports.conftest import contrast, resize

pytestmark = pytest.mark.browser
SCORE = {
    "score": 0.7,
    "true_positive": 0.5,
    "true_negative": 0.9,
    "n_fitting": 2,
    "n_others": 2,
    "unreadable": 0,
}
HOSTILE = "</details><img src=x onerror=\"document.title='broken in'\">"


def card(latent: int, effect: float, density: float, role: str, *lists: str) -> dict[str, Any]:
    example = {"row": 0, "a": [-1.0, 0.5, 2.0], "kept": [2]}
    return {
        "latent": latent,
        "lists": list(lists),
        "weight": -0.1 * latent,
        "role": role,
        "upstream_s": 0.5,
        "figures": {"effect": effect, "effect_low": 0.0, "effect_high": 1.0, "q": 0.01},
        "density": {"all": density, "chosen": density, "rejected": density},
        "histogram": {"edges": [0.0, 1.0, 2.0], "chosen": [3, 1], "rejected": [1, 4], "off": 9},
        "top": [example | {"z": 2.0, "reward": -0.2}],
        "near_misses": [],
        "controls": [example],
        "n_active": 1,
        "n_near_misses": 0,
        "edits": {"on_either": 0, "turned": 0, "largest": []},
        "label": {"text": f"speaks of {HOSTILE} {latent}", "detection": SCORE, "fuzzing": SCORE},
        "siblings": {"direction": [{"latent": 8, "cosine": -0.5}], "firing": []},
        "words": {"up": [{"word": f" bomb{latent}", "logit": 1.0}], "down": []},
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = {"tokens": ["a ", HOSTILE, " c"], "prompt": HOSTILE, "response": "b", "source": "s"}
    text |= {"earlier_turns": 0, "label": "chosen", "part": "test", "reward": 0.5}
    own = {"latent": 5, "what": "top", "z": 1.5, "a": [0.5, 1.0], "kept": [0], "text": 0}
    whose = {"distance": None, "prompt_id": "u1", "source": "s", "kind": "unsafe", "sample": 0}
    found = {
        "n_texts": 3,
        "n_prompts": 2,
        "minimal_edits": {"n": 0, "enough": False, "needed": 20},
        "labels": {"endpoint": "e", "model": "m"},
        "why_no_words": "",
        "texts": {"0": text},
        "cards": [
            card(5, 0.1, 0.7, "harming", "harming", "penalised"),
            card(8, 0.3, 0.2, "harming", "harming", "monitor"),
            card(12, 0.2, 0.3, "promoting", "promoting"),
        ],
    }
    examples = {"base": {"texts": [whose | {"tokens": ["x", HOSTILE]}], "examples": [own]}}
    file = tmp_path_factory.mktemp("cards") / "cards.html"
    file.write_text(cards_page(found, "run", examples=examples), encoding="utf-8")
    return file


def opened(browser: Any, file: Path, hash_: str = "", width: int = 1400) -> None:
    resize(browser, width)
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(file.as_uri() + hash_)
    assert browser.execute_script("return document.documentElement.dataset.drawn") == "3"


def put(browser: Any, **values: str) -> list[int]:
    """Set filters; the latents that are shown then, in order."""
    for name, value in values.items():
        browser.execute_script(
            "const c = document.getElementById(arguments[0]); c.value = arguments[1];"
            " c.dispatchEvent(new Event('input'))",
            name.replace("_", "-"),
            value,
        )
    return browser.execute_script(
        "return [...document.querySelectorAll('section.latent')].filter((s) =>"
        " s.checkVisibility()).map((s) => +s.dataset.latent)"
    )


def test_it_says_nothing_on_the_console_and_runs_nothing_of_a_text(browser, page):
    opened(browser, page)
    assert [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    assert browser.title == "run: latents"
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0


def test_latents_are_searched_filtered_and_sorted_with_their_index(browser, page):
    opened(browser, page)
    assert put(browser) == [5, 8, 12]
    assert put(browser, sort="effect") == [8, 12, 5]
    assert put(browser, sort="weight") == [12, 8, 5]
    assert put(browser, sort="density") == [5, 12, 8]
    index = browser.execute_script(
        "return [...document.querySelectorAll('#index tbody tr')].map((r) => +r.dataset.latent)"
    )
    assert index == [5, 12, 8]
    assert put(browser, in_list="harming") == [5, 8]
    assert put(browser, text="BOMB8") == [8]
    assert browser.execute_script("return document.getElementById('count').textContent") == (
        "1 of 3 latents"
    )
    assert put(browser, text="", in_list="monitor") == [8]


def test_a_link_shows_its_latent_even_where_it_is_filtered_away(browser, page):
    opened(browser, page, "#latent-12")
    top = "return document.getElementById(arguments[0]).getBoundingClientRect().top"
    assert abs(browser.execute_script(top, "latent-12")) < 1000
    assert put(browser, text="bomb8") == [8]
    browser.execute_script("location.hash = 'latent-5'")
    browser.execute_async_script("setTimeout(arguments[0], 100)")
    assert put(browser) == [5, 8, 12]


def test_texts_are_folded_and_their_tokens_shaded(browser, page):
    opened(browser, page)
    assert browser.execute_script(
        "return [...document.querySelectorAll('.tokens, section pre')].every((e) =>"
        " !e.checkVisibility())"
    )
    browser.execute_script("document.querySelector('#latent-5 .example summary').click()")
    spans = browser.execute_script(
        "return [...document.querySelectorAll('#latent-5 .example[open] .tokens .t')].map((t) =>"
        " [t.textContent, t.className, t.style.getPropertyValue('--v'), t.checkVisibility()])"
    )
    assert spans == [[HOSTILE, "t", "0.25", True], [" c", "t k end", "1.00", True]]
    warned = browser.execute_script(
        "return [...document.querySelectorAll('.caution')].map((c) =>"
        " c.closest('section').dataset.latent)"
    )
    assert warned == ["5"]  # 0.7 of all texts


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_window_and_it_can_be_read_in_dark(browser, page, width):
    opened(browser, page, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_script("document.querySelector('#latent-5 .example summary').click()")
    for _ in range(2):
        for selector in ("main p", ".meta", "small a"):
            assert contrast(browser, selector) >= 4.5, selector
        browser.execute_script("document.getElementById('theme').click()")


def test_a_keyboard_searches_and_opens_and_it_prints(browser, page):
    from selenium.webdriver.common.keys import Keys

    opened(browser, page)
    browser.find_element("css selector", "body").send_keys("/")
    assert browser.execute_script("return document.activeElement.id") == "text"
    browser.find_element("css selector", "#latent-8 .example summary").send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('#latent-8 .example').open")
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert base64.b64decode(pdf).startswith(b"%PDF")
