"""Time and memory of a PPO step: `python benchmarks/ppo.py --shape 8b --mode full --steps 4`,
`--shape tiny` on a CPU.

On several GPUs `torchrun --nproc-per-node 2 benchmarks/ppo.py ...`; memory is that of the fullest.
`--batch` is of all ranks. `OMP_NUM_THREADS=1 python benchmarks/ppo.py --shape demo --batch 32
--new 32 --set samples_per_prompt=4` is an arm of the demo on a CPU core: its policy, SARM, prompts
and settings, its responses again of exactly `--new` tokens. `python benchmarks/ppo.py --scaling` on
1, 2, 4 ... GPUs, as many as there are, at `--batch` sequences a GPU: a table of step, tokens/s per
GPU, efficiency, memory and where the time goes, for each of `--ways`. `python benchmarks/ppo.py
--shape 135m --batch 128 --new 64 --set samples_per_prompt=4 --set gpu_gib=8 --beside 9` starts nine
such trainings on one GPU, which take turns on it, and with `--mps` nine whose kernels run at once.

The real `Trainer` on a policy and a SARM of the given shapes with random bf16 weights, prompts of
exactly `--prompt` tokens and responses of exactly `--new`: no token ends them. Medians over
`--steps` after `--warmup`; warm-up is shown apart. Floors come from bytes and operations at the
copy rate and bf16 matrix rate measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from sarm.config import Config, PpoConfig, load_config, set_key  # noqa: E402
from sarm.data.conversations import prompt_ids  # noqa: E402
from sarm.data.datasets import Prompt, load_data, prompts_in  # noqa: E402
from sarm.hub import local_model  # noqa: E402
from sarm.llama.weights import base_model  # noqa: E402
from sarm.models import open_policy, read_tokenizer  # noqa: E402
from sarm.ppo.learner.distributed import start_world  # noqa: E402
from sarm.ppo.reward import CompoundReward, Penalised  # noqa: E402
from sarm.ppo.trainer import Trainer  # noqa: E402
from sarm.reward_model.model import SarmModel, SarmModelConfig, load_sarm  # noqa: E402
from sarm.threads import given_cpus  # noqa: E402
from slurm.mps import served  # noqa: E402

SPECIAL = ("<bos>", "<eot>", "<pad>")
TEMPLATE = "<bos> {% for m in messages %}{{ m['content'] | trim }} <eot> {% endfor %}"

LLAMA = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
LLAMA_1B = {
    **LLAMA,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
LLAMA_8B = {
    **LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY = {
    **LLAMA,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SMOLLM2 = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "135m": (
        {**SMOLLM2, "num_hidden_layers": 30, "tie_word_embeddings": True},
        {**SMOLLM2, "num_hidden_layers": 20, "d_sae": 4608, "k": 32},
    ),
    "1b": (
        {**LLAMA_1B, "num_hidden_layers": 16, "tie_word_embeddings": True},
        {**LLAMA_1B, "num_hidden_layers": 8, "d_sae": 16384, "k": 64},
    ),
    "8b": (
        {**LLAMA_8B, "num_hidden_layers": 32, "tie_word_embeddings": False},
        {**LLAMA_8B, "num_hidden_layers": 16, "d_sae": 65536, "k": 192},
    ),
    "tiny": (
        {**TINY, "num_hidden_layers": 2, "tie_word_embeddings": False},
        {**TINY, "num_hidden_layers": 1, "d_sae": 128, "k": 8},
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 16, "alpha": 32}},
    "full": {"lora": None},
}
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora": ("lora", ()),
    "compact": ("full", ("weights=compact", "zero_stage=0")),
    "zero2": ("full", ("weights=float32_master", "zero_stage=2")),
    "zero3": ("full", ("weights=float32_master", "zero_stage=3")),
}
"""Ways of training that `--scaling` compares: mode and settings."""
KINDS = {
    "decoding": ("rollout", "sync"),
    "scoring": ("reference", "forward", "score", "advantages"),
    "updating": ("update", "optimizer"),
}
"""Phases of a step by what they are for."""


# --- what is trained
# --------------------------------------------------------------------------------------------------


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token a word, `w17` being the 17th, so that texts have exactly as many tokens as they
    are given words.
    """
    vocab = {token: i for i, token in enumerate(SPECIAL)} | {
        f"w{i}": i for i in range(len(SPECIAL), vocab_size)
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=f"w{len(SPECIAL)}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eot>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


def random_prompts(count: int, tokens: int, vocab_size: int) -> list[Prompt]:
    """Each of `tokens` tokens under the template, which adds two."""
    generator = random.Random(0)
    texts = [
        " ".join(f"w{generator.randrange(len(SPECIAL), vocab_size)}" for _ in range(tokens - 2))
        for _ in range(count)
    ]
    return [
        Prompt(f"{i:016x}", ({"role": "user", "content": text},), "bench", "unsafe", "", "ppo")
        for i, text in enumerate(texts)
    ]


def on_device(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A model made where it is to live: 8 B random weights on a CPU would take minutes."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with device:
            return make()
    finally:
        torch.set_default_dtype(default)


def demo_config() -> Config:
    return load_config(ROOT / "configs" / "smollm2.yaml")


def demo_trainer(args: argparse.Namespace, world: Any) -> Trainer:
    """An arm of the demo, which penalises some latents; `args.prompt` becomes the mean length of
    its prompts.
    """
    config = demo_config()
    sarm, sarm_tokenizer = load_sarm(config.sarm)
    reward = CompoundReward(
        sarm,
        sarm_tokenizer,
        [Penalised(i, 0.5, 1.0) for i in range(3)],
        monitors=range(3, 8),
        tokens_per_batch=config.sarm.tokens_per_batch,
        max_length=config.sarm.max_length,
        all_reduce=world.sum,
    )
    folder = local_model(config.policy.model, config.policy.revision, download=True)
    tokenizer = read_tokenizer(folder, config.policy.chat_template_kwargs)
    prompts = prompts_in(load_data(config.data), "ppo")
    lengths = [len(prompt_ids(tokenizer, p.messages)) for p in prompts]
    args.prompt = round(statistics.mean(lengths))
    settings: dict[str, Any] = {"ppo": config.ppo.model_dump(exclude_unset=True)}
    settings["ppo"] |= {"batch_size": args.batch, "max_new_tokens": args.new}
    for override in args.set:
        set_key(settings, f"ppo.{override}")
    ppo = PpoConfig.model_validate(settings["ppo"])
    policy = open_policy(folder, config.policy.dtype)
    trainer = Trainer(ppo, policy, tokenizer, reward, prompts, seed=0, world=world)
    trainer.learner.stops = (-1,)
    return trainer


def make_trainer(args: argparse.Namespace, world: Any) -> Trainer:
    if args.shape == "demo":
        return demo_trainer(args, world)
    policy_shape, sarm_shape = SHAPES[args.shape]
    tokenizer = word_tokenizer(policy_shape["vocab_size"])
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    policy = on_device(
        lambda: LlamaForCausalLM(LlamaConfig(**policy_shape, pad_token_id=2, dtype=dtype)),
        world.device,
        dtype,
    )
    sarm = on_device(
        lambda: SarmModel(SarmModelConfig(**sarm_shape, has_decoder=False)), world.device, dtype
    ).eval()
    sarm.sae.float()
    sarm.score.float()
    reward = CompoundReward(
        sarm,
        tokenizer,
        [Penalised(i, 3.0, 0.1) for i in range(3)],
        monitors=range(3, 8),
        all_reduce=world.sum,
    )
    settings: dict[str, Any] = {
        "ppo": {
            "batch_size": args.batch,
            "max_new_tokens": args.new,
            "max_prompt_tokens": args.prompt,
            **MODES[args.mode],
        }
    }
    for override in args.set:
        set_key(settings, f"ppo.{override}")
    prompts = random_prompts(4 * args.batch, args.prompt, policy_shape["vocab_size"])
    trainer = Trainer(
        PpoConfig.model_validate(settings["ppo"]),
        policy,
        tokenizer,
        reward,
        prompts,
        seed=0,
        world=world,
    )
    trainer.learner.stops = (-1,)  # no token ends a response
    return trainer


# --- ceilings and floors
# ----------------------------------------------------------------------------------------------


def median_s(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    call()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s of a copy, read and written; FLOP/s of a matrix product), the latter in what the
    policy computes in.
    """
    side, size = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / median_s(lambda: target.copy_(source), device), 2 * side**3 / median_s(
        lambda: a @ b, device
    )


def matmul_parameters(model: Any) -> tuple[int, int]:
    """(of the decoder layers, of the language-model head)."""
    layers = sum(
        p.numel()
        for name, p in base_model(model).model.layers.named_parameters()
        if p.ndim == 2 and "lora_" not in name
    )
    return layers, base_model(model).lm_head.weight.numel()


def floors(
    trainer: Trainer, args: argparse.Namespace, bandwidth: float, rate: float
) -> dict[str, float]:
    """Seconds a phase cannot go below."""
    layers, head = matmul_parameters(trainer.learner.actor.policy)
    element = trainer.learner.actor.policy.dtype.itemsize
    of_layers = element if trainer.ppo.rollout_dtype is None else 1
    rows = args.batch / trainer.learner.world.size
    tokens, responses = rows * (args.prompt + args.new), rows * args.new
    forward = 2 * (layers * tokens + head * responses) / rate
    sarm = sum(p.numel() for p in trainer.reward.model.model.layers.parameters())
    full = args.mode == "full"
    return {
        "rollout": (layers * of_layers + head * element) * args.new / bandwidth,
        "score": 2 * sarm * tokens / rate,
        "reference": forward,
        "forward": forward,
        "update": forward * (2 if full else 1),
        "optimizer": (layers + head) * 12 / bandwidth if full else 0.0,
    }


# --- a run
# ------------------------------------------------------------------------------------------------


Kernels = list[tuple[float, float, str]]
"""(start, end, name) in microseconds, by start."""


def kernels_of_a_step(trainer: Trainer) -> tuple[float, Kernels]:
    """(its seconds, what ran on this rank's GPU); a step of all ranks."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = trainer.run_step()["time/step"]
    events = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return seconds, sorted((e.time_range.start, e.time_range.end, e.name) for e in events)


def busy_us(kernels: Kernels) -> float:
    """Microseconds in which any of them runs."""
    busy, until = 0.0, 0.0
    for start, end, _ in kernels:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def communicating(trainer: Trainer) -> float:
    """The share of a step in which NCCL alone keeps the GPU: transfers that nothing hides, and
    waiting for slower ranks.
    """
    seconds, kernels = kernels_of_a_step(trainer)
    others = [kernel for kernel in kernels if "nccl" not in kernel[2].lower()]
    return (busy_us(kernels) - busy_us(others)) / 1e6 / seconds


def profile(trainer: Trainer) -> None:
    """One step under the profiler: the share of it with any kernel running, and the kernels that
    took most.
    """
    seconds, kernels = kernels_of_a_step(trainer)
    busy = busy_us(kernels)
    totals: dict[str, list[float]] = {}
    for start, end, name in kernels:
        totals.setdefault(name[:110], []).append(end - start)
    print(
        f"profiled step {seconds:.3f} s, {busy / 1e6:.3f} s of it with a kernel running"
        f" ({busy / 1e6 / seconds:.1%})"
    )
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:45]:
        print(f"{sum(times) / 1e3:9.1f} ms {len(times):6d} x {name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "demo"], default="8b")
    parser.add_argument("--mode", choices=MODES, default="lora")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the config's section ppo",
    )
    parser.add_argument("--profile", action="store_true", help="one more step, kernel by kernel")
    parser.add_argument(
        "--scaling", action="store_true", help="on 1, 2, 4 ... GPUs, --batch sequences each"
    )
    parser.add_argument(
        "--ways",
        type=lambda text: text.split(","),
        default=["lora", "compact"],
        help=f"of {', '.join(WAYS)} (default: lora,compact)",
    )
    parser.add_argument(
        "--beside", type=int, help="so many trainings at once on the first GPU, one rank each"
    )
    parser.add_argument("--mps", action="store_true", help="with --beside, through NVIDIA's MPS")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--together", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.scaling:
        return scaling(args)
    if args.beside:
        return beside(args)
    warnings.filterwarnings("ignore", category=FutureWarning)
    world = start_world()
    if world.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    started = time.perf_counter()
    low = world.device.type == "cuda" or args.shape == "demo"
    bandwidth, rate = ceilings(world.device, torch.bfloat16 if low else torch.float32)
    trainer = make_trainer(args, world)
    plan = trainer.learner.plan
    cut = (
        f"{plan.checkpointed_layers} layers checkpointed, {plan.offloaded_layers} of the"
        " reference's offloaded"
    )
    print(f"planned: weights {plan.weights}, {cut}, {'' if plan.recorded else 'not '}recorded")
    print(
        f"ready in {time.perf_counter() - started:.1f} s; copies {bandwidth / 1e12:.3g} TB/s,"
        f" products {rate / 1e12:.3g} TFLOP/s"
    )
    lines = [trainer.run_step() for _ in range(args.warmup)]
    print("warm-up steps: " + ", ".join(f"{line['time/step']:.2f} s" for line in lines))
    if args.together:
        wait_for_others(args.together, args.record.name)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    lines = [trainer.run_step() for _ in range(args.steps)]
    floor = floors(trainer, args, bandwidth, rate)
    if "time/reference" not in lines[0]:  # of a recorded pass it is not told apart
        floor["forward"] += floor.pop("reference")
    median = {key: statistics.median(line[key] for line in lines) for key in lines[0]}
    together = sum(line["time/step"] for line in lines)
    print(
        f"{args.shape} {args.mode}, {args.batch} x ({args.prompt} + {args.new}) tokens, median of"
        f" {args.steps} steps, {together:.1f} s together"
    )
    print(f"{'phase':12} {'s':>8} {'floor':>8} {'ratio':>6}")
    for key, seconds in median.items():
        phase = key.removeprefix("time/")
        if key.startswith("time/"):
            least = floor.get(phase, 0.0) if phase != "step" else sum(floor.values())
            print(
                f"{phase:12} {seconds:8.4f} {least:8.4f}"
                f" {seconds / least if least else float('nan'):6.2f}"
            )
    trained = median["time/forward"] + median["time/update"]
    whose = "forward-backward" if "reference" in floor else "reference and forward-backward"
    print(
        f"{whose} at {(floor['forward'] + floor['update']) / trained:.1%} of the product rate"
        f" ({'6' if args.mode == 'full' else '4'}·N·D)"
    )
    print(
        f"{median['tokens_per_s']:.0f} tokens/s, {median['eps']:.2f} sequences/s, named"
        f" {1 - median['time/unnamed'] / median['time/step']:.2%}"
    )
    print(
        "  ".join(
            f"{key} {value:.3f}"
            for key, value in median.items()
            if key.startswith(("gpu/", "rollout/", "policy/", "loss/"))
        )
    )
    if world.device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"peak of the process {peak:.2f} GiB")
    if args.profile:
        profile(trainer)
    if args.record:
        found = record(trainer, median, alone=args.together is None)
        if world.rank == 0:
            args.record.write_text(json.dumps(found))


# --- at fixed work a GPU
# ----------------------------------------------------------------------------------------------


def record(trainer: Trainer, median: dict[str, float], alone: bool) -> dict[str, float]:
    """What a row of the table says of this run; a collective. A profile, from which communication
    is told, only where it is `alone`.
    """
    world, cuda = trainer.learner.world, trainer.learner.world.device.type == "cuda"
    peaks = world.gather_texts(str(median.get("gpu/reserved_peak_gib", float("nan"))))
    shares = {
        kind: sum(median.get(f"time/{phase}", 0.0) for phase in phases) / median["time/step"]
        for kind, phases in KINDS.items()
    }
    return {
        "step_s": median["time/step"],
        "tokens_per_s": median["tokens_per_s"],
        "peak_gib": max(map(float, peaks)),
        **shares,
        "communicating": communicating(trainer) if cuda and alone else float("nan"),
    }


def scaling(args: argparse.Namespace) -> None:
    """The table; every row a run of its own. What does not fit or fails is named below it."""
    most = torch.cuda.device_count() or 2
    counts = [n for n in (1, 2, 4, 8, 16) if n <= most]
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    print(
        f"{args.shape}, {args.batch} x ({args.prompt} + {args.new}) tokens a GPU, median of"
        f" {args.steps} steps, {device}; communicating lies within the others"
    )
    print(
        f"{'way':8} {'GPUs':>4} {'step s':>8} {'tokens/s/GPU':>12} {'efficiency':>10}"
        f" {'peak GiB':>8}  " + " ".join(f"{k:>13}" for k in (*KINDS, "communicating"))
    )
    failed = []
    for way in args.ways:
        alone = 0.0
        for gpus in counts:
            found, words = run_apart(args, way, gpus)
            if found is None:
                failed.append(f"{way} on {gpus}: {words}")
                continue
            each = found["tokens_per_s"] / gpus
            alone = alone or (each if gpus == 1 else 0.0)
            efficiency = f"{each / alone:.1%}" if alone else "-"
            shares = " ".join(f"{found[kind]:13.1%}" for kind in (*KINDS, "communicating"))
            print(
                f"{way:8} {gpus:4} {found['step_s']:8.3f} {each:12.0f} {efficiency:>10}"
                f" {found['peak_gib']:8.1f}  {shares}",
                flush=True,
            )
    print(*failed, sep="\n")


def wait_for_others(folder: Path, name: str) -> None:
    """Until every training beside this one is as far."""
    (folder / f"{name}.ready").touch()
    while not (folder / "all").exists():
        time.sleep(0.01)


def beside(args: argparse.Namespace) -> None:
    """Several trainings at once, begun together; what each took and all made. Each has an equal
    share of the CPUs.
    """
    command = [sys.executable, __file__, *one_of_several(args)]
    threads = max(1, given_cpus(os.environ) // args.beside)
    with (
        tempfile.TemporaryDirectory() as temporary,
        served() if args.mps else contextlib.nullcontext({}) as env,
    ):
        if args.mps and not env:
            raise SystemExit("no MPS of its own to compare with")
        folder = Path(temporary)
        # in turns also where a service of the machine's would be found
        way = env if args.mps else {"CUDA_MPS_PIPE_DIRECTORY": temporary}
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), **way}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for i in range(args.beside):
                paths = ["--record", str(folder / str(i)), "--together", temporary]
                with open(folder / f"{i}.log", "w") as log:
                    started.append(
                        subprocess.Popen([*command, *paths], env=env, stdout=log, stderr=log)
                    )
            while len(list(folder.glob("*.ready"))) < args.beside:
                if any(one.poll() for one in started):
                    break
                time.sleep(0.05)
            (folder / "all").touch()
            for i, one in enumerate(started):
                if one.wait():
                    raise SystemExit(f"{i} failed\n{(folder / f'{i}.log').read_text()[-3000:]}")
        finally:
            for one in started:
                one.kill()
                one.wait()
        found = [json.loads((folder / str(i)).read_text()) for i in range(args.beside)]
        print((folder / "0.log").read_text())
    steps = [one["step_s"] for one in found]
    made = sum(args.batch / step for step in steps)
    print(
        f"{args.beside} {args.shape} trainings at once,"
        f" {'through MPS' if args.mps else 'in turns'}, {threads} threads each: {made:.0f}"
        f" sequences/s together, steps of {min(steps):.3f} to {max(steps):.3f} s,"
        f" {max(one['peak_gib'] for one in found):.2f} GiB each at most; "
        + ", ".join(f"{kind} {statistics.median(one[kind] for one in found):.0%}" for kind in KINDS)
    )


def one_of_several(args: argparse.Namespace) -> list[str]:
    """The words that describe the same work to a benchmark of its own."""
    words = ["--shape", args.shape, "--mode", args.mode]
    for name in ("batch", "prompt", "new", "steps", "warmup"):
        words += [f"--{name}", str(getattr(args, name))]
    return words + [word for setting in args.set for word in ("--set", setting)]


def run_apart(args: argparse.Namespace, way: str, gpus: int) -> tuple[dict[str, float] | None, str]:
    """(this benchmark's record on so many ranks, or None; the last line of what it printed)."""
    mode, settings = WAYS[way]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(gpus),
        __file__,
    ]
    each = {"mode": mode, "batch": args.batch * gpus, "set": [*settings, *args.set]}
    command += one_of_several(argparse.Namespace(**{**vars(args), **each}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.json")
        done = subprocess.run(
            [*command, "--record", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        errors = (
            [line for line in done.stdout.splitlines() if "Error" in line]
            or done.stdout.splitlines()
            or ["no output"]
        )
        return (json.loads(path.read_text()) if path.exists() else None), errors[0]


if __name__ == "__main__":
    main()
