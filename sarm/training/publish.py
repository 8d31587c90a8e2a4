"""Copy what was trained to where a config can name it: `replace_folder(source, target)`."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path


def replace_folder(source: Path, target: Path) -> None:
    """Copy a folder in place of what was there, which stays whole until the copy is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    shutil.copytree(source, scratch)
    if target.exists():
        old = target.with_name(f"{scratch.name}.old")
        target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old)
    else:
        scratch.rename(target)
