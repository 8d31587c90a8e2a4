"""The peer: a PPO step of TRL 1.12's PPOTrainer, the last release that had one, at Llama-3.2-1B's
shape on one GPU.

`python benchmarks/peer_trl.py [--batch 32] [--prompt 64] [--new 64]`, in an environment with
`trl==1.12.0` (it is no dependency of this project); ours is `python benchmarks/ppo.py --shape 1b
--mode full --new 64`. Both sides: the same shapes, random bf16 weights, prompts and new tokens of
exact length, a frozen reference, a reward model of half the policy's layers, one epoch of one
minibatch, AdamW: TRL's fused on bf16 weights and moments, ours on exact float32 weights with 8-bit
moments. Each has its own critic: TRL a second 1B model, trained beside the policy; ours a linear
head on the policy's own trunk. Our reward model carries an SAE besides, more work than the peer's
head.

Prints one line of JSON: seconds of each step, tokens/s of the median step, reserved peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


class StepTimes(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6, help="the first two are warm-up")
    args = parser.parse_args()
    os.environ["WANDB_DISABLED"] = "true"
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({f"w{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="w3")
        ),  # type: ignore[call-overload]
        bos_token="w0",
        eos_token="w1",
        pad_token="w2",
        padding_side="left",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        policy, reference = (
            LlamaForCausalLM(LlamaConfig(num_hidden_layers=16, **SHAPE)) for _ in range(2)
        )
        value = LlamaForSequenceClassification(
            LlamaConfig(num_hidden_layers=16, num_labels=1, **SHAPE)
        )
        reward = LlamaForSequenceClassification(
            LlamaConfig(num_hidden_layers=8, num_labels=1, **SHAPE)
        )
    torch.set_default_dtype(torch.float32)
    times = StepTimes()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir="/tmp/peer_trl",
            per_device_train_batch_size=args.batch,
            local_rollout_forward_batch_size=args.batch,
            num_mini_batches=1,
            num_ppo_epochs=1,
            response_length=args.new,
            total_episodes=args.batch * args.steps,
            learning_rate=1e-6,
            optim="adamw_torch_fused",
            bf16=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            num_sample_generations=0,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict(
            {
                "input_ids": (
                    torch.randint(10, 128000, (args.batch * args.steps, args.prompt)).tolist()
                )
            }
        ),
        callbacks=[times],
    )
    trainer.train()
    steps = [
        later - earlier for earlier, later in zip(times.ends[1:], times.ends[2:], strict=False)
    ]
    tokens = args.batch * (args.prompt + args.new)
    figures = {
        "step_s": steps,
        "tokens_per_s": tokens / statistics.median(steps),
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }
    print(json.dumps(figures | {"device": torch.cuda.get_device_name()}))


if __name__ == "__main__":
    main()
