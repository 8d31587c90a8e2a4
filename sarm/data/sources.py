"""Where a data source's files lie on this machine: a path, the hub's cache, or the files of a
repository's commit in a cache of our own.

    files = source_files(name, source)                  # asks no network
    files = source_files(name, source, download=True)   # in fetch

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from sarm.config import ROOT, SourceConfig, UserError
from sarm.config.base import cache_folder
from sarm.data.files import SUFFIXES
from sarm.run import file_sha256, fsync_dir

NETWORK_S = 60.0
"""How long a server may be silent."""


def source_files(name: str, source: SourceConfig, *, download: bool = False) -> list[Path]:
    """The local files of a source, fetched where it has no path. Raises UserError."""
    if source.repo is not None:
        return hub_files(name, source, download=download)
    if source.url is not None:
        return repository_files(name, source, download=download)
    assert source.path is not None
    path = ROOT / source.path
    if not path.exists():
        raise UserError(
            f"data source {name}: {path} does not exist; correct data.sources.{name}.path"
        )
    if path.is_file():
        return [path]
    files = [path / file for file in source.files] or sorted(
        p
        for p in path.rglob("*")
        if p.name.endswith(SUFFIXES)
        and p.is_file()
        # an editor's copies, such as .ipynb_checkpoints
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    if not files:
        raise UserError(
            f"data source {name}: {path} holds no file that ends in {', '.join(SUFFIXES)}"
        )
    return files


# A repository at a commit


def repository_folder(source: SourceConfig) -> Path:
    """Where the files of a source with `url` lie, by their paths in the repository: what a clone
    at that commit would hold.
    """
    return cache_folder() / "data" / str(source.revision)


def repository_files(name: str, source: SourceConfig, *, download: bool) -> list[Path]:
    """The files of a repository's commit, each of the SHA-256 that the config gives, fetched with
    `download` where they are not there. Raises UserError.
    """
    folder = repository_folder(source)
    files = []
    for file, sha256 in source.sha256.items():
        path = folder / file
        if not path.is_file():
            if not download:
                raise UserError(
                    f"data source {name}: {path} is not there; run make fetch where there is a"
                    f" network, or lay {file} of commit {source.revision} there by hand"
                )
            _fetch_file(name, source, file, path)
        elif file_sha256(path) != sha256:
            raise UserError(
                f"data source {name}: {path} is not {file} of commit {source.revision}: its SHA-256"
                f" is another than data.sources.{name}.sha256 says; remove it and run make fetch"
                " again"
            )
        files.append(path)
    return files


def file_url(source: SourceConfig, file: str) -> str:
    """The address of a file of the repository's commit."""
    assert source.url is not None
    return source.url.replace("{revision}", str(source.revision)).replace("{file}", file)


def _fetch_file(name: str, source: SourceConfig, file: str, path: Path) -> None:
    """Download one file and put it in place once its hash is right; two at once are safe. Raises
    UserError.
    """
    address = file_url(source, file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as scratch:
            part = Path(scratch) / path.name
            with (
                urllib.request.urlopen(address, timeout=NETWORK_S) as answer,
                open(part, "wb") as copy,
            ):
                shutil.copyfileobj(answer, copy)
                copy.flush()
                os.fsync(copy.fileno())
                promised = answer.headers.get("Content-Length")
            if promised is not None and part.stat().st_size < int(promised):
                raise OSError(f"it broke off after {part.stat().st_size} of {promised} bytes")
            found = file_sha256(part)
            if found != source.sha256[file]:
                raise UserError(
                    f"data source {name}: {address} has SHA-256 {found[:12]}... instead of"
                    f" {source.sha256[file][:12]}...; it is not the file that the config names"
                )
            os.replace(part, path)
        fsync_dir(path.parent)
    except urllib.error.HTTPError as error:
        raise UserError(
            f"data source {name}: {address} answers {error.code} {error.reason}; correct"
            f" data.sources.{name}"
        ) from None
    # no network, a broken connection, a full disk
    except (OSError, HTTPException) as error:
        raise UserError(
            f"data source {name}: {address} could not be fetched ({' '.join(str(error).split())});"
            f" run make fetch where there is a network, or lay {file} of commit {source.revision}"
            f" by hand as {path}"
        ) from None


# The hub


def hub_files(name: str, source: SourceConfig, *, download: bool) -> list[Path]:
    """The files of a hub data set at its revision, from the cache or, with `download`, over the
    network. Raises UserError.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    assert source.repo is not None
    where = f"data source {name}: {source.repo} at {source.revision}"
    try:
        if download:
            return [
                Path(
                    hf_hub_download(
                        source.repo, file, repo_type="dataset", revision=source.revision
                    )
                )
                for file in source.files
            ]
        # Not hf_hub_download with local_files_only, which may ask the hub what program it runs
        # under.
        cached = [
            try_to_load_from_cache(source.repo, file, repo_type="dataset", revision=source.revision)
            for file in source.files
        ]
    except LocalEntryNotFoundError:
        raise UserError(
            f"{where}: the hub could not be reached; check the network and HF_ENDPOINT"
        ) from None
    # no such repository or file, a broken connection, a malformed name
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(f"{where} could not be fetched: {' '.join(str(error).split())}") from None
    found = [Path(file) for file in cached if isinstance(file, str)]
    if len(found) < len(cached):
        raise UserError(f"{where} is not in the cache; run make fetch where there is a network")
    return found
