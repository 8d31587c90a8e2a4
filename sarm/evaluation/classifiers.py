"""Sequence classifiers of (prompt, response) whose every label says what it means: the judge of
harm, a detector of refusals.

    probabilities = Classifier(config.evaluate.judge, device)(prompts, responses)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from sarm.config import JudgeConfig, RefusalDetectorConfig, UserError
from sarm.data.conversations import pair_inputs
from sarm.hub import local_model
from sarm.models import open_judge

BATCH = 16


class LabelsError(UserError):
    """A classifier's labels say nothing of what is looked for."""


def label_positions(given: JudgeConfig | RefusalDetectorConfig) -> tuple[list[int], bool]:
    """(positions of the labels that mean what is looked for, whether several labels may hold at
    once). Raises LabelsError, naming them, on labels that the config does not map, and on mapped
    ones that the model does not have.
    """
    config: Any = AutoConfig.from_pretrained(local_model(given.model, given.revision))
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    unmapped = [name for name in names if name not in given.labels]
    unknown = [name for name in given.labels if name not in names]
    if unmapped or unknown:
        what = (
            f"labels {', '.join(unmapped)} that the config does not map"
            if unmapped
            else f"no label {', '.join(unknown)}, which the config maps"
        )
        raise LabelsError(
            f"{given.model} has {what}; give each of {', '.join(names)} a meaning under labels"
        )
    positive = [i for i, name in enumerate(names) if given.labels[name] == given.positive]
    if not positive or (len(names) > 1 and len(positive) == len(names)):
        raise LabelsError(
            f"{given.model}: labels maps {'no label' if not positive else 'every label'} to"
            f" {given.positive}; it then tells nothing apart"
        )
    return positive, len(names) == 1 or config.problem_type == "multi_label_classification"


def judge_problem(judge: JudgeConfig) -> str | None:
    """Why a judge's labels say nothing of harm; None where they do."""
    try:
        label_positions(judge)
    except LabelsError as error:
        return str(error)
    return None


class Classifier:
    """Gives each (prompt, response) the probability of what is looked for.

    One label: its sigmoid; several that exclude each other: the summed softmax of the positive
    ones; several that do not: the largest sigmoid of the positive ones. Raises UserError on labels
    that are not mapped, and where the model cannot serve.
    """

    def __init__(self, given: JudgeConfig | RefusalDetectorConfig, device: str) -> None:
        self.positive, self.several = label_positions(given)
        folder = local_model(given.model, given.revision)
        model, self.tokenizer, self.max_length = open_judge(folder, given.dtype)
        self.name, self.device, self.model = given.model, device, model.to(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """(n,) float64. A text too long for the model loses the end of its longer part."""
        found = [torch.zeros(0)]
        for start in range(0, len(responses), BATCH):
            part = slice(start, start + BATCH)
            inputs = pair_inputs(self.tokenizer, prompts[part], responses[part], self.max_length)
            logits = self.model(**inputs.to(self.device)).logits.float().cpu()
            if self.several:
                found.append(logits[:, self.positive].sigmoid().amax(1))
            else:
                found.append(logits.softmax(1)[:, self.positive].sum(1))
        probabilities = torch.cat(found)
        if not probabilities.isfinite().all():
            raise UserError(
                f"{self.name} gives a score that is not finite; set its dtype to float32"
            )
        return probabilities.numpy().astype(float)
