"""Exact effects against brute force: hooks on the real forward of a tiny SARM in float64, every
latent.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sarm.config import UserError
from sarm.reward_model.interventions import (
    Ablate,
    Add,
    Clamp,
    Direction,
    Ranks,
    Scale,
    contributions,
    direction_changes,
    latent_values,
    parse_steering,
    reward_changes,
    rewards_of,
    state_rewards,
    steering_file,
    without,
)
from sarm.reward_model.model import SarmModel
from sarm.reward_model.sae import TopK
from sarm.reward_model.scoring import encode_texts

D_SAE, K, EXTRA = 64, 8, 6
TEXTS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question in (
        "How can I make this work?",
        "What is the best way to do it, please tell me?",
        "Why?",
    )
    for answer in (
        "I am sorry, but I will not.",
        "Sure, here is how you do it: first take the thing.",
        "No.",
        "Please call for help.",
    )
]


class World(NamedTuple):
    model: SarmModel
    ranks: Ranks
    weight: np.ndarray
    states: torch.Tensor
    inputs: dict[str, torch.Tensor]

    def rewards(self) -> np.ndarray:
        """The real forward."""
        with torch.no_grad():
            return self.model(**self.inputs).logits[:, 0].numpy()

    def close(self, got: Any, brute: np.ndarray) -> bool:
        """To 1e-5 of the largest effect."""
        return float(np.abs(np.asarray(got) - brute).max()) <= 1e-5 * max(
            float(np.abs(brute).max()), 1e-3
        )


@pytest.fixture(scope="module")
def world(tiny_sarm: Path, tiny_tokenizer: Any) -> World:
    model = SarmModel.from_pretrained(tiny_sarm).double()
    encoded = encode_texts(
        model, tiny_tokenizer, TEXTS, extra_ranks=EXTRA, tokens_per_batch=4096, max_length=512
    )
    ids = [
        torch.tensor(tiny_tokenizer.apply_chat_template(t, tokenize=True, return_dict=False))
        for t in TEXTS
    ]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    inputs = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": mask,
    }
    ranks = Ranks(encoded.indices.numpy(), encoded.values.numpy(), model.k, model.d_sae)
    world = World(model, ranks, model.head_weight.detach().numpy(), encoded.states, inputs)
    assert world.close(rewards_of(ranks, world.weight), world.rewards())
    return world


class Removed:
    """Keeps latents out of TopK, by a hook on the encoder."""

    def __init__(self, world: World, latents: tuple[int, ...]) -> None:
        def remove(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            output[..., list(latents)] = -torch.inf
            return output

        self.handle = world.model.sae.encoder.register_forward_hook(remove)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def forward_with_dense(world: World, change: Any, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The real forward with all of z (n, d_sae) changed between TopK and head."""
    real = world.model.sae.topk

    def changed(a: torch.Tensor, k: int | None = None) -> TopK:
        top = real(a, k)
        z = torch.zeros_like(a).scatter(-1, top.indices, top.values)
        return TopK(change(z), torch.arange(D_SAE).expand(a.shape[0], -1))

    with monkeypatch.context() as patched:
        patched.setattr(world.model.sae, "topk", changed)
        return world.rewards()


def test_every_latent_ablated_before_topk(world: World) -> None:
    before, found = world.rewards(), np.zeros((len(TEXTS), D_SAE))
    np.put_along_axis(
        found,
        world.ranks.indices[:, :K],
        contributions(world.ranks, world.weight, reselected=True),
        axis=1,
    )
    brute = np.zeros_like(found)
    for latent in range(D_SAE):
        with Removed(world, (latent,)):
            brute[:, latent] = before - world.rewards()
        assert world.close(
            -reward_changes([Ablate((latent,), before_topk=True)], world.ranks, world.weight),
            brute[:, latent],
        )
    assert world.close(found, brute)
    assert (np.sign(brute) != 0).sum() == len(TEXTS) * K


def test_every_latent_ablated_after_topk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = world.rewards(), np.zeros((len(TEXTS), D_SAE))
    np.put_along_axis(
        found,
        world.ranks.indices[:, :K],
        contributions(world.ranks, world.weight, reselected=False),
        axis=1,
    )
    weight, brute = world.model.score.weight, np.zeros_like(found)
    for latent in range(D_SAE):
        kept = weight[0, latent].item()
        with torch.no_grad():
            weight[0, latent] = 0
            brute[:, latent] = before - world.rewards()
            weight[0, latent] = kept
        assert world.close(
            -reward_changes([Ablate((latent,))], world.ranks, world.weight), brute[:, latent]
        )
    assert world.close(found, brute)


@pytest.mark.parametrize("size", [2, 3, EXTRA])
def test_sets_ablated_before_topk(world: World, size: int) -> None:
    rng, before, differs = np.random.default_rng(size), world.rewards(), False
    for draw in range(20):
        # From among the ranks kept, so that runners-up are removed too.
        latents = tuple(
            int(i)
            for i in rng.choice(
                world.ranks.indices[draw % len(TEXTS), : K + 3], size, replace=False
            )
        )
        with Removed(world, latents):
            brute = world.rewards() - before
        found = reward_changes([Ablate(latents, before_topk=True)], world.ranks, world.weight)
        assert world.close(found, brute)
        one_by_one = sum(
            reward_changes([Ablate((i,), before_topk=True)], world.ranks, world.weight)
            for i in latents
        )
        differs |= not world.close(one_by_one, brute)
    assert differs, "sets should not be additive here, or the test shows nothing"


def test_a_set_beyond_the_ranks_kept_is_refused_and_small_saes_have_all(world: World) -> None:
    everything = tuple(int(i) for i in world.ranks.indices[0])
    says = (
        r"^removing 14 latents before TopK leaves \d+ texts with fewer than k = 8 known ranks, as"
        r" encode kept 6 beyond k; raise encode\.extra_ranks to the size of the set$"
    )
    with pytest.raises(UserError, match=says):
        without(world.ranks, everything)
    # A set larger than the spare ranks is fine where few of it are among them.
    assert without(world.ranks, (0, 1)).indices.shape == (len(TEXTS), K)
    absent = tuple(sorted(set(range(D_SAE)) - {int(i) for i in world.ranks.indices.ravel()}))
    if absent:
        assert not reward_changes(
            [Ablate(absent, before_topk=True)], world.ranks, world.weight
        ).any()
    whole = Ranks(np.array([[2, 0, 1]]), np.array([[3.0, 2.0, 1.0]]), 2, 3)
    assert reward_changes(
        [Ablate((2, 0), before_topk=True)], whole, np.array([1.0, 10.0, 100.0])
    ) == pytest.approx([10.0 - 302.0])
    assert contributions(
        Ranks(whole.indices, whole.values, 3, 3), np.ones(3), reselected=True
    ).tolist() == [[3.0, 2.0, 1.0]]


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_scale_add_and_clamp(world: World, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    before = world.rewards()
    for latent in (0, 17, int(world.ranks.indices[0, 0])):
        for step in (
            Scale(latent, value),
            Add(latent, value),
            Clamp(latent, value, value),
            Clamp(latent, -0.5, max(value, -0.5)),
            Clamp(latent, -np.inf, 0.8),
        ):

            def change(z: torch.Tensor, step: Any = step) -> torch.Tensor:
                z = z.clone()
                column = z[:, step.latent]
                match step:
                    case Scale():
                        column *= value
                    case Add():
                        column += value
                    case Clamp():
                        column.clamp_(step.low, step.high)
                return z

            brute = forward_with_dense(world, change, monkeypatch) - before
            assert world.close(reward_changes([step], world.ranks, world.weight), brute), step


def test_interventions_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (int(i) for i in world.ranks.indices[0, :3])

    def change(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, b] = (z[:, b] * 3 + 1).clamp(max=2)
        z[:, c] = 0
        return z

    before = world.rewards()
    with Removed(world, (a,)):
        brute = forward_with_dense(world, change, monkeypatch) - before
    steps = [
        Ablate((a,), before_topk=True),
        Scale(b, 3.0),
        Add(b, 1.0),
        Clamp(b, -np.inf, 2.0),
        Ablate((c,)),
    ]
    assert world.close(reward_changes(steps, world.ranks, world.weight), brute)
    assert reward_changes([], world.ranks, world.weight).tolist() == [0.0] * len(TEXTS)


def test_direction_moves_the_state_at_the_reward_position(world: World) -> None:
    before, inputs = world.rewards(), world.inputs
    ends = inputs["attention_mask"].sum(1) - 1
    real = world.model.sae.normalise
    for latent, c in ((0, 1.0), (5, -0.7), (40, 3.0), (63, 0.0)):
        column = world.model.sae.decoder.weight[:, latent].detach()

        def moved(h: torch.Tensor, column: torch.Tensor = column, c: float = c) -> torch.Tensor:
            std = (
                (h - h.mean(-1, keepdim=True))
                .square()
                .sum(-1, keepdim=True)
                .div(h.shape[-1] - 1)
                .sqrt()
            )
            return real(h + c * std * column / column.square().sum().sqrt())

        world.model.sae.normalise = moved  # type: ignore[method-assign]
        brute = world.rewards() - before
        del world.model.sae.normalise
        found = direction_changes(
            world.model.sae, world.model.head_weight, world.states, K, Direction(latent, c)
        )
        assert found.shape == ends.shape and world.close(found.numpy(), brute)
        assert (brute != 0).any() == (c != 0)


def test_direction_does_not_care_for_the_decoder_s_length(world: World) -> None:
    before = direction_changes(
        world.model.sae, world.model.head_weight, world.states, K, Direction(5, 1.0)
    )
    with torch.no_grad():
        world.model.sae.decoder.weight.mul_(7)
        after = direction_changes(
            world.model.sae, world.model.head_weight, world.states, K, Direction(5, 1.0)
        )
        world.model.sae.decoder.weight.div_(7)
    torch.testing.assert_close(after, before)


def test_rewards_of_states_at_a_k_that_is_not_the_model_s(world: World) -> None:
    sae, weight, few = world.model.sae, world.model.head_weight, K - 3
    want = rewards_of(world.ranks._replace(k=few), world.weight)
    got = state_rewards(sae, weight, world.states, few)
    assert world.close(got.detach().numpy(), want) and not world.close(want, world.rewards())
    still, step = Direction(5, 0.0), Direction(5, 2.0)
    assert not direction_changes(sae, weight, world.states, few, still).any()
    d = sae.decoder.weight[:, 5] / sae.decoder.weight[:, 5].norm()
    moved = world.states + 2 * world.states.std(-1, keepdim=True) * d
    want = state_rewards(sae, weight, moved, few).detach().numpy() - want
    assert world.close(direction_changes(sae, weight, world.states, few, step).numpy(), want)


def test_removal_keeps_the_order_of_many_ranks() -> None:
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(500)[:300] for _ in range(3)])
    values = np.sort(rng.normal(size=(3, 300)))[:, ::-1].astype(np.float32)
    removed = [int(i) for i in indices[1, ::7]]
    found = without(Ranks(indices.astype(np.int32), values, 240, 500), removed)
    for row in range(3):
        pairs = zip(indices[row].tolist(), values[row].tolist(), strict=True)
        want = [(i, value) for i, value in pairs if i not in removed][:240]
        assert found.indices[row].tolist() == [i for i, _ in want]
        assert found.values[row].tolist() == [value for _, value in want]
    assert (found.k, found.d_sae) == (240, 500)


def test_rewards_are_summed_in_float64() -> None:
    ranks = Ranks(np.array([[2, 0, 1]], np.int32), np.array([[3e7, 2, 1]], np.float32), 2, 3)
    weight = np.array([0.5, 7.0, 1.0], np.float32)
    assert rewards_of(ranks, weight).tolist() == [3e7 + 1]
    weight[2] = 1 / 3
    exact = 3e7 * float(weight[2]) - 7.0  # latent 1 comes up
    assert contributions(ranks, weight, reselected=True)[0, 0] == exact


def test_latent_values_are_zero_outside_topk() -> None:
    ranks = Ranks(
        np.array([[4, 1, 2], [3, 4, 0]]), np.array([[5.0, -0.5, -1.0], [2.0, 1.0, 0.5]]), 2, 5
    )
    assert latent_values(ranks, [4, 1, 2, 0]).tolist() == [
        [5.0, -0.5, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
    ]
    assert latent_values(ranks, []).shape == (2, 0)
    with pytest.raises(UserError, match=r"^latent 5 does not exist: this SARM has latents 0 to 4$"):
        reward_changes([Scale(5, 0.0)], ranks, np.ones(5))
    says = r"^re-selected effects need the runner-up: keep at least k [+] 1 ranks$"
    with pytest.raises(ValueError, match=says):
        contributions(
            Ranks(ranks.indices[:, :2], ranks.values[:, :2], 2, 5), np.ones(5), reselected=True
        )


def test_the_first_and_the_last_latent_can_be_steered_and_none_beside_them() -> None:
    ranks = Ranks(np.array([[4, 1, 2]]), np.array([[5.0, -0.5, -1.0]]), 2, 5)
    assert reward_changes([Scale(4, 0.0), Add(0, 3.0)], ranks, np.arange(1.0, 6.0)) == [-25 + 3]
    with pytest.raises(UserError, match="latent -1 does not exist"):
        reward_changes([Scale(-1, 0.0)], ranks, np.ones(5))


def test_steps_are_told_by_what_they_do() -> None:
    steps = (Scale(3, 0.25), Add(3, -1.5), Clamp(3, -0.5, 2.25))
    words = ["times 0.25", "plus -1.5", "clamped to [-0.5, 2.25]"]
    assert [step.words for step in steps] == words


def test_after_topk_steps_work_on_torch_and_numpy_alike() -> None:
    z = np.array([-1.0, 0.0, 4.0])
    for step in (Scale(0, 2.0), Add(0, 1.0), Clamp(0, -0.5, 2.0)):
        assert step.applied(torch.tensor(z)).tolist() == step.applied(z).tolist()


def test_steering_file_as_upstream_writes_it(tmp_path: Path) -> None:
    steering = {"48659": ["*", 0.0], "891": ["+", 1.0]}
    steps = parse_steering(steering)
    assert steps == [Scale(48659, 0.0), Add(891, 1.0)]
    assert steering_file(steps) == steering
    (tmp_path / "s.json").write_text(json.dumps(steering))
    assert parse_steering(tmp_path / "s.json") == steps == parse_steering(str(tmp_path / "s.json"))


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ([1], " is not a mapping of latents; FORM"),
        ({"a": ["*", 0.0]}, ": 'a' is not the number of a latent; FORM"),
        ({"-1": ["*", 0.0]}, ": '-1' is not the number of a latent; FORM"),
        ({"5": ["-", 0.0]}, ": latent 5 has the symbol '-'; known are *, +; FORM"),
        ({"5": [["*"], 0.0]}, ": latent 5 has the symbol ['*']; known are *, +; FORM"),
        ({"5": ["*"]}, ": latent 5 has ['*']; FORM"),
        ({"5": 0.0}, ": latent 5 has 0.0; FORM"),
        ({"5": ["*", "0"]}, ": latent 5 has the value '0', which is no finite number; FORM"),
        ({"5": ["*", True]}, ": latent 5 has the value True, which is no finite number; FORM"),
        ({"5": ["+", math.nan]}, ": latent 5 has the value nan, which is no finite number; FORM"),
        ({"5": ["+", 1.0], "05": ["*", 1.0]}, ": latent 5 is named twice; keep one entry"),
    ],
)
def test_a_steering_file_that_is_none_is_refused(
    tmp_path: Path, steering: Any, message: str
) -> None:
    message = message.replace("FORM", 'it must look like {"48659": ["*", 0.0], "891": ["+", 1.0]}')
    with pytest.raises(UserError) as refused:
        parse_steering(steering)
    assert str(refused.value) == f"steering{message}"
    (tmp_path / "s.json").write_text(json.dumps(steering))
    with pytest.raises(UserError) as refused:
        parse_steering(tmp_path / "s.json")
    assert str(refused.value) == f"steering file {tmp_path}/s.json{message}"


def test_a_steering_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^steering file .*/nothing\.json cannot be read: No such"):
        parse_steering(tmp_path / "nothing.json")
    (tmp_path / "cut.json").write_text('{"5": ["*"')
    with pytest.raises(UserError, match=r"^steering file .*/cut\.json is not JSON: Expecting"):
        parse_steering(tmp_path / "cut.json")
