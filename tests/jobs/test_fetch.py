"""Fetching as each profile says, from a gated hub on loopback: the token is used here alone and
written nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sarm.config import ROOT
from slurm import doctor, fetch, submit
from slurm.images import token_file
from slurm.profile import Profile
from slurm.script import environment, script
from tests import tiny
from tests.fakes.hub import Hub
from tests.fakes.site import CANARY, CONFIG, PROFILE, Site, batch_of


def policy_and_sarm(folder: Path) -> dict[str, bytes]:
    """The files of a model that serves as both: a SARM's layers are those of a policy."""
    state = load_file(tiny.write_tiny_policy(folder / "policy") / "model.safetensors")
    sarm = tiny.write_tiny_sarm(folder / "sarm")
    state |= {
        name: tensor
        for name, tensor in load_file(sarm / "model.safetensors").items()
        if name.startswith(("sae.", "score."))
    }
    save_file(state, sarm / "model.safetensors", metadata={"format": "pt"})
    return {file.name: file.read_bytes() for file in sarm.iterdir()}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Serves o/m to bearers of the canary alone."""
    with Hub() as hub:
        hub.add("o/m", policy_and_sarm(tmp_path / "served"), gated=True)
        hub.tokens[CANARY] = {"o/m"}
        yield hub


@pytest.fixture
def commit(hub: Hub) -> str:
    return hub.repositories["models/o/m"].commit


@pytest.fixture
def gated(site: Site, hub: Hub, commit: str, tmp_path: Path, monkeypatch: Any) -> Site:
    """A site whose run, not begun, wants the gated model."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    site.config.write_text(
        CONFIG.replace("{model: p}", f"{{model: o/m, revision: {commit}}}").replace(
            "{model: s}", f"{{model: o/m, revision: {commit}}}"
        )
    )
    site.path = tmp_path / "gated"
    return site


def arguments(site: Site) -> list[str]:
    return ["--cluster", str(site.profile), "--config", str(site.config), "--run", str(site.path)]


def holds_canary(*folders: Path) -> list[Path]:
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and CANARY.encode() in path.read_bytes()
    ]


def test_on_the_login_node_the_token_opens_the_gate_and_is_written_nowhere(
    gated: Site, hub: Hub, commit: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And by hand a run records what lies in the cache then."""
    assert fetch.main(arguments(gated)) == 0
    assert CANARY in hub.bearers("/o/m/resolve/")
    shown = capfd.readouterr()
    assert CANARY not in shown.out + shown.err
    models = json.loads(next((gated.path / "fetch" / "all").glob("models.*.json")).read_text())
    assert models["policy"]["commit"] == commit and (tmp_path / "hf" / "hub").is_dir()
    assert submit.main(arguments(gated)) == 0
    assert any(batch_of(job) == "report" for job in gated.jobs.values())
    assert not holds_canary(gated.path, tmp_path / "hf", tmp_path / "cache")
    assert not any(CANARY in job["text"] for job in gated.jobs.values())

    (gated.path / "fetch" / "all" / "manifest.json").unlink()
    hub.asked.clear()
    gated.profile.write_text(PROFILE + "fetch: by-hand\n")
    assert fetch.main(arguments(gated)) == 0
    assert not hub.asked


def test_without_a_token_the_gate_is_named(
    gated: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert fetch.main(arguments(gated)) == 2
    assert "gated" in capfd.readouterr().err


def test_as_a_job_fetch_comes_first_and_finds_the_token_in_its_file_alone(
    gated: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    gated.profile.write_text(PROFILE + "fetch: job\n")
    assert submit.main(arguments(gated)) == 0
    assert str(token_file()) in capfd.readouterr().err, (
        "the shell's token is not passed on, which is said"
    )
    jobs = {batch_of(job): (id_, job) for id_, job in gated.jobs.items()}
    assert jobs["encode"][1]["dependency"] == f"afterok:{jobs['fetch'][0]}"
    assert (
        "HF_HUB_OFFLINE" not in jobs["fetch"][1]["text"]
        and f"HF_HOME={token_file().parent}" in jobs["fetch"][1]["text"]
    )
    for name, (_, job) in jobs.items():
        assert CANARY not in job["text"] and "--export=NONE" in job["text"]
        if name != "fetch":
            assert "export HF_HUB_OFFLINE=1" in job["text"] and "HF_HOME" not in job["text"]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("policy.model=no/such/folder", "no folder here"),
        ("evaluate.judge={model: nowhere, labels: {bad: harm}}", "'nowhere' is no folder"),
        ("data.sources.demo.path=no/data", "no/data does not exist"),
    ],
)
def test_what_no_fetch_job_could_bring_is_refused_before_it_is_sent(
    gated: Site, capfd: pytest.CaptureFixture[str], key: str, says: str
) -> None:
    gated.profile.write_text(PROFILE + "fetch: job\n")
    assert submit.main([*arguments(gated), key]) == 2
    assert says in capfd.readouterr().err and not gated.jobs
    assert doctor.main([*arguments(gated), key]) == 2
    assert says in capfd.readouterr().out


def test_make_fetch_submits_the_job_where_the_profile_says_so(
    gated: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    gated.profile.write_text(PROFILE + "fetch: job\n")
    token_file().parent.mkdir()
    token_file().write_text("x")
    token_file().chmod(0o644)
    assert fetch.main(arguments(gated)) == 0
    assert [batch_of(job) for job in gated.jobs.values()] == ["fetch"]
    assert "chmod 600" in capfd.readouterr().err


def test_by_hand_says_what_to_bring(
    gated: Site, hub: Hub, commit: str, capfd: pytest.CaptureFixture[str]
) -> None:
    gated.profile.write_text(PROFILE + "fetch: by-hand\n")
    assert fetch.main(arguments(gated)) == 2
    told = capfd.readouterr().err
    assert f"hf download o/m --revision {commit}" in told and not hub.asked, "no network is touched"
    assert submit.main(arguments(gated)) == 2
    assert "make fetch" in capfd.readouterr().err


def test_only_fetch_sees_a_network_and_a_writable_cache(site: Site, tmp_path: Path) -> None:
    profile = Profile.model_validate({"description": "x", "container": {"image": "i.sif"}})
    for phase in ("fetch", "encode", "report"):
        text = script(profile, phase, "x")  # type: ignore[arg-type]
        assert (
            "HF_HUB_OFFLINE=1" in text
            and "unset HF_TOKEN" in text
            and '"$HF_HUB_CACHE:$HF_HUB_CACHE:ro"' in text
        ) == (phase != "fetch")
        assert ("HF_HUB_OFFLINE" in environment(profile, phase, {})) == (phase != "fetch")  # type: ignore[arg-type]
    for path in ("hf/hub", "cache"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "sarm.sif").write_text("")
    site.profile.write_text(PROFILE + f"container: {{image: {tmp_path / 'sarm.sif'}}}\n")
    assert site.submit() == 0
    line: Any = next(
        line
        for job in site.jobs.values()
        if batch_of(job) == "encode"
        for line in job["text"].splitlines()
        if line.startswith("srun")
    )
    assert (
        f"--bind {tmp_path}/hf/hub:{tmp_path}/hf/hub:ro" in line
        and f"--bind {tmp_path}/cache:{tmp_path}/cache:ro" in line
    )
    assert f"--bind {ROOT} " in line and f"--bind {site.path} " in line
