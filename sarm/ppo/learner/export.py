"""The trained policy as a plain model in bf16, its adapter beside it, and what bf16 rounds away."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sarm.llama.weights import base_model, gathered, merged_weight
from sarm.ppo.learner.actor import Actor
from sarm.ppo.learner.distributed import World

LITTLE_KEPT = 0.5
"""Less than this of the update in the merged weights is warned of."""


class Rounding(NamedTuple):
    """What merging an adapter into bf16 weights keeps of training."""

    identical: float
    """The share of adapted weights that are, to the bit, the base's in bf16."""
    kept: float
    """Of the update u before rounding and v after it, v·u / |u|²: 1 where nothing is lost; NaN
    where nothing was learnt.
    """

    def told(self) -> dict[str, float | None]:
        """For a manifest, which knows no NaN."""
        return {"identical": self.identical, "kept": None if math.isnan(self.kept) else self.kept}


class Exported(NamedTuple):
    """On rank 0; empty on the others."""

    weights: dict[str, Tensor]
    """The policy's, under the names of a plain model, LoRA merged, in bf16."""
    adapter: dict[str, Tensor]
    """The adapter's, under the names of peft's files, float32; empty without LoRA."""
    rounding: Rounding | None
    """None without LoRA, whose weights are exported as they were trained."""


@torch.no_grad()
def exported(actor: Actor, world: World) -> Exported:
    """The policy and its adapter, on the CPU. A collective."""
    weights: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    sums = torch.zeros(4, dtype=torch.float64)
    for name, module in base_model(actor.policy).named_modules():
        if ".lora_" in name or name.endswith(".base_layer"):
            continue
        adapted = hasattr(module, "get_delta_weight")
        own = {"weight": None} if adapted else dict(module.named_parameters(recurse=False))
        with gathered(module) if own else nullcontext():
            for leaf, parameter in own.items():
                whole = merged_weight(module, torch.bfloat16) if parameter is None else parameter
                if world.rank == 0:
                    weights[f"{name}.{leaf}"] = whole.detach().to("cpu", torch.bfloat16, copy=True)
                    if adapted:
                        sums += _rounding_sums(module, whole).cpu()
            if adapted and world.rank == 0:
                adapter |= {
                    f"base_model.model.{name}.{ab}.weight": p["default"].weight.float().cpu()
                    for ab, p in (("lora_A", module.lora_A), ("lora_B", module.lora_B))
                }
    same, number, along, squares = sums.tolist()
    if not adapter:
        return Exported(weights, adapter, None)
    rounding = Rounding(same / number, along / squares if squares else math.nan)
    return Exported(weights, adapter, rounding)


def _rounding_sums(module: Any, merged: Tensor) -> Tensor:
    """(4,) float64: identical weights, all weights, v·u, u·u."""
    base = module.base_layer.weight
    update = module.get_delta_weight("default").float()
    kept = merged.float() - base.float()
    same = (merged == base.to(torch.bfloat16)).sum()
    return torch.stack(
        [
            same.double(),
            same.new_tensor(merged.numel()).double(),
            (kept.double() * update).sum(),
            update.double().square().sum(),
        ]
    )


def rounding_warning(rounding: Rounding | None, learning_rate: float) -> str | None:
    """A sentence where bf16 loses much of what was learnt."""
    if rounding is None or not rounding.kept < LITTLE_KEPT:
        return None
    return (
        f"the policy's merged bf16 weights keep {rounding.kept:.0%} of the update, and"
        f" {rounding.identical:.1%} of them are bit-identical to the base's; load the adapter"
        f" beside it instead, or raise ppo.learning_rate ({learning_rate:g})"
    )


def save_policy(
    source: Path, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """A bf16 model that AutoModelForCausalLM opens: the source's architecture and settings, these
    weights.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise RuntimeError(
            f"trained weights do not fit the model: missing {missing}, unexpected {unexpected}"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(actor: Actor, adapter: dict[str, Tensor], base: str, folder: Path) -> None:
    """What `PeftModel.from_pretrained` opens on the policy named `base`."""
    config = copy.copy(actor.policy.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    save_file(
        {name: t.contiguous() for name, t in adapter.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
