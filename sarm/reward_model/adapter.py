"""What a SARM adds to the layers it takes from another model: low-rank updates, merged on opening.

A weight becomes `W + B A`, computed in float32 and then rounded to the model's dtype. In a
checkpoint the factors stand as `adapter.<weight's name>.a` (rank, in) and `.b` (out, rank).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sarm.config import UserError
from sarm.model_files import opened as opened_file
from sarm.model_files import read_tensors
from sarm.reward_model.weights import Opened

PREFIX = "adapter."


def is_adapted(opened: Opened) -> bool:
    """Whether a SARM's folder adds to the layers it takes from another model; reads no values."""
    return any(name.startswith(PREFIX) for name in opened.weights[0].files)


def read_adapter(opened: Opened, wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The factors in a SARM's folder; none where it has no adapter. Raises UserError on factors
    that fit no weight.
    """
    own = opened.weights[0]
    shapes: dict[str, torch.Size] = {}
    for name in (name for name in own.files if name.startswith(PREFIX)):
        with opened_file(own.files[name]) as tensors:
            shapes[name] = torch.Size(tensors.get_slice(name).get_shape())
    for weight in adapted_weights(shapes):
        a, b = (shapes.get(f"{PREFIX}{weight}.{factor}", torch.Size()) for factor in "ab")
        if (
            weight not in wanted
            or len(a) != 2
            or len(b) != 2
            or a[0] != b[1]
            or (wanted[weight] != (b[0], a[1]))
        ):
            raise UserError(
                f"{opened.folder}: the adapter of {weight} is {tuple(b)} by {tuple(a)}, which does"
                f" not fit {tuple(wanted.get(weight, ()))}; fetch the SARM again"
            )
    return read_tensors(shapes, [own], opened.folder)


def merge_adapter(state: dict[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
    """Give the weights of `state` that the adapter names their updates, in place, in float32."""
    for name in adapted_weights(adapter):
        a, b = (adapter[f"{PREFIX}{name}.{factor}"].float() for factor in "ab")
        state[name] = state[name].float() + b @ a


def adapted_weights(names: Iterable[str]) -> list[str]:
    """The weights that factors of these names update."""
    return sorted({name.removeprefix(PREFIX)[:-2] for name in names if name.startswith(PREFIX)})
