"""The packed forward against transformers' own, row by row: shared prefixes, joined weights, other
Llamas, gradients.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaModel

from sarm.llama import inference, packed
from sarm.llama.elementwise import silu_mul
from sarm.llama.packed import end_states, pack
from sarm.llama.weights import join_projections
from tests import tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaModel:
    torch.manual_seed(0)
    model = LlamaModel(tiny.llama_config(**({"num_hidden_layers": 3} | changes)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.norm = nn.Identity()
    return model.to(DEVICE, dtype).eval()


def rows() -> list[list[int]]:
    """Two prompts under one header with several responses each, one row twice, one the beginning
    of another, one alone.
    """
    draw = random.Random(0)
    tokens = lambda n: [draw.randrange(5, 300) for _ in range(n)]  # noqa: E731
    header = tokens(20)
    prompts = [header + tokens(40), header + tokens(17)]
    found = [
        prompt + tokens(n)
        for prompt, lengths in zip(prompts, ((3, 50, 21), (30, 1)), strict=True)
        for n in lengths
    ]
    return [*found, found[1], prompts[0], tokens(33), [7]]


def one_by_one(model: nn.Module, rows: list[list[int]]) -> Tensor:
    return torch.stack(
        [
            model(torch.tensor([row], device=DEVICE), use_cache=False).last_hidden_state[0, -1]
            for row in rows
        ]
    )


def test_what_rows_share_lies_there_once() -> None:
    some = rows()
    found = pack(some, DEVICE)
    distinct = {tuple(row[:n]) for row in some for n in range(1, len(row) + 1)}
    assert len(found.ids) == len(distinct) < sum(map(len, some)) - 150
    assert found.ids[found.ends].tolist() == [row[-1] for row in some]
    assert found.positions[found.ends].tolist() == [len(row) - 1 for row in some]


@pytest.mark.parametrize("joined", [False, True])
def test_end_states_equal_transformers(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fused = llama(), []
    monkeypatch.setattr(inference, "silu_mul", lambda gate_up: fused.append(1) or silu_mul(gate_up))
    with torch.no_grad():
        expected = one_by_one(model, rows())
        if joined:
            join_projections(model)
            assert (
                packed._joined(model.layers[0].mlp.gate_proj, model.layers[0].mlp.up_proj)
                is not None
            )
            torch.testing.assert_close(one_by_one(model, rows()), expected)
        torch.testing.assert_close(
            end_states(model, pack(rows(), DEVICE)), expected, rtol=1e-4, atol=1e-4
        )
    assert len(fused) == (3 if joined else 0), (
        "an MLP of SiLU takes the fused way, and only over joined weights"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu"},
        {"head_dim": 6},
        {"num_key_value_heads": 4},
        {"num_hidden_layers": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_llamas(changes: dict[str, Any]) -> None:
    model = llama(**changes)
    join_projections(model)
    with torch.no_grad():
        torch.testing.assert_close(
            end_states(model, pack(rows(), DEVICE)), one_by_one(model, rows()), rtol=1e-4, atol=1e-4
        )


def test_adapters_are_not_passed_over() -> None:
    base = llama()
    join_projections(base)
    model = get_peft_model(
        base, LoraConfig(target_modules=["q_proj", "v_proj", "gate_proj"], init_lora_weights=False)
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            end_states(model.base_model.model, pack(rows(), DEVICE)),
            one_by_one(model, rows()),
            rtol=1e-4,
            atol=1e-4,
        )


def test_mlp_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    with torch.no_grad():
        expected = end_states(model, pack(rows(), DEVICE))
        monkeypatch.setattr(inference, "MLP_TOKENS", 7)
        torch.testing.assert_close(end_states(model, pack(rows(), DEVICE)), expected)


def test_gradients_equal_transformers() -> None:
    """Joined weights too: a product over a view of them would leave their gradients out."""
    model = llama()
    join_projections(model)
    gradients = []
    for states in (end_states(model, pack(rows(), DEVICE)), one_by_one(model, rows())):
        model.zero_grad()
        states.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-2)


def test_bfloat16_is_as_near_to_float32_as_transformers() -> None:
    """On a GPU this runs the fused kernels and FlashAttention."""
    exact, rounded = (
        llama(hidden_size=256, head_dim=64),
        llama(torch.bfloat16, hidden_size=256, head_dim=64),
    )
    exact.load_state_dict(rounded.state_dict())
    join_projections(rounded)
    with torch.no_grad():
        expected = one_by_one(exact, rows())
        theirs = (one_by_one(rounded, rows()).float() - expected).norm() / expected.norm()
        ours = (
            end_states(rounded, pack(rows(), DEVICE)).float() - expected
        ).norm() / expected.norm()
    assert ours < 1.5 * theirs
    assert theirs < 0.25
