"""What steps the actor's weights: our own loop where every rank holds the model whole, DeepSpeed's
ZeRO where they share it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sarm.config import PpoConfig, UserError
from sarm.llama.weights import base_model
from sarm.ppo.learner.actor import Actor
from sarm.ppo.learner.distributed import World
from sarm.ppo.learner.optimizer import CompactAdamW

SMALL = 1 << 20
"""Gradients of fewer elements cross the network together."""


class Engine(Protocol):
    """The actor and its optimizer. Every rank calls `backward` equally often, and `step` after the
    last of an optimizer step.
    """

    actor: Actor
    zero_stage: int
    optimizer: Any
    """Its `param_groups` set the learning rates: the policy's, and where the value head has one of
    its own, that one's second.
    """
    basic_optimizer: Any
    """The one that holds the moments."""

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]: ...

    def train(self, mode: bool = True) -> Any: ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`, summed over ranks; `last` of this optimizer step."""

    def step(self) -> Tensor:
        """Clip, step, clear; the norm of the gradient before clipping."""


class PlainEngine:
    """Every rank has it all. DeepSpeed's engine does this too, with float32 copies of all
    gradients on the way.
    """

    zero_stage = 0

    def __init__(
        self,
        actor: Actor,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        value_max_grad_norm: float | None,
        world: World,
    ) -> None:
        self.actor, self.world = actor, world
        self.optimizer = self.basic_optimizer = optimizer
        self.max_grad_norm, self.value_max_grad_norm = max_grad_norm, value_max_grad_norm
        self.weights = actor.trainable()
        if world.size > 1:
            for tensor in (*actor.parameters(), *actor.buffers()):
                dist.broadcast(tensor.data, 0)

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.actor(*inputs)
        return found

    def train(self, mode: bool = True) -> Any:
        if self.actor.training != mode:  # it visits every module
            self.actor.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        if last and self.world.size > 1:
            _sum_over_ranks(_gradients(self.weights))

    @torch.no_grad()
    def step(self) -> Tensor:
        if self.value_max_grad_norm is not None:
            _clip(_gradients(value_parameters(self.actor)), self.value_max_grad_norm)
            norm = _clip(_gradients(policy_parameters(self.actor)), self.max_grad_norm)
            self.optimizer.step()
        else:
            gradients = _gradients(self.weights)
            norm = _norm(gradients)
            clip = _clip_factor(norm, self.max_grad_norm)
            if isinstance(self.optimizer, CompactAdamW):
                self.optimizer.step(scale=clip)
            else:
                torch._foreach_mul_(gradients, clip)
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def value_parameters(actor: Actor) -> list[Tensor]:
    return [] if actor.value_head is None else list(actor.value_head.parameters())


def policy_parameters(actor: Actor) -> list[Tensor]:
    values = {id(p) for p in value_parameters(actor)}
    return [p for p in actor.trainable() if id(p) not in values]


def _gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in weights if p.grad is not None]


def _norm(gradients: list[Tensor]) -> Tensor:
    # In float32: the norm of bf16 gradients would be rounded to bf16.
    norms = torch._foreach_norm(gradients, 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack([n.to(gradients[0].device) for n in norms]))


def _clip_factor(norm: Tensor, most: float) -> Tensor:
    return (most / (norm + 1e-6)).clamp(max=1.0)


def _clip(gradients: list[Tensor], most: float) -> Tensor:
    """Clip in place; the norm before."""
    norm = _norm(gradients)
    torch._foreach_mul_(gradients, _clip_factor(norm, most))
    return norm


def _sum_over_ranks(gradients: list[Tensor]) -> None:
    """In place. The small ones of a dtype travel as one."""
    for dtype in sorted({g.dtype for g in gradients}, key=str):
        small = [g for g in gradients if g.dtype == dtype and g.numel() < SMALL]
        if small:
            flat = torch.cat([g.flatten() for g in small])
            dist.all_reduce(flat)
            for g, part in zip(small, flat.split([g.numel() for g in small]), strict=True):
                g.copy_(part.view_as(g))
        for g in gradients:
            if g.dtype == dtype and g.numel() >= SMALL:
                dist.all_reduce(g)


class ZeroEngine:
    """DeepSpeed's ZeRO, stages 1 to 3."""

    def __init__(
        self,
        actor: Actor,
        optimizer: torch.optim.Optimizer,
        stage: int,
        low_precision: bool,
        max_grad_norm: float,
        world: World,
    ) -> None:
        import deepspeed

        _import_muon()
        cuda = world.device.type == "cuda"
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            # boundaries are set by hand, and losses scaled by hand
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "steps_per_print": 1_000_000_000,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": cuda,
                "contiguous_gradients": cuda,
            },
        }
        if low_precision:
            settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        self.engine, *_ = deepspeed.initialize(
            model=actor,
            optimizer=optimizer,
            model_parameters=actor.trainable(),
            config=settings,
            dist_init_required=False,
        )
        self.actor, self.world, self.zero_stage = actor, world, stage
        self.optimizer, self.basic_optimizer = self.engine.optimizer, self.engine.basic_optimizer
        if stage == 3:
            # The log-probabilities read the head's weight without calling its module.
            deepspeed.zero.register_external_parameter(
                actor, base_model(actor.policy).lm_head.weight
            )

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.engine(*inputs)
        return found

    def train(self, mode: bool = True) -> Any:
        self.engine.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)  # it averages over ranks

    def step(self) -> Tensor:
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.world.device)


def _import_muon() -> None:
    """DeepSpeed looks whether the optimizer is its Muon, which as it is imported has functions
    compiled that nothing here calls: torch's compiler alone takes a rank seconds to import.
    """
    kept = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if kept is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = kept


def start_engine(actor: Actor, ppo: PpoConfig, seed: int, world: World) -> Engine:
    """An engine around the actor. Raises UserError where the plan's ZeRO cannot clip as configured.

    Trainable float32 weights (LoRA, or a float32 model) are stepped as they are. A bf16 model
    trained in full keeps float32 master weights in ZeRO's optimizer, of stage 1 at least, or what
    `optimizer.py` keeps.
    """
    low_precision = any(p.dtype == torch.bfloat16 for p in actor.trainable())
    compact = low_precision and ppo.weights == "compact"
    stage = max(ppo.zero_stage or 0, 1) if low_precision and not compact else ppo.zero_stage or 0
    cuda = world.device.type == "cuda"
    apart = ppo.critic and (ppo.value_learning_rate is not None or ppo.value_warmup_steps > 0)
    groups: Any = (
        [{"params": policy_parameters(actor)}, {"params": value_parameters(actor)}]
        if apart
        else actor.trainable()
    )
    rate = ppo.peak_learning_rate
    if compact:
        optimizer: torch.optim.Optimizer = CompactAdamW(
            groups, lr=rate, weight_decay=ppo.weight_decay, seed=seed
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=ppo.weight_decay, fused=cuda)
    if stage == 0:
        return PlainEngine(actor, optimizer, ppo.max_grad_norm, ppo.value_max_grad_norm, world)
    if ppo.value_max_grad_norm is not None:
        raise UserError(
            "ppo.value_max_grad_norm needs ppo.zero_stage 0, and this run trains under ZeRO"
            f" {stage}, which clips by the norm of all gradients; leave it out"
        )
    return ZeroEngine(actor, optimizer, stage, low_precision, ppo.max_grad_norm, world)
