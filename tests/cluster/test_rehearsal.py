"""The reference run in small, from a gated hub to its report, by the three commands of
docs/reference-run.md on a real Slurm in real images: `make test-cluster`.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import reference
from tests.cluster.harness import RUNS, STATE, inside
from tests.cluster.reference_run import ReferenceRun

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (STATE / "pid").exists(), reason="no cluster is up; make test-cluster"),
]
PENALTY = "penalty-seed0"


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one error of a command that was refused."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stdout + done.stderr
    return errors[0]


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
