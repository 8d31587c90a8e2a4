"""The files of a model's folder, looked over and read: config.json, and the safetensors that are
the model's.

`Weights(folder)` reads `model.safetensors`, else the shards that `model.safetensors.index.json`
lists, as transformers does, and never what lies beside them. Every phase opens a SARM, a policy or
a judge through here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sarm.config import UserError
from sarm.data.files import POINTER

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WHOLE_NUMBERS = ("F64", "F32", "F16", "BF16")
"""What weights may be stored in, by safetensors' names: 8 bits and fewer need scales that nothing
here reads.
"""


class Weights:
    """A folder's tensors by name, none read yet. Raises UserError where they are not all there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / WHOLE).is_symlink() or (folder / WHOLE).exists():
            self.shards, indexed = [folder / WHOLE], None
        elif (folder / INDEX).exists():
            indexed = _weight_map(folder / INDEX)
            self.shards = [folder / name for name in sorted(set(indexed.values()))]
        else:
            others = sorted(p.name for p in folder.glob("*.safetensors"))
            found = f"only {', '.join(others[:3])}" if others else "no safetensors"
            raise UserError(
                f"{folder} holds neither {WHOLE} nor {INDEX} ({found}): bring them, or convert"
                " pickled weights, which are not read"
            )
        self.files: dict[str, Path] = {}
        for shard in self.shards:
            with opened(shard) as tensors:
                self.files |= dict.fromkeys(tensors.keys(), shard)
                _refuse_quantised(shard, tensors)
        lost = sorted(set(indexed or ()) - set(self.files))
        if lost:
            raise UserError(
                f"{folder / INDEX} lists {len(lost)} tensors that its files lack, such as"
                f" {lost[0]}; fetch the model again"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with opened(self.files[name]) as tensors:
            found: Tensor = tensors.get_tensor(name)
        return found


def opened(file: Path, device: str = "cpu") -> Any:
    """A safetensors file, open. Raises UserError where it is not there, a pointer or cut short."""
    if not file.exists():
        gone = "is a link that leads nowhere" if file.is_symlink() else "is missing"
        raise UserError(f"{file} {gone}; fetch the model again")
    if file.stat().st_size < 1024 and file.read_bytes().startswith(POINTER):
        raise UserError(
            f"{file} is a git-LFS pointer and not the file itself; run git lfs pull there"
        )
    try:
        return safe_open(file, "pt", device=device)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); fetch the model again") from None


def read_tensors(
    wanted: Mapping[str, torch.Size], weights: Sequence[Weights], folder: Path
) -> dict[str, Tensor]:
    """The wanted tensors and no others, each from the first folder that has it. Raises UserError
    on missing ones, other shapes, and values that are NaN or infinite.
    """
    where = _places(wanted, weights, folder)
    state: dict[str, Tensor] = {}
    for file, names in where.items():
        with opened(file) as tensors:
            # Copied out of the mapped file: there a tensor's alignment, and with it a product's
            # rounding, depends on the file's layout.
            state |= {name: tensors.get_tensor(name).clone() for name in names}
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise UserError(_not_finite(folder, name))
    return state


def check_shapes(
    wanted: Mapping[str, torch.Size], weights: Sequence[Weights], folder: Path
) -> None:
    """Raises UserError where a wanted tensor is missing or has another shape; reads no values."""
    _places(wanted, weights, folder)


def check_finite(weights: Weights) -> None:
    """Raises UserError naming the first tensor that holds NaN or infinity. Reads every file."""
    for shard in weights.shards:
        with opened(shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if not is_finite(tensors.get_tensor(name)):
                    raise UserError(_not_finite(weights.folder, name))


def refuse_altered(folder: Path, keys: Mapping[str, Any]) -> None:
    """Raises UserError where what config.json (`keys`) or a file beside it says would make another
    model of the weights: quantisation, or an adapter, which transformers would attach unasked.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds adapter_config.json beside the weights, and which of the two is meant"
            " is not said; merge the adapter into them, or move the adapter files away"
        )
    if keys.get("quantization_config"):
        raise UserError(
            f"{folder / 'config.json'} has a quantization_config, and quantised weights are neither"
            " trained nor probed here; take the model in bfloat16 or float32"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: their sum would be, and takes no memory."""
    if not tensor.is_floating_point():
        return True
    total = tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize < 4 else torch.float64)
    # a sum of large finite values may overflow
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def read_json(file: Path, what: str = "model") -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where it is missing, damaged or no object."""
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file.parent} holds no {file.name}; give the folder of a {what}"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not JSON ({error}); fetch the {what} again") from None
    if not isinstance(keys, dict):
        raise UserError(f"{file} holds no JSON object; fetch the {what} again")
    return keys


def _places(
    wanted: Mapping[str, torch.Size], weights: Sequence[Weights], folder: Path
) -> dict[Path, list[str]]:
    """The wanted names by the file that has them."""
    missing = [name for name in wanted if not any(name in w for w in weights)]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors, such as {missing[0]}; it is no whole SARM,"
            " fetch it again"
        )
    where: dict[Path, list[str]] = {}
    for name in wanted:
        where.setdefault(next(w.files[name] for w in weights if name in w), []).append(name)
    for file, names in where.items():
        with opened(file) as tensors:
            for name in names:
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != tuple(wanted[name]):
                    raise UserError(
                        f"{folder}: {name} has shape {shape} where config.json makes it"
                        f" {tuple(wanted[name])}; correct config.json"
                    )
    return where


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; fetch the model again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(
                f"{index} names {name!r}, which is no file beside it; fetch the model again"
            )
    return weight_map


def _refuse_quantised(shard: Path, tensors: Any) -> None:
    for name in tensors.keys():  # noqa: SIM118
        if name.endswith("weight"):
            stored = tensors.get_slice(name).get_dtype()
            if stored not in WHOLE_NUMBERS:
                raise UserError(
                    f"{shard}: {name} is stored as {stored}, and quantised weights are neither"
                    " trained nor probed here; take the model in bfloat16 or float32"
                )


def _not_finite(folder: Path, name: str) -> str:
    return (
        f"{folder}: {name} holds values that are NaN or infinite; fetch the model again, or take"
        " another"
    )
