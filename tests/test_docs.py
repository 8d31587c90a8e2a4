"""Every command in the docs runs, or runs dry where hardware, a network or an hour forbid; every
link and path in them is there.

Commands are the lines of blocks fenced as bash. `make` is asked what it would do, and what it says
is held against the programs: each names a module whose parser knows its arguments, and configs that
can be read.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import yaml

from jobs.__main__ import main as jobs_main
from reports.sections import SECTIONS
from sarm.config import PARTS, PHASES, ROOT, Config, load_config, parse_config
from tests.runs import evaluated_run

PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "artifacts").glob("*/README.md")]
)


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, indented ones too."""
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("```"):
            inside = not inside
            if inside:
                found.append((line.strip()[3:], []))
        elif inside:
            found[-1][1].append(line)
    return [(language, textwrap.dedent("\n".join(lines))) for language, lines in found]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line fenced as bash, comments cut off."""
    lines = (
        (page, line.split("#")[0].strip())
        for page in PAGES
        for language, text in fences(page)
        if language == "bash"
        for line in text.splitlines()
    )
    return sorted({(page.relative_to(ROOT).as_posix(), line) for page, line in lines if line})


COMMANDS = commands()


def test_commands_are_found_and_none_hides_in_another_block():
    assert len(COMMANDS) > 12
    for page in PAGES:
        for language, text in fences(page):
            assert language == "bash" or not re.search(
                r"^ *(make|python3?) ", text, re.MULTILINE
            ), f"{page}: fence commands as bash"


@functools.cache  # pages share commands
def ended(module: str, *arguments: str) -> tuple[int, str]:
    """The exit code of `python -m MODULE` and what it says, without a Python of its own."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # that the module has been imported before
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit) as raised:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    return raised.value.code or 0, said.getvalue()


@functools.cache
def recipe(command: str) -> list[str]:
    """The commands that `make` would run, without those that make an environment."""
    done = subprocess.run(
        [*shlex.split(command), "-n", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        line
        for line in done.stdout.splitlines()
        if re.search(r"python\S* -m (jobs|slurm|reports|serving)\b", line)
    ]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_one_that_its_program_takes(page, command):
    """`--help` after the arguments: the parser sees all of them, a phase or flag that is none is
    refused, and nothing runs.
    """
    words = shlex.split(command)
    while "=" in words[0]:
        words = words[1:]
    lines = recipe(shlex.join(words)) if words[0] == "make" else [shlex.join(words)]
    for line in lines:
        if words[0] not in ("make", "python", "python3"):
            continue
        at = re.search(r"-m (\S+)(.*)", line)
        if at is None:
            assert (ROOT / shlex.split(line)[1]).is_file(), line
            continue
        arguments = shlex.split(at.group(2))
        code, said = ended(at.group(1), *arguments, "--help")
        assert code == 0 and "usage:" in said, said
        flags = [word for word in arguments if word.startswith("--")]
        assert all(flag in said for flag in flags), line
        if at.group(1) == "jobs":
            assert arguments[0] in (*PHASES, "train_sarm", "train_refusals", "export"), line
        for config in re.findall(r"configs/\S+\.yaml", line):
            load_config(ROOT / config)


@pytest.mark.parametrize(
    "command", sorted({command for _, command in COMMANDS if "DRY_RUN=1" in command})
)
def test_what_can_be_looked_at_is_really_looked_at(command, tmp_path):
    command = re.sub(
        r"CLUSTER=mysite", "CLUSTER=generic", re.sub(r"RUN=\S+", f"RUN={tmp_path}/run", command)
    )
    done = subprocess.run(
        shlex.split(command),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0 and "#SBATCH" in done.stdout, done.stdout + done.stderr


def test_reports_are_written_again_and_compared_as_the_docs_say(tmp_path):
    for name in ("a", "b"):
        run = evaluated_run(tmp_path / name)
        assert jobs_main(["report", "--run", str(run.path)]) == 0
    command = next(command for _, command in COMMANDS if command.startswith("make compare"))
    (line,) = recipe(command.replace("outputs/", f"{tmp_path}/"))
    words = shlex.split(line.replace("outputs/compare", f"{tmp_path}/out"))
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "compare.html").is_file(), done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    made = set(re.findall(r"[Nn]ew file `([^`]+)`", text))
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for name in re.findall(
        r"`((?:sarm|jobs|slurm|reports|serving|configs|tests|docs|benchmarks|containers)/[\w./-]+\.(?:py|yaml|md|txt|sbatch|def))`",
        text,
    ):
        assert (ROOT / name).exists() or "NAME" in name or name in made, name


@pytest.mark.parametrize(
    ("page", "block"),
    [(page.name, text) for page in PAGES for language, text in fences(page) if language == "yaml"],
)
def test_yaml_in_the_docs_is_valid_config(page, block):
    """A block is a whole `data` section, one source, or sections of a config: whichever it is,
    nothing in it is unknown.
    """
    tree = yaml.safe_load(block)
    if "data" not in tree and all(
        isinstance(value, dict) and "format" in value for value in tree.values()
    ):
        tree = {"data": {"sources": tree}}
    whole = load_config(ROOT / "configs" / "smollm2.yaml").model_dump(mode="json")
    unknown = set(tree) - set(Config.model_fields)
    assert not unknown, unknown
    parse_config({**whole, **{key: value for key, value in tree.items()}}, page)


def test_the_example_report_has_no_section_that_is_gone():
    report = (ROOT / "docs" / "example_report.txt").read_text(encoding="utf-8")
    further = re.findall(r"^(.+)\n-{3,}$", report[report.index("\nVERDICT\n") :], re.MULTILINE)
    assert (
        len(further) > 8
        and [section.heading for section in SECTIONS if section.heading in further] == further
    )
    # from a clean checkout
    assert "every phase is done" in report and "+\n" not in report.partition("\nPROVENANCE\n")[2]


def test_the_data_page_names_every_part_and_the_readme_every_phase():
    assert all(f"`{part}`" in (ROOT / "docs/data.md").read_text() for part in PARTS)
    readme = (ROOT / "README.md").read_text()
    assert all(re.search(rf"-> {phase}\b", readme) for phase in PHASES)
