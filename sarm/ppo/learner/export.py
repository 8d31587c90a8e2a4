"""The trained policy as a plain model in bf16."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sarm.llama.weights import base_model, gathered, merged_weight
from sarm.ppo.learner.actor import Actor
from sarm.ppo.learner.distributed import World


@torch.no_grad()
def policy_weights(actor: Actor, world: World) -> dict[str, Tensor]:
    """The policy's weights under the names of a plain model, LoRA merged, in bf16 on rank 0's CPU.
    A collective.
    """
    weights: dict[str, Tensor] = {}
    for name, module in base_model(actor.policy).named_modules():
        if ".lora_" in name or name.endswith(".base_layer"):
            continue
        own = (
            {"weight": None}
            if hasattr(module, "get_delta_weight")
            else dict(module.named_parameters(recurse=False))
        )
        with gathered(module) if own else nullcontext():
            for leaf, parameter in own.items():
                whole = merged_weight(module, torch.bfloat16) if parameter is None else parameter
                if world.rank == 0:
                    weights[f"{name}.{leaf}"] = whole.detach().to("cpu", torch.bfloat16, copy=True)
    return weights


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
