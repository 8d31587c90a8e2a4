"""What of a PPO run fits on which GPUs, and how it is cut so that it does: `make plan
CONFIG=configs/llama31-8b.yaml GPUS=4x80`.

`make_plan` is the one place that chooses ZeRO stage, how weights are kept, micro-batch, rows
decoded at once, layers under activation checkpointing, layers of the reference that are offloaded,
and whether the pass is recorded, wherever the config leaves them open. The learner asks it with the
models it has loaded; here it is asked with their shapes. One file, since memory, time and choice
share their terms. No torch: a login node can plan.

Memory is counted for the worst batch (every row at `max_prompt_tokens + max_new_tokens`), per GPU,
as the sum of what is persistent and the largest of what is transient. Seconds are at what an
H100 or H200 was measured to reach, see `H100` and `H200`.

Notation: P parameters, n tokens of one micro-batch, L layers, g GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sarm.cache_size import cached_positions
from sarm.config import Config, PpoConfig, UserError, load_config

GIB = 2**30
OVERHEAD_GIB = 1.0
"""CUDA graphs, workspaces of cuBLAS, pieces that lie unused between others."""
OUTSIDE_GIB = 1.2
"""Of a GPU's memory, what its driver, the CUDA context and NCCL take before torch asks for any."""
MARGIN = 0.95
"""A plan is made for this share of what torch may take: it may be wrong."""
LOGITS = 4096
"""Positions whose logits exist at a time; see `sarm/llama/logprobs.py`."""
DEFAULT_MICRO_BATCH_TOKENS = 16384
RECORDED_POSITIONS, RECORDED_TOKENS = 64, 512
"""A recorded pass rounds its longest row and its response tokens up to whole steps of these, so
that a run has few shapes.
"""
LEAST_ROWS = 32
"""Fewer rows are not decoded at once to save memory: a token reads all weights however few rows."""
LAUNCH_S = 4e-3
"""A layer's kernels in reference, forward and update, launched one by one on a slow host; hidden
where the GPU takes longer.
"""


SMALL_KERNELS_S, SAMPLE_S = 24e-6, 1e-4
"""Of decoding a token: a layer's kernels beside its products, and sampling."""


class Rates(NamedTuple):
    """What a GPU reaches, measured by benchmarks/ppo.py."""

    name: str
    read: float
    """Bytes/s where decoding reads weights and cache."""
    fp8_read: float
    """Bytes/s in fp8 at which the planned token comes out as measured: the products alone read 1.9
    and 2.6 TB/s, and the small kernels are planned too slow by as much. An H100's is Triton's
    kernel's; `fp8_wide.cu` was measured on an H200 alone.
    """
    train: float = 560e12
    """FLOP/s of forward and backward."""
    score: float = 500e12
    copy: float = 2.3e12
    """Bytes/s in the optimizer's step and where adapters are merged."""


H100, H200 = Rates("H100", 2.94e12, 2.2e12), Rates("H200", 4.07e12, 3.0e12)
WIRE = 2.5e11
"""Bytes/s that a GPU receives from the others of its node (benchmarks/sharding.py)."""
BETWEEN_NODES = 2.5e10
"""Bytes/s that a node receives for each of its GPUs, by an adapter of 200 Gbit/s each: assumed."""
FP8_WIDENED = 1.5e12
"""Weights a second that become bf16 before prompts are read; measured on an H200 alone."""


class Shape(NamedTuple):
    """A Llama's sizes, as config.json names them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def fp8_bytes(self) -> int:
        """Of the layers in fp8; embedding and head stay as they are."""
        return self.layers * self.layer

    def kept(self, fused: bool) -> int:
        """Elements that one token leaves in one layer for the backward pass; transformers' own
        forward leaves twice as many.
        """
        elements = (
            4 * self.hidden
            + (2 * self.heads + 2 * self.kv_heads) * self.head_dim
            + 3 * self.intermediate
        )
        return elements if fused else 2 * elements

    @property
    def kv_bytes(self) -> int:
        """Of one position's keys and values in all layers, in bf16."""
        return self.layers * 4 * self.kv_heads * self.head_dim

    def lora(self, rank: int) -> int:
        """Parameters of adapters on every projection."""
        d, f, q, kv = (
            self.hidden,
            self.intermediate,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        return self.layers * rank * (2 * (d + q) + 2 * (d + kv) + 3 * (d + f))


class Sarm(NamedTuple):
    """A SARM: a Llama's first layers, and its SAE, of which scoring uses the encoder, in
    float32.
    """

    trunk: Shape
    d_sae: int

    @property
    def bytes(self) -> int:
        return 2 * (
            self.trunk.layers * self.trunk.layer + self.trunk.embedding
        ) + 4 * self.d_sae * (self.trunk.hidden + 2)


class Gpus(NamedTuple):
    number: int
    """On all nodes."""
    gib: float
    """Memory of each."""
    nodes: int = 1

    def __str__(self) -> str:
        each = f"{self.number // self.nodes} x {self.gib:g} GiB"
        return each if self.nodes == 1 else f"{self.nodes} nodes of {each}"

    @property
    def rates(self) -> Rates:
        """An H200's where there is more memory than an H100 has, else an H100's."""
        return H200 if self.gib > 100 else H100

    @property
    def wire(self) -> float:
        """Bytes/s of each in a sum over all. Of several nodes every GPU hands a share of the sum to
        the next node, so that a node's adapters work side by side.
        """
        if self.nodes == 1:
            return WIRE
        return min(WIRE, BETWEEN_NODES * self.number / self.nodes)

    @property
    def usable_gib(self) -> float:
        """What torch may reserve."""
        return self.gib - OUTSIDE_GIB

    def shared(self, ppo: PpoConfig) -> Gpus:
        """The same GPUs, of each no more than `ppo.gpu_gib`."""
        return self._replace(gib=min(self.gib, ppo.gpu_gib or self.gib))


class Plan(NamedTuple):
    """How one arm is trained."""

    zero_stage: int
    weights: str
    micro_batch_tokens: int
    checkpointed_layers: int
    """Layers of the policy under activation checkpointing."""
    offloaded_layers: int
    """Layers of the reference that live on the host, and on the GPU while there are no gradients.
    """
    persistent_gib: dict[str, float]
    """GiB per GPU, persistent."""
    transient_gib: dict[str, float]
    """Peak transient GiB per GPU in each phase of a step."""
    rollout_parts: dict[str, float]
    """Seconds of a step's sampling, by what takes them."""
    train_parts: dict[str, float]
    """Likewise of reference, forward, update and optimizer."""
    recorded: bool
    """Whether the pass over the batch becomes CUDA graphs (`cuda_graphs.py`), which keep its
    memory for themselves.
    """
    decode_rows: int | None
    """Rows of a rank sampled at once; None: as many as suit the decoder."""

    @property
    def rollout_s(self) -> float:
        return sum(self.rollout_parts.values())

    @property
    def train_s(self) -> float:
        return sum(self.train_parts.values())

    @property
    def peak_gib(self) -> float:
        return sum(self.persistent_gib.values()) + max(self.transient_gib.values())

    def applied(self, ppo: PpoConfig) -> PpoConfig:
        """The config with nothing left open."""
        return ppo.model_copy(
            update={
                "zero_stage": self.zero_stage,
                "weights": self.weights,
                "micro_batch_tokens": self.micro_batch_tokens,
            }
        )


def unplanned(ppo: PpoConfig, layers: int) -> Plan:
    """For a CPU (no `layers` to compute again) or a model that is not a bf16 Llama: what the
    config says, without a count of memory.
    """
    checkpointed = layers if ppo.gradient_checkpointing in (None, True) else 0
    return Plan(
        ppo.zero_stage or 0,
        ppo.weights or "float32_master",
        ppo.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS,
        checkpointed,
        0,
        {},
        {},
        {},
        {},
        False,
        None,
    )


# --- the choice
# ------------------------------------------------------------------------------------------------


def make_plan(
    ppo: PpoConfig, policy: Shape, sarm_bytes: float, gpus: Gpus, *, fused: bool = True
) -> Plan:
    """The quickest way of training that fits: the first of `_ways` for which some cut of the work
    does.

    `fused`: whether the policy's layers are those of `layers.py`. Raises UserError with the numbers
    where nothing fits.
    """
    rates, gpus = gpus.rates, gpus.shared(ppo)
    rows = math.ceil(ppo.batch_size / ppo.num_mini_batches / gpus.number)
    longest = ppo.max_prompt_tokens + ppo.max_new_tokens
    once = ppo.num_ppo_epochs * ppo.num_mini_batches == 1
    best: Plan | None = None
    for stage, weights in _ways(ppo, gpus.number):
        plans = [
            _plan(
                ppo,
                policy,
                sarm_bytes,
                gpus,
                stage,
                weights,
                fused and stage < 3,
                micro_rows * longest,
                checkpointed,
                offloaded,
                recorded,
                decode_rows,
                rates,
            )
            for decode_rows in _waves(math.ceil(ppo.batch_size / gpus.number))
            for micro_rows in _micro_batches(ppo, rows, longest)
            for checkpointed in _checkpointed(ppo, policy.layers, fused and stage < 3)
            for offloaded in _offloaded(ppo, policy.layers, fused)
            for recorded in (
                (True, False)
                if once and fused and stage == offloaded == 0 and micro_rows == rows
                else (False,)
            )
        ]
        fitting = [plan for plan in plans if plan.peak_gib <= MARGIN * gpus.usable_gib]
        if fitting:
            return min(
                fitting,
                key=lambda plan: (
                    plan.rollout_s + plan.train_s,
                    plan.offloaded_layers,
                    not plan.recorded,
                    plan.peak_gib,
                ),
            )
        best = min([*plans, *([best] if best else [])], key=lambda plan: plan.peak_gib)
    assert best is not None
    kind = "LoRA" if ppo.lora else "full fine-tuning"
    parts = ", ".join(
        f"{name} {gib:.1f}" for name, gib in best.persistent_gib.items() if gib >= 0.05
    )
    most = max(best.transient_gib, key=lambda phase: best.transient_gib[phase])
    raise UserError(
        f"{kind} of {policy.parameters / 1e9:.2f} B parameters does not fit: it takes"
        f" {best.peak_gib:.1f} GiB per GPU at least"
        f" ({parts}, {most} {best.transient_gib[most]:.1f})"
        f" and {MARGIN:.0%} of {gpus.usable_gib:.1f} GiB can be planned with on {gpus}; "
        + (
            "use more or larger GPUs or lower ppo.max_new_tokens"
            if ppo.lora
            else "use more or larger GPUs, or set ppo.lora"
        )
    )


def _ways(ppo: PpoConfig, gpus: int) -> Iterator[tuple[int, str]]:
    """(ZeRO stage, how weights are kept) that the config allows, the quickest first."""
    if ppo.lora:
        ways = [(0, "float32_master"), (3, "float32_master")]
    else:
        ways = (
            [(0, "compact"), (1, "float32_master")]
            if gpus == 1
            else [(2, "float32_master"), (0, "compact"), (3, "float32_master")]
        )
    for stage, weights in ways:
        if gpus == 1 and stage == 3 and ppo.zero_stage != 3:
            continue
        if ppo.weights not in (None, weights):
            continue
        if ppo.zero_stage is not None and weights == "float32_master":
            # A bf16 model trained in full is stepped by ZeRO's optimizer, of stage 1 at least.
            yield (ppo.zero_stage if ppo.lora else max(ppo.zero_stage, 1)), weights
            return
        if ppo.zero_stage in (None, stage):
            yield stage, weights


def _micro_batches(ppo: PpoConfig, rows: int, longest: int) -> list[int]:
    """Rows of a micro-batch: all, half, a quarter ... one."""
    if ppo.micro_batch_tokens is not None:
        return [max(1, min(rows, ppo.micro_batch_tokens // longest))]
    return sorted({math.ceil(rows / 2**i) for i in range(rows.bit_length() + 1)}, reverse=True)


def _waves(rows: int) -> list[int]:
    """Rows decoded at once: all, half, a quarter ... while there are more than `LEAST_ROWS`."""
    return [rows, *(_waves(math.ceil(rows / 2)) if rows > LEAST_ROWS else [])]


def _checkpointed(ppo: PpoConfig, layers: int, fused: bool) -> list[int]:
    if ppo.gradient_checkpointing is not None:
        return [layers if ppo.gradient_checkpointing else 0]
    return list(range(layers + 1)) if fused else [0, layers]  # transformers checkpoints all or none


def _offloaded(ppo: PpoConfig, layers: int, fused: bool) -> list[int]:
    return [0] if ppo.lora or not fused else [0, layers]


def _plan(
    ppo: PpoConfig,
    policy: Shape,
    sarm_bytes: float,
    gpus: Gpus,
    stage: int,
    weights: str,
    fused: bool,
    micro_tokens: int,
    checkpointed: int,
    offloaded: int,
    recorded: bool,
    decode_rows: int,
    rates: Rates,
) -> Plan:
    """One way of cutting the work, with its memory and time; `micro_tokens` of a micro-batch."""
    p, full = policy.parameters, ppo.lora is None
    rows = math.ceil(ppo.batch_size / gpus.number)
    longest = ppo.max_prompt_tokens + ppo.max_new_tokens
    padded = math.ceil(longest / RECORDED_POSITIONS) * RECORDED_POSITIONS if recorded else longest
    tokens = micro_tokens * padded / longest
    responses = micro_tokens * ppo.max_new_tokens / longest + (
        RECORDED_TOKENS - 1 if recorded else 0
    )
    share = gpus.number if stage == 3 else 1
    layer_bytes = 2 * policy.layer
    fp8 = ppo.rollout_dtype is not None
    persistent = {
        "policy": 2 * p / share,
        "decoder's copy": (
            policy.fp8_bytes + (2 * policy.embedding if stage == 3 else 0)
            if fp8
            else 0
            if full and stage < 3
            else layer_bytes * policy.layers + (2 * policy.embedding if stage == 3 else 0)
        ),
        "KV cache": decode_rows * cached_positions(longest) * policy.kv_bytes,
        "optimizer": _optimizer_bytes(ppo, policy, weights, gpus.number, stage),
        "reference": 2 * p - offloaded * layer_bytes if full else 0,
        "SARM": sarm_bytes,
        "overhead": OVERHEAD_GIB * GIB,
    }
    layer_kept = 2 * tokens * policy.kept(fused)
    kept = layer_kept * (policy.layers - checkpointed) + 2 * tokens * policy.hidden * checkpointed
    # Between the layers of a backward pass: the MLP's gradients, and a layer computed again.
    passing = 2 * tokens * (3 * policy.intermediate + 4 * policy.hidden) + (
        layer_kept if checkpointed else 0
    )
    logits = 3 * min(LOGITS, responses) * policy.vocab
    if ppo.entropy_coef:  # the entropy's slopes: its logits again, and what a frozen head keeps
        logits += 2 * min(LOGITS, responses) * policy.vocab
        kept += 0 if full else 2 * responses * policy.hidden
    if ppo.critic:  # the value head reads its states in float32, and keeps them
        kept += 4 * responses * policy.hidden
    # Of one chunk the gradient itself, of several a float32 sum and a term of it besides.
    head_gradient = policy.embedding * (2 if responses <= LOGITS else 8) if full else 0
    gradients = _gradient_bytes(p, weights, stage) if full else 0
    fetched = offloaded * layer_bytes
    transient = {
        "rollout": (
            fetched
            # prompts are read with the widest weight widened to bf16
            + (4 * policy.hidden * policy.intermediate if fp8 else 0)
            + decode_rows
            * (
                2 * ppo.max_prompt_tokens * (3 * policy.intermediate + 4 * policy.hidden)
                + 24 * policy.vocab
            )
        ),
        "score": kept + min(rows * longest, DEFAULT_MICRO_BATCH_TOKENS) * 2 * 16 * policy.hidden,
        "reference": fetched + passing + logits if full else 0,
        # As gradients come, layer by layer, what the layers kept goes: the peak is at one end.
        "update": max(kept + logits + head_gradient, gradients + passing),
    }
    if recorded:
        persistent["recorded pass"] = max(transient.pop("update"), transient.pop("reference"))
        transient["score"] -= kept
    updates = ppo.num_ppo_epochs * ppo.num_mini_batches
    micros = math.ceil(rows * longest / ppo.num_mini_batches / micro_tokens)
    forward = (
        2
        * (
            policy.layers * policy.layer * rows * padded
            + policy.embedding * rows * ppo.max_new_tokens
        )
        / rates.train
    )
    shared = updates == 1 and micros == 1 and stage < 3
    passes = 1 + ppo.num_ppo_epochs * (
        (2 if full else 1) + checkpointed / policy.layers + (0 if shared else 1)
    )
    # each micro-batch reads all weights a few times
    small = 6 * p * micros * ppo.num_ppo_epochs / rates.copy
    computing = {"products of training": (1 + passes) * forward, "weights read to train": small}
    if full:
        computing |= {
            name: updates * seconds
            for name, seconds in step_parts(p, weights, gpus, stage, rates).items()
        }
    elif gpus.number > 1:
        # Adapters' gradients are averaged; ZeRO 3 hands the policy's weights round for reference,
        # forward and backward passes, and once for the decoder.
        handed = 2 * p * (passes + 2) if stage == 3 else 0.0
        averaged = 2 * updates * 4 * policy.lora(ppo.lora.rank) if ppo.lora else 0.0
        computing["transfers between GPUs"] = (
            (handed + averaged) * (1 - 1 / gpus.number) / gpus.wire
        )
    launching = 0.0 if recorded else LAUNCH_S * (policy.layers + checkpointed / 4) * micros
    if launching > sum(computing.values()):
        computing = {"launches of training's kernels": launching}
    # adapters into the decoder's copy
    merging = 0.0 if full else 6 * p / rates.copy
    if fp8:  # read for the scales, which leaves a channel in the cache, and written
        merging += 3 * p / rates.copy
    in_gib = lambda parts: {name: size / GIB for name, size in parts.items()}  # noqa: E731
    return Plan(
        stage,
        weights,
        micro_tokens,
        checkpointed,
        offloaded,
        in_gib(persistent),
        in_gib(transient),
        sampling_parts(
            policy, rows, decode_rows, ppo.max_prompt_tokens, ppo.max_new_tokens, rates, fp8=fp8
        ),
        computing | {"weights taken over by the decoder": merging},
        recorded,
        decode_rows,
    )


def _optimizer_bytes(ppo: PpoConfig, policy: Shape, weights: str, gpus: int, stage: int) -> float:
    """Moments, and masters where there are; of LoRA, the adapters and their gradients too."""
    if ppo.lora:
        return 16 * policy.lora(ppo.lora.rank)
    if weights == "compact":
        return policy.parameters * (4 + 8 / 256)
    return 12 * policy.parameters / gpus + (
        4 * policy.parameters if stage == 1 else 4 * policy.parameters / gpus
    )


def step_parts(p: int, weights: str, gpus: Gpus, stage: int, rates: Rates) -> dict[str, float]:
    """Seconds in which the gradients of p parameters are averaged over the GPUs and the optimizer
    steps: 8-bit states alike on every GPU, or float32 ones, of which ZeRO gives each GPU a part and
    hands the new weights round.
    """
    # read and written: states of 8 bits and bf16 halves; else gradient, weight, both moments, bf16
    states = 12 if weights == "compact" else 30 / gpus.number ** (stage > 0)
    buckets = 8 if stage > 0 else 0  # gradients copied into ZeRO's and out of them
    # A sum over all is a part for each, handed round; ZeRO 3 hands weights round twice more.
    sent = 2 * p * (1 - 1 / gpus.number) * (4 if stage == 3 else 2)
    return {
        "memory of the optimizer": p * (states + buckets) / rates.copy,
        "transfers between GPUs": sent / gpus.wire,
    }


def _gradient_bytes(p: int, weights: str, stage: int) -> float:
    """bf16 gradients on their way to the optimizer. ZeRO 2 and 3 pass them on in buckets."""
    return 2 * p if weights == "compact" or stage <= 1 else 4e9


# --- by hand: shapes from the models' config.json
# ---------------------------------------------------------------------

LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128, 128256, False)
KNOWN: dict[str, Shape | Sarm] = {
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "meta-llama/Llama-3.1-70B-Instruct": Shape(8192, 28672, 80, 64, 8, 128, 128256, False),
    "meta-llama/Llama-3.2-1B-Instruct": Shape(2048, 8192, 16, 32, 8, 64, 128256, True),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(3072, 8192, 28, 24, 8, 128, 128256, True),
    "Schrieffer/Llama-SARM-4B": Sarm(LLAMA_8B._replace(layers=16), 65536),
    "embedded:smollm2": Shape(576, 1536, 30, 9, 3, 64, 49152, True),
}
"""Sizes of models that need not lie on this machine."""


def shape_of(keys: Mapping[str, Any]) -> Shape:
    """From a config.json."""
    heads = keys["num_attention_heads"]
    return Shape(
        keys["hidden_size"],
        keys["intermediate_size"],
        keys["num_hidden_layers"],
        heads,
        keys.get("num_key_value_heads") or heads,
        keys.get("head_dim") or keys["hidden_size"] // heads,
        keys["vocab_size"],
        bool(keys.get("tie_word_embeddings")),
    )


def find_shape(model: str, revision: str | None) -> Shape | Sarm:
    """A model's sizes, from its folder, the hub's cache or `KNOWN`. Raises UserError."""
    if model in KNOWN:
        return KNOWN[model]
    from sarm.hub import local_model

    keys = json.loads((local_model(model, revision) / "config.json").read_text(encoding="utf-8"))
    nested = keys.get("sarm_param") or {}
    d_sae = keys.get("d_sae") or nested.get("sae_latent_size") or keys.get("sae_latent_size")
    if not d_sae:
        return shape_of(keys)
    layers = (
        nested.get("sae_source_layer")
        or keys.get("sae_hidden_state_source_layer")
        or keys["num_hidden_layers"]
    )
    return Sarm(shape_of(keys | {"num_hidden_layers": layers}), d_sae)


def parse_gpus(text: str) -> Gpus:
    """`4x80`: four GPUs of 80 GiB; `2x8x80`: two nodes of eight. Raises UserError."""
    words = text.lower().split("x")
    try:
        *counts, gib = words if len(words) > 1 else [*words, "80"]
        nodes, each = [1, *map(int, counts)][-2:]
        found = Gpus(nodes * each, float(gib), nodes)
    except ValueError:
        found = Gpus(0, 0)
    if found.nodes < 1 or found.number < 1 or found.gib <= OUTSIDE_GIB or len(words) > 3:
        raise UserError(
            f"GPUS={text} says nothing; write how many and how much memory each has, such as 4x80,"
            " or nodes, GPUs of each and memory, such as 2x8x80"
        )
    return found


def sampling_parts(
    policy: Shape,
    responses: int,
    at_once: int,
    prompt_tokens: int,
    new_tokens: int,
    rates: Rates,
    *,
    fp8: bool = False,
) -> dict[str, float]:
    """Seconds of sampling in waves. Each token of a wave reads the weights, and the keys and values
    of its rows so far; the prompts are read in one forward, for which weights in fp8 are widened.
    """
    if not responses:
        return {}
    so_far = at_once * (prompt_tokens + new_tokens / 2) * policy.kv_bytes
    waves = math.ceil(responses / at_once)
    tokens = waves * new_tokens
    reading = 2 * policy.layers * policy.layer * responses * prompt_tokens / rates.train
    if fp8:
        reading += waves * policy.fp8_bytes / FP8_WIDENED
    small = SMALL_KERNELS_S * policy.layers + SAMPLE_S
    of_weights = 2 * policy.parameters / rates.read
    if fp8:
        of_layers = policy.fp8_bytes / rates.fp8_read
        of_weights = of_layers + 2 * policy.embedding / rates.read
    return {
        "weights read to decode": tokens * of_weights,
        "keys and values read": tokens * so_far / rates.read,
        "small kernels of decoding": tokens * small,
        "prompts read": reading,
    }


def score_time(ppo: PpoConfig, sarm: Sarm, gpus: Gpus) -> float:
    """Seconds of a step's scoring."""
    rows = math.ceil(ppo.batch_size / gpus.number)
    longest = ppo.max_prompt_tokens + ppo.max_new_tokens
    return 2 * sarm.trunk.layers * sarm.trunk.layer * rows * longest / gpus.rates.score


def bounds(plan: Plan, score_s: float) -> str:
    """What takes most of a step, in words: parts that together are at least four fifths of it."""
    parts = plan.rollout_parts | plan.train_parts | {"products of scoring": score_s}
    whole, told, words = sum(parts.values()), 0.0, []
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        if told >= 0.8 * whole:
            break
        told += seconds
        words.append(f"{name} {seconds / whole:.0%}")
    return ", ".join(words)


def report(config: Config, gpus: Gpus) -> str:
    """Memory, disk and GPU-hours of a run's PPO, and the choice. Raises UserError where it does
    not fit.
    """
    policy, sarm = (
        find_shape(config.policy.model, config.policy.revision),
        find_shape(config.sarm.model, config.sarm.revision),
    )
    if not isinstance(policy, Shape) or not isinstance(sarm, Sarm):
        raise UserError(
            f"{config.policy.model} must be a language model and {config.sarm.model} a SARM;"
            " correct the config"
        )
    ppo = config.ppo
    plan = make_plan(ppo, policy, sarm.bytes, gpus)
    longest = ppo.max_prompt_tokens + ppo.max_new_tokens
    score_s = score_time(ppo, sarm, gpus)
    step_s = plan.rollout_s + score_s + plan.train_s
    units = len(config.units("ppo"))
    hours = units * ppo.steps * step_s * gpus.number / 3600
    checkpoint = (
        16 * policy.lora(ppo.lora.rank)
        if ppo.lora
        else policy.parameters * (6 if plan.weights == "compact" else 12)
    ) / 1e9
    policies = units * 2 * policy.parameters / 1e9
    lines = [
        (
            f"{config.policy.model}, {policy.parameters / 1e9:.2f} B parameters,"
            f" {'LoRA of rank ' + str(ppo.lora.rank) if ppo.lora else 'in full'}, {ppo.batch_size}"
            f" sequences of at most {longest} tokens a step, on {gpus}"
        ),
        "",
        "persistent, GiB per GPU",
        *(f"  {name:16}{gib:7.2f}" for name, gib in plan.persistent_gib.items() if gib > 0),
        "transient, GiB per GPU at most",
        *(f"  {name:16}{gib:7.2f}" for name, gib in plan.transient_gib.items()),
        f"peak              {plan.peak_gib:6.2f} of {gpus.shared(ppo).usable_gib:.1f} that torch"
        " may reserve",
        "",
        f"zero_stage {plan.zero_stage}, weights {plan.weights}, micro_batch_tokens"
        f" {plan.micro_batch_tokens}, {plan.checkpointed_layers} of {policy.layers} layers"
        f" checkpointed, {plan.offloaded_layers} of the reference's offloaded"
        + f", {plan.decode_rows} rows decoded at once"
        + ("" if ppo.rollout_dtype is None else f" from weights in {ppo.rollout_dtype}")
        + (", the pass over the batch recorded as CUDA graphs" if plan.recorded else ""),
        (
            f"a step of {step_s:.2f} s at an {gpus.rates.name}'s rates: rollout"
            f" {plan.rollout_s:.2f}, score"
            f" {score_s:.2f}, training {plan.train_s:.2f}"
        ),
        "bound by " + bounds(plan, score_s),
        (
            f"{units} policies of {ppo.steps} steps: {hours:.1f} GPU-hours, starting up and"
            " checkpoints aside"
        ),
        (
            f"disk: {policies:.1f} GB of policies, and up to {ppo.keep_last + 1} checkpoints of"
            f" {checkpoint:.1f} GB for each one in training"
        ),
    ]
    if gpus.number > 2:
        lines.append(
            "more than two GPUs: by arithmetic; on four only full fine-tuning in ZeRO-2 was"
            " measured, on more nothing"
        )
    if gpus.nodes > 1:
        lines.append(
            f"several nodes: by arithmetic, assuming {BETWEEN_NODES / 1e9:g} GB/s between nodes for"
            " each GPU; nothing was measured"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sarm.ppo.learner.memory_plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument(
        "--gpus", default="1x80", help="how many and how much memory each has: 4x80, 2x8x80"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    from sarm.cost import table  # which adds up what this module says of a step

    try:
        config, gpus = load_config(args.config, args.overrides), parse_gpus(args.gpus)
        print(report(config, gpus), table(config, gpus), sep="\n\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
