"""The sbatch file that serves a reward, read and run with a pretended srun."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sarm.config import ROOT
from slurm.profile_file import load_profile
from slurm.serve import serve_script

SRUN = """#!/bin/bash
printf '%s\\n' "$@" >{out}/arguments
stat -c '%a' "$PWD/runs/a run/serving/token" >{out}/mode
[ "$SARM_REWARD_TOKEN" = "$(cat "$PWD/runs/a run/serving/token")" ] && echo same >{out}/token
exit 7
"""


def test_the_checked_in_file_is_the_generic_profiles() -> None:
    text = (ROOT / "slurm" / "serve.sbatch").read_text()
    assert text == serve_script(load_profile("generic"), "generic")
    assert "#SBATCH --gres=gpu:1\n" in text and "#SBATCH --signal=TERM@60\n" in text


@pytest.mark.parametrize("given", ["", "a token of the user's own"])
def test_the_job_makes_a_token_and_serves_the_run(given: str, tmp_path: Path) -> None:
    profile = load_profile("generic").model_copy(update={"container": None})
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN.format(out=tmp_path))
    srun.chmod(0o755)
    run = tmp_path / "runs" / "a run"
    (run / "serving").mkdir(parents=True)
    (run / "config.yaml").touch()
    elsewhere = tmp_path / "elsewhere"
    (run / "serving" / "token").symlink_to(elsewhere)
    env = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "RUN": "runs/a run",
    }
    if given:
        env |= {"SARM_REWARD_TOKEN": given, "CONFIG": "c.yaml"}
    text = serve_script(profile, "generic")
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=env)
    assert done.returncode == 2 and f"{tmp_path} is not the checkout" in done.stderr
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "entry.py").touch()
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=env)
    assert done.returncode == 7, done.stderr
    words = (tmp_path / "arguments").read_text().splitlines()
    at = words.index("serving")
    config = ["--config", "c.yaml"] if given else []
    assert words[at + 1 :] == [
        *("--address-file", "runs/a run/serving/url"),
        *config,
        *("--run", "runs/a run", "serve.host=0.0.0.0", "serve.port=0"),
    ]
    assert (tmp_path / "mode").read_text() == "600\n"
    assert (tmp_path / "token").read_text() == "same\n" and not elsewhere.exists()
    assert not (run / "serving" / "token").exists(), "it means nothing once the server is gone"
    assert given not in " ".join(words) or not given
