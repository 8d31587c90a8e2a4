"""The reference run in small, from a gated hub to its report, by the three commands of
docs/reference-run.md on a real Slurm in real images: `make test-cluster`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sarm.config import load_config
from sarm.run import RunDir
from slurm.profile_file import CLUSTERS
from tests import reference
from tests.cluster.harness import RUNS, STATE, ClusterRun, inside
from tests.fakes.hub import Hub

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (STATE / "pid").exists(), reason="no cluster is up; make test-cluster"),
]
PENALTY = "penalty-seed0"


class ReferenceRun(ClusterRun):
    """A run of the reference config in small, whose user has a shell with HF_ENDPOINT in it."""

    def __init__(self, hub: Hub, name: str) -> None:
        super().__init__(name)
        self.hub = hub
        card = reference.write_card(RUNS / f"{name}.card.json")
        self.config = reference.write_config(
            hub, RUNS / f"{name}.config.yaml", **{"check_sarm.card": str(card)}
        )
        self.dir = RunDir(self.path, load_config(self.config))
        self.profile = self.write_profile("site")

    def write_profile(self, name: str, **ppo: Any) -> Path:
        """A site that fetches on its login node, whose PPO jobs ask for something else."""
        tree = yaml.safe_load((CLUSTERS / "development.yaml").read_text()) | {"fetch": "login"}
        tree["phases"]["ppo"] |= ppo
        path = RUNS / f"{self.path.name}.{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def by(
        self, target: str, *more: str, profile: Path | None = None, token: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A target of make, typed by the user."""
        shell = [f"HF_ENDPOINT={self.hub.endpoint}", *([f"HF_TOKEN={token}"] if token else [])]
        named = [f"CLUSTER={profile or self.profile}", f"CONFIG={self.config}", f"RUN={self.path}"]
        make = ["make", "--no-print-directory", target, *named, *more]
        return inside("env", *shell, *make, check=False)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one error of a command that was refused."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stdout + done.stderr
    return errors[0]


@pytest.fixture(scope="session")
def reference_run(no_runs: None) -> Iterator[ReferenceRun]:
    """The run, not begun, and its hub, which stays up until the last test."""
    with Hub() as hub:
        reference.publish(hub)
        yield ReferenceRun(hub, "reference")


def test_three_commands_send_the_run_and_refuse_what_would_stop_it_later(
    reference_run: ReferenceRun,
) -> None:
    run = reference_run
    assert "is gated and there is no token" in sentence(run.by("fetch"))
    assert "make fetch" in sentence(run.by("submit-all"))
    fetched = run.by("fetch", token=reference.TOKEN)
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr
    doctor = run.by("doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr

    other = json.loads(Path(run.dir.config.check_sarm.card or "").read_text()) | {"k": 192}
    (RUNS / "other.card.json").write_text(json.dumps(other))
    said = sentence(run.by("submit-all", f"check_sarm.card={RUNS / 'other.card.json'}"))
    assert f"has k {reference.K} where its own figures says 192" in said
    without_gpus = run.write_profile("without", partition="cpu")
    said = sentence(run.by("submit-all", profile=without_gpus))
    assert "Slurm would refuse the ppo jobs" in said
    assert not run.queued() and run.dir.manifest("encode", "shard-0000-of-0001") is None

    sent = run.by("submit-all")
    assert sent.returncode == 0, sent.stdout + sent.stderr


def test_its_report_says_what_was_opened_and_stands_beside_the_seeds(
    reference_run: ReferenceRun,
) -> None:
    """Other tests may have run meanwhile."""
    run, hub = reference_run, reference_run.hub
    assert run.jobs, "it was not sent"
    run.wait()
    assert "undone" not in run.attempts().values(), run.status()
    report, figures = run.report(), json.loads((run.path / "report.json").read_text())
    assert "none: every phase is done" in report
    assert f"Policy Model: {reference.POLICY}" in report
    check = run.dir.read("check_sarm").json("check.json")
    assert check["verdict"] == "as published" and len(check["rows"]) > 20
    manifest = run.dir.manifest("ppo", PENALTY)
    assert manifest is not None and manifest.more["ranks"] == 4
    images = {u: run.dir.read(u).manifest.image_sha256 for u in ("fetch", "select", "report")}
    assert images["fetch"] == images["select"] != images["report"], images
    policy = hub.repositories[f"models/{reference.POLICY}"]
    commits = {entry["repository"]: entry for entry in figures["provenance"]["commits"]}
    assert commits[reference.POLICY] == {
        "repository": reference.POLICY,
        "revision": "main",
        "commit": policy.commit,
    }
    told = f"{reference.POLICY}: commit {policy.commit}, where main stood"
    assert told in " ".join(report.split())
    assert {"allenai/reward-bench-2", "Anthropic/hh-rlhf", hub.raw_url} < set(commits)
    assert len(figures["seed"]["latents"]) == 20, "the seed's report is not beside it"
    with_token = inside("grep", "-rlF", reference.TOKEN, str(STATE / "home"), check=False)
    assert not with_token.stdout, "the token was written down"
    assert hub.bearers("/store/") == {None}
