"""The compound reward against its definition computed text by text, and the random arm's dose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sarm.config import PenaltyConfig, SarmConfig, UserError
from sarm.data.conversations import tokenize_conversation
from sarm.ppo.penalties import PENALTIES, Penalised, batch_rates, density_terms
from sarm.ppo.reward import (
    CompoundReward,
    Scores,
    _best_match,
    calibrate_random,
    conversation,
    fires,
    matching_tau,
    scored_conversation,
)
from sarm.reward_model.model import SarmModel
from tests.runs import features

T = torch.tensor

TEXTS = [
    conversation(
        f"Question {i}?", "Sure, here is how you do it. " * (i % 4) + f"I will not do {i * i}."
    )
    for i in range(24)
]


@pytest.fixture(scope="module")
def sarm(tiny_sarm: Path) -> SarmModel:
    return SarmModel.from_pretrained(tiny_sarm)


@pytest.fixture(scope="module")
def dense(sarm: SarmModel, tiny_tokenizer: Any) -> Tensor:
    """z of TEXTS, (24, d_sae), from the model's own forward, a text at a time."""
    z = torch.zeros(len(TEXTS), sarm.d_sae)
    with torch.no_grad():
        for row, messages in enumerate(TEXTS):
            out = sarm(T([tokenize_conversation(tiny_tokenizer, messages, 4096).ids]))
            z[row, out.latent_indices[0]] = out.latent_values[0]
    return z


@pytest.fixture(scope="module")
def some(dense: Tensor) -> list[Penalised]:
    """Three latents that are active on some texts and not on others, at taus that part the active
    ones.
    """
    active = (dense > 0).float().mean(0)
    latents = (active - 0.5).abs().argsort()[:3].tolist()
    assert all(0.2 < active[latent] < 0.8 for latent in latents)
    return [
        Penalised(
            latent, dense[:, latent][dense[:, latent] > 0].median().item() - 1e-4, 0.1 * (i + 1)
        )
        for i, latent in enumerate(latents)
    ]


def reward_of(
    sarm: SarmModel, tokenizer: Any, penalised: Sequence[Penalised], **more: Any
) -> CompoundReward:
    return CompoundReward(sarm, tokenizer, penalised, **more)


def plain_rewards(sarm: SarmModel, z: Tensor) -> Tensor:
    return z @ sarm.head_weight.detach()


@pytest.mark.parametrize("kind", ["threshold", "hinge"])
def test_scores_are_the_definition_text_by_text(
    kind: Any, sarm: SarmModel, tiny_tokenizer: Any, dense: Tensor, some: list[Penalised]
) -> None:
    monitors = [latent for latent in range(sarm.d_sae) if dense[:, latent].any()][:2]
    scores = reward_of(sarm, tiny_tokenizer, some, kind=kind, monitors=monitors).score(TEXTS)
    want = [
        sum(
            p.alpha
            * (
                float(row[p.latent] > p.tau)
                if kind == "threshold"
                else max(0.0, row[p.latent].item() - p.tau)
            )
            for p in some
        )
        for row in dense
    ]
    assert 0 < sum(penalty > 0 for penalty in want) < len(TEXTS)
    torch.testing.assert_close(scores.penalty, T(want), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.reward, plain_rewards(sarm, dense), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.total, scores.reward - scores.penalty, rtol=0, atol=0)
    torch.testing.assert_close(scores.z, dense[:, [p.latent for p in some]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.monitors_z, dense[:, monitors], rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.fired, dense[:, [p.latent for p in some]] > T([p.tau for p in some]))
    assert scores.fired.dtype == torch.bool and not scores.truncated.any()


def test_a_clamp_changes_the_reward_and_not_the_penalty(
    sarm: SarmModel, tiny_tokenizer: Any, dense: Tensor, some: list[Penalised]
) -> None:
    clamp = min(p.tau for p in some) / 2
    held = reward_of(sarm, tiny_tokenizer, some, clamp=clamp).score(TEXTS)
    free = reward_of(sarm, tiny_tokenizer, some).score(TEXTS)
    clamped = dense.clone()
    for p in some:
        clamped[:, p.latent] = clamped[:, p.latent].clamp(max=clamp)
    torch.testing.assert_close(held.reward, plain_rewards(sarm, clamped), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(held.reward, free.reward, atol=1e-3)
    assert (
        torch.equal(held.penalty, free.penalty)
        and torch.equal(held.z, free.z)
        and held.penalty.any()
    )


def test_an_answer_that_ended_is_scored_whole_and_another_up_to_its_last_sentence(
    sarm: SarmModel, tiny_tokenizer: Any, some: list[Penalised]
) -> None:
    reward = reward_of(sarm, tiny_tokenizer, some, stop_ids=[3])
    asked, said = ["Why?"] * 3, ["I will not. Please call"] * 3
    got = reward(asked, said, completion_ids=[[5, 3], [5, 9], []])
    whole, cut = (
        reward.score([conversation("Why?", text)]).total.item() for text in (said[0], "I will not.")
    )
    assert got == pytest.approx([whole, cut, cut], abs=1e-4) and abs(whole - cut) > 1e-3
    untrimmed = reward_of(sarm, tiny_tokenizer, some, stop_ids=[3], trim=False)
    assert untrimmed(asked, said) == pytest.approx([whole] * 3, abs=1e-4)


def test_a_reward_keeps_no_rank_beyond_topk_and_knows_its_latents(
    sarm: SarmModel, tiny_tokenizer: Any, some: list[Penalised]
) -> None:
    assert reward_of(sarm, tiny_tokenizer, some).extra_ranks == 0
    with pytest.raises(UserError) as refused:
        reward_of(sarm, tiny_tokenizer, some, monitors=[sarm.d_sae, -1])
    assert str(refused.value) == (
        f"latents [{sarm.d_sae}, -1] are not in this SARM, which has {sarm.d_sae}; use the"
        " features.json made with it"
    )


def test_density_penalty_by_hand() -> None:
    z = T([[2.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
    p = batch_rates(z, lambda x: x)
    torch.testing.assert_close(p, T([2.5 / 4, 1.5 / 4], dtype=torch.float64))
    got = density_terms(z, [1.0, 2.0], p, T([0.5, 0.1], dtype=torch.float64))
    on, off = (
        [math.log(0.625 / 0.5), 2 * math.log(0.375 / 0.1)],
        [math.log(0.375 / 0.5), 2 * math.log(0.625 / 0.9)],
    )
    torch.testing.assert_close(
        got, T([[on[0], off[1]], [on[0], off[1]], [off[0], on[1]]], dtype=torch.float64)
    )


def test_density_penalty_averages_to_the_divergence_where_the_batch_is_large() -> None:
    z = (torch.arange(10_000)[:, None] < 3000).float()
    got = (
        density_terms(z, [0.7], batch_rates(z, lambda x: x), T([0.1], dtype=torch.float64))
        .mean()
        .item()
    )
    assert got == pytest.approx(0.7 * (0.3 * math.log(3) + 0.7 * math.log(0.7 / 0.9)), rel=1e-3)


def test_density_rate_is_that_of_all_ranks(
    sarm: SarmModel, tiny_tokenizer: Any, dense: Tensor, some: list[Penalised]
) -> None:
    rates = {p.latent: 0.2 for p in some}
    whole = reward_of(sarm, tiny_tokenizer, some, kind="density", reference_rates=rates).score(
        TEXTS
    )
    z = dense[:, [p.latent for p in some]]
    p = ((z > 0).sum(0) + 0.5) / (len(z) + 1)
    want = (
        T([x.alpha for x in some]) * torch.where(z > 0, (p / 0.2).log(), ((1 - p) / 0.8).log())
    ).sum(1)
    torch.testing.assert_close(whole.penalty, want)
    assert torch.equal(whole.fired, z > 0)

    counts = torch.cat([(z > 0).double().sum(0), T([float(len(z))], dtype=torch.float64)])
    part = reward_of(
        sarm,
        tiny_tokenizer,
        some,
        kind="density",
        reference_rates=rates,
        all_reduce=lambda mine: counts,
    ).score(TEXTS[:5])
    torch.testing.assert_close(part.penalty, whole.penalty[:5])
    none = reward_of(sarm, tiny_tokenizer, some, kind="density", reference_rates=rates).score([])
    assert none.total.shape == (0,) and none.z.shape == (0, 3)


def test_no_penalty_arm_measures_the_same_and_docks_nothing(
    sarm: SarmModel, tiny_tokenizer: Any, some: list[Penalised]
) -> None:
    reward = reward_of(sarm, tiny_tokenizer, some, clamp=0.1, monitors=[0])
    docked, plain = reward.score(TEXTS), reward.without_penalty().score(TEXTS)
    assert (
        torch.equal(plain.fired, docked.fired)
        and torch.equal(plain.z, docked.z)
        and torch.equal(plain.monitors_z, docked.monitors_z)
    )
    assert not plain.penalty.any() and torch.equal(
        plain.total, reward_of(sarm, tiny_tokenizer, ()).score(TEXTS).total
    )
    assert reward.penalised == tuple(some) and reward.clamp == 0.1


def test_latents_no_longer_penalised_are_monitored(sarm: SarmModel, tiny_tokenizer: Any) -> None:
    reward = reward_of(
        sarm, tiny_tokenizer, [Penalised(1, 0.0, 0.1), Penalised(2, 0.0, 0.1)], monitors=[5, 6]
    )
    other = reward.with_penalised([Penalised(2, 0.5, 0.1), Penalised(6, 0.5, 0.1)])
    assert (
        other.monitors == (5, 1)
        and [p.latent for p in other.penalised] == [2, 6]
        and reward.monitors == (5, 6)
    )
    both = reward_of(sarm, tiny_tokenizer, [Penalised(1, 0.0, 0.1)], monitors=[5, 1])
    once = both.with_penalised([Penalised(2, 0.5, 0.1)])
    assert once.monitors == (5, 1), "a latent monitored already is monitored once"


def test_from_features_takes_numbers_from_the_file_and_kind_from_the_config(
    sarm: SarmModel, tiny_tokenizer: Any
) -> None:
    found = features(
        penalised=[{"latent": 3, "tau": 1.5, "alpha": 0.2}],
        monitors=[7],
        reference_rates={"3": 0.25, "7": 0.5},
    )
    reward = CompoundReward.from_features(
        sarm,
        tiny_tokenizer,
        found,
        PenaltyConfig(kind="density", clamp=2.0),
        SarmConfig(model="x", tokens_per_batch=99, max_length=77),
    )
    assert (
        reward.penalised == (Penalised(3, 1.5, 0.2),)
        and reward.monitors == (7,)
        and reward.reference_rates == {3: 0.25, 7: 0.5}
    )
    assert (reward.kind, reward.clamp, reward.tokens_per_batch, reward.max_length) == (
        "density",
        2.0,
        99,
        77,
    )


@pytest.mark.parametrize(
    ("penalised", "more", "told"),
    [
        ([Penalised(1, 0, 0.1), Penalised(1, 1, 0.1)], {}, "twice"),
        ([Penalised(64, 0, 0.1)], {}, r"\[64\].*has 64"),
        ([], {"monitors": [-1]}, r"\[-1\]"),
        ([Penalised(1, 0, 0.1)], {"kind": "density"}, r"reference rates.*\[1\]"),
        (
            [Penalised(1, 0, 0.1)],
            {"kind": "density", "reference_rates": {1: 1.0}},
            r"reference rates.*\[1\]",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(
    penalised: list[Penalised],
    more: dict[str, Any],
    told: str,
    sarm: SarmModel,
    tiny_tokenizer: Any,
) -> None:
    with pytest.raises(UserError, match=told):
        reward_of(sarm, tiny_tokenizer, penalised, **more)


def test_a_text_costs_the_same_in_any_batch_and_an_overlong_one_is_counted(
    sarm: SarmModel, tiny_tokenizer: Any, some: list[Penalised]
) -> None:
    whole = reward_of(sarm, tiny_tokenizer, some).score(TEXTS)
    single = [
        reward_of(sarm, tiny_tokenizer, some, tokens_per_batch=1).score([text]) for text in TEXTS
    ]
    torch.testing.assert_close(
        torch.cat([s.total for s in single]), whole.total, rtol=1e-4, atol=1e-4
    )
    short = reward_of(sarm, tiny_tokenizer, some, max_length=30)
    lengths = [len(tokenize_conversation(tiny_tokenizer, text, 4096).ids) for text in TEXTS]
    assert (
        short.score(TEXTS).truncated.tolist() == [n > 30 for n in lengths]
        and sum(n > 30 for n in lengths) > 0
    )


def test_as_a_reward_function_strings_and_messages_score_alike_and_rates_are_logged(
    sarm: SarmModel, tiny_tokenizer: Any, some: list[Penalised]
) -> None:
    reward = reward_of(sarm, tiny_tokenizer, some, monitors=[0])
    metrics: dict[str, float] = {}
    extra: dict[str, list[float]] = {}
    prompts, completions = [t[0]["content"] for t in TEXTS], [t[1]["content"] for t in TEXTS]
    plain = reward(
        prompts=prompts,
        completions=completions,
        completion_ids=[],
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
    )
    scores = reward.score(TEXTS)
    assert plain == scores.total.tolist() and all(type(x) is float for x in plain)
    assert plain == reward([[t[0]] for t in TEXTS], [[t[1]] for t in TEXTS])
    for i, p in enumerate(some):
        assert metrics[f"rate/{p.latent}"] == pytest.approx(
            scores.fired[:, i].float().mean().item()
        )
    assert metrics["objective/compound"] == pytest.approx(
        metrics["objective/scores"] - metrics["objective/penalty"], abs=1e-6
    )
    assert metrics["objective/penalty"] > 0 and "z/0" in metrics
    assert extra == {"sarm_reward": scores.reward.tolist(), "penalty": scores.penalty.tolist()}
    assert reward.__name__ == "compound_reward"


def test_conversations_keep_their_system_turn_and_continue_an_opened_answer() -> None:
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    prompt = [system, user, {"role": "assistant", "content": "Sure, "}]
    want = [system, user, {"role": "assistant", "content": "Sure, no."}]
    assert (
        conversation(prompt, "no.")
        == conversation(prompt, [{"role": "assistant", "content": "no."}])
        == want
    )
    assert prompt[-1]["content"] == "Sure, "
    assert conversation("u", [{"role": "assistant", "content": None}]) == [
        user,
        {"role": "assistant", "content": ""},
    ]


# The random arm

Z = T([[5.0, 0.0], [4.0, 1.0], [3.0, 0.0], [2.0, 0.0]])
"""Two penalised latents over four generations."""


def dose(z: Tensor, penalised: Sequence[Penalised], kind: Any = "threshold") -> float:
    return PENALTIES[kind].doses(z, penalised).sum().item()


def columns(z: Tensor, candidates: list[int], chosen: Sequence[Penalised]) -> Tensor:
    return z[:, [candidates.index(p.latent) for p in chosen]]


def test_doses_are_means_by_latent() -> None:
    penalised = [Penalised(0, 2.5, 0.2), Penalised(1, 0.5, 0.1)]
    doses = {kind: PENALTIES[kind].doses(Z, penalised).tolist() for kind in PENALTIES}
    assert doses["threshold"] == pytest.approx([0.2 * 3 / 4, 0.1 / 4])
    assert doses["hinge"] == pytest.approx([0.2 * (2.5 + 1.5 + 0.5) / 4, 0.1 * 0.5 / 4])
    assert doses["density"] == pytest.approx([0.2, 0.1 / 4])


def test_random_latents_match_each_rate_by_hand() -> None:
    penalised = [Penalised(1, 0.5, 0.1), Penalised(0, 2.5, 0.2)]
    z_penalised = Z[:, [1, 0]]  # firing on 1 and 3 of 4 texts: dose 0.1 / 4 + 0.2 * 3 / 4
    candidates, z = (
        [70, 71, 72, 73],
        T([[0.0, 6.0, 0.0, 1.0], [0.0, 2.0, 8.0, 1.0], [0.0, 4.0, 0.0, 1.0], [0.0, 0.0, 7.0, 1.0]]),
    )
    # 71 is the first active on three texts: tau between 0 and 2. 72 is on two: for one, tau between
    # 7 and 8. 73 is not needed.
    assert calibrate_random(z, candidates, z_penalised, penalised) == [
        Penalised(72, 7.5, 0.1),
        Penalised(71, 1.0, 0.2),
    ]


def test_density_takes_the_candidate_of_the_nearest_rate() -> None:
    z = T([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    got = calibrate_random(z, [7, 9, 8], Z[:, [1]], [Penalised(1, 0.0, 0.1)], "density")
    assert [(p.latent, p.alpha) for p in got] == [(8, pytest.approx(0.05))]


def test_a_candidate_that_fires_too_seldom_gets_a_larger_alpha() -> None:
    got = calibrate_random(T([[0.0], [3.0], [0.0], [0.0]]), [9], Z[:, :1], [Penalised(0, 2.5, 0.2)])
    assert got == [Penalised(9, 1.5, pytest.approx(0.6))]


@pytest.mark.parametrize("kind", ["threshold", "hinge", "density"])
@pytest.mark.parametrize("seed", range(10))
def test_random_doses_are_equal_and_the_choice_is_deterministic(kind: Any, seed: int) -> None:
    torch.manual_seed(seed)
    z_penalised = torch.relu(torch.randn(40, 3) + T([1.0, 0.0, -1.5]))
    z_candidates = torch.relu(torch.randn(40, 12) - torch.rand(12) * 3)
    penalised, candidates = (
        [Penalised(i, 0.5, 0.1 * (i + 1)) for i in range(3)],
        list(range(100, 112)),
    )
    got = calibrate_random(z_candidates, candidates, z_penalised, penalised, kind)
    assert got == calibrate_random(z_candidates, candidates, z_penalised, penalised, kind)
    assert (
        len({p.latent for p in got}) == 3
        and {p.latent for p in got} <= set(candidates)
        and all(p.tau >= 0 for p in got)
    )
    assert (
        dose(columns(z_candidates, candidates, got), got, kind)
        == pytest.approx(dose(z_penalised, penalised, kind), rel=1e-9)
        != 0
    )


def test_where_candidates_suffice_rates_and_alphas_are_those_of_the_penalised() -> None:
    torch.manual_seed(0)
    z_penalised, z_candidates = torch.rand(50, 2), torch.rand(50, 4) * T([0.0, 3.0, 0.0, 5.0])
    penalised = [Penalised(0, 0.3, 0.1), Penalised(1, 0.9, 0.4)]
    got = calibrate_random(z_candidates, [5, 6, 7, 8], z_penalised, penalised)
    assert [p.latent for p in got] == [6, 8] and [p.alpha for p in got] == pytest.approx([0.1, 0.4])
    assert torch.equal(
        fires(columns(z_candidates, [5, 6, 7, 8], got), got).sum(0),
        fires(z_penalised, penalised).sum(0),
    )


def test_a_penalty_that_never_fires_is_matched_by_latents_that_never_do() -> None:
    penalised = [Penalised(0, 9.0, 0.1)]
    got = calibrate_random(T([[0.0, 20.0], [0.0, 1.0]]), [3, 4], Z[:2, :1], penalised)
    assert got == [Penalised(4, 20.0, 0.1)]
    assert calibrate_random(torch.zeros(2, 1), [3], Z[:2, :1], penalised) == [
        Penalised(3, 9.0, 0.1)
    ]


def test_calibration_without_a_usable_candidate_is_refused() -> None:
    with pytest.raises(UserError, match="none of the 2 random candidates fires"):
        calibrate_random(torch.zeros(4, 2), [3, 4], Z[:, :1], [Penalised(0, 2.5, 0.1)])
    with pytest.raises(UserError, match="1 random candidates cannot match 2"):
        calibrate_random(torch.ones(4, 1), [3], Z, [Penalised(0, 2.5, 0.1), Penalised(1, 0.5, 0.1)])


def test_matching_tau_respects_ties_and_neighbouring_floats() -> None:
    # one or three: the smaller of equals
    assert matching_tau(T([3.0, 2.0, 2.0, 0.0]), 2, 0.0) == 2.5
    # halfway from it to the next value, float32 would round up to that
    odd = torch.nextafter(T(1.0), T(2.0))
    near = torch.stack([odd, torch.nextafter(odd, T(2.0)), T(0.0)])
    assert fires(near[:, None], [Penalised(0, matching_tau(near, 1, 0.0), 1.0)]).sum() == 1
    assert matching_tau(T([3.0, -1.0]), 2, 0.0) == 1.5


def test_seeds_try_other_latents_though_none_fires_often_enough() -> None:
    """By hand: none fires on 200 texts; 40 and 30 are less than half of 100, 60 is not."""
    assert _best_match(200, [40, 100, 30, 60], "threshold") == 1
    assert _best_match(200, [60, 40, 100], "threshold") == 0
    assert _best_match(50, [40, 100, 60], "threshold") == 1  # the first that fires often enough
    assert _best_match(3, [0, 0], "threshold") == 0


def test_a_completion_is_scored_in_its_own_place_after_any_prompt() -> None:
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}

    def answered(text: str) -> list[dict[str, str]]:
        return [system, user, {"role": "assistant", "content": text}]

    said = [{"role": "assistant", "content": " I will not. Please call ", "name": "x"}]
    cut = scored_conversation([system, user], said, ended=False)
    assert cut == ([system, user, {**said[0], "content": "I will not."}], True)
    whole = " I will not. Please call "
    assert scored_conversation([system, user], whole, ended=True) == (answered(whole.strip()), True)
    untrimmed = scored_conversation([system, user], whole, ended=False, trim=False)
    assert untrimmed == (answered(whole.strip()), False)
    assert scored_conversation([system, user], "no end", ended=False) == (answered("no end"), False)


def test_tokens_of_other_completions_are_refused(
    sarm: SarmModel, tiny_tokenizer: Any, some: list[Penalised]
) -> None:
    reward = reward_of(sarm, tiny_tokenizer, some)
    for prompts, said, ids in ((["a"], ["b"], [[1], [2]]), (["a", "b"], ["c"], [[1]])):
        with pytest.raises(ValueError, match="zip"):
            reward(prompts, said, completion_ids=ids)


def test_a_metric_is_the_mean_over_conversations_by_hand(
    sarm: SarmModel, tiny_tokenizer: Any
) -> None:
    reward = reward_of(
        sarm, tiny_tokenizer, [Penalised(4, 1.0, 0.1), Penalised(2, 1.0, 0.1)], monitors=[7, 5]
    )
    scores = Scores(
        reward=T([1.0, 2.0]),
        penalty=T([0.5, 0.0]),
        total=T([0.5, 2.5]),
        fired=T([[True, False], [True, True]]),
        z=T([[3.0, 0.0], [2.0, 1.5]]),
        monitors_z=T([[0.0, 1.0], [4.0, 2.0]]),
        below=T([[0.0] * 4] * 2),
        truncated=T([False, True]),
    )
    assert reward.metrics(scores) == {
        "objective/scores": 1.5,
        "objective/penalty": 0.25,
        "objective/compound": 1.5,
        "val/truncated_conversations": 0.5,
        "rate/4": 1.0,
        "rate/2": 0.5,
        "z/4": 2.5,
        "z/2": 0.75,
        "z/7": 2.0,
        "z/5": 1.5,
    }


def test_what_just_fell_short_is_read_beyond_topk_and_by_latent(
    sarm: SarmModel, tiny_tokenizer: Any, dense: Tensor
) -> None:
    """Of every latent, one of them penalised: what the next three ranks hold, else 0."""
    penalised = [Penalised(5, 1.0, 0.1)]
    watched = [n for n in range(sarm.d_sae) if n != 5]
    reward = reward_of(sarm, tiny_tokenizer, penalised, monitors=watched, extra_ranks=3)
    scores = reward.score(TEXTS[:4])
    below = torch.zeros(4, sarm.d_sae)
    below[:, [5, *watched]] = scores.below
    encoded = reward._encode(TEXTS[:4])
    want = torch.zeros(4, sarm.d_sae)
    want.scatter_(1, encoded.indices[:, sarm.k :].long(), encoded.values[:, sarm.k :])
    torch.testing.assert_close(below, want)
    assert encoded.indices.shape == (4, sarm.k + 3) and (below != 0).any()
    assert not ((below != 0) & (dense[:4] != 0)).any()
    assert not reward_of(sarm, tiny_tokenizer, penalised).score(TEXTS[:4]).below.any()
    torch.testing.assert_close(
        reward.measure(TEXTS[:4], [9, 5]), dense[:4, [9, 5]], rtol=1e-4, atol=1e-4
    )


def test_a_reward_that_watches_more_is_the_same_otherwise(
    sarm: SarmModel, tiny_tokenizer: Any
) -> None:
    reward = reward_of(sarm, tiny_tokenizer, [Penalised(1, 0.5, 0.1)], monitors=[5], clamp=0.25)
    more = reward.watching([9, 5, 9, 3])
    assert (more.monitors, more.penalised, more.clamp) == ((5, 9, 3), reward.penalised, 0.25)
    assert reward.monitors == (5,)
    assert reward.with_penalised([Penalised(2, 0.5, 0.1)]).clamp == 0.25
    with pytest.raises(UserError, match=rf"latents \[{sarm.d_sae}\] are not in this SARM"):
        reward.watching([sarm.d_sae])


def test_refusals_in_whole(sarm: SarmModel, tiny_tokenizer: Any) -> None:
    for penalised, more, said in (
        ([], {"kind": "soft"}, "no penalty 'soft'; known are threshold, hinge, density"),
        (
            [Penalised(3, 0, 0.1), Penalised(3, 1, 0.1)],
            {},
            "a latent is penalised twice in [3, 3]; name each once",
        ),
        (
            [Penalised(1, 0, 0.1), Penalised(2, 0, 0.1), Penalised(4, 0, 0.1)],
            {"kind": "density", "reference_rates": {1: 0.5, 2: 0.0}},
            "a density penalty needs reference rates between 0 and 1, and latents [2, 4] have none;"
            " run select again",
        ),
    ):
        with pytest.raises(UserError) as refused:
            reward_of(sarm, tiny_tokenizer, penalised, **more)
        assert str(refused.value) == said
    reward_of(sarm, tiny_tokenizer, [Penalised(sarm.d_sae - 1, 0, 0.1)], monitors=[0])
    with pytest.raises(UserError) as refused:
        calibrate_random(torch.zeros(4, 2), [3, 4], Z[:, :1], [Penalised(0, 2.5, 0.1)])
    assert str(refused.value) == (
        "none of the 2 random candidates fires on the base policy's 4 texts; raise"
        " calibrate.prompts"
    )
    with pytest.raises(UserError) as refused:
        calibrate_random(torch.ones(4, 1), [3], Z, [Penalised(0, 2.5, 0.1), Penalised(1, 0.5, 0.1)])
    assert str(refused.value) == (
        "1 random candidates cannot match 2 penalised latents; raise select.random_candidates"
    )


def test_a_candidate_that_is_never_active_is_the_last_that_density_takes() -> None:
    assert _best_match(1, [0, 4, 3], "density") == 2
    assert _best_match(0, [0, 4, 3], "density") == 2
    assert _best_match(0, [0, 0], "density") == 0
    assert _best_match(2, [2, 3], "threshold") == 0 and _best_match(0, [0, 1], "threshold") == 1


def test_a_tau_where_no_text_should_fire_is_the_higher_one() -> None:
    assert matching_tau(T([3.0, 1.0]), 0, 5.0) == 5.0
    assert matching_tau(T([3.0, 1.0]), 0, 2.0) == 3.0
    assert matching_tau(T([0.0, -1.0]), 2, 0.5) == 0.5
    assert matching_tau(T([4.0, 3.0, 1.0]), 1, 0.0) == 3.5
    assert matching_tau(T([4.0, 3.0, 1.0]), 3, 0.0) == 0.5
