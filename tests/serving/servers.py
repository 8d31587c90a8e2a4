"""A real server on tiny models, in a process of its own, for the tests in this folder.

Where a test does not ask for the command itself, server and scoring process are forked from one
that has torch and transformers imported: to import these takes longer than all that the tests do.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import httpx

from sarm.config import ROOT

TOKEN = "a-token-of-the-tests-0123456789"
PENALISED = "[{latent: 3, tau: 0.0, alpha: 0.5}, {latent: 10, tau: 0.2, alpha: 0.25}]"


def settings(policy: Path, sarm: Path) -> list[str]:
    """Overrides of configs/tiny.yaml under which the tests serve."""
    return [
        f"policy.model={policy}",
        f"sarm.model={sarm}",
        f"serve.penalised={PENALISED}",
        "serve.monitors=[5, 7]",
        "serve.port=0",
    ]


class Server:
    """`python -m serving`, started and waited for; `log` is all it has written. With `command` it
    is that command, and its scoring process the one that it starts.
    """

    def __init__(
        self, folder: Path, overrides: list[str], token: str | None = None, *, command: bool = False
    ) -> None:
        self.token, self.log_file = token, folder / "server.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("SARM_REWARD_TOKEN", None)
        if token is not None:
            environment["SARM_REWARD_TOKEN"] = token
        words = ["--config", "configs/tiny.yaml", *overrides]
        start = Command if command else Forked
        self.process = start(words, environment, self.log_file)
        self.url = self._url()
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(base_url=self.url, headers=self.headers, timeout=120)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def score(self, text: str = "Sure. Here it is.", **more: Any) -> httpx.Response:
        return self.post("/score", {"items": [{"prompt": "How?", "response": text}], **more})

    def metric(self, name: str) -> float:
        text = self.client.get("/metrics").text
        found = re.findall(rf"^sarm_reward_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[0]) if found else 0.0

    def wait_for(self, name: str, least: float) -> None:
        """Until a metric is as large."""
        for _ in range(1200):
            if self.metric(name) >= least:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} stays below {least}")

    def worker(self) -> int:
        """The scoring process."""
        for _ in range(1200):
            pid = self.process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.05)
        raise AssertionError("no scoring process")

    def signal_worker(self, number: int) -> None:
        """A stop is waited for: until then its threads may take another job."""
        pid = self.worker()
        os.kill(pid, number)
        while number == signal.SIGSTOP and any(
            stat.read_text().rpartition(")")[2].split()[0] != "T"
            for stat in Path(f"/proc/{pid}/task").glob("*/stat")
        ):
            time.sleep(0.01)

    def stop(self) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def _url(self) -> str:
        for _ in range(2400):
            if found := re.search(r"^(http://\S+) serves ", self.log, re.MULTILINE):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.log}")


class Command(subprocess.Popen[bytes]):
    def __init__(self, words: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("wb") as out:
            command = [sys.executable, "-m", "serving", *words]
            super().__init__(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


class Forked:
    """The same as `Command`, by forks."""

    def __init__(self, words: list[str], environment: dict[str, str], log: Path) -> None:
        from tests.ranks import process_context  # imports torch, which not all of this folder needs

        log.touch()
        self.process = process_context().Process(
            target=_serve, args=(words, environment, log), daemon=True
        )
        self.process.start()
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout_s: float) -> int:
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still there after {timeout_s} s"
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _serve(words: list[str], environment: dict[str, str], log: Path) -> NoReturn:
    from serving.__main__ import main

    _become(environment)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    asyncio.create_subprocess_exec = _fork_worker  # type: ignore[assignment]
    sys.exit(main(words))


def _become(environment: Mapping[str, str]) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)


class _Worker:
    """What the server uses of asyncio's Process."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None
        loop = asyncio.get_running_loop()
        self._code: asyncio.Future[int] = loop.create_future()
        watched = os.pidfd_open(pid)

        def ended() -> None:
            loop.remove_reader(watched)
            os.close(watched)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            self._code.set_result(self.returncode)

        loop.add_reader(watched, ended)

    async def wait(self) -> int:
        return await asyncio.shield(self._code)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


async def _fork_worker(
    *words: str, env: Mapping[str, str], pass_fds: Sequence[int], **_: Any
) -> _Worker:
    """`python -m serving.worker FD` with this environment and no other open files."""
    assert list(words[1:3]) == ["-m", "serving.worker"]
    pid = os.fork()
    return _Worker(pid) if pid else _work(int(words[3]), env, pass_fds)


def _work(fd: int, environment: Mapping[str, str], pass_fds: Sequence[int]) -> NoReturn:
    code = 1
    try:
        from serving.worker import main

        signal.set_wakeup_fd(-1)  # the server's, by which it hears of its own signals
        os.setsid()
        _become(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        for open_ in map(int, os.listdir("/proc/self/fd")):
            if open_ > 2 and open_ not in pass_fds:
                try:
                    os.close(open_)
                except OSError:  # the listing's own
                    continue
        code = main(fd)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
