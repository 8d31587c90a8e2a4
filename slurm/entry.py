"""What a submitted job runs: one importable function and the path of a JSON file, never a pickled
closure.

Stand-alone scripts run `python -m slurm.entry FOLDER GRACE_S PHASE --config C --run R [--unit U]`.

The JSON holds `commands` (a list of `argv` for Python and `log`), `cwd`, `env` (null unsets),
`grace_s` and `ranks`. With `ranks` every task runs the first command as one rank of a torch process
group; without, task n runs command n. Imports no torch, so a job reaches its phase at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sarm.launched import ATTEMPT, BEGAN, JOB, PATIENCE, now
from slurm.joblogs import complaint, job_logs
from slurm.ranks import Ranks

GRACE_S = 60.0
"""How long a process asked to end by SIGTERM may take before it is killed."""
LAST_WORDS_S = 5.0
"""The same where another rank has died, without which no step will end."""
NFS_PATIENCE_S = 70
"""How long a job looks for a manifest whose job ended well: NFS attribute caches last up to a
minute.
"""


def run_spec(path: str) -> None:
    """Run this task's command of a spec file, its output appended to its log, and exit as it does.

    Signals go on to the command. Exits with its code, 128 + n where signal n ended it.
    """
    _sweep()
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    task = int(os.environ.get("SLURM_PROCID", "0"))
    if not spec["ranks"] and task >= len(spec["commands"]):
        return  # the last job of a packed array may hold fewer shards than tasks
    command = spec["commands"][0 if spec["ranks"] else task]
    given = {} if spec["ranks"] else device_environment(os.environ, len(spec["commands"]))
    env = {
        name: value
        for name, value in {**os.environ, **spec["env"], **given}.items()
        if value is not None
    }
    os.chdir(spec["cwd"])
    log = Path(command["log"] if not spec["ranks"] or task == 0 else f"{command['log']}.rank{task}")
    if code := run_command(
        command["argv"], env, log, Path(path).parent, spec["grace_s"], ranks=spec["ranks"]
    ):
        raise SystemExit(code)


def main(argv: list[str]) -> int:
    """This task's command of a stand-alone script, in whose own output it is heard."""
    folder, grace_s, phase, *words = argv
    return run_command(
        ["-m", "jobs", phase, *words],
        os.environ,
        None,
        Path(folder),
        float(grace_s),
        ranks=phase == "ppo",
    )


def run_command(
    argv: list[str],
    env: Mapping[str, str],
    log: Path | None,
    folder: Path,
    grace_s: float,
    *,
    ranks: bool,
) -> int:
    """Run a command for Python as this task, alone or as one of the `ranks` of a job, and return
    its code, 128 + n where signal n ended it.

    In `folder` the ranks tell each other, and the batch script, how they end.
    """
    with contextlib.ExitStack() as stack:
        output: BinaryIO = sys.stdout.buffer
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(open(log, "ab", buffering=0))
            output.write(
                f"{BEGAN}{os.environ.get('SLURM_JOB_ID', '')} on {socket.gethostname()} at {now()}"
                " ===\n".encode()
            )
        signalled = signalled_file(folder, os.environ) if ranks else None
        if signalled is None:
            # in the command too: Slurm may signal the whole process group
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        # In this process's own group: where Slurm tells a job's processes by that, another one
        # would outlive its job.
        env = {
            **env,
            **job_environment(os.environ),
            **failed_units(folder.parent, env),
            **(rank_environment(os.environ) if ranks else {}),
        }
        process = subprocess.Popen(
            [sys.executable, *argv], env=env, stdout=output, stderr=subprocess.STDOUT
        )
        siblings = Ranks(folder, os.environ, log) if ranks else None
        code, asked = wait_forwarding(
            process, signalled, grace_s, siblings.look if siblings else lambda asked: []
        )
        if siblings:
            siblings.leave()
        if process.returncode < 0:
            output.write(f"error: ended by {signal.Signals(-process.returncode).name}\n".encode())
            output.flush()
        if siblings and code:
            # such as a full disk, which the command itself has reported
            with contextlib.suppress(OSError):
                siblings.settle(process.returncode, asked)
    return code


class End(NamedTuple):
    code: int
    """The exit code; 128 + n where signal n ended it."""
    asked: bool
    """It had been asked to end, or was ended from here."""


def wait_forwarding(
    process: subprocess.Popen[bytes],
    signalled: Path | None,
    grace_s: float,
    lost: Callable[[bool], list[Any]],
) -> End:
    """Wait for a process, handing SIGTERM and SIGUSR2 on to it; killed where it does not end in
    time once asked.

    SIGUSR2, by which Slurm announces a preemption or the time limit, is for those that checkpoint:
    it makes the file `signalled`, by which the batch script knows to requeue, and leaves `grace_s`
    to end a step and write the checkpoint. Without that path SIGUSR2 is left alone. Once `lost`,
    which is told whether it was asked, names a sibling that has died, only last words are waited
    for.
    """
    deadline = math.inf
    asked = False

    def forward(signum: int, frame: Any) -> None:
        nonlocal deadline, asked
        asked = True
        if signalled is not None and signum == signal.SIGUSR2:
            signalled.touch()
        deadline = min(
            deadline, time.monotonic() + (grace_s if signum == signal.SIGUSR2 else GRACE_S)
        )
        process.send_signal(signum)

    for signum in (signal.SIGTERM, *((signal.SIGUSR2,) if signalled is not None else ())):
        signal.signal(signum, forward)
    while True:
        try:
            code = process.wait(timeout=1.0)
            return End(code if code >= 0 else 128 - code, asked)
        except subprocess.TimeoutExpired:
            if lost(asked):
                deadline = min(deadline, time.monotonic() + LAST_WORDS_S)
            if time.monotonic() > deadline:
                asked = True
                process.kill()


def signalled_file(folder: Path, env: Mapping[str, str]) -> Path:
    """Says that this try of this job was signalled to checkpoint. `slurm.script.teardown_lines`
    looks for the same name.
    """
    job, restarts = env.get("SLURM_JOB_ID", "local"), env.get("SLURM_RESTART_COUNT", "0")
    return folder / f"signalled.{job}.{restarts}"


def job_environment(env: Mapping[str, str]) -> dict[str, str]:
    """What `sarm.run` is to know of the job that this is; empty outside Slurm."""
    if "SLURM_JOB_ID" not in env:
        return {}
    job = env["SLURM_JOB_ID"]
    array = env.get("SLURM_ARRAY_JOB_ID")
    return {
        JOB: f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else job,
        ATTEMPT: f"{job}-{env.get('SLURM_RESTART_COUNT', '0')}-{env.get('SLURM_PROCID', '0')}",
        PATIENCE: str(NFS_PATIENCE_S),
    }


def failed_units(submissions: Path, env: Mapping[str, str]) -> dict[str, str]:
    """For the report: how each unit's job ended that ended without success, from the batch script's
    question to Slurm, `id state name` a line (slurm.script.FAILED_JOBS), and the logs in
    `submissions`.

    A job is a unit's own only by its name: ids come again.
    """
    jobs: dict[str, tuple[str, str, str]] = json.loads(env.get("SARM_JOBS", "{}"))
    words = [line.split(maxsplit=2) for line in env.get("SARM_FAILED_JOBS", "").splitlines()]
    states = {(id_, name): state for id_, state, name in (w for w in words if len(w) == 3)}
    found = {}
    for unit, (id_, name, submission) in jobs.items():
        if state := states.get((id_, name)):
            logs = job_logs(submissions / submission, id_)
            found[unit] = ": ".join(filter(None, (state, complaint(logs)))) if logs else ""
    return {"SARM_FAILED_UNITS": json.dumps(found)} if found else {}


def _sweep() -> None:
    """Remove a half-written result of submitit's: it refuses to write over one that an earlier try
    of this job left.
    """
    if "SLURM_JOB_ID" in os.environ and "SUBMITIT_EXECUTOR" in os.environ:
        import submitit

        result = submitit.JobEnvironment().paths.result_pickle
        result.with_suffix(".pkl.save_tmp").unlink(missing_ok=True)


def rank_environment(env: Mapping[str, str]) -> dict[str, str]:
    """torch.distributed's variables from Slurm's. Every rank sees all GPUs of the node, so that
    NVLink works.
    """
    if "SLURM_PROCID" not in env:
        return {}
    alone = env.get("SLURM_NNODES", "1") == "1"
    host = "127.0.0.1" if alone else first_host(env["SLURM_JOB_NODELIST"])
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_NTASKS"],
        "MASTER_ADDR": host,
        "MASTER_PORT": str(rendezvous_port(env)),
    }


def rendezvous_port(env: Mapping[str, str]) -> int:
    """Jobs that share a node must not meet on one port, nor those of two clusters that share hosts
    and count their jobs alike, nor a requeued job its old ranks. Below 32768, where Linux begins to
    give ports to outgoing connections.
    """
    job, restarts = int(env["SLURM_JOB_ID"]), int(env.get("SLURM_RESTART_COUNT", "0"))
    cluster = zlib.crc32(env.get("SLURM_CLUSTER_NAME", "").encode())
    return 20000 + (cluster + job * 7 + restarts) % 12000


def first_host(nodes: str) -> str:
    """The first of Slurm's node list: `g1` of `g[1-2,5]`, `rack0_a2` of `rack[0-1]_a[2-3]`. Rank 0
    is there.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # an empty one is one
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def device_environment(env: Mapping[str, str], tasks: int) -> dict[str, str]:
    """One GPU for each of several packed shards; a lone task keeps what it was given."""
    devices = env.get("CUDA_VISIBLE_DEVICES", "")
    if tasks == 1 or not devices:
        return {}
    listed = devices.split(",")
    return {"CUDA_VISIBLE_DEVICES": listed[int(env.get("SLURM_LOCALID", "0")) % len(listed)]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
