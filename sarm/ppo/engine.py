"""What steps the actor's weights: a DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import torch

from sarm.config import PpoConfig
from sarm.ppo.actor import Actor
from sarm.ppo.decoders import base_model
from sarm.ppo.optimizer import StochasticAdamW
from sarm.ppo.world import World


def start_engine(actor: Actor, ppo: PpoConfig, seed: int, world: World) -> Any:
    """A DeepSpeed engine around the actor.

    Trainable float32 weights (LoRA, or a float32 model) are stepped as they are. A bf16 model trained in full keeps
    float32 master weights in ZeRO's optimizer, of stage 1 at least, or has its weights rounded stochastically.
    """
    import deepspeed

    low_precision = any(p.dtype == torch.bfloat16 for p in actor.trainable())
    stochastic = low_precision and ppo.weights == "stochastic_rounding"
    stage = max(ppo.zero_stage, 1) if low_precision and not stochastic else ppo.zero_stage
    cuda = world.device.type == "cuda"
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # boundaries are set by hand, and losses scaled by hand
        "gradient_clipping": ppo.max_grad_norm,
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": cuda, "contiguous_gradients": cuda},
    }
    if low_precision and stage > 0:
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if stochastic:
        optimizer: torch.optim.Optimizer = StochasticAdamW(
            actor.trainable(), lr=ppo.learning_rate, weight_decay=ppo.weight_decay, seed=seed * 1009 + world.rank
        )
    else:
        optimizer = torch.optim.AdamW(actor.trainable(), lr=ppo.learning_rate, weight_decay=ppo.weight_decay, fused=cuda)
    if cuda:
        base_model(actor.policy).gradient_checkpointing_enable({"use_reentrant": False})
    engine, *_ = deepspeed.initialize(model=actor, optimizer=optimizer, model_parameters=actor.trainable(), config=settings, dist_init_required=False)
    if stage == 3:
        # The log-probabilities read the head's weight without calling its module.
        deepspeed.zero.register_external_parameter(actor, base_model(actor.policy).lm_head.weight)
    return engine
