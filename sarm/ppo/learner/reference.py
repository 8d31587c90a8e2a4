"""The policy as it was, frozen; its layers may be offloaded to pinned host memory and come to the
GPU once a step.

A step needs the reference before it has gradients, so the two can take turns in the same memory:
the layers are copied while responses are decoded, which leaves the bus idle (16 GB over PCIe 5 in
0.3 s, 128 tokens of an 8 B model in 0.9 s), and each goes when it has been used. Nothing is copied
back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sarm.llama.logprobs import logprobs_from_hidden
from sarm.llama.weights import LlamaWeights
from sarm.ppo.learner import layers


class Reference:
    """A frozen copy of a policy without LoRA; the first `offloaded_layers` of a Llama on a GPU are
    offloaded.
    """

    def __init__(self, policy: Any, offloaded_layers: int = 0) -> None:
        self.model: Any = copy.deepcopy(policy).requires_grad_(False).eval()
        self.fused = LlamaWeights.knows(self.model)
        layers.lay_side_by_side(self.model)
        own = list(self.model.model.layers)
        self.layers: Sequence[Any] | OffloadedLayers = (
            OffloadedLayers(own, offloaded_layers) if offloaded_layers else own
        )

    def fetch(self) -> None:
        """Start copying what `logprobs` will need to the GPU."""
        if isinstance(self.layers, OffloadedLayers):
            self.layers.fetch()

    @torch.no_grad()
    def logprobs(
        self, rows: layers.Rows, predicts: Tensor, labels: Tensor, temperature: float
    ) -> Tensor:
        """(n,) float32; the arguments are those of `forced` or, of a Llama, `forced_shared`."""
        model = self.model.model
        hidden = (
            layers.last_hidden(model, rows, layers=self.layers)
            if self.fused
            else model(input_ids=rows, use_cache=False).last_hidden_state
        )
        return logprobs_from_hidden(
            hidden.flatten(0, 1).index_select(0, predicts), self.model.lm_head, labels, temperature
        ).logprobs


class OffloadedLayers:
    """All layers in order; those that live on the host are on the GPU from `fetch` until their
    turn has passed.
    """

    def __init__(self, layers: Sequence[Any], offloaded: int) -> None:
        self.layers = layers
        self.device = next(layers[0].parameters()).device
        self.hosts = {i: _moved_to_host(layers[i]) for i in range(offloaded)}
        self.arrived: dict[int, torch.cuda.Event] = {}
        self.stream = torch.cuda.Stream(self.device)
        torch.cuda.empty_cache()

    def fetch(self) -> None:
        """Start copying what is not there; returns at once."""
        missing = [i for i in self.hosts if i not in self.arrived]
        # Of the main queue's memory, so that what it frees is free for gradients.
        places = {i: torch.empty_like(self.hosts[i], device=self.device) for i in missing}
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for i in missing:
            with torch.cuda.stream(self.stream):
                places[i].copy_(self.hosts[i], non_blocking=True)
                self.arrived[i] = torch.cuda.Event()
                self.arrived[i].record(self.stream)
            _lay(self.layers[i], places[i])

    def __iter__(self) -> Iterator[Any]:
        self.fetch()
        for i, layer in enumerate(self.layers):
            if i in self.hosts:
                torch.cuda.current_stream(self.device).wait_event(self.arrived[i])
            yield layer
            if i in self.hosts:
                del self.arrived[i]
                _free(layer)


def _moved_to_host(layer: Any) -> Tensor:
    """The layer's parameters one after another, pinned; the layer is left without."""
    parameters = list(layer.parameters())
    host = torch.empty(
        sum(p.numel() for p in parameters), dtype=parameters[0].dtype, pin_memory=True
    )
    for p, part in zip(parameters, host.split([p.numel() for p in parameters]), strict=True):
        part.copy_(p.detach().flatten())
        p.shape_there = p.shape
    _free(layer)
    return host


def _free(layer: Any) -> None:
    for p in layer.parameters():
        p.data = p.data.new_empty(0)


def _lay(layer: Any, place: Tensor) -> None:
    """Let the layer's parameters lie in `place`."""
    at = 0
    for p in layer.parameters():
        size = p.shape_there.numel()
        p.data = place[at : at + size].view(p.shape_there)
        at += size
