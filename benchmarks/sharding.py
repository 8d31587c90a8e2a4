"""What it costs to share a policy in training among GPUs: DeepSpeed's ZeRO as this project uses it,
against torch's FSDP2 with its distributed checkpoints (DCP):

    torchrun --nproc-per-node 2 benchmarks/sharding.py --way fsdp2 --shape 8b
    torchrun --nproc-per-node 2 benchmarks/sharding.py --way zero3 --shape tiny   # on a CPU

One update of `--rows` sequences a rank (forward, backward with all layers computed again, clip,
AdamW), the gathering of all weights in bf16, which PPO's decoder needs after every update, and with
`--checkpoint FOLDER` saving and loading. A JSON line for each; GiB are of the fuller rank. Every
way trains the same random weights on the same random texts, so losses and norms can be compared.

Nothing of the project imports this: FSDP2 was a candidate, and docs/experiments.md says why it is
not used.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint as computed_again
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.ppo import SHAPES, busy_us, on_device
from sarm.config import PpoConfig
from sarm.llama import weights as llama_weights
from sarm.llama.generate import forced
from sarm.llama.weights import LlamaWeights, base_model
from sarm.ppo.learner import checkpoint, layers
from sarm.ppo.learner.actor import Actor, make_actor
from sarm.ppo.learner.clock import Clock
from sarm.ppo.learner.distributed import World, start_world
from sarm.ppo.learner.engine import start_engine
from sarm.ppo.learner.optimizer import CompactAdamW
from sarm.ppo.learner.shards import engine_pieces, restore_engine, shards

WARMUP, UPDATES, GATHERS = 2, 4, 3

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 16, "alpha": 32}, "zero_stage": 0},
    "compact": {"lora": None, "weights": "compact", "zero_stage": 0},
    "zero2": {"lora": None, "weights": "float32_master", "zero_stage": 2},
    "zero3": {"lora": None, "weights": "float32_master", "zero_stage": 3},
    "fsdp2": {"lora": None},
    "fsdp2-compact": {"lora": None},
}
"""Settings of the project's own; the last two are `FsdpEngine`'s."""


# --- the engines
# --------------------------------------------------------------------------------------------------


def make_engine(
    way: str,
    shape: str,
    world: World,
    dtype: torch.dtype,
    *,
    rows: int,
    plain: bool = False,
    kept: bool = False,
    learning_rate: float | None = None,
) -> Any:
    """As the learner makes it, without a critic, whose head weighs nothing. `plain` and `kept` are
    FSDP2's alone.
    """
    sizes, _ = SHAPES[shape]
    config = LlamaConfig(**sizes, pad_token_id=2, dtype=dtype)
    policy = on_device(lambda: LlamaForCausalLM(config), world.device, dtype)
    settings = {"batch_size": rows * world.size, "advantage": "rloo", "samples_per_prompt": 2}
    ppo = PpoConfig.model_validate({**settings, **WAYS[way], "learning_rate": learning_rate})
    shared = way.startswith("fsdp2")
    if not shared:
        layers.lay_side_by_side(policy)
    checkpointed = 0 if way == "lora" else policy.config.num_hidden_layers
    fused = way != "zero3" and not plain
    actor = make_actor(policy, ppo, 0, fused=fused, checkpointed=checkpointed).to(world.device)
    if shared:
        return FsdpEngine(actor, ppo, world, compact=way == "fsdp2-compact", kept=kept)
    return start_engine(actor, ppo, 0, world)


class FsdpEngine:
    """FSDP2 as the learner's `Engine`: each layer's weights are cut by themselves, and what is left
    (embedding, head, last norm) goes with the actor.

    Float32 weights, gathered and reduced in bf16, under AdamW; `compact`: bf16 weights under
    `CompactAdamW`, which steps each rank's part, all with the same noise. `kept`: a layer's weights
    stay from its forward to its backward pass.
    """

    zero_stage = 0

    def __init__(
        self, actor: Actor, ppo: PpoConfig, world: World, *, compact: bool, kept: bool
    ) -> None:
        self.actor, self.world, self.most = actor, world, ppo.max_grad_norm
        policy = MixedPrecisionPolicy()
        if actor.policy.dtype == torch.bfloat16 and not compact:
            actor.float()
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
        mesh = init_device_mesh(world.device.type, (world.size,))
        self.layers = list(base_model(actor.policy).model.layers)
        if actor.fused:
            self._through_modules()
        for layer in self.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not kept)
        fully_shard(actor, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self.weights = actor.trainable()
        self.parts = [torch.nn.Parameter(w.to_local().detach()) for w in self.weights]
        rate, decay = ppo.peak_learning_rate, ppo.weight_decay
        self.compact = compact
        if compact:
            self.optimizer: Any = CompactAdamW(self.parts, lr=rate, weight_decay=decay)
        else:
            fused = world.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(
                self.weights, lr=rate, weight_decay=decay, fused=fused
            )
        self.basic_optimizer = self.optimizer

    def _through_modules(self) -> None:
        """Fused layers are computed by calling the module, whose hooks gather the weights; what
        is computed again lies within.
        """
        fused, self.actor.checkpointed = layers._layer, 0
        layers._layer = lambda layer, *inputs: layer(*inputs)

        def forward_of(layer: Any) -> Callable[..., Any]:
            settings = {"use_reentrant": False, "preserve_rng_state": False}
            return lambda *inputs: computed_again(fused, layer, *inputs, **settings)

        for layer in self.layers:
            layer.forward = forward_of(layer)

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.actor(*inputs)
        return found

    def train(self, mode: bool = True) -> None:
        self.actor.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.world.size).backward()  # it averages over ranks

    @torch.no_grad()
    def step(self) -> Tensor:
        grads = [w.grad.to_local() for w in self.weights]
        norms = torch._foreach_norm([g for g in grads if g.numel()], 2, torch.float32)
        norm = self.world.sum(torch.stack(norms).square().sum()).sqrt()
        clip = (self.most / (norm + 1e-6)).clamp(max=1.0)
        if self.compact:
            for part, grad in zip(self.parts, grads, strict=True):
                part.grad = grad
            self.optimizer.step(scale=clip)
        else:
            torch._foreach_mul_(grads, clip)
            self.optimizer.step()
        for weight in (*self.weights, *self.parts):
            weight.grad = None
        return norm


@contextmanager
def gathering(engine: Any) -> Iterator[None]:
    """Within, `LlamaWeights` gathers what FSDP2 shares as it does what ZeRO 3 shares."""
    if not isinstance(engine, FsdpEngine):
        yield
        return

    @contextmanager
    def gathered(*modules: Any) -> Iterator[None]:
        at = engine.layers.index(modules[0]) if modules[0] in engine.layers else None
        whole: Any = engine.actor if at is None else engine.layers[at]
        whole.unshard()
        if at is not None and at + 1 < len(engine.layers):
            engine.layers[at + 1].unshard(async_op=True)
        yield
        whole.reshard()

    before = llama_weights.gathered, llama_weights._view
    llama_weights.gathered, llama_weights._view = gathered, lambda modules: None
    try:
        yield
    finally:
        llama_weights.gathered, llama_weights._view = before


# --- checkpoints
# --------------------------------------------------------------------------------------------------


def stepped_tensors(engine: Any) -> list[Tensor]:
    """What the optimizer steps on this rank, and its state."""
    shared = isinstance(engine, FsdpEngine)
    keys = engine.weights if shared else [shard.weight for shard in shards(engine)]
    states = [t for key in keys for t in engine.basic_optimizer.state[key].values()]
    found = [t.to_local() if hasattr(t, "to_local") else t for t in (*keys, *states)]
    return [t.detach() for t in found if t.ndim and t.numel()]


def save(engine: Any, folder: Path, world: World) -> None:
    if isinstance(engine, FsdpEngine):
        model, optimizer = get_state_dict(engine.actor, engine.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=str(folder))
    else:
        pieces = engine_pieces(engine)
        checkpoint.write(folder / "step-1", 1, {}, pieces, world=world, made_with="this")


def load(engine: Any, folder: Path, world: World) -> None:
    if isinstance(engine, FsdpEngine):
        model, optimizer = get_state_dict(engine.actor, engine.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=str(folder))
        set_state_dict(
            engine.actor, engine.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
    else:
        loaded = checkpoint.load(folder, world=world, made_with="this")
        assert loaded is not None
        with loaded.tensors as tensors:
            restore_engine(engine, tensors)


# --- what is measured
# --------------------------------------------------------------------------------------------------


class Bench:
    """A way of sharing on one rank. Every method but `wait` is a collective."""

    def __init__(self, engine: Any, world: World, of: dict[str, Any]) -> None:
        self.engine, self.world, self.of = engine, world, of
        self.cuda = world.device.type == "cuda"

    def told(self, what: str, **found: Any) -> None:
        """From rank 0, with memory since the last such line."""
        if self.cuda:
            self.wait()
            names = ("memory_allocated", "max_memory_allocated")
            gib = torch.tensor([getattr(torch.cuda, n)() / 2**30 for n in names], device="cuda")
            dist.all_reduce(gib, dist.ReduceOp.MAX)
            found |= dict(zip(("held_gib", "peak_gib"), gib.tolist(), strict=True))
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if self.world.rank == 0:
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
            print(json.dumps({"what": what, **self.of, **rounded}), flush=True)

    def updates(self, batch: tuple[Any, ...]) -> None:
        clock = Clock(self.world.device)

        def update() -> tuple[Tensor, Tensor]:
            clock.mark("forward")
            rows, predicts, labels, weights, tokens = batch
            loss = -(self.engine(rows, predicts, labels, 1.0)[0] * weights).sum() / tokens
            clock.mark("backward")
            self.engine.backward(loss, True)
            clock.mark("step")
            return self.world.sum(loss), self.engine.step()

        self.engine.train()
        found = [[float(number) for number in update()] for _ in range(WARMUP)]
        self.told("warm", losses=[f[0] for f in found], norms=[f[1] for f in found])
        timed = []
        for _ in range(UPDATES):
            self.wait()
            clock.marks.clear()
            started = time.perf_counter()
            update()
            parts = clock.seconds()
            timed.append((time.perf_counter() - started, parts))
        whole, parts = sorted(timed, key=lambda t: t[0])[UPDATES // 2]
        named = {f"{part}_s": seconds for part, seconds in parts.items()}
        self.told("update", update_s=whole, **named, **self.communicating(update))

    def gathers(self) -> None:
        self.engine.train(False)
        with gathering(self.engine):
            whole = LlamaWeights(self.engine.actor.policy)
            times = []
            for _ in range(GATHERS):
                self.wait()
                started = time.perf_counter()
                whole.refresh()
                self.wait()
                times.append(time.perf_counter() - started)
            found = self.communicating(whole.refresh)
        self.told("gather", gather_s=sorted(times)[GATHERS // 2], **found)

    def checkpoints(self, folder: Path) -> None:
        """Save, spoil what is in memory, load; whether it is the same again."""
        before = [float(t.double().abs().sum()) for t in stepped_tensors(self.engine)]
        save_s = self.timed(lambda: save(self.engine, folder, self.world))
        for tensor in stepped_tensors(self.engine):
            tensor.zero_()
        load_s = self.timed(lambda: load(self.engine, folder, self.world))
        same = before == [float(t.double().abs().sum()) for t in stepped_tensors(self.engine)]
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        self.told("checkpoint", save_s=save_s, load_s=load_s, bytes=size, same=same)
        if self.world.rank == 0:
            shutil.rmtree(folder)

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds until every rank is done."""
        self.wait()
        self.world.barrier()
        started = time.perf_counter()
        call()
        self.wait()
        self.world.barrier()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def communicating(self, call: Callable[[], Any]) -> dict[str, float]:
        """Of one more call: seconds in which NCCL ran, waiting for the other rank included, and in
        which nothing else did.
        """
        if not self.cuda:
            call()
            return {}
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            self.wait()
        kernels = sorted(
            (e.time_range.start, e.time_range.end, e.name)
            for e in profiler.events()
            if e.device_type == torch.autograd.DeviceType.CUDA
        )
        others = [k for k in kernels if "nccl" not in k[2].lower()]
        nccl = [k for k in kernels if "nccl" in k[2].lower()]
        alone = busy_us(kernels) - busy_us(others)
        return {"nccl_s": busy_us(nccl) / 1e6, "nccl_alone_s": alone / 1e6}


def random_batch(actor: Actor, world: World, rows: int, prompt: int, new: int) -> tuple[Any, ...]:
    """Rows, what predicts, labels, a weight for each of them, and how many all ranks have."""
    vocab = base_model(actor.policy).config.vocab_size
    generator = torch.Generator().manual_seed(world.rank)
    ids = torch.randint(3, vocab, (rows, prompt + new), generator=generator)
    weights = torch.randn(rows * new, generator=generator).to(world.device)
    batch = forced(ids[:, :prompt].tolist(), ids[:, prompt:].tolist(), 2, world.device)
    return *batch, weights, rows * new * world.size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--plain", action="store_true", help="transformers' layers under FSDP2")
    parser.add_argument(
        "--kept", action="store_true", help="FSDP2 keeps weights between forward and backward"
    )
    parser.add_argument("--rows", type=int, default=16, help="sequences a rank")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--checkpoint", type=Path, help="a new folder, removed afterwards")
    args = parser.parse_args()
    if args.checkpoint and args.way == "fsdp2-compact":
        parser.error("DCP does not know how the states of fsdp2-compact are cut")
    world = start_world()
    if world.device.type == "cuda":
        torch.set_num_threads(1)  # as the learner does
    engine = make_engine(
        args.way,
        args.shape,
        world,
        torch.bfloat16,
        rows=args.rows,
        plain=args.plain,
        kept=args.kept,
    )
    of = {name: getattr(args, name) for name in ("way", "shape", "plain", "kept")}
    bench = Bench(engine, world, of | {"ranks": world.size})
    bench.told("made")
    bench.updates(random_batch(engine.actor, world, args.rows, args.prompt, args.new))
    if args.checkpoint:
        bench.checkpoints(args.checkpoint)
    bench.gathers()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
