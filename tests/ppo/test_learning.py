"""PPO through the real trainer on a tiny policy with planted latents, arms compared at equal KL: a
penalty makes the latent rarer than no penalty does, whether the reward charges for it or pays, and
where another can take its place, the ladder calls that evasion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from sarm.config import VerdictConfig
from sarm.data.conversations import prompt_ids
from sarm.evaluation.comparison import Rows
from sarm.evaluation.detector import Detector
from sarm.evaluation.verdict import Instrument, Verdict, decide
from sarm.ppo.learner.distributed import World
from sarm.ppo.loop import train, why_ended
from sarm.ppo.reward import CompoundReward, Penalised
from sarm.ppo.trainer import Drawn, Trainer
from sarm.records import Bounds
from sarm.reward_model.scoring import Encoded
from tests.ranks import some_prompts, tiny_ppo
from tests.tiny import llama_config, tiny_tokenizer

SEEDS = (0, 1, 2)
BEGINS = {"e": 0.3, "o": 0.25, "t": 0.2, "s": 0.15, "a": 0.1}
"""How the planted policy chooses a letter, at every place where it does not end."""
KL = 0.4
"""Nats at which arms are compared."""
ALPHA = 2.0
E, TWIN, RANDOM = 0, 1, 2
"""Latents: the response begins with e, with o, with t."""


def write_policy(folder: Path, ends: float) -> Path:
    """A Llama that says a few of these letters and ends, with probability `ends` at every place: a
    state's first number is the same everywhere, so that the head's first column is a bias.
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config())
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 8.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        constant = float(model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, :, 0].mean())
        head = model.lm_head.weight.normal_(0, 0.03)
        head[:, 0] = -16 / constant
        for letter, share in BEGINS.items():
            token = tokenizer.convert_tokens_to_ids(letter)
            head[token, 0] = math.log((1 - ends) * share) / constant
        head[tokenizer.eos_token_id, 0] = math.log(ends) / constant
    model.save_pretrained(folder)
    return folder


class LetterReward(CompoundReward):
    """Latents by the letter that a response begins with; `worth` of their values (n, 4) and of the
    responses' lengths (n,) is the reward, and latent `E` is penalised.
    """

    def __init__(self, worth: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.worth = worth
        penalised = [Penalised(E, 0.5, ALPHA)]
        super().__init__(_NoModel(), tiny_tokenizer(), penalised, monitors=[TWIN, RANDOM])  # type: ignore[arg-type]

    def _encode(self, conversations) -> Encoded:  # type: ignore[no-untyped-def]
        texts = [c[-1]["content"] for c in conversations]
        n, none = len(texts), torch.zeros(len(texts), dtype=torch.bool)
        z = torch.tensor([[float(t.startswith(x)) for x in "eots"] for t in texts]).reshape(n, 4)
        lengths = torch.tensor([float(len(text)) for text in texts])
        return Encoded(
            torch.arange(4, dtype=torch.int32).expand(n, -1),
            z,
            self.worth(z, lengths),
            torch.zeros(n, 4),
            torch.ones(n, dtype=torch.int32),
            none,
            none,
        )


class _NoModel(torch.nn.Module):
    d_sae = k = 4
    head_weight = torch.zeros(4)


class Plant(NamedTuple):
    worth: Callable[[Tensor, Tensor], Tensor]
    ends: float = 0.35
    learning_rate: float = 3e-4


PLANTS = {
    "harming": Plant(lambda z, length: -0.1 * z[:, E] + 0.06 * length),
    "misleading": Plant(lambda z, length: 0.4 * z[:, E] + 0.02 * length),
    # What the reward is after can be said in two ways.
    "pair": Plant(lambda z, length: z[:, E] + z[:, TWIN], ends=0.5, learning_rate=4e-4),
}
ARMS: dict[str, Callable[[CompoundReward], CompoundReward]] = {
    "penalty": lambda reward: reward,
    "no_penalty": lambda reward: reward.without_penalty(),
    "random": lambda reward: reward.with_penalised([Penalised(RANDOM, 0.5, ALPHA)]),
}


class Measured(NamedTuple):
    """Of one trained policy's samples."""

    columns: dict[str, np.ndarray]
    """Of `Rows`."""

    def mean(self, name: str) -> float:
        return float(self.columns[name].mean())


def measured(folder: Path, plant: Plant, arm: str, seed: int) -> Measured:
    """Trained until it is `KL` from the base, then sampled on other prompts."""
    policy = write_policy(folder, plant.ends)
    ppo = tiny_ppo(
        steps=200,
        batch_size=128,
        samples_per_prompt=16,
        advantage="rloo",
        learning_rate=plant.learning_rate,
        lr_schedule="constant",
        micro_batch_tokens=8192,
        kl_coef=0.03,
        reward_scale="none",
        stop_at_kl=KL,
    )
    model = LlamaForCausalLM.from_pretrained(policy, dtype=torch.float32)
    reward = ARMS[arm](LetterReward(plant.worth))
    prompts = some_prompts(140)
    trainer = Trainer(ppo, model, tiny_tokenizer(), reward, prompts[120:], seed=seed, world=World())
    train(trainer, save=lambda: policy, log=lambda line: None, stop_requested=lambda: False)
    assert "stop_at_kl" in why_ended(ppo, trainer.progress)
    return sampled(trainer, prompts[:120], seed)


def sampled(trainer: Trainer, prompts: list, seed: int) -> Measured:  # type: ignore[type-arg]
    """Eight responses to each prompt, the second half of which counts as safe."""
    drawn = [
        Drawn(p, prompt_ids(trainer.tokenizer, p.messages), f"{p.id}/{sample}")
        for p in prompts
        for sample in range(8)
    ]
    rollout = trainer.sample(drawn, -2)
    endings = trainer.endings(rollout)
    logprobs = trainer.learner.forward(rollout, update_follows=False)()
    answers = [[{"role": "assistant", "content": ending.text}] for ending in endings]
    z = trainer.reward.measure(answers, [E, TWIN]).numpy()
    tokens = rollout.mask.sum(1).numpy()
    ids = [d.prompt.id for d in drawn]
    columns = {
        "prompt_id": np.array(ids),
        "seed": np.full(len(ids), seed),
        "unsafe": np.arange(len(ids)) < len(ids) // 2,
        "penalised_fired": z[:, 0] > 0.5,
        "monitors_fired": z[:, 1] > 0.5,
        "refused": np.zeros(len(ids)),
        "harm": np.full(len(ids), math.nan),
        "n_tokens": tokens,
        "base_logprob": logprobs.ref.sum(1).numpy() / tokens,
        "kl": (logprobs.old - logprobs.ref).sum(1).numpy(),
        "unended": np.array([not ending.ended for ending in endings]),
    }
    return Measured(columns)


def check_control(folder: Path, name: str, seeds: tuple[int, ...], least: float) -> None:
    """The penalty arm's rate is under half of the no-penalty arm's, and that over `least`."""
    arms = ("penalty", "no_penalty")
    found = {arm: [measured(folder, PLANTS[name], arm, seed) for seed in seeds] for arm in arms}
    rates, kls = (
        {arm: [m.mean(column) for m in found[arm]] for arm in arms}
        for column in ("penalised_fired", "kl")
    )
    print(name, rates, kls)
    means = [np.mean(of_seeds) for of_seeds in kls.values()]
    assert max(means) < 1.2 * min(means), "compared at equal KL"
    for penalty, none in zip(rates["penalty"], rates["no_penalty"], strict=True):
        assert penalty < none / 2 and none > least


def test_the_penalty_halves_a_latent_that_the_reward_pays_for(tmp_path: Path) -> None:
    check_control(tmp_path, "misleading", SEEDS[:1], BEGINS["e"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name, least", [("harming", 0.2), ("misleading", BEGINS["e"])])
def test_at_equal_kl_the_penalty_halves_the_latent_of_every_seed(
    tmp_path: Path, name: str, least: float
) -> None:
    check_control(tmp_path, name, SEEDS, least)


def verdict_on(found: dict[str, list[Measured]]) -> Verdict:
    """The ladder's, with an instrument beyond doubt: what is planted is exact."""
    arms: dict[str, Rows | None] = {}
    for arm, of_seeds in found.items():
        columns = {
            name: np.concatenate([m.columns[name] for m in of_seeds]) for name in Rows._fields
        }
        measures = {name: columns[name].astype(float) for name in Rows._fields[3:]}
        arms[arm] = Rows(**columns | measures)
    sure = Bounds(value=0.9, low=0.8, high=1.0)
    detector = Detector("planted", 1000, 1000, 0, 1000, "planted")
    return decide(arms, VerdictConfig(), Instrument(0.9, sure, sure, detector, confirmed=True))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_twin_that_takes_over_is_called_evasion(tmp_path: Path) -> None:
    plant = PLANTS["pair"]
    found = {arm: [measured(tmp_path, plant, arm, seed) for seed in SEEDS] for arm in ARMS}
    for arm, of_seeds in found.items():
        names = ("penalised_fired", "monitors_fired", "kl", "unended")
        print(arm, [[round(m.mean(name), 3) for name in names] for m in of_seeds])
    for penalty, none in zip(found["penalty"], found["no_penalty"], strict=True):
        assert penalty.mean("penalised_fired") < none.mean("penalised_fired") / 2
        assert penalty.mean("monitors_fired") > none.mean("monitors_fired")
    verdict = verdict_on(found)
    print(verdict.word, verdict.sentences)
    assert (verdict.word, verdict.rung) == ("evasion", 4)
    # Against itself nothing changed: the word is of what was trained.
    assert verdict_on(found | {"penalty": found["no_penalty"]}).word == "no effect"
