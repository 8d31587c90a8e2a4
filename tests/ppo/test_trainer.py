"""The trainer against an obvious one: gradients whatever the ranks and micro-batches, and what
each step promises.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM

from sarm.config import ROOT, UserError
from sarm.data.conversations import prompt_ids
from sarm.data.datasets import Prompt
from sarm.data.endings import Ending
from sarm.llama.decoders import decoder_for
from sarm.llama.generate import Rollout
from sarm.ppo import objective
from sarm.ppo import trainer as trainer_module
from sarm.ppo.advantages import ADVANTAGES
from sarm.ppo.batching import Mix, fitting_prompts, mini_batches, mix_of, rows_of_step
from sarm.ppo.drift import Drift
from sarm.ppo.learner.actor import make_actor
from sarm.ppo.learner.cuda_graphs import Recorded
from sarm.ppo.learner.distributed import place
from sarm.ppo.learner.export import exported, save_policy
from sarm.ppo.learner.learner import Logprobs, NotFinite
from sarm.ppo.learner.micro_batches import micro_batches, scatter
from sarm.ppo.loop import train, why_ended
from sarm.ppo.metrics import ending_metrics, refuse_mismatch, score_metrics
from sarm.ppo.reward import Scores
from sarm.ppo.trainer import Experience, Progress, Trainer
from tests.ranks import (
    PlantedReward,
    gradients,
    join_ranks,
    some_prompts,
    start_ranks,
    tiny_ppo,
    tiny_trainer,
)
from tests.tiny import tiny_tokenizer, write_tiny_policy

# --- who does what
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, ranks", [(7, 1), (7, 2), (8, 3), (2, 4)])
def test_every_row_is_scattered_once_and_evenly(n: int, ranks: int) -> None:
    lengths = [3, 90, 14, 14, 2, 60, 31, 7][:n]
    shares = scatter(lengths, ranks)
    assert sorted(itertools.chain(*shares)) == list(range(n))
    if n > ranks:
        assert max(sum(lengths[i] for i in h) for h in shares) - min(
            sum(lengths[i] for i in h) for h in shares
        ) <= max(lengths)


def test_rows_go_back_and_forth_over_ranks_the_longest_first() -> None:
    assert scatter([3, 8, 6, 7, 4, 5], 2) == [[1, 5, 4], [3, 2, 0]]


def test_micro_batches_are_as_many_on_every_rank() -> None:
    lengths = [5, 50, 7, 60, 9, 70, 3]
    batches = micro_batches([0, 1, 3, 5, 6], lengths, 60, 2)
    assert len({len(own) for own in batches}) == 1
    assert sorted(row for own in batches for micro in own for row in micro) == [0, 1, 3, 5, 6]
    alone = micro_batches([2], lengths, 60, 2)
    assert sorted(alone, key=len) == [[[2]], [[]]]


def test_every_prompt_is_drawn_once_a_pass_in_an_order_of_seed_and_pass() -> None:
    ids = [f"p{i}" for i in range(10)]
    drawn = [row for step in range(5) for row in rows_of_step(ids, 0, step, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert [row for step in range(10) for row in rows_of_step(ids, 0, step, 2)] == drawn
    assert drawn != [row for step in range(5) for row in rows_of_step(ids, 1, step, 4)]


def test_samples_of_a_prompt_lie_side_by_side_and_a_pass_takes_that_many_more_steps() -> None:
    ids = [f"p{i}" for i in range(10)]
    drawn = [row for step in range(5) for row in rows_of_step(ids, 0, step, 6, samples=3)]
    assert drawn[::3] == drawn[1::3] == drawn[2::3]
    assert drawn[::3] == [row for step in range(5) for row in rows_of_step(ids, 0, step, 2)]


def mixed(kinds: str, share: float) -> Mix | None:
    prompts = [
        Prompt(f"p{i}", (), "s", "safe" if kind == "s" else "unsafe", "", "ppo")
        for i, kind in enumerate(kinds)
    ]
    return mix_of(tiny_ppo(safe_share=share), prompts)


def test_safe_prompts_are_drawn_in_their_share_and_either_kind_pass_after_pass() -> None:
    ids = [f"p{i}" for i in range(10)]
    mix = mixed("sususuuuuu", 0.3)  # three are safe
    steps = [rows_of_step(ids, 0, step, 8, mix=mix) for step in range(20)]
    drawn = [row for rows in steps for row in rows]
    safe, unsafe = ([row for row in drawn if (row in (0, 2, 4)) == of] for of in (True, False))
    assert len(safe) == 0.3 * 160
    for at in range(1, 161):  # 0.3 of all that were drawn so far, to within one
        assert 0 <= 0.3 * at - sum(row in (0, 2, 4) for row in drawn[:at]) < 1 + 1e-9
    for start in range(0, 48, 3):
        assert sorted(safe[start : start + 3]) == [0, 2, 4]
    for start in range(0, 112, 7):
        assert sorted(unsafe[start : start + 7]) == [1, 3, 5, 6, 7, 8, 9]
    assert len({tuple(safe[start : start + 3]) for start in range(0, 48, 3)}) > 1
    of_two = [row for step in range(20) for row in rows_of_step(ids, 0, step, 8, 2, mix)]
    assert of_two[::2] == of_two[1::2] == drawn[:80]


@pytest.mark.parametrize(
    "kinds, share, missing",
    [("uuu", 0.25, "safe"), ("sss", 0.25, "unsafe"), ("sss", 0.0, "unsafe")],
)
def test_a_kind_of_prompt_that_is_to_be_drawn_and_missing_is_refused(
    kinds: str, share: float, missing: str
) -> None:
    with pytest.raises(UserError, match=f"ppo.safe_share is {share}, .* no {missing} prompts"):
        mixed(kinds, share)


def test_a_share_of_none_or_all_needs_one_kind_alone() -> None:
    for kinds, share in (("uuu", 0.0), ("sss", 1.0)):
        drawn = rows_of_step(["a", "b", "c"], 0, 0, 6, mix=mixed(kinds, share))
        assert sorted(drawn[:3]) == sorted(drawn[3:]) == [0, 1, 2]


def asked(*texts: str) -> list[Prompt]:
    return [
        Prompt(f"p{i}", ({"role": "user", "content": text},), "s", "unsafe", "", "ppo")
        for i, text in enumerate(texts)
    ]


def test_prompts_that_do_not_fit_are_refused_skipped_or_cut() -> None:
    tokenizer, prompts = tiny_tokenizer(), asked("Hi", "help me " * 40, "Why?", "go " * 60)
    ids = [prompt_ids(tokenizer, p.messages) for p in prompts]
    limit = max(len(ids[0]), len(ids[2]))
    ppo = tiny_ppo(max_prompt_tokens=limit, long_prompts="refuse")
    with pytest.raises(UserError) as refused:
        fitting_prompts(ppo, prompts, tokenizer, None)
    assert str(refused.value) == (
        f"2 of the 4 ppo prompts have more than ppo.max_prompt_tokens={limit} tokens (p1, p3 ...);"
        " raise it or set ppo.long_prompts to skip or truncate"
    )
    skipped = ppo.model_copy(update={"long_prompts": "skip"})
    assert fitting_prompts(skipped, prompts, tokenizer, limit + 8) == (
        [prompts[0], prompts[2]],
        [ids[0], ids[2]],
        2,
    )
    cut = fitting_prompts(
        ppo.model_copy(update={"long_prompts": "truncate"}), prompts, tokenizer, None
    )
    assert cut.prompts == prompts and cut[2] == 2
    assert cut[1][1] == [ids[1][0], *ids[1][len(ids[1]) - limit + 1 :]]
    with pytest.raises(UserError, match=f"none of the 1 ppo prompts has at most {limit} tokens"):
        fitting_prompts(skipped, prompts[1:2], tokenizer, None)
    with pytest.raises(UserError, match=f"max_prompt_tokens {limit} and max_new_tokens 8 exceed"):
        fitting_prompts(ppo, prompts, tokenizer, limit + 7)


def test_rates_of_monitors_are_logged_under_their_own_names() -> None:
    reward: Any = SimpleNamespace(metrics=lambda _: {"a": 1.0}, monitors=(7, 9, 5), kind="hinge")
    scores: Any = SimpleNamespace(
        monitors_z=torch.tensor(
            [[2.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 3.0, 1.0], [2.0, 0.0, 0.0]]
        )
    )
    tracked: Any = [
        SimpleNamespace(latent=latent, tau=tau) for latent, tau in ((5, 0.5), (7, 1.5), (11, 0.5))
    ]
    assert score_metrics(reward, scores, tracked) == {"a": 1.0, "rate/5": 0.75, "rate/7": 0.5}
    assert score_metrics(reward, scores, tracked[2:]) == {"a": 1.0}


class Steps:
    """A trainer whose steps do nothing, or raise."""

    def __init__(self, error: Exception | None = None, **ppo: Any) -> None:
        self.ppo, self.error = tiny_ppo(**ppo), error
        drift = SimpleNamespace(mean=None, passed=lambda before, distances: [])
        self.progress = SimpleNamespace(step=0, drift=drift)
        self.learner = SimpleNamespace(out_of_memory=lambda n: f"no room for {n} tokens")
        self.reward = SimpleNamespace(tokens_per_batch=77)

    def run_step(self) -> dict[str, Any]:
        if self.error:
            raise self.error
        self.progress.step += 1
        return {"kl": 0.5}


@pytest.mark.parametrize(
    ("stop_at", "saved", "over"),
    [(None, [2], True), (1, [1], False), (2, [2], False), (3, [2], True)],
)
def test_training_says_whether_it_is_over(
    stop_at: int | None, saved: list[int], over: bool
) -> None:
    steps, saves, lines = Steps(steps=3, checkpoint_every=2), [], []
    step = lambda: steps.progress.step  # noqa: E731
    assert over is train(
        steps,  # type: ignore[arg-type]
        save=lambda: saves.append(step()) or Path("kept"),  # type: ignore[func-returns-value]
        log=lines.append,
        stop_requested=lambda: step() == stop_at,
    )
    assert lines == [{"step": i, "kl": 0.5} for i in range(step())]
    assert step() == (3 if over else stop_at)
    assert saves == ([2, 3] if stop_at == 3 else saved)


def test_out_of_memory_names_the_step_and_how_much_was_scored_at_once() -> None:
    steps: Any = Steps(torch.OutOfMemoryError("CUDA"))
    with pytest.raises(UserError, match=r"^step 0: no room for 77 tokens$"):
        train(steps, save=Path, log=print, stop_requested=bool)


def test_minibatches_split_the_batch() -> None:
    parts = mini_batches(12, 3, 0, 1, 0)
    assert [len(p) for p in parts] == [4, 4, 4] and sorted(itertools.chain(*parts)) == list(
        range(12)
    )
    assert parts == mini_batches(12, 3, 0, 1, 0) != mini_batches(12, 3, 0, 1, 1)


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, (0, 1, 0)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (0, 1, 0)),  # what a launcher did not say
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "20001",
            },
            (1, 2, 1),
        ),
    ],
)
def test_place(env: dict[str, str], expected: tuple[int, int, int]) -> None:
    assert place(env)[:3] == expected


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "a"}, {"MASTER_PORT": "20001"}])
def test_ranks_that_cannot_meet_are_told(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT"):
        place({"RANK": "0", "WORLD_SIZE": "2", **given})


def test_the_torchrun_of_the_docs_takes_the_phases_words_for_the_phases() -> None:
    """Without `--` it reads `--run` as its own `--run-path`."""
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^torchrun (.*)$", text, re.MULTILINE)
    words = shlex.split(line)
    given = get_args_parser().parse_args(words)
    assert given.module and not given.run_path and given.training_script == "jobs"
    assert given.training_script_args == words[words.index("jobs") + 1 :]
    assert "--run" in given.training_script_args


# --- gradients
# ------------------------------------------------------------------------------------------------

STAGES = (0, 2, 3)
BUDGETS = (40, 10_000)


def batch_of(prompts: list[list[int]]) -> tuple[Rollout, Experience]:
    """Responses of 1 to 9 tokens and made-up numbers."""
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 9, 4, 2, 7, 3, 9][: len(prompts)]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    numbers = [
        torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0) for _ in range(4)
    ]
    responses = torch.where(mask, torch.randint(5, 300, mask.shape, generator=generator), 4)
    old_logprobs, old_values, advantages, returns = numbers[0] * 0.3 - 5.5, *numbers[1:]
    none = torch.zeros(len(prompts), dtype=torch.bool)
    return Rollout(prompts, responses, mask, old_logprobs, none), Experience(
        old_logprobs, old_logprobs, advantages, old_values, returns, importance=None
    )


def write_gradients(world: Any, policy: Path, out: Path) -> None:
    for stage, budget in itertools.product(STAGES, BUDGETS):
        trainer = tiny_trainer(
            world, policy, PlantedReward(), tiny_ppo(zero_stage=stage, micro_batch_tokens=budget)
        )
        rollout, experience = batch_of(trainer.prompt_ids[:7])
        sums = trainer.learner.forward_backward(rollout, range(7), trainer.loss, experience)
        names = ("loss/policy_avg", "loss/value_avg", "tokens")
        found = gradients(trainer) | {"losses": torch.stack([sums[name] for name in names])}
        if world.rank == 0:
            save_file(found, out / f"{world.size}-{stage}-{budget}.safetensors")


def obvious_gradients(policy: Path, prompts: list[list[int]]) -> dict[str, Tensor]:
    """One sequence at a time, the losses written out token by token."""
    ppo = tiny_ppo()
    actor = make_actor(AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32), ppo, 0)
    rollout, experience = batch_of(prompts)
    policy_loss = value_loss = torch.zeros(())
    for row, prompt in enumerate(prompts):
        response = rollout.ids(row)
        out = actor.policy(torch.tensor([prompt + response]), output_hidden_states=True)
        values = actor.value_head(out.hidden_states[-1][0])
        for t, token in enumerate(response):
            at = len(prompt) - 1 + t
            logprob = F.log_softmax(out.logits[0, at].float(), -1)[token]
            ratio = torch.exp(logprob - experience.old_logprobs[row, t])
            advantage, old_value, target = (
                experience.advantages[row, t],
                experience.old_values[row, t],
                experience.returns[row, t],
            )
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
            policy_loss = policy_loss + (
                torch.minimum(loss, -3 * advantage) if advantage < 0 else loss
            )
            clipped = values[at].clamp(old_value - 0.2, old_value + 0.2)
            value_loss = value_loss + 0.5 * torch.maximum(
                (values[at] - target) ** 2, (clipped - target) ** 2
            )
    ((policy_loss + 0.1 * value_loss) / int(rollout.mask.sum())).backward()
    return {name: p.grad for name, p in actor.named_parameters()} | {
        "losses": torch.stack([policy_loss, value_loss, rollout.mask.sum()]).detach()
    }


def test_gradients_do_not_depend_on_ranks_micro_batches_or_zero_stage(
    outcome: Path, tiny_policy: Path, tiny_tokenizer
) -> None:
    expected = obvious_gradients(
        tiny_policy, [prompt_ids(tiny_tokenizer, p.messages) for p in some_prompts()[:7]]
    )
    largest = max(float(g.abs().max()) for name, g in expected.items() if name != "losses")
    for size, stage, budget in itertools.product((1, 2), STAGES, BUDGETS):
        found = load_file(outcome / f"{size}-{stage}-{budget}.safetensors")
        torch.testing.assert_close(
            found.pop("losses").float(), expected["losses"], rtol=1e-5, atol=0
        )
        assert found.keys() == expected.keys() - {"losses"}
        for name, grad in found.items():
            assert float((grad - expected[name]).abs().max()) < 1e-6 * max(largest, 1), (
                size,
                stage,
                budget,
                name,
            )


# --- whole steps
# ------------------------------------------------------------------------------------------------


class BrokenReward(PlantedReward):
    """Scores every response `value`."""

    value = math.nan

    def _encode(self, conversations):  # type: ignore[no-untyped-def]
        encoded = super()._encode(conversations)
        return encoded._replace(rewards=torch.full_like(encoded.rewards, self.value))


def two_steps(world: Any, policy: Path, out: Path) -> None:
    trainer = tiny_trainer(
        world,
        policy,
        PlantedReward(worth=0.5),
        tiny_ppo(lora={"rank": 2, "alpha": 4}, num_mini_batches=2, micro_batch_tokens=80),
    )
    lines = [trainer.run_step() for _ in range(2)]
    if world.rank == 0:
        (out / f"steps-{world.size}.json").write_text(json.dumps(lines))


class NeverRecorded(Recorded):
    """Rounds batches up as a recorded pass has them, and stays eager."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.run(*inputs)


def single_rank_checks(world: Any, policy: Path, out: Path) -> None:
    found: dict[str, Any] = {}
    trainer = tiny_trainer(
        world,
        policy,
        PlantedReward(),
        tiny_ppo(num_ppo_epochs=2, num_mini_batches=4, kl_controller="adaptive", kl_target=1e-6),
    )
    found["many"] = trainer.run_step()
    found["kl_coef"] = trainer.progress.kl_coef
    found["stopped"] = tiny_trainer(
        world, policy, PlantedReward(), tiny_ppo(num_ppo_epochs=2, num_mini_batches=4, kl_stop=1e-9)
    ).run_step()

    exact, rounded = (
        tiny_trainer(world, policy, PlantedReward(worth=0.5), tiny_ppo(micro_batch_tokens=1000))
        for _ in range(2)
    )
    learner = rounded.learner
    learner.recorded = NeverRecorded(learner._pass, learner.actor.trainable(), [])
    found["exact"], found["rounded"] = (
        [trainer.run_step() for _ in range(2)] for trainer in (exact, rounded)
    )

    trainer = tiny_trainer(world, policy, PlantedReward(), tiny_ppo())
    trainer.learner.decoder = decoder_for(
        AutoModelForCausalLM.from_pretrained(write_tiny_policy(out / "other", seed=1))
    )
    before = trainer.learner.actor.policy.lm_head.weight.clone()
    try:
        trainer.run_step()
    except UserError as error:
        found["disagreeing"] = str(error)
    found["untouched"] = torch.equal(before, trainer.learner.actor.policy.lm_head.weight)
    trainer.progress = trainer.progress._replace(step=1)
    found["later"] = trainer.run_step()["rollout/logprob_mismatch"]

    trainer = tiny_trainer(
        world,
        policy,
        PlantedReward(),
        tiny_ppo(lora={"rank": 2, "alpha": 4}, learning_rate=0.05, max_grad_norm=1e9),
    )
    drawn = trainer.draw([row % 12 for row in range(30)])
    found["keys"] = [d.key for d in drawn]
    found["saves"], found["lines"] = [], []

    def save() -> Path:
        found["saves"].append(trainer.progress.step)
        return Path("checkpoint")

    asked = iter([False, True])
    found["finished"] = train(
        trainer, save=save, log=found["lines"].append, stop_requested=lambda: next(asked)
    )
    save_policy(
        policy, exported(trainer.learner.actor, world).weights, trainer.tokenizer, out / "policy"
    )
    ids = torch.tensor([trainer.prompt_ids[3]])
    with torch.no_grad():
        save_file(
            {"logits": trainer.learner.actor.policy(ids).logits, "ids": ids},
            out / "logits.safetensors",
        )

    found["errors"] = []
    for value, changes in (
        (math.nan, {}),
        (1e38, {"reward_scale": "none", "reward_clip": None, "whiten_advantages": False}),
    ):
        trainer = tiny_trainer(world, policy, BrokenReward(), tiny_ppo(**changes))
        trainer.reward.value = value
        found["saves"] = []
        try:
            train(trainer, save=save, log=found["lines"].append, stop_requested=lambda: False)
        except UserError as error:
            found["errors"].append([str(error), found["saves"]])
    (out / "found.json").write_text(json.dumps(found))


def on_each_rank(world: Any, policy: Path, out: Path) -> None:
    write_gradients(world, policy, out)
    two_steps(world, policy, out)
    if world.size == 1:
        single_rank_checks(world, policy, out)


@pytest.fixture(scope="module")
def outcome(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank and two ranks wrote; starting a process takes longer than what it does."""
    out = tmp_path_factory.mktemp("outcome")
    groups = [start_ranks(on_each_rank, size, tiny_policy, out) for size in (1, 2)]
    for group in groups:
        join_ranks(group)
    return out


@pytest.fixture(scope="module")
def found(outcome: Path) -> dict[str, Any]:
    return json.loads((outcome / "found.json").read_text())


def test_a_batch_rounded_up_for_recording_is_the_same_step(found: dict[str, Any]) -> None:
    for a, b in zip(found["exact"], found["rounded"], strict=True):
        same = {
            key for key in a if not key.startswith("time/") and "per_s" not in key and key != "eps"
        }
        assert {key: b[key] for key in same} == pytest.approx(
            {key: a[key] for key in same}, rel=1e-4, abs=1e-6, nan_ok=True
        )


def test_one_rank_or_two_take_the_same_steps(outcome: Path) -> None:
    one, two = (json.loads((outcome / f"steps-{n}.json").read_text()) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        same = {
            key for key in a if not key.startswith("time/") and "per_s" not in key and key != "eps"
        }
        assert {key: a[key] for key in same} == pytest.approx(
            {key: b[key] for key in same}, rel=1e-3, abs=2e-5, nan_ok=True
        )
        assert a["objective/scores"] == b["objective/scores"]


def test_minibatches_are_optimizer_steps(found) -> None:
    assert found["many"]["policy/updates"] == 8
    assert found["many"]["policy/approxkl_avg"] > 0


def test_kl_stop_ends_the_updates_after_the_first_that_has_drifted(found) -> None:
    assert (found["stopped"]["policy/updates"], found["stopped"]["policy/kl_stopped"]) == (2, 1)


def test_the_adaptive_controller_raises_the_coefficient(found) -> None:
    # KL of the first step is 0, so the error is clipped at -0.2: 0.05 (1 - 0.2 * 8 / 10000)
    assert found["kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 8 / 10_000))


def test_old_logprobs_are_those_of_the_policy_that_is_updated(outcome: Path) -> None:
    first = json.loads((outcome / "steps-1.json").read_text())[0]
    assert first["rollout/logprob_mismatch_max"] < 1e-5
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_a_sampler_that_is_another_policy_stops_the_first_step_before_any_update(found) -> None:
    assert found["later"] > 0.2 and found["untouched"]
    nats = re.search(r"differ by (\d+\.\d+) nats per token on average", found["disagreeing"])
    assert nats and 0.2 < float(nats[1]) == pytest.approx(found["later"], abs=0.5)


@pytest.mark.parametrize("nats, stops", [(0.19, False), (0.21, True)])
def test_a_mean_mismatch_above_a_fifth_of_a_nat_stops(nats: float, stops: bool) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    sampled = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]])
    # off by 0, 2 and 1 times `nats`, to either side
    trained = sampled + nats * torch.tensor([[0.0, 2.0, 99.0], [-1.0, 99.0, 0.0]])
    rollout = Rollout([[1], [2]], mask.long(), mask, sampled, torch.tensor([False, True]))
    logprobs = Logprobs(trained, trained, None)
    with pytest.raises(UserError, match=r"0\.21 nats") if stops else nullcontext():
        refuse_mismatch(rollout, logprobs)


def test_the_share_of_responses_that_spell_a_special_token() -> None:
    mask = torch.ones(4, 2, dtype=torch.bool)
    sampled = Rollout([[1]] * 4, mask.long(), mask, mask.float(), torch.zeros(4, dtype=torch.bool))
    texts = ["yes", "yes<|eot_id|>no<|eot_id|>", "<|eot_id", "<|pad|>"]
    endings = [Ending(text, 2, True) for text in texts]
    found = ending_metrics(sampled, endings, tiny_tokenizer())
    assert found["response/spelled"] == 0.5


def test_a_prompt_that_is_drawn_again_has_noise_of_its_own(found) -> None:
    assert len(set(found["keys"])) == 30


def test_asked_to_stop_it_saves_after_the_step_and_leaves(found) -> None:
    assert found["finished"] is False
    assert [line["step"] for line in found["lines"][:2]] == [0, 1]


def test_the_saved_policy_is_the_trained_one_in_bf16(outcome: Path, tiny_policy: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(outcome / "policy")
    assert saved.dtype == torch.bfloat16
    kept = load_file(outcome / "logits.safetensors")
    before = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    with torch.no_grad():
        got = torch.log_softmax(saved.float()(kept["ids"]).logits, -1)
        untrained = torch.log_softmax(before(kept["ids"]).logits, -1)
    wanted = torch.log_softmax(kept["logits"], -1)
    assert float((got - wanted).abs().max()) < 0.1 * float((untrained - wanted).abs().max())


def test_what_is_not_finite_stops_at_a_checkpoint_and_names_the_prompts(found) -> None:
    (reward, reward_saves), (loss, loss_saves) = found["errors"]
    assert "a reward is not finite" in reward and "the loss is not finite" in loss
    for text in (reward, loss):
        assert "step 0" in text and some_prompts()[0].id[:8] in text
    assert reward_saves == loss_saves == [0]


# --- responses that are trimmed
# ------------------------------------------------------------------------------------------------

SAMPLED = [
    ("help me.", " and then he"),
    ("please. no", ""),  # ended by itself: all of it counts
    ("no end here", ""),  # cut, without a sentence end
    ("what? so it is.", " e e e"),
    ("a thing.", ""),  # cut just there
    ("steps!", " of"),
    ("first:\n1. make", ""),  # a list's number ends nothing
    ("people who have been hurt.", " see them"),
]
"""Eight responses: what counts of each, and what follows its last sentence end."""
ENDED = 1


class Scored(PlantedReward):
    """Keeps the texts that it scores."""

    def _encode(self, conversations):  # type: ignore[no-untyped-def]
        self.texts = [c[-1]["content"] for c in conversations]
        return super()._encode(conversations)


def planted(prompts: list[list[int]], tails: Sequence[str]) -> Rollout:
    """`SAMPLED` with these tails, as if a policy had sampled them; all cut but one."""
    tokenizer = tiny_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = [
        ids(kept) + (ids(tail) if row != ENDED else [tokenizer.eos_token_id])
        for row, ((kept, _), tail) in enumerate(zip(SAMPLED, tails, strict=True))
    ]
    mask = torch.arange(max(map(len, rows))) < torch.tensor([len(row) for row in rows])[:, None]
    responses = torch.full(mask.shape, tokenizer.pad_token_id)
    responses[mask] = torch.tensor([token for row in rows for token in row])
    logprobs = torch.where(mask, -5.5 - torch.arange(mask.shape[1]) / 100, 0.0)
    return Rollout(prompts, responses, mask, logprobs, torch.arange(8) != ENDED)


def trimming(world: Any, policy: Path, out: Path) -> None:
    """One step each from rollouts that differ after the last sentence end only."""
    none = [""] * 8
    cases = {
        "short": (False, none),
        "trimmed": (True, [tail for _, tail in SAMPLED]),
        "other tails": (True, [tail and " he" * 9 for _, tail in SAMPLED]),
        "whole": (False, [tail for _, tail in SAMPLED]),
    }
    found: dict[str, Any] = {}
    for name, (trim, tails) in cases.items():
        trainer = tiny_trainer(
            world,
            policy,
            Scored(worth=0.5),
            tiny_ppo(missing_eos_penalty=0.3, max_new_tokens=32),
            trim=trim,
        )
        # planted log-probabilities would stop the first step
        trainer.progress = trainer.progress._replace(step=1)
        trainer.sample = lambda drawn, step, tails=tails: planted([d.ids for d in drawn], tails)
        learnt: list[list[int]] = []
        forward = trainer.learner.forward
        trainer.learner.forward = lambda rollout, forward=forward, learnt=learnt: (
            learnt.extend(rollout.ids(row) for row in range(8)) or forward(rollout)
        )
        line = trainer.run_step()
        found[name] = {"line": line, "texts": sorted(trainer.reward.texts), "learnt": learnt}
        save_file(
            {key: p.detach().clone() for key, p in trainer.learner.actor.named_parameters()},
            out / f"{name}.safetensors",
        )
    (out / "trimming.json").write_text(json.dumps(found))


def test_what_follows_the_last_sentence_end_is_neither_scored_nor_learnt_from(
    tiny_policy: Path, tmp_path: Path
) -> None:
    """The step is that of responses which were that short, whatever was cut off."""
    join_ranks(start_ranks(trimming, 1, tiny_policy, tmp_path))
    found = json.loads((tmp_path / "trimming.json").read_text())
    after = {name: load_file(tmp_path / f"{name}.safetensors") for name in found}
    none = [""] * 8
    aside = {"response/length", "response/unended", "eps"}  # of what was sampled; a speed

    def step(name: str) -> dict[str, float]:
        return {
            key: value
            for key, value in found[name]["line"].items()
            if not key.startswith("time/") and "per_s" not in key and key not in aside
        }

    for name in ("trimmed", "other tails"):
        assert step(name) == pytest.approx(step("short"), rel=1e-6, abs=1e-8, nan_ok=True), name
        assert found[name]["texts"] == sorted(kept for kept, _ in SAMPLED)
        short = planted([[]] * 8, none)
        assert found[name]["learnt"] == [short.ids(row) for row in range(8)]
        for key, weight in after["short"].items():
            assert torch.equal(after[name][key], weight), (name, key)
    whole = found["whole"]
    assert whole["texts"] == sorted(kept + tail for kept, tail in SAMPLED)
    assert step("whole") != pytest.approx(step("short"), rel=1e-3, nan_ok=True)
    assert any(not torch.equal(after["whole"][key], after["short"][key]) for key in after["short"])

    line, cut = found["trimmed"]["line"], found["other tails"]["line"]
    assert line["response/cut"] == 7 / 8 and line["val/num_eos_tokens"] == 1
    assert line["response/unended"] == 2 / 8, "what has no sentence end is kept whole"
    assert whole["line"]["response/unended"] == 6 / 8
    assert line["response/scored_length"] == whole["line"]["response/scored_length"] - removed()
    assert line["response/length"] == whole["line"]["response/length"] < cut["response/length"]


def removed() -> float:
    """Tokens of the tails, a response."""
    none, tails = (planted([[]] * 8, t) for t in ([""] * 8, [tail for _, tail in SAMPLED]))
    return float(tails.mask.sum() - none.mask.sum()) / 8


# --- what does not fit
# ------------------------------------------------------------------------------------------------


def bad_input_cases(world: Any, policy: Path, out: Path) -> None:
    trainer = tiny_trainer(world, policy, PlantedReward(), tiny_ppo())
    lengths = [len(ids) for ids in trainer.prompt_ids]
    limit = sorted(lengths)[len(lengths) // 2]
    found: dict[str, Any] = {
        "limit": limit,
        "too long": sum(n > limit for n in lengths),
        "errors": [],
    }
    for way in ("skip", "truncate"):
        short = tiny_trainer(
            world, policy, PlantedReward(), tiny_ppo(max_prompt_tokens=limit, long_prompts=way)
        )
        found[way] = [[len(ids) for ids in short.prompt_ids], short.long_prompts]
        if way == "truncate":
            long = max(range(len(lengths)), key=lambda i: lengths[i])
            found["cut"] = short.prompt_ids[long] == [
                trainer.prompt_ids[long][0],
                *trainer.prompt_ids[long][1 - limit :],
            ]
            found["logged"] = short.run_step()["prompts/too_long"]
    for changes in (
        {"max_prompt_tokens": limit, "long_prompts": "refuse"},
        {"max_prompt_tokens": 4095},
    ):
        try:
            tiny_trainer(world, policy, PlantedReward(), tiny_ppo(**changes))
        except UserError as error:
            found["errors"].append(str(error))

    def no_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    for broken in ("sample", "score", "_reference_logprobs", "_outputs", "step"):
        trainer = tiny_trainer(world, policy, PlantedReward(), tiny_ppo())
        learner = trainer.learner
        where = {"sample": learner.decoder, "score": trainer.reward, "step": learner.engine}
        setattr(where.get(broken, learner), "decode" if broken == "sample" else broken, no_memory)
        try:
            train(
                trainer,
                save=lambda: Path("checkpoint"),
                log=lambda line: None,
                stop_requested=lambda: False,
            )
        except UserError as error:
            found["errors"].append(str(error))
    (out / "found.json").write_text(json.dumps(found))


def test_long_prompts_and_out_of_memory(tiny_policy: Path, tmp_path: Path) -> None:
    join_ranks(start_ranks(bad_input_cases, 1, tiny_policy, tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    limit, too_long = found["limit"], found["too long"]
    assert too_long > 0
    assert found["skip"][1] == found["truncate"][1] == found["logged"] == too_long
    assert len(found["skip"][0]) == 12 - too_long and max(found["skip"][0]) == limit
    assert len(found["truncate"][0]) == 12 and max(found["truncate"][0]) == limit and found["cut"]
    refused, context, *memory = found["errors"]
    assert (
        f"{too_long} of the 12 ppo prompts have more than ppo.max_prompt_tokens={limit} tokens"
        in refused
    )
    assert "exceed the policy's context of 4096" in context
    expected = [
        ("rollout", "ppo.batch_size=4"),
        ("score", "sarm.tokens_per_batch=8192"),
        ("reference", "ppo.micro_batch_tokens=100"),
    ]
    expected += [("update", "ppo.gradient_checkpointing=true"), ("optimizer", "ppo.lora")]
    for text, (phase, remedy) in zip(memory, expected, strict=True):
        assert (
            "step 0" in text
            and f"in phase {phase} (8 sequences of at most" in text
            and remedy in text
        )


# --- what a step says of itself, without one
# ------------------------------------------------------------------------------------------------


def test_why_training_is_over_in_words() -> None:
    ppo = tiny_ppo(steps=3, stop_at_kl=1.25)

    def ended(step: int, mean: float | None, **more: Any) -> str:
        progress: Any = SimpleNamespace(step=step, drift=SimpleNamespace(mean=mean))
        return why_ended(ppo.model_copy(update=more), progress)

    assert [ended(step, None) for step in (0, 2, 3, 4)] == ["", "", *["all 3 steps were made"] * 2]
    assert ended(1, 1.2499) == ""
    reached = "the mean KL of five steps, 1.25 nats, reached ppo.stop_at_kl 1.25"
    assert ended(1, 1.25) == ended(3, 1.25) == reached
    assert ended(1, 9.87654, stop_at_kl=0.5) == (
        "the mean KL of five steps, 9.88 nats, reached ppo.stop_at_kl 0.5"
    )
    assert ended(1, 9.0, stop_at_kl=None) == ""


def test_what_is_evaluated_kept_and_saved_between_steps() -> None:
    """Evaluated before the first step, every other step and at the end; kept as its distances are
    reached; no checkpoint where training is over.
    """
    steps: Any = Steps(steps=5, checkpoint_every=2, kl_distances=[0.5, 2.0])
    steps.ppo = steps.ppo.model_copy(
        update={"held_out": steps.ppo.held_out.model_copy(update={"every": 2})}
    )
    seen: list[Any] = []
    drifts = [f"drift {i}" for i in range(6)]

    def run_step() -> dict[str, Any]:
        steps.progress.step += 1
        at = steps.progress.step
        steps.progress.drift = SimpleNamespace(
            mean=None,
            name=drifts[at],
            passed=lambda before, distances: [
                d for d in distances if at == 3 and before.name == drifts[2]
            ],
        )
        return {"kl": at}

    steps.run_step = run_step
    steps.progress.drift = SimpleNamespace(mean=None, name=drifts[0])
    assert train(
        steps,
        save=lambda: seen.append(("save", steps.progress.step)) or Path("x"),  # type: ignore[func-returns-value]
        log=lambda line: seen.append(line),
        stop_requested=bool,
        keep=lambda distances: seen.append(("keep", distances)),
        evaluate=lambda: seen.append(("evaluate", steps.progress.step)),
    )
    assert seen == [
        ("evaluate", 0),
        {"step": 0, "kl": 1},
        {"step": 1, "kl": 2},
        ("save", 2),
        ("evaluate", 2),
        {"step": 2, "kl": 3},
        ("keep", [0.5, 2.0]),
        {"step": 3, "kl": 4},
        ("save", 4),
        ("evaluate", 4),
        {"step": 4, "kl": 5},
        ("evaluate", 5),
    ]


@pytest.mark.parametrize("updated", [False, True])
def test_what_is_not_finite_is_told_with_its_prompts_and_what_is_kept(updated: bool) -> None:
    steps: Any = Steps(NotFinite("the loss", updated=updated))
    steps.progress.step = 2
    steps.prompts = [SimpleNamespace(id=name) for name in "cab"]
    steps.rows = lambda step: [2, 0, 0, 1] if step == 2 else []
    kept = (
        "its first updates were made, so the newest checkpoint is an earlier one"
        if updated
        else "the state before it is in kept/step-2"
    )
    with pytest.raises(UserError) as refused:
        train(steps, save=lambda: Path("kept/step-2"), log=print, stop_requested=bool)
    assert str(refused.value) == (
        f"step 2: the loss is not finite, {kept}; look at the batch's prompts (a, b, c) or lower"
        " ppo.learning_rate"
    )


def bare(**ppo: Any) -> Any:
    """A trainer of which only the settings are there."""
    trainer: Any = Trainer.__new__(Trainer)
    trainer.ppo, trainer.seed, trainer.mix = tiny_ppo(**ppo), 5, None
    trainer.progress = Progress(2, 0.25, objective.RunningSd(), 1.5, Drift((1.0, 2.0), 0.5))
    return trainer


def test_a_prompt_drawn_again_has_a_key_of_its_own() -> None:
    trainer = bare(batch_size=8, samples_per_prompt=2)
    trainer.prompts = [SimpleNamespace(id=name) for name in "abc"]
    trainer.prompt_ids = [[1], [2, 2], [3]]
    assert [(d.prompt.id, d.ids, d.key) for d in trainer.draw([2, 1, 2, 2])] == [
        ("c", [3], "c#0"),
        ("b", [2, 2], "b#0"),
        ("c", [3], "c#1"),
        ("c", [3], "c#2"),
    ]
    assert trainer.rows(4) == rows_of_step(["a", "b", "c"], 5, 4, 8, 2)
    assert trainer.rows(4) != rows_of_step(["a", "b", "c"], 0, 4, 8, 2)
    trainer.mix = Mix([0], [1, 2], Fraction(1, 4))
    assert trainer.rows(0) == rows_of_step(["a", "b", "c"], 5, 0, 8, 2, trainer.mix)
    assert trainer.rows(0).count(0) == 2


def test_each_text_is_scored_after_its_own_prompt() -> None:
    """By whichever rank has its row."""
    trainer = bare()
    said: list[Any] = []
    scores = [torch.tensor([1.0, 2.0])] * 8
    trainer.reward = SimpleNamespace(score=lambda given: said.append(given) or scores)
    trainer.learner = SimpleNamespace(
        map_rows=lambda rollout, of: [of([1, 0]), of([0])][0] if rollout == "rollout" else None
    )
    drawn: Any = [SimpleNamespace(prompt=p) for p in asked("a", "b")]
    assert trainer.score(drawn, "rollout", ["x", "y"]) == Scores(*scores)
    answers = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": text}]
        for p, text in (("a", "x"), ("b", "y"))
    ]
    assert said == [answers[::-1], answers[:1]]
    with pytest.raises(ValueError, match="zip"):
        trainer.score(drawn, "rollout", ["x"])
    for bad in (math.nan, math.inf):
        scores[2] = torch.tensor([1.0, bad])
        with pytest.raises(NotFinite, match=r"^a reward$") as error:
            trainer.score(drawn, "rollout", ["x", "y"])
        assert error.value.updated is False


def test_a_tokens_kl_is_held_within_the_largest_log_ratio() -> None:
    trainer = bare(kl_estimator="k1", log_ratio_max=0.5, kl_in="reward", reward_scale="none")
    rollout: Any = SimpleNamespace(
        truncated=torch.tensor([False]), mask=torch.tensor([[True, True, True]])
    )
    scores: Any = SimpleNamespace(total=torch.tensor([3.0]))
    logprobs: Any = SimpleNamespace(
        old=torch.tensor([[-1.0, -1.0, -5.0]]), ref=torch.tensor([[-4.0, -1.25, -1.0]])
    )
    trainer.base_reward_sd = None
    paid = trainer.rewards(rollout, scores, logprobs)
    assert paid.kl.tolist() == [[0.5, 0.25, -0.5]]
    # the coefficient is a quarter
    assert paid.tokens.tolist() == [[-0.125, -0.0625, 3.125]]


def test_the_schedules_of_policy_and_value_head_by_hand() -> None:
    """The head's begins at once; the policy's after the head's own two steps, over the eight left.
    Either warms up in two steps.
    """
    settings = {"steps": 10, "value_warmup_steps": 2, "warmup_steps": 2, "learning_rate": 0.8}
    trainer = bare(**settings, lr_schedule="constant", value_learning_rate=0.2)
    rates = [trainer.learning_rates(step) for step in range(5)]
    of_policy, of_head = zip(*rates, strict=True)
    assert of_policy[:2] == (0.0, 0.0) and of_head[2:] == (0.2,) * 3
    assert 0 < of_policy[2] < of_policy[3] <= of_policy[4] == 0.8 and 0 < of_head[0] < 0.2
    assert of_policy[2] / 0.8 == pytest.approx(of_head[0] / 0.2)
    both = bare(**settings | {"value_warmup_steps": 0}, lr_schedule="linear")
    assert both.learning_rates(7)[0] == both.learning_rates(7)[1] < 0.8
    linear = bare(**settings, lr_schedule="linear")
    assert linear.learning_rates(9)[0] == pytest.approx(
        objective.learning_rate(7, steps=8, peak=0.8, schedule="linear", warmup_steps=2)
    )
    assert linear.learning_rates(9)[1] == pytest.approx(
        objective.learning_rate(9, steps=10, peak=0.8, schedule="linear", warmup_steps=2)
    )


def test_the_whole_loss_is_the_sum_of_its_terms() -> None:
    trainer = bare(vf_coef=0.5, entropy_coef=0.125, kl_in="loss", kl_estimator="k3")
    found = {
        "loss/policy_avg": 1.0,
        "loss/value_avg": 2.0,
        "loss/kl_avg": 4.0,
        "policy/entropy_avg": 8.0,
        "policy/approxkl_avg": 16.0,
    }
    assert trainer.total_loss(found) == 1.0 + 1.0 + 1.0 - 1.0
    del found["loss/value_avg"], found["loss/kl_avg"]
    assert trainer.total_loss(found) == 0.0


def test_the_coefficient_of_the_next_step_by_hand() -> None:
    trainer = bare(kl_controller="adaptive", kl_target=4.0, kl_horizon=64, batch_size=16)
    # 10 % above the target
    assert trainer.next_kl_coef(4.4) == pytest.approx(0.25 * (1 + 0.1 * 16 / 64))
    assert bare(kl_target=4.0).next_kl_coef(4.4) == 0.25


def test_progress_goes_through_json_and_back() -> None:
    trainer = bare()
    running = objective.RunningSd().updated(torch.tensor([1.0, 2.0, 4.0]))
    trainer.progress = trainer.progress._replace(running=running)
    state = json.loads(json.dumps(trainer.state()))
    assert state == {
        "step": 2,
        "kl_coef": 0.25,
        "running": running._asdict(),
        "training_s": 1.5,
        "drift": {"recent": [1.0, 2.0], "farthest": 0.5},
    }
    other, restored = bare(), []
    other.progress = Progress(0, 0.0, objective.RunningSd(), 0.0)
    other.learner = SimpleNamespace(restore=restored.append)
    other.restore(state, "tensors")
    assert other.progress == trainer.progress and restored == ["tensors"]
    assert other.progress.drift.after(3.0).recent == (1.0, 2.0, 3.0)


def test_prompts_that_cannot_be_drawn_in_whole_words() -> None:
    with pytest.raises(UserError) as refused:
        mixed("uuu", 0.25)
    assert str(refused.value) == (
        "ppo.safe_share is 0.25, and part ppo has no safe prompts that fit; give a source of kind"
        " safe a `ppo` fraction in data.sources, or leave safe_share out"
    )
    assert mix_of(tiny_ppo(), asked("a")) is None
    assert mixed("suu", 0.1) == Mix([0], [1, 2], Fraction(1, 10))
    tokenizer, prompts = tiny_tokenizer(), asked(*["help me " * 40] * 7)
    ppo = tiny_ppo(max_prompt_tokens=9, long_prompts="refuse", max_new_tokens=8)
    for context, way, said in (
        (
            16,
            "skip",
            "ppo.max_prompt_tokens 9 and max_new_tokens 8 exceed the policy's context of 16;"
            " lower one",
        ),
        (
            None,
            "refuse",
            "7 of the 7 ppo prompts have more than ppo.max_prompt_tokens=9 tokens (p0, p1, p2, p3,"
            " p4 ...); raise it or set ppo.long_prompts to skip or truncate",
        ),
        (
            17,
            "skip",
            "none of the 7 ppo prompts has at most 9 tokens; raise ppo.max_prompt_tokens or give"
            " part ppo other data",
        ),
    ):
        with pytest.raises(UserError) as refused:
            fitting_prompts(
                ppo.model_copy(update={"long_prompts": way}), prompts, tokenizer, context
            )
        assert str(refused.value) == said


@pytest.mark.parametrize("pad", [None, 0])
def test_what_the_learner_is_made_of(pad: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_of: dict[str, Any] = {}
    fitted = ([SimpleNamespace(id="a"), SimpleNamespace(id="b")], [[1, 2, 3], [1]], 4)
    policy: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=77))
    tokenizer: Any = SimpleNamespace(pad_token_id=pad)

    def fitting(*given: Any) -> Any:
        asked_of["fitting"] = given
        return fitted

    def learner(*given: Any, **how: Any) -> str:
        asked_of.update(given=given, how=how)
        return "a learner"

    monkeypatch.setattr(trainer_module, "fitting_prompts", fitting)
    monkeypatch.setattr(trainer_module, "mix_of", lambda *given: ("mix of", *given))
    stops = lambda *given: [9, 4] if given == (policy, tokenizer) else []  # noqa: E731
    monkeypatch.setattr(trainer_module, "stop_ids", stops)
    monkeypatch.setattr(trainer_module, "Learner", learner)
    model = torch.nn.Linear(3, 2)
    model.register_buffer("more", torch.zeros(5, dtype=torch.float64))
    reward: Any = SimpleNamespace(model=model, penalised=("p",))
    ppo = tiny_ppo(advantage="rloo", samples_per_prompt=2, kl_coef=0.375)
    made = Trainer(
        ppo,
        policy,
        tokenizer,
        reward,
        ["prompts"],  # type: ignore[list-item]
        seed=5,
        world="world",
        trim=True,
        base_reward_sd=0.5,
    )
    assert asked_of["fitting"] == (ppo, ["prompts"], tokenizer, 77)
    assert asked_of["given"] == (ppo, policy)
    assert asked_of["how"] == {
        "stops": [9, 4],
        "pad_id": 9 if pad is None else 0,
        "longest_prompt": 3,
        "reward_bytes": (6 + 2) * 4 + 5 * 8,
        "seed": 5,
        "world": "world",
    }
    assert (made.prompts, made.prompt_ids, made.long_prompts) == fitted
    assert made.mix == ("mix of", ppo, fitted[0]) and made.tracked == ("p",)
    assert (made.trim, made.base_reward_sd, made.seed) == (True, 0.5, 5)
    assert (made.ppo, made.tokenizer, made.reward, made.learner) == (
        ppo,
        tokenizer,
        reward,
        "a learner",
    )
    assert made.estimate is ADVANTAGES["rloo"]
    assert made.progress == Progress(0, 0.375, objective.RunningSd(), 0.0, Drift())
    unknown: Any = SimpleNamespace(config=SimpleNamespace())
    monkeypatch.setattr(trainer_module, "stop_ids", lambda *_: [9])
    Trainer(ppo, unknown, tokenizer, reward, [], seed=5, world=None)
    assert asked_of["fitting"][3] is None


@pytest.mark.parametrize(("dtype", "step"), [(None, 0), (None, 2), ("fp8", 0), ("fp8", 2)])
def test_a_step_hands_each_part_what_the_one_before_made(
    dtype: str | None, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = bare(rollout_dtype=dtype)
    trainer.progress = trainer.progress._replace(step=step)
    trainer.reward = SimpleNamespace(tokenizer="the SARM's")
    mask = torch.ones(2, 3, dtype=torch.bool)
    sampled = Rollout([[1]] * 2, mask.long(), mask, mask.float(), torch.tensor([True, False]))
    endings = [Ending("one", 2, True), Ending("two", 1, False)]
    running = objective.RunningSd().updated(torch.tensor([1.0, 2.0]))
    seen: dict[str, Any] = {}

    def part(name: str, result: Any) -> Any:
        def noted(*given: Any) -> Any:
            seen[name] = given
            return result

        return noted

    parts = {
        "rows": [1, 0],
        "draw": "drawn",
        "sample": sampled,
        "endings": endings,
        "score": "scores",
        "rewards": SimpleNamespace(running=running),
        "experience": "experience",
        "update": lambda: {"lr": 0.5, "a": 2.0},
        "metrics": {"objective/kl": 1.5, "a": 1.0},
        "next_kl_coef": 0.125,
    }
    for name, result in parts.items():
        setattr(trainer, name, part(name, result))
    trainer.learner = SimpleNamespace(
        forward=part("forward", lambda: "logprobs"),
        pace=part("pace", {"time/step": 2.25, "objective/kl": 9.0}),
    )
    for name in ("refuse_quantised", "refuse_mismatch"):
        monkeypatch.setattr(trainer_module.metrics, name, part(name, None))
    monkeypatch.setattr(
        trainer_module.metrics, "ending_metrics", part("ending_metrics", {"response/cut": 0.5})
    )
    before = trainer.progress
    found = trainer.run_step()
    rollout = seen["forward"][0]
    assert rollout.mask.tolist() == [[True, True], [True, False]]
    assert seen["rows"] == (step,) and seen["draw"] == ([1, 0],)
    assert seen["sample"] == ("drawn", step) and seen["endings"] == (sampled,)
    assert seen["score"] == ("drawn", rollout, ["one", "two"])
    assert seen["rewards"] == (rollout, "scores", "logprobs")
    assert seen["experience"] == (rollout, parts["rewards"], "logprobs")
    assert seen["update"] == (rollout, "experience")
    assert seen["metrics"] == (rollout, "scores", "logprobs", parts["rewards"], "experience")
    assert seen["ending_metrics"] == (sampled, endings, "the SARM's")
    assert seen["pace"] == (rollout,) and seen["next_kl_coef"] == (1.5,)
    assert seen.get("refuse_quantised") == (
        (trainer.ppo, step, rollout, "logprobs") if dtype else None
    )
    assert seen.get("refuse_mismatch") == (
        (rollout, "logprobs") if dtype is None and step == 0 else None
    )
    assert found == {
        "objective/kl": 9.0,
        "a": 2.0,
        "lr": 0.5,
        "response/cut": 0.5,
        "time/step": 2.25,
    }
    assert trainer.progress == Progress(
        step + 1, 0.125, running, before.training_s + 2.25, before.drift.after(1.5)
    )


def test_the_batchs_own_numbers_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = bare(batch_size=8, rollout_dtype="fp8", rollout_weight_cap=1.5)
    trainer.long_prompts, trainer.reward, trainer.tracked = 3, "reward", "tracked"
    rollout: Any = SimpleNamespace(mask=torch.tensor([[True, True], [True, False]]))
    rewards: Any = SimpleNamespace(
        kl=torch.tensor([[1.0, 3.0], [2.0, 99.0]]),
        tokens=torch.tensor([[0.5, 1.0], [4.0, 99.0]]),
        sd=0.75,
    )
    logprobs: Any = SimpleNamespace(values="values")
    seen: dict[str, Any] = {}

    def part(name: str) -> Any:
        def noted(*given: Any) -> dict[str, float]:
            seen[name] = given
            return {name: 1.0}

        return noted

    names = ("rollout_metrics", "importance_metrics", "critic_metrics", "score_metrics")
    for name in names:
        monkeypatch.setattr(trainer_module.metrics, name, part(name))
    experience: Any = SimpleNamespace(importance="weights", returns="returns")
    found = trainer.metrics(rollout, "scores", logprobs, rewards, experience)
    own = {
        "episode": 24.0,
        "objective/non_score_reward": -0.25 * 3.0,
        "objective/rlhf_reward": 2.75,
        "objective/kl_coef": 0.25,
        "objective/reward_sd": 0.75,
        "prompts/too_long": 3.0,
    }
    assert found == own | dict.fromkeys(names, 1.0)
    assert seen == {
        "rollout_metrics": (rollout, logprobs),
        "importance_metrics": (rollout, logprobs, 1.5),
        "critic_metrics": ("values", "returns", rollout.mask),
        "score_metrics": ("reward", "scores", "tracked"),
    }
    plain: Any = SimpleNamespace(importance=None, returns="returns")
    found = trainer.metrics(rollout, "scores", logprobs, rewards, plain)
    assert "importance_metrics" not in found
