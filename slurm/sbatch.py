"""Write one stand-alone sbatch file a phase for a cluster: `python -m slurm.sbatch --cluster C
[--out slurm]`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sarm.cli import ended
from sarm.config import PHASES, ROOT
from slurm.plan import script
from slurm.profile import load_profile


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.sbatch", description=__doc__)
    parser.add_argument("--cluster", default="generic")
    parser.add_argument("--out", type=Path, default=ROOT / "slurm")
    args = parser.parse_args(argv)
    return ended(lambda: write(args.cluster, args.out), args.out)


def write(cluster: str, out: Path) -> int:
    profile = load_profile(cluster)
    out.mkdir(parents=True, exist_ok=True)
    for phase in PHASES:
        (out / f"{phase}.sbatch").write_text(script(profile, phase, cluster), encoding="utf-8")
    print(f"{len(PHASES)} files in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
