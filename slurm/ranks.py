"""What the ranks of one job say to each other of their ends: files beside the job's spec, kept by
`slurm.entry`.

A rank whose sibling has died waits for it in a collective, ten minutes long under NCCL, or fails
over a closed connection. So each rank's entry leaves a note when its own has died, the others end
theirs, and rank 0's log ends with the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sarm.launched import latest

PATIENCE_S = 5.0
"""How long rank 0's entry waits for the note of whichever died first."""
HOLD_S = 15.0
"""How long the entry of a dead rank waits for rank 0's to have written the cause: srun kills all
tasks, hard after KillWait, when the first ends.
"""
BEAT_S = 5.0
"""How often the entry of a rank on several nodes shows that its node lives."""
SILENT_S = 20.0
"""After so long without a change a node is taken for dead; a network file system lags a little."""
ENDED = "ended"
LOG_TAIL_BYTES = 4096


class Death(NamedTuple):
    rank: int
    ranks: int
    host: str
    returncode: int
    """Its exit code; -n where signal n ended it."""
    log: str
    """Empty where it is heard in the script's own output."""
    words: str
    """The last line of its log."""

    @property
    def order(self) -> tuple[int, int]:
        """The likelier cause first: a signal from outside, one reported in a sentence, and last
        what may be another's doing.
        """
        outside = self.returncode < 0 and self.returncode != -signal.SIGABRT
        return (0 if outside else 1 if self.returncode == 2 else 2, self.rank)

    def sentence(self) -> str:
        who = f"rank {self.rank} of {self.ranks} on {self.host}"
        if self.returncode >= 0:
            said = f": {self.words or 'its log is empty'} ({self.log})" if self.log else ""
            return f"{who} ended with exit code {self.returncode}, and the others with it{said}"
        name = signal.Signals(-self.returncode).name
        why = ", as the kernel does where memory runs out" if name == "SIGKILL" else ""
        again = "submit again to go on from the newest checkpoint" + (
            ", with more mem_gb if memory was short" if why else ""
        )
        return f"{who} was killed by {name}{why}, and the others were ended; {again}"


class Ranks:
    """The ranks of one try of one job, as the entry of rank `rank` sees them."""

    def __init__(self, folder: Path, env: Mapping[str, str], log: Path | None) -> None:
        """Without a `log` of its own a rank is heard, and the cause written, in the script's
        output.
        """
        self.log, self.told = log, False
        self.rank, self.size = int(env.get("SLURM_PROCID", "0")), int(env.get("SLURM_NTASKS", "1"))
        self.host = env.get("SLURMD_NODENAME") or socket.gethostname()
        self.folder, self.stem = (
            folder,
            f"{env.get('SLURM_JOB_ID', 'local')}.{env.get('SLURM_RESTART_COUNT', '0')}",
        )
        self.several = env.get("SLURM_NNODES", "1") != "1"
        self.beats, self.beaten = 0, -BEAT_S
        self.heard: dict[int, tuple[str, str, float]] = {}
        """Rank 0's: of each rank its host, its last beat and when that was new here: clocks of
        other nodes say nothing."""

    def look(self, asked: bool) -> list[Death]:
        """Those that have died so far; on several nodes also shows and hears signs of life.

        When it is `asked` to end, rank 0's says at once which node is silent: Slurm ends a job that
        has lost a node, its ranks in a collective hear nothing, and are killed with this process.
        """
        if self.several:
            with contextlib.suppress(OSError):
                self.beat()
                if asked and self.rank == 0 and not self.told and (said := self.silent()):
                    self.tell(said)
        return self.deaths()

    def tell(self, cause: str) -> None:
        self.told = True
        log = self.log
        with (
            open(log, "a", encoding="utf-8") if log else contextlib.nullcontext(sys.stdout) as file
        ):
            print(f"error: {cause}", file=file, flush=True)

    def beat(self) -> None:
        if time.monotonic() - self.beaten >= BEAT_S:
            self.beats, self.beaten = self.beats + 1, time.monotonic()
            (self.folder / f"alive.{self.stem}.{self.rank}").write_text(f"{self.beats} {self.host}")
        if self.rank == 0:
            for path in self.folder.glob(f"alive.{self.stem}.*"):
                count, _, host = path.read_text().partition(" ")
                rank = int(path.suffix[1:])
                if host and self.heard.get(rank, ("", ""))[1] != count:
                    self.heard[rank] = (host, count, time.monotonic())

    def leave(self) -> None:
        """A rank that ends shows no more signs of life, and its node may live: say so."""
        if self.several:
            with contextlib.suppress(OSError):
                (self.folder / f"alive.{self.stem}.{self.rank}").write_text(f"{ENDED} {self.host}")

    def silent(self) -> str:
        """Nodes that have shown no sign of life for SILENT_S, with their ranks, in a sentence;
        empty where all have.
        """
        hosts: dict[str, dict[int, float]] = {}
        for rank, (host, count, at) in sorted(self.heard.items()):
            if host != self.host and count != ENDED:
                hosts.setdefault(host, {})[rank] = at
        late = time.monotonic() - SILENT_S
        # one rank that shows itself shows that its node lives
        named = [
            f"{host} (ranks {', '.join(map(str, heard))})"
            for host, heard in hosts.items()
            if max(heard.values()) < late
        ]
        if not named:
            return ""
        return (
            f"no sign of life from node {' and node '.join(named)} for {SILENT_S:.0f} s or more;"
            " requeued or submitted again the job goes on from its newest checkpoint, with exclude"
            " in the profile if the node stays away"
        )

    def settle(self, returncode: int, asked: bool) -> None:
        """Of a rank that did not end well: note it, unless it was `asked` to end; rank 0's writes
        the cause, others wait until it stands.
        """
        log = self.log
        # which it returns where a sibling alone was asked
        if not asked and returncode != os.EX_TEMPFAIL:
            death = Death(
                self.rank, self.size, self.host, returncode, log.name if log else "", last_line(log)
            )
            unfinished = self.folder / f".died.{self.stem}.{self.rank}"
            unfinished.write_text(json.dumps(death))
            os.replace(unfinished, self.folder / f"died.{self.stem}.{self.rank}")
        stands = self.folder / f"cause.{self.stem}"
        # on several nodes rank 0 may have to wait until one has been silent for long enough
        deadline = time.monotonic() + HOLD_S + (SILENT_S + BEAT_S if self.several else 0.0)
        if self.rank == 0:
            patience_s = 0.0 if asked else PATIENCE_S
            if not self.told and (cause := self.cause(patience_s) or self.lost_node(asked)):
                self.tell(cause)
            stands.touch()
        while not asked and not stands.exists() and time.monotonic() < deadline:
            time.sleep(0.1)

    def lost_node(self, asked: bool) -> str:
        """Which node is silent, once nobody has said why this rank failed: its end closes
        connections before its silence is long enough to tell.
        """
        found = self.deaths()
        outside = bool(found) and found[0].order[0] < 2
        deadline = time.monotonic() + (0.0 if asked or outside else SILENT_S + BEAT_S)
        while self.several and not outside:
            with contextlib.suppress(OSError):
                self.beat()
            if (said := self.silent()) or time.monotonic() >= deadline:
                return said
            time.sleep(0.1)
        return ""

    def deaths(self) -> list[Death]:
        """Those noted so far, the likeliest cause first."""
        try:
            found = [
                Death(*json.loads(path.read_text()))
                for path in self.folder.glob(f"died.{self.stem}.*")
            ]
        except OSError:  # a file system that stumbles is no death; it is asked again
            return []
        return sorted(found, key=lambda death: death.order)

    def cause(self, patience_s: float) -> str:
        """What rank 0's log is to end with; empty where that says it already, or where nobody died
        by itself.

        Within `patience_s` a likelier cause than what is known may be noted.
        """
        deadline = time.monotonic() + patience_s
        while (
            not ((found := self.deaths()) and found[0].order[0] < 2) and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        if self.several and found and found[0].order[0] == 2 and (said := self.lost_node(False)):
            return said
        if not found or (
            found[0].returncode >= 0
            and (found[0].rank == 0 or found[0].words == last_line(self.log))
        ):
            return ""
        return found[0].sentence()


def last_line(log: Path | None) -> str:
    """The last line that this job has left in a log; empty where it left none, or has no log of
    its own.
    """
    if log is None:
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        lines = [
            line.strip()
            for line in file.read().decode("utf-8", errors="replace").splitlines()
            if line.strip()
        ]
    return lines[-1] if (lines := latest(lines)) else ""
