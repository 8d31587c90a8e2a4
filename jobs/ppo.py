"""Train one arm with PPO: `python -m jobs ppo --run R --unit penalty-seed0`, by itself or on every
rank of srun or torchrun.

Reads select's features.json, calibrate's readings.json and the prompts of part `ppo`. Goes on from
the newest complete checkpoint under RUN/ppo/UNIT/checkpoints. On SIGTERM or SIGUSR2 it ends its
step, writes a checkpoint and exits with code 75, which means: start me again.
"""

from __future__ import annotations

import platform
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.ppo_log import Log
from sarm.config import Config, UserError, arm_and_seed
from sarm.config.reads import values_sha256
from sarm.data.datasets import load_data, prompts_in
from sarm.evaluation.verdict import rule_sha256
from sarm.records import Calibration, Features, RatedLatent, Readings
from sarm.run import Attempt, RunDir

STOPPED = 75
"""Exit code of a job that was asked to stop and can go on: EX_TEMPFAIL."""


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Train, then save the policy and publish from rank 0. Raises SystemExit(75) where asked to
    stop.
    """
    # From the first moment: a preemption while models are loading is no reason to die.
    with stop_signals() as stop_requested:
        train_and_publish(config, run, unit, attempt, stop_requested)


def train_and_publish(
    config: Config, run: RunDir, unit: str, attempt: Attempt, stop_requested: Callable[[], bool]
) -> None:
    from sarm.ppo.kept import Kept, remove_others
    from sarm.ppo.learner import checkpoint
    from sarm.ppo.learner.distributed import start_world
    from sarm.ppo.learner.export import (
        exported,
        rounding_warning,
        save_adapter,
        save_policy,
        try_export,
    )
    from sarm.ppo.loop import train, why_ended
    from sarm.probing.select import refuse_unconfirmed
    from sarm.probing.taus import swept

    # DeepSpeed and peft call torch and transformers by names that have just been deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning)
    arm, seed = arm_and_seed(unit)
    world = start_world()
    selected = Features.read(attempt.read("select").path("features.json"))
    calibrated = attempt.read("calibrate")
    readings = Readings.read(calibrated.path("readings.json"))
    if config.ppo.arms != ("no_penalty",) or config.sweep_points():
        refuse_unconfirmed(selected, config.select)
        refuse_unreadable(config, readings)
    features = readings.applied(selected)
    if point := config.sweep_points().get(unit):
        features = swept(features, point, config.ppo.penalty)
    readings_sha256 = calibrated.manifest.outputs["readings.json"].sha256
    made_with = f"{values_sha256('ppo', config)}/{readings_sha256}"
    trainer, source = make_trainer(config, features, seed, world)
    checkpoints = attempt.folder / "checkpoints"
    loaded = checkpoint.load(checkpoints, world=world, made_with=made_with)
    if world.rank == 0:
        attempt.progress(loaded.step if loaded else 0, config.ppo.steps, "step")
    actor = trainer.learner.actor
    if loaded is None:
        # What cannot be saved is known before it is trained. Beside the checkpoints, which go away.
        try_export(source, actor, trainer.tokenizer, config.policy.model, checkpoints, world)
    else:
        trainer.restore(loaded.state["trainer"], loaded)
    trainer.reward = reward_of(arm, trainer.reward, readings.random.get(str(seed), []))
    held_out = held_out_of(config, trainer, readings)
    log = kept = None
    if world.rank == 0:
        log = Log(config, unit, attempt, loaded.state["log"] if loaded else {})
        kept = Kept(attempt, loaded.state["kept"] if loaded else [])

    def save() -> Any:
        state = {
            "trainer": trainer.state(),
            "log": log.state if log else {},
            "kept": kept.state if kept else [],
        }
        step = trainer.progress.step
        return checkpoint.save(
            checkpoints,
            step,
            state,
            trainer.learner.pieces(),
            world=world,
            made_with=made_with,
            attempt=attempt.id,
            keep_last=config.ppo.keep_last,
        )

    def write_policy(found: Any, folder: Path, adapter: Path | None) -> None:
        save_policy(source, found.weights, trainer.tokenizer, folder)
        if adapter:
            save_adapter(actor, found.adapter, config.policy.model, adapter)

    def keep(distances: list[float]) -> None:
        found, progress = exported(actor, world), trainer.progress

        def write(folder: Path) -> None:
            write_policy(found, folder, folder / "adapter" if found.adapter else None)

        for distance in distances if kept else ():
            kept.add(distance, step=progress.step, kl=progress.drift.mean, write=write)

    def evaluate() -> None:
        assert held_out is not None
        found = held_out.evaluated()
        if log:
            log.write_held_out(trainer.progress.step, found)

    finished = train(
        trainer,
        save=save,
        log=log.write if log else lambda line: None,
        keep=keep,
        evaluate=evaluate if held_out else None,
        stop_requested=lambda: world.any(stop_requested()),
    )
    if not finished:
        raise SystemExit(STOPPED)
    found = exported(actor, world)
    names = world.gather_texts(device_name(world.device))
    if log and kept:
        log.close()
        adapter = attempt.directory("adapter") if found.adapter else None
        write_policy(found, attempt.directory("policy"), adapter)
        if told := rounding_warning(found.rounding, config.ppo.peak_learning_rate):
            print(f"warning: {told}", file=sys.stderr, flush=True)
        arm_penalty(arm, trainer.reward, readings).write(attempt.path("calibration.json"))
        if config.ppo.kl_distances:
            kept.publish()
        progress = trainer.progress
        published = attempt.publish(
            device=str(world.device),
            training_s=round(progress.training_s, 3),
            steps=progress.step,
            ended_early=(
                why_ended(config.ppo, progress) if progress.step < config.ppo.steps else None
            ),
            device_names=names,
            ranks=world.size,
            rule_sha256=rule_sha256(config),
            held_out=held_out.parts if held_out else None,
            bf16_rounding=None if found.rounding is None else found.rounding.told(),
        )
        shutil.rmtree(checkpoints, ignore_errors=True)
        remove_others(attempt.folder, published.manifest.attempt)
    world.barrier()


def make_trainer(config: Config, features: Features, seed: int, world: Any) -> Any:
    """(a trainer under the penalty arm's reward, the folder of the policy it starts from)."""
    from sarm.hub import local_model
    from sarm.models import check_policy_tokenizer, check_rotation, open_policy, read_tokenizer
    from sarm.ppo.reward import CompoundReward
    from sarm.ppo.trainer import Trainer
    from sarm.reward_model.model import load_sarm

    prompts = prompts_in(load_data(config.data), "ppo")
    if not prompts:
        raise UserError(
            "no source gives part ppo any prompts; give one a `ppo` fraction in data.sources"
        )
    sarm, sarm_tokenizer = load_sarm(config.sarm)
    reward = CompoundReward.from_features(
        sarm.to(world.device),
        sarm_tokenizer,
        features,
        config.ppo.penalty,
        config.sarm,
        all_reduce=world.sum,
    )
    source = local_model(config.policy.model, config.policy.revision)
    policy = open_policy(source, config.policy.dtype)
    tokenizer = read_tokenizer(source, config.policy.chat_template_kwargs)
    check_policy_tokenizer(policy, tokenizer, config.policy.model)
    check_rotation(
        policy.config, config.ppo.max_prompt_tokens + config.ppo.max_new_tokens, config.policy.model
    )
    return (
        Trainer(
            config.ppo,
            policy,
            tokenizer,
            reward,
            prompts,
            seed=seed,
            world=world,
            trim=config.responses.cut == "trim",
            base_reward_sd=features.reward_sd or 1.0,
        ),
        source,
    )


def held_out_of(config: Config, trainer: Any, readings: Readings) -> Any:
    """What evaluates the policy in training; None where it is not asked for."""
    from sarm.evaluation.held_out import HeldOut
    from sarm.ppo.reward import Penalised

    if not config.ppo.held_out.every:
        return None
    monitors = [Penalised(m.latent, m.tau, 0.0) for m in readings.monitors]
    return HeldOut(trainer, load_data(config.data), monitors, config.ppo.held_out)


def refuse_unreadable(config: Config, readings: Readings) -> None:
    """Raises UserError where training against these latents would show nothing."""
    if readings.unreadable and config.ppo.unreadable == "stop":
        raise UserError(
            "the SARM is not shown to read this policy's responses (calibrate), so training"
            f" would show nothing about latents: {'; '.join(readings.unreadable)}; raise"
            " ppo.max_new_tokens, lower ppo.temperature, or set ppo.unreadable=warn"
        )


def reward_of(arm: str, reward: Any, random: Sequence[RatedLatent]) -> Any:
    """The arm's reward, from the penalty arm's, which is also that of a point of a sweep; `random`
    are this seed's latents of the random arm.
    """
    from sarm.ppo.reward import Penalised

    if arm == "no_penalty":
        return reward.without_penalty()
    if arm == "random":
        return reward.with_penalised([Penalised(r.latent, r.tau, r.alpha) for r in random])
    return reward


def arm_penalty(arm: str, reward: Any, readings: Readings) -> Calibration:
    """What this arm penalises, and how often that and the harming latents fire before training."""
    random = [latent for latents in readings.random.values() for latent in latents]
    rates = {(r.latent, r.tau): r.base_rate for r in (*random, *readings.penalised)}
    return Calibration(
        arm=arm,
        n=readings.n_prompts * readings.samples,
        reward_sd=readings.reward_sd,
        penalised=[
            p._asdict() | {"base_rate": rates.get((p.latent, p.tau))} for p in reward.penalised
        ],
        harming=[
            {"latent": p.latent, "tau": p.tau, "alpha": p.alpha, "base_rate": p.base_rate}
            for p in readings.penalised
        ],
    )


def device_name(device: Any) -> str:
    import torch

    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM and SIGUSR2 only ask: the function given says whether one came. Once asked,
    further ones are ignored until the process ends: srun sends SIGTERM to all ranks when the first
    has exited, and each is to exit with its own code.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {
        number: signal.signal(number, lambda *_: asked.set())
        for number in (signal.SIGTERM, signal.SIGUSR2)
    }
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if asked.is_set() else handler)
