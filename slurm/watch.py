"""Watch a run in progress, local or on Slurm: `python -m slurm.watch --run R`. It only looks:
ending it ends nothing else.

On a terminal, also over ssh, a screen that repaints itself; without one, plain lines.
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from sarm.cli import ended
from sarm.run import RunDir
from slurm.left import Rest
from slurm.lock import at_work
from slurm.state import Look, Slurm, ask_slurm, local_states, local_workers, units
from slurm.status import exit_code, say_causes
from slurm.view import Unit, View
from slurm.words import made, report_of

POLL_S = 2.0
ASK_SLURM_EVERY_S = 15.0
"""A queue is asked less often than files are looked at: a site's controller serves everybody."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.watch", description=__doc__)
    parser.add_argument("--run", required=True)
    args = parser.parse_args(argv)
    return ended(lambda: watch(RunDir.open(args.run)), args.run)


def watch(run: RunDir, console: Console | None = None) -> int:
    """Show the run until nothing of it runs or waits in a queue; 0 where all of it is done, 3
    where something failed, 1 where the rest has not been sent.
    """
    slurm, asked, rest = Slurm({}, {}), 0.0, Rest(run)
    try:
        with View(run, console) as view:
            while True:
                look = Look(run)
                if not asked or time.monotonic() - asked > ASK_SLURM_EVERY_S:
                    answer = ask_slurm(look)
                    # While the controller does not answer, what it said last holds.
                    slurm, asked = (
                        (answer if answer.heard else slurm._replace(past=answer.past)),
                        time.monotonic(),
                    )
                working = at_work(run.path / "run.lock")
                shown = units(look, slurm, local_states(run))
                left = rest.left(shown, local_workers(run) if working else None)
                view.update(shown, str(left or ""))
                if not working and not any(unit.kind in ("running", "pending") for unit in shown):
                    break
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\nthe run goes on; {made('watch', run.path)} looks again", file=sys.stderr)
        return 0
    return tell_end(look, shown, slurm, console or Console())


def tell_end(look: Look, shown: list[Unit], slurm: Slurm, console: Console) -> int:
    """What came of it, once nothing runs."""
    say_causes(look, shown, console)
    if all(unit.kind == "done" for unit in shown):
        print(report_of(look.path))
        return 0
    undone = [str(unit.node) for unit in shown if unit.kind != "done"]
    named = ", ".join(undone[:3]) + (f" and {len(undone) - 3} more" if len(undone) > 3 else "")
    print(
        f"nothing of {look.path} runs, and not done are {named}; make submit-all or make run goes"
        " on from what is done"
    )
    return exit_code(look, shown)


if __name__ == "__main__":
    sys.exit(main())
