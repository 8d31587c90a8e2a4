"""A real server on tiny models, in a process of its own, for the tests in this folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    """`python -m serving`, started and waited for; `log` is all it has written."""

    def __init__(self, folder: Path, overrides: list[str], token: str | None = None) -> None:
        self.token, self.log_file = token, folder / "server.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("SARM_REWARD_TOKEN", None)
        if token is not None:
            environment["SARM_REWARD_TOKEN"] = token
        with self.log_file.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving", "--config", "configs/tiny.yaml", *overrides],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
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
