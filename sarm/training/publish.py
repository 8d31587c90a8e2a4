"""Copy what was trained to where a config can name it, and never over anything else:
`replace_folder(source, target, "train_sarm")`.

A folder written so holds `train_sarm.json`, named by its job: the SHA-256 of the files that were
written there.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

from sarm.config import UserError
from sarm.records import json_text
from sarm.run import file_sha256


def refuse_foreign(target: Path, job: str) -> None:
    """Raises UserError where there is something at `target` but what `job` left there."""
    if not target.exists() and not target.is_symlink():
        return
    try:
        written = json.loads((target / f"{job}.json").read_text(encoding="utf-8"))
        found = {p.name: file_sha256(p) for p in target.iterdir() if p.name != f"{job}.json"}
    except (OSError, ValueError):
        written = found = None
    if target.is_symlink() or written is None or written != found:
        raise UserError(
            f"{job}.output={target} is there already and is not as {job} left it, so it is not"
            " replaced; name a new folder, or move that one away"
        )


def replace_folder(source: Path, target: Path, job: str) -> None:
    """Copy a folder in place of what `job` left there before, which stays whole until the copy
    is. Raises UserError where something else is there.
    """
    refuse_foreign(target, job)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    shutil.copytree(source, scratch)
    hashes = {path.name: file_sha256(path) for path in sorted(scratch.iterdir())}
    (scratch / f"{job}.json").write_text(json_text(hashes), encoding="utf-8")
    if target.exists():
        old = target.with_name(f"{scratch.name}.old")
        target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old)
    else:
        scratch.rename(target)
