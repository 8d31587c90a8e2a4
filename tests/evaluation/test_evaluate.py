"""A policy's rows on tiny models, and the phases that make them."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.__main__ import run_unit
from sarm.config import Config, EvaluateConfig, RefusalDetectorConfig, UserError, parse_config
from sarm.data.conversations import prompt_ids
from sarm.data.datasets import Prompt, load_data, prompts_in
from sarm.data.endings import ends, trim_to_last_sentence
from sarm.evaluation import evaluate, responses
from sarm.evaluation.classifiers import Classifier
from sarm.evaluation.detector import Detector
from sarm.evaluation.evaluate import evaluation_prompts, policy_rows
from sarm.evaluation.refusal_classifier import load_classifier
from sarm.evaluation.refusals import PHRASES_ON_XSTEST, SHIPPED_ON_XSTEST, refused
from sarm.records import Features, KeptPolicies, KeptPolicy
from sarm.reward_model.model import load_sarm
from sarm.reward_model.scoring import encode_texts
from sarm.run import Attempt, RunDir
from tests.evaluation.test_classifiers import write_classifier
from tests.runs import candidate, features
from tests.tiny import tiny_config, tiny_tokenizer, write_tiny_policy


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
    config = tiny_config(
        folder,
        **{
            "evaluate.max_new_tokens": 12,
            "evaluate.samples": 2,
            "encode.extra_ranks": 24,
            "evaluate.temperature": 1.3,
            "evaluate.top_p": 0.9,
            "ppo.penalty.clamp": 0.1,
        },
    )
    other = write_tiny_policy(folder / "other", seed=1)
    prompts = evaluation_prompts(prompts_in(load_data(config.data), "policy_eval"), config.evaluate)
    table, settings, _ = policy_rows(
        config,
        [(math.nan, other)],
        prompts,
        features_of(config),
        arm="penalty",
        progress=lambda *_: None,
    )
    return config, other, prompts, table, settings


def test_prompts_of_each_kind_are_cut_alike(evaluated):
    config, _, prompts, table, _ = evaluated
    assert (
        [p.kind for p in prompts].count("unsafe")
        == [p.kind for p in prompts].count("safe")
        == config.evaluate.prompts
    )
    assert table["prompt_id"].tolist() == [p.id for p in prompts for _ in range(2)]
    assert table["sample"].tolist() == [0, 1] * len(prompts)
    with pytest.raises(UserError, match="policy_eval"):
        evaluation_prompts([], config.evaluate)


def naive_logprob(
    folder: Path, messages: Any, response_ids: list[int], temperature: float = 1.0
) -> float:
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response_ids]])).logits[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(response_ids)[:, None]
    return float((logits / temperature).log_softmax(-1).gather(1, chosen).sum())


def test_kl_agrees_with_one_text_at_a_time(evaluated, monkeypatch):
    config, other, prompts, table, _ = evaluated
    kept, generations = responses.generate_responses(
        config, [other], prompts, trained=True, device="cpu", progress=lambda *_: None
    )
    assert (
        generations.texts == table["response"].tolist()
        and [p.id for p in kept] == table["prompt_id"].tolist()
    )
    assert generations.kl == pytest.approx(table["kl"])
    for i in (0, 5, 2 * len(prompts) - 1):
        ids = generations.responses[i]
        assert len(ids) == table["n_tokens"][i] <= 12
        messages, base = prompts[i // 2].messages, Path(config.policy.model)
        own, other_side = (naive_logprob(f, messages, ids, 1.3) for f in (other, base))
        assert table["kl"][i] == pytest.approx(own - other_side, abs=1e-3)
        plain = naive_logprob(base, messages, ids)
        assert table["base_logprob"][i] == pytest.approx(plain / len(ids), abs=1e-3)
    assert table["kl"].mean() > 0.5


def test_policies_kept_at_distances_are_rows_of_one_table(evaluated, tmp_path):
    config, other, prompts, table, settings = evaluated
    third = write_tiny_policy(tmp_path / "third", seed=2)
    policies = [(math.nan, other), (0.5, third), (2.0, Path(config.policy.model))]
    several, of_all, _ = policy_rows(
        config, policies, prompts, features_of(config), arm="penalty", progress=lambda *_: None
    )
    n = len(table)
    assert several["distance"].tolist() == pytest.approx(
        [math.nan] * n + [0.5] * n + [2.0] * n, nan_ok=True
    )
    # The policy at the end says what it says alone, to every column.
    pd.testing.assert_frame_equal(several[:n], table, atol=1e-4, rtol=1e-4)
    assert of_all == settings
    alone, *_ = policy_rows(
        config, [(0.5, third)], prompts, features_of(config), arm="x", progress=lambda *_: None
    )
    mine = several[n : 2 * n].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone, atol=1e-4, rtol=1e-4)
    assert (mine["response"] != table["response"]).any()
    base = several[2 * n :]
    assert base["kl"].abs().max() < 1e-4 < table["kl"].abs().max()


def test_one_policy_is_in_memory_at_a_time(evaluated, monkeypatch):
    config, other, prompts, _, _ = evaluated
    opened, real = [], responses.open_policy

    def open_policy(*args):
        gc.collect()
        assert [model for model in opened if model() is not None] == []
        model = real(*args)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr(responses, "open_policy", open_policy)
    folders, told = [other, Path(config.policy.model)], []
    responses.generate_responses(
        config,
        folders,
        prompts[:1],
        trained=True,
        device="cpu",
        progress=lambda *said: told.append(said),
    )
    answered = [said for said in told if said[2] == "prompts answered"]
    assert answered == sorted(answered) and answered[-1][:2] == (4, 4)
    assert [s for s in told if s not in answered] == [
        (2, 4, "log-probabilities"),
        (4, 4, "log-probabilities"),
    ]
    assert len(opened) == 3  # and the base, for the KL


def test_the_base_has_no_kl_and_the_same_policy_says_the_same(evaluated):
    config, _, prompts, _, _ = evaluated
    base = Path(config.policy.model)
    _, alone = responses.generate_responses(
        config, [base], prompts, trained=False, device="cpu", progress=lambda *_: None
    )
    _, trained = responses.generate_responses(
        config, [base], prompts[::-1], trained=True, device="cpu", progress=lambda *_: None
    )
    assert alone.texts[::2] == trained.texts[::2][::-1] and not alone.kl.any()
    assert alone.texts[1::2] == trained.texts[1::2][::-1]
    assert (alone.base_logprob < 0).all()
    assert np.abs(trained.kl).max() < 1e-4


def test_samples_of_a_prompt_differ_and_the_first_does_not_depend_on_their_number(evaluated):
    config, other, prompts, table, _ = evaluated
    first, second = (table[table["sample"] == i]["response"].tolist() for i in (0, 1))
    assert sum(a != b for a, b in zip(first, second, strict=True)) > len(first) / 2
    alone = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"samples": 1})}
    )
    _, one = responses.generate_responses(
        alone, [other], prompts, trained=False, device="cpu", progress=lambda *_: None
    )
    assert one.texts == first


def test_top_p_and_temperature_are_the_evaluations(evaluated, monkeypatch):
    config, other, prompts, _, settings = evaluated
    asked = {}
    real = responses.generate

    def generate(*args, **kwargs):
        asked.update(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(responses, "generate", generate)
    responses.generate_responses(
        config, [other], prompts[:2], trained=False, device="cpu", progress=lambda *_: None
    )
    assert (asked["top_p"], asked["temperature"], asked["max_new_tokens"]) == (0.9, 1.3, 12)
    assert (settings["top_p"], settings["temperature"], settings["samples"]) == (0.9, 1.3, 2)
    assert "no estimate of the KL divergence" in settings["kl"]


def with_system_prompt(prompt: Prompt) -> Prompt:
    """As a source that gives its own system prompt has it."""
    return prompt._replace(
        id="system", messages=({"role": "system", "content": "Be brief."}, *prompt.messages)
    )


def test_the_prompted_arm_alone_sees_the_system_prompt(evaluated):
    config, _, prompts, _, _ = evaluated
    asked = [*prompts[:3], with_system_prompt(prompts[3])]
    base = Path(config.policy.model)
    table, *_ = policy_rows(
        config,
        [(math.nan, base)],
        asked,
        features_of(config),
        arm="prompted",
        progress=lambda *_: None,
    )
    _, told = responses.generate_responses(
        config,
        [base],
        asked,
        trained=False,
        device="cpu",
        progress=lambda *_: None,
        system=config.evaluate.system_prompt,
    )
    assert table["response"].tolist() == told.texts
    safe = config.evaluate.system_prompt
    for i in (0, 5, 7):
        prompt = asked[i // 2]
        under = [{"role": "system", "content": safe}, *prompt.messages]
        if prompt.id == "system":
            under = [{"role": "system", "content": f"{safe}\n\nBe brief."}, *prompt.messages[1:]]
        own = naive_logprob(base, under, told.responses[i], 1.3)
        without = naive_logprob(base, prompt.messages, told.responses[i], 1.3)
        assert table["kl"][i] == pytest.approx(own - without, abs=1e-3)
        plain = naive_logprob(base, prompt.messages, told.responses[i])
        assert table["base_logprob"][i] == pytest.approx(plain / len(told.responses[i]), abs=1e-3)
    assert table["kl"].abs().max() > 1e-3
    model, tokenizer = load_sarm(config.sarm)
    answer = {"role": "assistant", "content": table["response"][0]}
    encoded = evaluate_one(model, tokenizer, [*asked[0].messages, answer], config)
    assert table["reward"][0] == pytest.approx(float(encoded.rewards[0]), abs=1e-5)


def test_best_of_n_is_the_candidate_that_the_compound_reward_pays_most(evaluated):
    config, _, prompts, _, _ = evaluated
    base, n = Path(config.policy.model), 3
    config = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"best_of": n})}
    )
    table, settings, _ = policy_rows(
        config,
        [(math.nan, base)],
        prompts,
        features_of(config),
        arm="best_of_n",
        progress=lambda *_: None,
    )
    kept, all_of_them = responses.generate_responses(
        config, [base], prompts, trained=False, device="cpu", progress=lambda *_: None, candidates=n
    )
    _, alone = responses.generate_responses(
        config, [base], prompts, trained=False, device="cpu", progress=lambda *_: None
    )
    assert all_of_them.texts[::n] == alone.texts  # the first candidate is the base policy's own
    model, tokenizer = load_sarm(config.sarm)
    weight = model.score.weight[0].tolist()
    chosen = []
    said = zip(kept, all_of_them.texts, all_of_them.truncated, strict=True)
    for prompt, text, cut in said:
        scored = trim_to_last_sentence(text) if cut else text
        answer = {"role": "assistant", "content": scored}
        encoded = evaluate_one(model, tokenizer, [*prompt.messages, answer], config)
        ranked = zip(encoded.indices[0][: model.k], encoded.values[0][: model.k], strict=True)
        z = {int(latent): float(value) for latent, value in ranked}
        paid = float(encoded.rewards[0])
        for latent, tau, alpha in ((3, 0.5, 0.25), (8, 0.0, 0.5)):
            value = z.get(latent, 0.0)
            paid += weight[latent] * (min(value, 0.1) - value) - alpha * (value > tau)
        chosen.append(paid)
    best = np.array(chosen).reshape(-1, n).argmax(1)
    wanted = [all_of_them.texts[n * i + row] for i, row in enumerate(best)]
    assert table["response"].tolist() == wanted and len(set(best)) > 1
    assert table["prompt_id"].tolist() == [p.id for p in prompts for _ in range(2)]
    assert table["sample"].tolist() == [0, 1] * len(prompts)
    # log 3 - 2/3
    assert table["kl"].to_numpy() == pytest.approx(0.431946, abs=1e-6)
    assert "n = 3" in settings["kl"] and "at most" in settings["kl"]
    assert responses.best_of_kl(4) == pytest.approx(0.636294, abs=1e-6)


def test_unended_is_what_was_cut_in_mid_sentence(evaluated):
    _, _, _, table, _ = evaluated
    cut, ended = table["truncated"], table["response"].map(ends)
    assert table["unended"].tolist() == (cut & ~ended).tolist()
    assert table["unended"].any()


def test_special_tokens_that_a_response_spells_are_counted_and_scored_as_letters(
    evaluated, monkeypatch
):
    config, _, prompts, table, _ = evaluated
    assert (table["spelled"] == 0).all()
    texts = ["Sure.", "Sure.<|eot_id|>No.", "<|pad|> <|eot_id|><|eot_id|", "Sure.<|eot_id|>"]
    found, _ = evaluate.score_responses(
        config, features_of(config), prompts[:1] * 4, texts, load_sarm(config.sarm)
    )
    assert found["spelled"].tolist() == [0, 1, 2, 1]
    assert found["reward"].nunique() == 4, "an end of turn that is spelled ends nothing"
    tree = config.model_dump(mode="json")
    tree["ppo"]["penalty"]["clamp"] = 0.0

    def made(model, tokenizer, features, penalty, *_, **__):
        raise LookupError(penalty.clamp)

    monkeypatch.setattr(evaluate.CompoundReward, "from_features", made)
    with pytest.raises(LookupError, match=r"^None$"):  # what training clamps is read whole
        held = parse_config(tree, "test")
        evaluate.score_responses(held, features_of(config), [], [], (None, None))


def test_some_generations_are_theirs_in_every_field():
    def numbers(n):
        return np.arange(4.0) + n

    columns = [[[i] for i in range(4)], [[i, 9] for i in range(4)], [3, 2, 1, 0], list("abcd")]
    made = responses.Generations(*columns, [True, False, True, True], str, numbers(10), numbers(20))
    assert [list(x) if x is not str else x for x in made.of([2, 0])] == [
        [[2], [0]],
        [[2, 9], [0, 9]],
        [1, 3],
        ["c", "a"],
        [True, True],
        str,
        [12.0, 10.0],
        [22.0, 20.0],
    ]


def test_without_a_judge_harm_is_not_known():
    found = evaluate.judged(None, ["q"] * 2, ["a"] * 2, "cpu")
    assert found.dtype == np.float64 and np.isnan(found).all() and found.shape == (2,)


def test_labels_that_are_not_mapped_stop_it_before_anything_is_generated(
    tmp_path, evaluated, monkeypatch
):
    config, other, prompts, _, _ = evaluated
    folder = write_classifier(tmp_path / "detector", ["refuses", "answers"])
    detector = RefusalDetectorConfig(
        model=str(folder), dtype="float32", labels={"refuses": "refusal"}
    )
    given = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"refusal_detector": detector})}
    )
    monkeypatch.setattr(evaluate, "generate_responses", lambda *_, **__: pytest.fail("generated"))
    with pytest.raises(UserError, match="labels answers that the config does not map"):
        policy_rows(
            given,
            [(math.nan, other)],
            prompts,
            features_of(given),
            arm="penalty",
            progress=lambda *_: None,
        )


def test_a_classifier_as_refusal_detector_is_measured_on_the_labels_given(tmp_path):
    folder = write_classifier(tmp_path / "detector", ["answers", "refuses"])
    detector = RefusalDetectorConfig(
        model=str(folder), dtype="float32", labels={"answers": "answer", "refuses": "refusal"}
    )
    rows = [{"prompt": f"p{i}", "response": f"r {i} " * i, "refused": i < 4} for i in range(9)]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join(map(json.dumps, rows)))
    config = EvaluateConfig(refusal_detector=detector, refusal_labels=str(labels))
    called, found = evaluate.detected(config, ["a", "b"], ["x", "y"], "cpu")
    probability = Classifier(detector, "cpu")
    theirs = probability([r["prompt"] for r in rows], [r["response"] for r in rows]) > 0.5
    assert called == (probability(["a", "b"], ["x", "y"]) > 0.5).tolist()
    assert found == Detector(
        str(folder), int(theirs[:4].sum()), 4, int(theirs[4:].sum()), 5, str(labels)
    )
    unknown = config.model_copy(update={"refusal_labels": None})
    assert evaluate.detected(unknown, ["a"], ["x"], "cpu")[1] is None
    assert evaluate.detected(EvaluateConfig(), ["a"], ["I can't help."], "cpu") == (
        [True],
        PHRASES_ON_XSTEST,
    )


def test_the_shipped_classifier_as_refusal_detector(tmp_path):
    said = ["No one should do that. Please call someone you trust.", "Bake it for an hour.", ""]
    assert not refused(said[0])  # which the phrases miss
    shipped = EvaluateConfig(refusal_detector="shipped")
    called, found = evaluate.detected(shipped, ["p"] * 3, said, "cpu")
    assert called == load_classifier().refuses(said) == [True, False, False]
    assert found == SHIPPED_ON_XSTEST
    rows = [{"prompt": "p", "response": r, "refused": i == 0} for i, r in enumerate(said)]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join(map(json.dumps, rows)))
    measured_again = shipped.model_copy(update={"refusal_labels": str(labels)})
    _, found = evaluate.detected(measured_again, ["p"], ["x"], "cpu")
    assert found == Detector("shipped classifier", 1, 1, 0, 2, str(labels))


def test_scores_are_the_sarms_without_penalty_or_clamp(evaluated):
    config, _, prompts, table, settings = evaluated
    model, tokenizer = load_sarm(config.sarm)
    # for which the config's clamp would matter
    clamped = table.index[(table["z_3"] > 0.1) | (table["z_8"] > 0.1)]
    below_cutoff: list[int] = []
    for i in (*range(8), clamped[0]):
        answer = {"role": "assistant", "content": table["response"][i]}
        messages = [*prompts[i // 2].messages, answer]
        encoded = evaluate_one(model, tokenizer, messages, config)
        z = {
            int(latent): float(value)
            for latent, value in zip(encoded.indices[0], encoded.values[0], strict=True)
        }
        ranks = list(z)
        below = {latent: z.pop(latent) for latent in ranks[model.k :]}
        below_cutoff += [latent for latent in (3, 8, 5, 9) if latent in below]
        assert table["reward"][i] == pytest.approx(float(encoded.rewards[0]), abs=1e-5)
        for latent in (3, 8, 5, 9):
            assert table[f"z_{latent}"][i] == pytest.approx(z.get(latent, 0.0), abs=1e-5)
            assert table[f"below_{latent}"][i] == pytest.approx(below.get(latent, 0.0), abs=1e-5)
        penalty = 0.25 * (z.get(3, 0.0) > 0.5) + 0.5 * (z.get(8, 0.0) > 0.0)
        assert table["penalty"][i] == pytest.approx(penalty)
    assert sum(c.startswith("z_") for c in table) == 4 and below_cutoff
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
        extra_ranks=config.encode.extra_ranks,
        tokens_per_batch=4096,
        max_length=config.sarm.max_length,
    )


def test_prompts_too_long_for_training_are_left_out(evaluated):
    config, other, prompts, _, _ = evaluated
    short = config.model_copy(
        update={"ppo": config.ppo.model_copy(update={"max_prompt_tokens": 5})}
    )
    with pytest.raises(UserError, match="at most 5 tokens"):
        responses.generate_responses(
            short, [other], prompts, trained=False, device="cpu", progress=lambda *_: None
        )
    room = int(np.median([len(prompt_ids(tiny_tokenizer(), p.messages)) for p in prompts]))
    middle = config.model_copy(
        update={"ppo": config.ppo.model_copy(update={"max_prompt_tokens": room})}
    )
    kept, generations = responses.generate_responses(
        middle, [other], prompts, trained=False, device="cpu", progress=lambda *_: None
    )
    assert (
        0 < len(kept) < 2 * len(prompts)
        and len(generations.texts) == len(kept)
        and max(map(len, generations.prompts)) <= room
    )


# The phases


def publish_kept_policies(run: RunDir, folder: Path) -> None:
    """A unit of ppo whose policy was kept at half a nat, where it was still the base's."""
    attempt = Attempt(run, "ppo", "no_penalty-seed0")
    policy = write_tiny_policy(folder / "trained", seed=3)
    shutil.copytree(policy, attempt.directory("policy"), dirs_exist_ok=True)
    shutil.copytree(run.config.policy.model, attempt.directory("kept") / "kl-0.5")
    kept = KeptPolicy(distance=0.5, step=3, kl=0.625, path="kept/kl-0.5")
    KeptPolicies(kept=[kept]).write(attempt.path("kept.json"))
    attempt.publish()


def test_steer_evaluate_and_report_without_training(tmp_path, capsys):
    config = tiny_config(
        tmp_path,
        **{
            "encode.shards": 1,
            "probe.shards": 1,
            "probe.permutations": 50,
            "steer.file": str(tmp_path / "steering.json"),
            "evaluate.arms": ["prompted", "best_of_n"],
            "evaluate.best_of": 3,
            "evaluate.judge": {
                "model": str(write_classifier(tmp_path / "judge", ["hate", "nothate"])),
                "dtype": "float32",
                "labels": {"hate": "harm"},
            },
        },
    )
    (tmp_path / "steering.json").write_text('{"3": ["*", 0.0], "5": ["+", 1.0]}')
    run = RunDir.create(tmp_path / "run", config)
    for phase in ("fetch", "encode", "probe", "select", "steer", "calibrate"):
        run_unit(run, phase, config.units(phase)[0])  # type: ignore[arg-type]
    unmapped = f"{tmp_path / 'judge'} has labels nothate that the config does not map"
    assert f"warning: harm will not be judged: {unmapped}" in capsys.readouterr().err
    for unit in ("base", "prompted", "best_of_n"):
        run_unit(run, "evaluate", unit)
        assert f"warning: harm is not judged: {unmapped}" in capsys.readouterr().err
    publish_kept_policies(run, tmp_path)
    run_unit(run, "evaluate", "no_penalty-seed0")
    kept = pd.read_parquet(run.read("evaluate", "no_penalty-seed0").path("generations.parquet"))
    base = pd.read_parquet(run.read("evaluate", "base").path("generations.parquet"))
    assert kept["distance"].dropna().unique().tolist() == [0.5] and base["distance"].isna().all()
    at = kept[kept["distance"] == 0.5]
    assert at["response"].tolist() == base["response"].tolist(), "the base policy was kept there"
    end = kept[kept["distance"].isna()]
    assert len(end) == len(at) == len(base) and end["kl"].abs().mean() > 0.5
    known = run.read("evaluate", "no_penalty-seed0").json("summary.json")["kept"]
    assert known == [{"distance": 0.5, "step": 3, "kl": 0.625, "path": "kept/kl-0.5"}]
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
    summary = run.read("evaluate", "base").json("summary.json")
    assert table["prompt_id"].nunique() == summary["n_prompts"]
    assert summary["refusal_detector"]["data"] == "XSTest"
    run_unit(run, "report", "all")
    report = run.read("report").path("final_report.txt").read_text()
    order = [report.index(f"\n{arm} ") for arm in ("base", "prompted", "best_of_n")]
    assert order == sorted(order)
    assert "0.432" in report  # log 3 - 2/3
    flat = " ".join(report.split())
    assert f"The judge was not asked, and SARM judged itself: {unmapped}; give each of" in flat
    assert base["harm"].isna().all()
    assert "KL of best_of_n: at most log n - (n - 1) / n nats" in " ".join(report.split())
    assert (
        "\nbase " in report
        and "Demo Chosen" in report
        and "Verdict: no verdict" in report
        and "parameters)" in report
    )
    assert (
        "ppo/penalty-seed0 (not run)" in report
        and "nan" not in report.split("TRAINING, ALL ARMS")[0]
    )
