"""The permutation test: against all relabelings, plain loops, the kernel, and where spreads
differ.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch

from sarm.philox import philox
from sarm.probing import contrast as contrasts
from sarm.probing import permutation
from sarm.probing.contrast import Contrast, deal_of, dealt_labels, permuted_labels
from sarm.probing.permutation import (
    LEVELS,
    design_of,
    integers,
    permutation_p,
    permutations_needed,
    sums_of,
)
from tests.ranks import run_interpreted


def odd_contrast() -> Contrast:
    """Prompts of one to five responses, most with one chosen, one with one rejected; two with
    three, and a ranking of three.
    """
    sizes = [2, 4, 4, 2, 3, 5, 1, 3] * 2
    prompts = np.repeat(np.arange(len(sizes)), sizes)
    first = np.diff(prompts, prepend=-1) > 0
    chosen = first.astype(float)
    rejected = (1 - chosen) / np.maximum(np.bincount(prompts) - 1, 1)[prompts]
    rejected[prompts == 6] = 1.0  # the one response was chosen and rejected
    rejected[prompts == 14] = 1.0
    mine = np.flatnonzero(prompts == 2)
    chosen[mine], rejected[mine] = rejected[mine], chosen[mine].copy()
    five = np.flatnonzero(prompts == 13)
    chosen[five], rejected[five] = [1 / 2, 1 / 2, 0, 0, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]
    ranked = np.flatnonzero(prompts == 15)
    chosen[ranked], rejected[ranked] = [2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]
    return Contrast(np.arange(len(prompts)), prompts, chosen, rejected, len(sizes))


def one_against(rejected: int, prompts: int) -> Contrast:
    n = (1 + rejected) * prompts
    chosen = (np.arange(n) % (1 + rejected) == 0).astype(float)
    numbers = np.repeat(np.arange(prompts), 1 + rejected)
    return Contrast(np.arange(n), numbers, chosen, (1 - chosen) / rejected, prompts)


def random_values(contrast: Contrast, latents: int, seed: int = 0) -> scipy.sparse.csr_array:
    shape = (latents, len(contrast.rows))
    return scipy.sparse.random_array(shape, density=0.5, rng=np.random.default_rng(seed)).tocsr()


# The statistic


def test_sums_are_those_of_every_deal_s_differences_and_of_their_squares() -> None:
    contrast = odd_contrast()
    design = design_of(deal_of(contrast))
    values = random_values(contrast, 20) - 0.4 * random_values(contrast, 20, 1)
    sums = sums_of(torch.from_numpy(values.toarray()), design)
    dealt = dealt_labels(design.deal, torch.arange(200), 3)
    whole = integers(torch.from_numpy(values.toarray()), design.deal).numpy()
    differences = np.zeros((20, 200, contrast.n_prompts))
    for prompt in range(contrast.n_prompts):
        mine = contrast.prompts == prompt
        differences[:, :, prompt] = whole[:, mine] @ dealt.double().numpy()[:, mine].T
    labels = torch.cat(design.labels(dealt), 1).double().T
    totals = sums.totals @ labels[: len(design.others)]
    assert np.array_equal(totals.numpy(), differences.sum(axis=2))
    ours = (sums.constant[:, None] + sums.squares @ labels).numpy()
    theirs = np.square(differences).sum(axis=2)
    unit = theirs.sum(axis=1) / ours.sum(axis=1)
    assert np.abs(ours * unit[:, None] - theirs).max() < 2e-3 * theirs.max()
    assert np.ptp(theirs, axis=1).min() > 0.05 * theirs.max(), "they do depend on the deal"
    observed = whole @ design.deal.labels
    as_they_are = np.zeros((20, contrast.n_prompts))
    np.add.at(as_they_are.T, contrast.prompts, (whole * design.deal.labels).T)
    assert np.array_equal(sums.observed[:, 0].numpy(), np.where(observed < 0, -1, 1))
    assert np.array_equal(sums.observed[:, 1].numpy(), np.abs(observed))
    assert sums.observed[:, 2].numpy() * unit == pytest.approx(
        np.square(as_they_are).sum(axis=1), rel=0.01
    )


def test_squares_are_left_out_where_no_deal_changes_them() -> None:
    assert not design_of(deal_of(one_against(1, 5))).squares_vary
    assert design_of(deal_of(one_against(2, 5))).squares_vary
    first = np.arange(3) < 1
    same = Contrast(np.arange(3), np.zeros(3, int), 1 / 3 + 0.0 * first, np.full(3, 1 / 3), 1)
    assert not design_of(deal_of(same)).squares_vary, "chosen as often as rejected"


def test_products_of_large_labels_are_rounded_and_still_fit() -> None:
    """Two chosen against 13 rejected: labels 13 and -2, whose products exceed an int8."""
    first = np.arange(15) < 2
    contrast = Contrast(np.arange(15), np.zeros(15, int), first / 2, (1.0 - first) / 13, 1)
    design = design_of(deal_of(contrast))
    assert design.deal.labels[:3].tolist() == [13, 13, -2]
    values = torch.from_numpy(random_values(contrast, 5).toarray())
    sums, dealt = sums_of(values, design), dealt_labels(design.deal, torch.arange(50), 1)
    of_others, of_pairs = design.labels(dealt)
    labels = torch.cat([of_others, of_pairs], 1).double().numpy()
    ours = sums.constant.numpy()[:, None] + sums.squares.numpy() @ labels.T
    whole = integers(values, design.deal).numpy()
    theirs = np.square(whole @ dealt.T.double().numpy())
    assert (design.scale == 2).all() and of_pairs.min() == -85 and of_pairs.max() == 13
    assert sums.squares.abs().max() <= LEVELS
    for mine, other in zip(ours, theirs, strict=True):
        assert np.corrcoef(mine, other)[0, 1] > 0.99


def test_sums_of_squares_fit_in_31_bits_whatever_the_deal() -> None:
    first = np.arange(600) % 15 < 2
    prompts = np.repeat(np.arange(40), 15)
    contrast = Contrast(np.arange(600), prompts, first / 2, (1.0 - first) / 13, 40)
    design = design_of(deal_of(contrast))
    sums = sums_of(torch.from_numpy(random_values(contrast, 5).toarray()), design)
    most = 40 * (15 * 14 // 2) * 85  # prompts, pairs of each, their largest label
    assert 0.9 * 2**31 < sums.squares.abs().max() * most < 2**31


def test_blocks_change_no_p(monkeypatch: pytest.MonkeyPatch) -> None:
    contrast = odd_contrast()
    values = random_values(contrast, 30) - random_values(contrast, 30, 1)
    whole = permutation_p(values, contrast, 1500, 1500, 3)
    monkeypatch.setattr(permutation, "DENSE", 7 * len(contrast.rows))
    assert np.array_equal(permutation_p(values, contrast, 1500, 1500, 3), whole)
    assert np.array_equal(permutation_p(values[11:13], contrast, 1500, 1500, 3), whole[11:13])


def test_nothing_to_compare_gives_p_of_one() -> None:
    contrast = Contrast(np.arange(2), np.arange(2), np.ones(2), np.ones(2), 2)
    assert permutation_p(random_values(contrast, 3), contrast, 50, 50, 0).tolist() == [1.0] * 3
    assert not len(permutation_p(random_values(contrast, 0), contrast, 50, 50, 0))
    none = Contrast(*(np.empty(0, int) for _ in range(4)), 0)
    assert permutation_p(scipy.sparse.csr_array((2, 0)), none, 50, 50, 0).tolist() == [1.0] * 2


def test_p_of_few_prompts_is_twice_the_share_of_all_relabelings_on_the_observed_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(permutation, "FIRST", 40_000)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4, 12)) ** 3
    # Prompts of 2, 4, 4 and 2 responses, each with one chosen: 2 * 4 * 4 * 2 relabelings.
    prompts = np.repeat([0, 1, 2, 3], [2, 4, 4, 2])
    chosen = np.isin(np.arange(12), [0, 2, 6, 10]).astype(float)
    rejected = (1 - chosen) / (np.bincount(prompts) - 1)[prompts]
    contrast = Contrast(np.arange(12), prompts, chosen, rejected, 4)
    for latent, p in enumerate(
        permutation_p(scipy.sparse.csr_array(z), contrast, 40_000, 40_000, 0)
    ):
        exact = []
        for picks in itertools.product(range(2), range(2, 6), range(6, 10), range(10, 12)):
            d = np.array(
                [
                    z[latent, i]
                    - np.mean([z[latent, j] for j in np.flatnonzero(prompts == q) if j != i])
                    for q, i in enumerate(picks)
                ]
            )
            exact.append(d.sum() / np.sqrt(np.square(d).sum()))
        side = np.sign(exact[0])
        share = np.mean(side * np.array(exact) >= abs(exact[0]) - 1e-9)
        assert p == pytest.approx(min(2 * share, 1), abs=0.02)


@pytest.mark.parametrize("rejected", [1, 3])
def test_p_is_right_where_the_spreads_differ(rejected: int) -> None:
    """Equal means, the chosen's standard deviation twice the rejected's: of the plain sum 15 %
    would be called at 0.05 with three rejected.
    """
    contrast, rng = one_against(rejected, 40), np.random.default_rng(1)
    z = rng.normal(size=(4000, len(contrast.rows))) * np.where(contrast.chosen > 0, 2.0, 1.0)
    p = permutation_p(scipy.sparse.csr_array(z), contrast, 1000, 1000, 0)
    chance = 3 * np.sqrt(0.05 * 0.95 / len(z))
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=chance + 0.003)


def test_either_side_keeps_its_own_level_where_values_are_skewed() -> None:
    """A latent that fires on one response of a prompt at most: on the chosen ones alone is rare by
    chance, on none of them is not.
    """
    contrast = one_against(3, 12)
    fires = np.zeros((2, 48))
    fires[0, ::4], fires[1, 1::4] = 1.0, 1.0
    p = permutation_p(scipy.sparse.csr_array(fires), contrast, 20_000, 20_000, 0)
    assert p[0] == 2 / 20_001 and p[1] == pytest.approx(2 * 0.75**12, abs=0.02)


def test_sign_flipping_averages_would_not_have_been_calibrated() -> None:
    """Why labels are dealt anew: with one chosen against three rejected, skewed values break the
    sign flip, not this test.
    """
    rng = np.random.default_rng(0)
    contrast = one_against(3, 12)
    z = rng.exponential(size=(1500, 48)) ** 2
    p = permutation_p(scipy.sparse.csr_array(z), contrast, 1000, 1000, 0)
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.015)
    averages = z.reshape(1500, 12, 4) @ np.array([1, -1 / 3, -1 / 3, -1 / 3])
    flipped = (
        np.abs(averages @ rng.choice([-1.0, 1.0], size=(12, 1000)))
        >= np.abs(averages.sum(1))[:, None]
    )
    assert (flipped.mean(1) <= 0.05).mean() > 0.08


def test_stopping_early_keeps_p_valid_and_reaches_the_smallest_threshold() -> None:
    n, contrast = 400, one_against(1, 30)
    z = np.random.default_rng(3).normal(size=(n, 60))
    z[0] += np.tile([3.0, 0.0], 30)
    p = permutation_p(scipy.sparse.csr_array(z), contrast, 200, permutations_needed(n, 0.05), 0)
    assert p[0] == 2 / (permutations_needed(n, 0.05) + 1) < 0.05 / n
    assert scipy.stats.kstest(p[1:], "uniform").pvalue > 0.01
    assert (p[1:] <= 0.05).mean() < 0.09
    assert permutations_needed(4608, 0.1) == 92160


def test_a_look_stops_what_chance_matched_often() -> None:
    contrast = one_against(2, 25)
    z = np.random.default_rng(5).normal(size=(300, 75))
    whole = permutation_p(scipy.sparse.csr_array(z), contrast, 6000, 6000, 0)
    # 3000 permutations first: a latent that stopped at 1000 has a p of thousand-and-firsts.
    drawn = np.rint(2 * whole * 1001) / (2 * 1001) - whole
    stopped = np.abs(drawn) < 1e-12
    assert stopped[whole > 0.06].all() and not stopped[whole < 0.03].any()


# Labels and integers


def test_labels_are_dealt_within_prompts_jointly() -> None:
    contrast = Contrast(
        np.arange(6),
        np.array([0, 0, 0, 0, 1, 1]),
        np.array([1.0, 0, 0, 0, 1, 0]),
        np.array([0, 1 / 3, 1 / 3, 1 / 3, 0, 1]),
        2,
    )
    labels = np.concatenate(list(permuted_labels(contrast, 5000, 7)), axis=1)
    assert labels.shape == (6, 5000)
    assert np.allclose(np.sort(labels[:4], axis=0), np.sort(contrast.labels[:4])[:, None])
    assert np.allclose(labels[4] + labels[5], 0)
    assert np.allclose((labels[:4] == 1).mean(axis=1), 0.25, atol=0.03)
    # Prompts are dealt independently of one another.
    assert abs(np.corrcoef(labels[0], labels[4])[0, 1]) < 0.05


def test_labels_become_integers_that_add_up_to_zero() -> None:
    contrast = odd_contrast()
    deal = deal_of(contrast)
    assert deal.labels / deal.denominators == pytest.approx(contrast.labels)
    assert (np.bincount(contrast.prompts, deal.labels) == 0).all()
    five = contrast.prompts == 13
    assert deal.labels[five].tolist() == [3, 3, -2, -2, -2] and deal.denominators[five][0] == 6
    many = Contrast(
        np.arange(300),
        np.zeros(300, int),
        (np.arange(300) < 1).astype(float),
        (np.arange(300) > 0) / 299,
        1,
    )
    assert deal_of(many).labels.sum() == 0 and np.abs(deal_of(many).labels).max() <= 127, (
        "rounded, and still a deal"
    )


def test_the_number_of_a_response_is_philox_s_and_the_first_of_two_equal_ones_the_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deal = deal_of(one_against(2, 7))
    numbers = [0, 5, 2**33 + 1]
    dealt = dealt_labels(deal, torch.tensor(numbers), 3)
    for row, number in enumerate(numbers):
        for first in range(0, 21, 3):
            keys = []
            for r in range(first, first + 3):
                at = [torch.tensor([x]) for x in (r // 4, number & (2**32 - 1), number >> 32)]
                keys.append(int(philox((*at, contrasts.LABELS), contrasts.words_of(3))[r % 4]))
            for r in range(3):
                rank = sum(key < keys[r] for key in keys)
                assert dealt[row, first + r] == deal.labels[first + rank]
    with monkeypatch.context() as patched:
        patched.setattr(
            contrasts,
            "philox",
            lambda at, key: tuple(torch.zeros_like(at[0]).expand(4, *at[0].shape)),
        )
        assert (dealt_labels(deal, torch.arange(2), 3).numpy() == deal.labels).all()


def test_chunks_change_no_label() -> None:
    deal = deal_of(odd_contrast())
    whole = dealt_labels(deal, torch.arange(50), 3)
    parts = [dealt_labels(deal, torch.arange(a, b), 3) for a, b in ((0, 1), (1, 33), (33, 50))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, dealt_labels(deal, torch.arange(50), 4))


def test_a_row_of_zeros_is_multiplied_with_one() -> None:
    unit = permutation._unit(torch.tensor([[0.0, 0.0], [2.0, -4.0]]), 1)
    assert unit.tolist() == [1.0, LEVELS / 4]


def test_values_are_integers_that_fit() -> None:
    contrast = odd_contrast()
    deal, values = deal_of(contrast), random_values(contrast, 20)
    whole = integers(torch.from_numpy(values.toarray()), deal).numpy()
    assert np.array_equal(whole, np.rint(whole)) and np.abs(whole).max() == LEVELS
    scale = np.abs(values.toarray() / deal.denominators).max(axis=1, keepdims=True)
    assert whole / LEVELS * scale == pytest.approx(values.toarray() / deal.denominators, abs=1e-4)


def test_equal_totals_count_as_reached() -> None:
    # Two prompts of two: of the four deals one gives 3 + 3, one -(3 + 3) and two 3 - 3.
    contrast = Contrast(
        np.arange(4), np.array([0, 0, 1, 1]), np.array([1.0, 0, 1, 0]), np.array([0, 1.0, 0, 1]), 2
    )
    z = scipy.sparse.csr_array(np.array([[0.3, 0, 0.3, 0], [0.1, 0.2, 0.2, 0.1]]))
    p = permutation_p(z, contrast, 4000, 4000, 0)
    assert p[0] == pytest.approx(0.5, abs=0.04) and p[1] == 1.0


# The kernel

KERNEL = """
import numpy as np
from sarm.probing import permutation
from tests.probing.test_permutation import odd_contrast, one_against, random_values
for contrast in (odd_contrast(), one_against(3, 50), one_against(1, 40)):
    design = permutation.design_of(permutation.deal_of(contrast))
    values = random_values(contrast, 150) - random_values(contrast, 150, 1)
    on_gpu = permutation._counter_on_gpu(values, design, "cpu")
    on_cpu = permutation._counter_on_cpu(values, design)
    for latents in (np.arange(150), np.arange(0, 150, 3)):
        counts = on_cpu(latents, 100, 300, 3)
        assert np.array_equal(on_gpu(latents, 100, 300, 3), counts) and 0 < counts.mean() < 200
"""


def test_the_kernel_counts_what_the_plain_code_counts() -> None:
    run_interpreted(KERNEL)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    for contrast in (odd_contrast(), one_against(3, 200), one_against(1, 300)):
        values = random_values(contrast, 200)
        on_gpu = permutation_p(values, contrast, 2000, 9000, 1, "cuda")
        assert np.array_equal(on_gpu, permutation_p(values, contrast, 2000, 9000, 1))
