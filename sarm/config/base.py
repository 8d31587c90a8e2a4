"""What every section of a config is made of: strict frozen models, bounded numbers, and
`UserError`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

ROOT = Path(__file__).resolve().parent.parent.parent
"""The checkout: relative paths in a config are relative to it."""


def cache_folder() -> Path:
    """$SARM_CACHE, or ~/.cache/sarm: what fetch makes or keeps for every run."""
    return Path(os.environ.get("SARM_CACHE") or "~/.cache/sarm").expanduser().absolute()


class UserError(Exception):
    """A failure that a user can fix: one sentence with what, where and what to do. Exit code 2."""


class Strict(BaseModel):
    """Frozen, no unknown keys, no coercion from strings, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


STORED = {"stored": True}
"""The context in which a run's own config is validated."""
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Nonnegative = Annotated[float, Field(ge=0.0)]
Dtype = Literal["float32", "bfloat16"]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


FromList = BeforeValidator(_as_tuple)
"""Of a tuple: YAML has lists alone."""
