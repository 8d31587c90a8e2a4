"""What the reference report lacks, a function a section: figures -> blocks, read by the text and
by the page alike.

To add one: write its function, name it in `SECTIONS`, and give its figures a key in
`reports.figures.figures`. A plot of the same id in `reports.plots.PLOTS` is drawn beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from reports.beside import cost, opened
from reports.blocks import Block
from reports.calibration import calibration
from reports.policy_sections import changes, latents, policy_evaluation, steered, training, verdict
from reports.probe_sections import cards, features, rankings, steering
from reports.run_sections import failures, phases, provenance
from reports.seed import beside_seed
from reports.sweep_sections import distances, sweep
from reports.validity_sections import trust


class Section(NamedTuple):
    """A section of either report; `id` is its anchor on the page and its plots' name."""

    id: str
    title: str
    blocks: Callable[[dict[str, Any]], list[Block]]
    note: str = ""

    @property
    def heading(self) -> str:
        """As the text has it."""
        return self.title.upper() + (f" ({self.note})" if self.note else "")


SECTIONS = (
    Section("calibration", "Calibration", calibration, "the base policy's own responses"),
    Section("verdict", "Verdict", verdict),
    Section("failures", "Failed and missing parts", failures),
    Section(
        "evaluation", "Policy evaluation", policy_evaluation, "own generations on held-out prompts"
    ),
    Section("changes", "Changes against the no-penalty arm", changes),
    Section("distances", "Policies by KL distance", distances),
    Section("latents", "Penalised and monitor latents in the generations", latents),
    Section("training", "Training, all arms", training),
    Section("sweep", "Penalised rate against reward, KL and over-refusal", sweep),
    Section("seed", "Beside the seed report", beside_seed),
    Section("opened", "The SARM beside its card", opened),
    Section("features", "Features: effects on held-out prompts", features),
    Section("trust", "Validity checks", trust),
    Section("rankings", "Features: rankings compared", rankings),
    Section("cards", "Latent cards", cards),
    Section("steering", "Steering: intervals, margins and ranking", steering),
    Section("steered", "Steering the policy", steered, "approximate"),
    Section("cost", "Cost", cost, "planned against used"),
    Section("phases", "Pipeline status", phases),
    Section("provenance", "Provenance", provenance),
)
