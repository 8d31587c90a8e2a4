"""Training the layers: the update, what is merged and saved, the loss it falls by, and that pairs
without weight are never seen.
"""

import numpy as np
import pytest
import torch

from sarm.config import TrainSarmConfig, UserError
from sarm.reward_model.adapter import merge_adapter
from sarm.reward_model.model import SarmModel
from sarm.training.backbone import (
    LowRank,
    adapt,
    cosine,
    margins,
    merge,
    micro_batches,
    pair_batches,
    train_backbone,
)
from sarm.training.fit import dense_differences
from sarm.training.heads import fit_head
from sarm.training.pairs import Texts
from sarm.training.sae import end_states

CONFIG = TrainSarmConfig(
    layer=2,
    d_sae=16,
    k=4,
    backbone_rank=3,
    backbone_steps=25,
    backbone_batch=8,
    backbone_learning_rate=5e-3,
)


def tiny_model(tiny_policy, layer: int = 2) -> SarmModel:
    return SarmModel.from_backbone(
        str(tiny_policy), source_layer=layer, d_sae=16, k=4, dtype=torch.float32
    )


def planted(n: int = 24) -> tuple[list[list[int]], Texts]:
    """Chosen texts hold token 7 early on, which a head at the end cannot see by itself."""
    generator = np.random.default_rng(0)
    ids = []
    for i in range(2 * n):
        row = generator.integers(20, 300, generator.integers(6, 14)).tolist()
        row[1] = 7 if i % 2 == 0 else 9
        ids.append([1, *row, 3])
    return ids, Texts([()] * 2 * n, torch.arange(0, 2 * n, 2), torch.arange(1, 2 * n, 2))


def test_an_update_starts_at_nothing_and_is_the_product_of_its_factors():
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 4, bias=False)
    low_rank, x = LowRank(base, 2), torch.randn(3, 5)
    assert torch.equal(low_rank(x), base(x))
    with torch.no_grad():
        low_rank.b.copy_(torch.randn(4, 2))
    torch.testing.assert_close(low_rank(x), x @ (base.weight + low_rank.b @ low_rank.a).T)


def test_margins_are_of_the_normalised_states_at_the_ends(tiny_policy):
    model, (ids, texts) = tiny_model(tiny_policy), planted()
    score = torch.randn(32)
    found = margins(model, ids, texts, [3, 0, 11], score)
    for got, pair in zip(found.tolist(), (3, 0, 11), strict=True):
        rewards = []
        for row in (int(texts.chosen[pair]), int(texts.rejected[pair])):
            h = model.model(torch.tensor([ids[row]])).last_hidden_state[0, -1]
            rewards.append(float((h - h.mean()) / (h.std() + 1e-6) @ score))
        assert got == pytest.approx(rewards[0] - rewards[1], abs=1e-4)


def test_training_learns_what_the_frozen_layers_do_not_show_and_leaves_weightless_pairs(
    tiny_policy,
):
    model, (ids, texts) = tiny_model(tiny_policy), planted()
    weights = np.where(np.arange(24) < 20, 1.0, 0.0)
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    train_backbone(model, ids, texts, weights, np.zeros(32), CONFIG, tokens_per_batch=120, seed=1)
    again, other = tiny_model(tiny_policy), [list(row) for row in ids]
    for pair in range(20, 24):  # other texts in pairs without weight change nothing
        other[2 * pair] = [1, 50, 3]
    train_backbone(again, other, texts, weights, np.zeros(32), CONFIG, tokens_per_batch=120, seed=1)
    for (name, ours), theirs in zip(
        model.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        moved = name.split(".")[-2].endswith("proj")
        assert torch.equal(ours, before[name]) != moved, name
    losses = []
    for of in (tiny_model(tiny_policy), model):
        z = dense_differences(end_states(of, ids, 500), texts)
        head = fit_head(z, weights, 0.1, max_steps=500)
        losses.append(np.logaddexp(0, -(z @ head))[:20].mean())
    assert losses[1] < 0.5 * losses[0]


def test_what_is_saved_opens_as_what_was_trained(tiny_policy, tmp_path):
    model, (ids, texts) = tiny_model(tiny_policy), planted()
    train_backbone(
        model, ids, texts, np.ones(24), np.zeros(32), CONFIG, tokens_per_batch=500, seed=0
    )
    model.save_pretrained(tmp_path / "a")
    opened = SarmModel.from_pretrained(tmp_path / "a", dtype=torch.float32)
    base = tiny_model(tiny_policy)
    for name, parameter in model.model.named_parameters():
        ours = opened.model.get_parameter(name)
        assert torch.equal(ours, parameter), name
        a, b = (model.adapter.get(f"adapter.model.{name}.{f}") for f in "ab")
        expected = base.model.get_parameter(name)
        if a is not None:
            assert a.dtype == torch.bfloat16 and a.shape[0] == b.shape[1] == 3
            expected = expected + b.float() @ a.float()
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    # Opened and saved again, nothing is lost; in bfloat16 the sum is what is rounded.
    opened.save_pretrained(tmp_path / "b")
    halved = SarmModel.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    for name, parameter in model.model.named_parameters():
        assert torch.equal(halved.model.get_parameter(name), parameter.bfloat16()), name


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"adapter.model.layers.0.mlp.up_proj.weight.a": torch.ones(2, 5)},
        lambda t: t | {"adapter.model.layers.0.mlp.up_proj.weight.b": torch.ones(5, 3)},
        lambda t: t | {"adapter.model.layers.9.mlp.up_proj.weight.a": torch.ones(3, 32)},
        lambda t: {
            k: v for k, v in t.items() if k != "adapter.model.layers.0.mlp.up_proj.weight.b"
        },
    ],
)
def test_factors_that_fit_no_weight_are_refused(tiny_policy, tmp_path, change):
    from safetensors.torch import load_file, save_file

    model = tiny_model(tiny_policy)
    merge(model, adapt(model, 3))
    model.save_pretrained(tmp_path)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"adapter of model\.layers"):
        SarmModel.from_pretrained(tmp_path, dtype=torch.float32)


def test_merging_adds_the_product_in_float32():
    state = {"w": torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), "v": torch.ones(1)}
    a, b = torch.tensor([[0.5, -0.25], [1.0, 1.0]]), torch.tensor([[0.001, 2.0]])
    merge_adapter(state, {"adapter.w.a": a.bfloat16(), "adapter.w.b": b.bfloat16()})
    assert state["w"].dtype == torch.float32 and set(state) == {"w", "v"}
    small = float(b.bfloat16()[0, 0])
    torch.testing.assert_close(
        state["w"], torch.tensor([[3.0 + small * 0.5, 4.0 - small * 0.25]]), atol=0, rtol=1e-6
    )


def test_pairs_are_drawn_by_weight():
    weights = np.array([0.0, 1.0, 3.0])
    config = CONFIG.model_copy(update={"backbone_steps": 200, "backbone_batch": 10})
    drawn = [pair for batch in pair_batches(weights, config, 0) for pair in batch]
    assert len(drawn) == 2000 and 0 not in drawn
    assert 0.70 < drawn.count(2) / 2000 < 0.80


def test_micro_batches_hold_every_pair_and_keep_to_the_budget():
    ids, texts = planted()
    batch = [5, 1, 9, 9, 2]
    parts = list(micro_batches(batch, ids, texts, 60))
    assert sorted(p for part in parts for p in part) == sorted(batch) and len(parts) > 1
    for part in parts:
        longest = max(len(ids[2 * p + side]) for p in part for side in (0, 1))
        assert len(part) == 1 or 2 * len(part) * longest <= 60


def test_the_rate_warms_up_and_falls_to_a_tenth():
    rates = [cosine(step, 40) for step in range(40)]
    assert rates[:3] == [0.5, 1.0, 1.0] and all(np.diff(rates[2:]) <= 0)
    assert cosine(21, 40) == pytest.approx(0.55) and 0.1 <= rates[-1] < 0.11
