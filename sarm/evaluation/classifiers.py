"""Sequence classifiers of (prompt, response) whose every label says what it means: the judge of
harm, a detector of refusals.

    probabilities = Classifier(config.evaluate.judge, device)(prompts, responses)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sarm.config import JudgeConfig, RefusalDetectorConfig, UserError
from sarm.hub import local_model

UNBOUNDED = 10**9
"""Tokenizers that know no limit state one beyond this."""


def label_positions(given: JudgeConfig | RefusalDetectorConfig) -> tuple[list[int], int, bool]:
    """(positions of the labels that mean what is looked for, number of labels, whether several may
    hold at once). Raises UserError, naming them, on labels that the config does not map, and on
    mapped ones that the model does not have.
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
        raise UserError(
            f"{given.model} has {what}; give each of {', '.join(names)} a meaning under labels:"
        )
    positive = [i for i, name in enumerate(names) if given.labels[name] == given.positive]
    if not positive or (len(names) > 1 and len(positive) == len(names)):
        raise UserError(
            f"{given.model}: labels maps {'no label' if not positive else 'every label'} to"
            f" {given.positive}; it then tells nothing apart"
        )
    several = len(names) == 1 or config.problem_type == "multi_label_classification"
    return positive, len(names), several


class Classifier:
    """Gives each (prompt, response) the probability of what is looked for.

    One label: its sigmoid; several that exclude each other: the summed softmax of the positive
    ones; several that do not: the largest sigmoid of the positive ones. Raises UserError on labels
    that are not mapped.
    """

    def __init__(self, given: JudgeConfig | RefusalDetectorConfig, device: str) -> None:
        self.name, self.device = given.model, device
        self.positive, _, self.several = label_positions(given)
        folder = local_model(given.model, given.revision)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=given.dtype)
        self.model = loaded.to(device).eval()
        # Without a pad token, as of Llama classifiers, a batch could not tell where a text ends.
        self.batch = 16 if self.tokenizer.pad_token_id is not None else 1
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        positions = getattr(self.model.config, "max_position_embeddings", None) or UNBOUNDED
        longest = min(self.tokenizer.model_max_length, positions)
        self.max_length = longest if longest < UNBOUNDED else None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """(n,) float64. A text too long for the model loses the end of its longer part."""
        found = [torch.zeros(0)]
        for start in range(0, len(responses), self.batch):
            part = slice(start, start + self.batch)
            inputs = self.tokenizer(
                list(prompts[part]),
                list(responses[part]),
                truncation=self.max_length is not None,
                max_length=self.max_length,
                padding=self.batch > 1,
                return_tensors="pt",
            ).to(self.device)
            logits = self.model(**inputs).logits.float().cpu()
            if self.several:
                found.append(logits[:, self.positive].sigmoid().amax(1))
            else:
                found.append(logits.softmax(1)[:, self.positive].sum(1))
        harm = torch.cat(found)
        if not harm.isfinite().all():
            raise UserError(
                f"{self.name} gives a score that is not finite; set its dtype to float32 or check"
                " its weights"
            )
        return harm.numpy().astype(float)
