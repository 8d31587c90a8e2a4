"""Configs with keys dropped, doubled, renamed and mistyped: a config or one sentence, never a
traceback. 200 of them among the fast tests, 10,000 with `-m slow`.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from sarm.config import PHASES, ROOT, Config, UserError, config_yaml, load_config
from slurm.dag import Node, tasks

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**70,
    0.5,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "\ud7ff\x07",
    [],
    [1],
    [None],
    ["x", "x"],
    {},
    {"a": 1},
    {1: 2},
    [[]],
    {"policy": {}},
    "2020-01-01",
)
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in items:
        found.append((tree, key))
        if isinstance(value, (dict, list)):
            found += places(value)
    return found


def spoiled(tree: Any, rng: random.Random) -> str:
    """The YAML of a tree after one to three accidents."""
    tree = copy.deepcopy(tree)
    double = ""
    for _ in range(rng.randint(1, 3)):
        options = places(tree)
        if not options:
            break
        inside, key = rng.choice(options)
        accident = rng.choice(("drop", "value", "value", "rename", "add", "double"))
        if accident == "drop":
            del inside[key]
        elif accident == "value":
            inside[key] = copy.deepcopy(rng.choice(VALUES))
        elif isinstance(inside, dict) and accident == "rename":
            inside[rng.choice((f"{key}s", str(key).upper(), 7, ""))] = inside.pop(key)
        elif isinstance(inside, dict) and accident == "add":
            inside["zz"] = copy.deepcopy(rng.choice(VALUES))
        else:
            double = f"{rng.choice([k for k in tree])}: {{}}\n" if tree else ""
    return yaml.safe_dump(tree, allow_unicode=True) + double


def look(seed: int, tmp_path: Path) -> bool:
    """Whether the spoiled config was still one, of which a run can be planned and stored."""
    rng = random.Random(seed)
    tree = yaml.safe_load(rng.choice(SHIPPED).read_text(encoding="utf-8"))
    file = tmp_path / "c.yaml"
    file.write_text(spoiled(tree, rng), encoding="utf-8")
    try:
        config = load_config(file)
    except UserError as error:
        assert str(error).startswith(f"config {file}") and "\n" not in str(error)
        return False
    assert isinstance(config, Config)
    graph = tasks(config)
    known: set[Node] = set()
    for task in graph:
        assert set(task.needs) <= known and task.node not in known
        known.add(task.node)
    assert {node.phase for node in known} >= set(PHASES) - {"ppo", "check_sarm"}
    file.write_text(config_yaml(config), encoding="utf-8")
    assert load_config(file, stored=True) == config
    return True


def test_a_spoiled_config_is_a_sentence(tmp_path: Path) -> None:
    fine = sum(look(seed, tmp_path) for seed in range(200))
    assert 5 <= fine < 100, "some accidents change nothing that matters, most do"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_spoiled_configs_are_sentences(part: int, tmp_path: Path) -> None:
    for seed in range(1000 * part, 1000 * (part + 1)):
        look(seed, tmp_path)
