"""The fused layers against transformers' own forward and autograd: values, gradients, LoRA,
recomputation, layout.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from sarm.llama.generate import forced
from sarm.llama.weights import LlamaWeights
from sarm.ppo.learner import layers
from sarm.ppo.learner.actor import make_actor
from sarm.ppo.learner.reference import Reference
from tests.ranks import run_interpreted, tiny_ppo

PROMPTS, RESPONSES = [[5, 9, 12, 40], [7, 300, 8]], [[33, 21, 4], [90, 14, 77, 61, 2]]


def outputs(
    policy: Path,
    device: str,
    fused: bool,
    lora: bool,
    checkpointed: int = 0,
    beside: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Log-probabilities, values and, of a made-up loss on them, every gradient."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype).to(device)
    if fused and beside:
        layers.lay_side_by_side(model)
    actor = make_actor(
        model, tiny_ppo(lora={"rank": 4, "alpha": 8} if lora else None), 0, fused=fused
    ).to(device)
    actor.checkpointed = checkpointed
    torch.manual_seed(3)
    for name, p in actor.named_parameters():
        if "lora_B" in name or "value_head" in name:
            p.data = 0.1 * torch.randn(p.shape).to(device)
    actor.train()
    logprobs, _, values = actor(*forced(PROMPTS, RESPONSES, 0, torch.device(device)), 0.7)
    weights = torch.linspace(0.5, 2, len(logprobs), device=device)
    (logprobs * weights).sum().add((values * weights.flip(0)).sum()).backward()
    found = {name: p.grad for name, p in actor.named_parameters() if p.requires_grad}
    return {
        name: tensor.detach().cpu()
        for name, tensor in {**found, "logprobs": logprobs, "values": values}.items()
    }  # type: ignore[union-attr]


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert float((ours[name].float() - expected).norm()) <= tolerance * float(
            expected.norm()
        ), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("checkpointed", "beside"), [(0, True), (0, False), (1, True)])
def test_values_and_gradients_are_those_of_transformers(
    tiny_policy: Path, lora: bool, checkpointed: int, beside: bool
) -> None:
    """Whether the weights lie side by side or, as after ZeRO has laid them out, anywhere."""
    assert_same(
        outputs(tiny_policy, "cpu", True, lora, checkpointed, beside),
        outputs(tiny_policy, "cpu", False, lora),
        1e-5,
    )


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_is_float32_up_to_its_rounding(tiny_policy: Path, lora: bool) -> None:
    """As on a GPU: weights in bfloat16, adapters in float32 that are multiplied in bfloat16."""
    assert_same(
        outputs(tiny_policy, "cpu", True, lora, dtype=torch.bfloat16),
        outputs(tiny_policy, "cpu", True, lora),
        0.05,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True])
def test_a_gpus_gradients_are_a_cpus(tiny_policy: Path, lora: bool) -> None:
    """float32 without TF32, which is torch's default."""
    assert not torch.backends.cuda.matmul.allow_tf32
    assert_same(
        outputs(tiny_policy, "cuda", True, lora), outputs(tiny_policy, "cpu", False, lora), 1e-4
    )


def test_with_the_adapter_off_it_is_the_untrained_policy(tiny_policy: Path) -> None:
    teacher = forced(PROMPTS, RESPONSES, 0, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    expected = Reference(model).logprobs(*teacher, 1.0)
    actor = make_actor(model, tiny_ppo(lora={"rank": 4, "alpha": 8}), 0, fused=True)
    for name, p in actor.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    assert not torch.allclose(actor(*teacher, 1.0)[0], expected, atol=1e-2)
    with actor.policy.disable_adapter():
        torch.testing.assert_close(actor(*teacher, 1.0)[0], expected)


def test_side_by_side_changes_places_and_nothing_else(tiny_policy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    before = {name: p.clone() for name, p in model.named_parameters()}
    layers.lay_side_by_side(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for layer in model.model.layers:
        for group in (
            (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            (layer.mlp.gate_proj, layer.mlp.up_proj),
        ):
            for one, next_ in itertools.pairwise(group):
                assert one.weight.data_ptr() + one.weight.nbytes == next_.weight.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("offloaded", [1, 2])
def test_offloaded_layers_compute_the_same(tiny_policy: Path, offloaded: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy).cuda()
    teacher = forced(PROMPTS, RESPONSES, 0, torch.device("cuda"))
    resident, waiting = Reference(model), Reference(model, offloaded)
    expected = resident.logprobs(*teacher, 1.0)
    for i in range(5):
        if i % 2:
            waiting.fetch()
        assert torch.equal(waiting.logprobs(*teacher, 1.0), expected)


def swiglu_agrees(device: str) -> None:
    from sarm.llama import elementwise_triton

    gate_up, grad = (
        torch.randn(3, 2000, device=device, requires_grad=True),
        torch.randn(3, 1000, device=device),
    )
    expected = F.silu(gate_up[:, :1000]) * gate_up[:, 1000:]
    torch.testing.assert_close(elementwise_triton.silu_mul(gate_up.detach()), expected.detach())
    (theirs,) = torch.autograd.grad(expected, gate_up, grad)
    torch.testing.assert_close(elementwise_triton.silu_mul_gradient(grad, gate_up.detach()), theirs)


@pytest.mark.gpu
def test_the_swiglu_kernels() -> None:
    swiglu_agrees("cuda")


def test_the_interpreted_swiglu_kernels() -> None:
    run_interpreted("from tests.ppo.test_layers import swiglu_agrees; swiglu_agrees('cpu')")


def test_what_other_models_compute_again_they_do_not_keep(tiny_policy: Path) -> None:
    """By transformers' own gradient checkpointing, in the mode in which an engine finds the
    actor.
    """

    def kept(checkpointed: int) -> int:
        actor = make_actor(
            AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32),
            tiny_ppo(lora=None),
            0,
            checkpointed=checkpointed,
        )
        elements: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: elements.append(t.numel()) or t, lambda t: t
        ):
            actor(*forced(PROMPTS, RESPONSES, 0, torch.device("cpu")), 0.7)
        return sum(elements)

    assert kept(2) < 0.5 * kept(0)


def test_other_models_keep_their_own_forward() -> None:
    assert not LlamaWeights.knows(torch.nn.Linear(2, 2))
