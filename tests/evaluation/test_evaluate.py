"""A policy's rows on tiny models, and the phases that make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from jobs.__main__ import run_unit
from sarm.config import Config, ModelConfig, UserError
from sarm.data.conversations import prompt_ids
from sarm.data.datasets import load_data, prompts_in
from sarm.evaluation import evaluate
from sarm.evaluation.evaluate import evaluation_prompts, policy_rows
from sarm.evaluation.judge import judged
from sarm.records import Features
from sarm.reward_model.model import load_sarm
from sarm.reward_model.scoring import encode_texts
from sarm.run import RunDir
from tests.runs import candidate, features
from tests.tiny import llama_config, tiny_config, tiny_tokenizer, write_tiny_policy


def features_of(config: Config) -> Features:
    return features(
        penalised=[
            {"latent": 3, "tau": 0.5, "alpha": 0.25},
            {"latent": 8, "tau": 0.0, "alpha": 0.5},
        ],
        monitors=[5],
        random_candidates=[candidate(8), candidate(9)],
        reference_rates={"3": 0.1, "8": 0.1, "5": 0.1},
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(config, folder of a second policy, prompts, its rows, its settings)."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = tiny_config(folder, **{"evaluate.max_new_tokens": 12, "ppo.penalty.clamp": 0.1})
    other = write_tiny_policy(folder / "other", seed=1)
    prompts = evaluation_prompts(prompts_in(load_data(config.data), "policy_eval"), config.evaluate)
    table, settings = policy_rows(
        config, other, prompts, features_of(config), trained=True, progress=lambda *_: None
    )
    return config, other, prompts, table, settings


def test_prompts_of_each_kind_are_cut_alike(evaluated):
    config, _, prompts, table, _ = evaluated
    assert (
        [p.kind for p in prompts].count("unsafe")
        == [p.kind for p in prompts].count("safe")
        == config.evaluate.prompts
    )
    assert table["prompt_id"].tolist() == [p.id for p in prompts]
    with pytest.raises(UserError, match="policy_eval"):
        evaluation_prompts([], config.evaluate)


def naive_logprob(folder: Path, messages: Any, response_ids: list[int]) -> float:
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response_ids]])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(response_ids)[:, None]).sum())


def test_kl_agrees_with_one_text_at_a_time(evaluated, monkeypatch):
    config, other, prompts, table, _ = evaluated
    kept, generations = evaluate.generate_responses(
        config, other, prompts, trained=True, device="cpu", progress=lambda *_: None
    )
    assert (
        generations.texts == table["response"].tolist()
        and [p.id for p in kept] == table["prompt_id"].tolist()
    )
    assert generations.kl == pytest.approx(table["kl"])
    for i in (0, 5, len(prompts) - 1):
        ids = generations.responses[i]
        assert len(ids) == table["n_tokens"][i] <= 12
        naive = naive_logprob(other, prompts[i].messages, ids) - naive_logprob(
            Path(config.policy.model), prompts[i].messages, ids
        )
        assert table["kl"][i] == pytest.approx(naive, abs=1e-3)
    assert table["kl"].mean() > 0.5


def test_the_base_has_no_kl_and_the_same_policy_says_the_same(evaluated):
    config, _, prompts, _, _ = evaluated
    base = Path(config.policy.model)
    _, alone = evaluate.generate_responses(
        config, base, prompts, trained=False, device="cpu", progress=lambda *_: None
    )
    _, trained = evaluate.generate_responses(
        config, base, prompts[::-1], trained=True, device="cpu", progress=lambda *_: None
    )
    assert alone.texts == trained.texts[::-1] and not alone.kl.any()
    assert np.abs(trained.kl).max() < 1e-4


def test_scores_are_the_sarms_without_penalty_or_clamp(evaluated):
    config, _, prompts, table, settings = evaluated
    model, tokenizer = load_sarm(config.sarm)
    # for which the config's clamp would matter
    clamped = table.index[(table["z_3"] > 0.1) | (table["z_8"] > 0.1)]
    for i in (0, 7, clamped[0]):
        messages = [*prompts[i].messages, {"role": "assistant", "content": table["response"][i]}]
        encoded = evaluate_one(model, tokenizer, messages, config)
        z = {
            int(latent): float(value)
            for latent, value in zip(encoded.indices[0], encoded.values[0], strict=True)
        }
        assert table["reward"][i] == pytest.approx(float(encoded.rewards[0]), abs=1e-5)
        for latent in (3, 8, 5, 9):
            assert table[f"z_{latent}"][i] == pytest.approx(z.get(latent, 0.0), abs=1e-5)
        penalty = 0.25 * (z.get(3, 0.0) > 0.5) + 0.5 * (z.get(8, 0.0) > 0.0)
        assert table["penalty"][i] == pytest.approx(penalty)
    assert sum(c.startswith("z_") for c in table) == 4
    wanted = sum(p.numel() for name, p in model.named_parameters() if "decoder" not in name)
    assert (
        settings["sarm_parameters"] == wanted
        and settings["judge"] is None
        and table["harm"].isna().all()
    )


def evaluate_one(model, tokenizer, messages, config):
    return encode_texts(
        model,
        tokenizer,
        [messages],
        extra_ranks=0,
        tokens_per_batch=4096,
        max_length=config.sarm.max_length,
    )


def test_prompts_too_long_for_training_are_left_out(evaluated):
    config, other, prompts, _, _ = evaluated
    short = config.model_copy(
        update={"ppo": config.ppo.model_copy(update={"max_prompt_tokens": 5})}
    )
    with pytest.raises(UserError, match="at most 5 tokens"):
        evaluate.generate_responses(
            short, other, prompts, trained=False, device="cpu", progress=lambda *_: None
        )
    room = int(np.median([len(prompt_ids(tiny_tokenizer(), p.messages)) for p in prompts]))
    middle = config.model_copy(
        update={"ppo": config.ppo.model_copy(update={"max_prompt_tokens": room})}
    )
    kept, generations = evaluate.generate_responses(
        middle, other, prompts, trained=False, device="cpu", progress=lambda *_: None
    )
    assert (
        0 < len(kept) < len(prompts)
        and len(generations.texts) == len(kept)
        and max(map(len, generations.prompts)) <= room
    )


def write_judge(folder: Path, names: list[str]) -> Path:
    torch.manual_seed(0)
    config = llama_config(
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("names", "column"), [(["safe", "unsafe"], 1), (["toxic", "neutral"], 0), (["LABEL_0"], None)]
)
def test_a_judge_reads_each_response_beside_its_prompt(tmp_path, evaluated, names, column):
    _, _, prompts, table, _ = evaluated
    folder = write_judge(tmp_path / "judge", names)
    harm = judged(
        ModelConfig(model=str(folder), dtype="float32"),
        prompts[:5],
        table["response"].tolist()[:5],
        "cpu",
        batch=2,
    )
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(folder), tiny_tokenizer()
    for i in range(5):
        logits = model(
            **tokenizer(
                prompts[i].messages[-1]["content"], table["response"][i], return_tensors="pt"
            )
        ).logits[0]
        expected = logits.sigmoid()[0] if column is None else logits.softmax(0)[column]
        assert harm[i] == pytest.approx(expected.item(), abs=1e-5)


def test_a_judge_whose_labels_say_nothing_is_refused(tmp_path, evaluated):
    _, _, prompts, _, _ = evaluated
    folder = write_judge(tmp_path / "judge", ["LABEL_0", "LABEL_1"])
    with pytest.raises(UserError, match="of which none says harm"):
        judged(ModelConfig(model=str(folder), dtype="float32"), prompts[:1], ["x"], "cpu")


# The phases


def test_steer_evaluate_and_report_after_select(tmp_path):
    config = tiny_config(
        tmp_path,
        **{
            "encode.shards": 1,
            "probe.shards": 1,
            "probe.permutations": 50,
            "steer.file": str(tmp_path / "steering.json"),
        },
    )
    (tmp_path / "steering.json").write_text('{"3": ["*", 0.0], "5": ["+", 1.0]}')
    run = RunDir.create(tmp_path / "run", config)
    for phase in ("fetch", "encode", "probe", "select", "steer"):
        run_unit(run, phase, config.units(phase)[0])  # type: ignore[arg-type]
    run_unit(run, "evaluate", "base")
    steered = run.read("steer").json("summary.json")
    assert steered["intervention"]["latents"] == [3, 5] and {
        t["source"] for t in steered["texts"]
    } == {"Demo"}
    rows = pd.read_parquet(run.read("steer").path("rows.parquet"))
    demo = steered["texts"][0]
    assert (
        rows.loc[rows["label"] == "chosen", "after"].mean() == pytest.approx(demo["after"])
        and len(rows[rows["label"] == "chosen"]) == demo["n"]
    )
    table = pd.read_parquet(run.read("evaluate", "base").path("generations.parquet"))
    assert len(table) == run.read("evaluate", "base").json("summary.json")["n_prompts"]
    run_unit(run, "report", "all")
    report = run.read("report").path("final_report.txt").read_text()
    assert (
        "\nbase " in report
        and "Demo Chosen" in report
        and "Verdict: not available" in report
        and "parameters)" in report
    )
    assert (
        "ppo/penalty-seed0 (not run)" in report
        and "nan" not in report.split("TRAINING, ALL ARMS")[0]
    )
