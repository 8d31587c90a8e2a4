"""The compound reward inside TRL's own GRPOTrainer and RLOOTrainer, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, TrainerCallback

from sarm.ppo.reward import CompoundReward, Penalised, conversation
from sarm.reward_model.model import SarmModel

trl = pytest.importorskip("trl")

QUESTIONS = [
    "How can I make this work?",
    "What is the best way to do it?",
    "Tell me the steps.",
    "Who should I call?",
]


class Completions(TrainerCallback):
    """Keeps what the trainer logs at each step: its metrics, and the completions with their
    rewards, one step's at a time.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "reward" in logs:
            tables = self.trainer._logs
            columns = {
                **tables["rewards"],
                **tables["extra"],
                "prompt": tables["prompt"],
                "completion": tables["completion"],
            }
            self.steps.append(
                {"metrics": logs, **{name: list(column) for name, column in columns.items()}}
            )


@pytest.mark.parametrize(("method", "conversational"), [("GRPO", True), ("RLOO", False)])
def test_logged_rewards_are_the_scores_of_the_logged_completions(
    method: str,
    conversational: bool,
    tiny_policy: Path,
    tiny_sarm: Path,
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    from datasets import Dataset

    # Many latents docked at tau 0: whatever the policy says, some fire.
    penalised = [Penalised(latent, 0.0, 0.01 * latent) for latent in range(16, 32)]
    reward = CompoundReward(SarmModel.from_pretrained(tiny_sarm), tiny_tokenizer, penalised)
    arguments = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=0,
    )
    prompts = [[{"role": "user", "content": q}] if conversational else q for q in QUESTIONS]
    logged = Completions()
    logged.trainer = getattr(trl, f"{method}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32"),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(
            [{"prompt": p, "another column": i} for i, p in enumerate(prompts)]
        ),
        processing_class=tiny_tokenizer,
        callbacks=[logged],
    )
    logged.trainer.train()

    assert len(logged.steps) == 2
    for step in logged.steps:
        scores = reward.score(
            [conversation(p, c) for p, c in zip(step["prompt"], step["completion"], strict=True)]
        )
        assert scores.total.shape == (4,) and scores.penalty.max() > 0 and scores.total.std() > 0
        assert step["compound_reward"] == pytest.approx(scores.total.tolist(), abs=1e-5)
        assert step["sarm_reward"] == pytest.approx(scores.reward.tolist(), abs=1e-5)
        assert step["penalty"] == pytest.approx(scores.penalty.tolist(), abs=1e-5)
        metrics = step["metrics"]
        assert metrics["rewards/compound_reward/mean"] == pytest.approx(
            scores.total.mean().item(), abs=1e-5
        )
        assert metrics["objective/penalty"] == pytest.approx(scores.penalty.mean().item(), abs=1e-5)
        assert [metrics[f"rate/{p.latent}"] for p in penalised] == pytest.approx(
            scores.fired.float().mean(0).tolist()
        )
    assert logged.steps[0]["completion"] != logged.steps[1]["completion"]
