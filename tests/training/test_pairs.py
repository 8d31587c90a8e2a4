"""The pairs that are learned from: cut ones, refusals on both sides, weights, folds."""

from collections import Counter

import pytest

from sarm.config import UserError
from sarm.data.datasets import Pair, Prompt, load_data
from sarm.training.pairs import (
    ANSWERED,
    REFUSED,
    cut,
    cut_pairs,
    distinct_texts,
    pair_weights,
    prompt_folds,
    read_refusals,
    refusal_pairs,
)
from tests.tiny import tiny_config


def pair(
    prompt: str, source: str = "a", chosen: str = "no", rejected: str = "yes", kind: str = "unsafe"
) -> Pair:
    return Pair(
        f"{source}-{prompt}",
        Prompt(prompt, ({"role": "user", "content": prompt},), source, kind, "", "sarm_train"),
        source,
        chosen,
        rejected,
    )


def test_a_cut_text_ends_at_its_last_sentence_within_the_tokens(tiny_tokenizer):
    text = "Take it. Make it work? Then do it again"
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert cut(tiny_tokenizer, text, len(ids)) == text
    assert cut(tiny_tokenizer, text, len(ids) - 1) == "Take it. Make it work?"
    assert text.startswith(cut(tiny_tokenizer, text, 2)) and len(cut(tiny_tokenizer, text, 2)) > 0


def test_both_responses_are_cut_alike_and_pairs_left_alike_are_not_made(tiny_tokenizer):
    long = pair("p", chosen="One. " * 60, rejected="Two, three. " * 60)
    (made,) = cut_pairs([long, pair("q")], tiny_tokenizer, (10, 20))
    assert (made.source, made.id, made.prompt) == ("a cut", "a-p-cut", long.prompt)
    tokens = [
        len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (made.chosen, made.rejected)
    ]
    assert max(tokens) <= 20 and min(tokens) >= 3 and abs(tokens[0] - tokens[1]) < 8
    assert made.chosen.endswith("One.") and made.rejected.endswith("three.")
    # The same beginning: nothing is left to compare.
    same = pair("r", chosen="One. " * 60 + "Two.", rejected="One. " * 60 + "Three.")
    assert cut_pairs([same], tiny_tokenizer, (10, 20)) == []
    many = [long._replace(id=f"{i}") for i in range(40)]
    lengths = {len(made.chosen) for made in cut_pairs(many, tiny_tokenizer, (10, 20))}
    assert len(lengths) > 1


def test_the_same_refusals_lose_to_answers_and_win_over_compliance():
    def refuses(texts: list[str]) -> list[bool]:
        return [text.startswith("no") for text in texts]

    pairs = [
        pair("safe", chosen="yes", rejected="no", kind="safe"),
        pair("refused on both sides", chosen="no", rejected="no, never"),
        pair("unsafe", chosen="no", rejected="yes"),
        pair("unsafe, answered", chosen="yes, but", rejected="yes"),
        pair("safe, refused", chosen="no", rejected="yes", kind="safe"),
    ]
    made = refusal_pairs(pairs, ["never"], refuses)
    assert [(p.prompt.id, p.source, p.chosen, p.rejected) for p in made] == [
        ("safe", ANSWERED, "yes", "never"),
        ("unsafe", REFUSED, "never", "yes"),
    ]
    drawn = refusal_pairs(
        [pair(str(i), kind="safe", chosen="yes") for i in range(200)], list("abcd"), refuses
    )
    counts = Counter(p.rejected for p in drawn)
    assert set(counts) == set("abcd") and min(counts.values()) > 25


def test_refusals_are_those_for_any_prompt(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text('{"text": "a", "any_prompt": true}\n{"text": "b", "any_prompt": false}\n')
    assert read_refusals(file) == ["a"]
    file.write_text('{"text": "b", "any_prompt": false}\n')
    for path, message in ((file, "no row with any_prompt"), (tmp_path / "no", "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_refusals(path)


def test_pairs_count_by_prompt_and_source():
    pairs = [pair("p"), pair("p", chosen="never"), pair("q"), pair("r", source="b")]
    assert pair_weights(pairs) == pytest.approx([1 / 8, 1 / 8, 1 / 4, 1 / 2])


def test_texts_are_listed_once():
    texts = distinct_texts([pair("p"), pair("p", chosen="never"), pair("q")])
    assert [m[-1]["content"] for m in texts.messages] == ["no", "yes", "never", "no", "yes"]
    assert texts.chosen.tolist() == [0, 2, 3] and texts.rejected.tolist() == [1, 1, 4]


def test_folds_are_even_within_sources_and_keep_a_prompt_together(tmp_path):
    data = load_data(tiny_config(tmp_path).data)
    pairs = [*data.pairs, *(p._replace(source="made") for p in data.pairs)]
    folds = prompt_folds(data, pairs, 5)
    of_prompt: dict[str, set[int]] = {}
    for p, fold in zip(pairs, folds.outer.tolist(), strict=True):
        of_prompt.setdefault(p.prompt.id, set()).add(fold)
    assert all(len(found) == 1 for found in of_prompt.values())
    sizes = Counter(next(iter(found)) for found in of_prompt.values())
    assert len(sizes) == 5 and max(sizes.values()) - min(sizes.values()) <= 1
    # The inner folds are another dealing, so that no outer fold is one of them.
    assert 0.05 < (folds.outer == folds.inner).mean() < 0.4
