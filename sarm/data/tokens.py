"""From conversations to tokens: the chat template, one BOS, and the end-of-turn token that a
reward is read at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sarm.config import UserError

Messages = Sequence[Mapping[str, str]]

TEMPLATE_DATE = "26 Jul 2024"
"""Given to chat templates that print a date: Llama 3.1's default; Llama 3.2 would otherwise print
today's.
"""


class Tokenized(NamedTuple):
    """One conversation as tokens."""

    ids: list[int]
    """Up to the reward position: what comes after it cannot change the state there."""
    reward_position: int
    """Of the end-of-turn token that closes the last assistant turn."""
    truncated: bool
    """Whether the oldest tokens were dropped to fit."""
    eot_appended: bool
    """Whether the template left the last turn open."""


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int
) -> Tokenized:
    """Apply the chat template: one BOS, and the end-of-turn token of the last turn as reward
    position.

    An end-of-turn token inside a text does not end it. A turn that the template leaves open, as of
    a response cut short, gets the token appended. Longer than `max_length`, a conversation keeps
    its BOS and its newest tokens.
    """
    return tokenize_conversations(tokenizer, [messages], max_length)[0]


def tokenize_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], max_length: int
) -> list[Tokenized]:
    """`tokenize_conversation` for many at once: the tokenizer shares them out among cores."""
    eot, bos = end_of_turn_id(tokenizer), tokenizer.bos_token_id
    tokenized = []
    for ids in template_ids(tokenizer, conversations):
        last = len(ids) - 1 - ids[::-1].index(eot) if eot in ids else -1
        closed = last >= 0 and _is_blank(tokenizer, ids[last + 1 :])
        ids = ids[: last + 1] if closed else [*ids, eot]
        truncated = len(ids) > max_length
        if truncated:
            first = ids[:1] if ids[0] == bos and max_length > 1 else []
            ids = first + ids[len(ids) - max_length + len(first) :]
        tokenized.append(Tokenized(ids, len(ids) - 1, truncated, not closed))
    return tokenized


def template_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], **template: Any
) -> list[list[int]]:
    """Each conversation's tokens under the chat template, with exactly one BOS where the tokenizer
    has a use for one.

    `template` goes to the template, such as `add_generation_prompt=True`.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; use an instruct"
            " model's tokenizer"
        )
    if not conversations:
        return []
    texts = [
        str(
            tokenizer.apply_chat_template(
                [dict(m) for m in c], tokenize=False, date_string=TEMPLATE_DATE, **template
            )
        )
        for c in conversations
    ]
    # JSON can carry half a surrogate pair, which is no text to a tokenizer.
    texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    # Most templates write the BOS themselves; with special tokens on, tokenising would add a
    # second.
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        rows = [ids if ids[:1] == [bos] else [bos, *ids] for ids in rows]
    return rows


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special token with which the chat template closes an assistant turn; the tokenizer's eos
    where it leaves it open.
    """
    return _end_of_turn_id(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=8)
def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> int:
    ids = template_ids(
        tokenizer, [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    )[0]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = max((i for i, id_ in enumerate(ids) if id_ in special), default=-1)
    if last >= 0 and _is_blank(tokenizer, ids[last + 1 :]):
        return ids[last]
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} ends a turn with no special token and"
            " there is no eos_token; set one"
        )
    return tokenizer.eos_token_id


def _is_blank(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    return not ids or not str(tokenizer.decode(ids)).strip()
