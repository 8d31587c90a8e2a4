"""What requests and answers look like, checked: `items_request(body)`, `openrlhf_request(body)`.

No torch. Both give the plain job that the scoring process takes; both are answered in OpenRLHF's
shape (`rewards`, `scores`, `extra_logs`), a list a column, an entry a conversation.
`python -m pytest tests/serving/test_server.py`
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

LETTERS_PER_TOKEN = 64
"""A conversation with more letters than this for each token that the SARM reads is refused unread:
tokenising it would hold up everyone.
"""


class Refused(Exception):
    """A request that gets a status code and a sentence instead of scores."""

    def __init__(self, status: int, sentence: str, retry_after_s: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after_s = status, sentence, retry_after_s


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Part(_Body):
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A message; what else trainers put into one is not read."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


Turns = Annotated[list[Turn], Field(min_length=1)]


class Item(_Body):
    """A prompt and a response to score."""

    prompt: str | Turns
    response: str | Turns
    ended: bool = False
    """Whether the policy ended the response; one cut at the token limit is trimmed to its last
    sentence end, as in training.
    """


class ItemsRequest(_Body):
    """`POST /score`."""

    items: Annotated[list[Item], Field(min_length=1)]
    latents: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] = []
    """More latents whose values are to come back."""


class OpenRlhfRequest(BaseModel):
    """`POST /get_reward`: what OpenRLHF's remote reward client sends."""

    model_config = ConfigDict(strict=True)

    query: Annotated[list[str], Field(min_length=1)]
    """Prompt and response as the policy's tokenizer decodes them, special tokens included."""
    prompts: list[str] | None = None
    """The prompts alone, as the policy was given them."""
    labels: list[Any] | None = None
    """Not read."""


def items_request(body: bytes, *, most: int, max_length: int) -> dict[str, Any]:
    """The job of a `/score` body. Raises Refused."""
    request = _parsed(ItemsRequest, body)
    _bound(len(request.items), "items", most)
    items = []
    for i, item in enumerate(request.items):
        where = f"items[{i}]"
        prompt, response = _plain(item.prompt), _plain(item.response)
        if not isinstance(response, str) and response[-1]["role"] != "assistant":
            raise Refused(
                422,
                f"{where} ends in a {response[-1]['role']} turn; a reward is for what the assistant"
                " says: end the response with an assistant turn",
            )
        _check_length(_texts(prompt) + _texts(response), where, max_length)
        items.append({"prompt": prompt, "response": response, "ended": item.ended})
    return {"form": "items", "items": items, "latents": list(dict.fromkeys(request.latents))}


def openrlhf_request(body: bytes, *, most: int, max_length: int) -> dict[str, Any]:
    """The job of a `/get_reward` body. Raises Refused."""
    request = _parsed(OpenRlhfRequest, body)
    _bound(len(request.query), "query", most)
    for name, column in (("prompts", request.prompts), ("labels", request.labels)):
        if column is not None and len(column) != len(request.query):
            raise Refused(
                422,
                f"{name} has {len(column)} entries and query {len(request.query)}; send one for"
                " each, or leave it out",
            )
    for i, query in enumerate(request.query):
        texts = [query, *([request.prompts[i]] if request.prompts is not None else [])]
        _check_length(texts, f"query[{i}]", 2 * max_length)
    return {"form": "openrlhf", "query": request.query, "prompts": request.prompts}


def letters(job: dict[str, Any]) -> int:
    """How much text a job holds."""
    if job["form"] == "openrlhf":
        return sum(map(len, [*job["query"], *(job["prompts"] or [])]))
    return sum(len(t) for item in job["items"] for key in ("prompt", "response")
               for t in _texts(item[key]))  # fmt: skip


def size(job: dict[str, Any]) -> int:
    """How many conversations."""
    return len(job["query"] if job["form"] == "openrlhf" else job["items"])


def _parsed(kind: type[Any], body: bytes) -> Any:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # of the ways that a field may be given, the one that was followed furthest
        first = max(errors, key=lambda e: len(e["loc"]))
        if first["type"] == "json_invalid":
            raise Refused(400, f"the body is no JSON: {first['msg']}") from None
        # without the types that a union tried: no words of the sender's but the names of keys
        where = ".".join(
            str(p) for p in first["loc"] if p != "str" and not re.search(r"[\[(]", str(p))
        )[:100]
        raise Refused(422, f"{where or 'the body'}: {first['msg']}") from None


def _plain(said: str | list[Turn]) -> Any:
    if isinstance(said, str):
        return said
    return [
        {
            "role": turn.role,
            "content": turn.content
            if isinstance(turn.content, str)
            else "".join(part.text for part in turn.content),
        }
        for turn in said
    ]


def _texts(said: Any) -> list[str]:
    return [said] if isinstance(said, str) else [turn["content"] for turn in said]


def _bound(n: int, name: str, most: int) -> None:
    if n > most:
        raise Refused(
            413, f"{name} has {n} entries and {most} is the most (serve.max_request); send several"
        )


def _check_length(texts: list[str], where: str, max_length: int) -> None:
    length = sum(map(len, texts))
    if length > LETTERS_PER_TOKEN * max_length:
        raise Refused(
            413,
            f"{where} has {length} letters, more than could be {max_length} tokens"
            " (sarm.max_length); shorten it or raise that",
        )
