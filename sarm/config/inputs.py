"""Where models and data come from, and which prompts go to which part of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator

from sarm.config.base import ROOT, Dtype, Fraction, FromList, Positive, Strict, UserError

Part = Literal["sarm_train", "discovery", "validation", "test", "ppo", "policy_eval"]
PARTS: tuple[Part, ...] = ("sarm_train", "discovery", "validation", "test", "ppo", "policy_eval")


class ModelConfig(Strict):
    """Where a model comes from: a folder, a hub id with a pinned revision, or
    `embedded:smollm2`.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "bfloat16"

    def folder(self) -> Path | None:
        """The folder here that it names; None where it is embedded or on the hub. Raises UserError
        where it can be neither.
        """
        if self.model.startswith("embedded:"):
            return None
        folder = ROOT / Path(self.model).expanduser()
        if folder.is_dir():
            return folder
        if self.revision is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.model):
            raise UserError(
                f"model {self.model!r} is no folder here; a hub model needs an id such as"
                " owner/name and a pinned revision in the config"
            )
        return None


class ChatModelConfig(ModelConfig):
    """A model that reads conversations under its tokenizer's chat template."""

    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """What the template is given beside the messages, such as `{enable_thinking: false}`."""


class SarmConfig(ChatModelConfig):
    """The reward model. `use_topk` settles a checkpoint whose config does not say."""

    use_topk: bool | None = None
    tokens_per_batch: Positive = 16384
    """Tokens in one scoring batch; what texts share counts as often as they hold it."""
    max_length: Positive = 4096
    """Longest conversation in tokens; a longer one loses its oldest tokens, and is counted."""


class JudgeConfig(ModelConfig):
    """A sequence classifier of (prompt, response), run locally; every label says what it means."""

    labels: Annotated[dict[str, Literal["harm", "harmless"]], Field(min_length=1)]
    """By each label of the model's id2label."""

    @property
    def positive(self) -> str:
        return "harm"


class RefusalDetectorConfig(ModelConfig):
    """A sequence classifier of (prompt, response), run locally; every label says what it means."""

    labels: Annotated[dict[str, Literal["refusal", "answer"]], Field(min_length=1)]
    """By each label of the model's id2label."""

    @property
    def positive(self) -> str:
        return "refusal"


def _within(file: str) -> str:
    if not re.fullmatch(r"(?!.*(?:^|/)\.\.(?:/|$))[\w.-][\w./-]*", file):
        raise ValueError(f"{file!r} is no path within a repository")
    return file


RepositoryFile = Annotated[str, AfterValidator(_within)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SourceConfig(Strict):
    """One data set and what part of its prompts goes where.

    `split` maps a part to the fraction of this source's prompts; what is left over is unused.
    """

    format: str
    """One of `sarm.data.formats.FORMATS`."""
    label: str
    """The name in report tables, such as `RB2 Safety`."""
    path: str | None = None
    """A file or folder; relative to the checkout."""
    repo: str | None = None
    """A hub data set, used where there is no path; needs `revision` and `files`."""
    revision: str | None = None
    files: Annotated[tuple[str, ...], FromList] = ()
    """The files to read of a hub data set, or of a folder; a folder is read whole where this is
    empty.
    """
    url: str | None = None
    """Where any other repository gives a file of a commit, with `{revision}` and `{file}` in it;
    needs the commit as `revision`, and `sha256`.
    """
    sha256: dict[RepositoryFile, Sha256] = Field(default_factory=dict)
    """The files to read of that repository, by their paths in it, each with its hash."""
    subset: str | None = None
    """Keep only rows of this RewardBench 2 subset, such as `Safety`."""
    kind: Literal["unsafe", "safe"] = "unsafe"
    """What the prompts ask for; `safe` ones are look-alikes that should be answered."""
    split: dict[Part, Fraction]
    limit: Positive | None = None
    """Keep at most this many prompts, those with the smallest hash."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        from sarm.data.formats import FORMATS

        if name not in FORMATS:
            raise ValueError(f"there is no such format; known are {', '.join(sorted(FORMATS))}")
        return name

    @model_validator(mode="after")
    def _one_place_and_a_split(self) -> SourceConfig:
        if [self.path, self.repo, self.url].count(None) != 2:
            raise ValueError("give one of path, repo and url")
        if self.repo is not None and (self.revision is None or not self.files):
            raise ValueError("a hub data set needs a pinned revision and its files")
        if (self.url is None) != (not self.sha256):
            raise ValueError("url and sha256 go together: a hash for each file that is read")
        if self.url is not None:
            self._check_url()
        if self.path is not None and self.revision is not None:
            raise ValueError("revision goes with repo or url; a path has none")
        from sarm.data.formats import FORMATS

        kind = FORMATS[self.format]
        if self.subset is not None and not kind.subsets:
            with_subsets = ", ".join(name for name, one in FORMATS.items() if one.subsets)
            raise ValueError(f"only format {with_subsets} has subsets, not {self.format}")
        if kind.parts is not None and not set(self.split) <= set(kind.parts):
            raise ValueError(f"{self.format} can only go to {' and '.join(kind.parts)}")
        if sum(self.split.values()) > 1 + 1e-9:
            raise ValueError(f"split fractions add up to {sum(self.split.values()):g}, more than 1")
        return self

    def _check_url(self) -> None:
        url = self.url or ""
        if not url.startswith(("https://", "http://")) or "{file}" not in url:
            raise ValueError("url must begin with https:// and have {file} where a path goes")
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision or "") or "{revision}" not in url:
            raise ValueError(
                "url must have {revision} in it, and revision be the 40 digits of a commit: a"
                " branch moves"
            )
        if self.files:
            raise ValueError("sha256 names the files of a url; leave files out")


class DataConfig(Strict):
    """All data of a run. A prompt found in two sources follows the first that lists it."""

    salt: str = "sarm"
    """Changes which prompts fall in which part."""
    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
