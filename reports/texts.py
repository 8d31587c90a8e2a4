"""Whose texts a report, its page and its cards may hold (`report.texts`): others' are taken out of
what they are made of, so that none can slip into what is written.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pandas as pd

from reports.frames import Frames
from sarm.config import LEFT_OUT, Config, ReportConfig

_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")


def texts_figures(config: Config) -> dict[str, Any]:
    """Whose texts are shown, and whose are not, by the names that reports give the sources."""
    shown = {name: config.report.shows(name) for name in config.data.sources}
    return {
        "whose": config.report.texts,
        "shown": [config.data.sources[name].label for name, yes in shown.items() if yes],
        "left_out": [config.data.sources[name].label for name, yes in shown.items() if not yes],
    }


def texts_words(texts: dict[str, Any]) -> str:
    """A sentence on it."""
    whose, shown, left_out = (texts[key] for key in ("whose", "shown", "left_out"))
    if whose == "all":
        return (
            f"Texts of {', '.join(shown) or 'no source'} are shown. Before you pass this on, set"
            " report.texts to own or none where they are not yours."
        )
    if whose == "none":
        return "No text of a prompt, an answer or a policy is shown, ids and numbers alone."
    return (
        f"Texts of {', '.join(shown)} are shown; of {', '.join(left_out) or 'no other source'} ids"
        " and numbers alone."
    )


def shown_frames(frames: Frames, report: ReportConfig) -> Frames:
    """What page and cards are made of. Figures are numbers of all texts, and are made before."""
    return frames._replace(
        generations=shown_generations(frames.generations, report),
        sweep=shown_generations(frames.sweep, report),
        every=shown_generations(frames.every, report),
        cards=frames.cards and shown_cards(frames.cards, report),
        examples={
            policy: shown_examples(found, report) for policy, found in frames.examples.items()
        },
    )


def shown_examples(examples: dict[str, Any], report: ReportConfig) -> dict[str, Any]:
    """Examples of a policy's responses without the tokens of those to prompts of a source that is
    not shown.
    """
    texts = [
        text if report.shows(text["source"]) else text | {"tokens": []}
        for text in examples["texts"]
    ]
    return examples | {"texts": texts}


def shown_generations(generations: pd.DataFrame, report: ReportConfig) -> pd.DataFrame:
    """Generations with no prompt, response or category of a source that is not shown. Rows that
    name no source are nobody's.
    """
    if report.texts == "all" or generations.empty:
        return generations
    named = generations["source"] if "source" in generations else pd.Series("", generations.index)
    others = ~named.map(report.shows).to_numpy(bool)
    instead = {"prompt": LEFT_OUT, "response": LEFT_OUT, "category": ""}
    return generations.assign(
        **{
            name: generations[name].astype(object).mask(others, left)
            for name, left in instead.items()
            if name in generations
        }
    )


def shown_cards(cards: dict[str, Any], report: ReportConfig) -> dict[str, Any]:
    """Cards with no text of a source that is not shown, and then with no label either, which an
    endpoint made of texts of any.
    """
    if report.texts == "all":
        return cards
    cards = copy.deepcopy(cards)
    for text in cards["texts"].values():
        if not report.shows(text["source"]):
            text |= {"prompt": LEFT_OUT, "response": LEFT_OUT, "tokens": []}
    for card in cards["cards"]:
        for edit in card["edits"].get("largest", ()):
            sides = (cards["texts"][str(edit[side])]["source"] for side in ("before", "after"))
            if not all(map(report.shows, sides)):
                edit |= {"removed": LEFT_OUT, "added": LEFT_OUT}
        if card["label"]:
            card["label"]["text"] = LEFT_OUT
    return cards


def shown_cause(cause: str, report: ReportConfig) -> str:
    """Why a unit failed, as its log says it, without the passages that it quotes: they may be of
    any source.
    """
    if report.texts == "all":
        return cause
    return _QUOTED.sub(lambda quoted: LEFT_OUT if " " in quoted.group() else quoted.group(), cause)
