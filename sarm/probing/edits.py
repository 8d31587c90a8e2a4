"""Pairs of responses to one prompt that differ by a small edit: what of a text sets a latent off,
where data has such pairs.

    edits = minimal_edits(responses)  # responses: (prompt id, text) of each row
    moved = edit_effects(edits, z)    # z (n,) of one latent: where the edit turned it on or off

The exact effects of `sarm.reward_model.interventions` go from latent to reward; from text to latent
only a change of the text can tell.
"""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LARGEST_SHARE = 0.2
"""An edit is small where at most this share of both responses' words differ."""
ENOUGH = 20
"""With fewer minimal-edit pairs the text -> latent link is not tested, and the cards say so."""


class Edit(NamedTuple):
    """Two rows whose responses are nearly the same."""

    before: int
    after: int
    removed: str
    """the words of `before` that `after` lacks, runs of them apart by ` … `"""
    added: str
    share: float
    """changed words over the words of both"""


def minimal_edits(
    responses: Sequence[tuple[str, str]], largest: float = LARGEST_SHARE
) -> list[Edit]:
    """All pairs of rows with one prompt and responses that differ in at most a share `largest` of
    their words; not in none.

    `before` is the lower row. Words are what white space separates.
    """
    by_prompt: dict[str, dict[str, int]] = {}
    for row, (prompt, response) in enumerate(responses):
        by_prompt.setdefault(prompt, {}).setdefault(response, row)
    found = []
    for rows in by_prompt.values():
        for (a, before), (b, after) in itertools.combinations(rows.items(), 2):
            old, new = a.split(), b.split()
            total = len(old) + len(new)
            # Words that one side has more of differ in any alignment: cheap, and rules out nearly
            # all.
            different = sum(
                ((Counter(old) - Counter(new)) + (Counter(new) - Counter(old))).values()
            )
            if different > largest * total:
                continue
            steps = [
                s
                for s in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
                if s[0] != "equal"
            ]
            share = sum(i2 - i1 + j2 - j1 for _, i1, i2, j1, j2 in steps) / max(total, 1)
            if 0 < share <= largest:
                removed = " … ".join(" ".join(old[i1:i2]) for _, i1, i2, _, _ in steps if i2 > i1)
                added = " … ".join(" ".join(new[j1:j2]) for _, _, _, j1, j2 in steps if j2 > j1)
                found.append(Edit(before, after, removed, added, share))
    return sorted(found)


class EditEffects(NamedTuple):
    """What small edits do to one latent."""

    n: int
    on_either: int
    """edits where the latent fires on at least one side"""
    turned: int
    """edits that turn it on or off"""
    largest: list[int]
    """the edits that move z most, at most five, those that do not move it left out"""


def edit_effects(edits: Sequence[Edit], z: NDArray[np.float64]) -> EditEffects:
    """Of one latent's values on all rows, (n,)."""
    before = np.array([z[e.before] for e in edits])
    after = np.array([z[e.after] for e in edits])
    order = np.argsort(-np.abs(after - before), kind="stable")[:5]
    return EditEffects(
        len(edits),
        int(((before > 0) | (after > 0)).sum()),
        int(((before > 0) != (after > 0)).sum()),
        [int(i) for i in order if after[i] != before[i]],
    )
