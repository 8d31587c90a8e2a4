"""Heads: margins, the fit, its L2 strength without the fold it is judged on, accuracy by hand."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from sarm.config import TrainSarmConfig, UserError
from sarm.training.fit import Features, fit_heads
from sarm.training.heads import (
    Latents,
    clustered_accuracy,
    differences,
    fit_head,
    fold_accuracy,
    pair_points,
)
from sarm.training.pairs import Texts


def some_pairs(n: int = 60, d_sae: int = 30, k: int = 4, seed: int = 0) -> tuple[Latents, Texts]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(2 * n, d_sae, generator=generator).topk(k).indices
    values = torch.randn(2 * n, k, generator=generator, dtype=torch.float64)
    order = torch.randperm(2 * n, generator=generator)
    return Latents(indices, values), Texts([()] * (2 * n), order[:n], order[n:])


def test_margins_are_those_of_dense_latents():
    latents, texts = some_pairs()
    dense = torch.zeros(120, 30, dtype=torch.float64).scatter(1, latents.indices, latents.values)
    assert np.allclose(
        differences(latents, texts, 30).toarray(),
        (dense[texts.chosen] - dense[texts.rejected]).numpy(),
    )


def test_head_is_the_minimum_of_the_loss_as_written():
    latents, texts = some_pairs()
    z = torch.from_numpy(differences(latents, texts, 30).toarray())
    weights = torch.rand(60, dtype=torch.float64)
    weights[:10] = 0
    found = torch.from_numpy(
        fit_head(csr_array(z.numpy()), weights.numpy(), 0.01, max_steps=1000)
    ).requires_grad_()
    loss = (
        -sum(weights[i] / weights.sum() * torch.log(torch.sigmoid(z[i] @ found)) for i in range(60))
        + 0.01 / 2 * (found**2).sum()
    )
    loss.backward()
    assert found.grad.abs().max() < 1e-5
    warm = fit_head(csr_array(z.numpy()), weights.numpy(), 0.01, max_steps=1000, start=np.ones(30))
    assert np.allclose(warm, found.detach().numpy(), atol=1e-4)


def found(z: np.ndarray) -> Features:
    sparse = csr_array(z)
    return Features(Latents(torch.zeros(0), torch.zeros(0)), sparse, sparse)


def test_heads_know_nothing_of_pairs_without_weight():
    """Every pair has a latent of its own: what was trained on is perfect, what was not is a tie."""
    n = 40
    config = TrainSarmConfig(d_sae=n, k=1, folds=4, head_l2=(0.01, 0.1))
    weights = np.where(np.arange(n) % 4 == 1, 0.0, 1 / n)
    fitted = fit_heads(found(np.eye(n)), weights, np.arange(n) // 4 % 4, config)
    for margins in (fitted.margins, fitted.dense_margins):
        assert (margins[weights > 0] > 0).all() and (margins[weights == 0] == 0).all()


def test_l2_is_chosen_without_the_pairs_that_are_judged():
    """Labels of pairs without weight are turned over: no head may notice."""
    generator = np.random.default_rng(0)
    z = generator.normal(size=(80, 6))
    z[:, 0] += 1
    weights, inner = np.where(np.arange(80) % 4 == 2, 0.0, 1 / 80), generator.integers(0, 4, 80)
    config = TrainSarmConfig(d_sae=6, k=1, folds=4)
    before = fit_heads(found(z), weights, inner, config)
    after = fit_heads(found(np.where((weights == 0)[:, None], -z, z)), weights, inner, config)
    assert np.array_equal(before.head.weight, after.head.weight)
    assert before.head.l2 == after.head.l2 and before.head.loss == after.head.loss
    turned = fit_heads(found(np.where((inner == 1)[:, None], -z, z)), weights, inner, config)
    assert not np.allclose(before.head.weight, turned.head.weight)


def test_one_fold_is_not_enough():
    with pytest.raises(UserError, match="too few pairs"):
        fit_heads(
            found(np.eye(4)), np.ones(4), np.zeros(4, int), TrainSarmConfig(d_sae=4, k=1, folds=2)
        )


def test_accuracy_by_hand():
    points = pair_points(np.array([2.0, -1.0, 0.0, 1.0]))
    assert points.tolist() == [1, 0, 0.5, 1]
    folded = fold_accuracy(points, np.array([0, 0, 1, 1]), ["p", "p", "q", "q"])
    assert folded.mean == pytest.approx(0.625) and folded.standard_error == pytest.approx(0.125)
    assert folded.folds == (0.5, 0.75) and (folded.pairs, folded.prompts) == (4, 2)
    # Half a prompt of two pairs more at 0 and at 1: 3.5 points of 6. Deviations by prompt are -1/6
    # and 1/3, of the halves 7/6 and 5/6.
    found = clustered_accuracy(points, ["p", "p", "q", "q"])
    squares = 1 / 36 + 1 / 9 + (49 / 36 + 25 / 36) / 2
    assert found.standard_error == pytest.approx(np.sqrt(squares) / 6)
    assert found[0] == 0.625 and found[2:4] == (4, 2)


@pytest.mark.parametrize(("agreed", "ends"), [(1.0, (0.0, 1.0)), (0.0, (-1.0, 1.0))])
def test_pairs_that_agree_are_as_certain_as_they_are_many(
    agreed: float, ends: tuple[float, float]
) -> None:
    def error(prompts: int) -> float:
        points = np.full(prompts, agreed)
        return clustered_accuracy(points, list(map(str, range(prompts))), ends).standard_error

    assert error(2) > 0.2 > error(20) > 0.02 > error(200) > 0.002
