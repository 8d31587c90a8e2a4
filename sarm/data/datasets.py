"""Preference data -> prompts, pairs and texts, split once by prompt hash and shared by every
phase.

Use `load_data(config.data)`. Reads RewardBench 2, RMB, HH-RLHF and plain JSONL from a path or from
the hub; docs/data.md tells users how. Imports no torch, and pyarrow only to read Parquet.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sarm.config import PARTS, ROOT, DataConfig, Part, SourceConfig, UserError

Message = dict[str, str]
Messages = tuple[Message, ...]

ENCODED_PARTS: tuple[Part, ...] = ("discovery", "validation", "test")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


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


class Row(NamedTuple):
    """One record of any format. A row with responses of one label alone is compared with all of
    the other label.
    """

    messages: Messages
    chosen: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    category: str = ""
    kind: str | None = None


def load_data(config: DataConfig, *, download: bool = False) -> Data:
    """Read every source and assign each prompt its part.

    A prompt found in two sources keeps the part the first source gave it, so none is on both sides
    of the split. Raises UserError naming the file and line of a row that cannot be read.
    """
    prompts: dict[str, Prompt] = {}
    pairs: dict[tuple[str, str, str], Pair] = {}
    skipped: Counter[str] = Counter()
    for name, source in config.sources.items():
        missed: Counter[str] = Counter()
        by_prompt: dict[str, list[Row]] = {}
        for row in read_source(name, source, missed, download=download):
            by_prompt.setdefault(prompt_id(row.messages), []).append(row)
        for id_ in sorted(by_prompt, key=lambda id_: _unit_hash(f"{config.salt}:limit", id_))[
            : source.limit
        ]:
            first = by_prompt[id_][0]
            new = Prompt(
                id_,
                first.messages,
                name,
                first.kind or source.kind,
                first.category,
                part_of(id_, config.salt, source),
            )
            prompt = prompts.setdefault(id_, new)
            for i, j, chosen, rejected in compared(by_prompt[id_], missed):
                pairs.setdefault(
                    (id_, chosen, rejected),
                    Pair(f"{name}-{id_}-{i}-{j}", prompt, name, chosen, rejected),
                )
        skipped.update({f"{name}: {reason}": n for reason, n in missed.items()})
    return Data(
        sorted(prompts.values(), key=lambda p: p.id),
        sorted(pairs.values(), key=lambda p: p.id),
        dict(skipped),
    )


def compared(rows: list[Row], missed: Counter[str]) -> Iterator[tuple[int, int, str, str]]:
    """The distinct comparisons among the rows of one prompt: numbers and texts of the chosen and
    the rejected response.

    Responses are numbered in order of first appearance, without repeats: upstream files repeat a
    chosen text once a rejected one.
    """
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
            else:
                yield i, j, chosen, rejected


def part_of(id_: str, salt: str, source: SourceConfig) -> Part | None:
    """The part of a prompt: its hash as a number in [0, 1) against the source's cumulative
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
        json.dumps(
            [
                [m["role"], " ".join(unicodedata.normalize("NFC", m["content"]).split())]
                for m in messages
            ],
            ensure_ascii=False,
        )
    )[:16]


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
        for row in READERS[source.format](file, source, missed):
            found = True
            if row.messages[-1]["content"].strip():
                yield row
            else:
                missed["empty prompt"] += 1
    if not found:
        raise UserError(
            f"data source {name} ({source.path or source.repo}) holds no rows for format"
            f" {source.format}; check its path, format and subset"
        )


def source_files(name: str, source: SourceConfig, *, download: bool = False) -> list[Path]:
    """The local files of a source, fetched from the hub into its cache where it has no path.
    Raises UserError.
    """
    if source.path is None:
        return hub_files(name, source, download=download)
    path = ROOT / source.path
    if not path.exists():
        raise UserError(
            f"data source {name}: {path} does not exist; correct data.sources.{name}.path"
        )
    if path.is_file():
        return [path]
    files = [path / file for file in source.files] or sorted(
        p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()
    )
    if not files:
        raise UserError(
            f"data source {name}: {path} holds no file that ends in {', '.join(SUFFIXES)}"
        )
    return files


def hub_files(name: str, source: SourceConfig, *, download: bool) -> list[Path]:
    """The files of a hub data set at its revision, from the cache or, with `download`, over the
    network. Raises UserError.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    assert source.repo is not None
    where = f"data source {name}: {source.repo} at {source.revision}"
    try:
        if download:
            return [
                Path(
                    hf_hub_download(
                        source.repo, file, repo_type="dataset", revision=source.revision
                    )
                )
                for file in source.files
            ]
        # Not hf_hub_download with local_files_only, which may ask the hub what program it runs
        # under.
        cached = [
            try_to_load_from_cache(source.repo, file, repo_type="dataset", revision=source.revision)
            for file in source.files
        ]
    except LocalEntryNotFoundError:
        raise UserError(
            f"{where}: the hub could not be reached; check the network and HF_ENDPOINT"
        ) from None
    # no such repository or file, a broken connection, a malformed name
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(f"{where} could not be fetched: {' '.join(str(error).split())}") from None
    found = [Path(file) for file in cached if isinstance(file, str)]
    if len(found) < len(cached):
        raise UserError(f"{where} is not in the cache; run make fetch where there is a network")
    return found


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a Parquet, JSON Lines or JSON array file, gzipped or not, each with its place
    for error messages.

    Raises UserError where the file is empty, damaged or not UTF-8.
    """
    found = False
    for place, record in (
        _parquet_records(file) if file.suffix == ".parquet" else _json_records(file)
    ):
        found = True
        if not isinstance(record, dict):
            raise UserError(f"{file}, {place}: expected an object, found {type(record).__name__}")
        yield f"{file}, {place}", record
    if not found:
        raise UserError(f"{file} is empty")


def _json_records(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if number == 1 and line.lstrip().startswith(b"["):
                    for record_number, record in enumerate(
                        _json(line + lines.read(), f"{file}"), 1
                    ):
                        yield f"record {record_number}", record
                elif line.strip():
                    yield f"line {number}", _json(line, f"{file}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}, after line {number}: cannot be read ({error})") from None


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); re-encode the file"
        ) from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); the file may be cut short") from None


def _parquet_records(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, ValueError) as error:  # pyarrow's errors are one or the other
        raise UserError(
            f"{file}: not a whole Parquet file ({' '.join(str(error).split())})"
        ) from None
    for number, record in enumerate(table.to_pylist(), 1):
        yield f"row {number}", record


def _read_jsonl(file: Path, source: SourceConfig, missed: Counter[str]) -> Iterator[Row]:
    """`{"prompt", "chosen", "rejected"}`, responses one or a list; optional category and kind."""
    for where, row in read_records(file):
        yield Row(
            _messages(row, "prompt", where),
            _strings(row, "chosen", where),
            _strings(row, "rejected", where),
            _category(row),
            _kind(row, where),
        )


def _read_prompts(file: Path, source: SourceConfig, missed: Counter[str]) -> Iterator[Row]:
    """`{"prompt"}`; optional category and kind."""
    for where, row in read_records(file):
        yield Row(_messages(row, "prompt", where), category=_category(row), kind=_kind(row, where))


def _read_rewardbench2(file: Path, source: SourceConfig, missed: Counter[str]) -> Iterator[Row]:
    """RewardBench 2 as published: one row a prompt with lists of responses, arXiv 2506.01937."""
    for where, row in read_records(file):
        if source.subset is not None and row.get("subset") != source.subset:
            missed["other subset"] += 1
            continue
        yield Row(
            _messages(row, "prompt", where),
            _strings(row, "chosen", where),
            _strings(row, "rejected", where),
            str(row.get("subset", "")),
        )


def _read_rewardbench2_sarm(
    file: Path, source: SourceConfig, missed: Counter[str]
) -> Iterator[Row]:
    """Upstream SARM's files: pairs for training, or one labelled answer a row for testing. Both
    hold the same 450 prompts.
    """
    for where, row in read_records(file):
        if "label" not in row:
            yield Row(
                _messages(row, "prompt", where),
                _strings(row, "chosen", where),
                _strings(row, "rejected", where),
            )
        elif row["label"] == "chosen":
            yield Row(_messages(row, "question", where), chosen=_strings(row, "answer", where))
        elif row["label"] == "rejected":
            yield Row(_messages(row, "question", where), rejected=_strings(row, "answer", where))
        else:
            raise UserError(f"{where}: 'label' must be chosen or rejected, not {row['label']!r}")


def _read_rmb(file: Path, source: SourceConfig, missed: Counter[str]) -> Iterator[Row]:
    """RMB's pairwise records (chosen, reject) and best-of-N ones (bon_best, loser_list), arXiv
    2410.09893.
    """
    better, worse = (
        ("bon_best", "loser_list") if source.format == "rmb_bon" else ("chosen", "reject")
    )
    for where, row in read_records(file):
        path = row.get("category_path") or file.name.partition(".")[0]
        category = str(path if isinstance(path, str) else path[-1]).rpartition("/")[2]
        yield Row(
            _messages(row, "conversation_input", where),
            _answers(row, better, where),
            _answers(row, worse, where),
            category,
        )


def _read_hh_rlhf(file: Path, source: SourceConfig, missed: Counter[str]) -> Iterator[Row]:
    """Two transcripts that share all but the last assistant turn, arXiv 2204.05862."""
    for where, row in read_records(file):
        a, b = (
            _transcript(_string(row, "chosen", where)),
            _transcript(_string(row, "rejected", where)),
        )
        if not a or not b:
            missed["turns of Human and Assistant do not alternate up to an answer"] += 1
        elif a[:-1] != b[:-1]:
            missed["transcripts differ before the last turn"] += 1
        else:
            yield Row(tuple(a[:-1]), (a[-1]["content"],), (b[-1]["content"],))


READERS: dict[str, Callable[[Path, SourceConfig, Counter[str]], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "prompts": _read_prompts,
    "rewardbench2": _read_rewardbench2,
    "rewardbench2_sarm": _read_rewardbench2_sarm,
    "rmb_pairs": _read_rmb,
    "rmb_bon": _read_rmb,
    "hh_rlhf": _read_hh_rlhf,
}


def _transcript(text: str) -> list[Message]:
    """The turns of a transcript; empty where they do not go user, assistant, ..., assistant, which
    chat templates need.
    """
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    speakers = parts[::2]
    if before.strip() or not speakers or speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        return []
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(speakers, parts[1::2], strict=True)
    ]


# The fields of a record, checked


def _messages(row: dict[str, Any], key: str, where: str) -> Messages:
    value = _field(row, key, where)
    if isinstance(value, str):
        return ({"role": "user", "content": _string(row, key, where)},)
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise UserError(
            f"{where}: {key!r} must be a string or a list of messages with role and content"
        )
    messages = tuple(
        {"role": _string(m, "role", where), "content": _string(m, "content", where)} for m in value
    )
    roles = [m["role"] for m in messages]
    if not set(roles) <= {"system", "user", "assistant"} or roles[-1] != "user":
        raise UserError(
            f"{where}: {key!r} must have roles system, user and assistant and end with the user's;"
            f" it has {', '.join(roles)}"
        )
    return messages


def _answers(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """RMB wraps a response, or a list of them, as `{"llm_name", "answer"}`."""
    value = _field(row, key, where)
    responses = [r for r in (value if isinstance(value, list) else [value]) if isinstance(r, dict)]
    if not responses or (isinstance(value, list) and len(responses) < len(value)):
        raise UserError(f"{where}: {key!r} must be a response with an answer, or a list of them")
    return tuple(_string(response, "answer", where) for response in responses)


def _strings(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key)
    if isinstance(value, list) and value:
        return tuple(_string({key: item}, key, where) for item in value)
    return (_string(row, key, where),)


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = _field(row, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {key!r} holds half a surrogate pair at character {error.start}, which no"
            " tokenizer takes; mend the text"
        ) from None
    return value


def _field(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise UserError(
            f"{where}: {key!r} is missing; this row has {', '.join(map(repr, row)) or 'no keys'}"
        )
    return row[key]


def _category(row: dict[str, Any]) -> str:
    return str(row.get("category") or "")


def _kind(row: dict[str, Any], where: str) -> str | None:
    kind = row.get("kind")
    if kind not in (None, "safe", "unsafe"):
        raise UserError(f"{where}: 'kind' must be safe or unsafe, not {kind!r}")
    return kind
