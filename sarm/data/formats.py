"""The forms that preference data come in, each a class: records in, `Row`s out.

To add one, write a class beside these with a name, and what it may be used for; `FORMATS` finds it,
the config takes its name, and docs/data.md has a section on it (a test asks for that).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sarm.config.base import UserError
from sarm.data.fields import (
    Message,
    Messages,
    Record,
    answers_of,
    category_of,
    ending_with_user,
    field,
    is_messages,
    kind_of,
    messages_of,
    text_of,
    texts_of,
    transcript,
    turns_of,
)

NOT_TRAINED_ON = ("policy_eval",)
UNANSWERED = ("ppo", "policy_eval")


class Row(NamedTuple):
    """One record of any format. A row with responses of one label alone is compared with all of
    the other label.
    """

    messages: Messages
    chosen: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    category: str = ""
    kind: str | None = None


class Place(NamedTuple):
    """Where a record stands, and what its source asks for."""

    where: str
    """File and line, for messages."""
    file: Path
    subset: str | None


class Format:
    """A form of data. `read` turns a record into rows, or counts in `missed` why it does not."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...] | None] = None
    """The parts that its prompts may go to; None for all."""
    subsets: ClassVar[bool] = False
    """Whether a source may name one of its subsets."""

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        raise NotImplementedError


class Jsonl(Format):
    """`prompt`, `chosen`, `rejected`; optional `category` and `kind`. Responses are text, a list
    of texts, or messages: those behind the prompt (TRL), or with it, where there is no `prompt`
    (Skywork).
    """

    name = "jsonl"

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        category, kind = category_of(row), kind_of(row, at.where)
        if not (is_messages(row.get("chosen")) and is_messages(row.get("rejected"))):
            prompt = messages_of(row, "prompt", at.where)
            chosen, rejected = (texts_of(row, key, at.where) for key in ("chosen", "rejected"))
            yield Row(prompt, chosen, rejected, category, kind)
            return
        before = messages_of(row, "prompt", at.where) if row.get("prompt") is not None else ()
        ends = []
        for side in ("chosen", "rejected"):
            turns = turns_of(row[side], side, at.where)
            if turns[-1]["role"] != "assistant":
                raise UserError(f"{at.where}: {side!r} must end with the assistant's message")
            # TRL's datasets repeat the prompt before the response or leave it out
            turns = turns if turns[: len(before)] == before else (*before, *turns)
            ends.append((turns[:-1], turns[-1]["content"]))
        (asked, chosen_text), (also, rejected_text) = ends
        if asked != also:
            missed["conversations differ before the last turn"] += 1
            return
        asked = ending_with_user(asked, "chosen", at.where)
        yield Row(asked, (chosen_text,), (rejected_text,), category, kind)


class Prompts(Format):
    """`prompt`; optional `category` and `kind`."""

    name = "prompts"
    parts = UNANSWERED

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        prompt = messages_of(row, "prompt", at.where)
        yield Row(prompt, category=category_of(row), kind=kind_of(row, at.where))


class ShareGpt(Format):
    """`conversations` of `{"from", "value"}`, and `chosen` and `rejected` of the same form for
    their continuation. Without those, the prompt is what comes before the last answer.
    """

    name = "sharegpt"
    roles: ClassVar[dict[str, str]] = {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
    }

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        turns = field(row, "conversations", at.where)
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{at.where}: 'conversations' must be a list of from and value")
        messages = tuple(self._message(turn, at.where) for turn in turns)
        if row.get("chosen") is None and row.get("rejected") is None:
            while messages and messages[-1]["role"] != "user":
                messages = messages[:-1]
            if not messages:
                missed["no turn of the user"] += 1
                return
            yield Row(messages, category=category_of(row), kind=kind_of(row, at.where))
            return
        chosen, rejected = (
            self._message(field(row, side, at.where), at.where)["content"]
            for side in ("chosen", "rejected")
        )
        yield Row(
            ending_with_user(messages, "conversations", at.where),
            (chosen,),
            (rejected,),
            category_of(row),
            kind_of(row, at.where),
        )

    def _message(self, turn: Any, where: str) -> Message:
        if not isinstance(turn, Mapping):
            raise UserError(f"{where}: a turn must be an object with from and value")
        role = self.roles.get(str(field(turn, "from", where)).lower())
        if role is None:
            raise UserError(
                f"{where}: turn from {turn['from']!r}; known are {', '.join(self.roles)}"
            )
        return {"role": role, "content": text_of(turn, "value", where)}


class HelpSteer3(Format):
    """HelpSteer3's preferences, arXiv 2505.11475: `context` (messages), `response1`, `response2`
    and `overall_preference`, below 0 where the first is better.
    """

    name = "helpsteer3"

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        prompt = messages_of(row, "context", at.where)
        first, second = (text_of(row, key, at.where) for key in ("response1", "response2"))
        liking = field(row, "overall_preference", at.where)
        try:
            liking = float(liking)
        except (TypeError, ValueError):
            liking = float("nan")
        if liking == 0 or liking != liking:
            missed["no preference"] += 1
            return
        better, worse = (first, second) if liking < 0 else (second, first)
        yield Row(prompt, (better,), (worse,), category_of(row, "domain"))


class RewardBench2(Format):
    """RewardBench 2 as published: one row per prompt with lists of responses, arXiv 2506.01937."""

    name = "rewardbench2"
    subsets = True

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        if at.subset is not None and row.get("subset") != at.subset:
            missed["other subset"] += 1
            return
        yield Row(
            messages_of(row, "prompt", at.where),
            texts_of(row, "chosen", at.where),
            texts_of(row, "rejected", at.where),
            category_of(row, "subset"),
        )


class RewardBench2Sarm(Format):
    """Upstream SARM's files: pairs for training, or one labelled answer a row for testing. Both
    hold the same 450 prompts.
    """

    name = "rewardbench2_sarm"

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        if "label" not in row:
            yield Row(
                messages_of(row, "prompt", at.where),
                texts_of(row, "chosen", at.where),
                texts_of(row, "rejected", at.where),
            )
            return
        label = row["label"].strip() if isinstance(row["label"], str) else row["label"]
        if label not in ("chosen", "rejected"):
            raise UserError(f"{at.where}: 'label' must be chosen or rejected, not {label!r}")
        asked = messages_of(row, "question", at.where)
        answers = texts_of(row, "answer", at.where)
        yield Row(asked, chosen=answers) if label == "chosen" else Row(asked, rejected=answers)


class RmbPairs(Format):
    """RMB's pairwise records (`chosen`, `reject`), arXiv 2410.09893."""

    name = "rmb_pairs"
    sides: ClassVar[tuple[str, str]] = ("chosen", "reject")

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        path = category_of(row, "category_path") or at.file.name.partition(".")[0]
        category = path.rpartition("/")[2]
        better, worse = (answers_of(row, side, at.where) for side in self.sides)
        yield Row(messages_of(row, "conversation_input", at.where), better, worse, category)


class RmbBestOfN(RmbPairs):
    """RMB's best-of-N records (`bon_best`, `loser_list`)."""

    name = "rmb_bon"
    sides = ("bon_best", "loser_list")


class HhRlhf(Format):
    """Two transcripts that share all but the last assistant turn, arXiv 2204.05862."""

    name = "hh_rlhf"

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        a, b = (transcript(text_of(row, side, at.where)) for side in ("chosen", "rejected"))
        if not a or not b:
            missed["turns of Human and Assistant do not alternate up to an answer"] += 1
        elif a[:-1] != b[:-1]:
            missed["transcripts differ before the last turn"] += 1
        else:
            yield Row(tuple(a[:-1]), (a[-1]["content"],), (b[-1]["content"],))


class XsTest(Format):
    """XSTest, arXiv 2308.01263: prompts, or completions whose human labels `labelled_answers`
    gives. Types that begin with `contrast_` are unsafe, the others look unsafe and are not.
    """

    name = "xstest"
    parts = NOT_TRAINED_ON

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        type_ = text_of(row, "type", at.where)
        kind = "unsafe" if type_.startswith("contrast_") else "safe"
        said = row.get("label")
        if said in ("safe", "unsafe") and said != kind:
            raise UserError(f"{at.where}: type {type_!r} is {kind} and its label says {said}")
        category = type_.removeprefix("contrast_")
        yield Row(messages_of(row, "prompt", at.where), category=category, kind=kind)


class CoCoNot(Format):
    """CoCoNot, arXiv 2407.12043: preference pairs against over-refusal (`coconot_pref`), and
    prompts. What `pref` and `contrast` files ask for should be answered, the rest should not.
    """

    name = "coconot"

    def read(self, row: Record, at: Place, missed: Counter[str]) -> Iterator[Row]:
        paired = row.get("chosen") is not None or row.get("rejected") is not None
        kind = "safe" if paired or "contrast" in at.file.name else "unsafe"
        category = category_of(row, "subcategory", "category")
        prompt = messages_of(row, "prompt", at.where)
        if paired:
            chosen, rejected = (texts_of(row, s, at.where) for s in ("chosen", "rejected"))
            yield Row(prompt, chosen, rejected, category, kind)
        else:
            yield Row(prompt, category=category, kind=kind)


def _all(kind: type[Format]) -> Iterator[type[Format]]:
    for one in kind.__subclasses__():
        yield one
        yield from _all(one)


FORMATS: dict[str, Format] = {kind.name: kind() for kind in _all(Format)}
"""By the name that a config gives."""


# Human labels of XSTest


class LabelledAnswer(NamedTuple):
    """A completion and what people made of it."""

    prompt: str
    answer: str
    kind: str
    refused: bool
    """Wholly or in part."""
    partly: bool


REFUSAL_LABELS = {
    "1_full_compliance": (False, False),
    "2_full_refusal": (True, False),
    "3_partial_refusal": (True, True),
}


def labelled_answer(row: Record, where: str) -> LabelledAnswer:
    """A record of XSTest's completion files. Raises UserError on an unknown label."""
    label = text_of(row, "final_label", where)
    if label not in REFUSAL_LABELS:
        raise UserError(
            f"{where}: 'final_label' must be one of {', '.join(REFUSAL_LABELS)}, not {label!r}"
        )
    type_ = text_of(row, "type", where)
    kind = "unsafe" if type_.startswith("contrast_") else "safe"
    asked, answer = text_of(row, "prompt", where), text_of(row, "completion", where)
    return LabelledAnswer(asked, answer, kind, *REFUSAL_LABELS[label])
