"""A profile read from its YAML file, over the one it extends, and what is wrong with one in a
sentence: `load_profile("generic")`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import yaml

from sarm.config import ROOT, Loader, UserError
from slurm.profile import Container, Override, Profile

CLUSTERS = ROOT / "slurm" / "clusters"


def load_profile(cluster: str) -> Profile:
    """A profile by name in slurm/clusters/, or by path, over the one it `extends`. Raises UserError
    naming every bad key.
    """
    path = _path_of(cluster, Path())
    tree = _tree(path, ())
    try:
        return Profile.model_validate(tree)
    except pydantic.ValidationError as error:
        complaints = dict.fromkeys(
            _complaint(e) for e in error.errors() if e["loc"][-1:] != ("bool",)
        )
        raise UserError(f"cluster profile {path}: {'; '.join(complaints)}") from None


def _path_of(cluster: str, folder: Path) -> Path:
    return folder / cluster if cluster.endswith((".yaml", ".yml")) else CLUSTERS / f"{cluster}.yaml"


def _tree(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """A profile's keys over those of the one it extends, a path beside it or a name."""
    if path.resolve() in extended_by:
        raise UserError(f"cluster profile {path} extends itself; remove an extends")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, Loader)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in CLUSTERS.glob("*.yaml")))
        raise UserError(
            f"cluster profile {path} does not exist; there are {known}; copy"
            " slurm/clusters/generic.yaml for your site"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"cluster profile {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"cluster profile {path} is empty or not a mapping of keys")
    if misread := list(_misread(yaml.compose(text, Loader), "")):
        raise UserError(f"cluster profile {path}: {'; '.join(misread)}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"cluster profile {path}: extends: must be the name or path of a profile")
    return _over(_tree(_path_of(base, path.parent), (*extended_by, path.resolve())), tree)


def _over(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` laid over `base`, mapping by mapping; a list replaces a list."""
    found = dict(base)
    for key, value in tree.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        found[key] = _over(base[key], value) if both else value
    return found


def _misread(node: yaml.Node | None, where: str) -> Iterator[str]:
    """What YAML takes for another number than it looks: clock times (base 60) and octals."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _misread(value, f"{where}.{key.value}" if where else str(key.value))
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _misread(value, where)
    elif isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
        text = node.value
        read = yaml.safe_load(text)
        if ":" in text:
            right = (
                f"{_minutes(text)}, in minutes" if where.endswith("_min") else f'"{text}" in quotes'
            )
            yield f"{where}: {text} is {read:g} to YAML, which counts in sixties; write {right}"
        elif re.fullmatch(r"[-+]?0[0-9_]+", text):
            plain = text.lstrip("0") or "0"
            right = f'{plain}, or "{text}" in quotes'
            yield f"{where}: {text} is {read} to YAML, an octal; write {right}"


def _minutes(clock: str) -> int:
    """Slurm's MM:SS, HH:MM:SS or D-HH:MM:SS as minutes, rounded up."""
    days, _, rest = clock.rpartition("-")
    parts = [float(part) for part in rest.split(":")]
    if days:  # D-HH and D-HH:MM too
        parts += [0.0] * (3 - len(parts))
    seconds = parts[-1] + 60 * parts[-2] + (3600 * parts[-3] if len(parts) > 2 else 0)
    return math.ceil((seconds + 86400 * int(days or 0)) / 60)


def _whole(key: str, value: object) -> str:
    """What to write where a whole number belongs."""
    if key.endswith("_min") and re.fullmatch(r"\d+(:\d+){1,2}|\d+-\d+(:\d+){0,2}", str(value)):
        return f"{value} is no number of minutes; write {_minutes(str(value))}"
    unit = {"min": " of minutes", "gb": " of GiB", "s": " of seconds"}.get(key.rpartition("_")[2])
    return f"must be a whole number{unit or ''} without quotes, such as 8, not {value}"


def _complaint(error: Any) -> str:
    # Of a location, what pydantic adds to the keys themselves is left out.
    where = [
        str(part)
        for part in error["loc"]
        if part != "[key]" and not str(part).startswith("function-")
    ]
    said = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] == "extra_forbidden":
        sections: dict[str, Any] = {"phases": Override, "container": Container}
        known = sections.get(where[0] if len(where) > 1 else "", Profile).model_fields
        close = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
        said = f"unknown key ({hint})"
    elif error["type"] == "string_type":
        said = (
            "must be one text, such as a,b"
            if isinstance(error["input"], (list, dict))
            else "must be text; put what YAML takes for a number or a date in quotes"
        )
    elif error["type"] == "int_type":
        said = _whole(where[-1], error["input"])
    elif error["type"] in ("dict_type", "model_type", "model_attributes_type"):
        said = "must be a mapping of keys, or left out"
    elif error["type"] == "tuple_type":
        said = "must be a list, such as [a, b]"
    return f"{'.'.join(where)}: {said}" if where else said
