"""SARM checkpoints on disk: their config, of upstream's two generations or our own, and their
tensors.

`sarm.reward_model.model.SarmModel.from_pretrained` opens them; nothing here builds a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig

from sarm.config import UserError


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
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json; give the folder of a SARM") from None
    except ValueError as error:
        raise UserError(
            f"{folder / 'config.json'} is not JSON ({error}); fetch the model again"
        ) from None
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
        said = {value for value in values if value is not None}
        if len(said) > 1:
            raise UserError(
                f"{folder / 'config.json'} gives {name} twice, as"
                f" {' and '.join(map(str, sorted(said)))}; correct it"
            )
        found[name] = said.pop() if said else None
    for name, upstream in (
        ("source_layer", "sae_source_layer"),
        ("d_sae", "sae_latent_size"),
        ("k", "sae_k"),
    ):
        if not isinstance(found[name], int) or found[name] < 1:
            raise UserError(
                f"{folder / 'config.json'} does not give {upstream} in sarm_param as a positive"
                " number, so it is no SARM's; add it if it is"
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
    # What is set below, what upstream means for its own code, and what `from_pretrained` decides.
    dropped = {
        "model_type",
        "architectures",
        "auto_map",
        "num_hidden_layers",
        "has_decoder",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
    }
    llama = {
        key: value
        for key, value in keys.items()
        if key not in dropped | found.keys() and not key.startswith(("sae_", "sarm_"))
    }
    return SarmModelConfig(
        **llama,
        num_hidden_layers=found["source_layer"],
        d_sae=found["d_sae"],
        k=found["k"],
        use_topk=bool(found["use_topk"] if use_topk is None else use_topk),
        has_decoder=decoder,
        tie_word_embeddings=False,
    )


class Weights:
    """A folder's safetensors, one file or shards, by tensor name."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.is_file()
            else sorted(p.name for p in folder.glob("*.safetensors"))
        )
        if not names:
            raise UserError(
                f"{folder} holds no safetensors; pickled weights are not read, convert them first"
            )
        self.files: dict[str, Path] = {}
        for name in names:
            try:
                with safe_open(folder / name, "pt") as tensors:
                    self.files |= dict.fromkeys(tensors.keys(), folder / name)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{folder / name} cannot be read ({error}); fetch the model again"
                ) from None

    def __contains__(self, name: str) -> bool:
        return name in self.files


def read_tensors(
    wanted: Mapping[str, torch.Size], weights: Sequence[Weights], folder: Path
) -> dict[str, Tensor]:
    """The wanted tensors and no others, each from the first folder that has it. Raises UserError
    on missing ones and other shapes.
    """
    missing = [name for name in wanted if not any(name in w for w in weights)]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors, such as {missing[0]}; it is no whole SARM,"
            " fetch it again"
        )
    where: dict[Path, list[str]] = {}
    for name in wanted:
        where.setdefault(next(w.files[name] for w in weights if name in w), []).append(name)
    state: dict[str, Tensor] = {}
    for file, names in where.items():
        with safe_open(file, "pt") as tensors:
            # Copied out of the mapped file: there a tensor's alignment, and with it a product's
            # rounding, depends on the file's layout.
            state |= {name: tensors.get_tensor(name).clone() for name in names}
    for name, tensor in state.items():
        if tensor.shape != wanted[name]:
            raise UserError(
                f"{folder}: {name} has shape {tuple(tensor.shape)} where config.json makes it"
                f" {tuple(wanted[name])}; correct config.json"
            )
    return state
