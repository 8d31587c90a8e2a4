"""The TopK sparse autoencoder of a SARM, and its SAELens form (`cfg.json` +
`sae_weights.safetensors`).

`a = W_enc (ĥ - b_pre) + b_lat` with `ĥ = (h - mean h) / (std h + 1e-6)`; the k largest of `a` are
the latents, kept with their sign (no ReLU), as in https://github.com/schrieffer-z/sarm
(src/sae.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sarm.config import UserError
from sarm.model_files import is_finite, opened, read_json

EPS = 1e-6
"""Added to the standard deviation; SAELens adds `SAELENS_EPS`, so a state of standard deviation s
reads 9e-6 / s smaller there.
"""


SAELENS_EPS = 1e-5
HEAD_FILE = "sarm_head.safetensors"
"""Beside SAELens's two files, which have no place for a head."""


class TopK(NamedTuple):
    """The largest preactivations, descending; equal ones by ascending latent."""

    values: Tensor
    """(..., k)"""
    indices: Tensor
    """(..., k) int64"""


class TopKSae(nn.Module):
    """Encoder, optional decoder and biases, under upstream's state-dict names."""

    def __init__(self, d_in: int, d_sae: int, k: int, *, decoder: bool = True) -> None:
        super().__init__()
        self.k = k
        self.pre_bias = nn.Parameter(torch.zeros(d_in))
        self.latent_bias = nn.Parameter(torch.zeros(d_sae))
        self.encoder = nn.Linear(d_in, d_sae, bias=False)
        self.decoder = nn.Linear(d_sae, d_in, bias=False) if decoder else None

    def normalise(self, h: Tensor) -> Tensor:
        """Centre and scale each state, (..., d_in) of any dtype to (..., d_in) in the SAE's."""
        h = h.to(self.pre_bias.dtype)
        return (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + EPS)

    def preactivations(self, h: Tensor) -> Tensor:
        """`a` of raw states, (..., d_in) to (..., d_sae); normalises first."""
        return self.encoder(self.normalise(h) - self.pre_bias) + self.latent_bias

    def topk(self, a: Tensor, k: int | None = None) -> TopK:
        """The k largest of each row (the SAE's own k by default), the same whatever the device or
        the batch.
        """
        return stable_topk(a, self.k if k is None else k)

    def encode(self, h: Tensor) -> TopK:
        """The latents of raw states (..., d_in)."""
        return self.topk(self.preactivations(h))

    def decode(self, latents: TopK) -> Tensor:
        """The normalised states (..., d_in) that latents stand for."""
        return (latents.values.unsqueeze(-1) * self._decoder().T[latents.indices]).sum(
            -2
        ) + self.pre_bias

    def directions(self, latents: Tensor | None = None) -> Tensor:
        """Unit decoder directions d_i of the latents (n,), or of all: (n, d_in). A latent without
        a direction gives zeros.
        """
        rows = self._decoder().T if latents is None else self._decoder().T[latents]
        return nn.functional.normalize(rows, dim=-1)

    def _decoder(self) -> Tensor:
        if self.decoder is None:
            raise UserError(
                "this SARM's checkpoint has no sae.decoder.weight, which directions and"
                " reconstruction need; use one that has"
            )
        return self.decoder.weight


def stable_topk(a: Tensor, k: int) -> TopK:
    """The k largest of the last dimension, descending, ties by lowest index.

    `torch.topk` says nothing of ties, and its choice differs between devices and batch sizes.
    """
    values, indices = torch.topk(a, k, dim=-1, sorted=False)
    # Which of the elements equal to the smallest kept were kept is arbitrary only where there are
    # more of them.
    smallest = values.amin(-1, keepdim=True)
    arbitrary = ((a == smallest).sum(-1) > (values == smallest).sum(-1)).nonzero(as_tuple=True)
    if arbitrary[0].numel():
        indices[arbitrary] = torch.sort(a[arbitrary], dim=-1, descending=True, stable=True).indices[
            ..., :k
        ]
    indices = indices.sort(-1).values
    values, order = torch.gather(a, -1, indices).sort(dim=-1, descending=True, stable=True)
    return TopK(values, torch.gather(indices, -1, order))


def rows_with_negative_latent(latents: TopK) -> int:
    """How many rows keep a value below zero: there SAELens, which clamps at zero, gives other
    latents than upstream.
    """
    return int((latents.values[..., -1] < 0).sum())


class SaelensDifference(NamedTuple):
    """What SAELens reads otherwise in n states: it adds 1e-5 to the deviation and sets kept values
    below zero to zero.
    """

    n: int
    rows_with_negative_latent: int
    reselected: int
    """(state, latent) pairs that only one of the two keeps, the zeroed ones left out"""
    largest_value: float
    """of |z - theirs|"""
    largest_reward: float
    """of |w . z - w . theirs|"""


@torch.no_grad()
def saelens_difference(
    sae: TopKSae, head_weight: Tensor, states: Tensor, rows: int = 64
) -> SaelensDifference:
    """Compare both readings of states (n, d_in), by SAELens's arithmetic; `head_weight`
    (d_sae,).
    """
    negative, reselected, value, reward = 0, 0, 0.0, 0.0
    for h in states.to(sae.pre_bias.dtype).split(rows):
        centred = h - h.mean(-1, keepdim=True)
        ours = sae.encode(h)
        theirs = sae.topk(
            sae.encoder(centred / (h.std(-1, keepdim=True) + SAELENS_EPS) - sae.pre_bias)
            + sae.latent_bias
        )
        dense = [
            torch.zeros(len(h), len(head_weight)).scatter(1, top.indices, top.values)
            for top in (ours, theirs)
        ]
        kept = [
            torch.zeros(len(h), len(head_weight), dtype=torch.bool).scatter(1, top.indices, True)
            for top in (ours, theirs)
        ]
        dense[1] = dense[1].clamp(min=0)
        negative += rows_with_negative_latent(ours)
        reselected += int((kept[0] != kept[1]).sum())
        value = max(value, float((dense[0] - dense[1]).abs().max()))
        reward = max(reward, float(((dense[0] - dense[1]) @ head_weight).abs().max()))
    return SaelensDifference(len(states), negative, reselected, value, reward)


def to_saelens(
    sae: TopKSae,
    folder: str | Path,
    *,
    model_name: str,
    source_layer: int,
    head_weight: Tensor | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write the SAE as SAELens 6 reads it, and the head (d_sae,), which it has no place for,
    beside it.

    `model_name` must be the SARM's own backbone: upstream fine-tunes it. `saelens_difference` tells
    what SAELens will read otherwise. Raises UserError where the checkpoint has no decoder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    decoder = sae._decoder()
    d_sae, d_in = sae.encoder.weight.shape
    config = {
        "architecture": "topk",
        "d_in": d_in,
        "d_sae": d_sae,
        "k": sae.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            # A version from 6 on keeps SAELens from rewriting the config as a legacy one.
            "sae_lens_version": "6.54.12",
            "model_name": model_name,
            "hook_name": f"blocks.{source_layer - 1}.hook_resid_post",
            "hf_hook_name": f"model.layers.{source_layer - 1}",
            "prepend_bos": True,
            **(metadata or {}),
        },
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = {
        "W_enc": sae.encoder.weight.T,
        "b_enc": sae.latent_bias,
        "W_dec": decoder.T,
        "b_dec": sae.pre_bias,
    }
    save_file(
        {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()},
        folder / "sae_weights.safetensors",
    )
    if head_weight is not None:
        save_file(
            {"score.weight": head_weight.detach().float().cpu().reshape(1, -1).contiguous()},
            folder / HEAD_FILE,
        )
    return folder


def head_from_saelens(folder: str | Path) -> Tensor:
    """The head (d_sae,) that `to_saelens` left beside an SAE. Raises UserError where there is
    none.
    """
    file = Path(folder) / HEAD_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} holds no {HEAD_FILE}: SAELens keeps no reward head; export the SARM anew, or"
            " train one"
        )
    return load_file(file)["score.weight"][0]


def from_saelens(folder: str | Path) -> TopKSae:
    """A TopK SAE trained or exported by SAELens on `layer_norm` activations, in float32.

    Latents agree where none that is kept is negative (`rows_with_negative_latent`), up to SAELens's
    other epsilon. Raises UserError on another architecture or normalisation.
    """
    folder = Path(folder)
    config = read_json(folder / "cfg.json", "SAE in SAELens's form")
    wanted = {
        "architecture": ("topk", "topk_sae"),
        "normalize_activations": ("layer_norm",),
        "apply_b_dec_to_input": (True,),
        "reshape_activations": ("none",),
    }
    # What SAELens takes where cfg.json does not say.
    unsaid = {"apply_b_dec_to_input": True, "reshape_activations": "none"}
    for key, allowed in wanted.items():
        value = config.get(key, unsaid.get(key))
        if value not in allowed:
            raise UserError(
                f"{folder / 'cfg.json'} has {key} {value!r}; a SARM's SAE needs {allowed[0]!r}"
            )
    for key in ("d_in", "d_sae", "k"):
        size = config.get(key)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(
                f"{folder / 'cfg.json'} has {key} {size!r}; it must be a positive number"
            )
    d_in, d_sae, k = config["d_in"], config["d_sae"], config["k"]
    if k > d_sae:
        raise UserError(f"{folder / 'cfg.json'} keeps k {k} of {d_sae} latents; correct it")
    tensors = _saelens_tensors(folder / "sae_weights.safetensors", d_in, d_sae)
    w_enc, b_enc, w_dec = tensors["W_enc"], tensors["b_enc"], tensors["W_dec"]
    if config.get("rescale_acts_by_decoder_norm", False):
        # There activations are compared and kept in units of their decoder rows: the same SAE with
        # unit rows. A dead latent's row is zero, and stays so.
        norm = w_dec.norm(dim=-1)
        w_enc, b_enc = w_enc * norm, b_enc * norm
        w_dec = w_dec / norm.where(norm > 0, 1.0).unsqueeze(-1)
    sae = TopKSae(d_in, d_sae, k)
    sae.load_state_dict(
        {
            "pre_bias": tensors["b_dec"],
            "latent_bias": b_enc,
            "encoder.weight": w_enc.T.contiguous(),
            "decoder.weight": w_dec.T.contiguous(),
        }
    )
    return sae


def _saelens_tensors(file: Path, d_in: int, d_sae: int) -> dict[str, Tensor]:
    """SAELens's four tensors in float32, of the sizes that cfg.json says. Raises UserError."""
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    with opened(file) as tensors:
        names = set(tensors.keys())
        if lost := sorted(set(shapes) - names):
            raise UserError(f"{file} lacks {', '.join(lost)}; export the SAE again")
        if unread := sorted(names - set(shapes)):
            raise UserError(
                f"{file} holds {', '.join(unread)}, which a SARM's SAE does not compute with"
            )
        found = {name: tensors.get_tensor(name).float() for name in shapes}
    for name, tensor in found.items():
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{file}: {name} has shape {tuple(tensor.shape)} where cfg.json makes it"
                f" {shapes[name]}; correct cfg.json"
            )
        if not is_finite(tensor):
            raise UserError(f"{file}: {name} holds values that are NaN or infinite")
    return found
