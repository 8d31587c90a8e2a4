"""Milliseconds a token of sampling from a policy: on a GPU against transformers' `generate` and the
bandwidth floor, on a CPU against transformers' forward.

`OMP_NUM_THREADS=1 python benchmarks/decode.py --cpu [--rows 10] [--samples 1] [--new 32]`: the
embedded SmolLM2 answers prompts of the demo in bf16, `--samples` times each; pairs of runs, and the
median of their ratios.

`python benchmarks/decode.py [--shape 8b] [--rows 32] [--prompt 64] [--new 128]`: random bf16
weights, prompts of exactly so many tokens, no stop token. One run prints: the floor (every weight
but the input embedding, and the cache, read once a token at the copy bandwidth measured here), all
matrix products of a step alone in a CUDA graph, our step (sampling included, reading the prompts
not), a whole rollout, `generate`, and the warm-up of a new and of a known shape. With `--fp8` the
same of weights in fp8 besides, step by step in turns with those in bf16; with `--triton` also by
the kernel that GPUs other than Hopper multiply few rows with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sarm.config import ROOT
from sarm.data.conversations import prompt_ids
from sarm.hub import local_model
from sarm.llama import fp8_wide
from sarm.llama.decoders import CacheDecoder, Decoder, LlamaDecoder, Sampling
from sarm.llama.fp8 import Weight, tensors_of
from sarm.llama.graph_decoder import GraphDecoder, Shape, Slots
from sarm.llama.inference import product_with
from sarm.llama.sampling import row_keys

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}


def random_llama(shape: str) -> LlamaForCausalLM:
    """Random bf16 weights of a Llama's shape, on the GPU."""
    config = LlamaConfig(
        **{"vocab_size": 128256} | SHAPES[shape],
        tie_word_embeddings=shape != "8b",
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def median_ms(run: Callable[[], object], times: int = 5) -> float:
    """Median milliseconds of a call, by events."""
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return sorted(found)[times // 2]


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1e3)


def products_ms(decoder: GraphDecoder, rows: int) -> float:
    """All matrix products of one step, alone in a graph."""
    w = decoder.weights
    products = [
        (product_with(weight), torch.randn(rows, width, dtype=w.dtype, device="cuda"))
        for weight in multiplied(decoder)
        for width in (tensors_of(weight)[0].shape[1],)
    ]

    def step() -> None:
        for product, x in products:
            product(x)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return median_ms(lambda: [graph.replay() for _ in range(8)]) / 8


@contextmanager
def by_triton() -> Iterator[None]:
    """Within, what is captured multiplies weights in fp8 by Triton's kernel."""
    most, fp8_wide.MOST_ROWS = fp8_wide.MOST_ROWS, 0
    yield
    fp8_wide.MOST_ROWS = most


def multiplied(decoder: GraphDecoder) -> list[Weight]:
    """Every weight that a step multiplies with."""
    of_layers = [w for x in decoder.weights.layers for w in (x.qkv, x.o, x.gate_up, x.down)]
    return [*of_layers, decoder.weights.lm_head]


@torch.no_grad()
def on_cpu(rows: int, samples: int, new: int, pairs: int = 5) -> None:
    """Print tokens/s of both decoders, and the median ratio over pairs of runs in turns."""
    folder = local_model("embedded:smollm2", None, download=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (ROOT / "data" / "demo" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines][: -(-rows // samples)]
    messages = [[{"role": "user", "content": text}] for text in texts for _ in range(samples)]
    prompts = [prompt_ids(tokenizer, turn) for turn in messages][:rows]
    sampling = Sampling(new, 1.0, 1.0, ())
    noise = row_keys(0, 0, [str(i) for i in range(len(prompts))])

    def seconds(decoder: Decoder) -> float:
        start = time.perf_counter()
        decoder.decode(prompts, noise, sampling, len(prompts))
        return time.perf_counter() - start

    ours, theirs = LlamaDecoder(model), CacheDecoder(model)
    seconds(ours), seconds(theirs)
    found = [(seconds(theirs), seconds(ours)) for _ in range(pairs)]
    ratios = sorted(theirs / ours for theirs, ours in found)
    tokens = len(prompts) * new
    print(
        f"decoding, SmolLM2-135M, {len(prompts)} rows of {len(texts)} prompts, {new} new tokens,"
        f" bf16, {torch.get_num_threads()} threads, torch {torch.__version__}: transformers'"
        f" {tokens / min(t for t, _ in found):.0f} tokens/s, ours"
        f" {tokens / min(o for _, o in found):.0f}; ratio {ratios[pairs // 2]:.2f}"
        f" ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument(
        "--peer-tokens", type=int, default=16, help="new tokens of `generate`; 0 leaves it out"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also list the kernels of a step, fp8's if asked for"
    )
    parser.add_argument("--fp8", action="store_true", help="also from weights in fp8, in turns")
    parser.add_argument("--triton", action="store_true", help="fp8 also by Triton's kernel")
    parser.add_argument("--cpu", action="store_true", help="the embedded SmolLM2 on a CPU")
    parser.add_argument("--samples", type=int, default=1, help="answers to a prompt, on a CPU")
    args = parser.parse_args()
    if args.cpu:
        return on_cpu(args.rows, args.samples, args.new)
    torch.manual_seed(0)
    model = random_llama(args.shape)
    decoders = {"bf16": GraphDecoder(model)}
    if args.fp8:
        decoders["fp8"] = GraphDecoder(model, quantised=True)
    if args.triton:
        decoders["fp8, Triton"] = GraphDecoder(model, quantised=True)
    prompts = torch.randint(10, model.config.vocab_size, (args.rows, args.prompt)).tolist()
    sampling = Sampling(args.new, 1.0, 1.0, (0,))
    noise = row_keys(0, 0, [str(i) for i in range(args.rows)])
    bandwidth = copy_bandwidth()
    print(
        f"decoding, {args.shape} shape, {args.rows} rows, {args.prompt} + {args.new} tokens,"
        f" {torch.cuda.get_device_name()}, torch {torch.__version__}; copy bandwidth"
        f" {bandwidth / 1e12:.2f} TB/s"
    )

    def seconds(run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    slots: dict[str, Slots] = {}
    for name, decoder in decoders.items():
        w = decoder.weights
        of_norms = (2 * len(w.layers) + 1) * w.norm.nbytes
        read = of_norms + sum(t.nbytes for m in multiplied(decoder) for t in tensors_of(m)[:2])
        cached = 2 * len(w.layers) * w.kv_heads * w.head_dim * 2
        cache_bytes = cached * args.rows * (args.prompt + args.new / 2)
        with by_triton() if name == "fp8, Triton" else nullcontext():
            products = products_ms(decoder, args.rows)
            whole = [
                seconds(lambda d=decoder: d.decode(prompts, noise, sampling, args.rows))
                for _ in range(4)
            ]
        print(
            f"{name}: floor {1e3 * (read + cache_bytes) / bandwidth:.2f} ms a token; matrix"
            f" products of a step alone {products:.2f} ms; weights taken over in"
            f" {median_ms(decoder.refresh):.1f} ms",
            flush=True,
        )
        print(
            f"{name}: warm-up of a new shape {whole[0] - min(whole):.1f} s, of a shape seen before"
            f" {whole[1] - min(whole):.2f} s; a whole rollout {1e3 * sorted(whole[1:])[1]:.0f} ms",
            flush=True,
        )
        slots[name] = decoder._slots(Shape.holding(prompts, sampling, args.rows))

    def begin(name: str) -> None:
        slots[name].begin(prompts, range(args.rows), noise.to("cuda"))

    steps: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(3):
        for name, of in slots.items():
            begin(name)
            ms = median_ms(lambda of=of: [of.run() for _ in range(args.new)], 1) / args.new
            steps[name].append(ms)
    for name, found in steps.items():
        reading = median_ms(lambda name=name: begin(name))
        print(
            f"{name}: {sorted(found)[1]:.2f} ms a token (median of"
            f" {', '.join(f'{s:.2f}' for s in found)}), sampling included; reading the prompts"
            f" {reading:.1f} ms",
            flush=True,
        )
    ours = sorted(steps["bf16"])[1]
    if args.profile:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as told:
            for _ in range(4):
                slots[name].run()
            torch.cuda.synchronize()
        print(
            told.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=60
            )
        )
    if args.peer_tokens:
        ids = torch.tensor(prompts, device="cuda")
        settings = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": True,
            "eos_token_id": None,
            "pad_token_id": 0,
            "top_k": 0,
        }
        model.generate(ids, max_new_tokens=2, **settings)
        few, many = (
            min(
                seconds(lambda n=n: model.generate(ids, max_new_tokens=n, **settings))
                for _ in range(2)
            )
            for n in (2, 2 + args.peer_tokens)
        )
        peer = 1e3 * (many - few) / args.peer_tokens
        print(f"transformers' generate: {peer:.1f} ms a token; ratio {peer / ours:.1f}")
    print(f"reserved peak: {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
