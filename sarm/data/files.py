"""Records of JSON Lines, JSON, CSV and Parquet files, gzipped or not, each with its place for
messages: `for place, record in read_records(file)`. Imports pyarrow only to read Parquet.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sarm.config.base import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
KINDS = "JSON Lines, JSON, CSV and Parquet, the first three also gzipped"
POINTER = b"version https://git-lfs"
FIELD_BYTES = 2**30
"""The longest field of a CSV; Python's own limit is 128 KiB."""


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file, by its suffix; what has none of `SUFFIXES` is read as JSON.

    Raises UserError where the file is empty, damaged, not UTF-8, or its records are no objects.
    """
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        records = _parquet_records(file)
    elif name.endswith((".csv", ".tsv")):
        records = _csv_records(file, "\t" if name.endswith(".tsv") else ",")
    else:
        records = _json_records(file)
    found = False
    for place, record in records:
        found = True
        if not isinstance(record, dict):
            raise UserError(f"{file}, {place}: expected an object, found {type(record).__name__}")
        yield f"{file}, {place}", record
    if not found:
        raise UserError(f"{file} is empty")


def _json_records(file: Path) -> Iterator[tuple[str, Any]]:
    number, begun = 0, False
    try:
        with _opened(file) as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                if not begun and line.lstrip().startswith(b"["):
                    for record_number, record in enumerate(
                        _json(line + lines.read(), f"{file}"), 1
                    ):
                        yield f"record {record_number}", record
                    return
                begun = True
                yield f"line {number}", _json(line, f"{file}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}, after line {number}: cannot be read ({error})") from None


def _json(text: bytes, where: str) -> Any:
    if text.startswith(POINTER):
        raise UserError(
            f"{where}: a git-LFS pointer and not the file itself; run git lfs pull there"
        )
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); re-encode the file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({error}); the file may be cut short, or of another kind: {KINDS}"
            " are read, by their suffix"
        ) from None


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError where a key comes twice: which of the two is meant is not said."""
    found = dict(items)
    if len(found) < len(items):
        twice = next(key for i, (key, _) in enumerate(items) if key in dict(items[:i]))
        raise ValueError(f"{twice!r} is given twice")
    return found


def _csv_records(file: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    before = csv.field_size_limit(FIELD_BYTES)
    number = 0
    try:
        with _opened(file) as raw:
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise UserError(f"{file}: its first line names a column twice: {', '.join(names)}")
            for number, values in enumerate(reader, 1):
                if len(values) not in (0, len(names)):
                    raise UserError(
                        f"{file}, row {number}: has {len(values)} fields where the first line names"
                        f" {len(names)}"
                    )
                if values:
                    yield f"row {number}", dict(zip(names, values, strict=True))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}, after row {number}: not UTF-8 ({error.reason}); re-encode the file"
        ) from None
    except (csv.Error, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}, after row {number}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(before)


def _parquet_records(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        after = f", after row {number}" if number else ""
        raise UserError(
            f"{file}{after}: not a whole Parquet file ({' '.join(str(error).split())})"
        ) from None


def _opened(file: Path) -> Any:
    return gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb")
