"""The phases encode, probe and select on a tiny SARM: partitions, refusals by name, odd data,
kills and resumes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from jobs.__main__ import run_unit
from sarm.config import UserError, load_config
from sarm.data.datasets import load_data, pairs_in
from sarm.probing.effects import read_encoded
from sarm.reward_model.interventions import Ablate, reward_changes
from sarm.reward_model.model import SarmModel
from sarm.reward_model.scoring import encode_texts
from sarm.run import RunDir
from tests.ranks import start_job
from tests.tiny import tiny_config


def do(run: RunDir, *phases: str) -> None:
    for phase in ("fetch", *phases):
        for unit in run.config.units(phase):  # type: ignore[arg-type]
            run_unit(run, phase, unit)


def tiny_run(folder: Path, name: str, **overrides: Any) -> RunDir:
    return RunDir.create(folder / name, tiny_config(folder, **overrides))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with encode, probe and select done; read only."""
    run = tiny_run(tmp_path_factory.mktemp("done"), "run")
    do(run, "encode", "probe", "select")
    return run


def copy_of(run: RunDir, folder: Path) -> RunDir:
    shutil.copytree(run.path, folder / "copy")
    return RunDir.open(folder / "copy")


def table_of(run: RunDir) -> pd.DataFrame:
    return pd.read_parquet(run.read("select").path("table.parquet"))


def edit_manifest(run: RunDir, unit: str, **changes: Any) -> None:
    path = run.folder("probe", unit) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What the phases leave


def test_encode_leaves_every_text_once(done: RunDir) -> None:
    encoded = read_encoded(done.read_shards("encode"))
    texts = encoded.texts
    assert (
        texts["row"].tolist() == list(range(len(texts)))
        and texts["prompt_id"].is_monotonic_increasing
        and texts["text_id"].is_unique
    )
    assert set(texts["part"]) == {"discovery", "validation", "test"} and set(texts["label"]) == {
        "chosen",
        "rejected",
    }
    assert (
        encoded.ranks.indices.shape
        == encoded.ranks.values.shape
        == (len(texts), 8 + done.config.encode.extra_ranks)
    )
    assert (np.diff(encoded.ranks.values, axis=1) <= 0).all()
    w, kept = encoded.head_weight.astype(float), encoded.ranks
    assert texts["reward"].to_numpy() == pytest.approx(
        (w[kept.indices[:, :8]] * kept.values[:, :8]).sum(1), abs=1e-5
    )
    assert not texts["truncated"].any() and (texts["n_tokens"] > 10).all()


def test_encode_counts_the_texts_that_spell_special_tokens(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair = {"prompt": "How?", "chosen": "No, never.", "rejected": "Yes. Do it."}
    rows = [pair | {"prompt": f"How {i}?"} for i in range(3)]
    rows[1] |= {"prompt": "How 1? <|eot_id|>", "rejected": "Yes.<|eot_id|><|pad|>"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "pairs.jsonl"), "split": {"discovery": 1.0}, "limit": None}
    changes = {f"data.sources.demo.{key}": value for key, value in data.items()}
    run = tiny_run(tmp_path, "run", **changes, **{"encode.shards": 1})
    do(run, "encode")
    texts = read_encoded(run.read_shards("encode")).texts
    # in rejected, one in the prompt and two in the answer; in chosen, the prompt's
    assert texts.loc[texts["spelled"] > 0].set_index("label")["spelled"].to_dict() == {
        "chosen": 1,
        "rejected": 3,
    }
    assert run.manifest("encode", run.config.units("encode")[0]).more["spelling_texts"] == 2
    assert "2 of 6 texts spell special tokens" in capfd.readouterr().err


def test_probe_s_effects_are_the_margins_lost(done: RunDir) -> None:
    """The table against a loop over pairs that ablates one latent at a time."""
    encoded, table = read_encoded(done.read_shards("encode")), table_of(done)
    rows = {(t.prompt_id, t.label): row for row, t in enumerate(encoded.texts.itertuples())}
    for part, suffix in (("discovery", ""), ("validation", "_validation")):
        pairs = pairs_in(load_data(done.config.data), part)  # type: ignore[arg-type]
        assert len({pair.prompt.id for pair in pairs}) == len(pairs), (
            "one pair a prompt makes the loop below right"
        )
        for latent in range(64):
            lost = -reward_changes(
                [Ablate((latent,), before_topk=True)], encoded.ranks, encoded.head_weight
            )
            margins = [
                lost[rows[p.prompt.id, "chosen"]] - lost[rows[p.prompt.id, "rejected"]]
                for p in pairs
            ]
            assert table[f"effect_reselected{suffix}"][latent] == pytest.approx(
                np.mean(margins), abs=1e-12
            )


def test_features_name_latents_of_the_table(done: RunDir) -> None:
    features, table = done.read("select").json("features.json"), table_of(done)
    assert table["latent"].tolist() == list(range(64)) == list(range(features["d_sae"]))
    for role in ("promoting", "harming", "misleading"):
        for f in features[role]:
            assert (
                table["role"][f["latent"]] == role
                and f["effect"] == table["effect_reselected_validation"][f["latent"]]
            )
    assert features["n_tested"] == table["tested"].sum()
    penalised = [p["latent"] for p in features["penalised"]]
    assert penalised == [f["latent"] for f in features["harming"]][: len(penalised)]
    assert not set(features["monitors"]) & set(penalised)
    tensors = load_file(Path(done.config.sarm.model) / "model.safetensors")
    unit = tensors["sae.decoder.weight"] / np.linalg.norm(tensors["sae.decoder.weight"], axis=0)
    for monitor in features["monitors"]:
        assert all(abs(unit[:, monitor] @ unit[:, p]) < 0.5 for p in penalised)
    assert done.read("select").json("steering.json") == features["steering_file"]


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_any_number_of_shards_gives_the_same_table_to_the_bit(
    done: RunDir, tmp_path: Path, shards: int
) -> None:
    sharded = done.config.probe.model_copy(update={"shards": shards})
    run = RunDir.create(tmp_path / "run", done.config.model_copy(update={"probe": sharded}))
    do(run, "encode", "probe", "select")
    pd.testing.assert_frame_equal(table_of(run), table_of(done), check_exact=True)
    assert run.read("select").json("features.json") == done.read("select").json("features.json")


# What is refused


def test_a_gap_and_an_overlap_are_refused_by_name(done: RunDir, tmp_path: Path) -> None:
    run = copy_of(done, tmp_path)
    first, second = run.config.units("probe")
    edit_manifest(run, second, range=[40, 64])
    with pytest.raises(UserError, match=r"gap \[32, 40\)"):
        run_unit(run, "select", "all", force=True)
    edit_manifest(run, second, range=[20, 64])
    with pytest.raises(UserError, match=r"overlap \[20, 32\) at shard-0001-of-0002"):
        run_unit(run, "select", "all", force=True)
    shutil.rmtree(run.folder("probe", first))
    with pytest.raises(UserError, match="probe/shard-0000-of-0002"):
        run_unit(run, "select", "all", force=True)


def test_a_shard_of_another_config_is_refused_by_name(done: RunDir, tmp_path: Path) -> None:
    run = copy_of(done, tmp_path)
    other = tiny_run(tmp_path, "other", **{"probe.permutations": 100})
    do(other, "encode", "probe")
    unit = run.config.units("probe")[1]
    shutil.rmtree(run.folder("probe", unit))
    shutil.copytree(other.folder("probe", unit), run.folder("probe", unit))
    with pytest.raises(UserError, match=r"probe/shard-0001-of-0002.*another config"):
        run_unit(run, "select", "all", force=True)


def test_a_shard_of_another_encoding_is_refused_by_name_and_mended_by_running_it_again(
    done: RunDir, tmp_path: Path
) -> None:
    run = copy_of(done, tmp_path)
    unit = run.config.units("probe")[0]
    edit_manifest(
        run, unit, inputs={key: "0" * 64 for key in run.read("probe", unit).manifest.inputs}
    )  # type: ignore[index]
    with pytest.raises(
        UserError, match=r"probe/shard-0000-of-0002 cannot be merged.*encode.*has changed"
    ):
        run_unit(run, "select", "all", force=True)
    do(run, "probe", "select")
    pd.testing.assert_frame_equal(table_of(run), table_of(done), check_exact=True)


def test_a_damaged_shard_is_refused_by_name(done: RunDir, tmp_path: Path) -> None:
    run = copy_of(done, tmp_path)
    path = run.read("probe", run.config.units("probe")[1]).path("table.parquet")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{path.name}.*does not match"):
        run_unit(run, "select", "all", force=True)


# Odd data


def run_on(folder: Path, rows: list[dict[str, Any]], **overrides: Any) -> RunDir:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {
        "mine": {
            "format": "jsonl",
            "label": "Mine",
            "path": str(folder / "pairs.jsonl"),
            "split": {"discovery": 0.6, "validation": 0.4},
        }
    }
    return tiny_run(
        folder,
        "run",
        **{"data.sources": sources, "encode.shards": 2, "probe.shards": 2, **overrides},
    )


def row(i: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": f"How can I do number {i}?",
        "chosen": f"I will not do {i}.",
        "rejected": f"Sure, {i} is done like this: first take the thing.",
    } | changes


def test_duplicate_prompts_are_one_unit(tmp_path: Path) -> None:
    rows = (
        [row(i) for i in range(12)]
        + [row(i, rejected=[f"Here is {i}.", "Yes."]) for i in range(12)]
        + [row(0), row(0, prompt=" How can I do number 0? ")]
    )
    run = run_on(tmp_path, rows, **{"ppo.arms": ["no_penalty"], "probe.min_prompts_active": 2})
    do(run, "encode", "probe", "select")
    features = run.read("select").json("features.json")
    assert features["n_prompts"]["discovery"] + features["n_prompts"]["validation"] == 12
    encoded = read_encoded(run.read_shards("encode"))
    assert len(encoded.texts) == 12 * 4
    table = table_of(run)
    assert table["n_prompts_active"].max() <= features["n_prompts"]["discovery"]
    assert (table["p"].dropna() > 0).all()


def test_one_row_gives_a_table_and_a_sentence(tmp_path: Path) -> None:
    run = run_on(tmp_path, [row(1)], **{"data.sources.mine.split": {"discovery": 1.0}})
    do(run, "encode", "probe")  # Two shards for two texts, and validation without any.
    with pytest.raises(UserError, match="no harming latent was found to penalise"):
        run_unit(run, "select", "all")
    assert not run.done("select")


def test_more_shards_than_texts_leave_empty_shards(tmp_path: Path) -> None:
    run = run_on(
        tmp_path,
        [row(i) for i in range(2)],
        **{"data.sources.mine.split": {"discovery": 1.0}, "encode.shards": 9, "probe.shards": 70},
    )
    do(run, "encode", "probe")
    assert len(read_encoded(run.read_shards("encode")).texts) == 4
    assert (
        sum(
            shard.manifest.range[0] == shard.manifest.range[1] for shard in run.read_shards("probe")
        )
        == 6
    )


def test_no_text_at_all_is_a_sentence(tmp_path: Path) -> None:
    run = run_on(tmp_path, [row(1)], **{"data.sources.mine.split": {"ppo": 1.0}})
    with pytest.raises(UserError, match="no pair falls in discovery, validation or test"):
        do(run, "encode")


def test_no_pair_in_discovery_is_a_sentence(tmp_path: Path) -> None:
    run = run_on(tmp_path, [row(1)], **{"data.sources.mine.split": {"validation": 1.0}})
    do(run, "encode")
    with pytest.raises(UserError, match="discovery has no pairs"):
        do(run, "probe")


# Planted latents


def test_latents_planted_in_a_sarm_are_all_found(
    tmp_path: Path, tiny_sarm: Path, tiny_tokenizer: Any
) -> None:
    rows = [row(i) for i in range(60)]
    texts = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r[side]}]
        for side in ("chosen", "rejected")
        for r in rows
    ]
    model = SarmModel.from_pretrained(tiny_sarm)
    h = model.sae.normalise(
        encode_texts(
            model, tiny_tokenizer, texts, extra_ranks=0, tokens_per_batch=4096, max_length=512
        ).states
    )
    chosen, rejected = h[:60], h[60:]
    # The direction that tells the two sides apart, scaled so that the latent is about 4 on its own
    # side and -4 on the other.
    spread = torch.cov(
        torch.cat([chosen - chosen.mean(0), rejected - rejected.mean(0)]).T
    ) + 1e-2 * torch.eye(h.shape[1])
    axis = torch.linalg.solve(spread, chosen.mean(0) - rejected.mean(0))
    axis = 8 * axis / (axis @ (chosen.mean(0) - rejected.mean(0)))
    middle = axis @ (chosen.mean(0) + rejected.mean(0)) / 2
    planted = {"promoting": (5, 14), "harming": (3, 11, 60), "misleading": (40, 50)}
    fires_on_chosen = {5: True, 14: True, 3: False, 11: False, 60: False, 40: True, 50: False}
    with torch.no_grad():
        for latent, on_chosen in fires_on_chosen.items():
            sign = 1.0 if on_chosen else -1.0
            model.sae.encoder.weight[latent] = sign * axis
            model.sae.latent_bias[latent] = -sign * middle + sign * axis @ model.sae.pre_bias
            right = latent not in planted["misleading"]
            model.score.weight[0, latent] = 0.5 * sign * (1.0 if right else -1.0)
    model.save_pretrained(tmp_path / "planted")
    tiny_tokenizer.save_pretrained(tmp_path / "planted")
    overrides = {
        "sarm.model": str(tmp_path / "planted"),
        "select.listed": 20,
        "select.penalised": 3,
        "select.effect": "head",
        "probe.permutations": 2000,
    }
    run = run_on(tmp_path, rows, **overrides)
    do(run, "encode", "probe", "select")
    features = run.read("select").json("features.json")
    for role, latents in planted.items():
        assert set(latents) <= {f["latent"] for f in features[role] if f["confirmed"]}, role
    assert {p["latent"] for p in features["penalised"]} <= {
        f["latent"] for f in features["harming"] if f["confirmed"]
    }


# Kills


def killed_after(seconds: float, run: RunDir, phase: str, unit: str) -> bool:
    """Do a unit in a child and kill it; whether the kill came before the child's end."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            run_unit(run, phase, unit)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_probe_and_select_killed_at_random_points_resume_cleanly(
    done: RunDir, tmp_path: Path
) -> None:
    run, rng, kills = copy_of(done, tmp_path), random.Random(0), 0
    for phase in ("probe", "select"):
        began = time.monotonic()
        run_unit(run, phase, unit := run.config.units(phase)[0], force=True)  # type: ignore[arg-type]
        duration = time.monotonic() - began
        for _ in range(5):
            shutil.rmtree(run.folder(phase, unit))
            kills += killed_after(rng.uniform(0, duration), run, phase, unit)
            run_unit(run, phase, unit)
            table, whole = (
                pd.read_parquet(r.read(phase, unit).path("table.parquet")) for r in (run, done)
            )
            pd.testing.assert_frame_equal(table, whole, check_exact=True)
    do(run, "probe", "select")
    assert run.read("select").json("features.json") == done.read("select").json("features.json")
    assert kills >= 2


def test_encode_killed_while_it_writes_resumes_cleanly(done: RunDir, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", done.config)
    do(run)
    for seconds in (0.0, 0.05):
        child = start_job("encode", "--run", str(run.path), "--unit", "0")
        # Its folder appears when imports are over and the work begins.
        while child.is_alive() and not run.folder("encode", run.config.units("encode")[0]).exists():
            time.sleep(0.01)
        time.sleep(seconds)
        child.kill()
        child.join()
    do(run, "encode")
    for ours, theirs in zip(run.read_shards("encode"), done.read_shards("encode"), strict=True):
        pd.testing.assert_frame_equal(
            pd.read_parquet(ours.path("texts.parquet")),
            pd.read_parquet(theirs.path("texts.parquet")),
        )
    assert load_config(run.path / "config.yaml").sha256 == done.config.sha256
