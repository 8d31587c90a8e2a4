"""The compound reward inside TRL's own GRPOTrainer and RLOOTrainer, on tiny models; and their
advantages and loss beside ours.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from sarm.llama.logprobs import logprobs_from_hidden
from sarm.ppo import losses
from sarm.ppo.advantages import ADVANTAGES, Episodes
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
                "advantage": tables["advantages"],
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

    # Many latents penalised at tau 0: whatever the policy says, some fire.
    penalised = [Penalised(latent, 0.0, 0.01 * latent) for latent in range(16, 32)]
    reward = CompoundReward(
        SarmModel.from_pretrained(tiny_sarm), tiny_tokenizer, penalised, trim=False
    )
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

    def advantages(totals: torch.Tensor) -> list[float]:
        """Ours, of responses of one token each, two to a prompt."""
        episodes = Episodes(totals[:, None], None, torch.ones(4, 1, dtype=torch.bool), 2, 1.0, 1.0)
        return ADVANTAGES[method.lower()](episodes).advantages[:, 0].tolist()

    assert len(logged.steps) == 2
    for step in logged.steps:
        scores = reward.score(
            [conversation(p, c) for p, c in zip(step["prompt"], step["completion"], strict=True)]
        )
        assert scores.total.shape == (4,) and scores.penalty.max() > 0 and scores.total.std() > 0
        assert step["compound_reward"] == pytest.approx(scores.total.tolist(), abs=1e-5)
        assert step["sarm_reward"] == pytest.approx(scores.reward.tolist(), abs=1e-5)
        assert step["penalty"] == pytest.approx(scores.penalty.tolist(), abs=1e-5)
        assert step["advantage"] == pytest.approx(advantages(scores.total), abs=1e-4)
        assert max(step["advantage"]) > 0
        metrics = step["metrics"]
        assert metrics["rewards/compound_reward/mean"] == pytest.approx(
            scores.total.mean().item(), abs=1e-5
        )
        assert metrics["objective/penalty"] == pytest.approx(scores.penalty.mean().item(), abs=1e-5)
        assert [metrics[f"rate/{p.latent}"] for p in penalised] == pytest.approx(
            scores.fired.float().mean(0).tolist()
        )
    assert logged.steps[0]["completion"] != logged.steps[1]["completion"]


def test_the_clipped_loss_with_k3_and_an_entropy_bonus_is_trls_to_value_and_gradient() -> None:
    """Its GRPO loss averaged over tokens (`bnpo`), clipped at other ranges on either side."""
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 2, 4, 1])[:, None]
    old, ref = torch.randn(2, 4, 5)
    advantages = torch.tensor([1.5, -0.7, 0.3, -2.0])
    theirs, ours = (
        (old + 0.4 * torch.randn(4, 5, generator=torch.Generator().manual_seed(1))).requires_grad_()
        for _ in range(2)
    )
    entropies = theirs.exp()  # made up, but with a gradient
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (theirs, entropies, None),
        _entropy_bonus_enabled=True,
        use_adaptive_entropy=False,
        entropy_coef=0.2,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.07,
        epsilon_low=0.1,
        epsilon_high=0.3,
        loss_type="bnpo",
        use_vllm=False,
        tools=None,
        environments=None,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        accelerator=SimpleNamespace(
            sync_gradients=False,
            gather=lambda x: x,
            reduce=lambda x, **_: x,
            gather_for_metrics=lambda x: x,
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, 5, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
    }
    want = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    want.backward()

    policy = losses.policy_loss(
        ours[mask],
        old[mask],
        advantages[:, None].expand(4, 5)[mask],
        cliprange_low=0.1,
        cliprange_high=0.3,
        dual_clip=None,
        log_ratio_max=20.0,
    )
    kl = losses.kl_loss(ours[mask], ref[mask], estimator="k3", log_ratio_max=20.0)
    entropy = losses.entropy_bonus(ours[mask].exp())
    got = policy.plus(kl, 0.07).plus(entropy, -0.2).total / mask.sum()
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert (theirs.grad[mask] == 0).sum() == 0 and want.item() != 0


def test_entropies_are_trls() -> None:
    from trl.trainer.utils import entropy_from_logits

    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(6, 40, bias=False), torch.randn(7, 6)
    got = logprobs_from_hidden(hidden, head, torch.zeros(7, dtype=torch.long), 0.7)
    torch.testing.assert_close(got.entropy, entropy_from_logits(head(hidden) / 0.7).detach())
