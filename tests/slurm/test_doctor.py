"""A new user's first hour: each thing that is wrong on a cluster they do not know is one sentence
with what to do, exit code 2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from jobs import __main__ as jobs
from sarm.config import ROOT, UserError
from slurm import doctor
from tests.fakes.hub import Hub
from tests.fakes.site import CONFIG, PROFILE, Site
from tests.jobs.test_fetch import commit, gated, hub  # noqa: F401


def look(site: Site, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """What the doctor says; nothing is ever submitted or written."""
    before = sorted(site.path.rglob("*")) if site.path.exists() else None
    assert (
        doctor.main(
            ["--cluster", str(site.profile), "--config", str(site.config), "--run", str(site.path)]
        )
        == code
    )
    assert (
        not site.jobs and (sorted(site.path.rglob("*")) if site.path.exists() else None) == before
    )
    return capsys.readouterr().out


def wrong(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("wrong")]


def test_a_cluster_that_is_as_it_should_be(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.fault(**{"nvidia-smi": "580.65.06"})
    said = look(site, capsys, 0)
    assert (
        not wrong(said)
        and "ok        Slurm: it would take all 9 kinds of jobs" in said
        and "580.65.06" in said
    )
    assert said.splitlines()[-1].startswith("nothing to fix; next: make submit-all CLUSTER=")


@pytest.mark.parametrize(
    ("profile", "faults", "says"),
    [
        (
            "account: nobody\n",
            {
                "flags": {
                    "--account=nobody": "Invalid account or account/partition combination specified"
                }
            },
            "sacctmgr show assoc",
        ),
        (
            "qos: high\n",
            {"flags": {"--qos=high": "Invalid qos specification"}},
            "set qos in the profile",
        ),
        ("", {"unknown_partition": True}, "one that sinfo shows"),
        (
            "",
            {
                "flags": {
                    "--time=240": "Requested time limit is invalid (missing or exceeds some limit)"
                }
            },
            "lower time_min",
        ),
        ("", {"sinfo": "main|main*|(null)"}, "no node there has any; name a GPU partition"),
        (
            "",
            {"sinfo": "main|main*|gpu:h100:2(S:0-1)"},
            "ppo wants 4 h100 GPUs of partition main, and no node there has more than 2",
        ),
        (
            "pack: 8\n",
            {"sinfo": "main|main*|gpu:h100:4"},
            "encode wants 8 h100 GPUs of partition main, and no node there has more than 4",
        ),
        ("", {"max_array_size": 1}, "lower max_array_size"),
        (
            "",
            {"flags": {"--partition=main": "Unable to contact slurm controller (connect failure)"}},
            "the controller may be down, try again later",
        ),
        (
            "reservation: friday\n",
            {"flags": {"--reservation=friday": "Requested reservation is invalid"}},
            "scontrol show reservation",
        ),
        ("", {"nvidia-smi": "525.60.13"}, "needs 580 or newer"),
        ("container: {image: outputs/images/none.sif}\n", {}, "make images"),
    ],
)
def test_what_a_site_refuses(
    site: Site,
    capsys: pytest.CaptureFixture[str],
    profile: str,
    faults: dict[str, object],
    says: str,
) -> None:
    site.profile.write_text(PROFILE + profile)
    site.fault(**faults)
    found = wrong(look(site, capsys))
    assert len(found) == 1 and says in found[0]


def test_no_slurm_here(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "run this on a login node" in wrong(look(site, capsys))[0]


def test_a_disk_too_small_for_the_checkpoints(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**9, 10**9))
    site.config.write_text(
        CONFIG.replace("{model: p}", "{model: meta-llama/Llama-3.1-8B-Instruct, revision: main}")
    )
    site.path = site.path.parent / "new"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = look(site, capsys)
    # Two policies of 16.1 GB, and of each two checkpoints of its adapters and the state that stays,
    # 0.7 GB apiece.
    assert any("1.0 GB left for you and the run may need 36.1 GB" in line for line in wrong(said))


@pytest.mark.parametrize(
    ("used", "limit", "says"),
    [
        (99 * 10**9, 100 * 10**9, None),
        (100 * 10**9, 100 * 10**9, "used up"),
        (100 * 10**9 - 1024, 100 * 10**9, "may need"),
    ],
)
def test_a_quota(
    site: Site,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    used: int,
    limit: int,
    says: str | None,
) -> None:
    source = subprocess.run(
        ["df", "--output=source", str(site.path)], capture_output=True, text=True
    ).stdout.splitlines()[-1]
    site.fault(
        quota=(
            f"Disk quotas for user me (uid 1):\nFilesystem blocks quota limit grace\n{source}"
            f" {used // 1024}* {limit // 1024} 0 0 5 0 0 0"
        )
    )
    monkeypatch.setattr(doctor, "needed_bytes", lambda config, run: 1e6)
    found = wrong(look(site, capsys, 2 if says else 0))
    assert [says in line for line in found] == ([True] if says else [])


def test_no_token_for_a_gated_model(
    site: Site,
    gated: Site,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "gated", lambda model: True)
    monkeypatch.delenv("HF_TOKEN")
    assert "o/m is gated and there is no token" in wrong(look(gated, capsys))[0]
    monkeypatch.setenv("HF_TOKEN", "x")
    assert "run make fetch here" in wrong(look(gated, capsys))[0]
    gated.profile.write_text(PROFILE + "fetch: job\n")
    assert "put it into" in wrong(look(gated, capsys))[0], "a job is given no environment"


def test_the_hub_says_what_is_gated(
    gated: Site,  # noqa: F811
    hub: Hub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert doctor.gated("o/m") is True
    hub.add("o/open", {})
    assert doctor.gated("o/open") is False
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert doctor.gated("o/m") is None
    assert hub.bearers("/") == {None}, "no token is sent to ask"


def test_no_network(
    gated: Site,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached from here" in wrong(look(gated, capsys))[0]
    gated.profile.write_text(PROFILE + "fetch: job\n")
    assert "unchecked network" in look(gated, capsys, 0).replace("  ", " ")
    gated.profile.write_text(PROFILE + "fetch: by-hand\n")
    assert "make fetch says what to bring" in wrong(look(gated, capsys))[0]


def test_a_job_whose_gpus_torch_cannot_use_says_so_instead_of_working_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    jobs.check_gpu()  # a CPU build, as on the development cluster
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match="driver is too old"):
        jobs.check_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    jobs.check_gpu()


def test_running_out_of_gpu_memory_is_a_sentence(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def run_unit(*args: object, **more: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(jobs, "run_unit", run_unit)
    assert jobs.main(["ppo", "--run", str(site.path), "--unit", "penalty-seed1"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: ppo/penalty-seed1 ran out of GPU memory; lower ppo.micro_batch_tokens"
    )


@pytest.mark.parametrize(
    "words",
    [
        "slurm.submit --cluster nowhere --config configs/tiny.yaml --run RUN",
        "slurm.submit --config configs/none.yaml --run RUN",
        "slurm.doctor --config configs/tiny.yaml --run /proc/1/run",
        "slurm.fetch --cluster nowhere --config configs/tiny.yaml --run RUN",
        "slurm.local --config configs/tiny.yaml --run /dev/null/run",
        "slurm.sbatch --cluster nowhere",
        "slurm.status --run RUN",
        "slurm.watch --run RUN",
        "slurm.lock --run RUN",
        "jobs encode --run RUN",
        "jobs encode --config configs/tiny.yaml --run /dev/null/run",
        "jobs encode --config configs/tiny.yaml --run RUN --unit shard-9",
        "jobs encode --config configs/tiny.yaml --run RUN ppo.stepz=3",
    ],
)
def test_every_command_ends_a_users_mistake_in_one_sentence(words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", *words.replace("RUN", str(tmp_path / "run")).split()]
    env = {**os.environ, "PATH": "/usr/bin:/bin", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr
    assert (
        "Traceback" not in done.stderr
        and len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("error: ")
    )
