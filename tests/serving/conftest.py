"""The servers and the scorer that the tests in this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sarm.config import ROOT, load_config
from tests.serving.servers import TOKEN, Server, settings


@pytest.fixture(scope="module")
def server(tiny_policy: Path, tiny_sarm: Path, tmp_path_factory: Any) -> Iterator[Server]:
    """With a token and room for eight conversations."""
    more = ["serve.max_queue=8", "serve.max_request=600", "serve.max_body_mib=8"]
    one = Server(
        tmp_path_factory.mktemp("server"), [*settings(tiny_policy, tiny_sarm), *more], TOKEN
    )
    yield one
    one.stop()


@pytest.fixture(scope="session")
def scorer(tiny_policy: Path, tiny_sarm: Path) -> Any:
    """Of the same reward, in this process."""
    from serving.scorer import open_scorer

    return open_scorer(
        load_config(ROOT / "configs" / "tiny.yaml", settings(tiny_policy, tiny_sarm)), None
    )
