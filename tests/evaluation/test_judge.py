"""Which of a classifier's labels name harm: `python -m pytest tests/evaluation/test_judge.py`."""

from __future__ import annotations

import pytest

from sarm.evaluation.judge import says_harm

HARM = """unsafe harmful toxic hate HATE hateful offensive violence abusive Toxicity severe_toxic
harm/violence VERY_UNSAFE identity_hate LABEL_unsafe harmfulResponse""".split()
NONE = """safe nothate non_toxic non-toxic NON_HATE nonToxic harmless not_harmful not-offensive
inoffensive NoHate no_hate neutral NOT_unsafe LABEL_0 benign toxicity-free nonviolent
non_hate_speech""".split()


@pytest.mark.parametrize("label", HARM)
def test_labels_that_name_harm(label: str) -> None:
    assert says_harm(label)


@pytest.mark.parametrize("label", NONE)
def test_labels_that_deny_it_or_say_nothing(label: str) -> None:
    assert not says_harm(label)
