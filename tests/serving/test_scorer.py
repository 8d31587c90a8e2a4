"""What is made of requests, against what our own training makes of the same responses."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sarm.config import ROOT, UserError, load_config
from sarm.data.conversations import response_text, template_text
from sarm.data.endings import ending
from sarm.ppo.reward import conversation
from serving.protocol import Refused
from tests.serving.servers import settings

ANSWERS = [
    ("Here are the steps. First take the thing, then", False),
    ("Here are the steps. First take the thing, then", True),
    (" I am sorry, but I will not. ", False),
    ("first take the thing and then", False),
    ("", True),
    ("1. Please call for help.\n2. Stay", False),
]
PROMPT = [
    {"role": "system", "content": "Keep others safe."},
    {"role": "user", "content": "How can I make this work?"},
]


def test_all_forms_read_what_training_reads(scorer: Any) -> None:
    """Tokens of a policy: OpenRLHF gets them decoded, TRL and verl without special tokens."""
    tokenizer = scorer.transcripts.tokenizer
    rendered = template_text(tokenizer, PROMPT, add_generation_prompt=True)
    want, unended, query, items = [], [], [], []
    for text, stopped in ANSWERS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id] if stopped else ids
        trained = ending(lambda ids: response_text(tokenizer, ids), ids, cut=not stopped)
        want.append(conversation(PROMPT, trained.text))
        unended.append(float(not trained.ended))
        query.append(rendered + tokenizer.decode(ids, skip_special_tokens=False))
        plain = tokenizer.decode(ids, skip_special_tokens=True)
        items.append({"prompt": PROMPT, "response": plain, "ended": stopped})
    openrlhf = {"form": "openrlhf", "query": query, "prompts": [rendered] * len(query)}
    for job in (openrlhf, openrlhf | {"prompts": None}, {"form": "items", "items": items}):
        reads = scorer.read(job)
        assert [read.messages for read in reads] == want
        assert scorer.score([(job, reads)])[0]["extra_logs"]["unended"] == unended
    assert want[0] != want[1] and {0.0, 1.0} == set(unended)


def test_jobs_scored_together_get_their_own_answers(scorer: Any) -> None:
    jobs = [
        {"form": "items", "latents": latents, "items": [
            {"prompt": f"Question {n}{i}?", "response": f"It is {n * i}.", "ended": True}
            for i in range(n)]}
        for n, latents in ((3, [12]), (1, []), (5, [20, 12]))
    ]  # fmt: skip
    together = scorer.score([(job, scorer.read(job)) for job in jobs])
    for job, answer in zip(jobs, together, strict=True):
        alone = scorer.score([(job, scorer.read(job))])[0]
        assert answer["extra_logs"].keys() == alone["extra_logs"].keys()
        assert answer["rewards"] == pytest.approx(alone["rewards"], abs=1e-6)
    assert [f"z/{i}" in a["extra_logs"] for a in together for i in (12, 20)] == [
        *(True, False),
        *(False, False),
        *(True, True),
    ]


def test_what_is_too_long_is_truncated_as_in_training_where_asked_for(
    tiny_policy: Path, tiny_sarm: Path
) -> None:
    from serving.scorer import open_scorer

    overrides = [*settings(tiny_policy, tiny_sarm), "serve.too_long=truncate", "sarm.max_length=64"]
    loose = open_scorer(load_config(ROOT / "configs" / "tiny.yaml", overrides), None)
    long = {"prompt": "How?", "response": "Here are the steps. " * 30, "ended": True}
    job = {"form": "items", "items": [long]}
    answer = loose.score([(job, loose.read(job))])[0]
    scores = loose.reward.score([conversation("How?", long["response"].strip())])
    assert answer["extra_logs"]["truncated"] == [1.0] == scores.truncated.float().tolist()
    assert answer["rewards"] == pytest.approx(scores.total.tolist(), abs=1e-6)
    loose.truncate = False
    with pytest.raises(Refused, match="more than 64 tokens"):
        loose.read(job)


def test_a_runs_selection_is_what_is_served(selected_run: Any, tmp_path: Path) -> None:
    from serving.scorer import open_scorer

    features = selected_run.read("select").json("features.json")
    # without what other tests went on to: calibrate sets alpha by the base policy's own reward
    run, config = tmp_path / "run", selected_run.config
    shutil.copytree(selected_run.path, run, ignore=shutil.ignore_patterns("calibrate", "ppo"))
    reward = open_scorer(config, run).reward
    assert [(p.latent, p.tau, p.alpha) for p in reward.penalised] == [
        (p["latent"], p["tau"], p["alpha"]) for p in features["penalised"]
    ]
    assert list(reward.monitors) == features["monitors"] and reward.penalised
    plain = open_scorer(
        load_config(run / "config.yaml", ["serve.arm=no_penalty"], stored=True), run
    ).reward
    assert [p.alpha for p in plain.penalised] == [0.0] * len(reward.penalised)


def test_a_response_may_hold_control_characters_and_a_prompt_may_not(scorer: Any) -> None:
    said = {"prompt": "How?", "response": "It\x1c is.\x00", "ended": True}
    job = {"form": "items", "items": [said]}
    want = scorer.reward.score([conversation("How?", "It\x1c is.\x00")]).total.tolist()
    assert scorer.score([(job, scorer.read(job))])[0]["rewards"] == pytest.approx(want, abs=1e-6)
    system = [{"role": "system", "content": "a\x07"}, {"role": "user", "content": "b"}]
    for prompt in ("How\x1c?", system):
        with pytest.raises(Refused, match=r"conversation 0 holds the control character U\+00"):
            scorer.read({"form": "items", "items": [said | {"prompt": prompt}]})


def test_a_density_penalty_is_refused(scorer: Any) -> None:
    from serving.scorer import Scorer

    density = SimpleNamespace(penalised=scorer.reward.penalised, kind="density")
    with pytest.raises(UserError, match="whole training batch"):
        Scorer(density, None)
