"""A SARM beside its card: figures as the obvious code has them, and each way of opening it wrong
found by what it does.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.__main__ import main
from jobs.check_sarm import sentence
from sarm.config import ROOT, load_config
from sarm.data.conversations import Tokenized
from sarm.evaluation import sarm_check
from sarm.evaluation.sarm_check import (
    Facts,
    Found,
    compared,
    likeliest,
    measure,
    other_ways,
    samples,
    tolerances,
    with_bos,
)
from sarm.hub import local_model
from sarm.records import Benchmark, SarmCard, SarmCheck
from sarm.reward_model.model import load_sarm
from sarm.run import RunDir, file_sha256
from slurm.dag import Node, tasks
from tests.tiny import CHAT_TEMPLATE, tiny_config, write_tiny_sarm

PROMPTS = 40
CONFIG = {
    "data.sources.demo.limit": None,
    "check_sarm.prompts": PROMPTS,
    "sarm.max_length": 1024,
    "data.sources.demo.split": {"discovery": 1.0},
}


def fitted(folder: Path) -> Path:
    """A tiny SARM with a head that tells the demo's pairs apart, and the card of what it does."""
    sarm = write_tiny_sarm(folder / "models" / "sarm", d_sae=128, k=16)
    config = tiny_config(folder, **CONFIG)
    given, _ = samples(config, None)
    model, tokenizer = load_sarm(config.sarm, "cpu")
    items = given[0].items
    texts = [(*i.messages, {"role": "assistant", "content": r}) for i in items for r in i.responses]
    encoded = sarm_check.encode_texts(
        model, tokenizer, texts, extra_ranks=0, tokens_per_batch=4096, max_length=1024
    )
    z = torch.zeros(len(texts), 128).scatter(1, encoded.indices.long(), encoded.values).numpy()
    wanted = np.array(
        [1.0 if n < i.right else -1.0 for i in items for n in range(len(i.responses))]
    )
    # one answer against another to the same question
    head = np.linalg.lstsq(z[::2] - z[1::2], wanted[::2] - wanted[1::2], rcond=1e-4)[0]
    tensors = load_file(sarm / "model.safetensors")
    tensors["score.weight"] = torch.from_numpy(head).float()[None]
    save_file(tensors, sarm / "model.safetensors", metadata={"format": "pt"})
    run = folder / "measured"
    RunDir.create(run, tiny_config(folder, **CONFIG, **{"check_sarm.measure": True}))
    assert main(["check_sarm", "--run", str(run)]) == 0
    card = json.loads(RunDir.open(run).read("check_sarm").path("card.json").read_text())
    card["head"] = {str(i): f"{head[i]:.3g}" for i in np.argsort(-abs(head))[:3]}
    (sarm / "card.json").write_text(json.dumps(card))
    return sarm


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose models/sarm has a card of its own figures."""
    folder = tmp_path_factory.mktemp("fitted")
    fitted(folder)
    return folder


@pytest.fixture
def own(opened: Path, tmp_path: Path) -> Path:
    """A copy of the SARM and its policy, to be spoilt."""
    shutil.copytree(opened / "models", tmp_path / "models")
    return tmp_path


def check(folder: Path, **changes: Any) -> tuple[int, Path]:
    run = folder / "run"
    card = {"check_sarm.card": str(folder / "models" / "sarm" / "card.json")}
    RunDir.create(run, tiny_config(folder, **CONFIG, **(card | changes)))
    return main(["check_sarm", "--run", str(run)]), run


def test_a_sarm_as_published_passes_and_each_figure_is_shown(
    own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, run = check(own)
    assert code == 0
    found = SarmCheck.read(RunDir.open(run).read("check_sarm").path("check.json"))
    assert found.verdict == "as published" and not any(row["off"] for row in found.rows)
    assert {"k", "d_sae", "layers", "Demo: pair accuracy", "Demo: FVU", "Demo: mean k"} <= {
        row["what"] for row in found.rows
    }
    accuracy = next(row for row in found.rows if row["what"] == "Demo: pair accuracy")
    assert accuracy["found"] > 0.85 and accuracy["prompts"] == PROMPTS
    assert "ok  Demo: pair accuracy: " in capfd.readouterr().out
    card = own / "models" / "sarm" / "card.json"
    assert RunDir.open(run).read("check_sarm").manifest.inputs[f"/{card}"] == file_sha256(card)


def spoil_k(folder: Path) -> None:
    file = folder / "models" / "sarm" / "config.json"
    keys = json.loads(file.read_text())
    keys["sarm_param"]["sae_k"] = 4
    file.write_text(json.dumps(keys))


def spoil_template(folder: Path) -> None:
    (folder / "models" / "sarm" / "chat_template.jinja").write_text(
        CHAT_TEMPLATE.replace("<|start_header_id|>", "### ").replace("<|end_header_id|>", ":")
    )


def spoil_head(folder: Path) -> None:
    """What rounding the head to bfloat16 does."""
    file = folder / "models" / "sarm" / "model.safetensors"
    tensors = load_file(file)
    tensors["score.weight"] = tensors["score.weight"].bfloat16().float()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "first"),
    [
        (spoil_k, "config.json gives k 4 where the card has 16"),
        (spoil_template, "the chat template is another one than the card's"),
    ],
    ids=["k", "template"],
)
def test_a_sarm_opened_otherwise_stops_with_the_likeliest_cause_first(
    spoil: Any, first: str, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(own)
    code, run = check(own)
    assert code == 2 and RunDir.open(run).manifest("check_sarm") is None
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"opened as it was trained: {first}" in told and "check_sarm.off=warn" in told
    code, run = check(own, **{"check_sarm.off": "warn"})
    assert code == 0 and "warning: " in capfd.readouterr().err
    assert SarmCheck.read(RunDir.open(run).read("check_sarm").path("check.json")).verdict == "off"


def test_a_head_that_was_rounded_is_off_in_its_digits(
    own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil_head(own)
    assert check(own)[0] == 2
    assert "head weight of" in capfd.readouterr().err


def spoilt_reading(how: str) -> Any:
    """`tokenize_conversations` as other code has it: two BOS, or pooling at the first end of turn,
    where the pad is one.
    """
    right = sarm_check.tokenize_conversations

    def tokenize(tokenizer: Any, *given: Any) -> list[Tokenized]:
        found = right(tokenizer, *given)
        if how == "two BOS":
            return [with_bos(text, tokenizer.bos_token_id, 2) for text in found]
        eot = tokenizer.eos_token_id
        cut = [text.ids[: text.ids.index(eot) + 1] for text in found]
        return [t._replace(ids=ids) for t, ids in zip(found, cut, strict=True)]

    return tokenize


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("two BOS", "with one BOS these figures are as published"),
        ("first end of turn", "not ruled out: the TopK flag, the number of BOS tokens"),
    ],
)
def test_a_reading_that_is_another_one_is_found_by_trying(
    how: str, says: str, own: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(sarm_check, "tokenize_conversations", spoilt_reading(how))
    asked = []

    def ways(now: int, has: bool) -> dict[str, Any]:
        """What is tried next is tried with the tokens as they should be."""
        asked.append(now)
        return {"no BOS": {"bos": 0}, "one BOS": {"bos": 1}} if has else {}

    monkeypatch.setattr(sarm_check, "other_ways", ways)
    assert check(own)[0] == 2
    assert says in capfd.readouterr().err
    assert asked == [1], "the template's own"


def test_figures_are_those_of_the_obvious_code(own: Path) -> None:
    config = tiny_config(own, **CONFIG)
    given, missing = samples(config, None)
    assert missing == [] and len(given[0].items) == PROMPTS
    model, tokenizer = load_sarm(config.sarm, "cpu")
    (measured,) = measure(model, tokenizer, given, config.sarm)
    found = measured.benchmark
    dense = measure(model, tokenizer, given, config.sarm, topk=False)[0].benchmark
    right, dense_right, errors, targets, negative = [], [], [], [], 0
    for item in given[0].items:
        rewards, on_all = [], []
        for response in item.responses:
            said = [*item.messages, {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
                h = (hidden - hidden.mean()) / (hidden.std() + 1e-6)
                a = model.sae.encoder.weight @ (h - model.sae.pre_bias) + model.sae.latent_bias
                z = torch.where(a >= a.topk(16).values[-1], a, 0.0)
                rewards.append(float(z @ model.head_weight))
                on_all.append(float(a @ model.head_weight))
                errors.append(model.sae.decoder.weight @ z + model.sae.pre_bias - h)
                targets.append(h)
                negative += int((z < 0).sum())
        right.append(rewards[0] > rewards[1])
        dense_right.append(on_all[0] > on_all[1])
    assert found.pair_accuracy == pytest.approx(np.mean(right))
    assert dense.pair_accuracy == pytest.approx(np.mean(dense_right))
    states = torch.stack(targets)
    fvu = torch.stack(errors).square().sum() / (states - states.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(fvu), rel=1e-4)
    squared, variance = (
        torch.stack(errors).square().sum(1),
        (states - states.mean(0)).square().sum(1),
    )
    spread = (squared - fvu * variance).square().sum().sqrt() / variance.sum()
    assert measured.fvu_error == pytest.approx(float(spread), rel=1e-3)
    assert (found.mean_k, found.best_of_n) == (16.0, None)
    assert found.negative == pytest.approx(negative / (2 * PROMPTS * 16))


def test_every_subset_of_rewardbench_2_is_measured_whichever_the_source_reads(own: Path) -> None:
    rows = [
        {
            "id": f"ref:{n}" if subset == "Ties" else f"{subset}-{n}",
            "prompt": f"Question {n}?",
            "chosen": ["No, I will not."],
            "rejected": ["Yes.", "Sure, here.", "Of course."],
            "subset": subset,
        }
        for subset, many in (("Safety", 5), ("Math", 3), ("Ties", 2))
        for n in range(many)
    ]
    pd.DataFrame(rows).to_parquet(own / "test.parquet")
    source = {
        "format": "rewardbench2",
        "label": "RB2",
        "path": str(own / "test.parquet"),
        "subset": "Safety",
        "split": {"discovery": 1.0},
    }
    config = tiny_config(own, **CONFIG, **{"data.sources.rb2": source})
    card = SarmCard.read(ROOT / "configs" / "cards" / "llama-sarm-4b.json")
    given, missing = samples(config, card)
    counts = {s.benchmark.label: len(s.items) for s in given}
    assert counts == {"RewardBench 2 Math": 3, "RewardBench 2 Safety": 5, "RewardBench 2 Ties": 2}
    assert missing == [f"RewardBench 2 {s}" for s in ("Factuality", "Precise IF", "Focus")]
    assert [s.benchmark for s in sarm_check._held("rb2", config.data.sources["rb2"], None)] == [
        Benchmark(
            label=f"RewardBench 2 {subset}",
            format="rewardbench2",
            subset=subset,
            sha256=file_sha256(own / "test.parquet"),
        )
        for subset in ("Safety", "Math", "Ties")
    ]
    model, tokenizer = load_sarm(config.sarm, "cpu")
    found = {f.benchmark.subset: f.benchmark for f in measure(model, tokenizer, given, config.sarm)}
    assert found["Safety"].best_of_n in (0.0, 1.0), "the same answers to like questions"
    assert 0 <= (found["Safety"].pair_accuracy or 0) <= 1


@pytest.mark.parametrize(
    ("form", "subset", "score"),
    [
        ("rewardbench2", "Ties", 0.15),
        ("rewardbench2", "Math", 0.5),
        ("rewardbench2", None, None),
        ("jsonl", "Math", None),
    ],
)
def test_figures_of_a_subset_have_the_score_of_its_kind(
    form: str, subset: str | None, score: float | None
) -> None:
    """One question of two is answered right: a score of 0.5, and in Ties 0.3 of that where no
    question has several right answers.
    """
    items = [sarm_check.Item(f"ref:{n}", (), ("no", "yes", "sure"), 1) for n in range(2)]
    benchmark = Benchmark(label="Own", format=form, subset=subset)
    model: Any = SimpleNamespace(k=2, sae=SimpleNamespace(decoder=None))
    values = torch.tensor([[2.0, -1.0, -9.0], [1.0, 0.0, -9.0]])
    encoded: Any = SimpleNamespace(values=values, states=torch.zeros(2, 4))
    found = sarm_check._figures(
        model, sarm_check.Sample(benchmark, items), encoded, [2.0, 1.0, 0.0, 0.0, -1.0, 1.0]
    )
    assert found.benchmark == benchmark.model_copy(
        update={
            "prompts": 2,
            "pair_accuracy": 0.75,
            "best_of_n": score,
            "fvu": None,
            "mean_k": 1.5,
            "negative": 0.25,
        }
    )
    assert math.isnan(found.fvu_error)


def facts(**changes: Any) -> Facts:
    known = Facts(65536, 192, 16, "bfloat16", "aa", False, lambda latent: -8.7742e-4)
    return known._replace(**changes)


def found(subset: str, score: float, prompts: int = 450) -> Found:
    benchmark = Benchmark(
        label=subset, format="rewardbench2", subset=subset, prompts=prompts, best_of_n=score
    )
    return Found(benchmark, math.nan)


PUBLISHED = SarmCard(
    source="a card",
    d_sae=65536,
    k=192,
    layers=16,
    head={"17289": "-8.77e-4"},
    overall=0.7379,
    benchmarks=[
        Benchmark(label=s, format="rewardbench2", subset=s, best_of_n=p)
        for s, p in (("Safety", 0.9178), ("Focus", 0.9556))
    ],
)


def test_a_share_may_be_off_by_three_of_its_standard_errors() -> None:
    error = 3 * math.sqrt(0.9178 * 0.0822 / 450)
    assert tolerances(0.9178, 450, math.nan)["best_of_n"] == pytest.approx(error)
    assert tolerances(0.0, 50, math.nan)["negative"] == pytest.approx(3 / 50)
    assert tolerances(0.1, 50, 0.004)["fvu"] == pytest.approx(0.012 + 0.002)
    near, far = (0.9178 - factor * error for factor in (0.99, 1.01))
    for score, verdict in ((near, "as published"), (far, "off")):
        made = compared(PUBLISHED, facts(), [found("Safety", score)], ())
        assert made.verdict == verdict


def test_a_published_weight_is_compared_to_its_digits() -> None:
    for weight, off in ((-8.7749e-4, False), (-8.7651e-4, False), (-8.7760e-4, True)):
        made = compared(PUBLISHED, facts(head=lambda _, w=weight: w), [], ())
        assert [row["off"] for row in made.rows if "17289" in row["what"]] == [off]


def test_the_mean_of_subsets_is_compared_where_all_six_are_there() -> None:
    shares = (0.69, 0.43, 0.64, 0.92, 0.95, 0.79)
    all_six = [found(f"s{i}", share, 100) for i, share in enumerate(shares)]
    card = PUBLISHED.model_copy(update={"benchmarks": [f.benchmark for f in all_six]})
    row = next(r for r in compared(card, facts(), all_six, ()).rows if "mean of" in r["what"])
    assert row["found"] == pytest.approx(sum(shares) / 6)
    error = math.sqrt(sum(s * (1 - s) / 100 for s in shares)) / 6
    assert row["tolerance"] == pytest.approx(3 * error)
    some = compared(card, facts(), all_six[:5], ())
    assert not any("mean of" in r["what"] for r in some.rows)


def test_causes_are_told_by_what_speaks_for_them() -> None:
    off = [found("Safety", 0.55)]
    check = compared(PUBLISHED, facts(k=64), off, ())
    tried = {"no TopK before the head": [found("Safety", 0.6)], "no BOS": [found("Safety", 0.92)]}
    card = PUBLISHED.model_copy(update={"dtype": "float32", "template_sha256": "bb"})
    causes = likeliest(card, facts(k=64, pad_ends_turns=True), tried, check)
    assert causes == [
        "config.json gives k 64 where the card has 192",
        "with no BOS these figures are as published",
        "the chat template is another one than the card's",
        "sarm.dtype is bfloat16 where the card's figures are of float32",
        "its pad token is the end of a turn, at which other code may have pooled",
        "not ruled out: the TopK flag",
    ]
    told = sentence("a/sarm", check.model_copy(update={"causes": causes}))
    assert "Safety: best of n 0.55 instead of 0.9178" in told and "k 64 instead of 192" in told
    assert "more)" not in told
    rows = [row | {"off": True} for row in check.rows]
    assert "layers 16 instead of 16 ± 0 and 2 more)" in sentence(
        "a/sarm", check.model_copy(update={"rows": rows})
    )


def test_without_a_card_there_is_nothing_to_do(
    own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(own, **CONFIG)
    assert config.units("check_sarm") == ()
    assert not [task for task in tasks(config) if task.node.phase == "check_sarm"]
    assert check(own, **{"check_sarm.card": None})[0] == 2
    assert "check_sarm.card of the config leaves check_sarm nothing" in capfd.readouterr().err
    assert check(own, **{"check_sarm.card": "nowhere.json"})[0] == 2
    assert "there is no file" in capfd.readouterr().err


def test_a_sarm_without_a_card_of_its_own_is_not_opened(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(own, **{"check_sarm.card": "own"})[0] == 0
    run = RunDir.open(own / "run")
    checked = SarmCheck.read(run.read("check_sarm").path("check.json"))
    assert checked.verdict == "as published"
    (own / "models" / "sarm" / "card.json").unlink()
    monkeypatch.setattr("jobs.check_sarm.checked", lambda *_: pytest.fail("the SARM was opened"))
    assert main(["check_sarm", "--run", str(run.path), "--force"]) == 0
    assert SarmCheck.read(run.read("check_sarm").path("check.json")).verdict == "no card"


def test_the_shipped_card_is_of_the_shipped_sarm_and_of_the_shipped_data() -> None:
    folder = ROOT / "artifacts" / "sarm-smollm2"
    card = SarmCard.read(folder / "card.json")
    keys = json.loads((folder / "config.json").read_text())
    assert (card.d_sae, card.k, card.layers) == (
        keys["d_sae"],
        keys["k"],
        keys["num_hidden_layers"],
    )
    weight = load_file(folder / "model.safetensors")["score.weight"][0]
    assert len(card.head) == 3
    for latent, written in card.head.items():
        assert f"{float(weight[int(latent)]):.3g}" == written
    (demo,) = card.benchmarks
    assert demo.sha256 == file_sha256(ROOT / "data" / "demo" / "pairs.jsonl")


@pytest.mark.slow
def test_the_shipped_sarm_does_what_its_card_says_and_not_under_another_template(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "artifacts" / "sarm-smollm2", tmp_path / "sarm")
    policy = local_model("embedded:smollm2", None)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (policy / name).is_file():
            shutil.copy(policy / name, tmp_path / "sarm" / name)
    whole = load_config(ROOT / "configs" / "smollm2.yaml", ["check_sarm.prompts=12"])
    RunDir.create(tmp_path / "a", whole)
    assert main(["check_sarm", "--run", str(tmp_path / "a")]) == 0
    (tmp_path / "sarm" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    spoilt = load_config(
        ROOT / "configs" / "smollm2.yaml",
        ["check_sarm.prompts=12", f"sarm.model={tmp_path / 'sarm'}"],
    )
    RunDir.create(tmp_path / "b", spoilt)
    assert main(["check_sarm", "--run", str(tmp_path / "b")]) == 2
    assert "the chat template is another one than the card's" in capfd.readouterr().err


def test_probe_waits_for_it_and_encode_does_not(own: Path) -> None:
    config = tiny_config(own, **{"check_sarm.card": "x.json"})
    needs = {task.node: task.needs for task in tasks(config)}
    checking = Node("check_sarm", "all")
    assert needs[checking] == (Node("fetch", "all"),)
    probing = [node for node in needs if node.phase == "probe"]
    assert probing and all(checking in needs[node] for node in probing)
    assert not any(checking in needs[node] for node in needs if node.phase == "encode")


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ("{", "is not JSON"),
        ('{"schema": 1}', "lacks source"),
        ('{"schema": 1, "source": "x", "head": {"a": "1"}}', "head"),
        ('{"schema": 1, "source": "x", "head": {"1": "about 7"}}', "head"),
    ],
)
def test_a_card_that_cannot_be_read_is_a_sentence(
    tree: str, says: str, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (own / "models" / "sarm" / "card.json").write_text(tree)
    assert check(own)[0] == 2
    assert says in capfd.readouterr().err


def test_bos_tokens_are_set_to_a_number() -> None:
    text = Tokenized([1, 5, 1, 6], 3, False, False)
    assert [with_bos(text, 1, n).ids for n in (0, 1, 2)] == [
        [5, 1, 6],
        [1, 5, 1, 6],
        [1, 1, 5, 1, 6],
    ]
    assert with_bos(text, 1, 2).reward_position == 4


def test_every_other_way_to_read_is_tried_and_the_present_one_is_not() -> None:
    without = {"no TopK before the head": {"topk": False}}
    assert other_ways(1, False) == without
    assert other_ways(1, True) == without | {"no BOS": {"bos": 0}, "two BOS tokens": {"bos": 2}}
    assert other_ways(2, True) == without | {"no BOS": {"bos": 0}, "one BOS": {"bos": 1}}


def test_a_card_without_figures_has_nothing_to_compare() -> None:
    empty = PUBLISHED.model_copy(
        update={"d_sae": None, "k": None, "layers": None, "head": {}, "overall": None}
    )
    assert compared(empty, facts(), [], ["a file"]).verdict == "nothing to compare"


def test_what_a_cause_speaks_of_is_ruled_out_no_more() -> None:
    """Each of the rest by the cause that names it; with none told, all are left."""
    rest = [
        "the TopK flag",
        "the number of BOS tokens",
        "the chat template",
        "pad equal to the end of turn",
        "the dtype",
    ]
    check = compared(PUBLISHED, facts(), [found("Safety", 0.55)], ())
    right = [found("Safety", 0.92)]
    cases: list[tuple[str | None, SarmCard, Facts, dict[str, Any], str | None]] = [
        (
            "the TopK flag",
            PUBLISHED,
            facts(),
            {"no TopK before the head": right},
            "with no TopK before the head these figures are as published",
        ),
        (
            "the number of BOS tokens",
            PUBLISHED,
            facts(),
            {"one BOS": right},
            "with one BOS these figures are as published",
        ),
        (
            "the chat template",
            PUBLISHED.model_copy(update={"template_sha256": "bb"}),
            facts(),
            {},
            "the chat template is another one than the card's",
        ),
        (
            "pad equal to the end of turn",
            PUBLISHED,
            facts(pad_ends_turns=True),
            {},
            "its pad token is the end of a turn, at which other code may have pooled",
        ),
        (
            "the dtype",
            PUBLISHED.model_copy(update={"dtype": "float16"}),
            facts(),
            {},
            "sarm.dtype is bfloat16 where the card's figures are of float16",
        ),
        (None, PUBLISHED, facts(), {"no BOS": [found("Safety", 0.6)]}, None),
    ]
    for gone, card, known, tried, cause in cases:
        left = ", ".join(what for what in rest if what != gone)
        told = [] if cause is None else [cause]
        assert likeliest(card, known, tried, check) == [*told, f"not ruled out: {left}"]
    agrees = PUBLISHED.model_copy(update={"dtype": "bfloat16", "template_sha256": "aa"})
    assert likeliest(agrees, facts(), {}, check) == [f"not ruled out: {', '.join(rest)}"]
    # figures that were as published are no cause, however they are read
    fine = compared(PUBLISHED, facts(), right, ())
    assert likeliest(PUBLISHED, facts(), {"one BOS": right}, fine) == [
        f"not ruled out: {', '.join(rest)}"
    ]
    other = likeliest(PUBLISHED, facts(d_sae=99, layers=3), {}, check)
    assert other[:2] == [
        "config.json gives d_sae 99 where the card has 65536",
        "config.json gives layers 3 where the card has 16",
    ]
    everything = likeliest(
        agrees.model_copy(update={"dtype": "float16", "template_sha256": "bb"}),
        facts(pad_ends_turns=True),
        {"no TopK before the head": right, "one BOS": right},
        check,
    )
    assert len(everything) == 5 and not any("ruled out" in line for line in everything)


def test_the_check_in_whole_by_hand() -> None:
    """A card's every kind of figure, each beside another one; what neither has is no row."""
    card = SarmCard(
        source="a card",
        d_sae=64,
        k=8,
        head={"3": "-0.50", "99": "1e-3"},
        benchmarks=[
            Benchmark(
                label="Own",
                format="jsonl",
                sha256="ff",
                pair_accuracy=0.75,
                fvu=0.25,
                mean_k=8.0,
                negative=0.0,
            )
        ],
    )
    measured = Found(
        Benchmark(
            label="Own",
            format="jsonl",
            sha256="ff",
            prompts=100,
            pair_accuracy=0.5,
            best_of_n=0.5,
            fvu=0.26,
            mean_k=7.9,
            negative=0.25,
        ),
        0.01,
    )
    known = facts(d_sae=64, k=9, head={3: -0.504}.__getitem__)
    made = compared(card, known, [measured], ["another"])
    share = 3 * math.sqrt(0.75 * 0.25 / 100)
    rows = [
        ("d_sae", 64, 64, 0.0, None, False),
        ("k", 8, 9, 0.0, None, True),
        ("head weight of 3", -0.5, -0.504, 0.005001, None, False),
        ("head weight of 99", 1e-3, None, 0.5001e-3, None, True),
        ("Own: pair accuracy", 0.75, 0.5, share, 100, True),
        ("Own: FVU", 0.25, 0.26, 3 * 0.01 + 0.02 * 0.25, 100, False),
        ("Own: mean k", 8.0, 7.9, 0.04, 100, True),
        ("Own: kept values below zero", 0.0, 0.25, 3 / 100, 100, True),
    ]
    names = ("what", "published", "found", "tolerance", "prompts", "off")
    assert [list(row) for row in made.rows] == [list(names)] * len(rows)
    for row, want in zip(made.rows, rows, strict=True):
        assert tuple(row.values()) == pytest.approx(want), want[0]
    assert (made.verdict, made.source, made.missing) == ("off", "a card", ["another"])
    fits = compared(
        card.model_copy(update={"head": {}, "benchmarks": []}), facts(d_sae=64, k=8), [], []
    )
    assert (fits.verdict, len(fits.rows), fits.missing) == ("as published", 2, [])


def test_the_row_of_the_mean_of_subsets_in_whole() -> None:
    shares = (0.5, 0.25, 1.0, 0.0, 0.5, 0.75)
    six = [found(f"s{i}", share, 10 * (i + 1)) for i, share in enumerate(shares)]
    card = SarmCard(source="x", overall=0.5, benchmarks=[f.benchmark for f in six])
    (row,) = [r for r in compared(card, facts(), six, ()).rows if "mean of" in r["what"]]
    error = math.sqrt(sum(s * (1 - s) / (10 * (i + 1)) for i, s in enumerate(shares))) / 6
    assert row == {
        "what": "RewardBench 2: mean of subsets",
        "published": 0.5,
        "found": pytest.approx(0.5),
        "tolerance": pytest.approx(3 * error),
        "prompts": None,
        "off": False,
    }
    silent = [f._replace(benchmark=f.benchmark.model_copy(update={"best_of_n": None})) for f in six]
    elsewhere = [
        f._replace(benchmark=f.benchmark.model_copy(update={"format": "rmb"})) for f in six
    ]
    for others in (silent, elsewhere):
        assert sarm_check._overall([*six[:5], others[5]]) is None


def test_tolerances_of_every_figure() -> None:
    share = 3 * math.sqrt(0.2 * 0.8 / 25)
    assert tolerances(0.2, 25, 0.5) == pytest.approx(
        {
            "best_of_n": share,
            "pair_accuracy": share,
            "negative": share,
            "fvu": 1.5 + 0.004,
            "mean_k": 0.001,
        }
    )
    # Ties go to 1.01, of which no error is known
    assert tolerances(1.01, 25, 0.5)["best_of_n"] == 3 / 25
    assert tolerances(-0.5, 25, 0.0)["fvu"] == pytest.approx(0.01)


def test_pair_accuracy_by_hand() -> None:
    def item(right: int, n: int) -> sarm_check.Item:
        return sarm_check.Item("x", (), tuple("abcd"[:n]), right)

    # of four pairs one is in order, one tied; of one none
    rewards = [[3.0, 1.0, 3.0, 2.0], [0.0, 1.0]]
    assert sarm_check.pair_accuracy([item(2, 4), item(1, 2)], rewards) == pytest.approx(
        ((1 + 0.5) / 4 + 0) / 2
    )
    assert math.isnan(sarm_check.pair_accuracy([], []))
    with pytest.raises(ValueError, match="zip"):
        sarm_check.pair_accuracy([item(1, 2)], rewards)


def test_a_sample_is_of_all_answers_to_a_prompt_and_the_smallest_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one prompt are one item; those without an answer of either kind are none."""
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text(file.name)
    asked = [({"role": "user", "content": name},) for name in "pqrs"]
    rows = [
        SimpleNamespace(messages=asked[0], chosen=("good", "better"), rejected=()),
        SimpleNamespace(messages=asked[1], chosen=("fine",), rejected=("bad",)),
        SimpleNamespace(messages=asked[0], chosen=("good",), rejected=("worse", "worst")),
        SimpleNamespace(messages=asked[2], chosen=(), rejected=("bad",)),
        SimpleNamespace(messages=asked[3], chosen=("fine",), rejected=()),
    ]
    held: list[Any] = files[:1]
    monkeypatch.setattr(sarm_check, "source_files", lambda *_: held)
    monkeypatch.setattr(sarm_check, "read_source", lambda *_: iter(rows))
    source: Any = SimpleNamespace(format="jsonl", label="Own", subset="Part")
    items = [
        sarm_check.Item(
            sarm_check.prompt_id(asked[0]), asked[0], ("good", "better", "worse", "worst"), 2
        ),
        sarm_check.Item(sarm_check.prompt_id(asked[1]), asked[1], ("fine", "bad"), 1),
    ]
    items.sort(key=lambda item: hashlib.sha256(item.id.encode()).hexdigest())
    (one,) = sarm_check._held("own", source, None)
    assert one.items == items
    assert one.benchmark == Benchmark(
        label="Own", format="jsonl", subset="Part", sha256=file_sha256(files[0])
    )
    assert sarm_check._held("own", source, 1)[0].items == items[:1]
    held = files
    assert sarm_check._held("own", source, 1)[0].benchmark.sha256 is None
    source.format = "prompts"
    assert sarm_check._held("own", source, None) == []
    source.format, rows = "jsonl", rows[3:]
    assert sarm_check._held("own", source, None) == []


def test_both_items_of_a_question_of_ties_are_measured_or_neither() -> None:
    items = [
        sarm_check.Item(f"{kind}:{n}", (), (), 0) for kind in ("tied", "ref") for n in range(4)
    ]
    taken = sarm_check._first(items, 4)
    order = sorted(range(4), key=lambda n: hashlib.sha256(str(n).encode()).hexdigest())
    assert [item.id for item in taken] == [
        f"{kind}:{n}" for n in order[:2] for kind in ("ref", "tied")
    ]
    assert len(sarm_check._first(items, None)) == 8


def test_a_benchmark_is_that_of_the_card_where_format_subset_and_file_are() -> None:
    held = Benchmark(label="a", format="rmb", subset="s", sha256="ff")
    for changes, same in (
        ({}, True),
        ({"label": "b", "sha256": None}, True),
        ({"sha256": "ee"}, False),
        ({"format": "jsonl"}, False),
        ({"subset": None}, False),
    ):
        assert sarm_check._is(held, held.model_copy(update=changes)) is same, changes


def test_facts_are_of_the_model_and_its_tokenizer(own: Path) -> None:
    config = tiny_config(own, **CONFIG)
    model, tokenizer = load_sarm(config.sarm, "cpu")
    made = sarm_check.facts_of(model, tokenizer, "float16", "a template")
    assert made[:-1] == (128, 16, 2, "float16", hashlib.sha256(b"a template").hexdigest(), False)
    assert made.head(5) == float(model.head_weight[5].detach())
    tokenizer.pad_token = tokenizer.eos_token
    assert sarm_check.facts_of(model, tokenizer, "float16", "a template").pad_ends_turns
