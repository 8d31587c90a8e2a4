"""Run one unit of one phase: `python -m jobs PHASE --config C --run R [--unit U] [key=value
...]`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from sarm.cli import ended
from sarm.config import PHASES, UserError, load_config
from sarm.run import Attempt, RunDir

BESIDE = ("train_sarm", "train_refusals", "export")
"""Jobs that are no phase of a run: started by hand."""


def main(argv: list[str] | None = None) -> int:
    """0 where the unit is done, 2 where the user can mend it (one sentence), 1 on a defect
    (traceback).
    """
    parser = argparse.ArgumentParser(prog="python -m jobs", description=__doc__)
    parser.add_argument("phase", choices=(*PHASES, *BESIDE))
    parser.add_argument("--config", help="YAML; where left out, the run's own")
    parser.add_argument("--run", required=True, help="run directory")
    parser.add_argument(
        "--unit",
        help="shard, policy or index; default: SLURM_ARRAY_TASK_ID, or every unit of the phase",
    )
    parser.add_argument("--force", action="store_true", help="do it again though it is done")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)  # overrides may come last, as the usage says
    return ended(lambda: run_units(args), args.run)


def run_units(args: argparse.Namespace) -> int:
    run = (
        RunDir.create(args.run, load_config(args.config, args.overrides))
        if args.config
        else RunDir.open(args.run)
    )
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
    if phase not in ("fetch", "report"):
        check_gpu()
    module = importlib.import_module(f"jobs.{phase}")
    module.run(run.config, run, unit, Attempt(run, phase, unit))
    print(f"{phase}/{unit}: done", flush=True)


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
