"""Which one-line faults a module's tests let through: `make mutants PATHS=sarm/ppo/losses.py`.

mutmut makes the faults and runs for each the tests that reach its function, of the test files that
import the module. Every module is tried in a copy of the checkout under `outputs/mutants`; what is
known there already is not tried again. Without paths: `--sample` faults of all of `COVERED`,
stratified by file.

A survivor is killed by a better test, or listed in `tests/mutants.yaml` by function and line with
the reason why it changes nothing. Ends with 1 where one survives that is not listed, or a listed
line is no longer there.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
LISTED = ROOT / "tests" / "mutants.yaml"
COVERED = (
    "sarm/ppo/*.py",
    "sarm/probing/*.py",
    "sarm/evaluation/*.py",
    "sarm/data/*.py",
    "sarm/reward_model/interventions.py",
    "sarm/run.py",
    "slurm/plan.py",
    "slurm/status.py",
    "slurm/submit.py",
    "reports/numbers.py",
    "reports/figures.py",
    "reports/frames.py",
)
LEFT_OUT = ("permutation_kernel.py", "probe_kernels.py", "__init__.py")
"""Kernels run on a GPU."""

PACKAGES = ("sarm", "jobs", "slurm", "reports", "serving")
GENERATE = """
import os
from pathlib import Path
from mutmut.__main__ import (
    copy_also_copy_files, copy_src_dir, create_mutants, set_mutant_under_test, setup_source_paths,
)
set_mutant_under_test("mutant_generation")
os.makedirs("mutants", exist_ok=True)
copy_src_dir(); copy_also_copy_files(); setup_source_paths(); create_mutants(1)
"""


class Survivor(NamedTuple):
    """A fault that no test noticed."""

    function: str
    line: str
    """As it stands."""
    becomes: str


class Tried(NamedTuple):
    """What came of a file's faults."""

    path: str
    counts: Counter[str]
    """By mutmut's words: killed, survived, no tests, timeout ..."""
    survivors: list[Survivor]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", help="files to try in full")
    parser.add_argument("--sample", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "mutants")
    parser.add_argument("--mutmut", type=Path, required=True, help="the folder it is installed in")
    args = parser.parse_args()
    covered = covered_files()
    paths = args.paths or covered
    if missing := [path for path in paths if not (ROOT / path).is_file()]:
        sys.exit(
            f"error: {missing[0]} is no file of this checkout; give paths such as {covered[0]}"
        )
    folders = {path: prepared(args.work, path) for path in paths}
    names = {path: generated(folders[path], path, args.mutmut) for path in paths}
    drawn = names if args.paths else sampled(names, args.sample, args.seed)
    found = []
    for path in paths:
        if drawn[path]:
            found.append(tried(folders[path], path, drawn[path], args.mutmut))
            print(row(path, found[-1].counts), flush=True)
    print(row("all", sum((one.counts for one in found), Counter())))
    return judged(found)


def covered_files() -> list[str]:
    return sorted(
        file.relative_to(ROOT).as_posix()
        for pattern in COVERED
        for file in ROOT.glob(pattern)
        if file.name not in LEFT_OUT
    )


def prepared(work: Path, path: str) -> Path:
    """A copy of the checkout as it is, set up for faults in this file."""
    folder = work / path.removesuffix(".py").replace("/", ".")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    files = [name for name in tracked if name and (ROOT / name).is_file()]
    for name in files:
        source, target = ROOT / name, folder / name
        if name == "pyproject.toml":
            continue
        if not target.is_file() or source.read_bytes() != target.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    others = {name.partition("/")[0] for name in files} - {*PACKAGES, "tests", "pyproject.toml"}
    settings = {
        "source_paths": list(PACKAGES),
        "only_mutate": [path],
        "also_copy": sorted(others),
        "process_isolation": "forkserver",  # torch is not safe to fork after it has run
        "pytest_add_cli_args": ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"],
        "pytest_add_cli_args_test_selection": tests_of(path),
        "use_setproctitle": False,
        "use_git_change_detection": False,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(
        "\n".join([text, "[tool.mutmut]", *lines, ""]), encoding="utf-8"
    )
    return folder


def tests_of(path: str) -> list[str]:
    """The test files that import the module: of the folder that mirrors its own where there are
    such, otherwise of all; where none does, that folder's, which reach it through others.
    """
    module = path.removesuffix(".py").replace("/", ".")
    mirrored = ROOT / "tests" / Path(path).parent.as_posix().removeprefix("sarm").lstrip("/")
    files = [
        file
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "cluster" not in file.parts and module in imported(file)
    ]
    near = [file for file in files if file.parent == mirrored]
    chosen = near or files or sorted(mirrored.glob("test_*.py"))
    return [file.relative_to(ROOT).as_posix() for file in chosen]


@cache
def imported(file: Path) -> set[str]:
    """The modules that a file names in its imports, names taken from them as well."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def python(folder: Path, mutmut: Path, *words: str) -> str:
    """What a Python with mutmut prints in a copy, one test process a core."""
    paths = os.pathsep.join([str(mutmut.resolve()), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"error: mutmut failed in {folder}: {done.stdout[-3000:]}")
    return done.stdout


def generated(folder: Path, path: str, mutmut: Path) -> list[str]:
    """The names of the file's faults."""
    python(folder, mutmut, "-c", GENERATE)
    return sorted(known(folder, path))


def known(folder: Path, path: str) -> dict[str, int | None]:
    """The exit code of the tests under every fault; None where it was not tried."""
    meta = folder / "mutants" / f"{path}.meta"
    codes: dict[str, int | None] = json.loads(meta.read_text())["exit_code_by_key"]
    return codes


def sampled(names: dict[str, list[str]], size: int, seed: int) -> dict[str, list[str]]:
    """About `size` of all faults, of every file its share and at least one."""
    total = sum(map(len, names.values()))
    draw = random.Random(seed)
    return {
        path: sorted(draw.sample(mine, min(len(mine), max(1, round(size * len(mine) / total)))))
        if mine
        else []
        for path, mine in names.items()
    }


def tried(folder: Path, path: str, names: Sequence[str], mutmut: Path) -> Tried:
    """Run what was not run yet."""
    entry = str(mutmut.resolve() / "bin" / "mutmut")
    codes = known(folder, path)
    if left := [name for name in names if codes[name] is None]:
        whole = len(left) == len(codes)
        python(folder, mutmut, entry, "run", *(() if whole else left))
    said = python(folder, mutmut, entry, "results", "--all", "true")
    status = dict(re.findall(r"^ {4}(\S+): (.+)$", said, re.MULTILINE))
    survivors = [
        survivor(name, python(folder, mutmut, entry, "show", name))
        for name in names
        if status[name] in ("survived", "no tests")
    ]
    return Tried(path, Counter(status[name] for name in names), survivors)


def survivor(name: str, shown: str) -> Survivor:
    """From mutmut's name and diff of a fault."""
    module, _, mangled = name.partition("__mutmut_")[0].rpartition(".")
    function = mangled.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    sides: dict[str, list[str]] = {"-": [], "+": []}
    for line in shown.splitlines():
        if line[:1] in sides and not line.startswith(("---", "+++")):
            sides[line[0]].append(line[1:].strip())
    return Survivor(f"{module}.{function}", *(" ".join(sides[side]) for side in "-+"))


def judged(found: Sequence[Tried]) -> int:
    """Prints what is wrong; the exit code."""
    reasons = listed()
    unlisted = [s for one in found for s in one.survivors if s not in reasons]
    for s in unlisted:
        print(f"survived: {s.function}\n  - {s.line}\n  + {s.becomes}")
    stale = [s for s in reasons if not stands(s)]
    for s in stale:
        print(f"error: {LISTED.name} lists a line that {s.function} no longer has: {s.line}")
    return 1 if unlisted or stale else 0


def listed() -> dict[Survivor, str]:
    """Why each fault of `tests/mutants.yaml` changes nothing."""
    entries = yaml.safe_load(LISTED.read_text(encoding="utf-8")) or []
    return {Survivor(e["function"], e["line"], e["becomes"]): e["why"] for e in entries}


def stands(entry: Survivor) -> bool:
    """Whether the listed line is still in its module."""
    parts = entry.function.split(".")
    for n in range(len(parts) - 1, 0, -1):
        file = ROOT.joinpath(*parts[:n]).with_suffix(".py")
        if file.is_file():
            return entry.line in " ".join(file.read_text(encoding="utf-8").split())
    return False


def row(path: str, counts: Counter[str]) -> str:
    """The kill rate with its 95 % interval by Wilson."""
    n = sum(counts.values())
    lived = counts["survived"] + counts["no tests"]
    rate, z = (n - lived) / n, 1.96
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    told = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    return f"{path:40} {rate:6.1%} ({centre - half:.1%} to {centre + half:.1%}) of {n}: {told}"


if __name__ == "__main__":
    sys.exit(main())
