"""Which one-line faults a module's tests let through: `make mutants PATHS=sarm/ppo/losses.py`.

mutmut makes the faults and runs for each the tests that reach its function, of the test files that
import the module. Every module is tried in a copy of the checkout under `outputs/mutants`; what was
killed there already is not tried again. Without paths: `--sample` faults of all of `COVERED`,
stratified by file. Files are tried side by side, those that take longest first, in `--jobs`
processes; `--known` runs no test and tells what is known.

A survivor is killed by a better test, or listed in `tests/mutants.yaml` by function and line with
the reason why it changes nothing. Ends with 1 where one survives that is not listed, a listed
line is no longer there, or a file could not be tried, as where its tests fail without a fault.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

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
    "reports/provenance.py",
    "reports/frames.py",
)
LEFT_OUT = ("permutation_kernel.py", "probe_kernels.py", "__init__.py")
"""Kernels run on a GPU."""
ON_GPU = ("x__counter_on_gpu__",)
"""Functions that call them."""

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
TELL = """
import json, sys
from mutmut.__main__ import SourceFileMutationData, get_diff_for_mutant, status_by_exit_code
path, *names = sys.argv[1:]
data = SourceFileMutationData(path=path)
data.load()
told = {name: [status_by_exit_code[data.exit_code_by_key[name]], ""] for name in names}
for name, one in told.items():
    if one[0] in ("survived", "no tests"):
        one[1] = get_diff_for_mutant(name, path=path)
print(json.dumps(told))
"""

ALIKE = (
    ('encoding="utf-8"', 'encoding="UTF-8"'),
    ('kind="stable"', 'kind="STABLE"'),  # numpy's sorts
)
"""What Python and numpy do not tell apart, wherever it stands."""

LIVED = (0, 5, 33)
"""mutmut's codes for survived and for no tests."""

T = TypeVar("T")


class NotTried(Exception):
    """Why mutmut could not try a file's faults."""


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
    """By mutmut's words: killed, survived, no tests, timeout ...; and `listed`, that is survived
    and listed as changing nothing.
    """
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
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--known", action="store_true", help="tell what is known, run no test")
    args = parser.parse_args()
    covered = covered_files()
    paths = args.paths or covered
    if missing := [path for path in paths if not (ROOT / path).is_file()]:
        sys.exit(
            f"error: {missing[0]} is no file of this checkout; give paths such as {covered[0]}"
        )
    names, failed = side_by_side(
        args.jobs, paths, lambda path: generated(args.work, path, args.mutmut)
    )
    drawn = names if args.paths else sampled(names, args.sample, args.seed)
    drawn = {path: [name for name in mine if not on_gpu(name)] for path, mine in drawn.items()}
    drawn = {path: mine for path, mine in drawn.items() if mine}
    children = shares({path: cost(path, len(mine)) for path, mine in drawn.items()}, args.jobs)
    free = Processes(args.jobs)

    def trial(path: str) -> Tried:
        folder = folder_of(args.work, path)
        if args.known:
            return told(folder, path, drawn[path], args.mutmut)
        with free.taken(children[path]):
            one = tried(folder, path, drawn[path], args.mutmut, children[path])
        print(row(path, one.counts), flush=True)
        return one

    found, stopped = side_by_side(args.jobs, children, trial)
    for path in sorted(found) if args.known else ():
        print(row(path, found[path].counts))
    print(row("all", sum((one.counts for one in found.values()), Counter())))
    failed |= stopped
    for path, why in sorted(failed.items()):
        print(f"error: {path} could not be tried: {why}")
    return judged(list(found.values())) or int(bool(failed))


def side_by_side(
    jobs: int, paths: Iterable[str], work: Callable[[str], T]
) -> tuple[dict[str, T], dict[str, NotTried]]:
    """What came of each, begun in order, and what could not be tried."""
    found: dict[str, T] = {}
    failed: dict[str, NotTried] = {}
    with ThreadPoolExecutor(jobs) as pool:
        begun = {path: pool.submit(work, path) for path in paths}
    for path, future in begun.items():
        try:
            found[path] = future.result()
        except NotTried as error:
            failed[path] = error
    return found, failed


def cost(path: str, faults: int) -> int:
    """About how long a file takes: all its tests run twice before the first fault, for which
    there may be as few as one.
    """
    return (faults + 10) * sum((ROOT / test).stat().st_size for test in tests_of(path))


def shares(costs: dict[str, int], jobs: int) -> dict[str, int]:
    """Processes for every file by what it costs, at least one, the costliest file first."""
    total = sum(costs.values())
    return {
        path: max(1, jobs * costs[path] // total)
        for path in sorted(costs, key=lambda path: -costs[path])
    }


class Processes:
    """So many at a time, given out in the order in which they were asked for."""

    def __init__(self, n: int) -> None:
        self._free = threading.Semaphore(n)
        self._turn = threading.Lock()

    @contextmanager
    def taken(self, n: int) -> Iterator[None]:
        with self._turn:
            for _ in range(n):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(n)


def covered_files() -> list[str]:
    return sorted(
        file.relative_to(ROOT).as_posix()
        for pattern in COVERED
        for file in ROOT.glob(pattern)
        if file.name not in LEFT_OUT
    )


@cache
def files_of_checkout() -> list[str]:
    """What git does not ignore; of an unpacked archive, everything but caches and outputs."""
    if (ROOT / ".git").exists():
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
    else:
        found = (file.relative_to(ROOT) for file in ROOT.rglob("*"))
        passed = ("outputs", "__pycache__", ".venv", ".pytest_cache", ".hypothesis")
        names = [file.as_posix() for file in found if not set(passed) & set(file.parts)]
    return [name for name in names if (ROOT / name).is_file()]


def folder_of(work: Path, path: str) -> Path:
    return work / path.removesuffix(".py").replace("/", ".")


def prepared(work: Path, path: str) -> Path:
    """A copy of the checkout as it is, set up for faults in this file."""
    folder = folder_of(work, path)
    files = files_of_checkout()
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


@cache
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
    """What a Python with mutmut prints in a copy."""
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
        raise NotTried(f"mutmut failed in {folder}: {done.stdout[-3000:]}")
    return done.stdout


def generated(work: Path, path: str, mutmut: Path) -> list[str]:
    """The names of the file's faults, made in a copy of the checkout."""
    folder = prepared(work, path)
    python(folder, mutmut, "-c", GENERATE)
    return sorted(known(folder, path))


def known(folder: Path, path: str) -> dict[str, int | None]:
    """The exit code of the tests under every fault; None where it was not tried."""
    meta = folder / "mutants" / f"{path}.meta"
    codes: dict[str, int | None] = json.loads(meta.read_text())["exit_code_by_key"]
    return codes


def on_gpu(name: str) -> bool:
    return any(function in name for function in ON_GPU)


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


def tried(folder: Path, path: str, names: Sequence[str], mutmut: Path, children: int) -> Tried:
    """Run what was not run yet, and again what survived: all tests of the files that reach it."""
    entry = [str(mutmut.resolve() / "bin" / "mutmut"), "run", "--max-children", str(children)]
    codes = known(folder, path)
    if left := [name for name in names if codes[name] is None]:
        python(folder, mutmut, *entry, *(() if len(left) == len(codes) else left))
        codes = known(folder, path)
    if lived := [name for name in names if codes[name] in LIVED]:
        widen(folder / "mutants" / "mutmut-stats.json", lived)
        python(folder, mutmut, *entry, *lived)
    return told(folder, path, names, mutmut)


def widen(stats: Path, names: Sequence[str]) -> None:
    """To the functions of these faults give all tests of the files that hold one of theirs. A
    function that a fixture calls is otherwise tried against the first test that asks for it.
    """
    tree = json.loads(stats.read_text())
    reached = tree["tests_by_mangled_function_name"]
    for function in {name.partition("__mutmut_")[0] for name in names}:
        files = {test.partition("::")[0] for test in reached.get(function, ())}
        mine = [test for test in tree["duration_by_test"] if test.partition("::")[0] in files]
        if mine:
            reached[function] = mine
    stats.write_text(json.dumps(tree))


def told(folder: Path, path: str, names: Sequence[str], mutmut: Path) -> Tried:
    """What is known of these faults."""
    said = python(folder, mutmut, "-c", TELL, path, *names)
    found: dict[str, tuple[str, str]] = json.loads(said.splitlines()[-1])
    reasons, counts, survivors = listed(), Counter[str](), []
    for name, (status, shown) in found.items():
        one = survivor(name, shown) if shown else None
        alike = one and (one in reasons or any(one.becomes == one.line.replace(*p) for p in ALIKE))
        counts["listed" if alike else status] += 1
        if one and not alike:
            survivors.append(one)
    return Tried(path, counts, survivors)


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
    survivors = [s for one in found for s in one.survivors]
    for s in survivors:
        print(f"survived: {s.function}\n  - {s.line}\n  + {s.becomes}")
    stale = [s for s in listed() if not stands(s)]
    for s in stale:
        print(f"error: {LISTED.name} lists a line that {s.function} no longer has: {s.line}")
    return 1 if survivors or stale else 0


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
    """The kill rate of the faults that change something, with its 95 % interval by Wilson."""
    n = sum(counts.values()) - counts["not checked"] - counts["listed"]
    if not n:
        return f"{path:40} none tried"
    lived = counts["survived"] + counts["no tests"]
    rate, z = (n - lived) / n, 1.96
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    told = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    return f"{path:40} {rate:6.1%} ({centre - half:.1%} to {centre + half:.1%}) of {n}: {told}"


if __name__ == "__main__":
    sys.exit(main())
