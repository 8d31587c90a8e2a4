"""A config read from YAML with overrides, and what is wrong with one in a sentence:
`load_config(path, ["ppo.steps=20"])`.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel

from sarm.config.base import STORED, UserError
from sarm.config.schema import Config

RENAMED = {
    "select.redraws": "select.stability_repeats",
    "ppo.calibration_prompts": "calibrate.prompts",
    "verdict.bootstrap": "steer.bootstrap",
    "verdict.evasion_share": "verdict.monitor_share",
    "verdict.null_bound": "verdict.delta",
}
"""Keys by an earlier name, which an error points out, and which the config of a stored run may
have; so too the values below.
"""
RENAMED_VALUES = {"ppo.penalty.kind": {"count": "threshold"}}
REMOVED = ("hardware",)
"""Keys that nothing reads any more; the config of a stored run may have them."""


def under_todays_names(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored run's config with keys and values under the names they have now; `tree` stays."""
    tree = copy.deepcopy(tree)
    for old, new in RENAMED.items():
        section, leaf = _section_of(tree, old), old.rpartition(".")[2]
        if section is not None and leaf in section:
            value = section.pop(leaf)
            target = tree
            for key in new.split(".")[:-1]:
                target = target.setdefault(key, {})
            target.setdefault(new.rpartition(".")[2], value)
    for dotted, values in RENAMED_VALUES.items():
        section, leaf = _section_of(tree, dotted), dotted.rpartition(".")[2]
        if section is not None and section.get(leaf) in values:
            section[leaf] = values[section[leaf]]
    return {key: value for key, value in tree.items() if key not in REMOVED}


def _section_of(tree: Any, dotted: str) -> dict[str, Any] | None:
    for key in dotted.split(".")[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as people write it: 1e-6 is a number, which YAML 1.1 denies, and a key given twice is
    an error. By libyaml where PyYAML has it: a config takes a tenth of the time.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes the strings that `Loader` would read as numbers."""


for _class in (Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def config_yaml(config: Config) -> str:
    """The whole config as YAML that `load_config` reads back to the same."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


def load_config(path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> Config:
    """Read a YAML config and apply `dotted.key=value` overrides, values being YAML. A `stored` one
    is a run's own, whose keys may have names of an earlier version.

    Raises UserError naming the file and every key that is unknown, of a wrong type or out of range.
    """
    tree = stored_tree(path)
    if stored:
        tree = under_todays_names(tree)
    for override in overrides:
        set_key(tree, override)
    return parse_config(tree, str(path), stored=stored)


def stored_tree(path: str | Path) -> dict[str, Any]:
    """A YAML config as it stands, unchecked. Raises UserError where it is none."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist; the shipped ones are in configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"config {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path} is empty or not a mapping of keys")
    return tree


def parse_config(tree: dict[str, Any], where: str, *, stored: bool = False) -> Config:
    """Validate a tree of plain values; `where` names it in errors. Raises UserError."""
    try:
        return Config.model_validate(tree, context=STORED if stored else None)
    except pydantic.ValidationError as error:
        raise UserError(
            f"config {where}: " + "; ".join(_complaint(e) for e in error.errors())
        ) from None


def set_key(tree: dict[str, Any], override: str) -> None:
    """Apply one `dotted.key=value` to a tree in place. Raises UserError where it has no `=`."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r} is not of the form key=value, such as ppo.steps=20")
    *parents, leaf = dotted.split(".")
    for key in parents:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {key} is a value, not a section")
        tree = child
    try:
        tree[leaf] = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(
            f"override {override!r} is not valid YAML: {' '.join(str(error).split())}"
        ) from None


def _complaint(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "extra_forbidden":
        if where in RENAMED:
            return f"unknown key {where} (it is now {RENAMED[where]})"
        known = _known_keys(error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {where} ({hint})"
    value = error.get("input")
    if isinstance(value, str) and value in RENAMED_VALUES.get(where, {}):
        return f"{where}: {value!r} is now {RENAMED_VALUES[where][value]!r}"
    shown = (
        "" if isinstance(value, (dict, list)) or error["type"] == "missing" else f" (got {value!r})"
    )
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where} must be a finite number{shown}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{shown}"


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    """The keys of the section at `loc`; empty where it is none."""
    section: Any = Config
    for part in loc:
        if get_origin(section) is dict:
            section = get_args(section)[1]
        elif _is_model(section):
            field = section.model_fields.get(str(part))
            section = field.annotation if field else None
        # The section of `LoraConfig | None` is LoraConfig.
        section = next(
            (
                option
                for option in get_args(section)
                if get_origin(section) is not dict and _is_model(option)
            ),
            section,
        )
    return sorted(section.model_fields) if _is_model(section) else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
