"""The SAE against arithmetic by hand, the plain TopK, and SAELens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sarm.config import UserError
from sarm.reward_model.sae import (
    EPS,
    TopK,
    TopKSae,
    from_saelens,
    rows_with_negative_latent,
    stable_topk,
    to_saelens,
)


@pytest.fixture()
def sae() -> TopKSae:
    torch.manual_seed(0)
    sae = TopKSae(16, 40, 5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    return sae


def test_preactivations_by_hand() -> None:
    """d_in 3: mean 2, unbiased std 1, so ĥ = (-1, 0, 1) up to the epsilon."""
    sae = TopKSae(3, 2, 1)
    with torch.no_grad():
        sae.pre_bias.copy_(torch.tensor([1.0, 0.0, 0.5]))
        sae.latent_bias.copy_(torch.tensor([10.0, -3.0]))
        sae.encoder.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 2.0]]))
    a = sae.preactivations(torch.tensor([[1.0, 2.0, 3.0]]))
    # ĥ - b_pre = (-2, 0, 0.5): 10 - 2 + 1.5, and -3 + 2 + 1.
    torch.testing.assert_close(a, torch.tensor([[9.5, 0.0]]), atol=1e-5, rtol=0)


def test_normalise_matches_numpy_with_unbiased_std(sae: TopKSae) -> None:
    h = torch.randn(7, 16) * torch.logspace(-4, 3, 7).unsqueeze(1) + 5
    x = h.double().numpy()
    expected = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + EPS)
    np.testing.assert_allclose(sae.double().normalise(h), expected, rtol=1e-9)


def test_low_precision_states_are_encoded_in_float32(sae: TopKSae) -> None:
    h = torch.randn(4, 16, dtype=torch.bfloat16)
    assert sae.preactivations(h).dtype == torch.float32
    assert torch.equal(sae.preactivations(h), sae.preactivations(h.float()))


def test_topk_keeps_negative_values() -> None:
    values, indices = stable_topk(torch.tensor([[-5.0, -1.0, -3.0]]), 2)
    assert values.tolist() == [[-1.0, -3.0]]
    assert indices.tolist() == [[1, 2]]
    assert rows_with_negative_latent(TopK(values, indices)) == 1
    assert rows_with_negative_latent(stable_topk(torch.tensor([[2.0, 0.0, -3.0]]), 2)) == 0


@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_topk_breaks_ties_by_lowest_index(levels: int) -> None:
    """Against a sort of (-value, index) in Python, from nearly all equal to nearly all
    different.
    """
    a = torch.randint(levels, (50, 60), generator=torch.Generator().manual_seed(levels)).float()
    values, indices = stable_topk(a, 9)
    for row, v, i in zip(a.tolist(), values.tolist(), indices.tolist(), strict=True):
        expected = sorted(range(60), key=lambda j: (-row[j], j))[:9]
        assert i == expected
        assert v == [row[j] for j in expected]


def test_topk_does_not_depend_on_the_other_rows() -> None:
    a = torch.randint(4, (30, 50), generator=torch.Generator().manual_seed(1)).float()
    together = stable_topk(a, 7).indices
    assert torch.equal(together, torch.cat([stable_topk(row, 7).indices for row in a.split(1)]))
    assert torch.equal(together, stable_topk(a.view(5, 6, 50), 7).indices.view(30, 7))


def test_decode_is_the_sum_of_decoder_columns(sae: TopKSae) -> None:
    h = torch.randn(6, 16)
    values, indices = sae.encode(h)
    z = torch.zeros(6, 40).scatter(1, indices, values)
    torch.testing.assert_close(
        sae.decode(TopK(values, indices)), z @ sae.decoder.weight.T + sae.pre_bias
    )


def test_directions_are_unit_decoder_columns(sae: TopKSae) -> None:
    latents = torch.tensor([3, 0, 39])
    columns = sae.decoder.weight[:, latents].T
    torch.testing.assert_close(sae.directions(latents), columns / columns.norm(dim=1, keepdim=True))
    assert sae.directions().shape == (40, 16)
    with pytest.raises(UserError, match=r"sae\.decoder\.weight"):
        TopKSae(16, 40, 5, decoder=False).directions(latents)


def test_saelens_reads_our_export_and_gives_the_same_latents(sae: TopKSae, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    with torch.no_grad():
        sae.latent_bias += 5  # so that every value kept is positive: SAELens clamps at zero
    to_saelens(sae, tmp_path, model_name="outputs/sarm", source_layer=15)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    assert theirs.cfg.metadata.hook_name == "blocks.14.hook_resid_post"
    h = 10 * torch.randn(20, 16)
    latents = sae.encode(h)
    assert rows_with_negative_latent(latents) == 0
    expected = torch.zeros(20, 40).scatter(1, latents.indices, latents.values)
    torch.testing.assert_close(theirs.encode(h), expected, atol=1e-4, rtol=1e-4)
    # Their output is in the units of the input.
    torch.testing.assert_close(
        theirs.decode(theirs.encode(h)),
        sae.decode(latents) * h.std(1, keepdim=True) + h.mean(1, keepdim=True),
        atol=1e-3,
        rtol=1e-3,
    )


def test_saelens_round_trip_is_exact(sae: TopKSae, tmp_path: Path) -> None:
    again = from_saelens(to_saelens(sae, tmp_path, model_name="m", source_layer=2))
    assert again.k == sae.k
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in sae.state_dict().items()
    )


def test_saelens_decoder_norm_is_folded_in(sae: TopKSae, tmp_path: Path) -> None:
    """SAELens trains TopK with activations in units of decoder norms: the import has to select the
    same latents.
    """
    sae_lens = pytest.importorskip("sae_lens")
    with torch.no_grad():
        sae.latent_bias += 5
    to_saelens(sae, tmp_path, model_name="m", source_layer=2)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"rescale_acts_by_decoder_norm": True}))
    h = 10 * torch.randn(20, 16)
    latents = from_saelens(tmp_path).encode(h)
    expected = sae_lens.SAE.load_from_disk(str(tmp_path)).encode(h)
    torch.testing.assert_close(
        torch.zeros(20, 40).scatter(1, latents.indices, latents.values),
        expected,
        atol=1e-3,
        rtol=1e-3,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "jumprelu"),
        ("normalize_activations", "none"),
        ("apply_b_dec_to_input", False),
    ],
)
def test_another_kind_of_saelens_sae_is_refused(
    sae: TopKSae, tmp_path: Path, key: str, value: object
) -> None:
    to_saelens(sae, tmp_path, model_name="m", source_layer=2)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=key):
        from_saelens(tmp_path)


def edited(sae: TopKSae, folder: Path, change: object = None, **keys: object) -> Path:
    """The SAE in SAELens's form, its tensors changed and keys of cfg.json set, or left out where
    None.
    """
    to_saelens(sae, folder, model_name="m", source_layer=2)
    config = json.loads((folder / "cfg.json").read_text()) | keys
    (folder / "cfg.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    if callable(change):
        tensors = load_file(folder / "sae_weights.safetensors")
        change(tensors)
        save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def test_a_dead_latent_of_saelens_stays_dead(sae: TopKSae, tmp_path: Path) -> None:
    """Its decoder row is zero, which no norm divides."""

    def kill(tensors: dict[str, torch.Tensor]) -> None:
        tensors["W_dec"][3] = 0

    again = from_saelens(edited(sae, tmp_path, kill, rescale_acts_by_decoder_norm=True))
    directions = again.directions()
    assert directions.isfinite().all() and not directions[3].any()
    torch.testing.assert_close(directions.norm(dim=-1)[4:], torch.ones(36))
    assert not again.encoder.weight[3].any()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"normalize_activations": None}, "normalize_activations None"),
        ({"architecture": None}, "architecture None"),
        ({"k": None}, "k None; it must be a positive number"),
        ({"k": 400}, "keeps k 400 of 40"),
        ({"k": 5.0}, r"k 5\.0; it must"),
        ({"d_in": 15}, r"W_enc has shape \(16, 40\).*\(15, 40\)"),
    ],
)
def test_a_saelens_config_that_says_too_little_is_refused(
    keys: dict[str, object], says: str, sae: TopKSae, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        from_saelens(edited(sae, tmp_path, **keys))


def test_saelens_files_that_are_not_whole_are_refused(sae: TopKSae, tmp_path: Path) -> None:
    for change, says in (
        (lambda t: t.pop("W_dec"), "lacks W_dec"),
        (lambda t: t.update(threshold=torch.ones(40)), "holds threshold"),
        (lambda t: t["W_enc"].view(-1).__setitem__(5, torch.nan), "W_enc holds values.*NaN"),
    ):
        with pytest.raises(UserError, match=says):
            from_saelens(edited(sae, tmp_path, change))
    file = tmp_path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        from_saelens(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        from_saelens(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"no cfg\.json"):
        from_saelens(tmp_path)
