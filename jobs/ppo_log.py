"""What `python -m jobs ppo` logs while it trains: metrics.jsonl, a line per step; held_out.jsonl
and completions.jsonl, of the held-out evaluations (`ppo.held_out`); the same to TensorBoard or W&B
(`ppo.log_to`), of texts those that `report.texts` lets a report show.

Each file begins with the lines of the checkpoint that the attempt goes on from.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sarm.config import LEFT_OUT, Config, UserError
from sarm.config.reads import values_sha256
from sarm.evaluation.held_out import Evaluated
from sarm.records import Completion, HeldOutMetrics, Line, StepMetrics, plain
from sarm.run import Attempt

COMPLETION_COLUMNS = [name for name in Completion.model_fields if name != "schema_number"]


class Lines:
    """A JSONL file of records, begun with some lines."""

    def __init__(self, path: Path, record: type[Line], lines: list[dict[str, Any]]) -> None:
        self.record, self.lines = record, list[dict[str, Any]]()
        self.file = path.open("w", encoding="utf-8")
        self.write(*lines)

    def write(self, *lines: dict[str, Any]) -> None:
        for line in lines:
            self.lines.append(plain(line))
            self.file.write(self.record(**line).line() + "\n")
        self.file.flush()


class Log:
    """This attempt's, and the progress that watchers see; `state` is that of the checkpoint it goes
    on from, or empty.
    """

    def __init__(self, config: Config, unit: str, attempt: Attempt, state: dict[str, Any]) -> None:
        self.config, self.attempt = config, attempt
        records: dict[str, type[Line]] = {"metrics": StepMetrics}
        if config.ppo.held_out.every:
            records |= {"held_out": HeldOutMetrics, "completions": Completion}
        self.files = {
            name: Lines(attempt.path(f"{name}.jsonl"), record, state.get(name, []))
            for name, record in records.items()
        }
        self.tensorboard: Any = None
        self.wandb: Any = None
        if config.ppo.log_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            step = len(self.files["metrics"].lines)
            self.tensorboard = SummaryWriter(attempt.folder / "tensorboard", purge_step=step)
        if config.ppo.log_to == "wandb":
            self.wandb = _start_wandb(config, unit, attempt.folder)

    @property
    def state(self) -> dict[str, Any]:
        """JSON, for a checkpoint."""
        return {name: file.lines for name, file in self.files.items()}

    def write(self, line: dict[str, Any]) -> None:
        """A step's metrics, `step` among them."""
        self.files["metrics"].write(line)
        shown = {
            name: plain(line.get(f"objective/{key}"))
            for name, key in (("reward", "scores"), ("penalty", "penalty"), ("kl", "kl"))
        }
        self.attempt.progress(line["step"] + 1, self.config.ppo.steps, "step", **shown)
        self._numbers(line)

    def write_held_out(self, step: int, found: Evaluated) -> None:
        """After `step` steps; once, though the run that this one goes on from ended with it."""
        if any(line["step"] == step for line in self.files["held_out"].lines[-1:]):
            return
        completions = [{"step": step, **completion} for completion in found.completions]
        self.files["held_out"].write({"step": step, **found.metrics})
        self.files["completions"].write(*completions)
        completions = [self._shown(completion) for completion in completions]
        if self.tensorboard:
            for place, completion in enumerate(completions):
                self.tensorboard.add_text(f"completions/{place}", as_text(completion), step)
        if self.wandb and completions:
            import wandb

            rows: list[Iterable[str]] = [
                [str(c[name]) for name in COMPLETION_COLUMNS] for c in completions
            ]
            self.wandb.log(
                {"completions": wandb.Table(columns=[*COMPLETION_COLUMNS], data=rows)}, step=step
            )
        self._numbers({"step": step, **found.metrics})

    def _shown(self, completion: dict[str, Any]) -> dict[str, Any]:
        """What a logger may show of it: texts of the sources that reports show too, and of all
        others ids and numbers. The run's own files keep every text.
        """
        if self.config.report.shows(completion["source"]):
            return completion
        return completion | {"prompt": LEFT_OUT, "response": LEFT_OUT}

    def _numbers(self, line: dict[str, Any]) -> None:
        numbers = {k: v for k, v in plain(line).items() if v is not None and k != "step"}
        if self.tensorboard:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, line["step"])
        if self.wandb:
            self.wandb.log(numbers, step=line["step"])

    def close(self) -> None:
        for file in self.files.values():
            file.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def as_text(completion: dict[str, Any]) -> str:
    """Markdown: what was asked, answered and scored."""
    scores = ", ".join(
        f"{name} {completion[name]:.3g}" for name in ("reward", "penalty", "kl", "tokens")
    )
    said = {"refused": completion["refused"], "cut": completion["cut"]}
    flags = "".join(f", {name}" for name, holds in said.items() if holds)
    asked, answered = (
        "\n".join(f"> {line}" for line in completion[name].splitlines() or [""])
        for name in ("prompt", "response")
    )
    return f"{completion['kind']} prompt\n\n{asked}\n\nresponse\n\n{answered}\n\n{scores}{flags}"


def _start_wandb(config: Config, unit: str, folder: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "ppo.log_to is wandb, and wandb is not installed; install it or set ppo.log_to=none"
        ) from None
    return wandb.init(
        project="sarm",
        name=f"{config.name}/{unit}",
        id=f"{values_sha256('ppo', config)[:16]}-{unit}",
        dir=folder,
        resume="allow",
        config=config.model_dump(mode="json"),
    )
