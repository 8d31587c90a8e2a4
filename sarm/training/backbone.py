"""Train the layers below a SARM's SAE on preference pairs: low-rank updates and a linear head on
the state, by Bradley-Terry (upstream's second stage, arXiv 2508.08746, with LoRA).

`train_backbone(model, ids, pairs, ...)` merges what it found into the model, rounded as it is
saved; the head is thrown away, the SAE and the SARM's own head are fitted to the new states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sarm.config import TrainSarmConfig
from sarm.reward_model.adapter import PREFIX, merge_adapter
from sarm.reward_model.model import SarmModel
from sarm.training.pairs import Texts

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]


class LowRank(nn.Module):
    """A frozen projection and its update: `W x + B A x`."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.weight.device
        # A as nn.Linear initialises it, B zero: the first step starts from the model as it is.
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        update: Tensor = nn.functional.linear(nn.functional.linear(x, a), b)
        return self.base(x) + update


def train_backbone(
    model: SarmModel,
    ids: Sequence[Sequence[int]],
    texts: Texts,
    weights: Floats,
    head: Floats,
    config: TrainSarmConfig,
    *,
    tokens_per_batch: int,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Train on pairs drawn in proportion to `weights` (n_pairs,), and merge the updates into the
    model; `model.adapter` holds them as they are saved, in bfloat16.

    `ids` are the texts' tokens, `head` (d_in,) where the head on normalised states starts: a head
    fitted to the states as they were keeps the first steps from pulling the layers apart. Float32;
    on a GPU the layers run in bfloat16 while the factors and their moments stay in float32.
    """
    torch.manual_seed(seed)
    device = model.device
    exact = [(parameter, parameter.data) for parameter in model.model.parameters()]
    if device.type == "cuda":
        # Not autocast: its casts of every operand take most of a step with projections this narrow
        for parameter, data in exact:
            parameter.data = data.bfloat16()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapted = adapt(model, config.backbone_rank)
    score = torch.tensor(head, dtype=torch.float32, device=device).requires_grad_()
    factors = [p for module in adapted.values() for p in (module.a, module.b)]
    optimizer = torch.optim.AdamW(
        [{"params": factors, "weight_decay": 0.0}, {"params": [score], "weight_decay": 0.0}],
        lr=config.backbone_learning_rate,
    )
    for step, batch in enumerate(pair_batches(weights, config, seed)):
        for group in optimizer.param_groups:
            group["lr"] = config.backbone_learning_rate * cosine(step, config.backbone_steps)
        for part in micro_batches(batch, ids, texts, tokens_per_batch):
            margin = margins(model, ids, texts, part, score)
            (nn.functional.softplus(-margin).sum() / len(batch)).backward()
        nn.utils.clip_grad_norm_([*factors, score], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, config.backbone_steps)
    for parameter, data in exact:
        parameter.data = data
    merge(model, adapted)


def adapt(model: SarmModel, rank: int) -> dict[str, LowRank]:
    """Put an update beside every projection of every layer; by the name of its weight."""
    found = {}
    for name, module in list(model.model.named_modules()):
        for child, projection in list(module.named_children()):
            if child in TARGETS:
                low_rank = LowRank(projection, rank)
                setattr(module, child, low_rank)
                found[f"model.{name}.{child}.weight"] = low_rank
    return found


@torch.no_grad()
def merge(model: SarmModel, adapted: dict[str, LowRank]) -> None:
    """Put the projections back with their updates in them, the factors rounded to bfloat16."""
    model.adapter = {
        f"{PREFIX}{name}.{factor}": getattr(module, factor).detach().bfloat16().cpu().contiguous()
        for name, module in adapted.items()
        for factor in "ab"
    }
    state = {name: module.base.weight.cpu() for name, module in adapted.items()}
    merge_adapter(state, model.adapter)
    for name, module in adapted.items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        module.base.weight.copy_(state[name])
        setattr(model.get_submodule(parent), child, module.base)


def margins(
    model: SarmModel,
    ids: Sequence[Sequence[int]],
    texts: Texts,
    pairs: Sequence[int],
    score: Tensor,
) -> Tensor:
    """r(chosen) - r(rejected) of some pairs, (n,), with gradients."""
    chosen, rejected = texts.chosen[pairs].tolist(), texts.rejected[pairs].tolist()
    rows = [torch.tensor(ids[row]) for row in (*chosen, *rejected)]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    ends = torch.tensor([len(row) - 1 for row in rows], device=model.device)
    h = model.model(input_ids=padded, use_cache=False).last_hidden_state
    end = h[torch.arange(len(rows), device=h.device), ends].float()
    rewards = model.sae.normalise(end) @ score
    return rewards[: len(pairs)] - rewards[len(pairs) :]


def pair_batches(weights: Floats, config: TrainSarmConfig, seed: int) -> Iterator[list[int]]:
    """The pairs of every step, drawn with replacement in proportion to their weights."""
    generator = np.random.default_rng(seed)
    for _ in range(config.backbone_steps):
        drawn = generator.choice(len(weights), config.backbone_batch, p=weights / weights.sum())
        yield drawn.tolist()


def micro_batches(
    batch: Sequence[int], ids: Sequence[Sequence[int]], texts: Texts, tokens_per_batch: int
) -> Iterator[list[int]]:
    """The pairs of a step in groups of like length, each padded to at most `tokens_per_batch`
    tokens or of one pair.
    """

    def longest(pair: int) -> int:
        return max(len(ids[int(side[pair])]) for side in (texts.chosen, texts.rejected))

    rows: list[int] = []
    for pair in sorted(batch, key=lambda pair: (-longest(pair), pair)):
        if rows and longest(rows[0]) * 2 * (len(rows) + 1) > tokens_per_batch:
            yield rows
            rows = []
        rows.append(pair)
    if rows:
        yield rows


def cosine(step: int, steps: int) -> float:
    """What step 0, 1, ... has of the full rate: it warms up over a twentieth of the steps and
    falls to a tenth.
    """
    warm = max(steps // 20, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))
