"""The adapter beside the merged policy, what bf16 rounds away of a small update, and that saving
is tried before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sarm.config import UserError
from sarm.ppo.learner.actor import Actor, make_actor
from sarm.ppo.learner.distributed import World
from sarm.ppo.learner.export import (
    Exported,
    Rounding,
    exported,
    rounding_warning,
    save_adapter,
    save_policy,
    try_export,
)
from tests.llama.test_families import write_family
from tests.ranks import tiny_ppo
from tests.tiny import tiny_tokenizer

IDS = torch.tensor([[0, 17, 40, 300, 8]])


def adapted(policy: Path, size: float) -> Actor:
    """A bf16 policy whose adapter changes weights by about `size`."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16)
    actor = make_actor(model, tiny_ppo(lora={"rank": 3, "alpha": 6}), 0)
    generator = torch.Generator().manual_seed(1)
    for name, p in actor.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * math.sqrt(size)
    return actor


def test_peft_opens_the_adapter_and_it_is_the_merged_policy(
    tiny_policy: Path, tmp_path: Path
) -> None:
    actor = adapted(tiny_policy, 0.05)
    found = exported(actor, World())
    save_policy(tiny_policy, found.weights, tiny_tokenizer(), tmp_path / "policy")
    save_adapter(actor, found.adapter, "owner/base", tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    with torch.no_grad():
        before = base(IDS).logits
        on_base = PeftModel.from_pretrained(base, tmp_path / "adapter")
        after = on_base(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").float()(IDS).logits
    assert float((after - merged).abs().max()) < 0.05 * float((after - before).abs().max())
    assert on_base.peft_config["default"].base_model_name_or_path == "owner/base"
    assert len(found.adapter) == 2 * 7 * base.config.num_hidden_layers


def test_rounding_by_hand(tiny_policy: Path) -> None:
    for size in (1e-6, 1e-3):
        actor = adapted(tiny_policy, size)
        same = number = along = squares = 0.0
        for module in actor.policy.modules():
            if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
                base = module.base_layer.weight.float()
                update = 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
                rounded = (base + update).bfloat16().float()
                same += int((rounded == base).sum())
                number += base.numel()
                along += float(((rounded - base) * update).sum())
                squares += float(update.square().sum())
        got = exported(actor, World()).rounding
        assert got is not None
        assert got == pytest.approx((same / number, along / squares), rel=1e-4)
        assert (got.identical > 0.9 and got.kept < 0.2) == (size == 1e-6)
    assert got.kept > 0.9


def test_what_is_lost_is_told_with_numbers_and_a_remedy() -> None:
    told = rounding_warning(Rounding(0.988, 0.03), 1e-6)
    assert told is not None and "keep 3% of the update" in told and "98.8%" in told
    assert "ppo.learning_rate (1e-06)" in told
    for fine in (None, Rounding(0.1, 0.98), Rounding(1.0, math.nan)):
        assert rounding_warning(fine, 1e-4) is None


def test_without_lora_there_is_neither(tiny_policy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    found = exported(make_actor(model, tiny_ppo(), 0), World())
    assert found.adapter == {} and found.rounding is None and found.weights


# --- the end of training, tried before its beginning


def trained(folder: Path, lora: bool, size: float = 0.0) -> Actor:
    """In float32; its adapter, if any, changes weights by about `size`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    actor = make_actor(model, tiny_ppo(lora={"rank": 3, "alpha": 6} if lora else None), 0)
    generator = torch.Generator().manual_seed(1)
    for name, p in actor.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * size
    return actor


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("family", ["Llama with biases", "Qwen2, Qwen2.5"])
def test_biases_of_adapted_layers_survive(family: str, lora: bool, tmp_path: Path) -> None:
    source = write_family(family, tmp_path / "source")
    actor = trained(source, lora, size=0.1)
    found = exported(actor, World())
    save_policy(source, found.weights, tiny_tokenizer(), tmp_path / "policy")
    saved = load_file(tmp_path / "policy" / "model.safetensors")
    base = load_file(source / "model.safetensors")
    biases = [name for name in base if name.endswith(".bias")]
    assert len(biases) >= 6 and saved.keys() == base.keys()
    for name in biases:
        assert torch.equal(saved[name], base[name].bfloat16()) and saved[name].any()
    learnt = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(saved[learnt], base[learnt].bfloat16()) != lora
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").float()
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, actor.policy(IDS).logits, atol=0.1)


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_saving_is_tried_before_training_and_leaves_nothing(
    lora: bool, tiny_policy: Path, tmp_path: Path
) -> None:
    actor = trained(tiny_policy, lora)
    try_export(tiny_policy, actor, tiny_tokenizer(), "owner/base", tmp_path / "t", World())
    assert list((tmp_path / "t").iterdir()) == []


Spoil = Callable[[Exported], Exported]


def without(name: str) -> Spoil:
    return lambda e: e._replace(weights={n: t for n, t in e.weights.items() if n != name})


def other(name: str) -> Spoil:
    return lambda e: e._replace(weights=e.weights | {name: e.weights[name] * 1.01})


def mixed_up(e: Exported) -> Exported:
    """The adapter under names that peft does not know."""
    return e._replace(adapter={n.replace("lora_A", "lora_C"): t for n, t in e.adapter.items()})


@pytest.mark.parametrize(
    "spoil, told",
    [
        (without("model.layers.1.self_attn.q_proj.weight"), r"q_proj\.weight'\] are missing"),
        (other("lm_head.weight"), r"not .*: lm_head\.weight differs before any training"),
        (mixed_up, "the adapter does not open as it was exported"),
    ],
)
def test_what_would_not_be_saved_right_is_refused_before_training(
    spoil: Spoil, told: str, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = trained(tiny_policy, lora=True)
    monkeypatch.setattr("sarm.ppo.learner.export.exported", lambda *given: spoil(exported(*given)))
    with pytest.raises(UserError, match=told):
        try_export(tiny_policy, actor, tiny_tokenizer(), "owner/base", tmp_path / "t", World())
    assert list((tmp_path / "t").iterdir()) == []


def test_a_full_disk_is_found_before_training(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = trained(tiny_policy, lora=False)

    def full(*given: object, **named: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(UserError, match="No space left on device; make room in"):
        try_export(tiny_policy, actor, tiny_tokenizer(), "owner/base", tmp_path, World())
