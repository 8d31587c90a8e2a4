"""Rows that share their beginnings against padded ones, each row by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sarm.llama.generate import forced
from sarm.ppo.learner import layers
from sarm.ppo.learner.actor import make_actor
from sarm.ppo.learner.shared_rows import forced_shared
from tests.ranks import tiny_ppo

CPU = torch.device("cpu")
HEADER = list(range(40, 60))
PROMPTS = [
    [*HEADER, *range(100, 118)],
    [*HEADER, *range(100, 118)],
    [*HEADER, *range(100, 118)],
    [*HEADER, 7],
    [9, 10, 11],
    [*range(200, 230)],
]
"""One three times, with others its header alone, two nothing."""
RESPONSES = [
    [5, 6, 8, 9, 10, 3],
    [5, 6, 8, 9],
    [11],
    [12, 13, 14],
    [15, 16, 17, 18, 19, 20, 21, 22],
    [*range(300, 325)],
]


def outputs(policy: Path, shared: bool, lora: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Log-probabilities, values and, of a made-up loss on them, every gradient."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype)
    layers.lay_side_by_side(model)
    ppo = tiny_ppo(lora={"rank": 4, "alpha": 8} if lora else None)
    actor = make_actor(model, ppo, 0, fused=True)
    torch.manual_seed(3)
    for name, p in actor.named_parameters():
        if "lora_B" in name or "value_head" in name:
            p.data = 0.1 * torch.randn(p.shape)
    inputs = (
        forced_shared(PROMPTS, RESPONSES, CPU) if shared else forced(PROMPTS, RESPONSES, 0, CPU)
    )
    logprobs, _, values = actor(*inputs, 0.7)
    weights = torch.linspace(0.5, 2, len(logprobs))
    (logprobs * weights).sum().add((values * weights.flip(0)).sum()).backward()
    found = {name: p.grad for name, p in actor.named_parameters() if p.requires_grad}
    return {"logprobs": logprobs.detach(), "values": values.detach(), **found}


@pytest.mark.parametrize("lora", [False, True])
def test_values_and_gradients_are_those_of_padded_rows(tiny_policy: Path, lora: bool) -> None:
    found = outputs(tiny_policy, True, lora, torch.float32)
    expected = outputs(tiny_policy, False, lora, torch.float32)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_rounds_no_more_than_in_padded_rows(tiny_policy: Path, lora: bool) -> None:
    found, padded = (outputs(tiny_policy, shared, lora, torch.bfloat16) for shared in (True, False))
    for name, tensor in outputs(tiny_policy, False, lora, torch.float32).items():
        far, as_padded = (float((of[name].float() - tensor).norm()) for of in (found, padded))
        assert far <= 1.3 * as_padded + 0.02 * float(tensor.norm()), name


def test_what_rows_share_lies_once() -> None:
    """The header of four, the prompt of three, and no token that predicts nothing."""
    rows, predicts, labels = forced_shared(PROMPTS, RESPONSES, CPU)
    alone = [len(p) + len(r) - 1 for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert rows.ids.shape == (1, sum(alone) - 3 * 20 - 2 * 18)
    assert labels.tolist() == [token for r in RESPONSES for token in r]
    # A prediction stands at the last token of its prompt, or at the token before it.
    before = [token for p, r in zip(PROMPTS, RESPONSES, strict=True) for token in (p[-1], *r[:-1])]
    assert rows.ids[0, predicts].tolist() == before
    at = [len(p) - 1 + t for p, r in zip(PROMPTS, RESPONSES, strict=True) for t in range(len(r))]
    assert rows.positions[0, predicts].tolist() == at


def test_a_row_alone_and_rows_that_are_equal_are_no_special_case(tiny_policy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    actor = make_actor(model, tiny_ppo(lora=None), 0, fused=True)
    for prompts, responses in (
        ([[5]], [[6]]),
        ([PROMPTS[0]] * 2, [RESPONSES[0]] * 2),
        ([[5], [5]], [[6], [7]]),
    ):
        with torch.no_grad():
            found = actor(*forced_shared(prompts, responses, CPU), 1.0)[0]
            expected = actor(*forced(prompts, responses, 0, CPU), 1.0)[0]
        torch.testing.assert_close(found, expected)
