"""Scoring speed and memory: `python benchmarks/scoring.py`, on a GPU `python benchmarks/scoring.py
--shape llama8b`.

Peer: the forward upstream publishes, on texts sorted by length: every position through the SAE,
TopK and head, the reward position taken last. Same texts, trunk weights and dtype; its SAE computes
in the trunk's dtype (ours in float32), it is given its tokens (ours tokenises), and each side runs
at its own best batch size. The texts are all those of some prompts, as the encode phase has them:
ours computes what they share once. Rates count real tokens, shared ones as often as they are read;
rounds alternate in one process, and memory is what one batch adds to the loaded weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from sarm.config import DataConfig, SourceConfig  # noqa: E402
from sarm.data.conversations import tokenize_conversations  # noqa: E402
from sarm.data.datasets import load_data, texts_to_encode  # noqa: E402
from sarm.llama.weights import join_projections  # noqa: E402
from sarm.reward_model.model import SarmModel  # noqa: E402
from sarm.reward_model.sae import TopKSae  # noqa: E402
from sarm.reward_model.scoring import encode_texts  # noqa: E402
from sarm.reward_model.weights import SarmModelConfig  # noqa: E402

SHAPES: dict[str, dict[str, int]] = {
    "smollm2": {
        "hidden_size": 576,
        "num_hidden_layers": 15,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "d_sae": 4608,
        "k": 64,
    },
    "llama8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "d_sae": 65536,
        "k": 192,
    },
}
MAX_LENGTH = 2048
PEER_BATCHES = (1, 2, 4, 8, 16, 32)
OUR_BATCHES = {"cpu": (512, 1024, 2048, 4096), "cuda": (4096, 8192, 16384, 32768)}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|role|>{{ m['role'] }}\n\n{{ m['content'] | trim"
    " }}<|eot|>{% endfor %}"
)
HEADER = (
    "<|role|>system\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot|>"
)
"""What the template of Llama 3.1, the 4.5B SARM's, writes before every conversation."""

Conversations = list[tuple[dict[str, str], ...]]


def sources(data: str) -> dict[str, SourceConfig]:
    """What `--data` names, where it is at hand, else the demo data."""
    folder = Path(os.environ.get("SARM_TEST_DATA", ROOT.parent / "shared" / "data"))
    known = {
        "rb2": SourceConfig(
            format="rewardbench2_sarm",
            label="RewardBench 2 Safety",
            path=str(folder / "rewardbench2_safety"),
            split={"test": 1.0},
        ),
        "rmb": SourceConfig(
            format="rmb_pairs",
            label="RMB harmlessness",
            path=str(folder / "rmb_harmlessness"),
            split={"test": 1.0},
        ),
    }
    found = {
        name: source
        for name, source in known.items()
        if name in data.split("+") and Path(str(source.path)).is_dir()
    }
    return found or {
        "demo": SourceConfig(
            format="jsonl", label="demo pairs", path="data/demo/pairs.jsonl", split={"test": 1.0}
        )
    }


def real_conversations(count: int, data: str) -> tuple[str, Conversations]:
    """About `count` texts: all of a prompt's, of prompts evenly spread over the sources."""
    chosen = sources(data)
    prompts: dict[str, Conversations] = {}
    for text in texts_to_encode(load_data(DataConfig(sources=chosen))):
        prompts.setdefault(text.prompt_id, []).append(text.messages)
    groups = list(prompts.values())
    wanted = min(len(groups), max(1, round(count * len(groups) / sum(map(len, groups)))))
    return " and ".join(source.label for source in chosen.values()), [
        messages for i in range(wanted) for messages in groups[i * len(groups) // wanted]
    ]


def trained_tokenizer(
    conversations: Conversations, header: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts themselves, so that their lengths in tokens are
    realistic without a download.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=16384,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|bos|>", "<|eot|>", "<|role|>"],
        show_progress=False,
    )
    texts = [m["content"] for c in conversations for m in c]
    tokenizer.train_from_iterator(
        texts + [HEADER] * len(conversations) if header else texts, trainer
    )
    template = (
        TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}" + HEADER) if header else TEMPLATE
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eot|>", chat_template=template
    )


def random_sarm(shape: str, device: str, dtype: torch.dtype) -> SarmModel:
    """A SARM of random weights: the trunk in `dtype`, SAE and head in float32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = SarmModel(
                SarmModelConfig(
                    **SHAPES[shape],
                    has_decoder=False,
                    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                )
            )
    finally:
        torch.set_default_dtype(default)
    model.sae.float()
    model.score.float()
    if device == "cuda":
        join_projections(model.model)  # as `load_sarm` does
    return model.eval()


class EveryPosition(nn.Module):
    """The peer: upstream's forward on rows padded to the right."""

    def __init__(self, model: SarmModel) -> None:
        super().__init__()
        self.trunk, dtype = model.model, model.dtype
        d_sae, d_in = model.sae.encoder.weight.shape
        with torch.device(model.device):
            self.sae = TopKSae(d_in, d_sae, model.k, decoder=False).to(dtype)
            self.score = nn.Linear(d_sae, 1, bias=False, dtype=dtype)
        self.sae.load_state_dict(model.sae.state_dict())
        self.score.load_state_dict(model.score.state_dict())

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(B, L) and (B,) to rewards (B,)."""
        # No mask here either: with padding on the right a causal model needs none.
        a = self.sae.preactivations(
            self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        )
        top = torch.topk(a, self.sae.k, dim=-1)
        logits = self.score(torch.zeros_like(a).scatter_(-1, top.indices, top.values))[..., 0]
        return logits[torch.arange(len(positions), device=positions.device), positions]


class Bench:
    """Both sides on the same conversations."""

    def __init__(
        self,
        shape: str,
        device: str,
        dtype: torch.dtype,
        conversations: Conversations,
        header: bool = False,
    ) -> None:
        self.tokenizer = trained_tokenizer(conversations, header)
        self.model = random_sarm(shape, device, dtype)
        self.device = device

    def ours(self, conversations: Conversations, tokens_per_batch: int) -> Tensor:
        """Rewards by `encode_texts`."""
        return encode_texts(
            self.model,
            self.tokenizer,
            conversations,
            extra_ranks=16,
            tokens_per_batch=tokens_per_batch,
            max_length=MAX_LENGTH,
        ).rewards

    def peer(self, rows: Sequence[list[int]], batch: int) -> Tensor:
        """Rewards by the peer, `batch` rows of like length at once."""
        if not hasattr(self, "every_position"):
            self.every_position = EveryPosition(self.model)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        rewards = torch.empty(len(rows))
        with torch.inference_mode():
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                ids = nn.utils.rnn.pad_sequence(
                    [torch.tensor(rows[i]) for i in chosen], batch_first=True
                )
                positions = torch.tensor([len(rows[i]) - 1 for i in chosen], device=self.device)
                rewards[chosen] = self.every_position(ids.to(self.device), positions).float().cpu()
        return rewards

    def seconds(self, run: Any, *arguments: Any) -> float:
        start = time.perf_counter()
        run(*arguments)
        return time.perf_counter() - start


def best(bench: Bench, run: Any, items: Any, tokens: int, sizes: Sequence[int], unit: str) -> int:
    """The batch size that gives the most real tokens a second; a size that does not fit in memory
    is passed over.
    """
    rates: dict[int, float] = {}
    for size in sizes:
        try:
            bench.seconds(run, items[:4], size)
            # Of two, since the first may have to ask for memory.
            rates[size] = tokens / min(bench.seconds(run, items, size) for _ in range(2))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    print(
        "   ",
        ", ".join(f"{rate:,.0f} at {size}" for size, rate in rates.items()),
        f"{unit} a batch",
        flush=True,
    )
    return max(rates, key=lambda size: rates[size])


def matmul_rate(model: SarmModel) -> float:
    """FLOP/s of the product that most of a forward is, gate and up of 16,384 positions, over one
    second.
    """
    weight = torch.cat(
        [model.model.layers[0].mlp.gate_proj.weight, model.model.layers[0].mlp.up_proj.weight]
    )
    x = torch.randn(16384, weight.shape[1], device=weight.device).to(weight.dtype)
    with torch.inference_mode():
        out = x @ weight.T
        torch.cuda.synchronize()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 1 or count < 10:
            for _ in range(10):
                torch.mm(x, weight.T, out=out)
            torch.cuda.synchronize()
            count += 10
        return 2 * x.shape[0] * weight.numel() * count / (time.perf_counter() - start)


def added_memory(bench: Bench, side: str, conversations: Conversations) -> float:
    """MiB that scoring the conversations as one batch adds to what was loaded, at its peak."""
    rows = [t.ids for t in tokenize_conversations(bench.tokenizer, conversations, MAX_LENGTH)]

    def score(n: int) -> None:
        if side == "ours":
            bench.ours(conversations[:n], 10**9)
        else:
            bench.peer(rows[:n], n)

    score(1)  # loads kernels and, for the peer, its copy of the SAE
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        score(len(conversations))
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    score(len(conversations))
    return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(key: str) -> int:
    return next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key + ":")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--texts", type=int, help="by default 32 on a CPU, 256 on a GPU")
    parser.add_argument(
        "--header",
        action="store_true",
        help=(
            "begin every text with the system turn of Llama 3.1's template, as the 4.5B SARM reads"
            " them"
        ),
    )
    parser.add_argument(
        "--data",
        choices=("rb2", "rmb", "rb2+rmb"),
        default="rb2+rmb",
        help="by default what the reference run's encode phase reads",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-rows", type=int, default=16)
    parser.add_argument("--memory-of", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.texts = args.texts or (256 if args.device == "cuda" else 32)
    label, conversations = real_conversations(args.texts, args.data)
    bench = Bench(args.shape, args.device, getattr(torch, args.dtype), conversations, args.header)
    rows = [t.ids for t in tokenize_conversations(bench.tokenizer, conversations, MAX_LENGTH)]
    # The batch a length-sorted run starts with, its largest.
    longest = [
        conversations[i]
        for i in sorted(range(len(rows)), key=lambda i: -len(rows[i]))[: args.memory_rows]
    ]
    if args.memory_of:
        print(added_memory(bench, args.memory_of, longest))
        return

    tokens = sum(map(len, rows))
    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    print(
        f"scoring {len(rows)} texts of {label}: {tokens:,} real tokens, mean"
        f" {tokens / len(rows):.0f}; {args.shape} shape, {args.dtype}, {where}"
    )
    print("  peer, every position encoded: tokens/s", flush=True)
    peer_batch = best(bench, bench.peer, rows, tokens, PEER_BATCHES, "rows")
    print("  ours, one position encoded: tokens/s", flush=True)
    our_batch = best(bench, bench.ours, conversations, tokens, OUR_BATCHES[args.device], "tokens")
    ratios = []
    for _ in range(args.rounds):
        peer_s = bench.seconds(bench.peer, rows, peer_batch)
        our_s = bench.seconds(bench.ours, conversations, our_batch)
        ratios.append(peer_s / our_s)
        print(
            f"  round {len(ratios)}: ours {tokens / our_s:,.0f} tokens/s, peer"
            f" {tokens / peer_s:,.0f}, ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(
        f"tokens/s, ours over peer at their best batches ({our_batch} tokens, {peer_batch} rows):"
        f" {sorted(ratios)[len(ratios) // 2]:.2f}"
    )

    if args.device == "cuda":
        rate, work = (
            matmul_rate(bench.model),
            2 * sum(p.numel() for p in bench.model.model.layers.parameters() if p.dim() == 2),
        )
        print(
            f"floor: {rate / work:,.0f} tokens/s, all layers at every real token at the"
            f" {rate / 1e12:.0f} TFLOP/s of one large matrix product here"
        )
        ours, peer = (added_memory(bench, side, longest) for side in ("ours", "peer"))
    else:
        # A process each, whose allocator gives back what it frees: its peak is then what was in
        # use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [
            sys.executable,
            __file__,
            "--shape",
            args.shape,
            "--dtype",
            args.dtype,
            "--texts",
            str(args.texts),
            "--data",
            args.data,
            "--device",
            args.device,
        ]
        command += ["--header"] * args.header + [
            "--memory-rows",
            str(args.memory_rows),
            "--memory-of",
        ]
        ours, peer = (
            float(
                subprocess.run(
                    [*command, side], env=environment, check=True, capture_output=True, text=True
                ).stdout.split()[-1]
            )
            for side in ("ours", "peer")
        )
    width = max(len(t.ids) for t in tokenize_conversations(bench.tokenizer, longest, MAX_LENGTH))
    print(
        f"peak memory above the weights, {len(longest)} rows of {width} tokens: ours {ours:,.0f}"
        f" MiB, peer {peer:,.0f} MiB"
    )
    print(f"peak memory, ours over peer: {ours / peer:.2f} (target: at most 0.50)")


if __name__ == "__main__":
    main()
