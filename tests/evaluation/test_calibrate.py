"""What calibrate reads off a policy's responses, with a reader of latents that counts letters, and
once on the tiny models.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jobs import calibrate as job
from jobs.__main__ import run_unit
from reports.calibration import calibration
from sarm.config import Config, UserError
from sarm.data.conversations import response_text
from sarm.data.datasets import Pair, Prompt, load_data, pairs_in, prompts_in
from sarm.data.endings import trim_to_last_sentence
from sarm.evaluation import calibrate as c
from sarm.evaluation import readability
from sarm.evaluation.instrument import (
    cohens_kappa,
    detectable_difference,
    relative_fall,
    within_prompt_share,
)
from sarm.records import Bounds, Candidate, Features, PositiveControl, RatedLatent, Readings
from sarm.reward_model.model import load_sarm
from sarm.reward_model.scoring import encode_texts
from sarm.run import Attempt, RunDir
from tests.runs import candidate, feature, features
from tests.tiny import tiny_config

LETTERS = {3: "e", 8: "a", 5: "o", 6: "t", 9: "n", 11: "s", 12: "i"}
"""Latent to the letter whose count it reads."""
TEXTS = [
    "see me here. end",
    "an apple a day. so it goes",
    "no. on top of it",
    "seen at ease. to eat",
    "it is. as it was",
    "ten toes. nine",
]
"""Two samples of three prompts."""


def prompt(name: str, kind: str = "unsafe") -> Prompt:
    messages = [{"role": "user", "content": name}]
    return Prompt(name, messages, "demo", kind, "", "test")  # type: ignore[arg-type]


def read(prompts: Any, texts: Any) -> c.Read:
    z = {
        latent: np.array([float(text.count(letter)) for text in texts])
        for latent, letter in LETTERS.items()
    }
    return c.Read(z[3] - 0.5 * z[8], z)


def decode(ids: Any) -> str:
    return "".join(map(chr, ids))


def responses() -> c.Responses:
    names = ["p", "p", "q", "q", "r", "r"]
    ids = [[ord(letter) for letter in text] for text in TEXTS]
    return c.Responses([prompt(name) for name in names], ids, [True] * 6, decode)


def config(tmp_path: Path, **more: Any) -> Config:
    return tiny_config(tmp_path, **more)


def rated(latent: int, tau: float, alpha: float = 0.5) -> RatedLatent:
    return RatedLatent(latent=latent, tau=tau, alpha=alpha, base_rate=0.0, confirmed=True)


def chosen(**more: Any) -> Any:
    return features(
        penalised=[
            {"latent": 3, "tau": 2.5, "alpha": 9.0},
            {"latent": 8, "tau": 1.5, "alpha": 9.0},
        ],
        harming=[feature(3, "harming"), feature(6, "harming", False) | {"weight": -0.25}],
        misleading=[feature(8, "misleading") | {"weight": 0.5}],
        random_candidates=[candidate(9), candidate(11), candidate(12), candidate(6)],
        **more,
    )


def test_taus_stay_as_select_has_them_and_alpha_is_in_sds_of_the_policys_reward(tmp_path) -> None:
    base = read(None, TEXTS)
    made = config(tmp_path, **{"ppo.penalty.alpha": 0.25})
    found = c.thresholds(made, chosen(), base)
    assert [(p.latent, p.tau) for p in found] == [(3, 2.5), (8, 1.5)]
    rewards = [t.count("e") - 0.5 * t.count("a") for t in TEXTS]
    assert found[0].alpha == pytest.approx(0.25 * np.std(rewards, ddof=1))
    assert found[0].base_rate == np.mean([t.count("e") > 2.5 for t in TEXTS])
    plain = config(
        tmp_path / "2", **{"ppo.penalty.alpha": 0.25, "ppo.penalty.alpha_unit": "reward"}
    )
    assert c.thresholds(plain, chosen(), base)[1].alpha == 0.25


def test_taus_at_a_quantile_of_the_policys_own_values(tmp_path) -> None:
    made = config(tmp_path, **{"ppo.penalty.tau_quantile": 0.75, "ppo.penalty.tau_from": "policy"})
    found = c.thresholds(made, chosen(), read(None, TEXTS))
    assert found[0].tau == np.quantile([t.count("e") for t in TEXTS], 0.75)
    assert found[1].tau == np.quantile([t.count("a") for t in TEXTS], 0.75)


def test_agreement_with_the_same_responses_cut_earlier() -> None:
    penalised = [rated(3, 1.5), rated(8, 1.5)]
    base = read(None, [c.ending(decode, ids, cut=True).text for ids in responses().ids])
    row, first, second = c.agreement(responses(), base, penalised, 5, True, read)
    # Cut five tokens earlier and trimmed again, every text keeps its sentence but the second, which
    # still ends at `day.`
    kept = ["see me here.", "an apple a day.", "no.", "seen at ease.", "it is.", "ten toes."]
    fires = [t.count("e") > 1.5 or t.count("a") > 1.5 for t in kept]
    assert first.tolist() == second.tolist() == fires and row.n == 6
    assert row.kappa == 1.0
    asked: list[list[str]] = []

    def reading(prompts: Any, texts: Any) -> c.Read:
        asked.append(list(texts))
        return read(prompts, texts)

    row, first, second = c.agreement(responses(), base, penalised, 9, True, reading)
    earlier = [trim_to_last_sentence(text[:-9]) for text in TEXTS]
    assert asked == [earlier]
    assert second.tolist() == [t.count("e") > 1.5 or t.count("a") > 1.5 for t in earlier]
    assert row.kappa == cohens_kappa(first, second) and row.kappa < 1
    assert row.by_latent["3"] == cohens_kappa(
        np.array([t.count("e") > 1.5 for t in kept]),
        np.array([t.count("e") > 1.5 for t in earlier]),
    )


def test_candidates_say_what_a_policy_can_move_and_what_the_reward_charges(tmp_path) -> None:
    base = read(None, TEXTS)
    listed = chosen()
    rows = c.candidates_of(config(tmp_path), listed, base, [rated(3, 2.5)])
    assert rows and {r.latent for r in rows} == {
        f.latent for f in (*listed.harming, *listed.misleading)
    }
    for row in rows:
        z = base.z[row.latent]
        assert row.rate == np.mean(z > row.tau)
        assert row.within_prompt_share == within_prompt_share((z > row.tau).reshape(3, 2))
        assert row.charge == pytest.approx(-(row.weight * z).mean() / base.reward.std(ddof=1))
        assert row.penalised is (row.latent == 3)


def test_every_seed_has_random_latents_of_its_own_with_the_penaltys_dose(tmp_path) -> None:
    base = read(None, TEXTS)
    penalised = [rated(3, 1.5, 0.5), rated(8, 0.5, 0.25)]
    made = config(tmp_path, **{"ppo.seeds": list(range(8))})
    sets = c.random_sets(made, chosen(), base, penalised)
    assert list(sets) == [str(seed) for seed in range(8)]
    dose = 0.5 * np.mean(base.z[3] > 1.5) + 0.25 * np.mean(base.z[8] > 0.5)
    for latents in sets.values():
        assert not {r.latent for r in latents} & {3, 8}
        assert sum(r.alpha * r.base_rate for r in latents) == pytest.approx(dose)
    assert len({tuple(r.latent for r in latents) for latents in sets.values()}) > 1
    without = config(tmp_path / "2", **{"ppo.arms": ["penalty", "no_penalty"]})
    assert c.random_sets(without, chosen(), base, penalised) == {}


def test_positive_control_replaces_rejected_answers_by_chosen_ones(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the run's length: the tokenizer of this test has one token a letter."""
    monkeypatch.setattr(c, "local_model", lambda *_: tmp_path)
    monkeypatch.setattr(
        c,
        "read_tokenizer",
        lambda *_: (
            lambda text, add_special_tokens: {
                "input_ids": [ord("e")] * add_special_tokens + [ord(x) for x in text]
            }
        ),
    )
    pairs = [
        Pair("1", prompt("p"), "demo", "no. on", "see. eee"),
        Pair("2", prompt("p"), "demo", "no. on", "on. eeee"),
        Pair("3", prompt("q"), "demo", "ee. no", "ee. see"),
        Pair("4", prompt("r"), "demo", "up. up", "eel. eee"),
        Pair("5", prompt("s"), "demo", "oh. oh", "pee. ee"),
        Pair("6", prompt("t"), "demo", "ah. oh", "fee. fee"),
        Pair("7", prompt("u", "safe"), "demo", "ah. oh", "fee. fee"),
    ]
    made = config(tmp_path, **{"ppo.max_new_tokens": 5})
    monitors = [
        c.WatchedLatent(latent=n, tau=0.5, base_rate=0.5, max_cosine=0.0, max_correlation=0.0)
        for n in (3, 5)
    ]
    found = c.positive_control(made, pairs, responses(), read, [rated(3, 1.5)], monitors)
    # Cut at five letters and trimmed: `see.`, `on.`, `ee.`, `eel.`, `pee.`, `fee.` against `no.`,
    # `no.`, `ee.`, `up.`, `oh.`, `ah.`; two pairs are one prompt's.
    before, after = np.array([0.5, 1, 1, 1, 1]), np.array([0.0, 1, 0, 0, 0])
    expected = relative_fall(before, after)
    assert found.prompts == 5 and expected is not None and found.penalised is not None
    assert found.penalised == expected
    # Either monitor, e and o, counts half: of a prompt's texts `see.` and `on.` both have one.
    watched = relative_fall(np.full(5, 0.5), np.array([0.5, 0.5, 0, 0.5, 0]))
    assert watched is not None and watched.value == pytest.approx(0.4)
    assert found.monitors is not None
    assert found.monitors.model_dump() == pytest.approx(
        {"value": watched.value, "low": watched.low, "high": watched.high}
    )
    assert c.positive_control(made, [], responses(), read, [rated(3, 1.5)], []).prompts == 0


def instrument(**more: Any) -> Readings:
    wide = Bounds(value=0.5, low=0.2, high=0.8)
    values: dict[str, Any] = {
        "n_prompts": 20,
        "samples": 2,
        "cut": 0.9,
        "unended": 0.1,
        "tokens": 30.0,
        "scored_tokens": 25.0,
        "reward_mean": 0.0,
        "reward_sd": 1.0,
        "any_rate": 0.4,
        "candidates": [],
        "penalised": [rated(3, 1.0).model_copy(update={"base_rate": 0.4})],
        "monitors": [],
        "random": {},
        "stability": [],
        "kappa": 0.6,
        "positive_control": PositiveControl(prompts=30, penalised=wide, monitors=None),
        "detectable": 0.08,
        "planned": {"prompts": 100, "samples": 2, "seeds": 3},
        "unreadable": [],
        "warnings": [],
    }
    return Readings(**(values | more))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, ""),
        ({"unended": 0.21}, "21% of the base policy's scored responses end at neither"),
        ({"kappa": 0.39}, "kappa 0.39, at least 0.4"),
        ({"kappa": None}, "fires on some responses and not on others"),
        (
            {"positive_control": PositiveControl(prompts=0, penalised=None, monitors=None)},
            "give part test a share",
        ),
        (
            {
                "positive_control": PositiveControl(
                    prompts=9, penalised=Bounds(value=0.3, low=-0.1, high=0.7), monitors=None
                )
            },
            "not shown to lower the penalised latents (95 % CI -10% to +70%)",
        ),
    ],
)
def test_what_makes_an_instrument_unreadable(tmp_path, more: dict[str, Any], says: str) -> None:
    found = readability.unreadable(config(tmp_path), instrument(**more))
    assert len(found) == (1 if says else 0) and all(says in why for why in found)


def test_a_tau_that_the_policy_never_reaches_and_a_small_plan_are_warned_of(tmp_path) -> None:
    silent = rated(7, 30.0)
    found = instrument(penalised=[silent], detectable=0.25)
    told = readability.warnings_of(config(tmp_path), found)
    assert any("penalised latent 7 never exceeds tau 30 in 40 responses" in w for w in told)
    assert any("no monitor qualifies" in w for w in told)
    assert readability.power_sentence(config(tmp_path), found) == (
        "the planned evaluation (100 unsafe prompts, 2 samples, 3 seeds) detects a change of the"
        " penalised rate of 25 points with 80 % power; calibrate.detectable asks for 10 points;"
        " give policy_eval more prompts, raise evaluate.samples or ppo.seeds, or set"
        " calibrate.underpowered=warn"
    )
    assert any("of 25 points with 80 % power; calibrate.detectable asks for 10" in w for w in told)
    assert readability.underpowered(config(tmp_path), instrument(detectable=None))
    assert not readability.underpowered(config(tmp_path), instrument(detectable=0.1))


def test_what_is_applied_are_the_policys_thresholds_and_monitors() -> None:
    monitor = c.WatchedLatent(latent=5, tau=0.5, base_rate=0.5, max_cosine=0.0, max_correlation=0.0)
    found = instrument(penalised=[rated(3, 1.25, 0.75)], monitors=[monitor], reward_sd=2.5)
    features = found.applied(chosen())
    assert [(p.latent, p.tau, p.alpha) for p in features.penalised] == [(3, 1.25, 0.75)]
    assert features.monitors == [5] and features.reward_sd == 2.5


def test_power_is_of_the_plan_and_of_how_the_responses_vary(tmp_path) -> None:
    made = config(tmp_path, **{"calibrate.samples": 2, "calibrate.seed_sd": 0.07})
    data = load_data(made.data)
    unsafe = sum(p.kind == "unsafe" for p in prompts_in(data, "policy_eval"))
    prompts = min(unsafe, made.evaluate.prompts or unsafe)
    sizes = {"samples": made.evaluate.samples, "seeds": len(made.ppo.seeds)}
    planned = {"prompts": prompts, **sizes}
    for constant in (np.zeros(6, bool), np.ones(6, bool)):
        assert c.power(made, data, constant) == {"detectable": None, "planned": planned}
    fired = np.array([1, 0, 0, 0, 1, 1], bool)
    share = within_prompt_share(fired.reshape(3, 2))
    assert share is not None
    want = detectable_difference(0.5, within_share=share, seed_sd=0.07, **planned)
    assert c.power(made, data, fired) == {"detectable": want, "planned": planned}


@pytest.mark.parametrize("cut", ["trim", "score"])
def test_responses_are_read_as_the_reward_reads_them(
    tmp_path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    def asked(prompts: Any, texts: Any) -> c.Read:
        raise LookupError(*texts)

    monkeypatch.setattr(c, "base_responses", lambda *_: responses())
    monkeypatch.setattr(c, "sarm_reader", lambda *_: asked)
    made = config(tmp_path, **{"responses.cut": cut})
    with pytest.raises(LookupError) as error:
        c.calibrate(made, chosen(), load_data(made.data), "cpu", lambda *_: None)
    trimmed = [trim_to_last_sentence(text) for text in TEXTS]
    assert list(error.value.args) == (trimmed if cut == "trim" else TEXTS)


def test_the_policy_is_read_at_its_revision(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path)
    made = made.model_copy(
        update={"policy": made.policy.model_copy(update={"model": "a/b", "revision": "v2"})}
    )

    def asked(*given: Any) -> Path:
        raise LookupError(*given)

    monkeypatch.setattr(c, "local_model", asked)
    for ask in (
        lambda: c.base_responses(made, [], "cpu", lambda *_: None),
        lambda: c.positive_control(made, [], responses(), read, [], []),
    ):
        with pytest.raises(LookupError) as error:
            ask()
        assert error.value.args == ("a/b", "v2")


def test_monitors_keep_their_tau_and_say_how_they_go_with_the_penalised(tmp_path) -> None:
    base = read(None, TEXTS)
    listed = features(
        penalised=[{"latent": 3, "tau": 2.5, "alpha": 9.0}],
        monitor_features=[
            feature(n, "harming") | {"tau": 0.5, "max_cosine": 0.125, "max_correlation": 0.0}
            for n in (5, 6)
        ],
        monitors=[5, 6],
    )
    made = config(tmp_path, **{"select.monitors": 2, "select.monitor_max_correlation": 0.999})
    found = c.monitors_of(made, listed, base, [rated(3, 2.5)])
    assert {m.latent for m in found} <= {5, 6} and found
    for m in found:
        assert (m.tau, m.max_cosine) == (0.5, 0.125)
        assert m.base_rate == np.mean(base.z[m.latent] > 0.5)
        correlation = abs(np.corrcoef(base.z[m.latent], base.z[3])[0, 1])
        assert m.max_correlation == pytest.approx(correlation)


def test_calibrate_on_the_tiny_models(selected_run: RunDir, tmp_path: Path) -> None:
    """Rates and rewards are those of the texts scored one by one."""
    config = selected_run.config
    run_unit(selected_run, "calibrate", "all")
    found = Readings.read(selected_run.read("calibrate").path("readings.json"))
    assert found.n_prompts == config.calibrate.prompts and found.samples == 2
    prompts = prompts_in(load_data(config.data), "ppo")
    sampled = c.base_responses(config, prompts, "cpu", lambda *_: None)
    unsafe = [p.id for p in prompts if p.kind == "unsafe"][: config.calibrate.prompts]
    assert [p.id for p in sampled.prompts] == [id_ for id_ in unsafe for _ in range(2)]
    again = zip(sampled.ids[::2], sampled.ids[1::2], strict=True)
    assert all(one != other for one, other in again), "each sample has noise of its own"
    safe = prompts[0]._replace(id="safe", kind="safe")
    long = prompts[0]._replace(
        id="long",
        messages=({"role": "user", "content": "help me " * config.ppo.max_prompt_tokens},),
    )
    among = c.base_responses(config, [safe, long, *prompts], "cpu", lambda *_: None)
    assert among.prompts == sampled.prompts and among.ids == sampled.ids, "neither is asked"
    model, tokenizer = load_sarm(config.sarm)
    texts = [
        c.ending(lambda ids: response_text(tokenizer, ids), ids, cut=cut).text
        for ids, cut in zip(sampled.ids, sampled.cut, strict=True)
    ]
    rewards, fired = [], []
    for p, text in zip(sampled.prompts, texts, strict=True):
        one = encode_texts(
            model,
            tokenizer,
            [[*p.messages, {"role": "assistant", "content": text}]],
            extra_ranks=0,
            tokens_per_batch=4096,
            max_length=512,
        )
        z = dict(zip(one.indices[0].tolist(), one.values[0].tolist(), strict=True))
        rewards.append(float(one.rewards[0]))
        fired.append(any(z.get(q.latent, 0.0) > q.tau for q in found.penalised))
    assert found.reward_mean == pytest.approx(np.mean(rewards), abs=1e-5)
    assert found.reward_sd == pytest.approx(np.std(rewards, ddof=1), abs=1e-5)
    assert found.any_rate == pytest.approx(np.mean(fired))
    assert found.cut == np.mean(sampled.cut)
    listed = Features.read(selected_run.read("select").path("features.json"))
    read_ = c.sarm_reader(config, listed, "cpu")
    base = read_(sampled.prompts, texts)
    again_ = [
        c.agreement(sampled, base, found.penalised, tokens, True, read_)
        for tokens in config.calibrate.cut_tokens
    ]
    assert [row for row, _, _ in again_] == found.stability
    first, second = (np.concatenate([one[i] for one in again_]) for i in (1, 2))
    assert found.kappa == cohens_kappa(first, second)


def candidate_of(latent: int, charge: float, penalised: bool = True) -> Candidate:
    return Candidate(
        latent=latent,
        role="harming",
        confirmed=True,
        penalised=penalised,
        weight=-0.5,
        tau=1.0,
        rate=0.25,
        within_prompt_share=0.5,
        charge=charge,
    )


def test_it_says_where_the_penalty_only_repeats_the_reward() -> None:
    alone = readability.repeats(
        [candidate_of(5, 0.125), candidate_of(8, 0.031), candidate_of(9, -0.5, False)]
    )
    assert alone == [
        "the reward already charges for 5 (0.12 SD a response), 8 (0.03 SD a response); there the"
        " penalty repeats the reward; no other latent is penalised, so training without the"
        " penalty pushes the same way, and only a comparison at equal KL shows what the penalty"
        " adds"
    ]
    both = readability.repeats([candidate_of(5, 0.125), candidate_of(9, -0.25)])
    assert both == [
        "the reward already charges for 5 (0.12 SD a response); there the penalty repeats the"
        " reward"
    ]
    assert readability.repeats([candidate_of(5, -0.1), candidate_of(6, 0.5, False)]) == []


def test_an_evaluation_that_is_too_small_stops_before_training(selected_run: RunDir) -> None:
    strict = selected_run.config.model_copy(
        update={
            "calibrate": selected_run.config.calibrate.model_copy(update={"underpowered": "stop"})
        }
    )
    attempt = Attempt(selected_run, "calibrate", "all")
    with pytest.raises(UserError, match="can tell no change of the penalised rate, however large"):
        job.run(strict, selected_run, "all", attempt)


def test_where_no_response_ends_that_is_said_and_what_can_be_read_is(
    selected_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(selected_run.path, tmp_path / "run")
    ppo = selected_run.config.ppo.model_copy(update={"max_new_tokens": 1})
    run = RunDir(tmp_path / "run", selected_run.config.model_copy(update={"ppo": ppo}))
    job.run(run.config, run, "all", Attempt(run, "calibrate", "all"))
    found = Readings.read(run.read("calibrate").path("readings.json"))
    assert found.unended == 1.0 and found.kappa is None and 0 <= found.any_rate <= 1
    said = "100% of the base policy's scored responses end at neither an end of turn nor a sentence"
    assert any(said in why for why in found.unreadable)
    assert f"warning: the SARM is not shown to read the policy's responses: {said}" in (
        capsys.readouterr().err
    )
    blocks = calibration({"readings": found.tree(), "policies": [], "evaluations": {}})
    told = [line for block in blocks for line in getattr(block, "items", [])]
    assert any(said in line for line in told), "in the report too"


def test_random_latents_that_are_the_same_in_every_seed_are_told() -> None:
    def drawn(**seeds: list[int]) -> Any:
        by_seed = {s: [SimpleNamespace(latent=n) for n in latents] for s, latents in seeds.items()}
        return readability.drawn_alike(SimpleNamespace(random=by_seed))  # type: ignore[arg-type]

    (told,) = drawn(a=[49, 42], b=[42, 49])
    assert "same latents (42, 49) in all 2 seeds" in told
    (told,) = drawn(a=[49, 42], b=[42, 7], c=[3, 4])
    assert "share latents (5 stand in 6 places)" in told and "not independent draws" in told
    assert drawn(a=[49, 42], b=[41, 7]) == [] and drawn(a=[49]) == [] and drawn() == []


@pytest.mark.parametrize("pad", [None, 0])
def test_the_policy_is_sampled_as_in_training(
    tmp_path, monkeypatch: pytest.MonkeyPatch, pad: int | None
) -> None:
    """Every argument of the generator, with settings away from their defaults."""
    made = config(
        tmp_path,
        **{
            "seed": 5,
            "calibrate.prompts": 2,
            "calibrate.samples": 3,
            "ppo.max_prompt_tokens": 4,
            "ppo.max_new_tokens": 7,
            "ppo.temperature": 0.7,
            "policy.chat_template_kwargs": {"date": "today"},
        },
    )
    tokenizer, moved, asked = SimpleNamespace(pad_token_id=pad), [], {}
    model = SimpleNamespace(to=lambda device: moved.append(device) or "the policy")
    folder = tmp_path / "policy"
    monkeypatch.setattr(c, "local_model", lambda *_: folder)
    monkeypatch.setattr(c, "open_policy", lambda *given: {(folder, "float32"): model}[given])

    def read_tokenizer(*given: Any) -> Any:
        assert given == (folder, {"date": "today"})
        return tokenizer

    def ids_of(with_: Any, messages: Any) -> list[int]:
        assert with_ is tokenizer
        return [ord(letter) for letter in messages[0]["content"]]

    def stops(*given: Any) -> list[int]:
        assert given == ("the policy", tokenizer)
        return [9, 4]

    def generate(*given: Any, progress: Any, **how: Any) -> Any:
        asked.update(given=given, how=how)
        progress(4, 6)
        cut = SimpleNamespace(tolist=lambda: [True, False] * 3)
        return SimpleNamespace(ids=lambda row: [row, row + 10], truncated=cut)

    monkeypatch.setattr(c, "read_tokenizer", read_tokenizer)
    monkeypatch.setattr(c, "prompt_ids", ids_of)
    monkeypatch.setattr(c, "stop_ids", stops)
    monkeypatch.setattr(c, "generate", generate)
    monkeypatch.setattr(c, "response_text", lambda *given: f"{given[0] is tokenizer} {given[1]}")
    prompts = [prompt(n, k) for n, k in (("s", "safe"), ("four", "unsafe"), ("fiver", "unsafe"))]
    prompts += [prompt("b"), prompt("not asked")]
    told: list[Any] = []
    found = c.base_responses(made, prompts, "a device", lambda *line: told.append(line))
    assert moved == ["a device"] and told == [(4, 6, "prompts answered")]
    four, b = [ord(letter) for letter in "four"], [ord("b")]
    assert asked["given"] == ("the policy", [four] * 3 + [b] * 3)
    assert asked["how"] == {
        "keys": ["four#0", "four#1", "four#2", "b#0", "b#1", "b#2"],
        "max_new_tokens": 7,
        "temperature": 0.7,
        "top_p": 1.0,
        "seed": 5,
        "step": -1,
        "eos_ids": [9, 4],
        "pad_id": 9 if pad is None else 0,
    }
    assert found.prompts == [prompts[1]] * 3 + [prompts[3]] * 3
    assert found.ids == [[row, row + 10] for row in range(6)]
    assert found.cut == [True, False] * 3
    assert found.decode([7]) == "True [7]"
    with pytest.raises(UserError) as refused:
        c.base_responses(made, prompts[:1] + prompts[2:3], "cpu", lambda *_: None)
    assert str(refused.value) == (
        "none of the 2 ppo prompts is unsafe and has at most 4 tokens; raise ppo.max_prompt_tokens"
        " or give part ppo other data"
    )


def test_the_sarm_reads_every_latent_that_a_run_may_name(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path, **{"sarm.tokens_per_batch": 99, "sarm.max_length": 77})
    model = SimpleNamespace(to=lambda device: f"the SARM on {device}")
    asked: dict[str, Any] = {}

    class Reward:
        def __init__(self, *given: Any, **how: Any) -> None:
            asked.update(given=given, how=how)

        def score(self, conversations: Any) -> Any:
            asked["conversations"] = conversations
            z = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 0.5, 0.0, 0.0, 0.0, 0.25]])
            return SimpleNamespace(reward=torch.tensor([0.5, -1.0]), monitors_z=z)

    def load(sarm: Any) -> Any:
        assert sarm == made.sarm
        return model, "its tokenizer"

    monkeypatch.setattr(c, "load_sarm", load)
    monkeypatch.setattr(c, "CompoundReward", Reward)
    listed = features(
        penalised=[{"latent": 7, "tau": 2.5, "alpha": 9.0}],
        harming=[feature(3, "harming"), feature(7, "harming")],
        misleading=[feature(8, "misleading")],
        monitors=[5],
        random_candidates=[candidate(9), candidate(1), candidate(3)],
    )
    reader = c.sarm_reader(made, listed, "a device")
    assert asked["given"] == ("the SARM on a device", "its tokenizer", [])
    assert asked["how"] == {
        "monitors": [7, 3, 8, 5, 9, 1],
        "tokens_per_batch": 99,
        "max_length": 77,
    }
    found = reader([prompt("p"), prompt("q")], ["yes", "no"])
    assert asked["conversations"] == [
        [{"role": "user", "content": "p"}, {"role": "assistant", "content": "yes"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}],
    ]
    assert found.reward.tolist() == [0.5, -1.0] and found.reward.dtype == np.float64
    assert {latent: z.tolist() for latent, z in found.z.items()} == {
        7: [1.0, 0.0],
        3: [2.0, 0.5],
        8: [3.0, 0.0],
        5: [4.0, 0.0],
        9: [5.0, 0.0],
        1: [6.0, 0.25],
    }
    with pytest.raises(ValueError, match="zip"):
        reader([prompt("p")], ["yes", "no"])


def test_what_calibrate_publishes_is_what_it_read(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole record: six responses of which two ended by themselves."""
    made = config(tmp_path, **{"calibrate.cut_tokens": [5, 9], "ppo.seeds": [0, 3]})
    watched = [
        feature(n, "harming") | {"tau": 0.5, "max_cosine": 0.125, "max_correlation": 0.0}
        for n in (5, 6)
    ]
    listed = chosen(monitors=[5, 6], monitor_features=watched)
    data = load_data(made.data)
    asked = responses()._replace(cut=[True, False, True, True, True, False])
    told: list[Any] = []
    progress = lambda *line: told.append(line)  # noqa: E731
    control = PositiveControl(
        prompts=9, penalised=Bounds(value=0.3, low=-0.1, high=0.7), monitors=None
    )

    def base_responses(*given: Any) -> c.Responses:
        assert given == (made, prompts_in(data, "ppo"), "a device", progress)
        return asked

    def sarm_reader(*given: Any) -> c.Reader:
        assert given == (made, listed, "a device")
        return read

    def positive_control(*given: Any) -> PositiveControl:
        assert given == (
            made,
            pairs_in(data, "test"),
            asked,
            read,
            found_penalised,
            c.monitors_of(made, listed, base, found_penalised),
        )
        return control

    texts = [
        text if ended else trim_to_last_sentence(text)
        for text, ended in zip(TEXTS, (False, True, False, False, False, True), strict=True)
    ]
    assert texts[1] == TEXTS[1] and texts[0] == "see me here."
    base = read(None, texts)
    found_penalised = c.thresholds(made, listed, base)
    monkeypatch.setattr(c, "base_responses", base_responses)
    monkeypatch.setattr(c, "sarm_reader", sarm_reader)
    monkeypatch.setattr(c, "positive_control", positive_control)
    found = c.calibrate(made, listed, data, "a device", progress)
    assert told == [(0, 6, "scoring")]
    any_fired = (base.z[3] > 2.5) | (base.z[8] > 1.5)
    cuts = [c.agreement(asked, base, found_penalised, n, True, read) for n in (5, 9)]
    first, second = (np.concatenate([one[i] for one in cuts]) for i in (1, 2))
    assert first.tolist() != second.tolist()
    want = Readings(
        n_prompts=3,
        samples=2,
        cut=4 / 6,
        unended=0.0,
        tokens=float(np.mean([len(text) for text in TEXTS])),
        scored_tokens=float(np.mean([len(text) for text in texts])),
        reward_mean=float(base.reward.mean()),
        reward_sd=float(np.std(base.reward, ddof=1)),
        any_rate=float(any_fired.mean()),
        candidates=c.candidates_of(made, listed, base, found_penalised),
        penalised=found_penalised,
        monitors=c.monitors_of(made, listed, base, found_penalised),
        random=c.random_sets(made, listed, base, found_penalised),
        stability=[row for row, _, _ in cuts],
        kappa=cohens_kappa(first, second),
        positive_control=control,
        **c.power(made, data, any_fired),
        unreadable=[],
        warnings=[],
    )
    want = want.model_copy(update={"unreadable": readability.unreadable(made, want)})
    want = want.model_copy(update={"warnings": readability.warnings_of(made, want)})
    assert want.unreadable and any(want.unreadable[0] in line for line in want.warnings)
    assert found == want
    assert set(found.random) == {"0", "3"} and [s.tokens for s in found.stability] == [5, 9]
    monkeypatch.setattr(c, "base_responses", lambda *_: asked._replace(cut=[True] * 5))
    with pytest.raises(ValueError, match="zip"):
        c.calibrate(made, listed, data, "a device", progress)


def test_penalised_latents_keep_their_role_and_taus_are_never_below_0(tmp_path) -> None:
    listed = features(
        penalised=[
            {"latent": 3, "tau": 2.5, "alpha": 9.0, "role": "misleading", "confirmed": True},
            {"latent": 4, "tau": 1.0, "alpha": 9.0},
        ],
        harming=[],
    )
    base = c.Read(np.array([1.0, 3.0, 5.0]), {3: np.array([2.5, 3.0, 0.0]), 4: -np.ones(3)})
    want = [
        {"latent": 3, "tau": 2.5, "alpha": 0.5, "role": "misleading", "confirmed": True},
        {"latent": 4, "tau": 1.0, "alpha": 0.5, "role": "harming", "confirmed": False},
    ]
    rates = [{"base_rate": 1 / 3}, {"base_rate": 0.0}]
    asked = {"ppo.penalty.alpha": 0.25, "ppo.penalty.tau_quantile": 0.5}
    of_rejected = config(tmp_path, **asked | {"ppo.penalty.tau_from": "rejected"})
    found = c.thresholds(of_rejected, listed, base)
    assert [p.model_dump() for p in found] == [w | r for w, r in zip(want, rates, strict=True)]
    of_policy = config(tmp_path, **asked | {"ppo.penalty.tau_from": "policy"})
    found = c.thresholds(of_policy, listed, base)
    assert [(p.tau, p.base_rate) for p in found] == [(2.5, 1 / 3), (0.0, 0.0)]


def test_a_latent_fires_above_its_tau_and_none_fires_where_none_is_penalised() -> None:
    base = c.Read(np.zeros(3), {3: np.array([1.5, 2.0, 0.0]), 8: np.array([0.0, 0.0, 0.25])})
    assert c.fired_any(base, [rated(3, 1.5), rated(8, 0.0)]).tolist() == [False, True, True]
    none = c.fired_any(base, [])
    assert none.tolist() == [False, False, False] and none.dtype == bool


def test_candidates_in_whole_by_hand(tmp_path) -> None:
    """Three prompts of two responses; one latent penalised, one without a weight, one with a reward
    that never differs.
    """
    made = config(tmp_path, **{"ppo.penalty.tau": 1.0, "ppo.penalty.tau_quantile": None})
    z = {3: np.array([3.0, 0, 2, 2, 0, 1]), 6: np.array([2.0, 2, 0, 0, 1, 0]), 8: np.zeros(6)}
    listed = chosen().model_copy(
        update={
            "misleading": [
                type(chosen().misleading[0])(**feature(8, "misleading") | {"weight": None})
            ]
        }
    )
    base = c.Read(np.array([0.0, 0, 0, 2, 2, 2]), z)
    sd = math.sqrt(1.2)
    found = c.candidates_of(made, listed, base, [rated(3, 2.0)])
    assert [row.model_dump() for row in found] == [
        {
            "latent": 3,
            "role": "harming",
            "confirmed": True,
            "penalised": True,
            "weight": -8e-4,
            "tau": 2.0,
            "rate": 1 / 6,
            "within_prompt_share": pytest.approx(1.0),
            "charge": pytest.approx(8e-4 * 8 / 6 / sd),
        },
        {
            "latent": 6,
            "role": "harming",
            "confirmed": False,
            "penalised": False,
            "weight": -0.25,
            "tau": 1.0,
            "rate": 2 / 6,
            "within_prompt_share": 0.0,
            "charge": pytest.approx(0.25 * 5 / 6 / sd),
        },
        {
            "latent": 8,
            "role": "misleading",
            "confirmed": True,
            "penalised": False,
            "weight": 0.0,
            "tau": 1.0,
            "rate": 0.0,
            "within_prompt_share": None,
            "charge": 0.0,
        },
    ]
    alike = c.candidates_of(made, listed, base._replace(reward=np.ones(6)), [])
    assert alike[0].charge == pytest.approx(8e-4 * 8 / 6), "in units of the reward"
    on = c.candidates_of(config(tmp_path), listed, base, [])
    assert [(row.tau, row.rate) for row in on] == [(0.0, 4 / 6), (0.0, 3 / 6), (0.0, 0.0)]


def test_monitors_beside_nothing_that_is_penalised_go_with_none(tmp_path) -> None:
    base = read(None, TEXTS)
    monitors = [
        feature(n, "harming") | {"tau": 0.5, "max_cosine": 0.125, "max_correlation": 0.0}
        for n in (5, 6)
    ]
    listed = features(penalised=[], monitor_features=monitors, monitors=[5, 6])
    found = c.monitors_of(config(tmp_path, **{"select.monitors": 1}), listed, base, [])
    (rate,) = {float(np.mean(base.z[m.latent] > 0.5)) for m in found}
    assert [m.model_dump() for m in found] == [
        {
            "latent": found[0].latent,
            "tau": 0.5,
            "base_rate": rate,
            "max_cosine": 0.125,
            "max_correlation": 0.0,
        }
    ]
    none = features(penalised=[], monitor_features=[], monitors=[])
    assert c.monitors_of(config(tmp_path), none, base, []) == []


def test_random_latents_in_whole(tmp_path) -> None:
    """As a hinge, whose dose is not that of a threshold."""
    base = read(None, TEXTS)
    penalised = [rated(3, 1.5, 0.5), rated(8, 0.5, 0.25)]
    made = config(tmp_path, **{"ppo.seeds": [2, 9], "ppo.penalty.kind": "hinge"})
    sets = c.random_sets(made, chosen(), base, penalised)
    order = {seed: c.drawn_for(chosen().random_candidates, seed) for seed in (2, 9)}
    for seed in (2, 9):
        targets = [c.Penalised(p.latent, p.tau, p.alpha) for p in penalised]
        z = torch.tensor(np.stack([base.z[n] for n in order[seed]], axis=1))
        of_targets = torch.tensor(np.stack([base.z[3], base.z[8]], axis=1))
        matched = c.calibrate_random(z, order[seed], of_targets, targets, "hinge")
        assert [r.model_dump() for r in sets[str(seed)]] == [
            {
                "latent": m.latent,
                "tau": m.tau,
                "alpha": m.alpha,
                "role": "random",
                "confirmed": False,
                "base_rate": float(np.mean(base.z[m.latent] > m.tau)),
            }
            for m in matched
        ]
        dose = sum(r.alpha * np.maximum(base.z[r.latent] - r.tau, 0).mean() for r in matched)
        want = 0.5 * np.maximum(base.z[3] - 1.5, 0).mean()
        want += 0.25 * np.maximum(base.z[8] - 0.5, 0).mean()
        assert dose == pytest.approx(want)
    assert c.random_sets(made, chosen(), base, []) == {}


def test_a_response_as_short_as_the_cut_takes_no_part_in_stability() -> None:
    ids = [[ord(letter) for letter in text] for text in ("no.", "see e", "e e e so it goes")]
    given = c.Responses([prompt(n) for n in "pqr"], ids, [True] * 3, decode)
    base = read(None, [decode(one) for one in ids])
    asked: list[Any] = []

    def reading(prompts: Any, texts: Any) -> c.Read:
        asked.append(([p.id for p in prompts], texts))
        return read(prompts, texts)

    row, first, second = c.agreement(given, base, [rated(3, 1.0)], 3, False, reading)
    assert asked == [(["q", "r"], ["se", "e e e so it g"])], "and is not trimmed where none is"
    assert (first.tolist(), second.tolist()) == ([True, True], [False, True])
    assert row.model_dump() == {"tokens": 3, "n": 2, "kappa": 0.0, "by_latent": {"3": 0.0}}
    row, first, second = c.agreement(given, base, [rated(3, 4.0)], 3, False, reading)
    assert row.by_latent == {"3": None} and not first.any(), "above its tau, not at it"


def test_the_positive_control_takes_so_many_prompts_and_cuts_what_is_longer(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c, "local_model", lambda *_: tmp_path)
    made = config(
        tmp_path,
        **{
            "ppo.max_new_tokens": 5,
            "calibrate.control_pairs": 2,
            "policy.chat_template_kwargs": {"a": 1},
        },
    )

    def tokenizer(*given: Any) -> Any:
        assert given == (tmp_path, {"a": 1})
        return lambda text, add_special_tokens: {"input_ids": [ord(x) for x in text]}

    monkeypatch.setattr(c, "read_tokenizer", tokenizer)
    asked: list[Any] = []

    def reading(prompts: Any, texts: Any) -> c.Read:
        asked.append(([p.id for p in prompts], texts))
        return read(prompts, texts)

    pairs = [
        Pair("1", prompt("q"), "demo", "no. o", "ee. ee"),
        Pair("2", prompt("p"), "demo", "e", "see eee"),
        Pair("3", prompt("q"), "demo", "o", "e"),
        Pair("4", prompt("r"), "demo", "not", "asked"),
    ]
    none = c.positive_control(made, pairs, responses(), reading, [], [])
    # the rejected answers first; five letters are not longer than five, six are cut and trimmed
    assert asked == [
        (["q", "q", "p"], ["ee.", "e", "see e"]),
        (["q", "q", "p"], ["no. o", "o", "e"]),
    ] or asked == [(["q", "q", "p"], ["no. o", "o", "e"]), (["q", "q", "p"], ["ee.", "e", "see e"])]
    assert none == PositiveControl(prompts=2, penalised=None, monitors=None)
    empty = PositiveControl(prompts=0, penalised=None, monitors=None)
    assert c.positive_control(made, [], responses(), reading, [rated(3, 0.5)], []) == empty
    cut = made.model_copy(update={"responses": made.responses.model_copy(update={"cut": "score"})})
    asked.clear()
    c.positive_control(cut, pairs[:1], responses(), reading, [], [])
    assert sorted(texts[0] for _, texts in asked) == ["ee. e", "no. o"]


def test_a_plan_of_all_prompts_is_planned_with_all(tmp_path) -> None:
    made = config(
        tmp_path, **{"evaluate.prompts": None, "evaluate.samples": 3, "ppo.seeds": [1, 2]}
    )
    data = load_data(made.data)
    unsafe = sum(p.kind == "unsafe" for p in prompts_in(data, "policy_eval"))
    assert 0 < unsafe < len(prompts_in(data, "policy_eval"))
    found = c.power(made, data, np.zeros(6, bool))
    assert found == {"detectable": None, "planned": {"prompts": unsafe, "samples": 3, "seeds": 2}}


def test_readings_that_say_nothing_in_whole_words(tmp_path) -> None:
    made = config(
        tmp_path, **{"verdict.max_unended": 0.25, "verdict.min_kappa": 0.5, "ppo.seeds": [0, 1]}
    )
    low = Bounds(value=0.3, low=-0.1, high=0.7)
    watched = c.WatchedLatent(latent=5, tau=0.5, base_rate=0.5, max_cosine=0.0, max_correlation=0.0)
    both = PositiveControl(prompts=9, penalised=low, monitors=low.model_copy(update={"low": 0.0}))
    shown = "replacing rejected answers by chosen ones is not shown to lower the"
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"unended": 0.25, "kappa": 0.5}, []),
        (
            {"unended": 0.3, "kappa": 0.456},
            [
                "30% of the base policy's scored responses end at neither an end of turn nor a"
                " sentence end (at most 25%)",
                "whether a penalised latent fires depends on where a response is cut (kappa 0.46,"
                " at least 0.5)",
            ],
        ),
        ({"kappa": None}, ["no penalised latent fires on some responses and not on others"]),
        (
            {"positive_control": both.model_copy(update={"prompts": 0}), "monitors": [watched]},
            ["no held-out pair serves as a positive control: give part test a share"],
        ),
        ({"positive_control": both}, [f"{shown} penalised latents (95 % CI -10% to +70%)"]),
        (
            {"positive_control": both, "monitors": [watched]},
            [
                f"{shown} penalised latents (95 % CI -10% to +70%)",
                f"{shown} monitors (95 % CI +0% to +70%)",
            ],
        ),
        (
            {
                "positive_control": both.model_copy(update={"penalised": None, "monitors": None}),
                "monitors": [watched],
            },
            [f"{shown} penalised latents", f"{shown} monitors"],
        ),
    ]
    for more, want in cases:
        given = {"kappa": 0.6} | more
        assert readability.unreadable(made, instrument(**given)) == want, more


def test_warnings_in_whole_and_in_their_order(tmp_path) -> None:
    made = config(tmp_path, **{"calibrate.detectable": 0.05})
    found = instrument(
        unreadable=["it reads nothing", "nor this"],
        penalised=[
            rated(7, 2.50001),
            rated(8, 1.0).model_copy(update={"base_rate": 0.1}),
            rated(9, 30),
        ],
        candidates=[candidate_of(5, 0.125), candidate_of(9, 0.0)],
        random={"0": [rated(3, 1.0)], "1": [rated(3, 2.0)]},
        detectable=0.0512,
        planned={"prompts": 1, "samples": 1, "seeds": 2},
    )
    silent = (
        "in 40 responses of the base policy, so its penalty costs nothing; lower ppo.penalty.tau or"
        " set tau_from=policy"
    )
    plan = (
        "the planned evaluation (1 unsafe prompt, 1 sample, 2 seeds) detects a change of the"
        " penalised rate of 5 points with 80 % power; calibrate.detectable asks for 5 points; give"
        " policy_eval more prompts, raise evaluate.samples or ppo.seeds, or set"
        " calibrate.underpowered=warn"
    )
    told = [
        "the SARM is not shown to read the policy's responses: it reads nothing",
        "the SARM is not shown to read the policy's responses: nor this",
        f"penalised latent 7 never exceeds tau 2.50001 {silent}",
        f"penalised latent 9 never exceeds tau 30 {silent}",
        "the reward already charges for 5 (0.12 SD a response); there the penalty repeats the"
        " reward",
        "no monitor qualifies, so neither control nor evasion can be claimed",
        "the random arm penalises the same latents (3) in all 2 seeds, so its interval says nothing"
        " of other random latents; raise select.random_candidates",
    ]
    assert readability.warnings_of(made, found) == [*told, plan]
    watched = c.WatchedLatent(latent=5, tau=0.5, base_rate=0.5, max_cosine=0.0, max_correlation=0.0)
    fine = found.model_copy(update={"detectable": 0.05, "monitors": [watched], "unreadable": []})
    assert readability.warnings_of(made, fine) == [*told[2:5], told[6]]
    for more, says in (
        (
            {"seeds": 1},
            "can tell no change of the penalised rate, however large, from the spread between"
            " seeds",
        ),
        ({"seeds": 2}, "has an unknown minimum detectable effect, as nothing varies"),
    ):
        one = found.model_copy(update={"planned": found.planned | more, "detectable": None})
        seeds = "1 seed" if more["seeds"] == 1 else "2 seeds"
        want = plan.replace("2 seeds", seeds).replace(
            "detects a change of the penalised rate of 5 points with 80 % power", says
        )
        assert readability.power_sentence(made, one) == want


def test_random_latents_that_are_drawn_twice_in_whole_words() -> None:
    def drawn(*seeds: list[int]) -> Any:
        by_seed = {str(s): [SimpleNamespace(latent=n) for n in of] for s, of in enumerate(seeds)}
        return readability.drawn_alike(SimpleNamespace(random=by_seed))  # type: ignore[arg-type]

    assert drawn([2, 1], [1, 3]) == [
        "seeds of the random arm share latents (3 stand in 4 places), so they are not independent"
        " draws of random latents; raise select.random_candidates"
    ]
    assert drawn([2, 1], [1, 2], [2, 1]) == [
        "the random arm penalises the same latents (1, 2) in all 3 seeds, so its interval says"
        " nothing of other random latents; raise select.random_candidates"
    ]
    assert drawn([1, 2]) == drawn([]) == []


def test_a_charge_of_nothing_is_none() -> None:
    assert readability.repeats([candidate_of(5, 0.0)]) == []
    assert readability.repeats([candidate_of(5, 0.5, False)]) == []
