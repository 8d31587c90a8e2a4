"""TRL's GRPOTrainer on the tiny policy, rewarded by the server over real HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sarm.data.endings import ends
from serving.client import RemoteReward
from tests.serving.servers import TOKEN, Server

QUESTIONS = ["How can I make this work?", "What is the best way to do it?", "Tell me the steps."]


@pytest.mark.slow
@pytest.mark.parametrize("conversational", [True, False])
def test_grpo_is_trained_by_the_served_reward(
    conversational: bool,
    server: Server,
    scorer: Any,
    tiny_policy: Path,
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    """What TRL logs of each completion is what offline scoring makes of it, and the policy has
    moved.
    """
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    asked: list[dict[str, Any]] = []

    class Noted(RemoteReward):
        def score(self, prompts: Any, responses: Any, ended: Any) -> dict[str, Any]:
            answer = super().score(prompts, responses, ended)
            for i, (p, r, e) in enumerate(zip(prompts, responses, ended, strict=True)):
                asked.append({"prompt": p, "response": r, "ended": e, "got": answer["rewards"][i]})
            return answer

    prompts = [[{"role": "user", "content": q}] if conversational else q for q in QUESTIONS]
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32")
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=Noted(server.url, token=TOKEN),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=10,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]),
        processing_class=tiny_tokenizer,
    )
    trainer.train()
    items = [{name: one[name] for name in ("prompt", "response", "ended")} for one in asked]
    job = {"form": "items", "items": items, "latents": []}
    reads = scorer.read(job)
    want = scorer.score([(job, reads)])[0]
    assert [one["got"] for one in asked] == pytest.approx(want["rewards"], abs=1e-5)
    assert len(asked) == 24 and len(set(want["rewards"])) > 12
    assert {True, False} == {one["ended"] for one in asked}, "some were cut, some ended"
    assert any(
        not e["ended"] and not ends(r.messages[-1]["content"])
        for e, r in zip(asked, reads, strict=True)
    )
    assert trainer._logs["extra"]["penalty"] and "fired/3" in trainer._logs["extra"]
    history = [line for line in trainer.state.log_history if "objective/penalty" in line]
    assert len(history) == 3 and all("rate/3" in line and "z/5" in line for line in history)
    assert any((p != before[name]).any() for name, p in policy.named_parameters())
