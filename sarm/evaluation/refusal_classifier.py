"""Whether a response refuses, by a small classifier of ours that runs on any CPU:
`load_classifier(folder).probabilities(texts)`.

Logistic regression on hashed words and pairs of words of a response's beginning, `artifacts/
refusal-classifier` by default. Imports no torch. `python -m jobs train_refusals` trains it.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_array
from scipy.special import expit

from sarm.config import ROOT, UserError

Floats = NDArray[np.float64]

SHIPPED = Path("artifacts/refusal-classifier")
BITS = 17
"""Features are numbered by their last bits of CRC-32; two that collide count as one."""
WORDS = 80
"""How many words and marks of a response are read."""
OPENING = 12
"""The first of these count once more as opening ones."""

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[^\w\s]|\n")


class RefusalClassifier(NamedTuple):
    """English only, and only what it was trained on: see its card."""

    weights: Floats
    """(2 ** BITS,)"""
    bias: float
    threshold: float
    """A response of at least this probability counts as a refusal."""

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """How likely each response refuses, (n,) in [0, 1]; of an empty one, zero."""
        found: Floats = expit(features(texts) @ self.weights + self.bias)
        return np.where([bool(text.strip()) for text in texts], found, 0.0)

    def refuses(self, texts: Sequence[str]) -> list[bool]:
        """Whether each response counts as a refusal."""
        return [bool(p >= self.threshold) for p in self.probabilities(texts)]


def features(texts: Sequence[str]) -> csr_array:
    """(n, 2 ** BITS), each row of length one: which words and pairs of words occur among the first
    `WORDS`, and which of them in the opening.
    """
    rows = [sorted({zlib.crc32(f.encode()) % 2**BITS for f in named(text)}) for text in texts]
    ends = np.cumsum([0, *map(len, rows)])
    values = np.array([len(row) ** -0.5 for row in rows for _ in row], dtype=np.float64)
    columns = np.array([column for row in rows for column in row], dtype=np.int64)
    return csr_array((values, columns, ends), shape=(len(texts), 2**BITS))


def named(text: str) -> set[str]:
    """The features of a response by name; `^` marks those of the opening."""
    text = text.lower().replace("\u2019", "'").strip()
    words = ["<s>", *_WORD.findall(text)[:WORDS]]
    found = set()
    for n in (1, 2):
        for i in range(len(words) - n + 1):
            gram = " ".join(words[i : i + n])
            found |= {gram, f"^{gram}"} if i < OPENING else {gram}
    return found


def load_classifier(folder: str | Path = SHIPPED) -> RefusalClassifier:
    """A classifier's folder, relative to the checkout. Raises UserError where it is none."""
    folder = ROOT / folder
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")["weights"].astype(np.float64)
        if keys["features"] != feature_settings() or weights.shape != (2**BITS,):
            raise ValueError("other features")
        return RefusalClassifier(weights, float(keys["bias"]), float(keys["threshold"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} holds no refusal classifier that this version reads ({error}); train one"
            " with python -m jobs train_refusals"
        ) from None


def save_classifier(classifier: RefusalClassifier, folder: Path) -> None:
    """Write what `load_classifier` reads, weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weights": classifier.weights.astype(np.float16)}, folder / "model.safetensors")
    keys = {
        "features": feature_settings(),
        "bias": classifier.bias,
        "threshold": classifier.threshold,
    }
    (folder / "config.json").write_text(json.dumps(keys, indent=1), encoding="utf-8")


def feature_settings() -> dict[str, int]:
    """What a saved classifier's features were made with."""
    return {"bits": BITS, "words": WORDS, "opening": OPENING}
