"""Where a response ends: what of one cut at the token limit a SARM may read. Pure text, no torch.

A SARM is validated on text that ends. A response cut at the token limit is trimmed to its last
sentence end before it is scored; where it has none it is *unended*.
`python -m pytest tests/data/test_endings.py` checks it on text of every kind that comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_CLOSERS = "\"'”’»)\\]*_`"
_MARKS = ".!?…。！？"
# Possessive, and from a run's first mark alone: a run of marks is looked at once, not from each of
# its marks.
_END = re.compile(rf"(?<![{_MARKS}])[{_MARKS}]++[{_CLOSERS}]*+(?=\s|$)|(?<=[。！？])")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"“])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|cf|approx|e\.g|i\.e|No|Fig|Eq)\.$"
)
_LIST_NUMBER = re.compile(r"(?:^|\n)[\s*#>-]*\(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})\.[*_]*$")

LOOK_BACK = 200
"""Letters before a sentence end that say whether it is one."""


class Ending(NamedTuple):
    """What of one response is scored."""

    text: str
    """Up to the last sentence end where the response was cut and has one; else all of it."""
    tokens: int
    """How many of its tokens that takes; the last of them is where the reward falls."""
    ended: bool
    """Whether the text ends at an end of turn or a sentence end."""


def ends(text: str) -> bool:
    """Whether a text ends where a sentence does, closing quotes and brackets aside."""
    text = text.rstrip()
    return bool(text) and _last_end(text) == len(text)


def trim_to_last_sentence(text: str) -> str:
    """A text up to its last sentence end; all of it where it has none."""
    last = _last_end(text)
    return text[:last] if last else text


def _last_end(text: str) -> int:
    """Index just after the last sentence end of a text; 0 where there is none."""
    for found in reversed(list(_END.finditer(text))):
        end = stop = found.end()
        while stop > found.start() and text[stop - 1] in _CLOSERS.replace("\\", ""):
            stop -= 1
        # of a long text no more than an abbreviation or the number of a list can span
        until = (text[max(at - LOOK_BACK, 0) : at] for at in (stop, end))
        if not (_ABBREVIATION.search(next(until)) or _LIST_NUMBER.search(next(until))):
            return end
    return 0


def ending(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], *, cut: bool, trim: bool = True
) -> Ending:
    """What is scored of a response of token `ids`, `cut` at the token limit or ended by a stop
    token among them.

    `decode` gives the text of tokens, stop tokens left out. The tokens kept are the fewest whose
    text holds the trimmed text.
    """
    text = decode(ids)
    if not cut:
        return Ending(text, len(ids), True)
    kept = trim_to_last_sentence(text) if trim else text
    if len(kept) == len(text):
        return Ending(text, len(ids), ends(text))

    def holds(tokens: int) -> bool:
        return decode(ids[:tokens]).startswith(kept)

    # Most of a response is kept: from its end in growing steps, then between the last two.
    high, step = len(ids), 1
    while high - step > 0 and holds(high - step):
        high, step = high - step, 2 * step
    low = max(high - step, 0)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return Ending(kept, high, True)
