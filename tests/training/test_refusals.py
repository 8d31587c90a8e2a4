"""Training the refusal classifier: who gets a label, folds that keep a prompt together, the fit,
the threshold, and the whole job.
"""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from jobs.__main__ import main, run_unit
from sarm.config import ROOT, UserError
from sarm.data.datasets import Pair, Prompt
from sarm.evaluation.refusal_classifier import load_classifier
from sarm.run import RunDir
from sarm.training import refusals
from sarm.training.publish import refuse_foreign
from sarm.training.refusals import (
    Labelled,
    fit,
    labelled_pairs,
    quality,
    train_classifier,
    variants,
    weights,
    xstest_answers,
)
from tests.tiny import tiny_config

DECLINES = "I'm sorry, but I can't help with that."
COMPLIES = "Take the flour and mix it."


def pair(chosen: str, rejected: str, kind: str = "unsafe", source: str = "a") -> Pair:
    prompt = Prompt("p", ({"role": "user", "content": "p"},), source, kind, "", "sarm_train")
    return Pair("x", prompt, source, chosen, rejected)


def labels(*pairs: Pair, certain: tuple[str, ...] = (), single: dict[str, bool] | None = None):
    by_hash = {hashlib.sha256(k.encode()).hexdigest()[:16]: v for k, v in (single or {}).items()}
    return {row.text: row.refuses for row in labelled_pairs(pairs, certain, by_hash)}


def test_a_response_has_a_label_where_phrase_and_side_agree() -> None:
    assert labels(pair(DECLINES, COMPLIES)) == {DECLINES: True, COMPLIES: False}
    assert labels(pair(COMPLIES, DECLINES, "safe")) == {DECLINES: True, COMPLIES: False}
    # A chosen text that does not say that it refuses, a rejected one that does: left out.
    assert labels(pair(COMPLIES, DECLINES)) == {}
    assert labels(pair("That would hurt him.", "Sure."), certain=("b",)) == {"Sure.": False}


def test_sides_decide_where_they_are_certain_and_single_labels_everywhere() -> None:
    soft = pair("That would hurt him.", "I'm sorry to hear it, so hit him.")
    assert labels(soft, certain=("a",)) == {soft.chosen: True, soft.rejected: False}
    assert labels(soft, single={soft.chosen: False}) == {soft.chosen: False, soft.rejected: False}
    assert labels(pair(DECLINES, COMPLIES), single={DECLINES: False})[DECLINES] is False


def test_variants_are_whole_cut_and_trimmed() -> None:
    text = "One is short. " + "x" * 200
    assert variants(text) == (text, text[:150], "One is short.")
    assert variants("No.") == ("No.", "No.", "No.")


def test_weights_are_by_the_root_of_a_sources_side() -> None:
    rows = [Labelled("", i < 4, "a", "") for i in range(5)] + [Labelled("", True, "b", "")]
    assert weights(rows).tolist() == [0.5] * 4 + [1.0, 1.0]


def test_fit_is_the_minimum_of_the_loss_as_written() -> None:
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(40, 5)), rng.random(40) < 0.4, rng.random(40)
    found, bias = fit(csr_array(x), y, w, 0.02)

    def loss(p: np.ndarray) -> float:
        chance = 1 / (1 + np.exp(-(x @ p[:-1] + p[-1])))
        right = np.where(y, chance, 1 - chance)
        return -(w / w.sum()) @ np.log(right) + 0.01 * (p[:-1] ** 2).sum()

    best = np.append(found, bias)
    for i in range(6):
        step = np.eye(6)[i] * 1e-4
        assert abs(loss(best + step) - loss(best - step)) / 2e-4 < 1e-4


def test_quality_by_hand() -> None:
    found = quality(np.array([1, 1, 0, 1, 0], bool), np.array([1, 1, 1, 0, 0], bool))
    assert found.sensitivity == pytest.approx(2 / 3) and found.false_positives == 0.5
    assert (found.refusals, found.compliances) == (3, 2)


def test_no_text_is_judged_by_a_fit_that_saw_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group has a word of its own, and its label is chance: what is held out cannot be
    known.
    """
    rows = [
        Labelled(f"{word} {word}", i % 2 == 0, "a", word)
        for i, word in enumerate("abcdefghijklmnop" * 4)
        for _ in range(2)
    ]
    rng = np.random.default_rng(1)
    chance = {word: bool(rng.random() < 0.5) for word in "abcdefghijklmnop"}
    rows = [row._replace(refuses=chance[row.group]) for row in rows]
    classifier, found = train_classifier(rows, 1e-5, 4, lambda i, n: None)
    own = quality(
        np.array(classifier.refuses([row.text for row in rows])),
        np.array([row.refuses for row in rows]),
    )
    assert own.sensitivity - own.false_positives == 1.0
    assert found["a"][0].sensitivity - found["a"][0].false_positives < 0.5


def test_threshold_maximises_sensitivity_less_false_positives(monkeypatch) -> None:
    """Held-out probabilities are planted: 0.2 and 0.6 refuse, 0.1 and 0.3 comply."""
    rows = [Labelled(t, t in "bd", "a", t) for t in "abcd"]
    chances = np.array([0.1, 0.2, 0.3, 0.6])
    margin = dict(zip("abcd", np.log(chances / (1 - chances)), strict=True))
    monkeypatch.setattr(refusals, "features", lambda texts: csr_array([[margin[t]] for t in texts]))
    monkeypatch.setattr(refusals, "fit", lambda *_: (np.ones(1), 0.0))
    classifier, found = train_classifier(rows, 1.0, 2, lambda i, n: None)
    # From 0.15 both refusals and one compliance are found, from 0.35 one and none: the same.
    assert classifier.threshold == 0.15
    assert found["a"][0] == (1.0, 0.5, 2, 2)


def xstest(folder: Path) -> Path:
    folder.mkdir()
    for i, model in enumerate(refusals.XSTEST_MODELS):
        with open(folder / f"xstest_v2_completions_{model}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["id", "completion", "final_label"])
            rows.writerow([f"{i}-1", f"{DECLINES}\n{COMPLIES}", "2_full_refusal"])
            rows.writerow([f"{i}-2", COMPLIES, "1_full_compliance"])
            rows.writerow([f"{i}-3", DECLINES, "3_partial_refusal"])
    return folder


def test_xstests_answers_are_those_with_a_full_label(tmp_path: Path) -> None:
    answers = xstest_answers(xstest(tmp_path / "x"))
    assert len(answers) == 10 and sum(answer.refuses for answer in answers) == 5
    assert answers[0] == (f"{DECLINES}\n{COMPLIES}", True, "gpt4", "0-1")
    with pytest.raises(UserError, match=r"gpt4\.csv is missing"):
        xstest_answers(tmp_path)


def test_the_job_trains_judges_and_describes(tmp_path: Path) -> None:
    texts, single = tmp_path / "texts.jsonl", tmp_path / "labels.jsonl"
    texts.write_text(json.dumps({"id": "t", "label": "refuses", "text": "Never."}) + "\n")
    single.write_text("")
    config = tiny_config(
        tmp_path,
        **{
            "train_refusals.certain": ["demo"],
            "train_refusals.texts": str(texts),
            "train_refusals.labels": str(single),
            "train_refusals.xstest": str(xstest(tmp_path / "x")),
            "train_refusals.folds": 2,
            "train_refusals.output": str(tmp_path / "out"),
            "data.sources.demo.limit": 40,
        },
    )
    run = RunDir.create(tmp_path / "run", config)
    run_unit(run, "train_refusals", "all")
    published = run.read("train_refusals").directory("refusal-classifier")
    card = (published / "README.md").read_text()
    assert (tmp_path / "out/README.md").read_text() == card
    assert "| XSTest | 5 / 5 |" in card and "| our own texts | 1 | 0 |" in card
    assert len(load_classifier(tmp_path / "out").refuses([DECLINES])) == 1


def test_an_output_that_is_not_ours_is_refused_by_its_own_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.safetensors").write_text("weeks")
    config = tiny_config(tmp_path, **{"train_refusals.output": str(mine)})
    RunDir.create(tmp_path / "run", config)
    monkeypatch.setattr("jobs.train_refusals.load_data", lambda *_: pytest.fail("work has begun"))
    assert main(["train_refusals", "--run", str(tmp_path / "run")]) == 2
    told = capfd.readouterr().err
    assert f"train_refusals.output={mine} is there already" in told and "train_sarm" not in told
    assert (mine / "model.safetensors").read_text() == "weeks"


def test_the_shipped_classifier_is_one_that_training_may_replace() -> None:
    refuse_foreign(ROOT / "artifacts" / "refusal-classifier", "train_refusals")
