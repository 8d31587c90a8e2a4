"""Steer the reward model on the test part's fixed texts: `python -m jobs steer --config C --run
R`.

Needs no forward pass: encode kept every text's ranks. Publishes rows.parquet, pairs.parquet and
summary.json.
"""

from __future__ import annotations

from sarm.config import ROOT, Config
from sarm.data.datasets import load_data, pairs_in
from sarm.evaluation.reward_steering import describe, steering_rows, steering_summary
from sarm.probing.effects import read_encoded
from sarm.records import Features, Intervention, Steering
from sarm.reward_model.interventions import parse_steering
from sarm.run import Attempt, RunDir


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """The listed harming latents times 0, or what the config's steering file says. Raises
    UserError on a bad file.
    """
    features = Features.read(attempt.read("select").path("features.json"))
    encoded = read_encoded(attempt.read_shards("encode"))
    if config.steer.file is None:
        steps = parse_steering(features.steering_file)
    else:
        steps = parse_steering(ROOT / config.steer.file)
        attempt.note_file(ROOT / config.steer.file)
    rows, pairs = steering_rows(encoded, pairs_in(load_data(config.data), "test"), steps)
    labels = {name: source.label for name, source in config.data.sources.items()}
    summary = Steering(
        intervention=Intervention(
            what=describe(steps), latents=[step.latent for step in steps], file=config.steer.file
        ),
        reward_sd=features.reward_sd,
        **steering_summary(rows, pairs, labels, config.steer.bootstrap, config.seed),
    )
    rows.to_parquet(attempt.path("rows.parquet"), index=False)
    pairs.to_parquet(attempt.path("pairs.parquet"), index=False)
    summary.write(attempt.path("summary.json"))
    attempt.publish()
