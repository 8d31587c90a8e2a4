"""The pairs a SARM learns from: those of the data, the same cut short, and answers set against
refusals that fit any prompt; their texts, weights and folds.

`cut_pairs` and `refusal_pairs` make the latter. A fold's prompts stand in no pair that trains for
it, whatever was made of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sarm.config import UserError
from sarm.data.datasets import Data, Pair
from sarm.data.endings import trim_to_last_sentence

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CUT = " cut"
"""Added to a source's name for its pairs cut short, which count as a source of their own."""

ANSWERED, REFUSED = "answers over refusals", "refusals over compliance"
"""Sources of the pairs made with refusals that fit any prompt."""


class Texts(NamedTuple):
    """The distinct conversations of some pairs, and which of them each pair compares."""

    messages: list[tuple[dict[str, str], ...]]
    chosen: Tensor
    """(n_pairs,) rows of `messages`"""
    rejected: Tensor
    """(n_pairs,)"""


class Folds(NamedTuple):
    """Two independent ways to deal the pairs' prompts out."""

    outer: Ints
    """(n_pairs,) who judges a pair"""
    inner: Ints
    """(n_pairs,) for choosing the L2 strength among training pairs"""


def cut_pairs(pairs: Sequence[Pair], tokenizer: Any, lengths: tuple[int, int]) -> list[Pair]:
    """Each pair with both responses cut at the same number of tokens, one from `lengths` by the
    hash of its id, and trimmed to the last sentence end; pairs that this leaves alike are left out.
    """
    found = []
    for pair in pairs:
        at = lengths[0] + int(_unit(f"cut:{pair.id}") * (lengths[1] - lengths[0] + 1))
        chosen, rejected = (cut(tokenizer, text, at) for text in (pair.chosen, pair.rejected))
        whole = (chosen, rejected) == (pair.chosen, pair.rejected)
        if chosen.strip() and rejected.strip() and chosen != rejected and not whole:
            found.append(
                pair._replace(
                    id=f"{pair.id}-cut", source=pair.source + CUT, chosen=chosen, rejected=rejected
                )
            )
    return found


def cut(tokenizer: Any, text: str, tokens: int) -> str:
    """A text's first tokens, up to their last sentence end; all of a shorter text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= tokens else trim_to_last_sentence(tokenizer.decode(ids[:tokens]))


def refusal_pairs(
    pairs: Sequence[Pair], refusals: Sequence[str], refuses: Callable[[list[str]], Sequence[bool]]
) -> list[Pair]:
    """What a prompt's response is worth beside a refusal that would fit any prompt.

    Where a safe prompt was answered, the answer is chosen over the refusal; where an unsafe one was
    refused and complied with, the refusal over the compliance. The same refusals stand on both
    sides, so none of them is good or bad by itself.
    """
    answers = refuses([pair.chosen for pair in pairs]), refuses([pair.rejected for pair in pairs])
    found = []
    for pair, chosen_refuses, rejected_refuses in zip(pairs, *answers, strict=True):
        refusal = refusals[int(_unit(f"refusal:{pair.id}") * len(refusals))]
        made = pair._replace(id=f"{pair.id}-refusal")
        if pair.prompt.kind == "safe" and not chosen_refuses:
            found.append(made._replace(source=ANSWERED, rejected=refusal))
        elif pair.prompt.kind == "unsafe" and chosen_refuses and not rejected_refuses:
            found.append(made._replace(source=REFUSED, chosen=refusal))
    return found


def read_refusals(file: Path) -> list[str]:
    """The refusals of a JSONL file that fit any prompt. Raises UserError where there are none."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); correct train_sarm.refusals") from None
    found = [row["text"] for row in rows if row.get("any_prompt")]
    if not found:
        raise UserError(f"{file} has no row with any_prompt; correct train_sarm.refusals")
    return found


def distinct_texts(pairs: Sequence[Pair]) -> Texts:
    """Each (prompt, response) once, in order of first appearance."""
    rows: dict[tuple[str, str], int] = {}
    messages: list[tuple[dict[str, str], ...]] = []
    sides: tuple[list[int], list[int]] = ([], [])
    for pair in pairs:
        for side, response in zip(sides, (pair.chosen, pair.rejected), strict=True):
            key = (pair.prompt.id, response)
            if key not in rows:
                rows[key] = len(messages)
                messages.append((*pair.prompt.messages, {"role": "assistant", "content": response}))
            side.append(rows[key])
    return Texts(messages, torch.tensor(sides[0]), torch.tensor(sides[1]))


def prompt_folds(data: Data, pairs: Sequence[Pair], folds: int) -> Folds:
    """The folds of every pair's prompt: within a source prompts are dealt out evenly, in the order
    of a hash.
    """
    by_source: dict[str, list[str]] = defaultdict(list)
    for prompt in data.prompts:
        by_source[prompt.source].append(prompt.id)

    def dealt(salt: str) -> Ints:
        fold: dict[str, int] = {}
        for ids in by_source.values():
            ids.sort(key=lambda id_: hashlib.sha256(f"{salt}:{id_}".encode()).hexdigest())
            fold |= {id_: rank % folds for rank, id_ in enumerate(ids)}
        return np.array([fold[pair.prompt.id] for pair in pairs])

    return Folds(dealt("fold"), dealt("inner fold"))


def pair_weights(pairs: Sequence[Pair]) -> Floats:
    """What each pair counts in the loss, (n_pairs,), adding up to one: sources count alike, and
    prompts within a source.

    So neither the largest source decides, nor the prompts with the most answers.
    """
    per_prompt = Counter((pair.source, pair.prompt.id) for pair in pairs)
    prompts = Counter(source for source, _ in per_prompt)
    return np.array(
        [1 / (len(prompts) * prompts[p.source] * per_prompt[p.source, p.prompt.id]) for p in pairs]
    )


def _unit(text: str) -> float:
    """A number in [0, 1) by a text's hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
