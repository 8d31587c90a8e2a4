"""Fitting an SAE: whose states, in what order, the loss and its schedule against SAELens's."""

from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sarm.config import TrainSarmConfig
from sarm.data.conversations import tokenize_conversation
from sarm.reward_model.model import SarmModel
from sarm.reward_model.sae import TopKSae
from sarm.training.sae import (
    Trained,
    as_topk_sae,
    end_states,
    endless_states,
    learning_rate_factor,
    length_batches,
    mixed_batches,
    sae_loss,
    sae_quality,
    token_states,
    train_sae,
)


@pytest.mark.parametrize("positions", ["token", "last", "both"])
def test_states_are_the_models_hidden_states_at_the_configured_positions(
    tiny_policy, tiny_tokenizer, positions
):
    model = SarmModel.from_backbone(
        str(tiny_policy), source_layer=1, d_sae=8, k=2, dtype=torch.float32
    )
    whole = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    conversations = [
        [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * n}]
        for n in (1, 30, 7)
    ]
    rows = [tokenize_conversation(tiny_tokenizer, m, 64).ids for m in conversations]
    found = torch.cat(list(token_states(model, rows, positions, tokens_per_batch=100)))
    every = []
    for ids in rows:
        with torch.no_grad():
            every.append(whole(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0])
    tokens, last = torch.cat(every), torch.stack([h[-1] for h in every])
    # Every state is one of the expected, in whatever order the batches came.
    expected = {"token": tokens, "last": last, "both": torch.cat([tokens, last])}[positions]
    nearest = (found[:, None] - expected).abs().amax(2)
    assert nearest.min(1).values.max() < 1e-4 and nearest.min(0).values.max() < 1e-4
    assert (
        len(found) == {"token": len(tokens), "last": len(last), "both": 2 * len(tokens)}[positions]
    )
    if positions == "both":
        assert ((found[:, None] - last).abs().amax(2).min(1).values < 1e-4).sum() >= len(tokens)


def test_kept_states_and_recomputed_ones_are_the_same_set(monkeypatch):
    passes = []

    def one_pass():
        passes.append(0)
        yield from (torch.full((2, 3), float(i)) for i in range(4))

    def two_passes():
        states = endless_states(one_pass, lambda h: h + 1)
        return sorted(float(next(states)[0, 0]) for _ in range(8))

    assert two_passes() == [1, 1, 2, 2, 3, 3, 4, 4] and len(passes) == 1
    monkeypatch.setattr("sarm.training.sae.KEPT_BYTES", 60)
    passes.clear()
    assert two_passes() == [1, 1, 2, 2, 3, 3, 4, 4] and len(passes) == 2


def test_batches_keep_to_the_token_budget() -> None:
    lengths = [5, 9, 2, 9, 30, 1, 4]
    batches = list(length_batches(lengths, 18))
    assert batches == [[4], [1, 3], [0, 6, 2], [5]]
    assert list(length_batches([], 18)) == []


def planted_states(d_in: int, d_sae: int, k: int, seed: int = 0):
    """A source of normalised states that a dictionary of d_sae directions makes, k at a time."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)

    def states(n: int) -> torch.Tensor:
        active = torch.rand(n, d_sae, generator=generator).topk(k).indices
        z = torch.zeros(n, d_sae).scatter(1, active, 1 + torch.rand(n, k, generator=generator))
        h = z @ dictionary
        return (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True)

    return states


def test_sae_learns_a_planted_dictionary():
    d_in, d_sae, k = 16, 24, 3
    states = planted_states(d_in, d_sae, k)
    config = TrainSarmConfig(d_sae=d_sae, k=k, sae_steps=400, sae_batch=256, sae_learning_rate=3e-3)
    heard = []
    sae = train_sae(
        iter(lambda: states(512), None),
        d_in,
        config,
        device="cpu",
        seed=0,
        progress=lambda i, n: heard.append((i, n)),
    )
    quality = sae_quality(sae, states(1000))
    assert quality.fvu < 0.35 and quality.l0 <= k and quality.never_active <= 3
    assert torch.allclose(sae.decoder.weight.norm(dim=0), torch.ones(d_sae), atol=1e-5)
    assert heard[0] == (1, 400) and heard[-1] == (400, 400)


@pytest.mark.parametrize("n_dead", [0, 3, 15])
def test_loss_and_gradients_are_saelenss(n_dead):
    """Its own `training_forward_pass`, with some latents dead: fewer than, and more than, half as
    many as a state has dimensions.
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    d_in, d_sae, k = 16, 24, 3
    theirs = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, k=k, normalize_activations="none", apply_b_dec_to_input=True
        )
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    weights = Trained(
        *(
            p.detach().clone().requires_grad_()
            for p in (theirs.W_enc, theirs.b_enc, theirs.W_dec, theirs.b_dec)
        )
    )
    x, dead = planted_states(d_in, d_sae, k)(50), torch.arange(d_sae) < n_dead
    loss, fired = sae_loss(weights, k, x, dead)
    loss.backward()
    step = theirs.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    step.loss.backward()
    assert loss.item() == pytest.approx(step.loss.item(), rel=1e-5)
    assert torch.equal(fired, (step.feature_acts.to_dense() != 0).any(0))
    for ours, other in zip(
        weights, (theirs.W_enc, theirs.b_enc, theirs.W_dec, theirs.b_dec), strict=True
    ):
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-4, rtol=1e-4)
    # What is handed over encodes and decodes as SAELens does, where nothing kept is below zero.
    sae = as_topk_sae(weights, k)
    theirs.fold_W_dec_norm()
    with torch.no_grad():
        a = (x - sae.pre_bias) @ sae.encoder.weight.T + sae.latent_bias
        latents = sae.topk(a)
        positive = latents.values[:, -1] > 1e-3
        assert positive.float().mean() > 0.5
        torch.testing.assert_close(
            sae.decode(latents)[positive], theirs(x)[positive], atol=1e-4, rtol=1e-4
        )


def test_learning_rates_are_saelenss():
    from sae_lens.training.optim import get_lr_scheduler

    steps = 100
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_lr_scheduler(
        "constant",
        optimizer=optimizer,
        lr=1.0,
        lr_end=0.1,
        warm_up_steps=steps // 20,
        decay_steps=steps // 5,
        training_steps=steps,
        num_cycles=1,
    )
    theirs = []
    for _ in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [learning_rate_factor(step, steps) for step in range(steps)] == pytest.approx(theirs)
    assert theirs[0] == 0.2 and theirs[-1] == pytest.approx(0.05)


def test_a_batch_is_drawn_from_many_pieces():
    pieces = (torch.full((4, 1), float(i)) for i in range(100))
    batches = [b.flatten().tolist() for b in islice(mixed_batches(pieces, 5, 8), 12)]
    assert all(len(batch) == 5 for batch in batches)
    assert np.mean([len(set(batch)) for batch in batches]) > 3
    drawn = [value for batch in batches for value in batch]
    assert max(drawn.count(value) for value in drawn) <= 4


def test_end_states_are_in_the_order_given(tiny_policy, tiny_tokenizer):
    model = SarmModel.from_backbone(
        str(tiny_policy), source_layer=1, d_sae=8, k=2, dtype=torch.float32
    )
    rows = [[1, 5, 9], [7], [3, 3, 3, 3, 3, 8], [2, 4]]
    alone = torch.cat([end_states(model, [row], 100) for row in rows])
    torch.testing.assert_close(end_states(model, rows, 6), alone, atol=1e-5, rtol=1e-5)


def test_sae_quality_of_a_perfect_and_an_empty_sae():
    states = torch.randn(50, 4)
    sae = TopKSae(4, 8, 4)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.cat([torch.eye(4), torch.zeros(4, 4)]))
        sae.latent_bias.copy_(torch.tensor([0.0] * 4 + [-9.0] * 4))
        sae.decoder.weight.copy_(torch.cat([torch.eye(4), torch.zeros(4, 4)]).T)
    perfect = sae_quality(sae, states)
    assert (
        perfect.fvu < 1e-9
        and perfect.never_active == 4
        and perfect.negative == 1.0
        and perfect.l0 == 4
    )
    with torch.no_grad():
        sae.encoder.weight.zero_()
        sae.latent_bias.zero_()
        sae.pre_bias.copy_(sae.normalise(states).mean(0))
    assert sae_quality(sae, states).fvu == pytest.approx(1.0)
