"""What other tools read of a run: SAELens itself, delphi's layout by its documented rules,
upstream's steering file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from jobs.__main__ import main, run_unit
from jobs.export import WINDOW_TOKENS, difference_warnings
from sarm.config import UserError
from sarm.data.datasets import load_data
from sarm.probing.effects import read_encoded
from sarm.reward_model.delphi import reward_windows, write_cache
from sarm.reward_model.interventions import Ranks, latent_values, parse_steering, rewards_of
from sarm.reward_model.model import SarmModel, load_sae, load_sarm, load_tokenizer
from sarm.reward_model.neuronpedia import dashboard_batch
from sarm.reward_model.sae import (
    SaelensDifference,
    TopKSae,
    from_saelens,
    head_from_saelens,
    saelens_difference,
    to_saelens,
)
from sarm.run import Published, RunDir


@pytest.fixture(scope="module")
def exported(
    selected_run: RunDir, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Published]:
    folder = tmp_path_factory.mktemp("export")
    shutil.copytree(selected_run.path, folder / "run")
    run = RunDir.open(folder / "run")
    run_unit(run, "export", "all")
    return run, run.read("export")


def test_the_sae_loads_without_the_decoder_layers(selected_run: RunDir) -> None:
    model, tokenizer = load_sarm(selected_run.config.sarm, "cpu")
    sae, head_weight, settings = load_sae(selected_run.config.sarm)
    assert all(
        torch.equal(tensor, model.sae.state_dict()[name].float())
        for name, tensor in sae.state_dict().items()
    )
    assert (
        torch.equal(head_weight, model.head_weight)
        and settings.source_layer == model.config.source_layer
    )
    assert load_tokenizer(selected_run.config.sarm).get_vocab() == tokenizer.get_vocab()


def test_the_shipped_sae_loads_with_its_backbone_elsewhere() -> None:
    from sarm.config import SarmConfig, UserError
    from sarm.hub import local_model

    try:
        local_model("embedded:smollm2", None)
    except UserError:
        pytest.skip("the embedded model is not in this machine's cache")
    sae, head_weight, settings = load_sae(SarmConfig(model="artifacts/sarm-smollm2"))
    assert (
        sae.encoder.weight.shape == (4608, 576)
        and head_weight.shape == (4608,)
        and settings.backbone == {"model": "embedded:smollm2", "revision": None}
    )


def test_saelens_gives_the_rewards_of_the_run(exported: tuple[RunDir, Published]) -> None:
    """SAELens's own activations of the run's states, under our head: the run's rewards, as far as
    the differences say.
    """
    sae_lens = pytest.importorskip("sae_lens")
    run, published = exported
    folder, encoded = published.directory("saelens"), read_encoded(run.read_shards("encode"))
    theirs = (
        sae_lens.SAE.load_from_disk(str(folder)).encode(torch.from_numpy(encoded.states)).detach()
    )
    z = torch.from_numpy(latent_values(encoded.ranks, range(encoded.ranks.d_sae))).float()
    measured = published.json("differences.json")["saelens"]
    assert measured["n"] > 0
    assert float((theirs - z.clamp(min=0)).abs().max()) < 1e-3 + measured["largest_value"]
    rewards = theirs @ head_from_saelens(folder)
    np.testing.assert_allclose(
        rewards,
        rewards_of(encoded.ranks, encoded.head_weight),
        atol=1e-3 + measured["largest_reward"],
    )


def test_difference_is_what_saelens_does(tmp_path: Path) -> None:
    """Small states make the epsilon matter, a low bias makes values negative: against SAELens
    itself.
    """
    sae_lens = pytest.importorskip("sae_lens")
    torch.manual_seed(0)
    sae = TopKSae(16, 40, 12)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.latent_bias -= 6
    states, head_weight = 1e-4 * torch.randn(50, 16), torch.randn(40)
    theirs = (
        sae_lens.SAE.load_from_disk(str(to_saelens(sae, tmp_path, model_name="m", source_layer=2)))
        .encode(states)
        .detach()
    )
    values, indices = sae.encode(states)
    ours = torch.zeros(50, 40).scatter(1, indices, values).detach()
    difference = saelens_difference(sae, head_weight, states, rows=7)
    assert (
        difference.n == 50
        and difference.rows_with_negative_latent == int((values[:, -1] < 0).sum()) > 0
    )
    assert difference.largest_value == pytest.approx(float((ours - theirs).abs().max()), rel=1e-4)
    assert difference.largest_reward == pytest.approx(
        float(((ours - theirs) @ head_weight).abs().max()), rel=1e-4
    )
    assert difference.reselected > 0
    same = saelens_difference(sae, head_weight, 1e6 * states)
    assert same.reselected == 0


def test_import_and_head_make_the_sarm_again(exported: tuple[RunDir, Published]) -> None:
    run, published = exported
    model = SarmModel.from_pretrained(run.config.sarm.model)
    folder = published.directory("saelens")
    again = from_saelens(folder)
    assert all(
        torch.equal(tensor, model.sae.state_dict()[name])
        for name, tensor in again.state_dict().items()
    )
    assert torch.equal(head_from_saelens(folder), model.head_weight)


def test_the_export_of_an_adapted_sarm_says_so(
    selected_run: RunDir,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(selected_run.path, tmp_path / "run")
    monkeypatch.setattr("jobs.export.is_adapted", lambda opened: opened.config.d_sae == 64)
    run_unit(RunDir.open(tmp_path / "run"), "export", "all")
    assert f"adapter of {selected_run.config.sarm.model} merged in" in capfd.readouterr().err


def test_delphi_cache_holds_every_kept_latent(exported: tuple[RunDir, Published]) -> None:
    """Read by delphi's rules: file name START_END, latent = third column + START, one text a row
    of tokens.
    """
    run, published = exported
    ranks, folder = (
        read_encoded(run.read_shards("encode")).ranks,
        published.directory("delphi") / "latents" / "layers.1",
    )
    dense, covered = np.zeros((len(ranks.indices), ranks.d_sae)), 0
    for file in sorted(folder.glob("*.safetensors"), key=lambda f: int(f.stem.split("_")[0])):
        start, end = map(int, file.stem.split("_"))
        assert start == covered
        covered = end + 1
        tensors = load_file(file)
        assert tensors["locations"].dtype == np.uint16 and tensors["tokens"].shape == (
            len(dense),
            WINDOW_TOKENS,
        )
        text, position, latent = tensors["locations"].astype(np.int64).T
        assert set(position) <= {WINDOW_TOKENS - 1}
        assert (np.diff(latent) >= 0).all()
        dense[text, latent + start] = tensors["activations"]
    assert covered == ranks.d_sae
    z = latent_values(ranks, range(ranks.d_sae))
    np.testing.assert_array_equal(dense, np.where(np.abs(z) > 1e-5, z, 0).astype(np.float32))
    eot = load_tokenizer(run.config.sarm).convert_tokens_to_ids("<|eot_id|>")
    assert (tensors["tokens"][:, -1] == eot).all()
    assert json.loads((folder / "config.json").read_text())["cache_ctx_len"] == WINDOW_TOKENS


def test_many_texts_are_numbered_in_32_bits(tmp_path: Path) -> None:
    ranks = Ranks(np.array([[1], [0]], np.int32), np.ones((2, 1), np.float32), 1, 2**16 + 1)
    folder = (
        write_cache(
            tmp_path,
            ranks,
            reward_windows([[5], [6, 7, 8]], 2, 0),
            hookpoint="layers.0",
            model_name="m",
            shards=1,
        )
        / "layers.0"
    )
    tensors = load_file(folder / "0_65536.safetensors")
    assert tensors["locations"].dtype == np.uint32
    assert tensors["locations"].tolist() == [[1, 1, 0], [0, 1, 1]] and tensors[
        "tokens"
    ].tolist() == [[0, 5], [7, 8]]


def test_steering_file_is_what_steer_applies(exported: tuple[RunDir, Published]) -> None:
    run, published = exported
    steps = parse_steering(published.path("steering.json"))
    assert [step.latent for step in steps] == [
        f["latent"] for f in run.read("select").json("features.json")["harming"]
    ]


def test_warnings_name_what_saelens_reads_otherwise() -> None:
    clean = SaelensDifference(256, 0, 0, 1e-6, 1e-7)
    assert difference_warnings(clean, "owner/llama", own_layers=False) == []
    negative = difference_warnings(
        clean._replace(rows_with_negative_latent=3, largest_reward=0.25),
        "owner/llama",
        own_layers=False,
    )
    assert len(negative) == 1 and "3 of 256" in negative[0] and "0.25" in negative[0]
    assert (
        "other latents in 2 places"
        in difference_warnings(clean._replace(reselected=2), "owner/llama", own_layers=False)[0]
    )
    assert "own layers" in difference_warnings(clean, "owner/sarm", own_layers=True)[0]
    adapted = difference_warnings(clean, "embedded:smollm2", own_layers=False, adapted_by="my/sarm")
    assert "embedded:smollm2's layers with the adapter of my/sarm merged in" in adapted[0]
    assert "SarmModel.from_pretrained('my/sarm')" in adapted[0] and "no hub has" in adapted[1]
    assert "no hub has" in difference_warnings(clean, "embedded:smollm2", own_layers=False)[0]


def test_a_run_without_select_says_what_to_do(
    tmp_path: Path, selected_run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDir.create(tmp_path / "run", selected_run.config)
    assert main(["export", "--run", str(tmp_path / "run")]) == 2
    assert "select/all is not done" in capsys.readouterr().err


def test_texts_that_left_the_data_are_named(
    selected_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(selected_run.path, tmp_path / "run")
    whole = load_data(selected_run.config.data)
    kept = whole._replace(pairs=whole.pairs[: len(whole.pairs) // 2])
    monkeypatch.setattr("jobs.export.load_data", lambda config: kept)
    with pytest.raises(UserError, match=r"\d+ encoded texts, such as .* no longer in the data"):
        run_unit(RunDir.open(tmp_path / "run"), "export", "all")


# Neuronpedia

NAMES = {
    "feature_index": int,
    "frac_nonzero": float,
    "n_prompts_total": int,
    "n_tokens_in_prompt": int,
    "dataset": str,
    **dict.fromkeys(
        "neuron_alignment_indices neuron_alignment_values neuron_alignment_l1"
        " correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson"
        " correlated_features_indices correlated_features_l1 correlated_features_pearson neg_str"
        " neg_values pos_str pos_values freq_hist_data_bar_values freq_hist_data_bar_heights"
        " logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist activations"
        " vector".split(),
        list,
    ),
}
"""What a feature holds, by sae-dashboard 0.8.0."""
PARALLEL = (
    ("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    ("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    ("pos_str", "pos_values"),
    ("neg_str", "neg_values"),
    ("correlated_features_indices", "correlated_features_pearson"),
    ("correlated_features_indices", "correlated_features_l1"),
)
ACTIVATION = {
    "bin_min": float,
    "bin_max": float,
    "bin_contains": float,
    "qualifying_token_index": int,
    "tokens": list,
    "values": list,
}


@pytest.fixture(scope="module")
def batch(exported: tuple[RunDir, Published]) -> tuple[dict, dict]:
    run, _ = exported
    run_unit(run, "cards", "all")
    cards = run.read("cards").json("cards.json")
    return cards, dashboard_batch(cards, model_id="m", layer=3, sae_set="s")


def test_without_cards_there_is_no_neuronpedia_and_with_them_there_is(exported, batch) -> None:
    run, published = exported
    assert not any(name.startswith("neuronpedia/") for name in published.manifest.outputs)
    run_unit(run, "export", "all")
    again = run.read("export")
    written = json.loads((again.directory("neuronpedia") / "batch-0.json").read_text())
    assert written["features"] == json.loads(json.dumps(batch[1]["features"]))
    assert written["layer"] == load_sae(run.config.sarm).config.source_layer - 1


def test_a_batch_has_what_saedashboard_writes_by_name_and_type(batch) -> None:
    cards, found = batch
    assert set(found) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    assert [f["feature_index"] for f in found["features"]] == [c["latent"] for c in cards["cards"]]
    for feature, card in zip(found["features"], cards["cards"], strict=True):
        assert {name: type(value) for name, value in feature.items()} == NAMES
        for name, value in feature.items():
            kind = int if name.endswith("_indices") else str if name.endswith("_str") else float
            assert (
                name == "activations"
                or not isinstance(value, list)
                or all(type(one) is kind for one in value)
            ), name
        # Neuronpedia reads one array at the places of the other
        for one, other in PARALLEL:
            assert len(feature[one]) == len(feature[other]), (one, other)
        assert sum(feature["freq_hist_data_bar_heights"]) == sum(
            card["histogram"]["chosen"] + card["histogram"]["rejected"]
        )
        for activation in feature["activations"]:
            assert {name: type(value) for name, value in activation.items()} == ACTIVATION
            assert len(activation["tokens"]) == len(activation["values"])
            assert min(activation["values"]) >= 0
        for example, activation in zip(card["top"], feature["activations"], strict=False):
            assert activation["values"][-1] == pytest.approx(example["z"], abs=3e-3)


def test_saedashboard_reads_a_batch_back(batch) -> None:
    dashboard = pytest.importorskip(
        "sae_dashboard.neuronpedia.neuronpedia_dashboard", reason="sae-dashboard is absent"
    )
    read = dashboard.NeuronpediaDashboardBatch(**batch[1]).to_dict()
    assert read["features"] == batch[1]["features"]
