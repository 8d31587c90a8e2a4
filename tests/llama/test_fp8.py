"""Weights in fp8 and products with them against float64, and decoders that sample from them.

On a CPU Triton's interpreter runs the kernels; on a GPU everything is as users have it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sarm.llama import fp8, fp8_wide
from sarm.llama.decoders import Decoder, LlamaDecoder, decoder_for
from sarm.llama.generate import generate, response_logprobs
from tests.tiny import llama_config

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PROMPTS = [[5, 17, 40], [9], [11, 12, 13, 14, 200, 31, 77], [250, 3, 8, 8]]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channels(out: int, width: int, seed: int) -> Tensor:
    """(out, in) bf16, whose channels are of very different sizes; one is 0."""
    weight = (
        random(out, width, seed=seed) * torch.logspace(-6, 4, out, dtype=torch.float64)[:, None]
    )
    weight[out // 2] = 0
    return weight.bfloat16().to(DEVICE)


def e4m3(x: Tensor) -> Tensor:
    """Float64 numbers rounded to the nearest of e4m3's own, listed from the format's definition:
    four bits of exponent with bias 7, three of mantissa; ties to the even mantissa.
    """
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    table = torch.tensor([m / 8 * 2.0**-6 for m in range(8)] + normal[:-1], dtype=torch.float64)
    at = (x.abs()[..., None] - table).abs()
    least = at.amin(-1, keepdim=True)
    odd = torch.arange(len(table)) % 2
    return table[(at + torch.where(at == least, odd, 1e9)).argmin(-1)] * x.sign()


def check_rounding(weight: Tensor, found: fp8.Fp8) -> None:
    """`found` is `weight`, each channel rounded to e4m3 at the least power of two that will do."""
    exact, scales = weight.double().cpu(), found.scales.double().cpu()
    assert torch.equal(scales.log2().round().exp2(), scales)
    most, some = exact.abs().amax(1), exact.any(1)
    assert bool((most <= 448 * scales).all()) and bool((most > 224 * scales)[some].all())
    values = found.values.cpu().to(torch.float64)
    assert torch.equal(values, e4m3(exact / scales[:, None]))
    for dtype in (torch.bfloat16, torch.float32):
        plain = fp8.dequantised(found, dtype).double().cpu()
        assert torch.equal(plain, values * scales[:, None])


def with_edges() -> Tensor:
    weight = channels(40, 300, seed=0)
    weight[0, 0] = 448 * 2.0**-12  # the largest number itself, so no power more
    weight[1, 0] = 450 * 2.0**-12  # the next in bf16
    weight[2, :3] = torch.tensor([2.0, 1.0625, 1.1875])  # ties
    return weight


def test_each_channel_is_rounded_to_e4m3_times_a_power_of_two() -> None:
    weight = with_edges()
    found = fp8.quantised(weight)
    check_rounding(weight, found)
    assert found.scales[1] == 2 * found.scales[0] and not found.values[20].float().any()


def test_the_kernel_rounds_so_too() -> None:
    pytest.importorskip("triton")
    from sarm.llama import fp8_kernels

    weight = with_edges()
    if not CUDA:  # Triton's interpreter rounds to no fp8 rightly: numbers that it need not round
        weight = fp8.dequantised(fp8.quantised(weight), torch.bfloat16)
        weight[weight.abs() < 2.0**-6 * weight.abs().amax(1, keepdim=True) / 448] = 0
    parts = torch.cat([weight, weight], 1)  # rows that lie apart
    for given in (weight, parts[:, : weight.shape[1]]):
        found = fp8.empty_like(given)
        fp8_kernels.quantise(given, found)
        check_rounding(given, found)


def all_numbers() -> Tensor:
    """Every one of e4m3's, at a scale for each channel."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    every = every[every.isfinite()]
    return every[None] * 2.0 ** torch.arange(-30, 31, 10, dtype=torch.float64)[:, None]


def test_nothing_is_lost_of_what_e4m3_holds() -> None:
    found = fp8.quantised(all_numbers().bfloat16().to(DEVICE))
    assert torch.equal(fp8.dequantised(found, torch.float32).double().cpu(), all_numbers())


def test_nothing_is_lost_by_the_kernel_that_widens() -> None:
    pytest.importorskip("triton")
    from sarm.llama import fp8_kernels

    for weight in (all_numbers().bfloat16().to(DEVICE), channels(40, 5000, seed=9)):
        found = fp8.quantised(weight)
        wide = fp8_kernels.widened(found)
        assert torch.equal(wide, fp8.dequantised(found, torch.bfloat16))


SIZES = [
    (1, 40, 64),
    (3, 130, 300),  # neither whole tiles nor whole steps
    (32, 256, 1100),
    (70, 130, 1024),  # two blocks of rows
    (33, 70, 2200),  # several programs a tile
    (256, 128, 512),
]


@pytest.mark.parametrize("b, n, k", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_those_of_float64(b: int, n: int, k: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from sarm.llama import fp8_kernels

    of_like_size = random(n, k, seed=n).bfloat16().to(DEVICE)  # float16 holds no others
    weight = fp8.quantised(of_like_size if dtype == torch.float16 else channels(n, k, seed=n))
    x = random(b, k, seed=b).to(DEVICE, dtype)
    expected = x.double() @ fp8.dequantised(weight, torch.float64).T
    sizes = expected.abs().amax(0, keepdim=True).clamp(min=1e-30)
    within = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    # Triton's interpreter multiplies no bf16; on a GPU float32 is left to cuBLAS.
    by_kernel = dtype != (torch.float32 if CUDA else torch.bfloat16)
    cut = [partial(fp8_kernels.product, tiling=t) for t in (fp8_kernels.NARROW, fp8_kernels.WIDE)]
    for product in (fp8.product, *(cut if by_kernel else [])):
        got = product(x, weight)
        assert got.dtype == dtype and got.shape == (b, n)
        assert float(((got.double() - expected) / sizes).abs().max()) < within
    assert not weight.tickets.any()


def test_the_parts_of_a_sum_are_added_in_their_order() -> None:
    """However often, and whoever comes last: the same to the bit."""
    pytest.importorskip("triton")
    from sarm.llama import fp8_kernels

    weight = fp8.quantised(random(256, 2048, seed=3).to(DEVICE, torch.bfloat16))
    x = random(8, 2048, seed=4).to(DEVICE, torch.float16)
    tiling = fp8_kernels.WIDE._replace(least_steps=1)
    first = fp8_kernels.product(x, weight, tiling)
    for _ in range(50 if CUDA else 2):
        assert torch.equal(fp8_kernels.product(x, weight, tiling), first)
    for other in (tiling._replace(programs=1), fp8_kernels.WIDE, fp8_kernels.NARROW):
        alone = fp8_kernels.product(x, weight, other)
        torch.testing.assert_close(first.float(), alone.float(), rtol=2**-10, atol=1e-2)


# The kernel of Hopper

LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
"""(out, in) of Llama-3.1-8B's projections."""


@pytest.mark.parametrize(
    "width, channels, parts, warps, stages",
    [
        (LLAMA_8B[0], 48, 1, (1, 8), 4),
        (LLAMA_8B[1], 64, 2, (2, 4), 6),
        (LLAMA_8B[2], 224, 1, (2, 4), 3),
        (LLAMA_8B[3], 64, 2, (2, 4), 6),
    ],
)
def test_an_8b_policy_is_cut_as_was_quickest(
    width: tuple[int, int], channels: int, parts: int, warps: tuple[int, int], stages: int
) -> None:
    """At 32 rows, on the 132 multiprocessors of an H100 or H200 (docs/experiments.md)."""
    tiling = fp8_wide.cut(32, *width, 132)
    assert tiling and tiling.channels == channels and tiling.parts == parts
    assert (tiling.channel_warps, tiling.input_warps) == warps and tiling.stages == stages


def test_a_tiling_covers_the_product_in_one_wave_of_programs() -> None:
    found = 0
    for n in (576, 960, 2048, 3072, 4096, 5120, 6144, 16384, 28672):
        for k in (576, 1536, 2048, 4096, 8192, 14336):
            for b in (1, 8, 9, 32, 33, 64):
                for multiprocessors in (78, 114, 132):
                    tiling = fp8_wide.cut(b, n, k, multiprocessors)
                    if tiling is None:
                        continue
                    found += 1
                    assert n % tiling.channels == 0 and k % (tiling.parts * tiling.inputs) == 0
                    programs = n // tiling.channels * tiling.parts
                    assert 0.75 * multiprocessors < programs <= multiprocessors
                    assert b <= 8 * tiling.row_tiles < b + 8
                    assert 8 * tiling.row_tiles % tiling.parts == 0
                    assert tiling.shared_bytes <= 227 * 1024 and tiling.stages >= 3
                    # numbers that a thread holds, of the 65536 registers that all have
                    threads = 32 * tiling.channel_warps * tiling.input_warps
                    held = 4 * tiling.row_tiles * tiling.channel_tiles
                    assert threads >= 256 and held <= 128 and held * threads <= 32768
    assert found > 300
    assert fp8_wide.cut(32, 960, 576, 132) is None and fp8_wide.cut(32, 4096, 4096, 0) is None
    assert fp8_wide.cut(32, 4096 + 16, 4096, 132) is None  # 257 tiles of 16, a prime


def test_what_hoppers_kernel_does_not_take_is_left_to_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fp8_wide, "multiprocessors", lambda device: 132)
    weight = fp8.empty_like(torch.empty(4096, 1024))
    rows = torch.zeros(49, 4096, dtype=torch.bfloat16)
    assert fp8_wide.tiling_for(rows[:32, 8:1032], weight) == fp8_wide.cut(32, 4096, 1024, 132)
    assert fp8_wide.tiling_for(rows[:48, :1024], weight) is not None
    for x in (
        rows[:49, :1024],  # too many
        rows[:0, :1024],
        rows[:32, 4:1028],  # beside the 16 bytes that a thread copies
        torch.zeros(32, 1028, dtype=torch.bfloat16)[:, :1024],
    ):
        assert fp8_wide.tiling_for(x, weight) is None
    monkeypatch.setattr(fp8_wide, "multiprocessors", lambda device: 0)
    assert fp8_wide.tiling_for(rows[:32, :1024], weight) is None


def test_only_hopper_with_the_bindings_has_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    of_device = fp8_wide.multiprocessors.__wrapped__

    def on(major: int, minor: int) -> int:
        of = SimpleNamespace(major=major, minor=minor, multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of)
        return of_device(DEVICE)

    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert on(9, 0) == 132
    assert on(8, 9) == on(10, 0) == on(12, 0) == 0  # no `mma` of its own, or not measured
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    assert on(9, 0) == 0


# Decoders


@pytest.fixture
def model(tiny_policy: Path) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    with torch.no_grad():  # seldom ends, so that responses have all lengths
        model.lm_head.weight[model.config.eos_token_id] *= 0.7
    return model.eval().to(DEVICE)


@torch.no_grad()
def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with its layers' projections as fp8 has them."""
    found = copy.deepcopy(model)
    for module in found.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(fp8.dequantised(fp8.quantised(module.weight), module.weight.dtype))
    return found


def run(decoder: Decoder, **changes):  # type: ignore[no-untyped-def]
    settings = {"max_new_tokens": 20, "temperature": 0.8, "top_p": 1.0, "eos_ids": [3]} | changes
    prompts = settings.pop("prompts", PROMPTS)
    keys = settings.pop("keys", [str(p) for p in PROMPTS])
    return generate(decoder, prompts, keys=keys, seed=0, pad_id=4, **settings)


def decoders_of(model, **how):  # type: ignore[no-untyped-def]
    """Those that sample from a Llama's fp8 weights here."""
    found = [LlamaDecoder(model, quantised=True, **how)]
    if CUDA:
        from sarm.llama.graph_decoder import GraphDecoder

        found += [
            GraphDecoder(model, quantised=True),
            GraphDecoder(model, quantised=True, graphs=False),
        ]
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_policy_samples_as_the_rounded_one(tied: bool) -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(llama_config(tie_word_embeddings=tied)).eval().to(DEVICE)
    plain, exact = run(LlamaDecoder(rounded(model))), run(LlamaDecoder(model))
    for decoder in decoders_of(model):
        got = run(decoder)
        assert got.responses.tolist() == plain.responses.tolist()
        torch.testing.assert_close(got.logprobs, plain.logprobs, rtol=0, atol=2e-5)
    assert not torch.allclose(got.logprobs[:, 0], exact.logprobs[:, 0], atol=1e-3)
    # its log-probabilities are those of the rounded policy for what it sampled
    forced = response_logprobs(
        rounded(model),
        PROMPTS,
        [got.ids(i) for i in range(4)],
        temperature=0.8,
        tokens_per_batch=99,
    )
    for row, logprobs in enumerate(forced):
        torch.testing.assert_close(got.logprobs[row][got.mask[row]], logprobs, rtol=0, atol=2e-5)


def test_samples_have_the_distribution_of_the_quantised_logits(model) -> None:  # type: ignore[no-untyped-def]
    """First tokens of one prompt, many times: by chi-square they are draws from softmax of the
    rounded policy's logits, and no draws from that of the policy itself.
    """
    with torch.no_grad():  # far apart, so that few draws tell them
        for parameter in model.parameters():
            parameter.mul_(1.5)
    n, prompt = 4000, PROMPTS[2]
    decoder = decoder_for(model, quantised=True)
    got = run(
        decoder,
        prompts=[prompt] * n,
        keys=[str(i) for i in range(n)],
        max_new_tokens=1,
        temperature=1.0,
        eos_ids=[],
    )
    counts = torch.bincount(got.responses[:, 0], minlength=model.config.vocab_size).double()

    def per_degree(policy: LlamaForCausalLM) -> float:
        """Chi-square over its degrees of freedom, tokens of fewer than five expected draws taken
        together: near 1 for draws from it.
        """
        with torch.no_grad():
            logits = policy(torch.tensor([prompt], device=DEVICE)).logits[0, -1]
        expected = n * logits.double().softmax(0).cpu()
        often = expected >= 5
        e = torch.cat([expected[often], expected[~often].sum()[None]])
        o = torch.cat([counts[often], counts[~often].sum()[None]])
        return float(((o - e) ** 2 / e).sum() / (len(e) - 1))

    assert per_degree(rounded(model)) < 1.6
    assert per_degree(model) > 2.5


def test_lora_is_merged_and_quantised_at_every_refresh(tiny_policy: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    tuned = get_peft_model(policy, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    tuned = tuned.eval().to(DEVICE)
    decoders = decoders_of(tuned)
    said = [run(decoder).responses.tolist() for decoder in decoders]
    for round_ in range(2):
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(random(*parameter.shape, seed=len(name) + round_) * 0.3)
        merged = copy.deepcopy(tuned).merge_and_unload()
        plain = run(LlamaDecoder(rounded(merged)))
        for i, decoder in enumerate(decoders):
            before = decoder.weights.addresses()
            decoder.refresh()
            got = run(decoder)
            assert got.responses.tolist() == plain.responses.tolist() != said[i]
            assert decoder.weights.addresses() == before  # a graph reads on
            said[i] = got.responses.tolist()


def test_head_embedding_and_norms_are_the_models_own(model) -> None:  # type: ignore[no-untyped-def]
    weights = LlamaDecoder(model, quantised=True).weights
    trunk = model.model
    assert weights.embedding.data_ptr() == trunk.embed_tokens.weight.data_ptr()
    assert weights.norm.data_ptr() == trunk.norm.weight.data_ptr()
    assert weights.lm_head.data_ptr() == model.lm_head.weight.data_ptr()
    bytes_of = sum(
        w.values.nbytes for layer in weights.layers for w in layer if isinstance(w, fp8.Fp8)
    )
    projections = [m for m in trunk.modules() if isinstance(m, torch.nn.Linear)]
    assert bytes_of == sum(m.weight.numel() for m in projections)


# On a GPU

REAL = [*LLAMA_8B, (960, 576), (49152, 576)]
"""(out, in), the last two of SmolLM2's first and last."""
needs_hopper = pytest.mark.skipif(
    not (CUDA and fp8_wide.multiprocessors(DEVICE)), reason="needs a Hopper GPU and cuda.bindings"
)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, new memory is NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("n, k", REAL)
def test_real_shapes_on_a_gpu(n: int, k: int) -> None:
    torch.manual_seed(n + k)
    weight = fp8.quantised(torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02)
    plain = fp8.dequantised(weight, torch.bfloat16).double()
    for b in (1, 7, 8, 31, 32, 33, 64, 128, 256, 257):
        x = torch.randn(b, k, device=DEVICE, dtype=torch.bfloat16)
        with poisoned():
            got = fp8.product(x, weight)
        expected = x.double() @ plain.T
        assert float((got.double() - expected).norm() / expected.norm()) < 3e-3
        error = (got.double() - expected).abs()
        assert float((error / expected.abs().clamp(min=expected.std())).max()) < 2**-7
        assert torch.equal(got, fp8.product(x, weight))
    assert not weight.tickets.any()


WIDE_CASES = [
    *((n, k, None) for n, k in LLAMA_8B),
    # row tiles, channel tiles, warps by channels and by inputs, parts, stages
    (48, 512, (3, 1, 8, 1, 6)),  # one step, fewer than stages
    (144, 3072, (3, 1, 8, 2, 4)),
    (64, 512, (2, 2, 4, 2, 6)),
    (256, 2048, (4, 2, 4, 1, 3)),
    (448, 1280, (2, 7, 2, 1, 5)),
]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("n, k, given", WIDE_CASES)
def test_hoppers_kernel_is_the_product_of_float64(
    n: int, k: int, given: tuple[int, ...] | None
) -> None:
    """Of numbers of all sizes, rows that lie apart among NaN, into memory that is NaN; the same
    to the bit again, and in a graph that follows the rows.
    """
    weight = fp8.quantised(channels(n, k, seed=n))
    plain = fp8.dequantised(weight, torch.float64)
    for b in (1, 7, 8, 9, 16, 31, 32, 33, 64):
        room = torch.full((b + 64, k + 24), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        sizes = torch.logspace(-20, 15, b, dtype=torch.float64, device=DEVICE)[:, None]
        x = room[:b, 8 : 8 + k].copy_(random(b, k, seed=b).to(DEVICE) * sizes)
        if given is None:
            multiprocessors = fp8_wide.multiprocessors(x.device)
            tiling = fp8_wide.cut(b, n, k, multiprocessors)
            assert tiling is not None or multiprocessors != 132
        else:
            tiling = fp8_wide.Tiling(-(-b // 8), *given)
        if tiling is None or tiling.shared_bytes > fp8_wide.SHARED_BYTES:
            continue
        with poisoned():
            got = fp8_wide.product(x, weight, tiling)
        expected, of_sizes = x.double() @ plain.T, x.double().abs() @ plain.abs().T
        error = (got.double() - expected).abs()
        assert bool((error <= 2**-8 * expected.abs() + 1e-5 * of_sizes).all())
        assert not got[:, n // 2].any()
        for _ in range(20):
            assert torch.equal(fp8_wide.product(x, weight, tiling), got)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = fp8_wide.product(x, weight, tiling)
        for factor in (1, 0.5):
            x.mul_(factor)
            graph.replay()
            assert torch.equal(again, got * factor)


@pytest.mark.gpu
@needs_hopper
def test_a_layer_of_8b_decodes_in_a_graph_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and its products by Hopper's kernel."""
    from sarm.llama.graph_decoder import GraphDecoder

    config = llama_config(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=1,
        initializer_range=0.02,
    )
    torch.manual_seed(3)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).eval().bfloat16()
    product, multiplied = fp8_wide.product, set()

    def seen(x: Tensor, weight: fp8.Fp8, tiling: fp8_wide.Tiling) -> Tensor:
        multiplied.add(tuple(weight.values.shape))
        return product(x, weight, tiling)

    monkeypatch.setattr(fp8_wide, "product", seen)
    said = [run(GraphDecoder(model, quantised=True, graphs=g)) for g in (True, False)]
    assert said[0].responses.tolist() == said[1].responses.tolist()
    assert torch.equal(said[0].logprobs, said[1].logprobs)
    assert multiplied == set(LLAMA_8B) or fp8_wide.multiprocessors(DEVICE) != 132


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_graph_of_fp8_weights_is_the_uncaptured_step_and_follows_updates() -> None:
    """To the bit in bf16, over refills and updates, and near the rounded policy's own forward."""
    from sarm.llama.graph_decoder import GraphDecoder

    torch.manual_seed(2)
    config = llama_config(hidden_size=256, intermediate_size=640, initializer_range=0.06)
    model = LlamaForCausalLM(config).eval().to(DEVICE, torch.bfloat16)
    graph = GraphDecoder(model, quantised=True)
    prompts = [[int(t) for t in torch.randint(5, 200, (3 + i % 7,))] for i in range(40)]
    how = {"prompts": prompts, "keys": [str(i) for i in range(40)], "max_rows": 16}
    said = []
    for _ in range(3):
        got = run(graph, **how)
        plain = run(GraphDecoder(model, quantised=True, graphs=False), **how)
        assert got.responses.tolist() == plain.responses.tolist()
        assert torch.equal(got.logprobs, plain.logprobs)
        near, far = (
            float((got.logprobs[got.mask] - torch.cat(logprobs)).abs().mean())
            for policy in (rounded(model), model)
            for logprobs in (
                response_logprobs(
                    policy,
                    prompts,
                    [got.ids(i) for i in range(40)],
                    temperature=0.8,
                    tokens_per_batch=999,
                ),
            )
        )
        assert near < far / 4  # bf16 rounds on the way in other places; a sixth to a tenth on a CPU
        said.append(got.responses.tolist())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2)
        graph.refresh()
    assert said[0] != said[1] != said[2] and len(graph._shapes) == 1
