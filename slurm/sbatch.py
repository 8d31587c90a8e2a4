"""Write one stand-alone sbatch file a phase, and one to serve the reward, for a cluster: `python -m
slurm.sbatch --cluster C [--out outputs/sbatch/C]`.

The checked-in ones are the generic profile's: `--cluster generic --out slurm`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sarm.cli import ended
from sarm.config import PHASES, ROOT
from slurm.profile_file import load_profile
from slurm.script import script
from slurm.serve import serve_script


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.sbatch", description=__doc__)
    parser.add_argument("--cluster", default="generic")
    parser.add_argument("--out", type=Path, help="default: outputs/sbatch/C, in no commit's way")
    args = parser.parse_args(argv)
    out = args.out or ROOT / "outputs" / "sbatch" / Path(args.cluster).stem
    return ended(lambda: write(args.cluster, out), out)


def write(cluster: str, out: Path) -> int:
    profile = load_profile(cluster)
    out.mkdir(parents=True, exist_ok=True)
    for phase in PHASES:
        (out / f"{phase}.sbatch").write_text(script(profile, phase, cluster), encoding="utf-8")
    (out / "serve.sbatch").write_text(serve_script(profile, cluster), encoding="utf-8")
    print(f"{len(PHASES) + 1} files in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
