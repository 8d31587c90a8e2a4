"""From conversations to tokens and back, for policy, SARM and judge alike.

    ids = prompt_ids(tokenizer, messages)                     # what a policy answers
    texts = tokenize_conversations(tokenizer, conversations, max_length=4096)   # what a SARM scores

The chat template is the tokenizer's own, under the config's `chat_template_kwargs` and a fixed
date. There is one BOS, and what a text spells is text: `<|eot_id|>` in an answer ends no turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sarm.config import UserError

Messages = Sequence[Mapping[str, str]]

DATE = date(2024, 7, 26)
"""Today, to chat templates that print a date: Llama 3.1's default. Else arms that are trained on
different days would see different prompts.
"""
TEMPLATE_DATE = DATE.strftime("%d %b %Y")
PROBE = "closing words"
"""A response whose end can be found in a rendered conversation."""
DIRECTIVES = {f"%{letter}": DATE.strftime(f"%{letter}") for letter in "aAbBdeHIjmMpSyY"} | {
    "%-d": str(DATE.day),
    "%-m": str(DATE.month),
}


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


def use_template_kwargs(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """The tokenizer, whose chat template is given `kwargs` from now on, such as
    `{"enable_thinking": False}`. They are not saved with it.
    """
    tokenizer.sarm_template_kwargs = dict(kwargs)
    return tokenizer


# A SARM's side


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int
) -> Tokenized:
    """Apply the chat template: one BOS, and the end-of-turn token of the last turn as reward
    position.

    A turn that the template leaves open, as of a response cut short, gets the token appended.
    Longer than `max_length`, a conversation keeps its BOS and its newest tokens. Raises UserError
    where the template refuses it.
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


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special token with which the chat template closes an assistant turn; the tokenizer's eos
    where it leaves it open. Raises UserError where there is neither.
    """
    return _end_of_turn_id(tokenizer, pinned_template(tokenizer))


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


# A policy's side


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The prompt under the chat template, the assistant's turn opened. Raises UserError where the
    template refuses it.
    """
    return template_ids(tokenizer, [messages], add_generation_prompt=True)[0]


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response, ascending: the generation config's, the tokenizer's eos, and
    the special tokens that the chat template puts behind an assistant turn.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    closing = _closing_ids(tokenizer, pinned_template(tokenizer))
    return tuple(
        sorted({int(i) for i in (*ids, tokenizer.eos_token_id, *closing) if i is not None})
    )


@lru_cache(maxsize=8)
def _closing_ids(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> tuple[int, ...]:
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    behind = _rendered(tokenizer, asked).rpartition(PROBE)[2]
    special = {t.content: id_ for id_, t in tokenizer.added_tokens_decoder.items() if t.special}
    return tuple(special[spelled] for spelled in _spelling(tokenizer).findall(behind))


def response_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What the response says, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


# A judge's side


def pair_inputs(
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[str],
    answers: Sequence[str],
    max_length: int,
) -> Any:
    """Questions and answers as a classifier reads them, padded on the tokenizer's side: input ids,
    attention mask and token types as tensors (b, s).
    """
    return tokenizer(
        list(asked),
        list(answers),
        truncation=True,
        max_length=max_length,
        padding=True,
        split_special_tokens=True,
        return_tensors="pt",
    )


# The template


def template_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], **template: Any
) -> list[list[int]]:
    """Each conversation's tokens under the chat template, with exactly one BOS where the tokenizer
    has a use for one.

    `template` goes to the template, such as `add_generation_prompt=True`. Special tokens that a
    text spells become the tokens of their letters. Raises UserError where there is no template or
    it refuses a conversation.
    """
    pinned_template(tokenizer)
    if not conversations:
        return []
    rows: list[list[int]] = [[]] * len(conversations)
    spelling = _spelling(tokenizer)
    plain = []
    for i, messages in enumerate(conversations):
        if any(spelling.search(m["content"]) for m in messages):
            rows[i] = _rendered(tokenizer, messages, as_ids=True, **template)
        else:
            plain.append(i)
    texts = [_rendered(tokenizer, conversations[i], **template) for i in plain]
    if texts:
        # Most templates write the BOS themselves; with special tokens on, tokenising would add a
        # second.
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for i, ids in zip(plain, found, strict=True):
            rows[i] = ids
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        rows = [ids if ids[:1] == [bos] else [bos, *ids] for ids in rows]
        rows = [ids[1:] if ids[:2] == [bos, bos] else ids for ids in rows]
    return rows


def template_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, **template: Any) -> str:
    """The conversation as the chat template writes it. Raises UserError where it refuses it."""
    return str(_rendered(tokenizer, messages, **template))


def special_spelling(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds the spellings of special tokens in a text."""
    return _spelling(tokenizer)


def spelled_special_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> int:
    """How often the texts of a conversation spell a special token."""
    return sum(spelled_in(tokenizer, m["content"]) for m in messages)


def spelled_in(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """How often a text spells a special token: such a policy feigns turns, as no model that reads
    text sees them.
    """
    return len(_spelling(tokenizer).findall(text))


def pinned_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template (the one named `default` of several), on `DATE` whenever it is asked.
    Raises UserError where there is none.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        named = tokenizer.chat_template
        lacks = (
            f"has chat templates {', '.join(sorted(named))} and none named default"
            if isinstance(named, dict)
            else "has no chat template"
        )
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} {lacks}; use an instruct model's tokenizer"
        ) from None
    if "strftime_now" not in template:
        return str(template)
    # A macro of that name goes before transformers' function, which reads the clock.
    filters = "".join(f" | replace({mark!r}, {said!r})" for mark, said in DIRECTIVES.items())
    return (
        "{%- macro strftime_now(format) -%}{{ format" + filters + " }}{%- endmacro -%}" + template
    )


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where there is no chat template, where it leaves out what a user or the
    assistant says, or where it does not open the assistant's turn when asked to, so that a policy
    would write the header itself.
    """
    said = [
        {"role": role, "content": f"{nth} {PROBE}"}
        for nth, role in enumerate(("user", "assistant") * 2)
    ]
    lost = [m for m in said[:2] if m["content"] not in _rendered(tokenizer, said[:2])]
    try:
        text = _rendered(tokenizer, said)
    except UserError:  # more than one question may be more than it takes
        text = None
    if text is not None:
        lost += [m for m in said if m["content"] not in text]
    if lost:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} leaves out or rewrites what"
            f" the {lost[0]['role']} says; use the template that the model was trained with"
        )
    asked = _rendered(tokenizer, said[:1], add_generation_prompt=True)
    answered = _rendered(tokenizer, said[:2])
    opening = answered.partition(said[1]["content"])[0].removeprefix(asked)
    if answered.startswith(asked) and _spelling(tokenizer).search(opening):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} opens no assistant turn under"
            f" add_generation_prompt: {opening!r} would be left to the policy; use the template"
            " that the model was trained with"
        )


def check_system(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the chat template refuses system messages or leaves them out: the arm
    `prompted` would be the base policy.
    """
    said = [{"role": "system", "content": PROBE}, {"role": "user", "content": "a"}]
    if PROBE not in _rendered(tokenizer, said, add_generation_prompt=True):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} leaves system messages out, so the arm"
            " prompted would be the base policy; take it out of evaluate.arms"
        )


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, as_ids: bool = False, **template: Any
) -> Any:
    """The conversation as text, or as ids with what its texts spell taken as text."""
    # JSON can carry half a surrogate pair, which is no text to a tokenizer.
    said = [
        {**m, "content": m["content"].encode("utf-8", "replace").decode("utf-8")} for m in messages
    ]
    how: dict[str, Any] = {
        "date_string": TEMPLATE_DATE,
        **getattr(tokenizer, "sarm_template_kwargs", {}),
        **template,
        "chat_template": pinned_template(tokenizer),
    }
    if as_ids:
        how |= {"tokenize": True, "return_dict": False, "sanitize_control_tokens": True}
    else:
        how |= {"tokenize": False}
    try:
        made = tokenizer.apply_chat_template(said, **how)
    # jinja2's, and what a template's own Python operations raise
    except Exception as error:
        roles = ", ".join(m["role"] for m in messages)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} takes no conversation of roles {roles}"
            f" ({reason}): the one whose last turn begins {messages[-1]['content'][:40]!r}; leave"
            " such rows out or change the template"
        ) from None
    return list(made) if as_ids else str(made)


def _spelling(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    tokens = sorted(
        {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}, key=len
    )
    return re.compile("|".join(map(re.escape, reversed(tokens))) or r"(?!)")


def _is_blank(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    return not ids or not str(tokenizer.decode(ids)).strip()
