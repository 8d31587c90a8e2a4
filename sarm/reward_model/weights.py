"""SARM checkpoints on disk: their config, of upstream's two generations or our own, and their
tensors.

`sarm.reward_model.model.SarmModel.from_pretrained` opens them; nothing here builds a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig

from sarm.config import UserError
from sarm.model_files import Weights, check_shapes, read_json, refuse_altered
from sarm.models import REFUSED, one_line

TRAINED = ("sae.encoder.weight", "score.weight")


class SarmModelConfig(LlamaConfig):
    """A Llama config whose `num_hidden_layers` counts the layers kept, and the SAE's sizes."""

    model_type = "sarm"

    d_sae: int = 0
    k: int = 0
    use_topk: bool = True
    has_decoder: bool = True
    """Whether the checkpoint holds the SAE's decoder."""
    backbone: dict[str, Any] | None = None
    """`{"model": ..., "revision": ...}` where the Llama layers are another model's and not saved
    with this one.
    """

    @property
    def source_layer(self) -> int:
        """How many decoder layers run; the SAE reads what the last of them leaves in the residual
        stream.
        """
        return self.num_hidden_layers


def model_folder(model: str | Path, revision: str | None, local_files_only: bool) -> Path:
    if os.path.isdir(model):
        return Path(model)
    from sarm.hub import local_model

    return local_model(str(model), revision, download=not local_files_only)


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises UserError."""
    keys = read_json(folder / "config.json", "SARM")
    refuse_altered(folder, keys)
    layers = keys.get("backbone")
    if layers is not None and not (
        isinstance(layers, dict) and isinstance(layers.get("model"), str)
    ):
        raise UserError(
            f"{folder / 'config.json'} has backbone {layers!r}, which names no model; correct it"
        )
    if keys.get("model_type") not in ("llama", "sarm"):
        raise UserError(
            f"{folder} is a {keys.get('model_type')} model; only the Llama family is supported"
        )
    return keys


def model_config(
    keys: dict[str, Any], folder: Path, *, use_topk: bool | None = None, decoder: bool = True
) -> SarmModelConfig:
    """A config of ours from config.json's keys: our own, upstream's nested `sarm_param`, or its
    older flat ones.

    Raises UserError where a size is missing, or whether TopK runs is neither said nor given: folder
    names lie ("woTopK" has "TopK" in it).
    """
    nested = keys.get("sarm_param") or {}
    if not isinstance(nested, dict):
        raise UserError(
            f"{folder / 'config.json'} has sarm_param {nested!r}, no section; correct it"
        )
    candidates = {
        "source_layer": (
            keys.get("num_hidden_layers") if keys["model_type"] == "sarm" else None,
            nested.get("sae_source_layer"),
            keys.get("sae_hidden_state_source_layer"),
        ),
        "d_sae": (keys.get("d_sae"), nested.get("sae_latent_size"), keys.get("sae_latent_size")),
        "k": (keys.get("k"), nested.get("sae_k"), keys.get("sae_k")),
        "use_topk": (
            keys.get("use_topk"),
            nested.get("sarm_use_activation"),
            keys.get("sarm_use_topk"),
        ),
    }
    found: dict[str, Any] = {}
    for name, values in candidates.items():
        said = [value for value in values if value is not None]
        if any(value != said[0] for value in said):
            raise UserError(
                f"{folder / 'config.json'} gives {name} twice, as"
                f" {' and '.join(sorted(map(str, said)))}; correct it"
            )
        found[name] = said[0] if said else None
    for name, upstream in (
        ("source_layer", "sae_source_layer"),
        ("d_sae", "sae_latent_size"),
        ("k", "sae_k"),
    ):
        if type(found[name]) is not int or found[name] < 1:
            raise UserError(
                f"{folder / 'config.json'} does not give {upstream} in sarm_param as a positive"
                " number, so it is no SARM's; add it if it is"
            )
    if not isinstance(found["use_topk"], (bool, type(None))):
        raise UserError(
            f"{folder / 'config.json'} has {found['use_topk']!r} for whether TopK runs before the"
            " head; make it true or false"
        )
    if found["use_topk"] is None and use_topk is None:
        raise UserError(
            f"{folder / 'config.json'} does not say whether TopK runs before the head; set"
            " sarm.use_topk to true or false"
        )
    if (
        found["use_topk"] is not None
        and use_topk is not None
        and bool(found["use_topk"]) != use_topk
    ):
        raise UserError(
            f"sarm.use_topk is {use_topk} but {folder / 'config.json'} says"
            f" {bool(found['use_topk'])}; leave sarm.use_topk out"
        )
    if found["k"] > found["d_sae"]:
        raise UserError(
            f"{folder / 'config.json'} keeps k {found['k']} of {found['d_sae']} latents; correct it"
        )
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    turning = rope.get("rope_type") or rope.get("type") if isinstance(rope, dict) else None
    if turning in ("dynamic", "longrope"):
        raise UserError(
            f"{folder / 'config.json'} has rope_type {turning}, under which a text's reward depends"
            " on the longest text scored beside it; use a SARM with a fixed rotation"
        )
    # What is set below, what upstream means for its own code, what `from_pretrained` decides, and
    # how transformers would compute attention, which `sarm.llama.packed` does.
    dropped = {
        "model_type",
        "architectures",
        "auto_map",
        "num_hidden_layers",
        "has_decoder",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "_attn_implementation",
    }
    llama = {
        key: value
        for key, value in keys.items()
        if key not in dropped | found.keys() and not key.startswith(("sae_", "sarm_"))
    }
    pad, rows = llama.get("pad_token_id"), llama.get("vocab_size")
    if not isinstance(pad, int) or not isinstance(rows, int) or pad >= rows:
        llama["pad_token_id"] = None  # nothing is padded
    try:
        return SarmModelConfig(
            **llama,
            num_hidden_layers=found["source_layer"],
            d_sae=found["d_sae"],
            k=found["k"],
            use_topk=bool(found["use_topk"] if use_topk is None else use_topk),
            has_decoder=decoder,
            tie_word_embeddings=False,
        )
    except REFUSED as error:
        raise UserError(
            f"{folder / 'config.json'} is no Llama's: {one_line(error)}; fetch the SARM again"
        ) from None


class Opened(NamedTuple):
    """A SARM's folder, read as far as its config: no tensor is yet."""

    folder: Path
    keys: dict[str, Any]
    """config.json's, over those of the backbone."""
    config: SarmModelConfig
    weights: tuple[Weights, ...]
    """The folder's own, then the backbone's where the layers are there."""


def open_folder(
    model: str | Path,
    revision: str | None = None,
    *,
    use_topk: bool | None = None,
    local_files_only: bool = True,
) -> Opened:
    """A SARM's config and where its tensors lie. Raises UserError where it is no whole SARM, or
    holds tensors of the SAE or head that nothing here computes with.
    """
    folder = model_folder(model, revision, local_files_only)
    keys, weights = read_config(folder), [Weights(folder)]
    if backbone := keys.get("backbone"):
        layers = model_folder(backbone["model"], backbone.get("revision"), local_files_only)
        keys = read_config(layers) | keys
        weights.append(Weights(layers))
    config = model_config(
        keys, folder, use_topk=use_topk, decoder="sae.decoder.weight" in weights[0]
    )
    return Opened(folder, keys, config, tuple(weights))


def refuse_untrained(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raises UserError where the encoder or the head, among others, is zero everywhere: then every
    text has the same reward.
    """
    for name in TRAINED:
        if name in tensors and not tensors[name].any():
            raise UserError(
                f"{folder}: {name} is zero everywhere, so every text has the same reward; take the"
                " SARM as it was trained"
            )


def check_tensors(opened: Opened, wanted: Mapping[str, torch.Size]) -> None:
    """Raises UserError where a wanted tensor is missing or misshapen, or where the folder holds
    one that would change rewards and is not read: any other of the SAE or the head, or a bias of a
    layer.
    """
    check_shapes(wanted, opened.weights, opened.folder)
    modules = {name.rpartition(".")[0] for name in wanted}
    unread = [
        name
        for name in opened.weights[0].files
        if name not in wanted
        and (name.startswith(("sae.", "score.")) or name.rpartition(".")[0] in modules)
    ]
    if unread:
        raise UserError(
            f"{opened.folder} holds {', '.join(sorted(unread)[:3])}, which a SARM by its"
            " config.json does not compute with; its rewards would be others than it was trained to"
            " give"
        )
