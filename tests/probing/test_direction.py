"""The direction probe: exact against moving the states, on any tiling, and the same in the GPU's
kernels run by an interpreter.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sarm.config import SarmConfig, UserError
from sarm.probing import direction
from sarm.probing.contrast import Contrast
from sarm.probing.direction import Baseline, baseline, check, direction_changes, load_sae
from sarm.probing.effects import direction_table
from sarm.reward_model.interventions import Direction
from sarm.reward_model.interventions import direction_changes as recomputed
from sarm.reward_model.sae import TopKSae, stable_topk
from tests.ranks import run_interpreted

D_IN, D_SAE, K, TEXTS = 48, 300, 9, 6


class World(NamedTuple):
    sae: TopKSae
    weight: torch.Tensor
    states: torch.Tensor
    base: Baseline


def world(candidates: int | None = None, twins: bool = False, texts: int = TEXTS) -> World:
    """A random SAE whose decoder is not its encoder; `twins` makes every latent equal to
    another.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = TopKSae(D_IN, D_SAE, K).double().requires_grad_(False)
        encoder = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN).double(), dim=1)
        sae.encoder.weight.copy_(encoder)
        sae.decoder.weight.copy_(2 * encoder.T + 0.3 * torch.randn(D_IN, D_SAE))
        sae.pre_bias.copy_(0.1 * torch.randn(D_IN))
        sae.latent_bias.copy_(0.3 * torch.randn(D_SAE))
        weight, states = torch.randn(D_SAE).double(), (5 * torch.randn(texts, D_IN) + 1).double()
    if twins:
        sae.encoder.weight[1::2], sae.latent_bias[1::2] = (
            sae.encoder.weight[::2].clone(),
            sae.latent_bias[::2].clone(),
        )
    return World(sae, weight, states, baseline(sae, weight, states, K, candidates))


def test_tiles_fit_in_their_bytes_and_hold_their_own_latents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = world()
    monkeypatch.setattr(direction, "TILE_BYTES", 8 * (D_SAE + 8 * TEXTS) * 7 + 5)
    assert direction.tile_rows(w.base) == 7
    monkeypatch.setattr(direction, "TILE_ROWS", 6)
    assert direction.tile_rows(w.base) == 6
    whole = next(direction.tiles(w.base, w.sae, range(D_SAE), D_SAE))
    for tile in direction.tiles(w.base, w.sae, range(10, 40), 16):
        for part, all_of_it in zip(tile[1:], whole[1:], strict=True):
            want = all_of_it[tile.latents.start : tile.latents.stop]
            torch.testing.assert_close(part, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("candidates", [None, K, 20, D_SAE])
@pytest.mark.parametrize("c", [3.0, -3.0, 0.5])
def test_every_latent_equals_moving_the_states(candidates: int | None, c: float) -> None:
    w = world(candidates)
    (found,) = direction_changes(w.base, w.sae, range(D_SAE), [c])
    brute = torch.stack(
        [recomputed(w.sae, w.weight, w.states, K, Direction(latent, c)) for latent in range(D_SAE)]
    )
    torch.testing.assert_close(found[c].change, brute, rtol=0, atol=1e-11)
    for latent in range(0, D_SAE, 7):
        before = stable_topk(w.sae.preactivations(w.states), K).indices
        state = w.states + c * w.states.std(dim=-1, keepdim=True) * w.sae.directions(
            torch.tensor([latent])
        )
        a = w.sae.preactivations(state)
        after = stable_topk(a, K).indices
        entered = [
            len(set(new) - set(old))
            for new, old in zip(after.tolist(), before.tolist(), strict=True)
        ]
        assert found[c].swapped[latent].tolist() == entered
        frozen = (w.weight[before] * a.gather(1, before)).sum(1) - w.base.rewards
        torch.testing.assert_close(found[c].frozen[latent], frozen, rtol=0, atol=1e-11)
    assert found[c].swapped.double().mean() > 0.5 and (found[c].change != found[c].frozen).any()


def test_any_range_of_latents_gives_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direction, "TILE_ROWS", 64)
    w = world()
    whole = torch.cat(
        [m[3.0].change for m in direction_changes(w.base, w.sae, range(D_SAE), [3.0])]
    )
    for edges in ([0, 1, 63, 64, 65, 299, 300], [0, 100, 100, 300]):
        for start, stop in itertools.pairwise(edges):
            parts = [m[3.0] for m in direction_changes(w.base, w.sae, range(start, stop), [3.0])]
            assert [latent for part in parts for latent in part.latents] == list(range(start, stop))
            assert torch.equal(
                torch.cat([part.change for part in parts]) if parts else whole[:0],
                whole[start:stop],
            )


def test_latents_that_tie_are_sorted_out_as_the_model_does() -> None:
    w = world(twins=True)
    (found,) = direction_changes(w.base, w.sae, range(40), [3.0])
    assert found[3.0].sorted_out > 0, "k is odd and latents come in equal pairs: the k-th ties"
    off = check(w.sae, w.base, w.states, found[3.0].change, range(40), 3.0)
    # Which of two equal latents is kept is decided by their numbers; rounding, other in a
    # recomputation, can decide otherwise.
    brute = torch.stack(
        [recomputed(w.sae, w.weight, w.states, K, Direction(latent, 3.0)) for latent in range(40)]
    )
    gap = (w.weight[::2] - w.weight[1::2]).abs().max() * w.base.a.abs().max() * 2
    assert off.pairs == 40 * TEXTS and ((found[3.0].change - brute).abs() < gap).all()


def test_check_counts_what_is_wrong() -> None:
    w = world()
    (found,) = direction_changes(w.base, w.sae, range(5), [1.0])
    assert check(w.sae, w.base, w.states, found[1.0].change, range(5), 1.0).mismatches == 0
    found[1.0].change[2, 3] += 0.1
    spoilt = check(w.sae, w.base, w.states, found[1.0].change, range(5), 1.0)
    assert spoilt.mismatches == 1 and spoilt.worst > 1e-3
    assert check(w.sae, w.base, w.states, found[1.0].change[:0], [], 1.0).pairs == 0


def test_table_of_one_prompt_by_hand() -> None:
    w = world(texts=2)
    contrast = Contrast(
        np.arange(2), np.array([0, 0]), np.array([1.0, 0.0]), np.array([0.0, 1.0]), 1
    )
    (found,) = direction_changes(w.base, w.sae, range(3), [2.0])
    table = direction_table([found], contrast, 10, 0)
    change = found[2.0].change.numpy()
    assert table["latent"].tolist() == [0, 1, 2] and set(table["c"]) == {2.0}
    assert table["effect"].to_numpy() == pytest.approx(change[:, 0] - change[:, 1])
    assert table["change_rejected"].to_numpy() == pytest.approx(change[:, 1])
    assert table["swapped"].to_numpy() == pytest.approx(found[2.0].swapped.double().mean(1).numpy())
    assert table["effect_low"].isna().all(), "one prompt tells nothing of the spread"
    assert direction_table([], contrast, 10, 0).empty


def test_a_sarm_without_decoder_is_a_sentence(tiny_sarm, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    sae, weight = load_sae(SarmConfig(model=str(tiny_sarm)), "cpu")
    assert sae.encoder.weight.dtype == weight.dtype == torch.float64 and len(weight) == 64
    tensors = load_file(tiny_sarm / "model.safetensors")
    del tensors["sae.decoder.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_sarm / "config.json").read_text())
    with pytest.raises(UserError, match=r"no sae.decoder.weight.*probe.directions=\[\]"):
        load_sae(SarmConfig(model=str(tmp_path)), "cpu")


# Kernels


KERNELS = """
import torch
from sarm.probing import probe_kernels
from sarm.probing.direction import affine, select_on_cpu, tiles
from tests.probing.test_direction import K, D_SAE, world
probe_kernels.EXTRAS = 32
for candidates in (20, 64, D_SAE):
    w = world(candidates, texts=3)
    tile = next(tiles(w.base, w.sae, range(3, 9), 6))
    for c in (3.0, -3.0):
        alpha, beta = affine(w.base, tile, c)
        prepared = probe_kernels.prepare(w.base)
        ours = probe_kernels.select_moved(w.base, prepared, tile.gains, alpha, beta)
        theirs = select_on_cpu(w.base, tile.gains, alpha, beta)
        assert (ours[3] == 0).all(), ours[3]
        for a, b in zip(ours[:3], theirs[:3]):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
w = world(K, texts=3)  # from k candidates alone a threshold is so low that more come than fit
tile = next(tiles(w.base, w.sae, range(3, 9), 6))
moved = affine(w.base, tile, 3.0)
prepared = probe_kernels.prepare(w.base)
assert (probe_kernels.select_moved(w.base, prepared, tile.gains, *moved)[3] == 2).any()
w = world(20, twins=True, texts=3)
tile = next(tiles(w.base, w.sae, range(3, 9), 6))
moved = affine(w.base, tile, 3.0)
prepared = probe_kernels.prepare(w.base)
assert (probe_kernels.select_moved(w.base, prepared, tile.gains, *moved)[3] != 0).any()
"""


def test_kernels_do_what_the_plain_code_does() -> None:
    run_interpreted(KERNELS)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    w = world(texts=5)
    on_gpu = baseline(w.sae.cuda(), w.weight.cuda(), w.states.cuda(), K)
    gpu = torch.cat(
        [m[3.0].change.cpu() for m in direction_changes(on_gpu, w.sae, range(D_SAE), [3.0])]
    )
    w.sae.cpu()
    cpu = torch.cat([m[3.0].change for m in direction_changes(w.base, w.sae, range(D_SAE), [3.0])])
    torch.testing.assert_close(gpu, cpu, rtol=0, atol=1e-10)
