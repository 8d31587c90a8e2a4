"""`benchmarks/sharding.py`: what it compares must be the same training."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks


def two_updates_of_each(world) -> None:  # type: ignore[no-untyped-def]
    from benchmarks import sharding
    from sarm.llama.weights import LlamaWeights

    def trained(way: str, **choices: bool) -> list[torch.Tensor]:
        engine = sharding.make_engine(
            way, "tiny", world, torch.float32, rows=2, learning_rate=1e-3, **choices
        )
        rows, predicts, labels, weights, tokens = sharding.random_batch(
            engine.actor, world, 2, 4, 8
        )
        engine.train()
        for _ in range(2):
            engine.backward(
                -(engine(rows, predicts, labels, 1.0)[0] * weights).sum() / tokens, True
            )
            norm = engine.step()  # of which Adam's step hardly depends
        engine.train(False)
        with sharding.gathering(engine):
            whole = LlamaWeights(engine.actor.policy)
        return [
            norm.float(),
            whole.embedding,
            whole.norm,
            whole.lm_head,
            *(t for la in whole.layers for t in la),
        ]

    ours = trained("zero2")
    untrained = sharding.make_engine("zero2", "tiny", world, torch.float32, rows=2).actor.policy
    moved = (ours[1] - untrained.model.embed_tokens.weight).abs().max()
    assert moved > 1e-3, moved
    for others in (trained("zero3"), trained("fsdp2", plain=True), trained("fsdp2", kept=True)):
        for a, b in zip(ours, others, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_every_way_gives_the_same_weights() -> None:
    run_ranks(two_updates_of_each, 2)
