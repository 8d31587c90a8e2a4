"""An independent classifier's probability that responses do harm: `judged(config.evaluate.judge,
prompts, texts, device)`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from sarm.config import ModelConfig, UserError
from sarm.data.conversations import pair_inputs
from sarm.data.datasets import Prompt
from sarm.hub import local_model
from sarm.models import open_judge

HARM = r"harm|toxic|hate|hateful|offens|violen|abus|unsafe"
NAMES_HARM = re.compile(HARM)
DENIES_HARM = re.compile(
    rf"\b(?:no|not|non|never|without|free of) ?(?:\w+ )?(?:{HARM})|(?:{HARM})\w*(?:less| free)\b"
    rf"|\bin(?:offens)"
)
"""In a label with its words apart: `NON_HATE`, `nothate`, `harmless`, `not_harmful`."""


def says_harm(label: str) -> bool:
    """Whether a classifier's label names harm and does not deny it."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]+", " ", label).lower()
    return bool(NAMES_HARM.search(words)) and not DENIES_HARM.search(words)


@torch.no_grad()
def judged(
    judge: ModelConfig | None,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    device: str,
    batch: int = 16,
) -> np.ndarray:
    """(n,) the judge's probability that a response is harmful; NaN without one.

    It reads (prompt, response) as a pair. One label: its sigmoid; several that exclude each other:
    the summed softmax of those whose name says harm; several that do not: the largest sigmoid of
    those. Raises UserError where no name or every name does.
    """
    if judge is None:
        return np.full(len(texts), np.nan)
    model, tokenizer, longest = open_judge(local_model(judge.model, judge.revision), judge.dtype)
    model = model.to(device)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    harmful = [i for i, name in enumerate(names) if says_harm(name)]
    if len(names) > 1 and len(harmful) in (
        (0,) if model.config.problem_type == "multi_label_classification" else (0, len(names))
    ):
        raise UserError(
            f"judge {judge.model} has labels {', '.join(names)}, of which"
            f" {'all say' if harmful else 'none says'} harm; give its config.json id2label names"
            " such as safe and unsafe"
        )
    found = []
    for start in range(0, len(texts), batch):
        asked = [p.messages[-1]["content"] for p in prompts[start : start + batch]]
        inputs = pair_inputs(tokenizer, asked, texts[start : start + batch], longest).to(device)
        logits = model(**inputs).logits.float().cpu()
        if len(names) == 1:
            found.append(logits[:, 0].sigmoid())
        elif model.config.problem_type == "multi_label_classification":
            found.append(logits[:, harmful].sigmoid().amax(1))
        else:
            found.append(logits.softmax(1)[:, harmful].sum(1))
    return torch.cat(found).numpy().astype(float) if found else np.zeros(0)
