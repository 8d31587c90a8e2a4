"""The core of all forms of the served reward: requests to conversations, conversations to scores.

    scorer = open_scorer(config, run)        # loads the SARM
    reads = scorer.read(job)                 # as training would render and trim them; or Refused
    answer = scorer.score([(job, reads)])[0] # columns, as OpenRLHF's protocol has them

`python -m pytest tests/serving/test_scorer.py`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from transformers import GenerationConfig

from sarm.config import Config, UserError
from sarm.data.conversations import stop_ids, tokenize_conversations
from sarm.hub import local_model
from sarm.models import read_tokenizer
from sarm.pinned import pinned
from sarm.ppo.penalties import PENALTIES, Penalised
from sarm.ppo.reward import CompoundReward, Message, Scores, scored_conversation
from sarm.records import Features, Readings
from sarm.reward_model.model import load_sarm
from sarm.run import RunDir
from serving.protocol import Refused
from serving.transcripts import Transcripts

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
Answer = dict[str, Any]
"""`rewards` and `scores`, a number a conversation, and `extra_logs`, a list of them a name."""


class Read(NamedTuple):
    """What of a request's conversation the SARM reads."""

    messages: list[Message]
    tokens: int
    ended: bool
    """Whether the text ends at an end of turn or a sentence end."""


class Scorer:
    """A compound reward and the policy whose texts it is asked about.

    `transcripts` is None where the policy's tokenizer is not at hand, and `without` says why.
    """

    def __init__(
        self,
        reward: CompoundReward,
        transcripts: Transcripts | None,
        *,
        without: str = "",
        truncate: bool = False,
    ) -> None:
        if reward.penalised and PENALTIES[reward.kind].needs_rates:
            raise UserError(
                f"a {reward.kind} penalty is a term of a whole training batch, which a server does"
                " not see; serve a threshold or hinge penalty, or serve.arm=no_penalty"
            )
        self.reward, self.transcripts = reward, transcripts
        self.without, self.truncate = without, truncate

    def read(self, job: dict[str, Any]) -> list[Read]:
        """A job's conversations. Raises Refused where one cannot be scored."""
        latents = job.get("latents", ())
        if beyond := [latent for latent in latents if latent >= self.reward.model.d_sae]:
            raise Refused(
                422,
                f"latents {beyond[:5]} are not in this SARM, which has {self.reward.model.d_sae};"
                " ask for those it has",
            )
        said = self._said(job)
        for i, (prompt, _, _) in enumerate(said):
            refuse_control_characters(prompt, f"conversation {i}")
        scored = [
            scored_conversation(prompt, response, ended=ended, trim=self.reward.trim)
            for prompt, response, ended in said
        ]
        try:
            tokenized = tokenize_conversations(
                self.reward.tokenizer, [s.messages for s in scored], self.reward.max_length
            )
        except UserError as error:
            raise Refused(422, str(error)) from None
        long = [i for i, text in enumerate(tokenized) if text.truncated]
        if long and not self.truncate:
            raise Refused(
                413,
                f"conversation {long[0]} has more than {self.reward.max_length} tokens"
                " (sarm.max_length); shorten it, raise that, or serve with"
                " serve.too_long=truncate, which scores it without its oldest tokens",
            )
        return [
            Read(s.messages, len(t.ids), s.ended) for s, t in zip(scored, tokenized, strict=True)
        ]

    def score(self, jobs: Sequence[tuple[dict[str, Any], Sequence[Read]]]) -> list[Answer]:
        """The answers to several jobs, scored together. Raises UserError as `encode_texts`."""
        watched = [latent for job, _ in jobs for latent in job.get("latents", ())]
        reward = self.reward.watching(watched)
        scores = reward.score([read.messages for _, reads in jobs for read in reads])
        answers, at = [], 0
        for job, reads in jobs:
            rows = Scores(*(column[at : at + len(reads)] for column in scores))
            answers.append(self._answer(reward, job, reads, rows))
            at += len(reads)
        return answers

    def _said(self, job: dict[str, Any]) -> list[tuple[Any, Any, bool]]:
        if job["form"] == "items":
            return [(item["prompt"], item["response"], item["ended"]) for item in job["items"]]
        if self.transcripts is None:
            raise Refused(422, f"this server cannot take transcripts apart: {self.without}")
        said = []
        for i, query in enumerate(job["query"]):
            prompt = job["prompts"][i] if job["prompts"] is not None else None
            try:
                said.append(self.transcripts.read(query, prompt))
            except UserError as error:
                raise Refused(422, f"query[{i}] {error}") from None
        return [(s.prompt, s.response, s.ended) for s in said]

    def _answer(
        self, reward: CompoundReward, job: dict[str, Any], reads: Sequence[Read], scores: Scores
    ) -> Answer:
        asked = [*self.reward.monitors, *job.get("latents", ())]
        total = scores.total.tolist()
        columns = {"sarm_reward": scores.reward, "penalty": scores.penalty}
        for i, p in enumerate(reward.penalised):
            columns[f"fired/{p.latent}"] = scores.fired[:, i].float()
            columns[f"z/{p.latent}"] = scores.z[:, i]
        for i, latent in enumerate(reward.monitors):
            if latent in asked and f"z/{latent}" not in columns:
                columns[f"z/{latent}"] = scores.monitors_z[:, i]
        extra = {name: column.tolist() for name, column in columns.items()}
        extra["truncated"] = scores.truncated.float().tolist()
        extra["unended"] = [float(not read.ended) for read in reads]
        return {"rewards": total, "scores": total, "extra_logs": extra}


def refuse_control_characters(prompt: str | Sequence[Message], where: str) -> None:
    """Raises Refused on a prompt that holds one: its data were read wrongly. Responses may: a
    policy samples bytes, and training scores what it says.
    """
    for text in [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]:
        if found := CONTROL.search(text):
            raise Refused(
                422,
                f"the prompt of {where} holds the control character U+{ord(found[0]):04X}; fix the"
                " data that it comes from",
            )


def open_scorer(config: Config, run: str | Path | None) -> Scorer:
    """The configured SARM under a run's penalty, or the config's own. Raises UserError."""
    config = config if run is None else pinned(RunDir(run, config))
    model, tokenizer = load_sarm(config.sarm)
    model.eval()
    reward = CompoundReward(
        model,
        tokenizer,
        penalised_of(config, run),
        kind=config.ppo.penalty.kind,
        clamp=config.ppo.penalty.clamp,
        monitors=monitors_of(config, run),
        tokens_per_batch=config.sarm.tokens_per_batch,
        max_length=config.sarm.max_length,
        trim=config.responses.cut == "trim",
    )
    if config.serve.arm == "no_penalty":
        reward = reward.without_penalty()
    transcripts, without = None, ""
    try:
        transcripts = transcripts_of(config)
    except UserError as error:
        without = str(error)
    return Scorer(
        reward, transcripts, without=without, truncate=config.serve.too_long == "truncate"
    )


def features_of(config: Config, run: str | Path) -> Features:
    """A run's selection, with the thresholds of its calibration where that is done. Raises
    UserError.
    """
    directory = RunDir(run, config)
    features = Features.read(directory.read("select").path("features.json"))
    if directory.manifest("calibrate") is None:
        return features
    readings = Readings.read(directory.read("calibrate").path("readings.json"))
    return readings.applied(features)


def penalised_of(config: Config, run: str | Path | None) -> list[Penalised]:
    if config.serve.penalised or run is None:
        return [Penalised(p.latent, p.tau, p.alpha) for p in config.serve.penalised]
    return [Penalised(p.latent, p.tau, p.alpha) for p in features_of(config, run).penalised]


def monitors_of(config: Config, run: str | Path | None) -> list[int]:
    """A run's monitors and the config's; none that is penalised."""
    own = [] if run is None or config.serve.penalised else features_of(config, run).monitors
    penalised = {p.latent for p in penalised_of(config, run)}
    return [m for m in dict.fromkeys([*own, *config.serve.monitors]) if m not in penalised]


def transcripts_of(config: Config) -> Transcripts:
    """Reads what the config's policy writes. Raises UserError where its tokenizer is not here."""
    folder = local_model(config.policy.model, config.policy.revision)
    tokenizer = read_tokenizer(folder, config.policy.chat_template_kwargs)
    generation = (
        GenerationConfig.from_pretrained(folder)
        if (folder / "generation_config.json").is_file()
        else None
    )
    stops = stop_ids(SimpleNamespace(generation_config=generation), tokenizer)
    return Transcripts(tokenizer, stops)
