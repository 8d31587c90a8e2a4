"""Conversations back from the text that a chat template made of them: `Transcripts(tokenizer)`.

OpenRLHF sends what its policy read and wrote as one text. The template is asked once how it opens
and closes turns; a text that renders to itself again was read right, any other is refused.
`python -m pytest tests/serving/test_transcripts.py`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sarm.config import UserError
from sarm.data.conversations import TEMPLATE_DATE, special_spelling, template_text

Message = dict[str, str]
SYSTEM, USER, ASSISTANT, LAST = (f"sentinel {i} of this template" for i in range(4))
TAIL = 64
"""Letters of a prompt's end by which it is found again where its beginning was cut off."""


class Said(NamedTuple):
    """A transcript taken apart."""

    prompt: list[Message]
    response: str
    """Without special tokens and outer white space, as `response_text` has it."""
    ended: bool
    """Whether it closes with one of the policy's stop tokens."""


class Transcripts:
    """Reads the texts of one policy. Raises UserError where its template has no form to read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = tuple(stop_ids)
        self.special = special_spelling(tokenizer)
        self.stops = tuple(str(tokenizer.decode([id_])) for id_ in stop_ids)
        middle = [(USER, "user"), (ASSISTANT, "assistant"), (LAST, "user")]
        plain = self._cut(middle)
        self.user_to_assistant, self.assistant_to_user, self.opening = plain[1:]
        self.starts = [(plain[0], False)]
        try:
            with_system = self._cut([(SYSTEM, "system"), *middle])
        except UserError:  # a template without system turns
            self.system_to_user = ""
        else:
            self.system_to_user = with_system[1]
            self.starts.append((with_system[0], True))

    def read(self, query: str, prompt: str | None) -> Said:
        """A prompt and its response as conversation and text. Raises UserError."""
        if prompt is None:
            at = query.rfind(self.opening)
            if at < 0:
                raise UserError(
                    "ends in no assistant turn under the chat template of"
                    f" {self.tokenizer.name_or_path}; send prompts beside query, or serve with the"
                    " config of the policy that is trained"
                )
            prompt = query[: at + len(self.opening)]
        rest = self._response(query, prompt)
        ended = rest.rstrip().endswith(self.stops) if self.stops else False
        return Said(self.prompt(prompt), self.special.sub("", rest).strip(), ended)

    def prompt(self, text: str) -> list[Message]:
        """A rendered prompt's messages; text without special tokens is a user's turn. Raises
        UserError.
        """
        for start, has_system in self.starts:
            if (rest := self._without_start(text, start)) is None:
                continue
            messages = self._turns(rest, has_system)
            if messages and self._renders(messages, start + rest):
                return messages
        if not self.special.search(text):
            return [{"role": "user", "content": text}]
        raise UserError(
            "has a prompt that is no conversation with an opened assistant turn under the chat"
            f" template of {self.tokenizer.name_or_path}; serve with the config of the policy that"
            " is trained"
        )

    def _cut(self, turns: Sequence[tuple[str, str]]) -> list[str]:
        """What the template writes before, between and after the turns."""
        messages = [{"role": role, "content": content} for content, role in turns]
        text, found = template_text(self.tokenizer, messages, add_generation_prompt=True), []
        for content, _ in turns:
            before, there, text = text.partition(content)
            if not there:
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} leaves out turns, so"
                    " nothing can be read back from its texts"
                )
            found.append(before)
        return [*found, text]

    def _without_start(self, text: str, start: str) -> str | None:
        """Behind the start; the day that a template prints may be another."""
        day = re.escape(TEMPLATE_DATE)
        pattern = re.escape(start).replace(day, r"\d{1,2} \w{3,9} \d{4}")
        found = re.match(pattern, text)
        return None if found is None else text[found.end() :]

    def _turns(self, text: str, has_system: bool) -> list[Message]:
        if not text.endswith(self.opening):
            return []
        text, messages = text[: len(text) - len(self.opening)], []
        if has_system:
            content, there, text = text.partition(self.system_to_user)
            if not there:
                return []
            messages.append({"role": "system", "content": content})
        role = "user"
        while True:
            between = self.user_to_assistant if role == "user" else self.assistant_to_user
            content, there, text = text.partition(between)
            messages.append({"role": role, "content": content})
            if not there:
                return messages if role == "user" else []
            role = "assistant" if role == "user" else "user"

    def _renders(self, messages: list[Message], text: str) -> bool:
        again: Any = template_text(self.tokenizer, messages, add_generation_prompt=True)
        return bool(again == text)

    def _response(self, query: str, prompt: str) -> str:
        """What follows the prompt. Its beginning may have been cut off to fit, and decoding may
        have changed its white space.
        """
        if query.startswith(prompt):
            return query[len(prompt) :]
        tail = prompt[-TAIL:]
        if len(prompt) > TAIL and (at := query.find(tail)) >= 0:
            end = at + len(tail)
            if prompt.endswith(query[:end]):
                return query[end:]
        i = 0
        for letter in prompt:
            if letter.isspace():
                continue
            while i < len(query) and query[i].isspace():
                i += 1
            if i == len(query) or query[i] != letter:
                raise UserError(
                    "does not begin with its prompt; send the prompt as the policy read it, or"
                    " leave prompts out"
                )
            i += 1
        return query[i:]
