"""The pairs of data/train are as their page says, and copy no evaluation prompt."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from sarm.config import ROOT

TRAIN = ROOT / "data" / "train"


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def shared(texts: dict[str, str]) -> list[tuple[str, str]]:
    """The names of two texts that have half of the shorter one's trigrams in common."""
    grams = {name: trigrams(text) for name, text in texts.items()}
    holders = defaultdict(list)
    for name, mine in grams.items():
        for gram in mine:
            holders[gram].append(name)
    common = Counter(
        pair for names in holders.values() for pair in itertools.combinations(sorted(names), 2)
    )
    return [(a, b) for (a, b), n in common.items() if n >= 0.5 * min(len(grams[a]), len(grams[b]))]


def test_trigrams_are_shared_where_two_texts_say_nearly_the_same() -> None:
    texts = {"a": "how do I beat eggs by hand", "b": "how do I beat eggs quickly", "c": "eggs"}
    assert shared(texts) == [("a", "b")]
    assert shared(texts | {"a": "how do you beat eggs"}) == []


def test_as_many_pairs_and_kinds_as_the_page_says() -> None:
    pairs = rows(TRAIN / "pairs.jsonl")
    kinds = Counter((pair["kind"], pair["category"]) for pair in pairs)
    assert set(kinds.values()) == {8}
    assert Counter(kind for kind, _ in kinds) == {"safe": 21, "unsafe": 12}
    assert len({pair["id"] for pair in pairs}) == len(pairs) == 264
    labels = Counter(row["label"] for row in rows(TRAIN / "refusals.jsonl"))
    assert labels == {"refuses": 92, "complies": 40}


def test_no_two_texts_share_half_their_trigrams() -> None:
    pairs = rows(TRAIN / "pairs.jsonl")
    texts = {
        f"{pair['id']}/{part}": pair[part]
        for pair in pairs
        for part in ("prompt", "chosen", "rejected")
    }
    assert shared(texts) == []


def copies(prompts: list[str]) -> list[str]:
    """Our prompts that have half of their own trigrams in one of these."""
    others = [trigrams(prompt) for prompt in prompts]
    ours = [pair["prompt"] for pair in rows(TRAIN / "pairs.jsonl")]
    return [
        prompt
        for prompt in ours
        if any(len(trigrams(prompt) & other) >= 0.5 * len(trigrams(prompt)) for other in others)
    ]


def test_no_prompt_is_one_of_the_demo() -> None:
    demo = [row for file in (ROOT / "data/demo").glob("*.jsonl") for row in rows(file)]
    assert len(demo) > 600 and copies([row["prompt"] for row in demo]) == []


def test_no_prompt_is_one_that_evaluates(real_data: Path) -> None:
    with open(real_data / "xstest" / "xstest_prompts.csv", encoding="utf-8") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file)]
    for name in ("coconot_eval", "coconot_contrast_eval"):
        prompts += [row["prompt"] for row in rows(real_data / "coconot" / f"{name}.jsonl")]
    assert len(prompts) == 450 + 1001 + 379
    assert copies(prompts) == []
