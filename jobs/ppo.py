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
from typing import TYPE_CHECKING, Any

from jobs.ppo_log import Log
from sarm.config import Config, UserError, arm_and_seed
from sarm.config.reads import values_sha256
from sarm.data.datasets import load_data, prompts_in
from sarm.evaluation.early import check_labels, check_prompted
from sarm.evaluation.verdict import rule_sha256
from sarm.records import Calibration, Features, RatedLatent, Readings
from sarm.run import Attempt, RunDir

if TYPE_CHECKING:
    from sarm.ppo.kept import Kept

STOPPED = 75
"""Exit code of a job that was asked to stop and can go on: EX_TEMPFAIL."""


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Train, then save the policy and publish from rank 0. Raises SystemExit(75) where asked to
    stop.
    """
    from sarm.ppo.loop import train

    # DeepSpeed and peft call torch and transformers by names that have just been deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # From the first moment: a preemption while models are loading is no reason to die.
    with stop_signals() as stop_requested:
        training = Training(config, unit, attempt)
        finished = train(
            training.trainer,
            save=training.save,
            log=training.log.write if training.log else lambda line: None,
            keep=training.keep,
            evaluate=training.evaluate if training.held_out else None,
            stop_requested=lambda: training.world.any(stop_requested()),
        )
        if not finished:
            raise SystemExit(STOPPED)
        training.publish()


class Training:
    """A unit's training as a job: where it goes on from, what it saves on the way, what it
    publishes. Every rank has one; rank 0's alone has a log and writes.
    """

    def __init__(self, config: Config, unit: str, attempt: Attempt) -> None:
        from sarm.ppo.learner import checkpoint
        from sarm.ppo.learner.distributed import start_world
        from sarm.ppo.learner.export import try_export
        from sarm.ppo.parent import parent_of

        self.config, self.attempt = config, attempt
        self.arm, seed = arm_and_seed(unit)
        self.world = world = start_world()
        self.readings, features = what_to_penalise(config, unit, attempt)
        self.parent = parent_of(config, unit)
        check_labels(config.evaluate)
        self.trainer, self.source = make_trainer(config, features, seed, world)
        check_prompted(config.evaluate, self.trainer.tokenizer)
        own = self.readings.random.get(str(seed), [])
        reward = reward_of(self.arm, self.trainer.reward, own)
        if self.parent:
            self.parent.check_penalty(arm_penalty(self.arm, reward, self.readings))
            attempt.note_file(self.parent.manifest_file)
        self.rule_sha256: str | None = rule_sha256(config)
        self.made_with = made_with(config, attempt, self.parent)
        self.checkpoints = attempt.folder / "checkpoints"
        loaded = checkpoint.load(self.checkpoints, world=world, made_with=self.made_with)
        if loaded is not None:
            # The rule that stood when training began, though the config has another one by now.
            self.rule_sha256 = loaded.state.get("rule_sha256")
        else:
            # What cannot be saved is known before it is trained. Beside the checkpoints, which go
            # away.
            tokenizer, name = self.trainer.tokenizer, config.policy.model
            try_export(self.source, self.actor, tokenizer, name, self.checkpoints, world)
            if self.parent:
                loaded = self.parent.loaded(verify=world.rank == 0)
        if loaded is not None:
            self.trainer.restore(loaded.state["trainer"], loaded)
        self.trainer.reward = reward
        self.held_out = held_out_of(config, self.trainer, self.readings)
        self.log: Log | None = None
        self.kept: Kept | None = None
        if world.rank == 0:
            self.begin(unit, loaded)

    def begin(self, unit: str, loaded: Any) -> None:
        """Open what rank 0 writes, with what the checkpoint has of it."""
        from sarm.ppo.kept import Kept

        state = loaded.state if loaded else {"log": {}, "kept": []}
        self.attempt.progress(self.trainer.progress.step, self.config.ppo.steps, "step")
        self.log = Log(self.config, unit, self.attempt, state["log"])
        if self.parent and self.parent.holds(loaded.folder):
            wanted = self.config.ppo.kl_distances
            found = [k for k in state["kept"] if k["entry"]["distance"] in wanted]
            self.kept = Kept(self.attempt, found, copied_from=self.parent.folder)
        else:
            self.kept = Kept(self.attempt, state["kept"])

    @property
    def actor(self) -> Any:
        return self.trainer.learner.actor

    def save(self) -> Path:
        """A checkpoint. A collective."""
        from sarm.ppo.learner import checkpoint

        return checkpoint.save(
            self.checkpoints,
            **self.state(),
            attempt=self.attempt.id,
            keep_last=self.config.ppo.keep_last,
        )

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        state = {
            "trainer": self.trainer.state(),
            "log": self.log.state if self.log else {},
            "kept": self.kept.state if self.kept else [],
            "rule_sha256": self.rule_sha256,
        }
        return {
            "step": self.trainer.progress.step,
            "state": state,
            "pieces": self.trainer.learner.pieces(),
            "world": self.world,
            "made_with": self.made_with,
        }

    def keep(self, distances: list[float]) -> None:
        """Keep the policy for these distances. A collective."""
        from sarm.ppo.learner.export import exported

        found, progress = exported(self.actor, self.world), self.trainer.progress

        def write(folder: Path) -> None:
            self.write_policy(found, folder, folder / "adapter" if found.adapter else None)

        if self.kept:
            for distance in distances:
                self.kept.add(distance, step=progress.step, kl=progress.drift.mean, write=write)

    def evaluate(self) -> None:
        """On held-out prompts. A collective."""
        found = self.held_out.evaluated()
        if self.log:
            self.log.write_held_out(self.trainer.progress.step, found)

    def write_policy(self, found: Any, folder: Path, adapter: Path | None) -> None:
        from sarm.ppo.learner.export import save_adapter, save_policy

        save_policy(self.source, found.weights, self.trainer.tokenizer, folder)
        if adapter:
            save_adapter(self.actor, found.adapter, self.config.policy.model, adapter)

    def publish(self) -> None:
        """Save the policy, and what another run needs to go on from it. A collective."""
        from sarm.ppo.learner import checkpoint
        from sarm.ppo.learner.export import exported, rounding_warning

        ppo, attempt = self.config.ppo, self.attempt
        found = exported(self.actor, self.world)
        names = self.world.gather_texts(device_name(self.world.device))
        if ppo.keeps_state:
            # Every rank writes into rank 0's folder.
            place = attempt.folder / f"state.{self.world.broadcast_text(attempt.id)}"
            checkpoint.write(place, **self.state())
        if self.world.rank == 0:
            if ppo.keeps_state:
                attempt.directory("state")
            assert self.log is not None and self.kept is not None
            self.log.close()
            adapter = attempt.directory("adapter") if found.adapter else None
            self.write_policy(found, attempt.directory("policy"), adapter)
            if told := rounding_warning(found.rounding, ppo.peak_learning_rate):
                print(f"warning: {told}", file=sys.stderr, flush=True)
            penalty = arm_penalty(self.arm, self.trainer.reward, self.readings)
            penalty.write(attempt.path("calibration.json"))
            if ppo.kl_distances:
                self.kept.publish()
            self.publish_manifest(found.rounding, names)
        self.world.barrier()

    def publish_manifest(self, rounding: Any, device_names: list[str]) -> None:
        from sarm.ppo.kept import remove_others
        from sarm.ppo.loop import why_ended

        config, progress = self.config, self.trainer.progress
        published = self.attempt.publish(
            device=str(self.world.device),
            training_s=round(progress.training_s, 3),
            steps=progress.step,
            ended_early=why_ended(config.ppo, progress)
            if progress.step < config.ppo.steps
            else None,
            parent=self.parent.told() if self.parent else None,
            device_names=device_names,
            ranks=self.world.size,
            rule_sha256=self.rule_sha256,
            held_out=self.held_out.parts if self.held_out else None,
            bf16_rounding=None if rounding is None else rounding.told(),
        )
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        remove_others(self.attempt.folder, published.manifest.attempt)


def what_to_penalise(config: Config, unit: str, attempt: Attempt) -> tuple[Readings, Features]:
    """Calibrate's readings, and select's features with the thresholds of this unit. Raises
    UserError where training would show nothing.
    """
    from sarm.probing.select import refuse_unconfirmed
    from sarm.probing.taus import swept

    selected = Features.read(attempt.read("select").path("features.json"))
    readings = Readings.read(attempt.read("calibrate").path("readings.json"))
    if config.ppo.arms != ("no_penalty",) or config.sweep_points():
        refuse_unconfirmed(selected, config.select)
        refuse_unreadable(config, readings)
    features = readings.applied(selected)
    if point := config.sweep_points().get(unit):
        features = swept(features, point, config.ppo.penalty)
    return readings, features


def made_with(config: Config, attempt: Attempt, parent: Any) -> str:
    """What a checkpoint must have been made with to be gone on from here."""
    readings = attempt.run.read("calibrate").manifest.outputs["readings.json"].sha256
    before = [parent.manifest_sha256] if parent else []
    return "/".join([values_sha256("ppo", config), readings, *before])


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
