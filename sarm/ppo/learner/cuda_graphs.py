"""A step's one pass over its batch as two CUDA graphs, forward and backward: what launches its
thousand kernels at once.

    run = Recorded(judge, weights, all_parameters_and_buffers)
    outputs = run(ids, predicts, labels)  # by graphs once a shape has come REPEATS times in a row
    loss(outputs).backward()              # fills the weights' .grad either way

At Llama-3.2-1B's shape the host needs 20 ms to launch a forward pass that takes the GPU 14. The
inputs are padded to steps of shape (`rollout.forced`), so that a run has few; one shape is recorded
at a time. Graphs keep the memory of their pass for themselves, so `memory_plan.py` says where there
is room. `python -m pytest -m gpu tests/ppo/test_cuda_graphs.py` compares with the eager pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

REPEATS = 2
"""Steps of one shape before it is recorded, which costs about one more."""

Run = Callable[..., tuple[Tensor, ...]]


class Recorded:
    """`run(*inputs)`, a function of tensors on one GPU and of `weights`, some of whose outputs
    have gradients.

    `reads` are all tensors beside the inputs whose place the graphs remember: where one moves, the
    graphs are dropped. Gradients of the weights are the graphs' own memory: a step makes one
    backward pass between two `zero_grad`, and they last until the next forward pass.
    """

    def __init__(self, run: Run, weights: Sequence[Tensor], reads: Sequence[Tensor]) -> None:
        self.run, self.weights, self.reads = run, list(weights), list(reads)
        self.seen: tuple[Any, ...] = ()
        self.times = 0
        self.graphs: _Graphs | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = (*(tuple(t.shape) for t in inputs), *(t.data_ptr() for t in self.reads))
        self.times = self.times + 1 if key == self.seen else 1
        self.seen = key
        if self.times == 1 and self.graphs is not None:
            self.graphs = None
            # Their memory is of a shape that may not come again, and was for nobody else's use.
            torch.cuda.empty_cache()
        if self.times <= REPEATS:
            return self.run(*inputs)
        if self.graphs is None:
            self.graphs = self._recorded(inputs)
        found: tuple[Tensor, ...] = _Replay.apply(self.graphs, inputs, *self.weights)
        return found

    def _recorded(self, inputs: Sequence[Tensor]) -> _Graphs:
        """Raises OutOfMemoryError where there is no room, though the end of a broken-off recording
        fails by itself.
        """
        try:
            return _Graphs(self.run, inputs, self.weights)
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise


class _Graphs:
    """One shape's pass, recorded. It has been run before, so kernels are compiled."""

    def __init__(self, run: Run, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self.inputs = [t.clone() for t in inputs]
        pool = torch.cuda.graph_pool_handle()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool):
            outputs = run(*self.inputs)
        self.with_gradient = [i for i, out in enumerate(outputs) if out.requires_grad]
        self.d_outputs = [torch.zeros_like(outputs[i]) for i in self.with_gradient]
        with torch.cuda.graph(self.backward, pool=pool):
            self.gradients = torch.autograd.grad(
                [outputs[i] for i in self.with_gradient], weights, self.d_outputs, allow_unused=True
            )
        self.outputs = [out.detach() for out in outputs]


class _Replay(torch.autograd.Function):
    """Both graphs, where autograd wants them."""

    @staticmethod
    def forward(
        ctx: Any, graphs: _Graphs, inputs: Sequence[Tensor], *_: Tensor
    ) -> tuple[Tensor, ...]:
        for place, value in zip(graphs.inputs, inputs, strict=True):
            place.copy_(value)
        graphs.forward.replay()
        outputs = tuple(out.detach() for out in graphs.outputs)
        ctx.graphs = graphs
        ctx.mark_non_differentiable(
            *(out for i, out in enumerate(outputs) if i not in graphs.with_gradient)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        graphs: _Graphs = ctx.graphs
        for place, i in zip(graphs.d_outputs, graphs.with_gradient, strict=True):
            place.copy_(grads[i])
        graphs.backward.replay()
        return (
            None,
            None,
            *(None if gradient is None else gradient.detach() for gradient in graphs.gradients),
        )
