"""Read the base policy's own responses before any training: `python -m jobs calibrate --config C
--run R` -> readings.json.

Stops, unless `calibrate.underpowered` is warn, where the planned evaluation would not detect the
change that the config asks for: before GPU-hours are spent.
"""

from __future__ import annotations

import sys

from sarm.config import Config, UserError
from sarm.data.datasets import load_data
from sarm.records import Features
from sarm.run import Attempt, RunDir


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Sample, score, publish."""
    import torch

    from sarm.evaluation.calibrate import calibrate
    from sarm.evaluation.readability import power_sentence, underpowered

    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = Features.read(attempt.read("select").path("features.json"))
    found = calibrate(config, features, load_data(config.data), device, attempt.progress)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if config.calibrate.underpowered == "stop" and underpowered(config, found):
        raise UserError(power_sentence(config, found))
    found.write(attempt.path("readings.json"))
    attempt.publish(device=device)
