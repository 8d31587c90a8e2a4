"""Sentence ends in text as policies write it, and the tokens that a trimmed response keeps."""

from __future__ import annotations

import pytest

from sarm.data.endings import Ending, ending, ends, trim_to_last_sentence


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("I will not help. If you are", "I will not help."),
        ("No! Why would", "No!"),
        ('She said "stop." Then he', 'She said "stop."'),
        ("(It ends.) And", "(It ends.)"),
        ("**Be careful.** Next", "**Be careful.**"),
        ("Wait… then", "Wait…"),
        ("First.\n\nSecond point without", "First."),
        ("Ask Dr. Brown", "Ask Dr. Brown"),
        ("Stay calm. Ask Dr. Brown about", "Stay calm."),
        ("It costs 3.50 and more", "It costs 3.50 and more"),
        ("Do this:\n1. Wash. \n2. Dry it", "Do this:\n1. Wash."),
        ("Do this:\n1. Wash\n2.", "Do this:\n1. Wash\n2."),
        ("I won't.\n\n1.", "I won't."),
        ("Use e.g. soap", "Use e.g. soap"),
        ("Dr. Brown is", "Dr. Brown is"),
        ('Stay calm. "Ask Dr." about', "Stay calm."),
        ("Stay calm. (e.g.*) about", "Stay calm."),
        ("See example.com for", "See example.com for"),
        ("不可以。我", "不可以。"),
        ("", ""),
        ("no end at all", "no end at all"),
    ],
)
def test_a_text_is_trimmed_to_its_last_sentence_end(text: str, kept: str) -> None:
    assert trim_to_last_sentence(text) == kept
    assert trim_to_last_sentence(kept) == kept, "once is enough"


@pytest.mark.parametrize(
    ("text", "whether"),
    [
        ("It ends.", True),
        ("It ends. \n", True),
        ('"Why?"', True),
        ("It does not", False),
        ("Steps:\n2.", False),
        ("Ask Mr.", False),
        ("", False),
        ("  \n", False),
    ],
)
def test_whether_a_text_ends(text: str, whether: bool) -> None:
    assert ends(text) is whether


WORDS = ["I ", "refuse", ". ", "Now ", "please ", "go", "<stop>"]


def decode(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids if i != 6)


def test_an_ended_response_is_scored_whole() -> None:
    assert ending(decode, [0, 1, 3, 6], cut=False) == Ending("I refuseNow ", 4, True)


def test_a_cut_response_keeps_the_fewest_tokens_that_hold_its_last_sentence() -> None:
    assert ending(decode, [0, 1, 2, 3, 4], cut=True) == Ending("I refuse.", 3, True)
    assert ending(decode, [0, 1, 2, 0, 1, 2, 3], cut=True) == Ending("I refuse. I refuse.", 6, True)


def test_a_cut_response_may_keep_one_token_of_many() -> None:
    words = ["Yes.", " And", " so", " on", " and"]
    for n in range(2, 6):
        found = ending(lambda ids: "".join(words[i] for i in ids), range(n), cut=True)
        assert found == Ending("Yes.", 1, True), n


def test_a_cut_response_without_a_sentence_end_is_scored_whole_and_counted() -> None:
    assert ending(decode, [0, 1, 3], cut=True) == Ending("I refuseNow ", 3, False)


def test_scoring_as_it_is_trims_nothing() -> None:
    assert ending(decode, [0, 1, 2, 3], cut=True, trim=False) == Ending("I refuse. Now ", 4, False)
    assert ending(decode, [0, 1, 2], cut=True, trim=False) == Ending("I refuse. ", 3, True)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("." * 100_000 + "x", "." * 100_000 + "x"),
        ("It ends. " + "!?" * 50_000 + "x", "It ends."),
        ("It ends. " + "Ask Dr. A. " * 20_000, "It ends."),
        ("It ends.\n" + "1.\n" * 40_000, "It ends."),
        ("It ends." + '"' * 100_000 + "x", "It ends." + '"' * 100_000 + "x"),
        ("It ends." + '"' * 100_000, "It ends." + '"' * 100_000),
    ],
)
def test_a_long_text_without_end_is_no_long_work(text: str, kept: str) -> None:
    """A policy that has gone wrong, or a client that means harm: the work grows with the length,
    not with its square.
    """
    assert trim_to_last_sentence(text) == kept
