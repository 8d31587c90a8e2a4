"""A recorded pass against the eager one: outputs and gradients to the bit, over steps that move
the weights and change the shape.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sarm.config import ROOT
from sarm.llama.generate import EXACT, Steps, forced
from sarm.ppo.learner import cuda_graphs, layers
from sarm.ppo.learner.actor import make_actor
from sarm.ppo.learner.cuda_graphs import REPEATS, Recorded
from tests.ranks import tiny_ppo

PROMPTS, RESPONSES = [[5, 9, 12, 40], [7, 300, 8]], [[33, 21, 4], [90, 14, 77, 61, 2]]


def test_rounding_up_a_batch_changes_nothing_that_is_read(tiny_policy: Path) -> None:
    actor = make_actor(
        AutoModelForCausalLM.from_pretrained(tiny_policy), tiny_ppo(lora=None), 0, fused=True
    )
    exact, wider = (
        forced(PROMPTS, RESPONSES, 0, torch.device("cpu"), steps)
        for steps in (EXACT, Steps(16, 12))
    )
    assert exact.ids.shape == (2, 8) and wider.ids.shape == (2, 16)
    assert exact.labels.tolist() == [33, 21, 4, 90, 14, 77, 61, 2] and wider.labels.tolist() == [
        *exact.labels.tolist(),
        0,
        0,
        0,
        0,
    ]
    for ours, theirs in zip(actor(*wider, 0.7), actor(*exact, 0.7), strict=True):
        torch.testing.assert_close(ours[:8], theirs)


def test_no_room_for_a_recording_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        try:
            raise torch.OutOfMemoryError("full")
        finally:
            raise RuntimeError("the recording was broken off")

    monkeypatch.setattr(cuda_graphs, "_Graphs", full)
    run = Recorded(lambda x: (x,), [], [])
    for _ in range(REPEATS):
        run(torch.zeros(2))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        run(torch.zeros(2))


def test_the_memory_of_a_shape_that_is_over_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorded(lambda x: (x,), [], [])
    graphs_then: list[object] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: graphs_then.append(run.graphs))
    for _ in range(REPEATS):
        run(torch.zeros(2))
    run(torch.zeros(3))
    assert graphs_then == [], "nothing had been recorded"
    run.graphs = object()  # type: ignore[assignment]
    run(torch.zeros(2))
    assert graphs_then == [None], "once the graphs are gone, which hold it"
    run(torch.zeros(4))
    assert len(graphs_then) == 1


def no_room_on_a_gpu() -> None:
    """A pass that asks for 1 TiB when it is recorded, not before; what is queued afterwards is
    computed.
    """
    weight = torch.ones(2, device="cuda", requires_grad=True)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
        return (weight * x,)

    given = torch.full((2,), 3.0, device="cuda")
    recorded_run = Recorded(run, [weight], [weight])
    for _ in range(REPEATS):
        recorded_run(given)
    with pytest.raises(torch.OutOfMemoryError, match=r"1024\.00 GiB"):
        recorded_run(given)
    assert (given * 2).tolist() == [6.0, 6.0]


@pytest.mark.gpu
def test_no_room_for_a_recording_on_a_gpu_is_told_as_such() -> None:
    """In a process of its own: a broken-off recording leaves torch's allocator in the middle of
    one.
    """
    command = [
        sys.executable,
        "-c",
        "from tests.ppo.test_cuda_graphs import no_room_on_a_gpu; no_room_on_a_gpu()",
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)


def step(
    run: Recorded, actor: torch.nn.Module, responses: list[list[int]], scale: float
) -> list[torch.Tensor]:
    """Outputs and gradients of one pass; the weights then move a little against the gradients."""
    outputs = run(*forced(PROMPTS, responses, 0, torch.device("cuda"), Steps(16, 12)))
    logprobs, _, values = (out[: sum(map(len, responses))] for out in outputs)
    (scale * logprobs.square().sum() + values.sum()).backward()
    weights = [p for p in actor.parameters() if p.requires_grad]
    found = [t.detach().clone() for t in (*outputs, *(p.grad for p in weights))]  # type: ignore[union-attr]
    with torch.no_grad():
        for p in weights:
            p -= 1e-4 * p.grad  # type: ignore[operator]
            p.grad = None
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointed", [0, 1])
def test_a_recorded_pass_is_the_eager_one(tiny_policy: Path, lora: bool, checkpointed: int) -> None:
    actors = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(tiny_policy).cuda()
        layers.lay_side_by_side(model)
        actors.append(
            make_actor(
                model,
                tiny_ppo(lora={"rank": 2, "alpha": 4} if lora else None),
                0,
                fused=True,
                checkpointed=checkpointed,
            )
            .cuda()
            .train()
        )
    replayed, eager = (
        Recorded(
            lambda *inputs, a=actor: a(*inputs, 0.7),
            [p for p in actor.parameters() if p.requires_grad],
            list(actor.parameters()),
        )
        for actor in actors
    )
    shorter = [[33, 21, 4], [90]]
    was = []
    for i, responses in enumerate([RESPONSES] * (REPEATS + 2) + [shorter] + [RESPONSES]):
        eager.times = 0  # never comes to be recorded
        ours, theirs = (
            step(replayed, actors[0], responses, i + 1.0),
            step(eager, actors[1], responses, i + 1.0),
        )
        assert all(
            bool(a.isfinite().all()) and torch.equal(a, b)
            for a, b in zip(ours, theirs, strict=True)
        ), i
        was.append(replayed.graphs is not None)
    # the shorter batch has the same shape
    assert was == [False] * REPEATS + [True, True, True, True] and eager.graphs is None
    weight = next(actors[0].parameters())
    weight.data = weight.data.clone()
    step(replayed, actors[0], RESPONSES, 1.0)
    assert replayed.graphs is None, "a graph that reads the old place was kept"
