"""A pretended Slurm for tests: one script that acts as sbatch, squeue, sacct, scontrol, scancel,
srun or apptainer.

`install(folder)` links it under each name; put that folder first on PATH. Its state is a JSON file
in $FAKE_SLURM; $FAKE_SLURM/faults.json may hold {"refuse": N} (the N-th sbatch fails), {"lose": N}
(its answer is lost), {"unknown_partition": true}, {"no_sacct": true}, {"enforce": "associations"}
(accounting, at submission), {"flags": {"--account=nobody": "Invalid account"}} (what test-only
refuses), {"max_array_size": 5}, {"deaf": ["squeue"]} (commands that reach no controller),
{"elapsed": 9} (seconds, to accounting), {"sinfo": "main|main*|gpu:h100:4", "quota": TEXT,
"nvidia-smi": TEXT}.
"""

import fcntl
import json
import os
import re
import sys
from pathlib import Path

NAMES = (
    "sbatch",
    "squeue",
    "sacct",
    "scontrol",
    "scancel",
    "sinfo",
    "quota",
    "nvidia-smi",
    "srun",
    "apptainer",
)


def install(folder: Path) -> Path:
    """A folder of executables that act as Slurm's commands."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        script = folder / name
        lines = (
            f"#!{sys.executable} -SE",
            "import sys",
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
            "import slurm",
            f"sys.exit(slurm.main({name!r}, sys.argv[1:]))",
        )
        script.write_text("\n".join(lines) + "\n")
        script.chmod(0o755)
    return folder


def main(name: str, argv: list[str]) -> int:
    home = Path(os.environ["FAKE_SLURM"])
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = home / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"jobs": {}, "calls": 0}
        faults = (
            json.loads((home / "faults.json").read_text())
            if (home / "faults.json").exists()
            else {}
        )
        if name in faults.get("deaf", ()):
            print(
                f"{name}: error: Unable to contact slurm controller (connect failure)",
                file=sys.stderr,
            )
            return 1
        try:
            return COMMANDS[name](argv, state, faults)
        finally:
            path.write_text(json.dumps(state))


def sbatch(argv: list[str], state: dict, faults: dict) -> int:
    if "--test-only" in argv:
        text = sys.stdin.read()
        state.setdefault("test_only", []).append(text)
        if faults.get("unknown_partition") and "--partition=" in text:
            print("sbatch: error: invalid partition specified: nowhere", file=sys.stderr)
            return 1
        array = re.search(r"^#SBATCH --array=0-(\d+)", text, re.MULTILINE)
        if array and int(array.group(1)) >= faults.get("max_array_size", 1001):
            print("allocation failure: Invalid job array specification", file=sys.stderr)
            return 1
        for flag, reason in faults.get("flags", {}).items():
            if f"{flag}\n" in text:
                print(f"allocation failure: {reason}", file=sys.stderr)
                return 1
        return 0
    text = Path(argv[-1]).read_text()
    state["calls"] += 1
    if faults.get("refuse") == state["calls"]:
        print("sbatch: error: QOSMaxSubmitJobPerUserLimit", file=sys.stderr)
        return 1
    id_ = str(100 + state["calls"])
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    array = re.match(r"0-(\d+)", options.get("array", ""))
    state["jobs"][id_] = {
        "name": options["job-name"],
        "state": "PENDING",
        "held": "hold" in options,
        "elements": int(array.group(1)) + 1 if array else 0,
        "dependency": options.get("dependency", "").strip("'"),
        "text": text,
        "environment": dict(os.environ),
    }
    if faults.get("lose") == state["calls"]:
        print(
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
            file=sys.stderr,
        )
        return 1
    print(f"Submitted batch job {id_}")
    return 0


def squeue(argv: list[str], state: dict, faults: dict) -> int:
    names = next(
        (word.removeprefix("--name=").split(",") for word in argv if word.startswith("--name=")),
        None,
    )
    for id_, job in state["jobs"].items():
        if job["state"] not in ("PENDING", "RUNNING", "COMPLETING") or (
            names is not None and job["name"] not in names
        ):
            continue
        if "--format=%F" in argv:
            print(id_)
        else:
            for shown in [f"{id_}_{i}" for i in range(job["elements"])] or [id_]:
                elapsed = "0:00" if job["state"] == "PENDING" else "1-02:03:04"
                print(
                    f"{shown}|{job['name']}|{job['state']}|{elapsed}|{'JobHeldUser' if job['held'] else 'Dependency'}"
                )
    return 0


def sacct(argv: list[str], state: dict, faults: dict) -> int:
    if faults.get("no_sacct", True):
        print("Slurm accounting storage is disabled", file=sys.stderr)
        return 1
    for id_, job in state["jobs"].items():
        for shown in [f"{id_}_{i}" for i in range(job["elements"])] or [id_]:
            print(
                f"{shown}|{job['state']}|{'0:0' if job['state'] == 'COMPLETED' else '1:0'}|{faults.get('elapsed', 100)}|00:50.000|2|2G||"
            )
            print(f"{shown}.0|{job['state']}|0:0|100|00:50.000|2||524288K|2")
    return 0


def scontrol(argv: list[str], state: dict, faults: dict) -> int:
    if argv[0] == "release":
        for id_ in argv[1].split(","):
            state["jobs"][id_]["held"] = False
    elif argv[:2] == ["show", "config"]:
        print(f"AccountingStorageEnforce = {faults.get('enforce', 'none')}")
    return 0


def scancel(argv: list[str], state: dict, faults: dict) -> int:
    for word in argv:
        if word in state["jobs"]:
            state["jobs"][word]["state"] = "CANCELLED"
    return 0


def answer(name: str):  # type: ignore[no-untyped-def]
    """A command that prints what the faults say it does, or a usual cluster's answer."""
    usual = {"sinfo": "main|main*|gpu:h100:4"}

    def run(argv: list[str], state: dict, faults: dict) -> int:
        print(faults.get(name, usual.get(name, "")))
        return 0

    return run


def refuse(argv: list[str], state: dict, faults: dict) -> int:
    print("this pretended command runs nothing", file=sys.stderr)
    return 1


COMMANDS = {
    "sbatch": sbatch,
    "squeue": squeue,
    "sacct": sacct,
    "scontrol": scontrol,
    "scancel": scancel,
    **{name: answer(name) for name in ("sinfo", "quota", "nvidia-smi")},
    "srun": refuse,
    "apptainer": refuse,
}
