"""What each phase reads of a config: `changed(phase, made_with, config)` names what of that has
another value than a unit was made with.

A phase depends on what it reads and on nothing else. Its manifest keeps those values (`values`); a
key that a later version adds is none of them, and counts as unchanged while it has its default.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

from pydantic import BaseModel

from sarm.config.reading import under_todays_names
from sarm.config.schema import Config

READS: dict[str, tuple[str, ...]] = {
    "fetch": ("policy", "sarm", "evaluate.judge", "evaluate.refusal_detector", "data"),
    "check_sarm": ("sarm", "data", "check_sarm"),
    "encode": ("sarm", "data", "encode"),
    "probe": (
        "seed",
        "sarm",
        "data",
        "encode.shards",
        "probe",
        "select.effect",
        "select.fdr",
        "select.max_density",
        "select.sources",
    ),
    "select": (
        "seed",
        "sarm",
        "data",
        "encode.shards",
        "probe",
        "select",
        "ppo.arms",
        "ppo.penalty",
        "sweep.tau_quantile",
    ),
    "steer": ("seed", "data", "encode.shards", "steer.file", "steer.bootstrap"),
    "cards": ("seed", "policy", "sarm", "data", "encode.shards", "cards"),
    "calibrate": (
        "seed",
        "policy",
        "sarm",
        "data",
        "responses",
        "calibrate",
        "select.monitors",
        "select.monitor_max_cosine",
        "select.monitor_max_correlation",
        "ppo.arms",
        "ppo.seeds",
        "ppo.penalty",
        "ppo.max_prompt_tokens",
        "ppo.max_new_tokens",
        "ppo.temperature",
        "evaluate.prompts",
        "evaluate.samples",
        "verdict.max_unended",
        "verdict.min_kappa",
    ),
    "ppo": (
        "policy",
        "sarm",
        "data",
        "responses",
        "ppo",
        "!ppo.arms",
        "!ppo.seeds",
        "select.unconfirmed",
    ),
    "evaluate": (
        "seed",
        "policy",
        "sarm",
        "data",
        "ppo.penalty",
        "ppo.max_prompt_tokens",
        "ppo.micro_batch_tokens",
        "evaluate",
        "!evaluate.arms",
        "responses",
        "encode.extra_ranks",
        "steer.policy",
        "steer.bootstrap",
    ),
    "report": ("", "!serve"),
    "export": ("name", "sarm", "data", "encode.shards"),
    "train_refusals": ("name", "data", "train_refusals"),
    "train_sarm": (
        "name",
        "seed",
        "policy",
        "sarm.dtype",
        "sarm.tokens_per_batch",
        "data",
        "train_sarm",
    ),
}
"""Keys and sections by phase, but those with `!`; the empty name is all. What only says which units
there are (`ppo.arms`, `ppo.seeds`, `evaluate.arms`, `sweep`) is no part of one unit. Nor is what a
phase only looks at: the rule and the plan whose hash PPO's manifest notes (`rule_sha256`), what is
refused before training (`sarm/evaluation/early.py`), what a logger shows (`report.texts`). A change
of these makes nothing be done again; `tests/jobs/test_reads.py` names the functions that read them.
"""

MISSING: Any = object()


@functools.cache  # asked of every key, for every manifest that is read or written
def is_read(phase: str, key: str) -> bool:
    """Whether a phase reads a dotted key, or something within it."""
    entries = READS[phase]
    if any(_within(key, entry[1:]) for entry in entries if entry.startswith("!")):
        return False
    return any(
        _within(key, entry) or _within(entry, key) for entry in entries if not entry.startswith("!")
    )


def values(phase: str, config: Config) -> dict[str, Any]:
    """What the phase reads, as a tree of plain values."""
    return _picked(config.model_dump(mode="json"), phase, "")


def values_sha256(phase: str, config: Config) -> str:
    """Hash of what the phase reads, defaults left out: a key that a later version adds changes
    none.
    """
    tree = _picked(config.model_dump(mode="json", exclude_defaults=True), phase, "")
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def changed(phase: str, made_with: dict[str, Any], config: Config) -> list[str]:
    """The dotted keys whose values a phase reads and that differ from those that it was made with:
    `values` of some version, or a whole config as stored.
    """
    found = _differing(under_todays_names(made_with), config, MISSING, "")
    return sorted(key for key in found if is_read(phase, key))


def _within(key: str, section: str) -> bool:
    return section in ("", key) or key.startswith(section + ".")


def _picked(tree: dict[str, Any], phase: str, where: str) -> dict[str, Any]:
    found = {}
    for name, value in tree.items():
        key = f"{where}.{name}" if where else name
        if is_read(phase, key):
            picked = _picked(value, phase, key) if isinstance(value, dict) else value
            if picked != {} or value == {}:
                found[name] = picked
    return found


def _differing(old: Any, new: Any, standard: Any, where: str) -> list[str]:
    """`old` is a plain value or MISSING; `new` is of today's config, `standard` its default."""
    if isinstance(new, BaseModel) and (isinstance(old, dict) or _same_kind(old, new, standard)):
        given = old if isinstance(old, dict) else {}
        found = []
        for name, field in type(new).model_fields.items():
            # Only compared with, so not copied as pydantic's get_default would.
            default = (
                getattr(standard, name)
                if isinstance(standard, type(new))
                else field.default_factory()  # type: ignore[call-arg]
                if field.default_factory
                else field.default
            )
            key = f"{where}.{name}" if where else name
            found += _differing(given.get(name, MISSING), getattr(new, name), default, key)
        return found
    if isinstance(new, dict) and isinstance(old, dict):
        return [
            key
            for name in old.keys() | new.keys()
            for key in (
                _differing(old[name], new[name], MISSING, f"{where}.{name}")
                if name in old and name in new
                else [f"{where}.{name}"]
            )
        ]
    if old is MISSING:
        return [] if new == standard else [where]
    return [] if _plain(new) == old else [where]


def _same_kind(old: Any, new: BaseModel, standard: Any) -> bool:
    """A section that the earlier version did not have, and that has a default to compare with."""
    return old is MISSING and isinstance(standard, type(new))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
