"""The fields of a record of preference data, checked: `text_of(row, "prompt", where)`.

Each raises UserError with the record's place where a field is missing or not what it has to be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sarm.config.base import UserError

Message = dict[str, str]
Messages = tuple[Message, ...]
Record = Mapping[str, Any]


def transcript(text: str) -> list[Message]:
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


def messages_of(row: Record, key: str, where: str) -> Messages:
    """A prompt: text, or messages that end with the user's."""
    value = field(row, key, where)
    if isinstance(value, str):
        return ({"role": "user", "content": text_of(row, key, where)},)
    return ending_with_user(turns_of(value, key, where), key, where)


def is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)


def turns_of(value: Any, key: str, where: str) -> Messages:
    """Messages of known roles; content is text, or parts of which each is text."""
    if not is_messages(value):
        raise UserError(
            f"{where}: {key!r} must be a string or a list of messages with role and content"
        )
    turns = tuple({"role": text_of(m, "role", where), "content": _content(m, where)} for m in value)
    roles = [m["role"] for m in turns]
    if not set(roles) <= {"system", "user", "assistant"}:
        raise UserError(
            f"{where}: {key!r} must have roles system, user and assistant; it has"
            f" {', '.join(roles)}"
        )
    return turns


def ending_with_user(turns: Messages, key: str, where: str) -> Messages:
    if not turns or turns[-1]["role"] != "user":
        raise UserError(
            f"{where}: {key!r} must have roles system, user and assistant and end with the user's;"
            f" it has {', '.join(m['role'] for m in turns) or 'none'}"
        )
    return turns


def _content(message: Record, where: str) -> str:
    parts = message.get("content")
    if not isinstance(parts, list):
        return text_of(message, "content", where)
    if not all(isinstance(p, Mapping) and p.get("type") == "text" for p in parts):
        raise UserError(f"{where}: a message's content has parts that are no text")
    return "".join(text_of(part, "text", where) for part in parts)


def answers_of(row: Record, key: str, where: str) -> tuple[str, ...]:
    """RMB wraps a response, or a list of them, as `{"llm_name", "answer"}`."""
    value = field(row, key, where)
    responses = [r for r in (value if isinstance(value, list) else [value]) if isinstance(r, dict)]
    if not responses or (isinstance(value, list) and len(responses) < len(value)):
        raise UserError(f"{where}: {key!r} must be a response with an answer, or a list of them")
    return tuple(text_of(response, "answer", where) for response in responses)


def texts_of(row: Record, key: str, where: str) -> tuple[str, ...]:
    """One response or several; a message of the assistant's counts as its text."""
    value = row.get(key)
    if isinstance(value, list) and value:
        return tuple(text_of({key: item}, key, where) for item in value)
    return (text_of(row, key, where),)


def text_of(row: Record, key: str, where: str) -> str:
    value = field(row, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {key!r} holds half a surrogate pair at character {error.start}, which no"
            " tokenizer takes; correct the text"
        ) from None
    return value


def field(row: Record, key: str, where: str) -> Any:
    if key not in row:
        raise UserError(
            f"{where}: {key!r} is missing; this row has {', '.join(map(repr, row)) or 'no keys'}"
        )
    return row[key]


def category_of(row: Record, *keys: str) -> str:
    """What the first of `keys` says that says something (`category` by default), the last of a
    list; nothing where it is no text or number, as a table's NaN.
    """
    for key in keys or ("category",):
        value = row.get(key)
        value = value[-1] if isinstance(value, list) and value else value
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return str(value).encode("utf-8", "replace").decode()
    return ""


def kind_of(row: Record, where: str) -> str | None:
    kind = row.get("kind")
    if kind in (None, "") or kind != kind:
        return None
    if kind not in ("safe", "unsafe"):
        raise UserError(f"{where}: 'kind' must be safe or unsafe, not {kind!r}")
    return str(kind)
