"""How far `weights: compact` follows float32 master weights: `python benchmarks/optimizer.py
--steps 100`, on a CPU or a GPU.

PPO on SmolLM2 in full, with the demo's SARM, prompts and penalty. Every gradient of the compact run
also steps float32 copies by torch's AdamW. Printed: cosine and ratio of norms of the two
displacements of all weights, and beside them what is lost when float32 masters are rounded to bf16,
as both are for the model's own use.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from sarm.config import PpoConfig, load_config  # noqa: E402
from sarm.data.datasets import load_data, prompts_in  # noqa: E402
from sarm.hub import local_model  # noqa: E402
from sarm.ppo.learner.distributed import start_world  # noqa: E402
from sarm.ppo.learner.optimizer import CompactAdamW  # noqa: E402
from sarm.ppo.reward import CompoundReward, Penalised  # noqa: E402
from sarm.ppo.trainer import Trainer  # noqa: E402
from sarm.reward_model.model import load_sarm  # noqa: E402


def make_trainer(args: argparse.Namespace, world: Any) -> Trainer:
    config = load_config(ROOT / "configs" / "smollm2.yaml")
    sarm, sarm_tokenizer = load_sarm(config.sarm)
    reward = CompoundReward(
        sarm.to(world.device),
        sarm_tokenizer,
        [Penalised(i, 0.5, 0.1) for i in range(3)],
        all_reduce=world.sum,
    )
    source = local_model(config.policy.model, config.policy.revision)
    sizes = {"batch_size": args.batch, "max_prompt_tokens": 64, "max_new_tokens": args.new}
    ppo = PpoConfig(
        lora=None, weights="compact", zero_stage=0, steps=args.steps, learning_rate=args.lr, **sizes
    )
    policy = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    return Trainer(
        ppo,
        policy,
        AutoTokenizer.from_pretrained(source),
        reward,
        prompts_in(load_data(config.data), "ppo"),
        seed=0,
        world=world,
    )


class Shadow:
    """Float32 copies of the weights, stepped by torch's AdamW with the same gradients before the
    trainer's own optimizer is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.optimizer: CompactAdamW = trainer.learner.engine.optimizer
        self.weights = trainer.learner.actor.trainable()
        self.starts = [w.detach().clone() for w in self.weights]
        self.copies = [torch.nn.Parameter(w.detach().float()) for w in self.weights]
        self.masters = torch.optim.AdamW(self.copies, weight_decay=0.0)
        self.own_step = self.optimizer.step
        self.optimizer.step = self.step  # type: ignore[method-assign, assignment]

    def step(self, *, scale: Tensor) -> None:
        self.masters.param_groups[0]["lr"] = self.optimizer.param_groups[0]["lr"]
        for copy, weight in zip(self.copies, self.weights, strict=True):
            copy.grad = weight.grad.float() * scale  # type: ignore[union-attr]
        self.masters.step()
        self.masters.zero_grad()
        self.own_step(scale=scale)

    @torch.no_grad()
    def compared(self) -> tuple[float, float, float]:
        """(cosine, ratio of norms, cosine of the rounded masters' displacement) to the masters'
        displacement.
        """
        sums = torch.zeros(6, dtype=torch.float64)
        for weight, start, copy in zip(self.weights, self.starts, self.copies, strict=True):
            ours, theirs = (x - start.float() for x in (self.optimizer.master(weight), copy))
            rounded = copy.to(weight.dtype).float() - start.float()
            for i, (a, b) in enumerate(
                (
                    (ours, theirs),
                    (ours, ours),
                    (theirs, theirs),
                    (rounded, theirs),
                    (rounded, rounded),
                )
            ):
                sums[i] += float((a * b).sum(dtype=torch.float64))
        both, own, master, rounded_both, rounded_own, _ = sums.tolist()
        return (
            both / math.sqrt(own * master),
            math.sqrt(own / master),
            rounded_both / math.sqrt(max(rounded_own, 1e-300) * master),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-6)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    trainer = make_trainer(args, start_world())
    shadow, started = Shadow(trainer), time.perf_counter()
    print(f"{'steps':>5} {'cosine':>8} {'norms':>8} {'cosine, rounded masters':>24}", flush=True)
    for step in range(1, args.steps + 1):
        trainer.run_step()
        if step in (1, 3, 10, 30) or step == args.steps:
            cosine, norms, rounded = shadow.compared()
            print(
                f"{step:5d} {cosine:8.4f} {norms:8.4f} {rounded:24.4f}  "
                f" {time.perf_counter() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
