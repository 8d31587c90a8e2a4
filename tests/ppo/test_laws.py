"""Laws of what PPO computes, on any numbers: how advantages and rewards scale, that neither the
order of rows nor their cut into micro-batches and ranks matters, that prompts go by name alone.

`python -m pytest tests/ppo/test_laws.py`
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sarm.ppo import losses
from sarm.ppo import objective as o
from sarm.ppo.advantages import ADVANTAGES, Advantages, Episodes
from sarm.ppo.batching import Mix, mini_batches, rows_of_step
from sarm.ppo.drift import WINDOW, Drift
from sarm.ppo.kl import kl_per_token, next_kl_coef
from sarm.ppo.learner.micro_batches import micro_batches, scatter
from sarm.ppo.penalties import PENALTIES, Penalised, Scored, batch_rates
from sarm.ppo.reward import calibrate_random

LAWS = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**32)
FACTORS = st.sampled_from([0.125, 0.5, 2.0, 8.0])
"""Powers of two: a product with one is exact, so that what should be equal is, to the bit."""
Order = list[int]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    """float64."""
    return torch.randn(shape, generator=drawn(seed), dtype=torch.float64)


def some_mask(seed: int, rows: int, t: int) -> Tensor:
    """(rows, t) right-padded, lengths from 1."""
    lengths = torch.randint(1, t + 1, (rows,), generator=drawn(seed))
    return torch.arange(t) < lengths[:, None]


def cut(order: Order, at: Sequence[int]) -> list[Order]:
    """The order in parts that end at these places; a part may be empty."""
    edges = [0, *sorted(min(a, len(order)) for a in at), len(order)]
    return [order[a:b] for a, b in itertools.pairwise(edges)]


@st.composite
def orders(draw: Any, n: int) -> Order:
    return list(draw(st.permutations(range(n))))


# --- advantages
# ------------------------------------------------------------------------------------------------

GROUPS, SAMPLES, T = 3, 4, 5
B = GROUPS * SAMPLES


def advantages_of(name: str, rewards: Tensor, values: Tensor, mask: Tensor) -> Advantages:
    critic = ADVANTAGES[name].critic
    given = Episodes(rewards, values if critic else None, mask, SAMPLES, 0.9, 0.7)
    return ADVANTAGES[name](given)


@LAWS
@given(SEEDS, FACTORS, st.booleans())
def test_advantages_scale_with_rewards_and_values_and_change_sign_with_them(
    seed: int, factor: float, negative: bool
) -> None:
    """Of groups that are normalised only the sign is left, but for what keeps from dividing
    by 0.
    """
    factor = -factor if negative else factor
    mask = some_mask(seed, B, T)
    rewards, values = (torch.where(mask, normal(seed + i, B, T), 0.0) for i in (1, 2))
    for name in ("gae", "rloo"):
        one = advantages_of(name, rewards, values, mask)
        other = advantages_of(name, factor * rewards, factor * values, mask)
        assert torch.equal(other.advantages, factor * one.advantages), name
        if one.returns is not None and other.returns is not None:
            assert torch.equal(other.returns, factor * one.returns)
    one, other = (
        advantages_of("grpo", f * rewards, values, mask).advantages.view(GROUPS, SAMPLES, T)
        for f in (1.0, factor)
    )
    sd = rewards.sum(1).view(GROUPS, SAMPLES).std(1)[:, None, None]
    close(other * (abs(factor) * sd + 1e-4), factor * one * (sd + 1e-4))


@LAWS
@given(SEEDS)
def test_advantages_along_time_of_a_sum_are_the_sum_of_the_advantages(seed: int) -> None:
    mask = some_mask(seed, B, T)
    a, b, v, w = (normal(seed + i, B, T) for i in range(1, 5))
    parts = [advantages_of("gae", *pair, mask) for pair in ((a, v), (b, w))]
    whole = advantages_of("gae", a + b, v + w, mask)
    close(whole.advantages, parts[0].advantages + parts[1].advantages)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
@LAWS
@given(seed=SEEDS, bonus=st.integers(-8, 8))
def test_what_all_responses_to_a_prompt_are_paid_alike_teaches_nothing(
    name: str, seed: int, bonus: int
) -> None:
    mask = some_mask(seed, B, T)
    rewards = torch.where(mask, normal(seed + 1, B, T), 0.0)
    more = rewards.clone()
    more[:SAMPLES, 0] += bonus  # the first prompt's
    more[SAMPLES : 2 * SAMPLES, 0] -= 2 * bonus
    one, other = (advantages_of(name, r, rewards, mask).advantages for r in (rewards, more))
    close(other, one)


@pytest.mark.parametrize("name", list(ADVANTAGES))
@LAWS
@given(seed=SEEDS, groups=orders(GROUPS), within=orders(SAMPLES))
def test_rows_in_another_order_have_the_same_advantages(
    name: str, seed: int, groups: Order, within: Order
) -> None:
    """Prompts among one another, and the responses of one among themselves."""
    mask = some_mask(seed, B, T)
    rewards, values = (torch.where(mask, normal(seed + i, B, T), 0.0) for i in (1, 2))
    order = [SAMPLES * g + (within[s] if g else s) for g in groups for s in range(SAMPLES)]
    one = advantages_of(name, rewards, values, mask).advantages
    other = advantages_of(name, rewards[order], values[order], mask[order]).advantages
    close(other, one[order])


# --- rewards and statistics
# ------------------------------------------------------------------------------------------------


@LAWS
@given(SEEDS, FACTORS, FACTORS)
def test_token_rewards_add_up_to_the_score_less_the_kl_that_its_response_costs(
    seed: int, factor: float, coef: float
) -> None:
    mask = some_mask(seed, B, T)
    scores, kl = normal(seed + 1, B), normal(seed + 2, B, T)
    rewards = o.token_rewards(scores, kl, mask, coef)
    close(rewards.sum(1), scores - coef * (kl * mask).sum(1))
    assert not rewards[~mask].any()
    assert torch.equal(o.token_rewards(factor * scores, factor * kl, mask, coef), factor * rewards)
    assert torch.equal(o.token_rewards(scores, factor * kl, mask, coef / factor), rewards)


@LAWS
@given(SEEDS, FACTORS, st.integers(-100, 100), orders(B))
def test_whitened_values_know_neither_unit_nor_zero_nor_order(
    seed: int, factor: float, shift: int, order: Order
) -> None:
    mask, values = some_mask(seed, B, T), normal(seed + 1, B, T)
    one = o.whiten(values, mask)
    assert one[mask].mean().abs() < 1e-9 and not one[~mask].any()
    close(o.whiten(factor * values + shift, mask), one, 1e-6)
    close(o.whiten(-values, mask), -one)
    close(o.whiten(values[order], mask[order]), one[order])
    poisoned = torch.where(mask, values, torch.nan)
    close(o.whiten(poisoned, mask), one)


@LAWS
@given(SEEDS, FACTORS, st.integers(-9, 9), orders(B))
def test_explained_variance_knows_neither_unit_nor_zero_nor_order(
    seed: int, factor: float, shift: int, order: Order
) -> None:
    mask, values, returns = some_mask(seed, B, T), normal(seed + 1, B, T), normal(seed + 2, B, T)
    one = o.explained_variance(values, returns, mask)
    assert one <= 1
    for v, r, m in (
        (factor * values, factor * returns, mask),
        (values + shift, returns - shift, mask),  # a constant error is none
        (values[order], returns[order], mask[order]),
        (values.where(mask, 9.0), returns.where(mask, -9.0), mask),
    ):
        assert o.explained_variance(v, r, m) == pytest.approx(one, rel=1e-6)


@LAWS
@given(SEEDS, st.integers(2, 30), st.lists(st.integers(0, 30), max_size=4), st.data())
def test_the_deviation_seen_so_far_is_that_of_all_values_however_they_came(
    seed: int, n: int, at: list[int], data: Any
) -> None:
    values = 50 + 3 * normal(seed, n)
    parts = cut(data.draw(orders(n)), at)
    running = o.RunningSd()
    for part in parts:
        running = running.updated(values[part])
    assert running.n == n and running.mean == pytest.approx(float(values.mean()))
    assert running.sd == pytest.approx(float(values.std()))
    left, right = (o.RunningSd().updated(values[: n // 2]), o.RunningSd().updated(values[n // 2 :]))
    assert left.merged(right) == pytest.approx(right.merged(left))
    assert left.merged(o.RunningSd()) == left == o.RunningSd().merged(left)
    larger = o.RunningSd().updated(-8 * values + 1)
    assert larger.sd == pytest.approx(8 * running.sd)


@LAWS
@given(SEEDS, FACTORS, st.none() | st.sampled_from([0.5, 1.0, 3.0]))
def test_rewards_in_units_of_their_deviation_know_no_unit(
    seed: int, factor: float, clip: float | None
) -> None:
    rewards = 2 * normal(seed, 20)
    scaled = o.scaled_rewards(rewards, 0.75, clip)
    assert torch.equal(o.scaled_rewards(factor * rewards, factor * 0.75, clip), scaled)
    assert torch.equal(o.scaled_rewards(-rewards, 0.75, clip), -scaled)
    assert scaled.abs().max() <= (clip or float("inf"))


@LAWS
@given(SEEDS, st.sampled_from([0.5, 1.0, 2.0]))
def test_a_weight_of_importance_and_that_of_the_other_direction_are_reciprocal(
    seed: int, cap: float
) -> None:
    mine, sampled = normal(seed, 20), normal(seed + 1, 20)
    there, back = (
        o.importance_weights(*pair, torch.inf) for pair in ((mine, sampled), (sampled, mine))
    )
    close(there * back, torch.ones_like(there))
    close(o.importance_weights(mine, sampled, cap), there.clamp(max=cap))
    assert torch.equal(o.importance_weights(mine, mine, cap), torch.full_like(mine, min(cap, 1)))


# --- the learning rate and the KL's coefficient
# ------------------------------------------------------------------------------------------------


@LAWS
@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 40),
    st.integers(0, 12),
    FACTORS,
)
def test_the_learning_rate_rises_to_its_peak_and_never_again_and_is_never_0(
    schedule: Any, steps: int, warmup: int, factor: float
) -> None:
    def rate(step: int, peak: float = 0.375) -> float:
        return o.learning_rate(step, steps=steps, peak=peak, schedule=schedule, warmup_steps=warmup)

    rates = [rate(step) for step in range(steps)]
    assert all(0 < r <= 0.375 for r in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert len(set(rising)) == len(rising)
    if steps > warmup:
        assert rates[warmup] == 0.375
    assert [rate(step, 0.375 * factor) for step in range(steps)] == [r * factor for r in rates]


@LAWS
@given(st.floats(0.01, 50), st.floats(0.01, 50), FACTORS, st.integers(1, 500))
def test_the_coefficient_of_the_kl_rises_with_it_and_is_held_at_its_target(
    kl: float, more: float, factor: float, sequences: int
) -> None:
    def after(kl: float, coef: float = 0.25, target: float = 4.0) -> float:
        return next_kl_coef(coef, kl, sequences, "adaptive", target, 2000)

    assert after(kl) <= after(kl + more)
    assert (after(kl) > 0.25, after(kl) < 0.25) == (kl > 4, kl < 4) or after(kl) == 0.25
    assert after(4.0) == 0.25
    assert after(factor * kl, target=factor * 4.0) == after(kl)
    assert after(kl, coef=factor * 0.25) == factor * after(kl)
    assert next_kl_coef(0.25, kl, sequences, "fixed", 4.0, 2000) == 0.25


@LAWS
@given(SEEDS)
def test_estimates_of_the_kl_of_two_policies_that_agree_are_0_and_of_others_not_below(
    seed: int,
) -> None:
    mine, ref = normal(seed, 50), normal(seed + 1, 50)
    for estimator in ("k1", "k2", "k3"):
        assert not kl_per_token(mine, mine, estimator).any()
    assert (kl_per_token(mine, ref, "k3") > 0).all()
    assert torch.equal(kl_per_token(mine, ref, "k1"), -kl_per_token(ref, mine, "k1"))
    assert torch.equal(kl_per_token(mine, ref, "k2"), kl_per_token(ref, mine, "k2"))
    close(
        kl_per_token(mine, ref, "k3") + kl_per_token(ref, mine, "k3"),
        2 * torch.cosh(mine - ref) - 2,
    )


# --- losses: any order and any cut into micro-batches and ranks
# ------------------------------------------------------------------------------------------------

TOKENS = 14


def parts_of_loss(rows: Order, seed: int, cap: float | None) -> list[losses.Loss]:
    """Each loss on some of TOKENS tokens, with gradients to one leaf."""
    new, old, ref, advantages, values, returns = (normal(seed + i, TOKENS)[rows] for i in range(6))
    importance = None if cap is None else normal(seed + 6, TOKENS)[rows].exp().clamp(max=cap)
    cuts = {"cliprange_low": 0.1, "cliprange_high": 0.3, "dual_clip": 2.0, "log_ratio_max": 1.5}
    return [
        losses.policy_loss(new, old, advantages, importance=importance, **cuts),
        losses.value_loss(values, values + old, returns, cliprange_value=0.4),
        losses.entropy_bonus(new),
        losses.kl_loss(new, ref, estimator="k3", log_ratio_max=1.5, importance=importance),
    ]


def logged(rows: Order, seed: int, cap: float | None) -> losses.Sums:
    sums = {"tokens": torch.tensor(float(len(rows)), dtype=torch.float64)}
    for loss in parts_of_loss(rows, seed, cap):
        sums |= loss.sums
    return sums


@LAWS
@given(SEEDS, orders(TOKENS), st.lists(st.integers(0, TOKENS), max_size=4), st.none() | st.just(2))
def test_losses_of_tokens_in_any_order_and_any_cut_add_up(
    seed: int, order: Order, at: list[int], cap: float | None
) -> None:
    """Whatever micro-batch and rank has a token; a rank may have none."""
    whole, parts = parts_of_loss(list(range(TOKENS)), seed, cap), cut(order, at)
    for i, loss in enumerate(whole):
        total = sum(parts_of_loss(part, seed, cap)[i].total for part in parts)
        close(torch.as_tensor(total), loss.total)
    want = losses.means([logged(list(range(TOKENS)), seed, cap)])
    sums = [logged(part, seed, cap) for part in parts]
    assert losses.means(sums) == pytest.approx(want)
    assert losses.means(sums[::-1]) == pytest.approx(want)


LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=20)


@LAWS
@given(LENGTHS, st.integers(1, 5), st.integers(40, 200), st.data())
def test_ranks_and_micro_batches_are_a_partition_of_any_rows(
    lengths: list[int], ranks: int, tokens: int, data: Any
) -> None:
    """Rank 0 has the longest row and no rank two rows more than another; a micro-batch holds what
    fits, or one row.
    """
    n = len(lengths)
    shares = scatter(lengths, ranks)
    assert sorted(itertools.chain(*shares)) == list(range(n)) and len(shares) == ranks
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert lengths[shares[0][0]] == max(lengths)
    totals = [sum(lengths[row] for row in share) for share in shares]
    assert max(totals) - min(totals) <= max(lengths)
    rows = data.draw(st.permutations(range(n)))[: data.draw(st.integers(1, n))]
    found = micro_batches(rows, lengths, tokens, ranks)
    assert len(found) == ranks and len({len(own) for own in found}) == 1
    assert sorted(row for own in found for micro in own for row in micro) == sorted(rows)
    assert any(all(own) for own in found), "no more of them than some rank needs"
    for micro in itertools.chain(*found):
        padded = len(micro) * max((lengths[row] for row in micro), default=0)
        assert padded <= tokens or len(micro) == 1


# --- penalties: scale, rows, ranks
# ------------------------------------------------------------------------------------------------

PENALISED = [Penalised(3, 0.5, 0.125), Penalised(8, 0.0, 2.0), Penalised(1, 1.25, -0.5)]
RATES = [0.25, 0.6, 0.05]


def values_of(seed: int, n: int) -> Tensor:
    """(n, 3) float32 values after TopK, of which about half are 0."""
    return normal(seed, n, 3).float().relu()


def terms(kind: str, z: Tensor, penalised: Sequence[Penalised], others: Sequence[Tensor]) -> Tensor:
    """Of one rank's texts, the other ranks having `others`."""
    counts = [torch.cat([(x > 0).double().sum(0), torch.tensor([len(x)])]) for x in others]

    def all_reduce(mine: Tensor) -> Tensor:
        return mine + sum(counts, torch.zeros_like(mine))

    return PENALTIES[kind].terms(Scored(z, penalised, RATES, all_reduce))


@pytest.mark.parametrize("kind", list(PENALTIES))
@LAWS
@given(seed=SEEDS, factor=FACTORS, order=orders(9), latents=orders(3), at=st.integers(0, 9))
def test_a_penalty_scales_with_alpha_and_knows_neither_order_nor_ranks(
    kind: str, seed: int, factor: float, order: Order, latents: Order, at: int
) -> None:
    z = values_of(seed, 9)
    one = terms(kind, z, PENALISED, ())
    dearer = [p._replace(alpha=factor * p.alpha) for p in PENALISED]
    assert torch.equal(terms(kind, z, dearer, ()), factor * one)
    ranks = [order[:at], order[at:]]
    for mine, others in (ranks, ranks[::-1]):
        close(terms(kind, z[mine], PENALISED, [z[others]]), one[mine])
    doses = PENALTIES[kind].doses(z, PENALISED)
    close(PENALTIES[kind].doses(z[order], PENALISED), doses)
    assert torch.equal(PENALTIES[kind].doses(z, dearer), factor * doses)
    if kind != "density":  # whose rates go by place
        relabelled = [PENALISED[i] for i in latents]
        close(terms(kind, z[:, latents], relabelled, ()), one[:, latents])
        close(doses, one.mean(0))


@LAWS
@given(SEEDS, FACTORS)
def test_in_another_unit_of_latents_a_threshold_is_the_same_and_a_hinge_as_much_larger(
    seed: int, factor: float
) -> None:
    z = values_of(seed, 30)
    moved = [p._replace(tau=factor * p.tau) for p in PENALISED]
    for kind, larger in (("threshold", 1.0), ("hinge", factor), ("density", 1.0)):
        one, other = terms(kind, z, PENALISED, ()), terms(kind, factor * z, moved, ())
        assert torch.equal(other, larger * one), kind


@LAWS
@given(SEEDS, orders(12), st.lists(st.integers(0, 12), max_size=3))
def test_a_rate_is_that_of_all_ranks_whichever_has_a_text(
    seed: int, order: Order, at: list[int]
) -> None:
    z = values_of(seed, 12)
    sent: list[Tensor] = []

    def all_reduce(mine: Tensor) -> Tensor:
        sent.append(mine)
        return torch.stack(sent).sum(0)

    found = [batch_rates(z[part], all_reduce) for part in cut(order, at)]
    close(found[-1], ((z > 0).double().sum(0) + 0.5) / 13)


def _times(p: Penalised, tau: float, alpha: float) -> Penalised:
    return Penalised(p.latent, tau * p.tau, alpha * p.alpha)


@LAWS
@given(SEEDS, orders(40), FACTORS)
def test_the_random_arm_is_the_same_on_texts_in_any_order_and_doubled_alphas_are_doubled(
    seed: int, order: Order, factor: float
) -> None:
    z, others = values_of(seed, 40), normal(seed + 1, 40, 5).float().relu()
    assume((z > torch.tensor([p.tau for p in PENALISED])).any())
    candidates = [11, 12, 13, 14, 15]
    paid = [p._replace(alpha=abs(p.alpha)) for p in PENALISED]
    one = calibrate_random(others, candidates, z, paid)
    for found, unit in (
        (calibrate_random(others[order], candidates, z[order], paid), (1.0, 1.0)),
        (calibrate_random(others, candidates, z, [_times(p, 1.0, factor) for p in paid]),
         (1.0, factor)),
        (calibrate_random(factor * others, candidates, factor * z,
                          [_times(p, factor, 1.0) for p in paid]), (factor, 1.0)),
    ):  # fmt: skip
        assert len(found) == len(one) == 3
        for got, want in zip(found, one, strict=True):
            assert got == pytest.approx(_times(want, *unit), rel=1e-6), unit


# --- prompts
# ------------------------------------------------------------------------------------------------

NAMES = st.lists(st.text("abcxyz", min_size=1, max_size=5), min_size=2, max_size=9, unique=True)


@LAWS
@given(NAMES, st.integers(0, 99), st.integers(1, 5), st.integers(1, 3), st.data())
def test_a_step_draws_prompts_by_name_wherever_they_stand_and_each_once_a_pass(
    names: list[str], seed: int, prompts: int, samples: int, data: Any
) -> None:
    """With safe prompts in their share of all drawn so far, to within one."""
    order = data.draw(orders(len(names)))
    share = data.draw(st.none() | st.sampled_from([Fraction(1, 3), Fraction(3, 4)]))
    safe = set(data.draw(st.permutations(names))[: data.draw(st.integers(1, len(names) - 1))])

    def drawn_from(names: list[str], steps: int = 7) -> list[str]:
        mix = None
        if share is not None:
            kinds = [[i for i, n in enumerate(names) if (n in safe) == s] for s in (True, False)]
            mix = Mix(*kinds, share)
        size = prompts * samples
        rows = [rows_of_step(names, seed, step, size, samples, mix) for step in range(steps)]
        assert all(len(step) == size for step in rows)
        return [names[row] for step in rows for row in step]

    found = drawn_from(names)
    assert drawn_from([names[i] for i in order]) == found
    groups = [found[i : i + samples] for i in range(0, len(found), samples)]
    assert all(len(set(group)) == 1 for group in groups)
    once = [group[0] for group in groups]
    if share is None:
        kinds = [(once, set(names))]
    else:
        for n in range(1, len(once) + 1):
            assert abs(sum(name in safe for name in once[:n]) - n * share) < 1
        kinds = [([n for n in once if (n in safe) == s], {n for n in names if (n in safe) == s})
                 for s in (True, False)]  # fmt: skip
    for of_kind, everyone in kinds:
        for start in range(0, len(of_kind), len(everyone)):
            turn = of_kind[start : start + len(everyone)]
            assert len(set(turn)) == len(turn) and set(turn) <= everyone


@LAWS
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 99), st.integers(0, 9))
def test_minibatches_are_a_partition_in_even_parts(
    n: int, parts: int, seed: int, step: int
) -> None:
    found = mini_batches(n, parts, seed, step, epoch=1)
    assert len(found) == parts
    assert sorted(row for part in found for row in part) == list(range(n))
    assert max(map(len, found)) - min(map(len, found)) <= 1


# --- distances
# ------------------------------------------------------------------------------------------------


@LAWS
@given(
    st.lists(st.integers(0, 9).map(float), max_size=20),
    st.lists(st.integers(1, 40).map(lambda fifths: fifths / WINDOW), max_size=4),
    FACTORS,
)
def test_each_distance_is_passed_once_where_a_mean_of_five_steps_has_come_so_far(
    kl: list[float], distances: list[float], factor: float
) -> None:
    """Means often meet a distance, to the bit."""

    def passed(unit: float) -> list[list[float]]:
        drift, found = Drift(), []
        for value in kl:
            after = drift.after(unit * value)
            found.append(after.passed(drift, [unit * d for d in distances]))
            drift = after
        return found

    found = passed(1.0)
    means = [sum(kl[i - WINDOW : i]) / WINDOW for i in range(WINDOW, len(kl) + 1)]
    once = [d for step in found for d in step]
    assert sorted(once) == sorted(d for d in distances if d <= max(means, default=0.0))
    assert passed(factor) == [[factor * d for d in step] for step in found]
    assert all(not step for step in found[: WINDOW - 1])
