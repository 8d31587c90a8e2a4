"""What a submission refuses before it begins: one clear sentence, exit code 2, nothing submitted,
nothing left behind.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sarm.config import ROOT, load_config
from sarm.records import Models, SarmCard
from sarm.run import Attempt, RunDir, git_commit
from slurm import images
from tests.fakes.site import CONFIG, PROFILE, Site, batch_of


@pytest.fixture
def refused(site: Site, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Submit, and return the one sentence of the refusal; fails where anything was submitted or
    printed besides.
    """

    def refusal(*more: str) -> str:
        assert site.submit(*more) == 2
        shown = capsys.readouterr()
        assert not site.jobs and not shown.out
        errors = [line for line in shown.err.splitlines() if not line.startswith("warning: ")]
        assert len(errors) == 1 and errors[0].startswith("error: ")
        return errors[0]

    return refusal


def test_an_unknown_profile_key(site: Site, refused) -> None:  # type: ignore[no-untyped-def]
    site.profile.write_text(PROFILE + "partitoin: x\n")
    assert "partitoin: unknown key" in refused()


def test_a_profile_that_is_not_there(site: Site, refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    site.profile = tmp_path / "none.yaml"
    assert "copy slurm/clusters/generic.yaml" in refused()


def test_a_missing_image_of_a_new_run_leaves_no_run(site: Site, refused) -> None:  # type: ignore[no-untyped-def]
    shutil.rmtree(site.path)
    site.profile.write_text(PROFILE + "container: {image: outputs/images/none.sif}\n")
    assert "make images" in refused()
    assert not site.path.exists()


def test_unfetched_models_of_a_new_run_leave_no_run(site: Site, refused) -> None:  # type: ignore[no-untyped-def]
    shutil.rmtree(site.path)
    assert "make fetch" in refused()
    assert not site.path.exists()


def test_a_sarm_of_other_sizes_than_its_card(site: Site, refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    card = tmp_path / "card.json"
    SarmCard(source="its card", d_sae=64, k=8).write(card)
    site.config.write_text(f"{CONFIG}check_sarm: {{card: {card}}}\n")
    run = RunDir.create(tmp_path / "fetched", load_config(site.config))
    model = {"model": "s", "revision": None, "commit": None, "path": str(tmp_path), "sha256": {}}
    sarm = model | {"sizes": {"d_sae": 64, "k": 9, "layers": 2}}
    data = {"files": {}, "prompts": {}, "pairs": {}, "skipped": {}}
    attempt = Attempt(run, "fetch")
    Models(policy=model, sarm=sarm, data=data).write(attempt.path("models.json"))
    attempt.publish()
    site.path = run.path
    assert "s has k 9 where its card says 8, so it is another SARM" in refused()
    assert "correct it" in refused(f"check_sarm.card={tmp_path / 'none.json'}")
    (tmp_path / "card.json").rename(tmp_path / "moved.json")
    assert site.submit("check_sarm.card=own") == 0, "a SARM without a card has nothing to say"


def test_a_partition_slurm_does_not_know_is_found_by_test_only_without_dependencies(
    site: Site, refused
) -> None:  # type: ignore[no-untyped-def]
    site.fault(unknown_partition=True)
    assert "invalid partition" in refused()
    asked = site.state["test_only"]
    assert asked and not any("dependency" in text for text in asked)


def test_a_controller_that_is_down(site: Site, refused) -> None:  # type: ignore[no-untyped-def]
    site.fault(deaf=["sbatch"])
    assert "the controller may be down" in (said := refused()) and "profile" not in said


def test_an_array_longer_than_slurm_takes(site: Site, refused) -> None:  # type: ignore[no-untyped-def]
    site.profile.write_text(PROFILE.replace("max_array_size: 2", "max_array_size: 5"))
    site.fault(max_array_size=4)
    assert (
        "probe jobs: sbatch failed: allocation failure: Invalid job array" in (said := refused())
        and "lower max_array_size" in said
    )


@pytest.mark.parametrize("name", ["a:b", "a,b", "50%done", "a\nb", "it's"])
def test_a_run_whose_path_slurm_or_apptainer_misreads(site: Site, refused, name: str) -> None:  # type: ignore[no-untyped-def]
    site.path = site.path.parent / name
    assert "misreads in a path" in refused()
    assert not site.path.exists()


def test_the_run_of_somebody_else(site: Site, refused, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(os, "getuid", lambda: site.path.stat().st_uid + 1)
    assert "belongs to another user" in refused()


def test_a_run_that_everybody_may_write(site: Site, refused) -> None:  # type: ignore[no-untyped-def]
    site.path.chmod(0o777)
    assert "chmod o-w" in refused()


def test_a_config_that_differs_from_the_runs(site: Site, refused) -> None:  # type: ignore[no-untyped-def]
    assert "a run of the config 'dag'" in refused("name=other")


def test_a_file_where_a_folder_should_be(site: Site, refused) -> None:  # type: ignore[no-untyped-def]
    (site.path / "submit.lock").write_text("a file stands where the lock goes")
    assert "submit.lock" in refused()


def test_no_slurm_here(site: Site, refused, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "sbatch is not on PATH" in refused()


@pytest.mark.parametrize(
    ("enforce", "unchecked"), [("none", True), ("associations,limits,qos", False)]
)
def test_account_and_qos_are_unchecked_where_nobody_enforces_them(
    site: Site, capsys: pytest.CaptureFixture[str], enforce: str, unchecked: bool
) -> None:
    site.profile.write_text(PROFILE + "account: nobody\nqos: high\n")
    site.fault(enforce=enforce)
    assert site.submit() == 0
    assert ("account nobody, QOS high went unchecked" in capsys.readouterr().err) == unchecked


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sarm-light-KEY.sif", "same contents"),
        ("sarm-light-0123456789ab.sif", "make images builds a new one"),
        ("sarm.sif", "does not say"),
    ],
)
def test_an_image_of_another_commit_is_warned_of_and_recorded(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    key = subprocess.run(
        [ROOT / "containers" / "build", "--key", "light"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    image = tmp_path / name.replace("KEY", key)
    image.write_bytes(b"sif")
    first = subprocess.run(
        ["git", "-C", str(ROOT), "rev-list", "--max-parents=0", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[0]
    image.with_name(f"{image.name}.commit").write_text(first)
    site.profile.write_text(PROFILE + f"container: {{image: {image}}}\n")
    assert site.submit() == 0
    warned = capsys.readouterr().err
    assert first[:12] in warned and (git_commit() or "")[:12] in warned and says in warned
    assert images.built_from(image) == first
    encode = next(job["text"] for job in site.jobs.values() if batch_of(job) == "encode")
    assert f"export SARM_IMAGE_COMMIT={first}" in encode
    assert (
        "export SARM_IMAGE_SHA256="
        + "".join(
            subprocess.run(
                ["sha256sum", str(image)], capture_output=True, text=True
            ).stdout.split()[0]
        )
        in encode
    )


def test_an_image_of_this_commit_is_not_warned_of(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "sarm.sif"
    image.write_bytes(b"sif")
    image.with_name("sarm.sif.commit").write_text((git_commit() or "").rstrip("+"))
    site.profile.write_text(PROFILE + f"container: {{image: {image}}}\n")
    assert site.submit() == 0
    assert "commit" not in capsys.readouterr().err


def test_a_base_image_without_a_digest_is_refused() -> None:
    for base in ("debian:12", "debian@sha256:abc", "debian:12@sha256:" + "0" * 64 + " --x"):
        done = subprocess.run(
            ["bash", str(ROOT / "containers" / "build"), "light"],
            env={**os.environ, "BASE": base},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and "names no digest" in done.stderr


def test_a_reader_that_has_gone_is_nothing_to_speak_of(site: Site) -> None:
    words = [
        sys.executable,
        "-m",
        "slurm.submit",
        "--cluster",
        str(site.profile),
        "--config",
        str(site.config),
        "--run",
        str(site.path),
        "--dry-run",
    ]
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(words)} | true"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""


def test_the_traceback_is_there_for_those_who_ask(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.path.chmod(0o777)
    assert site.submit() == 2 and "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("SARM_TRACEBACK", "1")
    assert site.submit() == 2 and "Traceback" in capsys.readouterr().err
