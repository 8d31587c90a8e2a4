"""What is asked before training of what evaluation needs after it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sarm.config import EvaluateConfig, UserError
from sarm.evaluation import refusals
from sarm.evaluation.early import check_labels, check_prompted
from tests.tiny import tiny_tokenizer


def test_labelled_answers_are_read_where_there_are_to_be_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_labels(EvaluateConfig(refusal_labels=None))
    missing = EvaluateConfig(refusal_labels=str(tmp_path / "labels.jsonl"))
    with pytest.raises(UserError, match=r"there is no file .*labels\.jsonl"):
        check_labels(missing)
    read: list[Any] = []
    monkeypatch.setattr(refusals, "read_labelled", read.append)
    check_labels(missing)
    assert read == [str(tmp_path / "labels.jsonl")]


def test_a_template_without_system_messages_serves_every_arm_but_prompted() -> None:
    tokenizer = tiny_tokenizer()
    told: Any = SimpleNamespace(arms=("base", "prompted"))
    check_prompted(told, tokenizer)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match="leaves system messages out"):
        check_prompted(told, tokenizer)
    other: Any = SimpleNamespace(arms=("best_of_n",))
    check_prompted(other, tokenizer)
