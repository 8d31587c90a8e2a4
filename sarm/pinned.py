"""A run's config with every hub revision at the commit that its fetch wrote down: `pinned(run)`.

A branch such as `main` moves, and another run's fetch moves it in the cache that both share; what
this run has fetched stays what it was. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sarm.config import Config
from sarm.records import Models
from sarm.run import RunDir

Commit = Callable[[tuple[str, str | None]], str | None]
"""Of a repository and its revision; None where it is not known, or no repository of the hub."""


def pinned(run: RunDir) -> Config:
    """The config as a phase is to read it; as it stands where nothing was fetched yet."""
    models = fetched(run)
    return run.config if models is None else at_commits(run.config, commits_in(models).get)


def fetched(run: RunDir) -> Models | None:
    """What fetch wrote down last, of this config or an earlier one; None before that."""
    manifest = run.manifest("fetch")
    if manifest is None or "models.json" not in manifest.outputs:
        return None
    path = run.folder("fetch") / manifest.outputs["models.json"].file
    return Models.read(path) if path.is_file() else None


def commits_in(models: Models) -> dict[tuple[str, str | None], str]:
    """By model or data set of the hub, and its revision in the config."""
    of_models = (models.policy, models.sarm, models.judge, models.refusal_detector)
    found = {(m.model, m.revision): m.commit for m in of_models if m is not None}
    found |= {
        (file.repo, file.revision): file.commit
        for files in models.data.files.values()
        for file in files
        if file.repo is not None
    }
    return {key: commit for key, commit in found.items() if commit is not None}


def at_commits(config: Config, commit: Commit) -> Config:
    """The config with the revision of each hub repository replaced by its commit, where `commit` of
    (repository, revision) knows one.
    """

    def at(section: Any, repo: str | None) -> Any:
        found = commit((repo, section.revision)) if repo is not None else None
        return section if found is None else section.model_copy(update={"revision": found})

    # models first: a gate that is closed shows before data are asked for
    policy, sarm = at(config.policy, config.policy.model), at(config.sarm, config.sarm.model)
    classifiers = {name: at(model, model.model) for name, model in config.classifiers.items()}
    sources = {name: at(source, source.repo) for name, source in config.data.sources.items()}
    return config.model_copy(
        update={
            "policy": policy,
            "sarm": sarm,
            "data": config.data.model_copy(update={"sources": sources}),
            "evaluate": config.evaluate.model_copy(update=classifiers),
        }
    )
