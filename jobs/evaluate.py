"""Evaluate one policy on its own generations: `python -m jobs evaluate --run R --unit base` (or
`penalty-seed0`, or an arm that nobody trains, such as `best_of_n`).

Publishes generations.parquet, one row per response to a held-out prompt, examples.json, what
watched latents do at every token of some of them, and summary.json, the settings behind it. A
trained unit's policies, the one at the end and those kept at KL distances, are all evaluated here,
and the column `distance` tells them apart. The unit `steered`, where the config asks for it
(`steer.policy`), has a row per direction and prompt, and what each direction changed.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from sarm.config import ROOT, Config, arm_and_seed
from sarm.data.datasets import load_data, prompts_in
from sarm.evaluation.early import check_labels
from sarm.evaluation.evaluate import evaluation_prompts, policy_rows
from sarm.hub import local_model
from sarm.records import Evaluation, Features, KeptPolicies, KeptPolicy, Readings, Steered
from sarm.run import Attempt, RunDir


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Generate, score, publish."""
    started = time.perf_counter()
    selected = Features.read(attempt.read("select").path("features.json"))
    features = Readings.read(attempt.read("calibrate").path("readings.json")).applied(selected)
    if unit == "steered":
        steer(config, features, attempt)
        return
    arm, _ = arm_and_seed(unit)
    trained = unit in config.units("ppo")
    kept: list[KeptPolicy] = []
    if trained:
        published = attempt.read("ppo", unit)
        if "kept.json" in published.manifest.outputs:
            kept = KeptPolicies.read(published.path("kept.json")).kept
        policies: list[tuple[float, Path]] = [(math.nan, published.directory("policy"))]
        policies += [(one.distance, published.directory(one.path)) for one in kept]
    else:
        policies = [(math.nan, local_model(config.policy.model, config.policy.revision))]
    prompts = evaluation_prompts(prompts_in(load_data(config.data), "policy_eval"), config.evaluate)
    check_labels(config.evaluate)
    if config.evaluate.refusal_labels is not None:
        attempt.note_file(ROOT / config.evaluate.refusal_labels)
    table, settings, examples = policy_rows(
        config, policies, prompts, features, arm=arm, progress=attempt.progress
    )
    if settings["judge_problem"]:
        print(f"warning: harm is not judged: {settings['judge_problem']}", file=sys.stderr)
    table.to_parquet(attempt.path("generations.parquet"), index=False)
    examples.write(attempt.path("examples.json"))
    n_prompts = int(table["prompt_id"].nunique())
    Evaluation(
        policy=unit,
        n_prompts=n_prompts,
        n_too_long=len(prompts) - n_prompts,
        kept=kept,
        seconds=round(time.perf_counter() - started, 1),
        **settings,
    ).write(attempt.path("summary.json"))
    attempt.progress(len(table), len(table), "prompts")
    attempt.publish(device=settings["device"], sarm_parameters=settings["sarm_parameters"])


def steer(config: Config, features: Features, attempt: Attempt) -> None:
    """The base policy, pushed along decoder directions: here and not in steer, as it generates and
    wants what evaluate wants.
    """
    from sarm.evaluation.policy_steering import steered_rows, steered_summary

    policy = local_model(config.policy.model, config.policy.revision)
    prompts = evaluation_prompts(prompts_in(load_data(config.data), "policy_eval"), config.evaluate)
    table, settings = steered_rows(config, policy, prompts, features, attempt.progress)
    table.to_parquet(attempt.path("generations.parquet"), index=False)
    rows = steered_summary(table, config.steer.bootstrap, config.seed)
    Steered(rows=rows, **settings).write(attempt.path("summary.json"))
    attempt.publish(device=settings["device"])
