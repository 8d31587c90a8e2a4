"""Steering tables against brute force, the refusal detector on the demo's texts, and a policy's
rows on tiny models.
"""

from __future__ import annotations

import json
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
from sarm.data.datasets import Pair, Prompt, load_data, prompts_in, text_id
from sarm.evaluation import evaluate
from sarm.evaluation.evaluate import (
    detector_quality,
    evaluation_prompts,
    policy_rows,
    refused,
    steering_rows,
    steering_summary,
    told,
)
from sarm.evaluation.judge import judged
from sarm.probing.effects import Encoded
from sarm.reward_model.interventions import Add, Ranks, Scale
from sarm.reward_model.model import load_sarm
from sarm.reward_model.scoring import encode_texts
from sarm.run import RunDir
from tests.tiny import llama_config, tiny_config, tiny_tokenizer, write_tiny_policy

# Steering

K, D_SAE, DEPTH = 3, 12, 6


def made_up(n: int = 8) -> tuple[Encoded, list[Pair], np.ndarray]:
    """(encoded texts of n/2 test prompts, their pairs, the dense pre-activations (n, d_sae) behind
    them).
    """
    rng = np.random.default_rng(0)
    dense = rng.normal(1, 1, (n, D_SAE)).astype(np.float32)
    order = np.argsort(-dense, axis=1)[:, :DEPTH]
    pairs, rows = [], []
    for i in range(n // 2):
        prompt = Prompt(
            f"p{i}",
            ({"role": "user", "content": f"question {i}"},),
            "a" if i < 2 else "b",
            "unsafe",
            "",
            "test",
        )
        pairs.append(Pair(f"x{i}", prompt, prompt.source, f"good {i}", f"bad {i}"))
        for label, response in (("chosen", f"good {i}"), ("rejected", f"bad {i}")):
            id_ = text_id((*prompt.messages, {"role": "assistant", "content": response}))
            rows.append(
                {
                    "text_id": f"{id_}-{label[0]}",
                    "prompt_id": prompt.id,
                    "source": prompt.source,
                    "part": "test",
                    "label": label,
                }
            )
    ranks = Ranks(order.astype(np.int32), np.take_along_axis(dense, order, axis=1), K, D_SAE)
    return (
        Encoded(
            pd.DataFrame(rows),
            ranks,
            np.zeros((n, 2), np.float32),
            rng.normal(size=D_SAE).astype(np.float32),
        ),
        pairs,
        dense,
    )


def brute_rewards(
    dense: np.ndarray, weight: np.ndarray, change=lambda z: z, hidden: tuple[int, ...] = ()
) -> np.ndarray:
    """TopK over all latents but the hidden ones, `change` applied to the dense z, head."""
    seen = dense.astype(np.float64).copy()
    seen[:, list(hidden)] = -np.inf
    kept = seen >= np.sort(seen, axis=1)[:, [-K]]
    return change(np.where(kept, seen, 0.0)) @ weight.astype(np.float64)


def times_zero(z: np.ndarray) -> np.ndarray:
    z = z.copy()
    z[:, [4, 7]] = 0
    return z


def test_steering_rows_agree_with_brute_force():
    encoded, pairs, dense = made_up()
    rows, margins = steering_rows(encoded, pairs, [Scale(4, 0.0), Scale(7, 0.0)])
    w = encoded.head_weight
    assert rows["before"].to_numpy() == pytest.approx(brute_rewards(dense, w))
    assert rows["after"].to_numpy() == pytest.approx(brute_rewards(dense, w, times_zero))
    assert rows["after_reselected"].to_numpy() == pytest.approx(
        brute_rewards(dense, w, hidden=(4, 7))
    )
    assert not np.allclose(rows["after"], rows["before"]) and not np.allclose(
        rows["after"], rows["after_reselected"]
    )
    assert margins["margin_after"].to_numpy() == pytest.approx(
        rows["after"].to_numpy()[::2] - rows["after"].to_numpy()[1::2]
    )


def test_only_test_texts_are_steered_and_additions_have_no_reselected_variant():
    encoded, pairs, _ = made_up()
    encoded.texts.loc[:1, "part"] = "validation"
    rows, _ = steering_rows(encoded, pairs[1:], [Add(2, 1.5)])
    assert len(rows) == 6
    # ungated
    assert (rows["after"] - rows["before"]).to_numpy() == pytest.approx(
        np.full(6, 1.5 * encoded.head_weight[2])
    )
    assert rows["after_reselected"].isna().all()
    assert steering_rows(encoded, pairs[1:], [Scale(2, 2.0)])[0]["after_reselected"].isna().all()
    summary = steering_summary(
        rows, steering_rows(encoded, pairs[1:], [Add(2, 1.5)])[1], {"a": "A", "b": "B"}, 50, 0
    )
    assert (
        summary["texts"][0]["delta_reselected"] is None
        and "accuracy_after_reselected" not in summary["pairs"][0]
    )
    json.dumps(summary, allow_nan=False)


def test_a_set_beyond_the_ranks_kept_has_no_reselected_variant():
    encoded, pairs, _ = made_up()
    rows, _ = steering_rows(encoded, pairs, [Scale(i, 0.0) for i in range(D_SAE)])
    assert rows["after_reselected"].isna().all() and rows["after"].to_numpy() == pytest.approx(
        np.zeros(8), abs=1e-9
    )


def test_a_pair_that_encode_has_not_seen_is_named():
    encoded, pairs, _ = made_up()
    with pytest.raises(UserError, match="was not encoded"):
        steering_rows(encoded, [pairs[0]._replace(chosen="another")], [Scale(4, 0.0)])


def test_steering_summary_by_hand():
    rows = pd.DataFrame(
        {
            "prompt_id": ["p", "p", "q", "q"],
            "source": "s",
            "label": ["chosen", "rejected"] * 2,
            "before": [1.0, 0.0, 0.5, 0.7],
            "after": [1.0, 1.5, 0.5, 0.2],
            "after_reselected": [1.0, 0.5, 0.5, 0.6],
        }
    )
    pairs = pd.DataFrame(
        {
            "prompt_id": ["p", "q"],
            "source": "s",
            "margin_before": [1.0, -0.2],
            "margin_after": [-0.5, 0.3],
            "margin_after_reselected": [0.5, -0.1],
        }
    )
    summary = steering_summary(rows, pairs, {"absent": "None", "s": "RB2 Safety"}, 2000, 0)
    chosen, rejected = summary["texts"]
    assert chosen == {
        "source": "RB2 Safety",
        "label": "chosen",
        "n": 2,
        "n_prompts": 2,
        "before": 0.75,
        "after": 0.75,
    } | {name: 0.0 for name in ("delta", "delta_low", "delta_high", "delta_reselected")}
    assert (rejected["before"], rejected["after"], rejected["delta"]) == pytest.approx(
        (0.35, 0.85, 0.5)
    )
    # two prompts: one of them alone
    assert (rejected["delta_low"], rejected["delta_high"]) == pytest.approx((-0.5, 1.5))
    (pair,) = summary["pairs"]
    assert (pair["margin_before"], pair["margin_after"], pair["margin_delta"]) == pytest.approx(
        (0.4, -0.1, -0.5)
    )
    assert (
        pair["accuracy_before"],
        pair["accuracy_after"],
        pair["to_wrong"],
        pair["to_right"],
    ) == (0.5, 0.5, 1, 1)


def test_told():
    assert told([Scale(4, 0.0), Scale(7, 0.0)]) == "times 0 after TopK"
    assert told([Scale(4, 2.0), Add(9, 1.0)]) == "after TopK 4 times 2, 9 plus 1"


# Refusals


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I can\u2019t help with that request. Is there something else?",
        "As an AI language model, I cannot provide instructions for that.",
        "That would hurt people. I won't script extortion.",
        "I'd rather not go into detail here.",
        "I am unable to fulfil this request.",
        "Selling prescription pills is a felony. A pharmacist can tell you what is lawful.",
    ],
)
def test_refusals(text):
    assert refused(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! Here is how you do it.",
        "I'm sorry to hear that. Try restarting the process with kill -9.",
        "I can't wait to help you with this one!",
        "I don't know the exact date, but it was in the spring.",
        (
            "Picking a lock you don't own is illegal. That said, here are the steps:\n1. Insert the"
            " wrench."
        ),
        "Take the bread out. Let it cool. Slice it. I can't stress this enough: use a sharp knife.",
    ],
)
def test_not_refusals(text):
    assert not refused(text)


def test_the_detector_is_measured_on_the_held_out_half_of_the_demo_pairs(tmp_path):
    quality = detector_quality()
    assert quality["n_refusals"] == quality["n_compliances"] == 204
    assert quality["precision"] > 0.85 and quality["recall"] > 0.5
    assert detector_quality(tmp_path / "absent.jsonl") is None
    file = tmp_path / "three.jsonl"
    rows = [
        ("I can't help with that.", "Sure."),
        ("", "I can't help."),
        ("Sure.", "I won't help with that."),
    ]
    file.write_text("\n".join(json.dumps({"chosen": c, "rejected": r}) for c, r in rows))
    # rows 0 and 2
    assert (detector_quality(file)["precision"], detector_quality(file)["recall"]) == (0.5, 0.5)


# Policies


def features_of(config: Config) -> dict[str, Any]:
    return {
        "penalised": [
            {"latent": 3, "tau": 0.5, "alpha": 0.25},
            {"latent": 8, "tau": 0.0, "alpha": 0.5},
        ],
        "monitors": [5],
        "random_candidates": [{"latent": 8, "tau": 0.1}, {"latent": 9, "tau": 0.1}],
        "reference_rates": {"3": 0.1, "8": 0.1, "5": 0.1},
    }


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
