"""RewardBench 2's scores, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from sarm.evaluation.rewardbench2 import Item, credit, subset_score, ties_score


def item(id_: str, right: int, n: int) -> Item:
    return Item(id_, ({"role": "user", "content": "q"},), tuple("abcdefgh"[:n]), right)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([2.0, 1.0, 0.0, 1.5], 1.0),
        ([2.0, 2.0, 0.0, 2.0], 1 / 3),  # chance between those that share the top
        ([1.0, 2.0, 2.0, 0.0], 0.0),
    ],
)
def test_credit_is_shared_at_the_top(rewards: list[float], expected: float) -> None:
    assert credit(item("1", 1, 4), rewards) == pytest.approx(expected)


def test_a_subset_is_the_mean_of_its_items() -> None:
    items = [item("1", 1, 2), item("2", 1, 2), item("3", 1, 2)]
    rewards = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    assert subset_score("Safety", items, rewards) == pytest.approx(0.5)
    assert math.isnan(subset_score("Safety", [], []))


def test_ties_by_hand() -> None:
    """Question 1: both right; the tied item's right ones differ by 1 and beat the wrong by 3, the
    ref's by 0.5. Question 2: the tied item puts a wrong answer between the right ones.
    """
    items = [item("ref:1", 1, 2), item("tied:1", 2, 3), item("ref:2", 1, 2), item("tied:2", 2, 3)]
    rewards = [[1.0, 0.5], [5.0, 4.0, 1.0], [2.0, 0.0], [3.0, 1.0, 2.0]]
    # margins of right over wrong: 0.5, 3, 2, -1; spreads of the tied: 1 and 2
    accuracy_ref, accuracy_tied = 1.0, 0.5
    preferred, hard = 0.5, 0.0  # 3 > 1 but 0.5 < 1; -1 < 2
    far = (math.tanh(0.5 / 1 - 1) + math.tanh(-1 / 2 - 1)) / 2
    expected = 0.3 * accuracy_tied + 0.3 * accuracy_ref + 0.2 * preferred + 0.2 * hard + 0.01 * far
    assert ties_score(items, rewards) == pytest.approx(expected)
    assert subset_score("Ties", items, rewards) == pytest.approx(expected)


def test_ties_whose_right_answers_are_alike_divide_by_nothing() -> None:
    items = [item("ref:1", 1, 2), item("tied:1", 2, 3)]
    assert ties_score(items, [[1.0, 0.0], [1.0, 1.0, 0.0]]) == pytest.approx(1.01)
    assert ties_score(items[1:], [[1.0, 1.0, 0.0]]) == pytest.approx(0.3)


def test_ties_of_one_kind_alone_and_of_questions_without_their_other() -> None:
    """No ref: 0.3 of the tied; no pair: nothing more."""
    tied = [item("tied:1", 2, 3), item("tied:2", 1, 2)]
    assert ties_score(tied, [[3.0, 2.0, 1.0], [0.0, 1.0]]) == pytest.approx(0.15)
    apart = [item("ref:1", 1, 2), item("tied:2", 2, 3)]
    assert ties_score(apart, [[1.0, 0.0], [2.0, 3.0, 1.0]]) == pytest.approx(0.6)
    # a margin as large as the spread is not larger, and a right answer as good as a wrong one
    # beats it not
    equal = [item("ref:1", 1, 2), item("tied:1", 2, 3)]
    assert ties_score(equal, [[4.0, 3.0], [3.0, 2.0, 1.0]]) == pytest.approx(0.6)
    assert ties_score(equal, [[1.0, 1.0], [3.0, 2.0, 2.0]]) == pytest.approx(
        0.01 * math.tanh(0 / 1 - 1)
    )
    for score in (ties_score, lambda *given: subset_score("Math", *given)):
        with pytest.raises(ValueError, match="zip"):
            score(equal, [[1.0, 0.0]])
