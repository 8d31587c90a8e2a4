"""Names for latents from any OpenAI-compatible endpoint, scored on texts that the naming did not
see.

    with Endpoint(config.cards.label) as endpoint:
        label = labelled(endpoint, active, silent, held_active, held_silent, held_tokens, seed)

A model reads texts of the discovery part that the latent fires on, beside near misses and random
ones, and says in a line what they share. It, or rather the line, is then scored on texts of the
other parts, in two ways (Paulo et al., arXiv 2410.13928). Detection: which of these texts, half of
which the latent fires on, fit? Fuzzing: in which of these texts, all of which it fires on, are the
tokens marked at which it is active, and not others? Scores are balanced accuracy, 0.5 being chance.
None by default: no text leaves the machine unless the config names an endpoint.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import httpx
import numpy as np

from sarm.config import LabelConfig, UserError

ATTEMPTS = 4
BATCH = 10
"""Texts judged in one request."""
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = 300, 800
"""Of each text what is sent: the beginning of the prompt, the end of the response, where the
reward is read.
"""

EXPLAIN = (
    "A feature of a reward model is active on some texts and silent on others. Each text is a"
    " prompt and the end of a response. Say in one line of at most 25 words what the ACTIVE texts"
    " have in common that the SILENT ones lack. Be specific. Answer with that line alone."
)
DETECT = (
    "A feature of a reward model is described as: {label}\n\nBelow are numbered texts, each a"
    " prompt and the end of a response. Answer with a JSON list of the numbers of the texts that"
    " fit the description, such as [1, 4], or [] for none, and nothing else."
)
FUZZ = (
    "A feature of a reward model is described as: {label}\n\nBelow are numbered texts, in each of"
    " which some words stand between << and >>. In some texts they are the words at which the"
    " feature is active, in the others they are not. Answer with a JSON list of the numbers of the"
    " texts whose marked words fit the description, such as [1, 4], or [] for none, and nothing"
    " else."
)


class Example(NamedTuple):
    prompt: str
    response: str


class Tokens(NamedTuple):
    """A text by token, up to the reward position."""

    tokens: Sequence[str]
    active: Sequence[int]
    """Places at which the latent is kept by TopK and above 0."""


class Endpoint:
    """A chat endpoint. The key comes from the environment variable that the config names, goes
    into a header and nowhere else.
    """

    def __init__(self, config: LabelConfig, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config, self._sleep, self._key = config, sleep, ""
        if config.key_variable is not None:
            self._key = os.environ.get(config.key_variable, "")
            if not self._key:
                raise UserError(
                    f"cards.label.key_variable names {config.key_variable}, which is not set;"
                    " export it, or set it to null for an endpoint without keys"
                )
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(headers=headers, timeout=config.timeout_s)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, system: str, user: str) -> str:
        """The answer's text. Tries again on rate limits, server errors and broken connections;
        then raises UserError.
        """
        body = {
            "model": self.config.model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
        }
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(2.0**attempt)
            try:
                response = self._client.post(
                    f"{self.config.url.rstrip('/')}/chat/completions", json=body
                )
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                return self._content(response)
            problem = f"HTTP {response.status_code}: {' '.join(response.text.split())[:200]}"
            if response.status_code not in (408, 409, 429) and response.status_code < 500:
                break
        raise self._error(problem)

    def _content(self, response: httpx.Response) -> str:
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise self._error(
                f"its answer is no chat completion: {' '.join(response.text.split())[:200]}"
            )
        return content

    def _error(self, problem: str) -> UserError:
        # some servers repeat the key they refuse
        told = problem.replace(self._key, "***") if self._key else problem
        return UserError(
            f"the label endpoint {self.config.url} failed ({told}); correct cards.label, or set it"
            " to null for cards without labels"
        )


def labelled(
    endpoint: Endpoint,
    active: Sequence[Example],
    silent: Sequence[Example],
    held_active: Sequence[Example],
    held_silent: Sequence[Example],
    held_tokens: Sequence[Tokens],
    seed: int,
) -> dict[str, Any]:
    """A label from `active` and `silent` texts, and its scores on the held-out ones by detection
    and by fuzzing; no score where a kind of text lacks. `held_tokens` are those of `held_active`.
    """
    lines = [*(f"ACTIVE\n{told(e)}" for e in active), *(f"SILENT\n{told(e)}" for e in silent)]
    answer = endpoint.ask(EXPLAIN, "\n\n".join(lines)).strip()
    label = " ".join(answer.splitlines()[-1].split())[:300] if answer else ""
    whole = [(told(e), fires) for e, fires in mixed(held_active, held_silent)]
    return {
        "text": label,
        "detection": judged(endpoint, DETECT.format(label=label), whole),
        "fuzzing": judged(endpoint, FUZZ.format(label=label), fuzzed(held_tokens, seed)),
    }


def judged(endpoint: Endpoint, question: str, items: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """How well the endpoint tells the texts that fit, which the items' second says, from others."""
    said: list[bool | None] = []
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        numbered = "\n\n".join(f"TEXT {i}\n{text}" for i, (text, _) in enumerate(batch, 1))
        fitting = numbers_in(endpoint.ask(question, numbered))
        said += [None if fitting is None else i in fitting for i in range(1, len(batch) + 1)]
    return balanced_accuracy(said, [fits for _, fits in items])


def balanced_accuracy(said: Sequence[bool | None], fits: Sequence[bool]) -> dict[str, Any]:
    """Over the readable answers, with the rates and counts behind it."""
    read = [(s, f) for s, f in zip(said, fits, strict=True) if s is not None]
    fitting, others = [s for s, f in read if f], [s for s, f in read if not f]
    hit = sum(fitting) / len(fitting) if fitting else None
    passed = sum(not s for s in others) / len(others) if others else None
    score = (hit + passed) / 2 if hit is not None and passed is not None else None
    return {
        "score": score,
        "true_positive": hit,
        "true_negative": passed,
        "n_fitting": len(fitting),
        "n_others": len(others),
        "unreadable": len(said) - len(read),
    }


def fuzzed(texts: Sequence[Tokens], seed: int) -> list[tuple[str, bool]]:
    """(a text with tokens marked, whether they are the active ones), by turns: in every other text
    the marks are moved together, so that they lie as close to one another and none is right.

    The reward position is never marked, as the latent is active there in every text. Left out are
    texts in which it is active nowhere else, or at so many tokens that marks cannot be moved off
    them.
    """
    rng = np.random.default_rng([seed, 2])
    found: list[tuple[str, bool]] = []
    for text in texts:
        n = len(text.tokens) - 1
        active = {place for place in text.active if place < n}
        moves = [
            moved
            for by in rng.permutation(max(n - 1, 0)) + 1
            if not active & (moved := {(place + int(by)) % n for place in active})
        ]
        if active and moves:
            right = len(found) % 2 == 0
            found.append((marked(text.tokens[:n], active if right else moves[0]), right))
    return found


def marked(tokens: Sequence[str], places: Collection[int]) -> str:
    """The text, each run of these tokens between << and >>."""
    runs = groupby(range(len(tokens)), key=lambda place: place in places)
    parts = ((inside, "".join(tokens[place] for place in run)) for inside, run in runs)
    return "".join(f"<<{text}>>" if inside else text for inside, text in parts)


def mixed(active: Sequence[Example], silent: Sequence[Example]) -> list[tuple[Example, bool]]:
    """Both kinds, each spread evenly over the list, so that every request holds some of either;
    which place tells nothing.
    """
    items = [
        ((i + 0.5) / len(kind), fires, e)
        for kind, fires in ((active, True), (silent, False))
        for i, e in enumerate(kind)
    ]
    # Ties go by the text itself: a fixed order that does not put the active ones first.
    return [
        (e, fires) for _, fires, e in sorted(items, key=lambda item: (item[0], item[2].response))
    ]


def numbers_in(answer: str) -> set[int] | None:
    """The last list of whole numbers in an answer; None where it has none."""
    lists = re.findall(r"\[[\d\s,]*\]", answer)
    return {int(n) for n in re.findall(r"\d+", lists[-1])} if lists else None


def told(example: Example) -> str:
    prompt, response = " ".join(example.prompt.split()), " ".join(example.response.split())
    cut = "…" if len(response) > RESPONSE_CHARACTERS else ""
    return f"Prompt: {prompt[:PROMPT_CHARACTERS]}\nResponse: {cut}{response[-RESPONSE_CHARACTERS:]}"
