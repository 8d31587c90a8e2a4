"""The reward served by an sbatch script in its image, asked by another job: part of `make
test-faults`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.harness import ClusterRun, inside, stand_alone, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
ITEMS = [
    {"prompt": "How do I boil an egg?", "response": "For nine minutes.", "ended": True},
    {"prompt": "Tell me more.", "response": "I would rather not say. Sor", "ended": False},
]
ASK = """
import json, sys, urllib.error, urllib.request
url, token, body = sys.argv[1:]
head = {"Content-Type": "application/json"}
if token:
    head["Authorization"] = "Bearer " + token
asked = urllib.request.Request(url + "/score", body.encode(), head)
try:
    print(json.dumps(json.load(urllib.request.urlopen(asked, timeout=300))))
except urllib.error.HTTPError as error:
    print(json.dumps({"status": error.code}))
"""


def asked_by_a_job(url: str, token: str) -> Any:
    body = json.dumps({"items": ITEMS})
    return json.loads(inside("srun", "--quiet", "python3", "-c", ASK, url, token, body).stdout)


def offline(run: ClusterRun) -> list[float]:
    from serving.scorer import open_scorer

    job = {"form": "items", "items": ITEMS, "latents": []}
    scorer = open_scorer(run.dir.config, run.path)
    rewards: list[float] = scorer.score([(job, scorer.read(job))])[0]["rewards"]
    return rewards


def test_a_job_asks_the_reward_that_another_serves_from_its_image(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("served")
    told = run.path / "serving"
    words = ["sbatch", "--parsable", f"--output={run.path}/served.log"]
    job = inside(*words, f"--export=ALL,RUN={run.path}", stand_alone("serve.sbatch")).stdout.strip()

    def address() -> str:
        return inside("cat", str(told / "url"), check=False).stdout.strip()

    url = until("its address", address)
    token = inside("cat", str(told / "token")).stdout.strip()
    assert asked_by_a_job(url, "") == {"status": 401}
    assert asked_by_a_job(url, token)["rewards"] == pytest.approx(offline(run), abs=1e-6)
    inside("scancel", "--signal=TERM", job)
    until(
        "its end", lambda: not inside("squeue", "--noheader", f"--jobs={job}", check=False).stdout
    )
    assert not (told / "url").exists() and not (told / "token").exists()
    assert token not in (run.path / "served.log").read_text()
