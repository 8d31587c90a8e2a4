"""The fused kernels against plain torch: by Triton's interpreter on a CPU, as they are on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from sarm.llama import elementwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """`expected` is computed in float32. Triton's interpreter cuts a bf16 off where a GPU rounds
    it: a unit of the last place, 2^-7.
    """
    assert actual.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["plain", "triton"])
def ops(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """`sarm.llama.elementwise` as this machine runs it, and the Triton kernels themselves."""
    if request.param == "plain":
        return elementwise
    pytest.importorskip("triton")
    from sarm.llama import elementwise_triton

    return elementwise_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 576), (3, 4096), (2, 3, 32)])
def test_norms_equal_llamas(ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    x, residual, weight = (
        random(*shape, dtype=dtype),
        random(*shape, dtype=dtype, seed=1),
        random(shape[-1], dtype=dtype, seed=2),
    )
    norm = LlamaRMSNorm(shape[-1], 1e-5).to(DEVICE)
    norm.weight.data = weight.float()
    with torch.no_grad():
        close(ops.rms_norm(x, weight, 1e-5), norm(x.float()), dtype)
        normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
        close(total, x.float() + residual.float(), dtype)
        close(normed, norm(total.float()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", [64, 1536, 14336])
def test_silu_mul_equals_torch(ops, dtype: torch.dtype, f: int) -> None:  # type: ignore[no-untyped-def]
    gate_up = random(3, 2 * f, dtype=dtype) * 4
    gate, up = gate_up.float().chunk(2, -1)
    with torch.no_grad():
        close(ops.silu_mul(gate_up), torch.nn.functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "d"), [(32, 128), (9, 64), (2, 8), (3, 96)])
def test_rotation_equals_llamas(ops, dtype: torch.dtype, heads: int, d: int) -> None:  # type: ignore[no-untyped-def]
    fused = random(7, (heads + 2) * d, dtype=dtype)
    x = fused[:, d : (heads + 1) * d].view(7, heads, d)  # a view into a fused projection
    angles = random(7, d, dtype=torch.float32, seed=1)  # both halves differ, as no Llama's do
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = apply_rotary_pos_emb(
        x.float()[None].transpose(1, 2),
        x.float()[None].transpose(1, 2),
        cos.float()[None],
        sin.float()[None],
    )[0]
    with torch.no_grad():
        turned, before = ops.rotate(x, cos, sin), fused.clone()
        # Plain torch rounds both products to bf16 before their sum.
        torch.testing.assert_close(
            turned.float(),
            expected[0].transpose(0, 1),
            rtol=0,
            atol=2e-6 if dtype == torch.float32 else 2**-5,
        )
        ops.rotate(x, cos, sin, into=x)
        assert (
            torch.equal(x, turned)
            and torch.equal(fused[:, :d], before[:, :d])
            and torch.equal(fused[:, (heads + 1) * d :], before[:, (heads + 1) * d :])
        )
