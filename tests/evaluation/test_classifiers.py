"""Classifiers of (prompt, response): one pair at a time by hand, and what their labels mean."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from sarm.config import JudgeConfig, UserError
from sarm.evaluation import classifiers
from sarm.evaluation.classifiers import BATCH, Classifier, judge_problem, label_positions
from tests.tiny import llama_config, tiny_tokenizer

PROMPTS = [f"question {i} " * (i + 1) for i in range(5)]
RESPONSES = [f"answer {i} " * (7 - i) for i in range(5)]


def write_classifier(folder: Path, names: list[str], problem: str | None = None) -> Path:
    """A tiny Llama classifier with these labels."""
    torch.manual_seed(0)
    config = llama_config(
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    config.problem_type = problem
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def judge(folder: Path, **labels: str) -> JudgeConfig:
    return JudgeConfig(model=str(folder), dtype="float32", labels=labels)


def logits_of(folder: Path) -> torch.Tensor:
    """(5, labels), one pair at a time."""
    model = LlamaForSequenceClassification.from_pretrained(folder)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        pairs = zip(PROMPTS, RESPONSES, strict=True)
        return torch.cat([model(**tokenizer(p, r, return_tensors="pt")).logits for p, r in pairs])


@pytest.mark.parametrize(
    ("names", "harm"),
    [
        (["safe", "unsafe"], ["unsafe"]),
        (["toxic", "neutral"], ["toxic"]),
        (["insult", "fine", "threat"], ["insult", "threat"]),
        (["not_harmful", "harmful"], ["harmful"]),
        (["nothate", "hate"], ["hate"]),
        (["harmless", "harmful"], ["harmful"]),
        (["LABEL_0", "LABEL_1"], ["LABEL_0"]),
    ],
)
def test_only_what_the_config_maps_to_harm_counts_as_harm(tmp_path, names, harm):
    folder = write_classifier(tmp_path / "judge", names)
    labels = {name: "harm" if name in harm else "harmless" for name in names}
    found = Classifier(judge(folder, **labels), "cpu")(PROMPTS, RESPONSES)
    expected = logits_of(folder).softmax(1)[:, [names.index(name) for name in harm]].sum(1)
    assert found == pytest.approx(expected.numpy(), abs=1e-5)
    assert found.min() > 0 and found.max() < 1


def test_labels_that_may_hold_together_give_the_largest_of_those_of_harm(tmp_path):
    names = ["insult", "fine", "threat"]
    folder = write_classifier(tmp_path / "judge", names, "multi_label_classification")
    given = judge(folder, insult="harm", fine="harmless", threat="harm")
    found = Classifier(given, "cpu")(PROMPTS, RESPONSES)
    each = logits_of(folder).sigmoid()[:, [0, 2]].numpy()
    assert found == pytest.approx(each.max(1), abs=1e-5)
    assert not np.allclose(each.max(1), each.min(1))


def test_one_label_is_a_sigmoid(tmp_path):
    folder = write_classifier(tmp_path / "judge", ["harmful"])
    found = Classifier(judge(folder, harmful="harm"), "cpu")(PROMPTS, RESPONSES)
    assert found == pytest.approx(logits_of(folder)[:, 0].sigmoid().numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ({"hate": "harm"}, "labels nothate that the config does not map"),
        ({"hate": "harm", "nothate": "harmless", "other": "harm"}, "no label other"),
        ({"hate": "harm", "nothate": "harm"}, "every label to harm"),
        ({"hate": "harmless", "nothate": "harmless"}, "no label to harm"),
    ],
)
def test_labels_are_mapped_each_by_name(tmp_path, labels, complaint):
    folder = write_classifier(tmp_path / "judge", ["nothate", "hate"])
    with pytest.raises(UserError, match=complaint):
        Classifier(judge(folder, **labels), "cpu")


def test_a_judge_needs_a_map_of_known_words():
    for labels in ({}, {"hate": "bad"}):
        with pytest.raises(ValidationError, match="labels"):
            JudgeConfig(model="x", labels=labels)


def test_a_tokenizer_without_pad_token_and_texts_beyond_the_models_positions(tmp_path):
    folder = write_classifier(tmp_path / "padless", ["safe", "unsafe"])
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    given = judge(folder, safe="harmless", unsafe="harm")
    expected = logits_of(folder).softmax(1)[:, 1].numpy()
    assert Classifier(given, "cpu")(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5)

    names = {0: "safe", 1: "unsafe"}
    short = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        type_vocab_size=2,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    torch.manual_seed(0)
    BertForSequenceClassification(short).save_pretrained(tmp_path / "short")
    endless = tiny_tokenizer()
    endless.model_max_length = 10**30
    endless.save_pretrained(tmp_path / "short")
    found = Classifier(judge(tmp_path / "short", safe="harmless", unsafe="harm"), "cpu")(
        ["p"], ["long " * 500]
    )
    assert np.isfinite(found).all()


def test_labels_that_say_nothing_in_whole_words(tmp_path):
    folder = write_classifier(tmp_path / "judge", ["a", "b", "c"])
    for labels, said in (
        (
            {"a": "harm"},
            "has labels b, c that the config does not map; give each of a, b, c a meaning under"
            " labels",
        ),
        (
            {"a": "harm", "b": "harm", "c": "harmless", "x": "harm", "y": "harm"},
            "has no label x, y, which the config maps; give each of a, b, c a meaning under labels",
        ),
        (
            {"a": "harm", "x": "harm"},
            "has labels b, c that the config does not map; give each of a, b, c a meaning under"
            " labels",
        ),
    ):
        assert judge_problem(judge(folder, **labels)) == f"{folder} {said}"
    for meaning, which in (("harm", "every label"), ("harmless", "no label")):
        problem = judge_problem(judge(folder, **dict.fromkeys("abc", meaning)))
        assert problem == f"{folder}: labels maps {which} to harm; it then tells nothing apart"
    fine = judge(folder, a="harm", b="harmless", c="harm")
    assert judge_problem(fine) is None and label_positions(fine) == ([0, 2], False)
    one = write_classifier(tmp_path / "one", ["bad"])
    assert label_positions(judge(one, bad="harm")) == ([0], True)
    several = write_classifier(tmp_path / "several", ["a", "b"], "multi_label_classification")
    assert label_positions(judge(several, a="harmless", b="harm")) == ([1], True)


def test_more_texts_than_go_at_once_are_all_read_and_what_is_not_finite_is_told(tmp_path):
    """One at a time and 16 at a time; no responses at all; and a model whose scores are NaN."""
    folder = write_classifier(tmp_path / "judge", ["safe", "unsafe"])
    made = Classifier(judge(folder, safe="harmless", unsafe="harm"), "cpu")
    asked, said = [f"q {i}" * (i % 3 + 1) for i in range(35)], [f"a {i}" for i in range(35)]
    found = made(asked, said)
    alone = np.concatenate([made([q], [a]) for q, a in zip(asked, said, strict=True)])
    assert found == pytest.approx(alone, abs=1e-5) and found.dtype == np.float64
    assert len(set(found.round(6).tolist())) > 30
    assert made([], []).shape == (0,) and BATCH == 16
    with torch.no_grad():
        made.model.score.weight.fill_(float("nan"))
    with pytest.raises(UserError) as refused:
        made(asked[:1], said[:1])
    assert str(refused.value) == (
        f"{folder} gives a score that is not finite; set its dtype to float32"
    )


def test_a_classifier_is_opened_at_its_revision_and_in_its_dtype(tmp_path, monkeypatch):
    folder = write_classifier(tmp_path / "judge", ["safe", "unsafe"])
    asked = []

    def opened(path, dtype):
        asked.append((path, dtype))
        return SimpleNamespace(to=lambda device: f"on {device}"), "tokenizer", 99

    monkeypatch.setattr(classifiers, "local_model", lambda *given: asked.append(given) or folder)
    monkeypatch.setattr(classifiers, "open_judge", opened)
    given = JudgeConfig(
        model="a/b", revision="v2", dtype="bfloat16", labels={"safe": "harmless", "unsafe": "harm"}
    )
    made = Classifier(given, "dev")
    assert asked == [("a/b", "v2"), ("a/b", "v2"), (folder, "bfloat16")]
    assert (made.name, made.device, made.model, made.tokenizer, made.max_length) == (
        "a/b",
        "dev",
        "on dev",
        "tokenizer",
        99,
    )
