"""The reference run in small on the development cluster, driven as its user would: the fixture
`reference_run`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from sarm.config import load_config
from sarm.run import RunDir
from slurm.profile_file import CLUSTERS
from tests import reference
from tests.cluster.harness import RUNS, ClusterRun, inside
from tests.fakes.hub import Hub


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
