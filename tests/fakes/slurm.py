"""A pretended Slurm for tests: one script that acts as sbatch, squeue, sacct, scontrol, scancel,
srun or apptainer.

`install(folder)` links it under each name; put that folder first on PATH. Its state lies in
$FAKE_SLURM, to be had by `read(home, "state")`; `write(home, "faults", ...)` may hold {"refuse": N}
(the N-th sbatch fails), {"lose": N} (its answer is lost), {"says": TEXT} (what sbatch prints, {id}
and {name} filled in), {"wrong": N} (the N-th answer names another job), {"busy": {"sbatch": 2}} (so
many calls find no controller), {"unknown_partition": true}, {"no_sacct": true}, {"enforce":
"associations"} (accounting, at submission), {"flags": {"--account=nobody": "Invalid account"}}
(what test-only refuses), {"max_array_size": 5}, {"deaf": ["squeue"]} (commands that reach no
controller), {"elapsed": 9} (seconds, to accounting), {"sinfo": "main|main*|gpu:h100:4", "quota":
TEXT, "nvidia-smi": TEXT, "srun": TEXT}, {"sacctmgr": {"assoc": TEXT, "qos": TEXT}}. As the real
ones, its commands hear SQUEUE_*, SBATCH_*, SLURM_CLUSTERS and SCANCEL_STATE.

Tests call it some thousands of times, and most of a call would be Python's start. So a command is
a few words of bash that tell their process id to a server, which takes words, environment and
folder from there, does what the command does and tells what to say. A server is started once by
each process that installs commands, and ends with it.
"""

import atexit
import contextlib
import fcntl
import functools
import io
import marshal
import os
import select
import socket
import subprocess
import sys
import traceback

NAMES = (
    "sbatch",
    "squeue",
    "sacct",
    "scontrol",
    "scancel",
    "sacctmgr",
    "sinfo",
    "quota",
    "nvidia-smi",
    "srun",
    "apptainer",
)


CLIENT = """#!/bin/bash -p
LC_ALL=C  # lengths are of bytes
exec 3<>/dev/tcp/127.0.0.1/{port} || exit 97
[[ " $* " != *" --test-only "* ]] || IFS= read -r -d "" text
printf "%s\\n" "{name} $$ ${{#text}}" "$text" >&3
read -r code out err <&3
IFS= read -r -N $out text <&3 && printf %s "$text"
IFS= read -r -N $err text <&3 && printf %s "$text" >&2
exit $code
"""


def install(folder):  # type: ignore[no-untyped-def]
    """A folder of executables that act as Slurm's commands while this process lives."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        script = folder / name
        script.write_text(CLIENT.format(port=served(os.getpid()), name=name))
        script.chmod(0o755)
    return folder


@functools.cache
def served(owner: int) -> int:
    """The port of this process's server."""
    words = [sys.executable, "-SE", __file__]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(lambda: os.getpid() == owner and server.kill())
    return int(server.stdout.readline())


def serve() -> None:
    """Until nobody holds the other end of its standard input."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    print(listener.getsockname()[1], flush=True)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(0, select.POLLHUP)
    while all(file == listener.fileno() for file, _ in poll.poll()):
        client, _ = listener.accept()
        with client, client.makefile("rb") as asked, contextlib.suppress(OSError, ValueError):
            name, pid, length = asked.readline().split()  # ValueError: it was killed before
            given = asked.read(int(length))
            client.sendall(become(name.decode(), f"/proc/{int(pid)}", given))


def become(name: str, process: str, given: bytes) -> bytes:
    """What the command that a process of bash stands for exits with and says: a line of the code
    and both lengths, its output and its errors.
    """
    said = [io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape") for _ in range(2)]
    sys.stdout, sys.stderr = said
    sys.stdin = io.StringIO(given.decode("utf-8", "surrogateescape"))
    code = 97
    try:
        os.chdir(f"{process}/cwd")
        os.environ.clear()
        for pair in words(f"{process}/environ"):
            key, _, value = pair.partition("=")
            os.environ[key] = value
        code = main(name, words(f"{process}/cmdline")[3:])  # after bash, -p and the script
    except Exception:
        traceback.print_exc()
    for text in said:
        text.flush()
    out, err = (text.buffer.getvalue() for text in said)
    return b"%d %d %d\n%b%b" % (code, len(out), len(err), out, err)


def words(file: str) -> list[str]:
    """Of a file of /proc."""
    with open(file, "rb") as opened:
        return [os.fsdecode(word) for word in opened.read().split(b"\0")[:-1]]


def read(home, name: str, default=None):  # type: ignore[no-untyped-def]
    """The tree in the file of that name; the default where there is none."""
    try:
        with open(f"{home}/{name}", "rb") as file:
            return marshal.load(file)
    except FileNotFoundError:
        return default


def write(home, name: str, tree) -> None:  # type: ignore[no-untyped-def]
    with open(f"{home}/{name}", "wb") as file:
        marshal.dump(tree, file)


def main(name: str, argv: list[str]) -> int:
    home = os.environ["FAKE_SLURM"]
    with open(f"{home}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = read(home, "state", {"jobs": {}, "calls": 0})
        faults = read(home, "faults", {})
        busy = state.setdefault("busy", {})
        passing = busy.get(name, 0) < faults.get("busy", {}).get(name, 0)
        busy[name] = busy.get(name, 0) + passing
        state.setdefault("commands", []).append([name, *argv])
        if name in faults.get("deaf", ()) or passing:
            write(home, "state", state)
            print(
                f"{name}: error: Unable to contact slurm controller (connect failure)",
                file=sys.stderr,
            )
            return 1
        try:
            return COMMANDS[name](argv, state, faults)
        finally:
            write(home, "state", state)


def word(argv: list[str], flag: str) -> str | None:
    return next((w.partition("=")[2] for w in argv if w.startswith(f"--{flag}=")), None)


def options(text: str) -> dict[str, str]:
    """Of a batch script, by name; empty where a flag has no value."""
    flags = [line[10:] for line in text.split("\n") if line.startswith("#SBATCH --")]
    return {flag.partition("=")[0]: flag.partition("=")[2] for flag in flags}


def elements_of(given: dict[str, str]) -> int:
    """5 of `--array=0-4%2`; 0 where it is no array."""
    last = given.get("array", "").partition("%")[0].removeprefix("0-")
    return int(last) + 1 if last else 0


def sbatch(argv: list[str], state: dict, faults: dict) -> int:
    if "--test-only" in argv:
        text = sys.stdin.read()
        if account := os.environ.get("SBATCH_ACCOUNT"):
            said = f"--account={options(text).get('account')}\n"
            text = text.replace(said, f"--account={account}\n")
        state.setdefault("test_only", []).append(text)
        if faults.get("unknown_partition") and "--partition=" in text:
            print("sbatch: error: invalid partition specified: nowhere", file=sys.stderr)
            return 1
        if elements_of(options(text)) > faults.get("max_array_size", 1001):
            print("allocation failure: Invalid job array specification", file=sys.stderr)
            return 1
        for flag, reason in faults.get("flags", {}).items():
            if f"{flag}\n" in text:
                print(f"allocation failure: {reason}", file=sys.stderr)
                return 1
        return 0
    with open(argv[-1], encoding="utf-8") as file:
        text = file.read()
    state["calls"] += 1
    if faults.get("refuse") == state["calls"]:
        print("sbatch: error: QOSMaxSubmitJobPerUserLimit", file=sys.stderr)
        return 1
    state["first"] = state.get("first", faults.get("first", 100))
    id_ = str(state["first"] + state["calls"])
    given = options(text)
    state["jobs"][id_] = {
        "name": given["job-name"],
        "state": "PENDING",
        "held": "hold" in given,
        "elements": elements_of(given),
        "dependency": given.get("dependency", "").strip("'"),
        "text": text,
        "cluster": word(argv, "clusters"),
        "environment": dict(os.environ),
    }
    if "hides" in faults and state["calls"] == faults["hides"]:
        state["jobs"][id_]["hidden"] = 2
    if faults.get("lose") == state["calls"] or faults.get("hides") == state["calls"]:
        print(
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
            file=sys.stderr,
        )
        return 1
    shown = str(faults["victim"]) if faults.get("wrong") == state["calls"] else id_
    print(faults.get("says", "Submitted batch job {id}").replace("{id}", shown))
    return 0


def elements(id_: str, job: dict):  # type: ignore[no-untyped-def]
    """(id as squeue --array shows it, state) of each element."""
    for i in range(job["elements"]):
        yield f"{id_}_{i}", job.get("states", {}).get(str(i), job["state"])
    if not job["elements"]:
        yield id_, job["state"]


def squeue(argv: list[str], state: dict, faults: dict) -> int:
    wanted = word(argv, "states") or os.environ.get("SQUEUE_STATES")
    partition = os.environ.get("SQUEUE_PARTITION")
    cluster = word(argv, "clusters") or os.environ.get("SLURM_CLUSTERS")
    fields = (os.environ.get("SQUEUE_FORMAT") or word(argv, "format") or "%i").split("|")
    if cluster:
        print(f"CLUSTER: {cluster}")
    for id_, job in state["jobs"].items():
        if job.get("hidden", 0):
            job["hidden"] = (job["hidden"] + 1) % 3
            continue
        if cluster != job.get("cluster") or (partition and f"={partition}\n" not in job["text"]):
            continue
        for shown, now in elements(id_, job):
            if wanted is None and now not in ("PENDING", "RUNNING", "COMPLETING"):
                continue
            if wanted not in (None, "all") and now not in wanted.split(","):
                continue
            values = {
                "%i": shown,
                "%T": now,
                "%M": "0:00" if now == "PENDING" else "1-02:03:04",
                "%r": job.get("reason", "JobHeldUser" if job["held"] else "Dependency"),
                "%j": job["name"],
            }
            line = "|".join(values[field] for field in fields) + "\n"
            sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape"))
    return 0


def sacct(argv: list[str], state: dict, faults: dict) -> int:
    if faults.get("no_sacct", True):
        print("Slurm accounting storage is disabled", file=sys.stderr)
        return 1
    for id_, job in state["jobs"].items():
        took, name = faults.get("elapsed", 100), job["name"]
        for shown, now in elements(id_, job):
            code = "0:0" if now == "COMPLETED" else "1:0"
            print(f"{shown}|{now}|{code}|{took}|00:50.000|2|2G|||{name}")
            print(f"{shown}.0|{now}|0:0|100|00:50.000|2||524288K|2|batch")
    return 0


def scontrol(argv: list[str], state: dict, faults: dict) -> int:
    argv = [w for w in argv if not w.startswith("--")]
    if argv[0] == "release":
        for id_ in argv[1].split(","):
            state["jobs"][id_]["held"] = False
    elif argv[:2] == ["show", "config"]:
        print(f"AccountingStorageEnforce = {faults.get('enforce', 'none')}")
        print("ClusterName             = here")
    return 0


def scancel(argv: list[str], state: dict, faults: dict) -> int:
    only = os.environ.get("SCANCEL_STATE")
    for shown in argv:
        id_, _, index = shown.partition("_")
        job = state["jobs"].get(id_)
        if job is None or (only and job["state"] != only):
            continue
        if index and job["elements"]:
            job.setdefault("states", {})[index] = "CANCELLED"
        else:
            job["state"] = "CANCELLED"
            job["states"] = {}
    return 0


def answer(name: str):  # type: ignore[no-untyped-def]
    """A command that prints what the faults say it does, or a usual cluster's answer."""
    usual = {"sinfo": "main|main*|gpu:h100:4"}

    def run(argv: list[str], state: dict, faults: dict) -> int:
        print(faults.get(name, usual.get(name, "")))
        return 0

    return run


def sacctmgr(argv: list[str], state: dict, faults: dict) -> int:
    """Of `show assoc` and `show qos`, each its own lines."""
    said = faults.get("sacctmgr", {})
    sys.stdout.write(said.get(next(what for what in ("assoc", "qos") if what in argv), ""))
    return 0


def srun(argv: list[str], state: dict, faults: dict) -> int:
    if "srun" not in faults:
        return refuse(argv, state, faults)
    print(faults["srun"])
    return 0


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
    "sacctmgr": sacctmgr,
    "srun": srun,
    "apptainer": refuse,
}

if __name__ == "__main__":
    serve()
