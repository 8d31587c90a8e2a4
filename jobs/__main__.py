"""Run one unit of one phase: `python -m jobs PHASE --config C --run R [--unit U] [key=value ...]`."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback

from sarm.config import PHASES, UserError, load_config
from sarm.run import Attempt, RunDir

BESIDE = ("train_sarm", "export")
"""Jobs that are no phase of a run: started by hand."""


def main(argv: list[str] | None = None) -> int:
    """0 where the unit is done, 2 where the user can mend it (one sentence), 1 on a defect (traceback)."""
    parser = argparse.ArgumentParser(prog="python -m jobs", description=__doc__)
    parser.add_argument("phase", choices=(*PHASES, *BESIDE))
    parser.add_argument("--config", help="YAML; where left out, the run's own")
    parser.add_argument("--run", required=True, help="run directory")
    parser.add_argument("--unit", help="shard, policy or index; default: SLURM_ARRAY_TASK_ID, or every unit of the phase")
    parser.add_argument("--force", action="store_true", help="do it again though it is done")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)  # overrides may come last, as the usage says
    try:
        run = RunDir.create(args.run, load_config(args.config, args.overrides)) if args.config else RunDir.open(args.run)
        for unit in chosen_units(run, args.phase, args.unit):
            run_unit(run, args.phase, unit, force=args.force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if os.environ.get("SARM_TRACEBACK"):
            traceback.print_exc()
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: no room left for {args.run} ({error.strerror}); free some or use another RUN, what is done stays done", file=sys.stderr)
        return 2
    return 0


def chosen_units(run: RunDir, phase: str, wanted: str | None) -> tuple[str, ...]:
    """The units named, or all of them. Raises UserError on an unknown one."""
    units = ("all",) if phase in BESIDE else run.config.units(phase)  # type: ignore[arg-type]
    wanted = wanted if wanted is not None else os.environ.get("SLURM_ARRAY_TASK_ID")
    if wanted is None:
        return units
    if wanted.isdecimal() and int(wanted) < len(units):
        return (units[int(wanted)],)
    if wanted not in units:
        raise UserError(f"{phase} has no unit {wanted!r}; it has {', '.join(units)}")
    return (wanted,)


def run_unit(run: RunDir, phase: str, unit: str, *, force: bool = False) -> None:
    """Do one unit unless it is done. The phase's module publishes."""
    if not force and run.done(phase, unit):
        print(f"{phase}/{unit}: already done, skipped", flush=True)
        return
    module = importlib.import_module(f"jobs.{phase}")
    module.run(run.config, run, unit, Attempt(run, phase, unit))
    print(f"{phase}/{unit}: done", flush=True)


if __name__ == "__main__":
    sys.exit(main())
