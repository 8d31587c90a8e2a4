"""Preference data -> prompts, pairs and texts, split once by prompt hash and shared by every
phase.

Use `load_data(config.data)`, from a path or from the hub; `formats.py` has the forms of data, and
docs/data.md tells users how. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sarm.config import PARTS, DataConfig, Part, SourceConfig, UserError
from sarm.data.fields import Message, Messages
from sarm.data.files import read_records
from sarm.data.formats import FORMATS, Place, Row
from sarm.data.sources import source_files

ENCODED_PARTS: tuple[Part, ...] = ("discovery", "validation", "test")


class Prompt(NamedTuple):
    """What a policy is asked. `id` is a hash of the messages, so the same prompt in two sources
    has one id.
    """

    id: str
    messages: Messages
    source: str
    kind: str
    category: str
    part: Part | None


class Pair(NamedTuple):
    """A prompt with a safer and a less safe response."""

    id: str
    prompt: Prompt
    source: str
    chosen: str
    rejected: str


class Data(NamedTuple):
    """All prompts and pairs of a run in an order that depends on their content alone."""

    prompts: list[Prompt]
    pairs: list[Pair]
    skipped: dict[str, int]
    """How many rows or pairs were left out, by source and reason."""


class Text(NamedTuple):
    """A prompt and one response, to be scored."""

    id: str
    prompt_id: str
    source: str
    part: Part
    label: str
    messages: Messages


def load_data(config: DataConfig, *, download: bool = False) -> Data:
    """Read every source and assign each prompt its part.

    Conversations that begin with the same question share a part, the one that the first source
    which asks it gives, so that none is on both sides of the split. Pairs that contradict each
    other are left out, both. Raises UserError naming the file and line of a row that cannot be
    read.
    """
    prompts: dict[str, Prompt] = {}
    parts: dict[str, Part | None] = {}
    pairs: dict[tuple[str, str, str], Pair] = {}
    skipped: dict[str, Counter[str]] = {name: Counter() for name in config.sources}
    for name, source in config.sources.items():
        missed = skipped[name]
        by_prompt: dict[str, list[Row]] = {}
        for row in read_source(name, source, missed, download=download):
            by_prompt.setdefault(prompt_id(row.messages), []).append(row)
        for id_ in sorted(by_prompt, key=lambda id_: _unit_hash(f"{config.salt}:limit", id_))[
            : source.limit
        ]:
            rows = by_prompt[id_]
            first = rows[0]
            root = root_id(first.messages)
            part = parts.setdefault(root, part_of(root, config.salt, source))
            new = Prompt(id_, first.messages, name, first.kind or source.kind, first.category, part)
            prompt = prompts.setdefault(id_, new)
            for row in rows:
                kind = row.kind or source.kind
                if kind != prompt.kind:
                    missed[f"prompt listed as {kind}, and by {prompt.source} as {prompt.kind}"] += 1
            for i, j, chosen, rejected in compared(rows, missed):
                pair = Pair(f"{name}-{id_}-{i}-{j}", prompt, name, chosen, rejected)
                if pairs.setdefault((id_, chosen, rejected), pair) is not pair:
                    missed["pair of an earlier source"] += 1
    for pair in _contradicting(pairs):
        del pairs[pair.prompt.id, pair.chosen, pair.rejected]
        skipped[pair.source]["pair that another contradicts"] += 1
    return Data(
        sorted(prompts.values(), key=lambda p: p.id),
        sorted(pairs.values(), key=lambda p: p.id),
        {f"{name}: {why}": n for name, missed in skipped.items() for why, n in missed.items()},
    )


def compared(rows: list[Row], missed: Counter[str]) -> Iterator[tuple[int, int, str, str]]:
    """The distinct comparisons among the rows of one prompt: numbers and texts of the chosen and
    the rejected response.

    Responses are numbered in order of first appearance, without repeats: upstream files repeat a
    chosen text once a rejected one.
    """
    given = Counter((c, r) for row in rows for c in row.chosen for r in row.rejected)
    if repeats := given.total() - len(given):
        missed["repeated pair"] += repeats
    if not any(row.chosen or row.rejected for row in rows) and len(rows) > 1:
        missed["repeated prompt"] += len(rows) - 1
    for i, chosen in enumerate(dict.fromkeys(text for row in rows for text in row.chosen)):
        beside = [row for row in rows if chosen in row.chosen]
        against = (
            rows
            if any(not row.rejected for row in beside)
            else [row for row in rows if chosen in row.chosen or not row.chosen]
        )
        for j, rejected in enumerate(
            dict.fromkeys(text for row in against for text in row.rejected)
        ):
            if not chosen.strip() or not rejected.strip():
                missed["empty response"] += 1
            elif chosen == rejected:
                missed["chosen equals rejected"] += 1
            elif _spaced(chosen) == _spaced(rejected):
                missed["chosen and rejected differ by white space alone"] += 1
            else:
                yield i, j, chosen, rejected


def _contradicting(pairs: dict[tuple[str, str, str], Pair]) -> list[Pair]:
    """The pairs whose opposite is there too."""
    told = {(id_, _spaced(c), _spaced(r)) for id_, c, r in pairs}
    return [pair for (id_, c, r), pair in pairs.items() if (id_, _spaced(r), _spaced(c)) in told]


def part_of(id_: str, salt: str, source: SourceConfig) -> Part | None:
    """The part of prompts with this `root_id`: its hash, a number in [0, 1), against the cumulative
    fractions, in PARTS order.
    """
    u, edge = _unit_hash(salt, id_), 0.0
    for part in PARTS:
        edge += source.split.get(part, 0.0)
        if u < edge:
            return part
    return None


def prompts_in(data: Data, part: Part, kind: str | None = None) -> list[Prompt]:
    """The prompts of a part, of one kind where named."""
    return [p for p in data.prompts if p.part == part and (kind is None or p.kind == kind)]


def pairs_in(data: Data, part: Part, source: str | None = None) -> list[Pair]:
    """The pairs of a part, from one source where named."""
    return [
        p for p in data.pairs if p.prompt.part == part and (source is None or p.source == source)
    ]


def texts_to_encode(data: Data) -> list[Text]:
    """Every distinct (prompt, response) of the discovery, validation and test parts, sorted by
    prompt and id.

    A response that is chosen in one pair and rejected in another is listed once a label. A prompt's
    texts lie together, so that a shard has most of them and computes their prompt once.
    """
    texts: dict[str, Text] = {}
    for pair in data.pairs:
        if pair.prompt.part not in ENCODED_PARTS:
            continue
        for label, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            messages = (*pair.prompt.messages, {"role": "assistant", "content": response})
            id_ = f"{text_id(messages)}-{label[0]}"
            texts.setdefault(
                id_, Text(id_, pair.prompt.id, pair.source, pair.prompt.part, label, messages)
            )
    return sorted(texts.values(), key=lambda text: (text.prompt_id, text.id))


def prompt_id(messages: Iterable[Message]) -> str:
    """16 hex digits naming a prompt; Unicode form and amount of white space do not count, so near
    copies share a part.
    """
    return _hash(
        json.dumps([[m["role"], _spaced(m["content"])] for m in messages], ensure_ascii=False)
    )[:16]


def root_id(messages: Messages) -> str:
    """The `prompt_id` of a conversation's beginning, up to the user's first turn: the prompt itself
    where it has one turn.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages) - 1)
    return prompt_id(messages[: first + 1])


def _spaced(text: str) -> str:
    """In one Unicode form, white space made single."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def text_id(messages: Iterable[Message]) -> str:
    """16 hex digits naming a conversation to the letter."""
    return _hash(json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False))[:16]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _unit_hash(salt: str, id_: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{salt}:{id_}".encode()).digest()[:8], "big") / 2**64


# Reading


def read_source(
    name: str, source: SourceConfig, missed: Counter[str], *, download: bool = False
) -> Iterator[Row]:
    """All rows of a source; what is left out is counted in `missed` by reason. Raises UserError."""
    found = False
    for file in source_files(name, source, download=download):
        for where, record in read_records(file):
            place = Place(where, file, source.subset)
            for row in FORMATS[source.format].read(record, place, missed):
                found = True
                if row.messages[-1]["content"].strip():
                    yield row
                else:
                    missed["empty prompt"] += 1
    if not found:
        why = ", ".join(f"{n:,} left out: {reason}" for reason, n in missed.items())
        named = source.path or source.repo or source.url
        raise UserError(
            f"data source {name} ({named}) holds no rows for format"
            f" {source.format}{f' ({why})' if why else ''}; check its path, format and subset"
        )
