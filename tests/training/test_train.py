"""Training a SARM: activations, the SAE taken over from SAELens, Bradley-Terry heads, folds that
do not leak, the whole phase.
"""

import copy
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.sparse import csr_array
from transformers import AutoModelForCausalLM

from jobs.__main__ import main, run_unit
from sarm.config import ROOT, TrainSarmConfig, UserError
from sarm.data.conversations import tokenize_conversation
from sarm.data.datasets import Pair, Prompt, load_data
from sarm.reward_model.model import SarmModel, load_sarm
from sarm.reward_model.scoring import encode_texts
from sarm.run import RunDir
from sarm.training.train import (
    Folds,
    Latents,
    Texts,
    clustered_accuracy,
    cross_validated_points,
    differences,
    distinct_texts,
    endless_states,
    fit_head,
    fold_accuracy,
    length_batches,
    pair_points,
    pair_weights,
    prompt_folds,
    sae_quality,
    token_states,
    train_heads,
    train_sae,
)
from tests.tiny import tiny_config

SPLIT = {"data.sources.demo.split": {"sarm_train": 0.6, "test": 0.4}, "data.sources.demo.limit": 60}


def pair(
    prompt: str,
    source: str = "a",
    chosen: str = "no",
    rejected: str = "yes",
    part: str = "sarm_train",
) -> Pair:
    return Pair(
        f"{source}-{prompt}",
        Prompt(prompt, ({"role": "user", "content": prompt},), source, "unsafe", "", part),
        source,
        chosen,
        rejected,
    )


# Activations


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
    config = TrainSarmConfig(layer=1, positions=positions, max_length=64)
    found = torch.cat(
        list(token_states(model, tiny_tokenizer, conversations, config, tokens_per_batch=100))
    )
    every = []
    for messages in conversations:
        ids = tokenize_conversation(tiny_tokenizer, messages, 64).ids
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
    monkeypatch.setattr("sarm.training.train.KEPT_BYTES", 60)
    passes.clear()
    assert two_passes() == [1, 1, 2, 2, 3, 3, 4, 4] and len(passes) == 2


def test_batches_keep_to_the_token_budget() -> None:
    lengths = [5, 9, 2, 9, 30, 1, 4]
    batches = list(length_batches(lengths, 18))
    assert batches == [[4], [1, 3], [0, 6, 2], [5]]
    assert list(length_batches([], 18)) == []


# The SAE


def test_sae_is_saelens_own_and_learns_a_planted_dictionary(monkeypatch):
    import sae_lens.training.sae_trainer as saelens

    d_in, d_sae, k = 16, 24, 3
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)

    def states(n: int) -> torch.Tensor:
        active = torch.rand(n, d_sae, generator=generator).topk(k).indices
        z = torch.zeros(n, d_sae).scatter(1, active, 1 + torch.rand(n, k, generator=generator))
        h = z @ dictionary
        return (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True)

    trained = {}
    fit = saelens.SAETrainer.fit
    monkeypatch.setattr(
        saelens.SAETrainer, "fit", lambda self: trained.setdefault("sae", copy.deepcopy(fit(self)))
    )
    config = TrainSarmConfig(d_sae=d_sae, k=k, sae_steps=400, sae_batch=256, sae_learning_rate=3e-3)
    sae = train_sae(iter(lambda: states(512), None), d_in, config, device="cpu", seed=0)
    fresh = states(1000)
    quality = sae_quality(sae, fresh)
    assert quality.fvu < 0.35 and quality.l0 <= k and quality.never_active <= 3
    # What was taken over encodes as SAELens does, where nothing kept is below zero.
    latents = sae.encode(fresh)
    ours = torch.zeros(len(fresh), d_sae).scatter(1, latents.indices, latents.values)
    theirs = trained["sae"].encode(fresh)
    positive = latents.values[:, -1] > 1e-3
    assert positive.float().mean() > 0.5
    torch.testing.assert_close(ours[positive], theirs[positive], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        sae.decode(latents)[positive], trained["sae"](fresh)[positive], atol=1e-4, rtol=1e-4
    )


def test_sae_quality_of_a_perfect_and_an_empty_sae():
    from sarm.reward_model.sae import TopKSae

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


# The head


def some_pairs(n: int = 60, d_sae: int = 30, k: int = 4, seed: int = 0) -> tuple[Latents, Texts]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(2 * n, d_sae, generator=generator).topk(k).indices
    values = torch.randn(2 * n, k, generator=generator, dtype=torch.float64)
    order = torch.randperm(2 * n, generator=generator)
    return Latents(indices, values), Texts([()] * (2 * n), order[:n], order[n:])


def test_margins_are_those_of_dense_latents():
    latents, texts = some_pairs()
    dense = torch.zeros(120, 30, dtype=torch.float64).scatter(1, latents.indices, latents.values)
    assert np.allclose(
        differences(latents, texts, 30).toarray(),
        (dense[texts.chosen] - dense[texts.rejected]).numpy(),
    )


def test_head_is_the_minimum_of_the_loss_as_written():
    latents, texts = some_pairs()
    z = torch.from_numpy(differences(latents, texts, 30).toarray())
    weights = torch.rand(60, dtype=torch.float64)
    weights[:10] = 0
    found = torch.from_numpy(
        fit_head(csr_array(z.numpy()), weights.numpy(), 0.01, max_steps=1000)
    ).requires_grad_()
    loss = (
        -sum(weights[i] / weights.sum() * torch.log(torch.sigmoid(z[i] @ found)) for i in range(60))
        + 0.01 / 2 * (found**2).sum()
    )
    loss.backward()
    assert found.grad.abs().max() < 1e-5
    warm = fit_head(csr_array(z.numpy()), weights.numpy(), 0.01, max_steps=1000, start=np.ones(30))
    assert np.allclose(warm, found.detach().numpy(), atol=1e-4)


def test_pairs_count_by_prompt_and_source():
    pairs = [pair("p"), pair("p", chosen="never"), pair("q"), pair("r", source="b")]
    assert pair_weights(pairs) == pytest.approx([1 / 8, 1 / 8, 1 / 4, 1 / 2])


def test_texts_are_listed_once():
    texts = distinct_texts([pair("p"), pair("p", chosen="never"), pair("q")])
    assert [m[-1]["content"] for m in texts.messages] == ["no", "yes", "never", "no", "yes"]
    assert texts.chosen.tolist() == [0, 2, 3] and texts.rejected.tolist() == [1, 1, 4]


# Folds


def test_folds_are_even_within_sources_and_keep_a_prompt_together(tmp_path):
    data = load_data(tiny_config(tmp_path).data)
    folds = prompt_folds(data, data.pairs, 5)
    of_prompt: dict[str, set[int]] = {}
    for p, fold in zip(data.pairs, folds.outer.tolist(), strict=True):
        of_prompt.setdefault(p.prompt.id, set()).add(fold)
    assert all(len(found) == 1 for found in of_prompt.values())
    sizes = Counter(next(iter(found)) for found in of_prompt.values())
    assert len(sizes) == 5 and max(sizes.values()) - min(sizes.values()) <= 1
    # The inner folds are another dealing, so that no outer fold is one of them.
    assert 0.05 < (folds.outer == folds.inner).mean() < 0.4


def test_no_head_has_seen_the_prompts_it_judges():
    """Every prompt has a latent of its own: what was trained on is perfect, what was not is a
    tie.
    """
    n = 40
    z = csr_array(np.eye(n))
    config = TrainSarmConfig(d_sae=n, k=1, folds=4, head_l2=(0.01, 0.1))
    folds = Folds(np.arange(n) % 4, np.arange(n) // 4 % 4)
    heads = train_heads(z, np.full(n, 1 / n), folds, config)
    assert pair_points(z @ heads.shipped.weight).mean() == 1.0
    assert (cross_validated_points(z, heads, folds.outer) == 0.5).all()


def test_l2_is_chosen_without_the_fold_it_is_judged_on():
    """Labels of one outer fold are turned over: its own head may not notice."""
    generator = np.random.default_rng(0)
    z = generator.normal(size=(80, 6))
    z[:, 0] += 1
    folds = Folds(np.arange(80) % 4, generator.integers(0, 4, 80))
    config = TrainSarmConfig(d_sae=6, k=1, folds=4)
    before = train_heads(csr_array(z), np.full(80, 1 / 80), folds, config)
    turned = np.where((folds.outer == 2)[:, None], -z, z)
    after = train_heads(csr_array(turned), np.full(80, 1 / 80), folds, config)
    assert (
        np.array_equal(before.by_fold[2].weight, after.by_fold[2].weight)
        and before.by_fold[2].l2 == after.by_fold[2].l2
    )
    assert not np.allclose(before.by_fold[1].weight, after.by_fold[1].weight)


def test_accuracy_by_hand():
    points = pair_points(np.array([2.0, -1.0, 0.0, 1.0]))
    assert points.tolist() == [1, 0, 0.5, 1]
    folded = fold_accuracy(points, np.array([0, 0, 1, 1]), ["p", "p", "q", "q"])
    assert folded.mean == pytest.approx(0.625) and folded.standard_error == pytest.approx(0.125)
    assert folded.folds == (0.5, 0.75) and (folded.pairs, folded.prompts) == (4, 2)
    # Deviations from 0.625 by prompt: -0.25 and 0.25.
    assert clustered_accuracy(points, ["p", "p", "q", "q"]).standard_error == pytest.approx(
        np.sqrt(2 * 0.25**2) / 4
    )


# The phase


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("train")
    config = tiny_config(
        tmp_path,
        **SPLIT,
        **{"train_sarm.output": str(tmp_path / "out"), "train_sarm.head_l2": [0.01, 0.1]},
    )
    run = RunDir.create(tmp_path / "run", config)
    run_unit(run, "train_sarm", "all")
    return run, tmp_path / "out"


def test_trained_folder_opens_as_a_sarm_and_gives_the_margins_that_were_judged(trained):
    run, out = trained
    config = run.config
    model, tokenizer = load_sarm(config.sarm.model_copy(update={"model": str(out)}), device="cpu")
    assert (
        model.config.backbone["model"] == config.policy.model
        and model.config.source_layer == config.train_sarm.layer
    )
    pairs = [p for p in load_data(config.data).pairs if p.prompt.part == "test"]
    conversations = [
        (*p.prompt.messages, {"role": "assistant", "content": r})
        for p in pairs
        for r in (p.chosen, p.rejected)
    ]
    rewards = encode_texts(
        model,
        tokenizer,
        conversations,
        extra_ranks=0,
        tokens_per_batch=2048,
        max_length=config.train_sarm.max_length,
    ).rewards.view(-1, 2)
    metrics = run.read("train_sarm").json("metrics.json")
    judged = metrics["held_out"]["demo"]
    assert judged["pairs"] == len(pairs) and judged["mean"] == pytest.approx(
        float((rewards[:, 0] > rewards[:, 1]).double().mean()), abs=0.51 / len(pairs)
    )
    assert (
        metrics["cross_validated"]["demo"]["pairs"] == 60
        and metrics["pairs"]["demo/sarm_train"] + len(pairs) == 60
    )


def test_trained_folder_is_small_published_and_described(trained):
    run, out = trained
    published = run.read("train_sarm")
    assert (published.directory("sarm") / "model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()
    tensors = load_file(out / "model.safetensors")
    assert set(tensors) == {
        "sae.encoder.weight",
        "sae.decoder.weight",
        "sae.pre_bias",
        "sae.latent_bias",
        "score.weight",
    }
    assert (
        tensors["sae.encoder.weight"].dtype == torch.float16
        and tensors["score.weight"].dtype == torch.float32
    )
    card = (out / "README.md").read_text()
    accuracy = published.json("metrics.json")["cross_validated"]["demo"]
    assert (
        f"{accuracy['mean']:.3f} ± {accuracy['standard_error']:.3f}" in card
        and "seed 0" in card.lower()
    )


def test_training_twice_gives_the_same_bits(trained, tmp_path):
    run, out = trained
    run_unit(RunDir.create(tmp_path / "run", run.config), "train_sarm", "all")
    again = RunDir.open(tmp_path / "run").read("train_sarm").path("sarm/model.safetensors")
    assert again.read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"data.sources.demo.split": {"test": 1.0}}, "sarm_train"),
        (SPLIT | {"train_sarm.layer": 3}, "fewer than train_sarm.layer=3"),
    ],
)
def test_what_cannot_be_trained_is_a_user_error(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_unit(
            RunDir.create(tmp_path / "run", tiny_config(tmp_path, **changes)), "train_sarm", "all"
        )


def test_overrides_come_after_the_options(tmp_path, capsys):
    assert (
        main(
            [
                "train_sarm",
                "--config",
                str(ROOT / "configs/tiny.yaml"),
                "--run",
                str(tmp_path / "run"),
                "train_sarm.bogus=1",
            ]
        )
        == 2
    )
    assert "unknown key train_sarm.bogus" in capsys.readouterr().err


def test_shipped_sarm_is_whole_small_and_says_how_good_it_is():
    folder = ROOT / "artifacts" / "sarm-smollm2"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    config = json.loads((folder / "config.json").read_text())
    assert config["backbone"] == {"model": "embedded:smollm2", "revision": None}
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert (
            tensors.get_slice("sae.encoder.weight").get_shape()
            == [config["d_sae"], config["hidden_size"]]
            == [4608, 576]
        )
        assert all(tensors.get_tensor(name).isfinite().all() for name in tensors.keys())  # noqa: SIM118
    card = (folder / "README.md").read_text()
    assert all(
        word in card
        for word in ("RewardBench 2 Safety", "RMB", "ODC-BY", "MIT", "Apache-2.0", "H200")
    )


def test_the_accuracy_of_one_prompt_has_no_standard_error() -> None:
    from jobs.train_sarm import _figure

    assert _figure({"mean": 1.0, "standard_error": math.nan}) == "1.000 ± n/a"
    assert _figure({"mean": 0.9124, "standard_error": 0.0131}) == "0.912 ± 0.013"
