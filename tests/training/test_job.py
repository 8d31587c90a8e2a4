"""The phase train_sarm, from data to a folder that opens as a SARM, and what is shipped."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from jobs.__main__ import main, run_unit
from jobs.train_sarm import kept_from_training
from sarm.config import ROOT, UserError
from sarm.data.datasets import Pair, Prompt, load_data
from sarm.reward_model.adapter import PREFIX, is_adapted
from sarm.reward_model.model import load_sarm
from sarm.reward_model.scoring import encode_texts
from sarm.reward_model.weights import open_folder
from sarm.run import RunDir
from sarm.training.card import figure
from tests.tiny import tiny_config

SPLIT = {"data.sources.demo.split": {"sarm_train": 0.6, "test": 0.4}, "data.sources.demo.limit": 60}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("train")
    config = tiny_config(
        tmp_path,
        **SPLIT,
        **{"train_sarm.output": str(tmp_path / "out"), "train_sarm.head_l2": [0.01, 0.1]},
    )
    run = RunDir.create(tmp_path / "run", config)
    run_unit(run, "train_sarm", "all")
    return run, tmp_path / "out"


def test_trained_folder_opens_as_a_sarm_and_gives_the_margins_that_were_judged(trained):
    run, out = trained
    config = run.config
    model, tokenizer = load_sarm(config.sarm.model_copy(update={"model": str(out)}), device="cpu")
    assert (
        model.config.backbone["model"] == config.policy.model
        and model.config.source_layer == config.train_sarm.layer
    )
    pairs = [p for p in load_data(config.data).pairs if p.prompt.part == "test"]
    conversations = [
        (*p.prompt.messages, {"role": "assistant", "content": r})
        for p in pairs
        for r in (p.chosen, p.rejected)
    ]
    rewards = encode_texts(
        model,
        tokenizer,
        conversations,
        extra_ranks=0,
        tokens_per_batch=2048,
        max_length=config.train_sarm.max_length,
    ).rewards.view(-1, 2)
    metrics = run.read("train_sarm").json("metrics.json")
    judged = metrics["held_out"]["demo"]
    assert judged["pairs"] == len(pairs) and judged["mean"] == pytest.approx(
        float((rewards[:, 0] > rewards[:, 1]).double().mean()), abs=0.51 / len(pairs)
    )
    assert (
        metrics["cross_validated"]["demo"]["pairs"] == 60
        and metrics["pairs"]["demo/sarm_train"] + len(pairs) == 60
    )


def test_trained_folder_is_small_published_and_described(trained):
    run, out = trained
    published = run.read("train_sarm")
    assert (published.directory("sarm") / "model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()
    tensors = load_file(out / "model.safetensors")
    assert set(tensors) == {
        "sae.encoder.weight",
        "sae.decoder.weight",
        "sae.pre_bias",
        "sae.latent_bias",
        "score.weight",
    }
    assert (
        tensors["sae.encoder.weight"].dtype == torch.float16
        and tensors["score.weight"].dtype == torch.float32
    )
    card = (out / "README.md").read_text()
    accuracy = published.json("metrics.json")["cross_validated"]["demo"]
    assert (
        f"{accuracy['mean']:.3f} ± {accuracy['standard_error']:.3f}" in card
        and "seed 0" in card.lower()
    )


def test_training_twice_gives_the_same_bits(trained, tmp_path):
    run, out = trained
    run_unit(RunDir.create(tmp_path / "run", run.config), "train_sarm", "all")
    again = RunDir.open(tmp_path / "run").read("train_sarm").path("sarm/model.safetensors")
    assert again.read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"data.sources.demo.split": {"test": 1.0}}, "sarm_train"),
        (SPLIT | {"train_sarm.layer": 3}, "fewer than train_sarm.layer=3"),
    ],
)
def test_what_cannot_be_trained_is_a_user_error(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_unit(
            RunDir.create(tmp_path / "run", tiny_config(tmp_path, **changes)), "train_sarm", "all"
        )


def test_overrides_come_after_the_options(tmp_path, capsys):
    assert (
        main(
            [
                "train_sarm",
                "--config",
                str(ROOT / "configs/tiny.yaml"),
                "--run",
                str(tmp_path / "run"),
                "train_sarm.bogus=1",
            ]
        )
        == 2
    )
    assert "unknown key train_sarm.bogus" in capsys.readouterr().err


def test_shipped_sarm_is_whole_small_and_says_how_good_it_is():
    folder = ROOT / "artifacts" / "sarm-smollm2"
    assert sum(file.stat().st_size for file in folder.parent.rglob("*") if file.is_file()) < 25e6
    config = json.loads((folder / "config.json").read_text())
    assert config["backbone"] == {"model": "embedded:smollm2", "revision": None}
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert (
            tensors.get_slice("sae.encoder.weight").get_shape()
            == [config["d_sae"], config["hidden_size"]]
            == [4608, 576]
        )
        names = set(tensors.keys())
        assert all(tensors.get_tensor(name).isfinite().all() for name in names)
    assert {name for name in names if name.startswith(PREFIX)} == {
        f"{PREFIX}model.layers.{layer}.{part}.weight.{factor}"
        for layer in range(config["num_hidden_layers"])
        for part in (
            *(f"self_attn.{side}_proj" for side in "qkvo"),
            *(f"mlp.{side}_proj" for side in ("gate", "up", "down")),
        )
        for factor in "ab"
    }
    card = (folder / "README.md").read_text()
    assert all(
        word in card
        for word in (
            "RewardBench 2 Safety",
            "RMB",
            "ODC-BY",
            "MIT",
            "Apache-2.0",
            "CoCoNot",
            "H100",
        )
    )


def source_pair(source: str, prompt: str, part: str) -> Pair:
    messages = ({"role": "user", "content": prompt},)
    return Pair(
        source + prompt, Prompt(prompt, messages, "demo", "unsafe", "", part), source, "a", "b"
    )


def test_a_prompt_that_judges_trains_nothing_whoever_lists_it_first(tmp_path):
    demo = tiny_config(tmp_path, **SPLIT)
    judge = demo.data.sources["demo"].model_copy(update={"split": {"test": 1.0}})
    sources = {"demo": demo.data.sources["demo"], "judge": judge}
    config = demo.model_copy(update={"data": demo.data.model_copy(update={"sources": sources})})
    pairs = [
        source_pair("demo", "both", "sarm_train"),
        source_pair("judge", "both", "sarm_train"),
        source_pair("demo", "mine", "sarm_train"),
        source_pair("judge", "theirs", "test"),
        source_pair("demo", "other", "discovery"),
    ]
    kept = kept_from_training(config, pairs)
    assert [p.prompt.part for p in kept] == ["test", "test", "sarm_train", "test", "discovery"]
    assert [p._replace(prompt=None) for p in kept] == [p._replace(prompt=None) for p in pairs]


@pytest.fixture(scope="module")
def trained_layers(tmp_path_factory):
    """With everything on: layers trained, pairs cut, refusals set against answers."""
    tmp_path = tmp_path_factory.mktemp("layers")
    refusals = tmp_path / "refusals.jsonl"
    refusals.write_text('{"text": "I cannot help with that.", "any_prompt": true}\n')
    config = tiny_config(
        tmp_path,
        **SPLIT,
        **{
            "train_sarm.output": str(tmp_path / "out"),
            "train_sarm.head_l2": [0.01],
            "train_sarm.backbone_rank": 2,
            "train_sarm.backbone_steps": 3,
            "train_sarm.backbone_batch": 4,
            "train_sarm.cut_tokens": [10, 30],
            "train_sarm.refusals": str(refusals),
        },
    )
    run = RunDir.create(tmp_path / "run", config)
    run_unit(run, "train_sarm", "all")
    return run, tmp_path / "out"


def test_trained_layers_are_saved_as_updates_and_judged_as_they_open(trained_layers):
    run, out = trained_layers
    tensors = load_file(out / "model.safetensors")
    factors = [name for name in tensors if name.startswith("adapter.")]
    assert len(factors) == 2 * 7 and all(tensors[n].dtype == torch.bfloat16 for n in factors)
    assert is_adapted(open_folder(out))
    assert not is_adapted(open_folder(run.config.sarm.model))
    sarm = run.config.sarm.model_copy(update={"model": str(out)})
    model, tokenizer = load_sarm(sarm, device="cpu")
    pairs = [p for p in load_data(run.config.data).pairs if p.prompt.part == "test"]
    conversations = [
        (*p.prompt.messages, {"role": "assistant", "content": r})
        for p in pairs
        for r in (p.chosen, p.rejected)
    ]
    rewards = encode_texts(
        model, tokenizer, conversations, extra_ranks=0, tokens_per_batch=2048, max_length=128
    ).rewards.view(-1, 2)
    metrics = run.read("train_sarm").json("metrics.json")
    assert metrics["held_out"]["demo"]["mean"] == pytest.approx(
        float((rewards[:, 0] > rewards[:, 1]).double().mean()), abs=0.51 / len(pairs)
    )
    assert {"demo cut/sarm_train", "refusals over compliance/sarm_train"} <= set(metrics["pairs"])
    card = (out / "README.md").read_text()
    assert "rank 2 (3 steps of 4 pairs" in card and "| Demo cut |" in card


def test_the_accuracy_of_one_prompt_has_no_standard_error():
    assert figure({"mean": 1.0, "standard_error": math.nan}) == "1.000 ± n/a"
    assert figure({"mean": 0.9124, "standard_error": 0.0131}) == "0.912 ± 0.013"
