"""Latents at every token, against the model's own forward on the text cut there; words and siblings
by hand.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from sarm.data.conversations import tokenize_conversations
from sarm.data.datasets import Prompt
from sarm.evaluation.examples import MOST, chosen_rows, own_examples
from sarm.probing.siblings import by_direction, by_firing
from sarm.reward_model.interventions import Ranks
from sarm.reward_model.lens import lens_words
from sarm.reward_model.model import SarmModel
from sarm.reward_model.token_activations import token_activations

CONVERSATIONS = [
    [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Like this, I think."}],
    [{"role": "user", "content": "Why " * 30}, {"role": "assistant", "content": "No."}],
]


@pytest.fixture(scope="module")
def model(tiny_sarm: Path) -> SarmModel:
    return SarmModel.from_pretrained(tiny_sarm)


def test_each_token_has_what_the_model_says_of_the_text_that_ends_there(model, tiny_tokenizer):
    latents = list(reversed(range(model.d_sae)))  # all, or the one at TopK's edge is missed
    found = token_activations(
        model, tiny_tokenizer, CONVERSATIONS, latents, max_length=512, window=9
    )
    for one, text in zip(
        found, tokenize_conversations(tiny_tokenizer, CONVERSATIONS, 512), strict=True
    ):
        assert len(one.tokens) == 9 and one.a.shape == one.kept.shape == (9, model.d_sae)
        for place in range(9):
            end = len(text.ids) - 8 + place
            with torch.inference_mode():
                states = model.states(torch.tensor([text.ids[:end]]))
                a = model.sae.preactivations(states)[0]
                kept = set(model.sae.topk(a).indices.tolist())
            assert one.a[place] == pytest.approx(a[latents].numpy(), abs=2e-4)
            assert one.kept[place].tolist() == [latent in kept for latent in latents]
    assert found[0].kept.any() and not found[0].kept.all()


def test_tokens_are_the_texts_end(model, tiny_tokenizer):
    one = token_activations(model, tiny_tokenizer, CONVERSATIONS[:1], [0], max_length=512)[0]
    assert "Like this, I think." in "".join(one.tokens)
    assert one.of(0)["a"] == pytest.approx(one.a[:, 0], abs=1e-4)
    assert one.of(0)["kept"] == np.flatnonzero(one.kept[:, 0]).tolist()


def test_lens_words_by_hand(tmp_path, tiny_tokenizer):
    rows = len(tiny_tokenizer)
    unembedding = torch.zeros(rows, 2)
    unembedding[5], unembedding[7] = torch.tensor([4.0, 0.0]), torch.tensor([0.0, -3.0])
    norm = torch.tensor([0.5, 2.0])
    save_file(
        {"lm_head.weight": unembedding, "model.norm.weight": norm}, tmp_path / "model.safetensors"
    )
    directions = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    (first, second), why = lens_words(tmp_path, directions, tiny_tokenizer, n=2)
    assert why == "" and first["up"][0]["logit"] == pytest.approx(2.0)
    assert first["up"][0]["word"] == tiny_tokenizer.decode([5])
    assert second["up"][0]["logit"] == pytest.approx(0.6 * 0.5 * 4)
    assert second["down"][0] == {
        "word": tiny_tokenizer.decode([7]),
        "logit": pytest.approx(0.8 * 2.0 * -3.0),
    }
    words, why = lens_words(tmp_path, torch.zeros(1, 3), tiny_tokenizer)
    assert words == [] and "not as wide" in why


def test_siblings_by_direction_are_the_largest_cosines_whatever_their_sign():
    directions = np.array([[1, 0], [0.6, 0.8], [-1, 0], [0, 1]], np.float32)
    found = by_direction([0, 3], directions, most=2)
    assert found[0] == [{"latent": 2, "cosine": -1.0}, {"latent": 1, "cosine": pytest.approx(0.6)}]
    assert found[3][0]["latent"] == 1 and len(found[3]) == 1  # the others have a cosine of 0
    # of equal cosines the lower numbers first
    many = np.tile(np.array([[1.0, 0.0]], np.float32), (40, 1))
    assert [one["latent"] for one in by_direction([2], many)[2]] == [0, 1, 3, 4, 5]


def test_siblings_by_firing_are_correlations_of_who_fires():
    rng = np.random.default_rng(0)
    fires = rng.random((60, 7)) < np.array([0.5, 0.5, 0.3, 0.2, 0.7, 0.0, 1.0])
    fires[:, 1] = fires[:, 0] ^ (rng.random(60) < 0.1)
    k = 7
    order = np.argsort(~fires, axis=1, kind="stable")
    values = np.where(np.take_along_axis(fires, order, 1), 0.5, -0.25)
    found = by_firing([0, 2, 5], Ranks(order, values, k, 7), most=3)
    expected = np.nan_to_num(np.corrcoef(fires.T.astype(float)))
    assert found[0][0]["latent"] == 1
    for latent in (0, 2):
        for one in found[latent]:
            assert one["phi"] == pytest.approx(expected[latent, one["latent"]])
            assert one["both"] == (fires[:, latent] & fires[:, one["latent"]]).sum()
        others = sorted((expected[latent, i] for i in range(7) if i != latent), reverse=True)
        assert [one["phi"] for one in found[latent]] == pytest.approx(
            [phi for phi in others[:3] if phi > 0]
        )
    assert found[5] == []
    # on the last of more latents nothing fires, nor is anything kept
    indices = np.array([range(30), range(30), range(10, 40), range(10, 40)])
    some = Ranks(indices, np.full((4, 30), 1.0), 30, 50)
    assert by_firing([2], some)[2][0] == {"latent": 0, "phi": 1.0, "both": 2}
    # nothing fires on the last of more latents, and equal phi are in the order of their numbers
    many = Ranks(np.tile(np.arange(30), (4, 1)), np.full((4, 30), -1.0), 30, 50)
    many.values[:2] = 1.0
    assert [one["latent"] for one in by_firing([2], many)[2]] == [0, 1, 3, 4, 5]


def test_examples_are_one_a_prompt_of_each_kind_and_distance():
    n = 40
    rng = np.random.default_rng(0)
    whose = pd.DataFrame(
        {"prompt_id": [f"p{i // 2}" for i in range(n)], "distance": [0.5] * 20 + [np.nan] * 20}
    )
    z = np.where(rng.random(n) < 0.5, rng.random(n), 0.0)
    below = np.where((z == 0) & (rng.random(n) < 0.5), rng.random(n), 0.0)
    watched = pd.DataFrame({"z_4": z, "below_4": below})
    chosen = chosen_rows(whose, watched, [4], seed=3)
    for part in (range(20), range(20, 40)):
        mine = [(row, what) for row, _, what in chosen if row in part]
        best: dict[str, float] = {}
        for row in part:
            if z[row] > 0:
                best[whose["prompt_id"][row]] = max(z[row], best.get(whose["prompt_id"][row], 0))
        top = [z[row] for row, what in mine if what == "top"]
        assert top == sorted(best.values(), reverse=True)[: MOST["top"]]
        assert all(z[row] == 0 and below[row] > 0 for row, what in mine if what == "below")
        assert all(z[row] == below[row] == 0 for row, what in mine if what == "random")
        for kind, most in MOST.items():
            prompts = [whose["prompt_id"][row] for row, what in mine if what == kind]
            assert 0 < len(prompts) == len(set(prompts)) <= most
    tied = pd.DataFrame({"z_4": np.tile([1.0, 2.0], n // 2), "below_4": np.zeros(n)})
    each = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(n)], "distance": 0.5})
    assert [row for row, _, _ in chosen_rows(each, tied, [4], seed=3)] == [1, 3, 5]


def test_own_examples_hold_what_the_latent_does_at_every_token(
    tiny_sarm: Path, tiny_tokenizer: Any
) -> None:
    model = SarmModel.from_pretrained(tiny_sarm)
    prompts = [
        Prompt(f"p{i}", ({"role": "user", "content": f"Question {i}?"},), "s", "unsafe", "", "test")
        for i in range(5)
    ]
    texts = [f"I will not do {i * i}. " * (i + 1) for i in range(5)]
    whose: dict[str, Any] = {
        "distance": [0.5] * 5,
        "prompt_id": [p.id for p in prompts],
        "source": ["s"] * 5,
    }
    z = [0.0, 3.0, 1.0, 0.0, 2.0]
    watched = pd.DataFrame({"z_7": z, "below_7": [0.25, 0.0, 0.0, 0.5, 0.0]})
    for latent in (4, 9):
        watched[f"z_{latent}"], watched[f"below_{latent}"] = 0.0, [0.0, 0.0, 0.0, 0.0, 1.5]
    config: Any = SimpleNamespace(seed=3, sarm=SimpleNamespace(max_length=64))
    watch: Any = SimpleNamespace(penalised=[SimpleNamespace(latent=7)], monitors=[4, 9])
    found = own_examples(config, watch, prompts, texts, whose, watched, (model, tiny_tokenizer))
    mine = [e for e in found.examples if e["latent"] == 7]
    of = [found.texts[e["text"]]["prompt_id"] for e in mine]
    assert [(p, e["what"], e["z"]) for p, e in zip(of, mine, strict=True)] == [
        ("p1", "top", 3.0),
        ("p4", "top", 2.0),
        ("p2", "top", 1.0),
        ("p3", "below", 0.0),
        ("p0", "below", 0.0),
    ]
    for example in found.examples:
        text = found.texts[example["text"]]
        row = whose["prompt_id"].index(text["prompt_id"])
        (alone,) = token_activations(
            model,
            tiny_tokenizer,
            [(*prompts[row].messages, {"role": "assistant", "content": texts[row]})],
            [7, 4, 9],
            max_length=64,
        )
        want = alone.of([7, 4, 9].index(example["latent"]))
        assert text["tokens"] == alone.tokens and example["kept"] == want["kept"]
        assert example["a"] == pytest.approx(want["a"], abs=1e-3)
    nothing = watched * 0
    for name in ("z_7", "z_4", "z_9"):
        nothing[name] = np.nan
    assert (
        own_examples(
            config,
            watch,
            prompts[:0],
            [],
            {k: [] for k in whose},
            nothing[:0],
            (model, tiny_tokenizer),
        ).examples
        == []
    )


def test_own_examples_in_whole(monkeypatch: Any) -> None:
    """Two policies' responses to two prompts; a latent that is penalised and watched is one."""
    from sarm.evaluation import examples

    prompts = [
        Prompt(name, ({"role": "user", "content": f"ask {name}"},), "s", "unsafe", "", "test")
        for name in "abab"
    ]
    texts = ["first", "second", "third", "fourth"]
    whose: dict[str, Any] = {
        "prompt_id": [p.id for p in prompts],
        "distance": [0.5, 0.5, np.nan, np.nan],
        "sample": [0, 1, 2, 3],
    }
    watched = pd.DataFrame(
        {
            "z_7": [0.0, 2.0, 0.0, 0.0],
            "below_7": [0.0, 0.0, 1.5, 0.0],
            "z_4": [3.0, 1.0, 0.0, -1.0],
            "below_4": [0.0] * 4,
        }
    )
    asked: dict[str, Any] = {}

    def activations(*given: Any, **how: Any) -> list[Any]:
        asked.update(given=given, how=how)
        return [
            SimpleNamespace(
                tokens=[said[-1]["content"], "!"], of=lambda at, n=n: {"a": [n, at], "kept": [at]}
            )
            for n, said in enumerate(given[2])
        ]

    monkeypatch.setattr(examples, "token_activations", activations)
    config: Any = SimpleNamespace(seed=3, sarm=SimpleNamespace(max_length=64))
    watch: Any = SimpleNamespace(penalised=[SimpleNamespace(latent=7)], monitors=[4, 7])
    found = own_examples(config, watch, prompts, texts, whose, watched, ("model", "tokenizer"))  # type: ignore[arg-type]
    said = [
        ({"role": "user", "content": f"ask {p.id}"}, {"role": "assistant", "content": text})
        for p, text in zip(prompts, texts, strict=True)
    ]
    assert asked["given"] == ("model", "tokenizer", said, [7, 4])
    assert asked["how"] == {"max_length": 64}
    assert found.texts == [
        {
            "prompt_id": p.id,
            "distance": None if i > 1 else 0.5,
            "sample": i,
            "tokens": [texts[i], "!"],
        }
        for i, p in enumerate(prompts)
    ]
    rows = [
        (7, "top", 1, 2.0),
        (7, "random", 0, 0.0),
        (4, "top", 0, 3.0),
        (4, "top", 1, 1.0),
        (7, "below", 2, 0.0),
        (7, "random", 3, 0.0),
        (4, "random", None, None),
        (4, "random", None, None),
    ]
    assert [(e["latent"], e["what"]) for e in found.examples] == [row[:2] for row in rows]
    for example, (latent, _, row, z) in zip(found.examples, rows, strict=True):
        at = [7, 4].index(latent)
        assert example["a"] == [example["text"], at] and example["kept"] == [at]
        if row is not None:
            assert (example["text"], example["z"]) == (row, z)
    assert {e["text"] for e in found.examples[-2:]} == {2, 3}
    # nothing fires, nothing is silent: nothing is shown, and nothing is read
    monkeypatch.setattr(examples, "token_activations", None)
    none = own_examples(config, watch, [], [], {k: [] for k in whose}, watched[:0], (None, None))  # type: ignore[arg-type]
    assert none.texts == [] and none.examples == []


def test_random_examples_are_drawn_by_seed_and_latent() -> None:
    n = 30
    whose = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(n)], "distance": 1.0})
    silent = pd.DataFrame({f"{c}_{i}": np.zeros(n) for c in ("z", "below") for i in (4, 5)})
    found = chosen_rows(whose, silent, [4, 5], seed=3)
    want = [
        (int(row), latent, "random")
        for latent in (4, 5)
        for row in np.random.default_rng([3, latent]).permutation(n)[:2]
    ]
    assert found == want
