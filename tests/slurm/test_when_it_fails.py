"""docs/when-it-fails.md against the code: every failure that slurm/ and jobs/ can name is in it,
and what it quotes is said somewhere.

A message is read from the source as a template, `…` where a value goes; the page quotes one in the
first column of a table, `…` for what it leaves out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sarm.config import PHASES, ROOT
from slurm.profile import Profile
from slurm.script import script

PAGE = ROOT / "docs" / "when-it-fails.md"
HOLE = "…"
RAISED = ("UserError", "Refused", "Unreachable", "ValueError")
SLURMS_OWN = r"[A-Z_]{4,}|[A-Z][a-z]+[A-Z]\w*…?|[A-Z][a-z]+|oom|QOS…"
"""States of jobs and reasons to wait, which the page takes over from Slurm."""


def template(node: ast.expr) -> str:
    """A string as it is written, `…` for each value in it."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(template, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left) + template(right)
    return HOLE


def called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "id", None) or getattr(node.func, "attr", "")


def failures(path: Path) -> Iterator[str]:
    """What a module raises, finds wrong, says of a unit that is not done, or of a rank's end."""
    for node in ast.walk(ast.parse(path.read_text())):
        name = called(node)
        if isinstance(node, ast.Call) and name in RAISED and node.args:
            yield template(node.args[0])
        elif isinstance(node, ast.Call) and name == "Finding":
            if template(node.args[0]) == "wrong":
                yield template(node.args[2])
        elif isinstance(node, ast.Call) and name == "Unit" and len(node.args) == 3:
            if template(node.args[1]) in ("failed", "not run"):
                yield template(node.args[2])
        elif isinstance(node, ast.Call) and name == "append" and path.stem == "state":
            yield template(node.args[0])
        elif isinstance(node, ast.Return) and path.stem in ("ranks", "profile_file", "submit"):
            said = template(node.value) if node.value else ""
            if HOLE in said and re.search("; |must be", said):
                yield said


def scripts_failures() -> set[str]:
    """What batch scripts say on their way out, values that differ by profile or run apart."""
    texts = [script(Profile(description="x"), phase, "x") for phase in PHASES]
    folder = 'f"error: {folder} is not yours'
    assert folder in (ROOT / "slurm" / "script.py").read_text()
    found = {said for text in texts for said in re.findall(r'echo "([^"]*)" >&2', text)}
    return {re.sub(r"\d+|\$\w+", HOLE, said) for said in found} | {f"{HOLE} is not yours"}


MODULES = sorted([*(ROOT / "slurm").glob("*.py"), *(ROOT / "jobs").glob("*.py")])
MESSAGES = sorted(
    {
        (said, path.relative_to(ROOT).as_posix())
        for path in MODULES
        for said in failures(path)
        if len(re.findall(r"\w", said)) >= 8
    }
    | {(said, "slurm/script.py") for said in scripts_failures()}
)


def symptoms() -> list[str]:
    """What the page quotes in the first column of its tables."""
    lines = PAGE.read_text().splitlines()
    heads = [at - 1 for at, line in enumerate(lines) if line.startswith("|---")]
    rows = [s for at, s in enumerate(lines) if s.startswith("| ") and at not in heads]
    cells = [re.split(r"(?<!\\)\|", row)[1] for row in rows]
    return [quoted for cell in cells for quoted in re.findall(r"`([^`]+)`", cell)]


def says(symptom: str, message: str) -> bool:
    return re.search(".*".join(map(re.escape, symptom.split(HOLE))), message, re.DOTALL) is not None


def test_messages_and_symptoms_are_found() -> None:
    assert len(MESSAGES) > 70 and len(symptoms()) > 70
    said = {message for message, _ in MESSAGES}
    assert "… belongs to another user (uid …); use a RUN of your own" in said
    assert "requeued more than … times, given up" in said
    assert not says("no … here", "here no") and says("a … c", "x a b c y")


@pytest.mark.parametrize(("message", "module"), MESSAGES)
def test_a_failure_that_can_be_named_is_in_the_page(message: str, module: str) -> None:
    long_enough = [s for s in symptoms() if len(re.findall(r"\w", s)) >= 8]
    assert any(says(symptom, message) for symptom in long_enough), (
        f"docs/when-it-fails.md quotes nothing of what {module} says: {message}"
    )


def test_what_the_page_quotes_is_said_somewhere() -> None:
    texts = []
    for folder in ("slurm", "jobs", "sarm"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.walk(ast.parse(path.read_text()))
            texts += [template(node) for node in tree if isinstance(node, ast.expr)]
    known = {*texts, *scripts_failures()}
    unsaid = [
        symptom
        for symptom in symptoms()
        if not re.fullmatch(SLURMS_OWN, symptom) and not any(says(symptom, text) for text in known)
    ]
    assert not unsaid
