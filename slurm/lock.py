"""A lock that is a folder made by mkdir, which is atomic on every file system clusters use; never
flock.

`with held(run / "submit.lock"): ...`; `python -m slurm.lock --run R` removes what an owner on
another host left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sarm.cli import ended
from sarm.config import UserError
from sarm.launched import now
from sarm.run import write_atomic
from slurm.words import made

LOCKS = ("run.lock", "submit.lock")
"""The locks of a run directory."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.lock", description=__doc__)
    parser.add_argument("--run", required=True)
    args = parser.parse_args(argv)
    return ended(lambda: unlock(Path(args.run)), args.run)


def unlock(run: Path) -> int:
    """Remove the locks of a run. Raises UserError, removing none, where an owner on this host
    still lives.
    """
    if not run.is_dir():
        raise UserError(f"{run} does not exist; give the RUN whose lock is in the way")
    found = [path for name in LOCKS if (path := run / name).exists()]
    for path in found:
        owner = _owner(path)
        if owner.get("host") == socket.gethostname() and not _gone(owner):
            raise UserError(
                f"{path} belongs to pid {owner.get('pid')} on this host, which is at work; stop"
                " that first"
            )
    for path in found:
        print(f"removed {path} of {_who(_owner(path))}")
        shutil.rmtree(path)
    if not found:
        print(f"{run} is not locked")
    return 0


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock, taken over only from an owner that is provably gone. Raises UserError naming
    a live owner.
    """
    while True:
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            owner = _owner(path)
            if not _gone(owner):
                raise UserError(
                    f"{what} is under way ({_who(owner)}); wait for it, or"
                    f" {made('unlock', path.parent)} if it is not"
                ) from None
            # Renaming first: of two takers only one can rename this folder away.
            stale = path.with_name(f"{path.name}.stale-{os.getpid()}")
            try:
                path.rename(stale)
            except FileNotFoundError:
                continue
            shutil.rmtree(stale)
    try:
        write_atomic(
            path / "owner.json",
            json.dumps(
                {
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "boot": _boot_id(),
                    "start": _start_of(os.getpid()),
                    "since": now(),
                }
            ).encode(),
        )
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def at_work(path: Path) -> bool:
    """Whether somebody holds this lock who is not known to be gone."""
    return path.exists() and not _gone(_owner(path))


def _owner(path: Path) -> dict[str, object]:
    try:
        owner = json.loads((path / "owner.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _who(owner: dict[str, object]) -> str:
    return (
        f"host {owner.get('host')}, pid {owner.get('pid')}, since {owner.get('since')}"
        if owner
        else "an unknown owner"
    )


def _gone(owner: dict[str, object]) -> bool:
    """Only an owner on this very host can be known to be gone: after a reboot, or when its process
    has ended.
    """
    if not owner or owner["host"] != socket.gethostname():
        return False
    return owner["boot"] != _boot_id() or _start_of(int(str(owner["pid"]))) != owner["start"]


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_of(pid: int) -> str | None:
    """When a process began, in clock ticks since boot: tells a reused pid from the owner."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


if __name__ == "__main__":
    sys.exit(main())
