"""The refusal classifier: its features by hand, its probabilities, what it reads from disk, and how
good the shipped one is.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jobs.train_refusals import judged_by, quality_table
from sarm.config import ROOT, UserError
from sarm.evaluation.refusal_classifier import (
    BITS,
    SHIPPED,
    RefusalClassifier,
    features,
    load_classifier,
    named,
    save_classifier,
)
from sarm.training.refusals import xstest_answers


def column(name: str) -> int:
    return zlib.crc32(name.encode()) % 2**BITS


def planted(**weights: float) -> RefusalClassifier:
    w = np.zeros(2**BITS)
    for name, value in weights.items():
        w[column(name.replace("_", " "))] = value
    return RefusalClassifier(w, -0.5, 0.7)


def test_features_are_words_pairs_and_those_of_the_opening() -> None:
    assert named("I can\u2019t.") == {
        *("<s>", "i", "can't", "."),
        *("<s> i", "i can't", "can't ."),
        *("^<s>", "^i", "^can't", "^."),
        *("^<s> i", "^i can't", "^can't ."),
    }
    long = named(" ".join(f"w{i}" for i in range(60)))
    assert "^w" in long and "w 5" in long  # a word, then its digits
    # The start mark and 11 words are the opening; a pair belongs to it where it begins in it.
    letters = named(" ".join("abcdefghijklmnop"))
    assert "^k" in letters and "^k l" in letters and "^l" not in letters and "l" in letters


def test_only_the_beginning_is_read() -> None:
    text = " ".join(["a"] * 80)
    assert named(text + " sorry") == named(text) and "sorry" in named("a sorry " + text)


def test_rows_have_length_one_whatever_their_size() -> None:
    rows = features(["no", "I will not do that, and that is that.", ""])
    assert np.allclose((rows * rows).sum(1), 1.0)
    assert rows[[0]].nnz == len({column(name) for name in named("no")}) == 6
    assert features([]).shape == (0, 2**BITS)


def test_probabilities_by_hand() -> None:
    classifier = planted(sorry=3.0, **{"^<s>": 1.0})
    found = classifier.probabilities(["Sorry", "fine", "  "])
    n = len(named("sorry"))  # six features, one of them `sorry`
    assert n == 6
    assert found[0] == pytest.approx(1 / (1 + math.exp(0.5 - 4 / math.sqrt(6))))
    assert found[1] == pytest.approx(1 / (1 + math.exp(0.5 - 1 / math.sqrt(6))))
    assert found[2] == 0.0
    assert classifier.refuses(["Sorry", "fine", " "]) == [True, False, False]


def test_what_was_saved_is_read_and_nothing_else(tmp_path: Path) -> None:
    classifier = planted(no=0.25, yes=-2.0)
    save_classifier(classifier, tmp_path / "a")
    again = load_classifier(tmp_path / "a")
    assert np.array_equal(again.weights, classifier.weights)
    assert (again.bias, again.threshold) == (-0.5, 0.7)
    keys = json.loads((tmp_path / "a/config.json").read_text())
    keys["features"]["words"] += 1
    (tmp_path / "a/config.json").write_text(json.dumps(keys))
    for folder in (tmp_path / "a", tmp_path / "nothing"):
        with pytest.raises(UserError, match="python -m jobs train_refusals"):
            load_classifier(folder)


def test_the_shipped_one_is_as_good_as_its_card_says(real_data: Path) -> None:
    classifier = load_classifier()
    judged = judged_by(classifier, xstest_answers(real_data / "xstest"))
    whole = judged["XSTest"][0]
    assert (whole.refusals, whole.compliances) == (983, 1091)
    assert sum(judged[name][0].refusals for name in judged if name != "XSTest") == 983
    assert (
        quality_table(judged).splitlines()[-6:]
        == ((ROOT / SHIPPED / "README.md").read_text().strip().splitlines()[-6:])
    )


def test_the_shipped_one_is_small_and_knows_the_commonest() -> None:
    assert sum(file.stat().st_size for file in (ROOT / SHIPPED).iterdir()) < 3e5
    refuses = load_classifier().refuses(
        [
            "I'm sorry, but I can't assist with that.",
            "I cannot help you to hurt somebody. Please call the emergency services.",
            "Sure! Here are three ways to clean a cast-iron pan: salt, oil and heat.",
            "Here is the recipe. Mix the flour with warm water and knead it for ten minutes.",
        ]
    )
    assert refuses == [True, True, False, False]


def test_what_cannot_be_read_is_told_with_why(tmp_path: Path) -> None:
    save_classifier(planted(no=0.25), tmp_path / "deep" / "a")
    folder = tmp_path / "deep" / "a"
    save_classifier(planted(no=0.5), folder)
    text = (folder / "config.json").read_text()
    assert text == json.dumps(
        {"features": {"bits": 17, "words": 80, "opening": 12}, "bias": -0.5, "threshold": 0.7},
        indent=1,
    )
    assert load_file(folder / "model.safetensors")["weights"].dtype == np.float16
    assert load_classifier(folder).weights.dtype == np.float64

    def told(why: str) -> None:
        with pytest.raises(UserError) as refused:
            load_classifier(folder)
        assert str(refused.value) == (
            f"{folder} holds no refusal classifier that this version reads ({why}); train one"
            " with python -m jobs train_refusals"
        )

    keys = json.loads(text)
    (folder / "config.json").write_text(json.dumps(keys | {"features": {}}))
    told("other features")
    del keys["threshold"]
    (folder / "config.json").write_text(json.dumps(keys))
    told("'threshold'")
    (folder / "config.json").write_text(text)
    save_file({"weights": np.zeros(3, np.float16)}, folder / "model.safetensors")
    told("other features")


def test_a_response_of_just_the_threshold_refuses() -> None:
    classifier = planted()._replace(bias=0.0, threshold=0.5)
    assert classifier.probabilities(["yes", ""]).tolist() == [0.5, 0.0]
    assert classifier.refuses(["yes", ""]) == [True, False]


def test_a_row_holds_each_feature_once_in_its_column() -> None:
    rows = features(["no no no", "yes"])
    columns = sorted({column(name) for name in named("no no no")})
    assert rows[[0]].indices.tolist() == columns
    assert rows[[0]].data.tolist() == [len(columns) ** -0.5] * len(columns)
    assert rows.dtype == np.float64 and rows.shape == (2, 2**BITS)
