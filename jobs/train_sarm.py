"""Train a SARM on the policy's model and the `sarm_train` pairs: `python -m jobs train_sarm
--config C --run R`.

Publishes the folder `sarm` (what `sarm.model` in a config may name) and `metrics.json`.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sarm.config import ROOT, Config, UserError
from sarm.data.conversations import tokenize_conversations
from sarm.data.datasets import Pair, load_data
from sarm.evaluation.refusal_classifier import load_classifier
from sarm.hub import local_model
from sarm.models import read_tokenizer
from sarm.records import TrainedSarm
from sarm.reward_model.model import SarmModel
from sarm.reward_model.weights import read_config
from sarm.run import Attempt, RunDir
from sarm.training.card import accuracy_table, model_card
from sarm.training.fit import Fitted, features, fit_heads, fit_layers_and_sae
from sarm.training.heads import clustered_accuracy, fold_accuracy, pair_points
from sarm.training.pairs import (
    Floats,
    Folds,
    Ints,
    Texts,
    cut_pairs,
    distinct_texts,
    pair_weights,
    prompt_folds,
    read_refusals,
    refusal_pairs,
)
from sarm.training.publish import refuse_foreign, replace_folder
from sarm.training.sae import sae_quality, token_states

JUDGED_TEXTS = 512
"""Conversations whose every token measures the SAE."""


class Material(NamedTuple):
    """What is learned from and judged on."""

    pairs: list[Pair]
    texts: Texts
    ids: list[list[int]]
    """Tokens of every text."""
    truncated: int
    weights: Floats
    """(n_pairs,), zero for pairs that only evaluate"""
    folds: Folds


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Make the pairs, fit a SARM to all that train and one to all but each fold's, judge, save."""
    if config.train_sarm.output is not None:
        refuse_foreign(ROOT / config.train_sarm.output, "train_sarm")
    torch.manual_seed(config.seed)
    material = prepare(config)
    model = fresh_model(config)
    fit_one(config, model, material, material.weights, attempt, "all")
    found = features(
        model, material.ids, material.texts, config.train_sarm.d_sae, config.sarm.tokens_per_batch
    )
    shipped = fit_heads(found, material.weights, material.folds.inner, config.train_sarm)
    model.score.weight.data = (
        torch.from_numpy(shipped.head.weight).float().unsqueeze(0).to(model.device)
    )
    by_fold = []
    for fold in range(config.train_sarm.folds):
        weights = np.where(material.folds.outer == fold, 0.0, material.weights)
        if config.train_sarm.backbone_rank:
            other = fresh_model(config)
            fit_one(config, other, material, weights, attempt, f"fold {fold}")
            found = features(
                other,
                material.ids,
                material.texts,
                config.train_sarm.d_sae,
                config.sarm.tokens_per_batch,
            )
        by_fold.append(fit_heads(found, weights, material.folds.inner, config.train_sarm))
        attempt.progress(fold + 1, config.train_sarm.folds, "folds")
    metrics = judge(config, model, material, shipped, by_fold)
    out = attempt.directory("sarm")
    save_sarm(model, out)
    (out / "README.md").write_text(model_card(config, metrics), encoding="utf-8")
    TrainedSarm(**metrics).write(attempt.path("metrics.json"))
    attempt.publish(device=str(model.device))
    print(accuracy_table(config, metrics), flush=True)
    if config.train_sarm.output is not None:
        replace_folder(out, ROOT / config.train_sarm.output, "train_sarm")


def prepare(config: Config) -> Material:
    """The pairs of every source, what is made of them, their texts, tokens, weights and folds.
    Raises UserError where none trains.
    """
    settings, data = config.train_sarm, load_data(config.data)
    folder = local_model(config.policy.model, config.policy.revision)
    tokenizer = read_tokenizer(folder, config.policy.chat_template_kwargs)
    pairs = [pair for pair in data.pairs if pair.prompt.part is not None]
    pairs = kept_from_training(config, pairs)
    if not any(trains(pair) for pair in pairs):
        raise UserError("no pairs fall in sarm_train; give a data source a sarm_train fraction")
    if settings.refusals is not None:
        learned = {pair.source for pair in pairs if trains(pair)}
        pairs += refusal_pairs(
            [pair for pair in pairs if pair.source in learned],
            read_refusals(ROOT / settings.refusals),
            load_classifier().refuses,
        )
    if settings.cut_tokens is not None:
        pairs += cut_pairs(pairs, tokenizer, settings.cut_tokens)
    texts = distinct_texts(pairs)
    tokenized = tokenize_conversations(tokenizer, texts.messages, settings.max_length)
    learning = np.array([trains(pair) for pair in pairs])
    weights = np.zeros(len(pairs))
    weights[learning] = pair_weights([pair for pair in pairs if trains(pair)])
    return Material(
        pairs,
        texts,
        [text.ids for text in tokenized],
        sum(text.truncated for text in tokenized),
        weights,
        prompt_folds(data, pairs, settings.folds),
    )


def kept_from_training(config: Config, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, where prompts that a source without sarm_train holds too have moved to test: a
    source that only evaluates trains nothing, though another lists its prompt first.
    """
    only_judge = {
        name for name, source in config.data.sources.items() if "sarm_train" not in source.split
    }
    judging = {pair.prompt.id for pair in pairs if pair.source in only_judge}
    return [
        pair._replace(prompt=pair.prompt._replace(part="test"))
        if pair.prompt.id in judging and trains(pair)
        else pair
        for pair in pairs
    ]


def trains(pair: Pair) -> bool:
    return pair.prompt.part == "sarm_train"


def fresh_model(config: Config) -> SarmModel:
    """The policy's first layers with an empty SAE, on the GPU where there is one. Raises UserError
    where it has fewer layers.
    """
    settings = config.train_sarm
    folder = local_model(config.policy.model, config.policy.revision)
    if read_config(folder)["num_hidden_layers"] < settings.layer:
        raise UserError(
            f"{folder} has fewer than train_sarm.layer={settings.layer} decoder layers; choose an"
            " earlier one"
        )
    model = SarmModel.from_backbone(
        config.policy.model,
        config.policy.revision,
        source_layer=settings.layer,
        d_sae=settings.d_sae,
        k=settings.k,
        dtype=getattr(torch, config.sarm.dtype),
    )
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model


def fit_one(
    config: Config,
    model: SarmModel,
    material: Material,
    weights: Floats,
    attempt: Attempt,
    what: str,
) -> None:
    fit_layers_and_sae(
        model,
        material.ids,
        material.texts,
        weights,
        config.train_sarm,
        tokens_per_batch=config.sarm.tokens_per_batch,
        seed=config.seed,
        progress=lambda i, n, part: attempt.progress(i, n, f"{part}, {what}"),
    )


def judge(
    config: Config, model: SarmModel, material: Material, shipped: Fitted, by_fold: Sequence[Fitted]
) -> dict[str, Any]:
    """Every figure of the card."""
    outer, rows = material.folds.outer, np.arange(len(material.pairs))
    margins, dense = (
        np.stack([getattr(fitted, side) for fitted in by_fold])[outer, rows]
        for side in ("margins", "dense_margins")
    )
    used = torch.cat([material.texts.chosen, material.texts.rejected])[
        torch.from_numpy(np.tile(material.weights > 0, 2))
    ].unique()
    return {
        "cross_validated": by_source(material.pairs, pair_points(margins), outer),
        "cross_validated_dense": by_source(material.pairs, pair_points(dense), outer),
        "held_out": by_source(material.pairs, pair_points(shipped.margins)),
        "held_out_dense": by_source(material.pairs, pair_points(shipped.dense_margins)),
        "training_loss_cross_validated": shipped.head.loss,
        "l2": shipped.head.l2,
        "fold_l2": [fitted.head.l2 for fitted in by_fold],
        "l2_dense": shipped.dense_head.l2,
        "sae": sae_metrics(config, model, material, used.tolist()),
        "pairs": dict(Counter(f"{pair.source}/{pair.prompt.part}" for pair in material.pairs)),
        "texts": len(material.ids),
        "training_tokens": sum(len(material.ids[row]) for row in used.tolist()),
        "truncated": material.truncated,
        "device": (
            torch.cuda.get_device_name()
            if model.device.type == "cuda"
            else platform.processor() or platform.machine()
        ),
        "date": datetime.now(UTC).date().isoformat(),
    }


def by_source(
    pairs: Sequence[Pair], points: Floats, folds: Ints | None = None
) -> dict[str, dict[str, Any]]:
    """Accuracy of every source: over folds where they are given, otherwise on the pairs that did
    not train.
    """
    found = {}
    for source in dict.fromkeys(pair.source for pair in pairs):
        mine = [
            i
            for i, pair in enumerate(pairs)
            if pair.source == source and (folds is not None or not trains(pair))
        ]
        prompts = [pairs[i].prompt.id for i in mine]
        if mine:
            found[source] = (
                clustered_accuracy(points[mine], prompts)
                if folds is None
                else fold_accuracy(points[mine], folds[mine], prompts)
            )._asdict()
    return found


def sae_metrics(
    config: Config, model: SarmModel, material: Material, training: list[int]
) -> dict[str, dict[str, float]]:
    """The SAE at all tokens of training and of held-out texts, and at the latters' reward
    positions.
    """
    inside = set(training)
    held_out = [row for row in range(len(material.ids)) if row not in inside]
    wanted = (
        ("training_tokens", training, "token"),
        ("held_out_tokens", held_out, "token"),
        ("held_out_reward_positions", held_out, "last"),
    )
    found = {}
    for name, rows, positions in wanted:
        # Spread over the texts, which are ordered by prompt.
        some = [material.ids[row] for row in rows[:: max(len(rows) // JUDGED_TEXTS, 1)]]
        if some:
            states = torch.cat(
                list(token_states(model, some, positions, config.sarm.tokens_per_batch))
            )
            found[name] = sae_quality(model.sae, states)._asdict()
    return found


def save_sarm(model: SarmModel, folder: Path) -> None:
    """The SAE in float16, the head in float32, what was added to the layers in bfloat16; the layers
    stay the backbone's.
    """
    tensors = {
        name: tensor.detach().cpu()
        for name, tensor in model.state_dict().items()
        if not name.startswith("model.")
    }
    halved = {
        name: (
            tensor.half()
            if name in ("sae.encoder.weight", "sae.decoder.weight")
            else tensor.float()
        )
        for name, tensor in tensors.items()
    }
    model.save_pretrained(folder, state_dict=halved | model.adapter)
