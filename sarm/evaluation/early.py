"""What evaluate would refuse only after hours of training, asked before them: by fetch, where a
user still looks on, and by PPO, as a fetch that is done is skipped.

Nothing of it is published, so neither depends on the keys that are read here.
"""

from __future__ import annotations

from typing import Any

from sarm.config import EvaluateConfig


def check_labels(config: EvaluateConfig) -> None:
    """Raises UserError where the labelled answers of a refusal detector cannot be read."""
    from sarm.evaluation.refusals import read_labelled

    if config.refusal_labels is not None:
        read_labelled(config.refusal_labels)


def check_prompted(config: EvaluateConfig, tokenizer: Any) -> None:
    """Raises UserError where the policy is to be told to be safe, and its chat template takes no
    system message.
    """
    from sarm.data.conversations import check_system

    if "prompted" in config.arms:
        check_system(tokenizer)
