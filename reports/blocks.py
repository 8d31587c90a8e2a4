"""What a section is made of, and its text: prose, items and tables, 80 columns wide.

A section is written once, as blocks; `lines(blocks)` is its text, `templates/report.html` its page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

WIDTH = 80
SENTENCE_WIDTH = 76
WORDS = ("arm", "host", "device", "state", "what")
"""Columns of words, set to the left."""


class Prose(NamedTuple):
    """One paragraph."""

    text: str

    @property
    def kind(self) -> str:
        return "prose"


class Items(NamedTuple):
    """A list; what follows an item's first line, such as a path, is not wrapped."""

    items: Sequence[str]

    @property
    def kind(self) -> str:
        return "items"


class Table(NamedTuple):
    """Cells as they are to be read. The first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    origins: Mapping[str | int, str] = MappingProxyType({})
    """By column, its name or, where several have one name, its place: the file and column that its
    figures are made of; the page shows it on hover.
    """
    counts: Sequence[str] = ()
    """By row: of how many prompts, seeds or steps."""
    unknown: Mapping[str, str] = MappingProxyType({})
    """By column: why a figure is n/a."""

    @property
    def kind(self) -> str:
        return "table"

    def hover(self, row: int, column: int) -> str:
        """Where a cell comes from, in words; empty where that is not said."""
        name = self.header[column]
        if str(self.rows[row][column]) == "n/a" and name in self.unknown:
            return f"n/a: {self.unknown[name]}"
        origin = self.origins.get(column, self.origins.get(name, ""))
        of = f"; {self.counts[row]}" if origin and row < len(self.counts) else ""
        return f"{origin}{of}"

    @property
    def words(self) -> set[int]:
        """The columns that are set to the left."""
        return {i for i, name in enumerate(self.header) if i == 0 or name in WORDS}


Block = Prose | Items | Table

NOT_AVAILABLE = [Prose("not available")]
"""Of a section whose phase left nothing."""


def lines(blocks: Iterable[Block]) -> list[str]:
    """The text of some blocks, an empty line between them."""
    parts = [_lines(block) for block in blocks]
    return [line for i, part in enumerate(parts) for line in [""] * (i > 0) + part]


def _lines(block: Block) -> list[str]:
    if isinstance(block, Prose):
        return wrap(block.text)
    if isinstance(block, Items):
        parts = [item.splitlines() for item in block.items]
        return [
            line
            for first, *more in parts
            for line in (*wrap(f"- {first}", "  "), *(f"  {text}" for text in more))
        ]
    return (wrap(block.title) if block.title else []) + table(block)


def wrap(text: str, indent: str = "", width: int = SENTENCE_WIDTH) -> list[str]:
    """Lines of a sentence; a path or hash that is longer than a line stays whole."""
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def table(given: Table) -> list[str]:
    """Columns as wide as they need to be; what does not fit in `WIDTH` follows beneath, each row
    named again.
    """
    cells = [list(given.header), *([str(cell) for cell in row] for row in given.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(given.header))]
    parts: list[list[int]] = [[0]]
    for i in range(1, len(widths)):
        if len(parts[-1]) > 1 and sum(widths[j] + 2 for j in parts[-1]) + widths[i] > WIDTH:
            parts.append([0])
        parts[-1].append(i)
    texts: list[list[str]] = [
        [
            "  ".join(
                row[i].ljust(widths[i]) if i in given.words else row[i].rjust(widths[i])
                for i in part
            ).rstrip()
            for row in cells
        ]
        for part in parts
    ]
    return [line for i, part in enumerate(texts) for line in [""] * (i > 0) + part]
