"""PPO through the real trainer on a tiny policy: the penalty makes a planted latent rare, and
nothing else does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.ranks import PlantedReward, run_ranks, tiny_ppo, tiny_trainer

SEEDS = (0, 1, 2)


def train_arms(world: Any, policy: Path, out: Path) -> None:
    rates: dict[str, list[list[float]]] = {}
    for arm in ("penalty", "no_penalty"):
        for seed in SEEDS:
            ppo = tiny_ppo(
                steps=STEPS,
                batch_size=64,
                learning_rate=LR,
                micro_batch_tokens=8192,
                lr_schedule="constant",
                kl_coef=0.01,
            )
            reward = PlantedReward(alpha=1.0, worth=0.2)  # r itself pays for the latent a little
            trainer = tiny_trainer(
                world, policy, reward if arm == "penalty" else reward.without_penalty(), ppo, seed
            )
            rates.setdefault(arm, []).append([trainer.run_step()["rate/0"] for _ in range(STEPS)])
    out.write_text(json.dumps(rates))


STEPS, LR = 14, 3e-3


def test_the_penalty_halves_the_planted_latents_rate_and_no_penalty_does_not(
    tiny_policy: Path, tmp_path: Path
) -> None:
    run_ranks(train_arms, 1, tiny_policy, tmp_path / "rates.json")
    rates = json.loads((tmp_path / "rates.json").read_text())
    before = [sum(r[:2]) / 2 for arm in rates.values() for r in arm]
    after = {arm: [sum(r[-4:]) / 4 for r in of_seeds] for arm, of_seeds in rates.items()}
    print(before, after)
    assert min(before) > 0.25  # there is something to control
    base = sum(before) / len(before)
    assert all(rate < base / 2 for rate in after["penalty"])
    assert all(rate > 0.8 * base for rate in after["no_penalty"])
