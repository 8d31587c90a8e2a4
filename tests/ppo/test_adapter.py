"""The adapter beside the merged policy, and what bf16 rounds away of a small update."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sarm.ppo.learner.actor import Actor, make_actor
from sarm.ppo.learner.distributed import World
from sarm.ppo.learner.export import Rounding, exported, rounding_warning, save_adapter, save_policy
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
