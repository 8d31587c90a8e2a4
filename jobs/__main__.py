"""Run one unit of one phase: `python -m jobs PHASE --config C --run R [--unit U] [key=value
...]`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from jobs.fetched import refuse_changed
from sarm.cli import ended
from sarm.config import NON_PHASE_JOBS, PHASES, UserError
from sarm.pinned import pinned
from sarm.run import Attempt, RunDir, config_of
from sarm.threads import bound_threads


def main(argv: list[str] | None = None) -> int:
    """0 where the unit is done, 2 where the user can fix it (one sentence), 1 on a defect
    (traceback).
    """
    bound_threads(os.environ)
    parser = argparse.ArgumentParser(prog="python -m jobs", description=__doc__)
    parser.add_argument("phase", choices=(*PHASES, *NON_PHASE_JOBS))
    parser.add_argument("--config", help="YAML; where left out, the run's own")
    parser.add_argument("--run", required=True, help="run directory")
    parser.add_argument("--unit", help="shard, policy or index; default: every unit of the phase")
    parser.add_argument("--force", action="store_true", help="do it again though it is done")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)  # overrides may come last, as the usage says
    return ended(lambda: run_units(args), args.run)


def run_units(args: argparse.Namespace) -> int:
    run = RunDir.create(args.run, config_of(args.run, args.config, args.overrides))
    for unit in chosen_units(run, args.phase, args.unit):
        try:
            run_unit(run, args.phase, unit, force=args.force)
        except RuntimeError as error:
            # torch's, which is not imported for the sake of its name
            if type(error).__name__ != "OutOfMemoryError":
                raise
            lower = "ppo.micro_batch_tokens" if args.phase == "ppo" else "sarm.tokens_per_batch"
            raise UserError(
                f"{args.phase}/{unit} ran out of GPU memory; lower {lower}, or give the phase"
                " larger or more GPUs in the profile"
            ) from error
    return 0


def chosen_units(run: RunDir, phase: str, wanted: str | None) -> tuple[str, ...]:
    """The units named, or all of them. Raises UserError on an unknown one."""
    units = ("all",) if phase in NON_PHASE_JOBS else run.config.units(phase)  # type: ignore[arg-type]
    if not units:
        key = {"check_sarm": "check_sarm.card", "ppo": "ppo.arms"}.get(phase, phase)
        raise UserError(f"{key} of the config leaves {phase} nothing to do; set it")
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
    if not force and (run.folder(phase, unit) / "manifest.json").exists():
        manifest = run.manifest(phase, unit)  # refuses one of another version
        why = run.why_not_done(phase, unit)
        if manifest and why:
            print(f"{phase}/{unit}: done again, as it is not: {why}", flush=True)
    if phase not in ("fetch", "report"):
        check_gpu()
    if phase not in ("fetch", "report", "train_sarm"):
        refuse_changed(run, phase)
    module = importlib.import_module(f"jobs.{phase}")
    config = run.config if phase in ("fetch", "report") else pinned(run)
    module.run(config, run, unit, Attempt(run, phase, unit))
    where = run.path if phase == "report" else run.folder(phase, unit)
    print(f"{phase}/{unit}: done, in {where}", flush=True)


def check_gpu() -> None:
    """Raises UserError where this job was given GPUs that torch cannot use: it would do the work
    on the CPU, for days.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not given or given in ("-1", "NoDevFiles"):
        return
    import torch

    if torch.version.cuda is not None and not torch.cuda.is_available():
        raise UserError(
            f"this job was given GPU {given}, which torch {torch.__version__} cannot use: the"
            f" driver is too old for CUDA {torch.version.cuda}, or the image was entered without"
            " --nv; ask your site for a newer driver, or set container.nv in the profile"
        )


if __name__ == "__main__":
    sys.exit(main())
