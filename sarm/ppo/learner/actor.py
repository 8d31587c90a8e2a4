"""What PPO trains: a policy, with LoRA or in full, and with a critic a value head on its trunk."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sarm.config import PpoConfig
from sarm.llama.logprobs import logprobs_from_hidden
from sarm.llama.weights import LlamaWeights, base_model
from sarm.ppo.learner import layers


class Forward(NamedTuple):
    """The actor's outputs for one micro-batch, each (n,) float32."""

    logprobs: Tensor
    entropy: Tensor
    """With gradient where there is an entropy bonus."""
    values: Tensor | None = None
    """None without a critic."""


class ValueHead(nn.Module):
    """A linear map from the trunk's last state to a value, in float32; it starts at 0
    everywhere.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1, d_model)), nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class Actor(nn.Module):
    """A policy and, with a critic, a value head on its trunk. With LoRA, the reference is the
    policy with its adapter off.

    `fused` computes the layers by `layers.py`, the first `checkpointed` of them once more in the
    backward pass. Else they are the model's own, and activation checkpointing is its own.
    """

    def __init__(
        self,
        policy: Any,
        *,
        critic: bool = True,
        entropy_grad: bool = False,
        fused: bool = False,
        checkpointed: int = 0,
    ) -> None:
        super().__init__()
        self.fused, self.checkpointed, self.entropy_grad = fused, checkpointed, entropy_grad
        self.policy = policy
        self.value_head = ValueHead(base_model(policy).config.hidden_size) if critic else None
        self.mixed = len({p.dtype for p in policy.parameters()}) > 1
        """Float32 LoRA on a bf16 model: multiplied in bf16."""

    def forward(
        self, rows: layers.Rows, predicts: Tensor, labels: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        """What `Forward` holds; the arguments are those of `forced` in `sarm/llama/generate.py` or,
        where `fused`, of `forced_shared`.
        """
        base = base_model(self.policy)
        if self.fused:
            hidden = layers.last_hidden(base.model, rows, self.checkpointed)
        else:
            with torch.autocast(predicts.device.type, torch.bfloat16, enabled=self.mixed):
                hidden = base.model(input_ids=rows, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, predicts)
        of_labels = logprobs_from_hidden(
            hidden, base.lm_head, labels, temperature, entropy_grad=self.entropy_grad
        )
        if self.value_head is None:
            return tuple(of_labels)
        return *of_labels, self.value_head(hidden)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


def linear_names(policy: Any) -> list[str]:
    """What LoRA adapts: every projection but the head. Not `all-linear`, under which peft also
    adapts the routers and joined experts of a mixture, which are no projections to merge into.
    """
    head = policy.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(found)


def make_actor(
    policy: Any, ppo: PpoConfig, seed: int, fused: bool = False, checkpointed: int = 0
) -> Actor:
    """Wrap a policy for training: LoRA where configured, in float32, and no dropout anywhere.
    `fused` where it is a Llama.
    """
    if ppo.lora is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        policy = get_peft_model(
            policy,
            LoraConfig(
                r=ppo.lora.rank, lora_alpha=ppo.lora.alpha, target_modules=linear_names(policy)
            ),
        )
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        # peft's copy of each input to float32; autocast does without
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    actor = Actor(
        policy,
        critic=ppo.critic,
        entropy_grad=ppo.entropy_coef > 0,
        fused=fused and LlamaWeights.knows(policy),
        checkpointed=checkpointed,
    )
    if checkpointed and not actor.fused:
        base_model(policy).gradient_checkpointing_enable({"use_reentrant": False})
    # the policy too, which comes from its file in eval mode, where transformers computes no layer
    # again
    return actor.train()
