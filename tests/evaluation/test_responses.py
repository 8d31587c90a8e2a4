"""How a policy is asked and read, argument by argument, with models that only count: every setting
away from its default.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sarm.config import Config, EvaluateConfig, UserError
from sarm.data.datasets import Prompt
from sarm.data.endings import Ending
from sarm.evaluation import evaluate, responses
from sarm.evaluation.detector import Detector
from sarm.records import OwnExamples
from tests.runs import candidate, features
from tests.tiny import tiny_config


def prompt(name: str, kind: str = "unsafe") -> Prompt:
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": f"ask {name}"})
    return Prompt(name, messages, f"source {name}", kind, f"category {name}", "policy_eval")


class Asked:
    """Stands for all models: what each was asked, and answers that tell prompt and policy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pad: int | None = None) -> None:
        self.tokenizer = SimpleNamespace(pad_token_id=pad)
        self.generated: list[dict[str, Any]] = []
        self.summed: list[tuple[Any, ...]] = []
        self.checked: list[Any] = []
        self.tokenizers: list[Any] = []
        fakes = {
            "read_tokenizer": lambda *given: self.tokenizers.append(given) or self.tokenizer,
            "prompt_ids": self.prompt_ids,
            "check_system": self.checked.append,
            "open_policy": lambda *given: SimpleNamespace(to=lambda device: (*given, device)),
            "stop_ids": lambda model, tokenizer: [len(str(model[0])), 2],
            "generate": self.generate,
            "response_logprobs": self.logprobs,
            "response_text": lambda tokenizer, ids: f"{tokenizer is self.tokenizer} {ids}",
            "local_model": lambda model, revision: Path("base") / model / str(revision),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(responses, name, fake)

    def prompt_ids(self, tokenizer: Any, messages: Any) -> list[int]:
        assert tokenizer is self.tokenizer
        # as many tokens as the last turn has letters, and the first letter of the first turn
        return [ord(messages[0]["content"][0])] + [1] * (len(messages[-1]["content"]) - 1)

    def generate(self, model: Any, ids: Any, *, progress: Any, **how: Any) -> Any:
        self.generated.append({"model": model, "ids": ids, **how})
        progress(1, len(ids))
        n = len(self.generated)
        return SimpleNamespace(ids=lambda row: [row] * n, truncated=torch.arange(len(ids)) % 2 == 0)

    def logprobs(self, model: Any, prompts: Any, said: Any, **how: Any) -> list[torch.Tensor]:
        """Of which the sum is larger for another model and temperature."""
        self.summed.append((model, prompts, said, how))
        size = len(str(model[0])) * how["temperature"]
        return [-torch.ones(len(one)) * size - i for i, one in enumerate(said)]


def asking(tmp_path: Path, **more: Any) -> Config:
    return tiny_config(
        tmp_path,
        **{
            "seed": 7,
            "policy.model": "org/base",
            "policy.revision": "v3",
            "policy.chat_template_kwargs": {"a": 1},
            "ppo.max_prompt_tokens": 6,
            "ppo.micro_batch_tokens": 123,
            "evaluate.samples": 2,
            "evaluate.max_new_tokens": 9,
            "evaluate.temperature": 0.5,
            "evaluate.top_p": 0.75,
        }
        | more,
    )


def test_two_policies_are_asked_alike_and_each_is_read_beside_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, config, told = Asked(monkeypatch), asking(tmp_path), []
    prompts = [prompt("a"), prompt("long"), prompt("bb")]
    kept, found = responses.generate_responses(
        config,
        [Path("p/one"), Path("p/second")],
        prompts,
        trained=True,
        device="dev",
        progress=lambda *line: told.append(line),
        system="Be safe",
        candidates=2,
    )
    assert asked.tokenizers == [(Path("p/one"), {"a": 1})] and asked.checked == [asked.tokenizer]
    plain, under = (
        [[115, 1, 1, 1, 1]] * 4 + [[115, 1, 1, 1, 1, 1]] * 4,
        [[66, 1, 1, 1, 1]] * 4 + [[66, 1, 1, 1, 1, 1]] * 4,
    )
    keys = ["a", "a/1", "a#1", "a#1/1", "bb", "bb/1", "bb#1", "bb#1/1"]
    same = {
        "ids": under,
        "keys": keys,
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.75,
        "seed": 7,
    }
    one, second, base = (
        (Path(path), "float32", "dev") for path in ("p/one", "p/second", "base/org/base/v3")
    )
    assert asked.generated == [
        {"model": one, **same, "eos_ids": [5, 2], "pad_id": 5},
        {"model": second, **same, "eos_ids": [8, 2], "pad_id": 8},
    ]
    assert told == [
        (1, 16, "prompts answered"),
        (8, 16, "log-probabilities"),
        (9, 16, "prompts answered"),
        (16, 16, "log-probabilities"),
    ]
    said = [[row] for row in range(8)], [[row] * 2 for row in range(8)]
    how = {"temperature": 0.5, "tokens_per_batch": 123}
    assert asked.summed == [
        (one, under, said[0], how),
        (second, under, said[1], how),
        (base, plain * 2, [*said[0], *said[1]], how),
        (base, plain * 2, [*said[0], *said[1]], how | {"temperature": 1.0}),
    ]
    assert kept == [prompts[0]] * 4 + [prompts[2]] * 4 + [prompts[0]] * 4 + [prompts[2]] * 4
    assert (found.prompts, found.responses) == (plain * 2, [*said[0], *said[1]])
    assert found.samples == [0, 0, 1, 1] * 4
    assert found.texts == [f"True {ids}" for ids in found.responses]
    assert found.truncated == [True, False] * 8 and found.decode([4]) == "True [4]"
    # sums over one token, then over two, of minus size and place
    own = [-(5 * 0.5 + i) for i in range(8)] + [-2 * (8 * 0.5 + i) for i in range(8)]
    lengths = [1] * 8 + [2] * 8
    of_base = [-n * (16 * 0.5 + i) for i, n in enumerate(lengths)]
    assert found.kl.tolist() == [o - b for o, b in zip(own, of_base, strict=True)]
    assert found.base_logprob.tolist() == [-(16.0 + i) for i in range(16)]


def test_the_base_itself_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 0 as at 1; a pad token of number 0 is one."""
    asked = Asked(monkeypatch, pad=0)
    config = asking(tmp_path, **{"evaluate.temperature": 0.0, "ppo.micro_batch_tokens": None})
    kept, found = responses.generate_responses(
        config, [Path("one")], [prompt("a")], trained=False, device="dev", progress=lambda *_: None
    )
    assert [(g["pad_id"], g["temperature"], g["keys"]) for g in asked.generated] == [
        (0, 0.0, ["a", "a#1"])
    ]
    (summed,) = asked.summed
    assert summed[3] == {"temperature": 1.0, "tokens_per_batch": 16384}
    assert not asked.checked and len(kept) == 2
    assert found.kl.tolist() == [0.0, 0.0] and found.base_logprob.tolist() == [-3.0, -4.0]
    # told to be safe, the base is read without that
    responses.generate_responses(
        config,
        [Path("one")],
        [prompt("a")],
        trained=False,
        device="dev",
        progress=lambda *_: None,
        system="Be safe",
    )
    assert [one[1][0][0] for one in asked.summed[1:]] == [66, 115]
    with pytest.raises(UserError) as refused:
        responses.generate_responses(
            config,
            [Path("one")],
            [prompt("long"), prompt("longer")],
            trained=False,
            device="dev",
            progress=lambda *_: None,
        )
    assert str(refused.value) == (
        "none of the 2 policy_eval prompts has at most 6 tokens; raise ppo.max_prompt_tokens"
    )


def test_a_system_prompt_goes_before_ones_own() -> None:
    user = {"role": "user", "content": "u"}
    assert responses.under("Be safe.", (user,)) == ({"role": "system", "content": "Be safe."}, user)
    assert responses.under("Be safe.", ({"role": "system", "content": "Be brief."}, user)) == (
        {"role": "system", "content": "Be safe.\n\nBe brief."},
        user,
    )


def test_what_the_kl_is_in_words() -> None:
    plain = (
        "sum over a response's tokens of log pi - log base, both teacher-forced at the sampling"
        " temperature; a mean over samples"
    )
    for temperature, top_p, more in (
        (1.0, 1.0, ""),
        (0.5, 1.0, ""),
        (0.0, 1.0, "; the samples are greedy, so it is no estimate of the KL divergence"),
        (0.0, 0.5, "; the samples are greedy, so it is no estimate of the KL divergence"),
        (
            1.0,
            0.5,
            "; the samples are of a top-p below 1, so it is no estimate of the KL divergence",
        ),
    ):
        given: Any = SimpleNamespace(temperature=temperature, top_p=top_p)
        assert responses.kl_told(given) == plain + more
    assert responses.best_of_kl(5) == pytest.approx(math.log(5) - 0.8)


def some_generations(n: int = 4) -> responses.Generations:
    return responses.Generations(
        [[1]] * n,
        [[ord(letter) for letter in text] for text in ("yes. no", "no", "why", "so. it")[:n]],
        [0, 1, 0, 1][:n],
        ["yes. no", "no", "why", "so. it"][:n],
        [True, False, True, True][:n],
        lambda ids: "".join(map(chr, ids)),
        np.array([0.5, 1.5, 2.5, 3.5][:n]),
        np.array([-1.0, -2.0, -3.0, -4.0][:n]),
    )


def test_what_is_scored_of_a_response_that_was_cut(tmp_path: Path) -> None:
    config = asking(tmp_path)
    assert responses.endings_of(config, some_generations()) == [
        Ending("yes.", 4, True),
        Ending("no", 2, True),
        Ending("why", 3, False),
        Ending("so.", 3, True),
    ]
    whole = config.model_copy(
        update={"responses": config.responses.model_copy(update={"cut": "score"})}
    )
    assert responses.endings_of(whole, some_generations())[0] == Ending("yes. no", 7, False)
    with pytest.raises(ValueError, match="zip"):
        responses.endings_of(config, some_generations()._replace(truncated=[True]))


def test_evaluation_prompts_are_the_first_of_each_kind() -> None:
    prompts = [prompt(f"{kind}{i}", kind) for i in range(3) for kind in ("safe", "unsafe")]
    few = evaluate.evaluation_prompts(prompts, EvaluateConfig(prompts=2))
    assert [p.id for p in few] == ["unsafe0", "unsafe1", "safe0", "safe1"]
    assert len(evaluate.evaluation_prompts(prompts, EvaluateConfig(prompts=None))) == 6
    with pytest.raises(UserError) as refused:
        evaluate.evaluation_prompts([], EvaluateConfig(prompts=2))
    assert str(refused.value) == (
        "no prompt falls in policy_eval; give that part a share in data.sources.NAME.split"
    )


@pytest.mark.parametrize("arm", ["penalty", "base", "prompted", "best_of_n"])
def test_the_table_of_an_arm_in_whole(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two policies, each with two responses to one prompt; or the better of each two. On a GPU
    where there is one, which nothing here touches.
    """
    device = "cuda" if arm == "prompted" else "cpu"
    config = asking(
        tmp_path,
        **{
            "evaluate.best_of": 2,
            "evaluate.system_prompt": "Be safe",
            "evaluate.judge": {"model": "a/judge", "labels": {"x": "harm"}},
        },
    )
    listed, sarm = features(), ("the SARM", "its tokenizer")
    prompts = [prompt("a"), prompt("b", "safe")]
    policies = [(0.5, Path("one")), (math.nan, Path("second"))]
    rows = [prompts[0]] * 2 + [prompts[1]] * 2
    best = arm == "best_of_n"
    kept = [0, 3] if best else [0, 1, 2, 3]
    made = some_generations()
    asked: dict[str, Any] = {}
    told: list[Any] = []
    progress = lambda *line: told.append(line)  # noqa: E731
    watched = pd.DataFrame({"reward": [9.0, 8.0, 7.0, 6.0][: len(kept)]})
    shown = OwnExamples(texts=[], examples=[])

    def generate_responses(*given: Any, **how: Any) -> Any:
        asked["generate"] = (given, how)
        return rows, made

    def compound_rewards(*given: Any) -> np.ndarray:
        assert given == (config, listed, rows, made, sarm)
        return np.array([2.0, 1.0, 0.0, 3.0])

    def score_responses(*given: Any) -> Any:
        texts = [["yes.", "no", "why", "so."][row] for row in kept]
        assert given == (config, listed, [rows[row] for row in kept], texts, sarm)
        return watched, 77

    def own_examples(*given: Any) -> OwnExamples:
        asked["examples"] = given
        return shown

    def detected(*given: Any) -> Any:
        asked["detected"] = given
        return [row == 3 for row in kept], Detector("d", 8, 10, 1, 10, "labels")

    def judged(*given: Any) -> np.ndarray:
        asked["judged"] = given
        return np.array([0.25 * row for row in kept])

    def problem(judge: Any) -> str | None:
        assert judge == config.evaluate.judge
        return "its labels say nothing" if arm == "base" else None

    for name, fake in {
        "generate_responses": generate_responses,
        "load_sarm": lambda given: sarm if given == config.sarm else None,
        "compound_rewards": compound_rewards,
        "score_responses": score_responses,
        "own_examples": own_examples,
        "detected": detected,
        "judged": judged,
        "judge_problem": problem,
        "label_positions": lambda *_: pytest.fail("there is no detector of the user's"),
    }.items():
        monkeypatch.setattr(evaluate, name, fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    table, settings, examples = evaluate.policy_rows(
        config, policies, prompts, listed, arm=arm, progress=progress
    )
    assert asked["generate"] == (
        (config, [Path("one"), Path("second")], prompts),
        {
            "trained": arm == "penalty",
            "system": "Be safe" if arm == "prompted" else None,
            "candidates": 2 if best else 1,
            "device": device,
            "progress": progress,
        },
    )
    assert told == [(0, 4, "scoring")] and examples is shown
    distance = [0.5, math.nan] if best else [0.5, 0.5, math.nan, math.nan]
    whose = {
        "prompt_id": [rows[row].id for row in kept],
        "distance": distance,
        "sample": [made.samples[row] for row in kept],
        "source": [rows[row].source for row in kept],
        "kind": [rows[row].kind for row in kept],
    }
    texts = [made.texts[row] for row in kept]
    said = [rows[row].messages[-1]["content"] for row in kept]
    judge = None if arm == "base" else config.evaluate.judge
    assert asked["judged"] == (judge, said, texts, device)
    assert asked["detected"] == (config.evaluate, said, texts, device)
    *first, of, seen, with_ = asked["examples"]
    assert first[:3] == [config, listed, [rows[row] for row in kept]] and with_ == sarm
    assert {**of, "distance": None} == {**whose, "distance": None}
    np.testing.assert_array_equal(of["distance"], distance)
    assert seen is watched
    want = pd.DataFrame(
        whose
        | {
            "category": [rows[row].category for row in kept],
            "prompt": said,
            "response": texts,
            "n_tokens": [[7, 2, 3, 6][row] for row in kept],
            "truncated": [made.truncated[row] for row in kept],
            "scored_tokens": [[4, 2, 3, 3][row] for row in kept],
            "unended": [row == 2 for row in kept],
            "refused": [row == 3 for row in kept],
            "kl": [math.log(2) - 0.5] * 2 if best else made.kl.tolist(),
            "base_logprob": [made.base_logprob[row] for row in kept],
            "harm": [0.25 * row for row in kept],
            "reward": watched["reward"],
        }
    )
    pd.testing.assert_frame_equal(table, want)
    assert settings == {
        "kl": responses.BEST_OF_TOLD.format(n=2) if best else responses.kl_told(config.evaluate),
        "judge": None if arm == "base" else "a/judge",
        "judge_problem": "its labels say nothing" if arm == "base" else None,
        "refusal_detector": Detector("d", 8, 10, 1, 10, "labels").record(),
        "samples": 2,
        "temperature": 0.5,
        "top_p": 0.75,
        "max_new_tokens": 9,
        "sarm_parameters": 77,
        "device": device,
    }


def test_a_table_without_judge_and_known_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asking(tmp_path)
    assert config.evaluate.judge is None
    for name, fake in {
        "generate_responses": lambda *_, **__: ([prompt("a")] * 4, some_generations()),
        "load_sarm": lambda _: (None, None),
        "score_responses": lambda *_: (pd.DataFrame({"reward": [0.0] * 4}), 1),
        "own_examples": lambda *_: None,
        "detected": lambda *_: ([False] * 4, None),
    }.items():
        monkeypatch.setattr(evaluate, name, fake)
    table, settings, _ = evaluate.policy_rows(
        config, [(1.0, Path("a"))], [], features(), arm="base", progress=lambda *_: None
    )
    assert (settings["judge"], settings["judge_problem"], settings["refusal_detector"]) == (
        None,
    ) * 3
    assert table["harm"].isna().all()


def test_a_response_is_scored_with_what_is_watched_and_without_a_clamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asking(tmp_path, **{"ppo.penalty.clamp": 0.5, "encode.extra_ranks": 7})
    listed = features(
        penalised=[
            {"latent": 4, "tau": 1.0, "alpha": 0.5},
            {"latent": 2, "tau": 1.0, "alpha": 0.5},
        ],
        monitors=[9, 2],
        random_candidates=[candidate(9), candidate(6)],
    )
    model = SimpleNamespace(
        named_parameters=lambda: [
            ("sae.decoder.weight", torch.zeros(100)),
            ("sae.encoder.weight", torch.zeros(3, 2)),
            ("decoder.sae", torch.zeros(5)),
        ]
    )
    asked: dict[str, Any] = {}
    scores = SimpleNamespace(
        reward=torch.tensor([1.0, 2.0]),
        penalty=torch.tensor([0.5, 0.25]),
        total=torch.tensor([0.5, 1.75]),
        z=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        monitors_z=torch.tensor([[5.0, 6.0], [7.0, 8.0]]),
        below=torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]),
    )

    def made(*given: Any, **how: Any) -> Any:
        asked.update(given=given, how=how)
        return SimpleNamespace(score=lambda said: asked.update(said=said) or scores)

    monkeypatch.setattr(evaluate.CompoundReward, "from_features", made)
    monkeypatch.setattr(evaluate, "spelled_in", lambda tokenizer, text: (tokenizer, len(text)))
    prompts, sarm = [prompt("a"), prompt("b")], (model, "tokenizer")
    table, parameters = evaluate.score_responses(config, listed, prompts, ["yes", "no"], sarm)  # type: ignore[arg-type]
    *with_, seen, penalty, of_sarm = asked["given"]
    assert with_ == [model, "tokenizer"] and of_sarm == config.sarm
    assert seen == listed.model_copy(update={"monitors": [9, 6]})
    assert penalty == config.ppo.penalty.model_copy(update={"clamp": None})
    assert asked["how"] == {"extra_ranks": 7}
    said = [
        [*p.messages, {"role": "assistant", "content": text}]
        for p, text in zip(prompts, ("yes", "no"), strict=True)
    ]
    assert asked["said"] == said and parameters == 11
    pd.testing.assert_frame_equal(
        table,
        pd.DataFrame(
            {
                "reward": [1.0, 2.0],
                "penalty": [0.5, 0.25],
                "spelled": [("tokenizer", 3), ("tokenizer", 2)],
                "z_4": [1.0, 3.0],
                "z_2": [2.0, 4.0],
                "z_9": [5.0, 7.0],
                "z_6": [6.0, 8.0],
                "below_4": [0.1, 0.5],
                "below_2": [0.2, 0.6],
                "below_9": [0.3, 0.7],
                "below_6": [0.4, 0.8],
            }
        ),
        check_dtype=False,
    )
    # what the penalty arm is paid: the config's clamp and the features as they are
    four = [prompt(name) for name in "abcd"]
    paid = evaluate.compound_rewards(config, listed, four, some_generations(), sarm)  # type: ignore[arg-type]
    assert asked["given"] == (*sarm, listed, config.ppo.penalty, config.sarm)
    assert asked["how"] == {}
    assert [one[-1]["content"] for one in asked["said"]] == ["yes.", "no", "why", "so."]
    assert [one[1]["content"] for one in asked["said"]] == [f"ask {name}" for name in "abcd"]
    assert paid.tolist() == [0.5, 1.75] and paid.dtype == np.float64
    for ask in (
        lambda: evaluate.score_responses(config, listed, prompts, ["yes"], sarm),  # type: ignore[arg-type]
        lambda: evaluate.compound_rewards(config, listed, prompts, some_generations(), sarm),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="zip"):
            ask()


def test_the_best_of_equal_ones_is_the_first() -> None:
    assert evaluate.best_rows(np.array([1.0, 3.0, 3.0, 5.0, 2.0, 5.0]), 3) == [1, 3]
    assert evaluate.best_rows(np.array([1.0, 3.0]), 1) == [0, 1]


def test_a_judge_is_asked_of_every_response(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def classifier(*given: Any) -> Any:
        return lambda *pair: made.append((given, pair)) or np.array([0.5, 0.75])

    monkeypatch.setattr(evaluate, "Classifier", classifier)
    judge: Any = SimpleNamespace(model="j")
    found = evaluate.judged(judge, ["p", "q"], ["r", "s"], "dev")
    assert found.tolist() == [0.5, 0.75] and made == [((judge, "dev"), (["p", "q"], ["r", "s"]))]
    # a detector counts from above one half
    config: Any = SimpleNamespace(refusal_labels=None, refusal_detector=judge)
    assert evaluate.detected(config, ["p", "q"], ["r", "s"], "dev") == ([False, True], None)
    assert made[1] == ((judge, "dev"), (["p", "q"], ["r", "s"]))
