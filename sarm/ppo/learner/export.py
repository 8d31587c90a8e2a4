"""The trained policy as a plain model in bf16, its adapter beside it, and what bf16 rounds away."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sarm.config import UserError
from sarm.llama.weights import base_model, gathered, merged_weight
from sarm.models import open_policy, read_tokenizer
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
        holder = module.base_layer if adapted else module
        own: dict[str, Any] = dict(holder.named_parameters(recurse=False))
        if adapted:
            own["weight"] = None  # to be merged; a bias beside it is the base's
        with gathered(module) if own else nullcontext():
            for leaf, parameter in own.items():
                whole = merged_weight(module, torch.bfloat16) if parameter is None else parameter
                if world.rank == 0:
                    weights[f"{name}.{leaf}"] = whole.detach().to("cpu", torch.bfloat16, copy=True)
                    if parameter is None:
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
    _save(model, weights, tokenizer, folder)


def _save(
    model: Any, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise UserError(
            f"the policy's trained weights would not fit it: {[*missing, *unexpected][:3]} are"
            f" {'missing' if missing else 'left over'}; a {model.config.model_type} model cannot be"
            " trained here"
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


def try_export(
    source: Path,
    actor: Actor,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    folder: Path,
    world: World,
) -> None:
    """Before training, save under `folder` what is saved after it, open that again, and remove it.
    A collective.

    Raises UserError where weights that nothing has trained come back as others than the source's,
    or cannot be written or opened.
    """
    weights, adapter, _ = exported(actor, world)
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".trial-", dir=folder) as scratch:
                saved = _tried_policy(source, weights, tokenizer, Path(scratch) / "policy")
                if adapter:
                    save_adapter(actor, adapter, base, Path(scratch) / "adapter")
                    _try_adapter(saved, Path(scratch) / "adapter", adapter)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the policy could not be saved after training, as trying it before shows: {error};"
                f" make room in {folder}"
            ) from None
    world.barrier()


def _tried_policy(
    source: Path, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Any:
    """The policy as it was saved and opened again."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    _refuse_other(model.state_dict(), weights, f"what would be exported is not {source}")
    _save(model, weights, tokenizer, folder)
    del model  # an 8B policy would stand in memory three times
    saved = open_policy(folder, torch.bfloat16)
    _refuse_other(saved.state_dict(), weights, "what is saved does not open as it was exported")
    read_tokenizer(folder, {})
    return saved


def _try_adapter(policy: Any, folder: Path, adapter: dict[str, Tensor]) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    opened = PeftModel.from_pretrained(policy, folder)
    # by itself it would ask the hub about the base
    found = get_peft_model_state_dict(opened, save_embedding_layers=False)
    _refuse_other(found, adapter, "the adapter does not open as it was exported")
    if lost := sorted(set(adapter) ^ set(found)):
        raise UserError(f"the adapter does not open as it was exported: {lost[0]} is lost")


def _refuse_other(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError naming the first tensor in both that differs, in the wanted one's dtype."""
    for name in wanted.keys() & found.keys():
        if not torch.equal(found[name].to(wanted[name].dtype), wanted[name]):
            raise UserError(
                f"{what}: {name} differs before any training; training was not begun: use another"
                " policy, or ppo.lora=null"
            )
