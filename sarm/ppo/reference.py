"""The policy as it was, frozen; some of its layers may wait in pinned host memory and come to the GPU as they are needed.

A layer of an 8 B model crosses a PCIe 5 bus in 8 ms while the GPU computes two. So those that wait are spread evenly among
those that stay, and each is fetched while the ones before it are computed, the first two of the next pass right after this
one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sarm.ppo import objective, trunk


class Reference:
    """A frozen copy of a policy without LoRA; `streamed_layers` of a Llama on a GPU live on the host."""

    def __init__(self, policy: Any, streamed_layers: int = 0) -> None:
        self.model: Any = copy.deepcopy(policy).requires_grad_(False).eval()
        self.lean = trunk.knows(self.model)
        layers = list(self.model.model.layers)
        self.layers: Sequence[Any] | StreamedLayers = StreamedLayers(layers, streamed_layers) if streamed_layers else layers

    @torch.no_grad()
    def logprobs(self, ids: Tensor, predicts: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """(n,) float32; the arguments are `rollout.forced`'s."""
        model = self.model.model
        hidden = trunk.last_hidden(model, ids, layers=self.layers) if self.lean else model(input_ids=ids, use_cache=False).last_hidden_state
        return objective.logprobs_from_hidden(hidden.flatten(0, 1).index_select(0, predicts), self.model.lm_head, labels, temperature).logprobs


def spread(count: int, among: int) -> list[int]:
    """`count` of `among` indices, evenly."""
    return [(2 * i + 1) * among // (2 * count) for i in range(count)]


class StreamedLayers:
    """All layers in order, each with its weights on the GPU when its turn comes; two places there serve those on the host."""

    def __init__(self, layers: Sequence[Any], streamed: int) -> None:
        self.layers, self.waiting = layers, spread(streamed, len(layers))
        device = next(layers[0].parameters()).device
        self.hosts = [_moved_to_host(layers[i]) for i in self.waiting]
        torch.cuda.empty_cache()
        self.places = [torch.empty_like(self.hosts[0], device=device) for _ in range(2)]
        self.stream = torch.cuda.Stream(device)
        self.arrived, self.free = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
        self.uses = 0
        """Of layers on the host, so far: use u is of `waiting[u % streamed]`, in place u % 2."""
        for use in range(2):
            self._fetch(use)

    def __iter__(self) -> Iterator[Any]:
        for i, layer in enumerate(self.layers):
            if i not in self.waiting:
                yield layer
                continue
            current, place = torch.cuda.current_stream(self.places[0].device), self.uses % 2
            current.wait_event(self.arrived[place])
            _lay(layer, self.places[place])
            yield layer
            self.free[place].record(current)
            self._fetch(self.uses + 2)
            self.uses += 1

    def _fetch(self, use: int) -> None:
        place = use % 2
        self.stream.wait_event(self.free[place])  # which has passed where it was never recorded
        with torch.cuda.stream(self.stream):
            self.places[place].copy_(self.hosts[use % len(self.hosts)], non_blocking=True)
            self.arrived[place].record(self.stream)


def _moved_to_host(layer: Any) -> Tensor:
    """The layer's parameters one after another, pinned; the layer is left without."""
    parameters = list(layer.parameters())
    host = torch.empty(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, pin_memory=True)
    for p, part in zip(parameters, host.split([p.numel() for p in parameters]), strict=True):
        part.copy_(p.detach().flatten())
        p.shape_there = p.shape
        p.data = p.data.new_empty(0)
    return host


def _lay(layer: Any, place: Tensor) -> None:
    """Let the layer's parameters lie in `place`."""
    at = 0
    for p in layer.parameters():
        size = p.shape_there.numel()
        p.data = place[at : at + size].view(p.shape_there)
        at += size
