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
_END = re.compile(rf"[.!?…。！？]+[{_CLOSERS}]*(?=\s|$)|(?<=[。！？])")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"“])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|cf|approx|e\.g|i\.e|No|Fig|Eq)\.$"
)
_LIST_NUMBER = re.compile(r"(?:^|\n)[\s*#>-]*\(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})\.[*_]*$")


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
        before = text[: found.end()]
        stop = before.rstrip(_CLOSERS.replace("\\", ""))
        if not (_ABBREVIATION.search(stop) or _LIST_NUMBER.search(before)):
            return found.end()
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
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(decode(ids[:middle])) >= len(kept) and decode(ids[:middle]).startswith(kept):
            high = middle
        else:
            low = middle + 1
    return Ending(kept, low, True)
