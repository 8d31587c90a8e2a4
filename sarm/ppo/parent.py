"""The finished run that training goes on from, as a new one (`ppo.continue_from`).

    parent = parent_of(config, unit)  # None where the config names none
    loaded = parent.loaded(verify=True)  # weights, optimizer state, progress: a checkpoint

Only more steps, another learning rate and what changes no step may differ between the two. The
parent is read, never written: its state is the checkpoint that it published at its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sarm.config import ROOT, Config, UserError
from sarm.config.reads import changed
from sarm.pinned import pinned
from sarm.ppo.learner import checkpoint
from sarm.records import Calibration
from sarm.run import Published, RunDir, file_sha256, listed

MAY_DIFFER = (
    "ppo.continue_from",
    "ppo.keep_state",
    "ppo.steps",
    "ppo.learning_rate",
    "ppo.value_learning_rate",
    "ppo.lr_schedule",
    "ppo.warmup_steps",
    "ppo.kl_distances",
    "ppo.stop_at_kl",
    "ppo.held_out",
    "ppo.log_to",
    "ppo.checkpoint_every",
    "ppo.keep_last",
    "ppo.unreadable",
    "select.unconfirmed",
    "ppo.micro_batch_tokens",
    "ppo.gradient_checkpointing",
    "ppo.zero_stage",
    "ppo.weights",
)
"""What a run may have otherwise than its parent: the length, the rates, what is seen, machinery."""


class Parent(NamedTuple):
    run: RunDir
    published: Published
    manifest_sha256: str

    @property
    def folder(self) -> Path:
        """The unit's."""
        return self.published.folder

    @property
    def manifest_file(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def steps(self) -> int:
        return int(self.published.manifest.more["steps"])

    def told(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "run": str(self.run.path),
            "unit": self.published.manifest.unit,
            "steps": self.steps,
            "manifest_sha256": self.manifest_sha256,
        }

    def holds(self, checkpoint_folder: Path) -> bool:
        return self.folder in checkpoint_folder.parents

    def loaded(self, *, verify: bool) -> checkpoint.Loaded:
        """Its last state; with `verify` after every file was hashed. Raises UserError where it kept
        none.
        """
        manifest = self.published.manifest.outputs.get(f"state/{checkpoint.MANIFEST}")
        if manifest is None:
            raise UserError(
                f"{self.folder} kept no optimizer state to go on from; train it again with"
                " ppo.keep_state=true"
            )
        if verify:
            self.published.directory("state")
        return checkpoint.opened((self.folder / manifest.file).parent)

    def check_config(self, config: Config) -> None:
        """Raises UserError where it could not be the parent's training gone on with."""
        made = self.published.manifest.config or self.run.config.model_dump(mode="json")
        at_commits = changed("ppo", pinned(self.run).model_dump(mode="json"), config)
        keys = [
            key
            for key in changed("ppo", made, config)
            if not any(key == may or key.startswith(may + ".") for may in MAY_DIFFER)
            # a branch in its config, and the commit that this run's fetch found there, are one
            and (not key.endswith(".revision") or key in at_commits)
        ]
        if keys:
            raise UserError(
                f"ppo.continue_from: {self.run.path} was trained with another {listed(keys)}; only"
                " the steps, the learning rates and what changes no step may differ"
            )
        if config.ppo.steps <= self.steps:
            raise UserError(
                f"ppo.continue_from: {self.run.path} has made {self.steps} steps, and ppo.steps"
                f" {config.ppo.steps} counts them; raise it"
            )

    def check_penalty(self, penalty: Calibration) -> None:
        """Raises UserError where the unit penalises something else than the parent did."""
        theirs = Calibration.read(self.published.path("calibration.json"))
        if (theirs.penalised, theirs.reward_sd) != (penalty.penalised, penalty.reward_sd):
            raise UserError(
                f"ppo.continue_from: {self.run.path} penalised latents, thresholds or weights that"
                " are not this run's; copy its folders select and calibrate, and those they read,"
                " into this run"
            )


def parent_of(config: Config, unit: str) -> Parent | None:
    """None where the config names none. Raises UserError where the unit is not done there, or was
    trained otherwise.
    """
    if config.ppo.continue_from is None:
        return None
    run = RunDir.open(ROOT / Path(config.ppo.continue_from).expanduser())
    if problem := run.why_not_done("ppo", unit, hashes=False):
        raise UserError(
            f"ppo.continue_from: ppo/{unit} in {run.path} is not done: {problem}; finish it first"
        )
    published = run.read("ppo", unit)
    parent = Parent(run, published, file_sha256(published.folder / "manifest.json"))
    parent.check_config(config)
    return parent
