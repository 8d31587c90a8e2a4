"""Train a SARM on the policy's model and the `sarm_train` pairs: `python -m jobs train_sarm
--config C --run R`.

Publishes the folder `sarm` (what `sarm.model` in a config may name) and `metrics.json`.
"""

from __future__ import annotations

import itertools
import math
import platform
import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sarm.config import ROOT, Config, UserError
from sarm.data.datasets import Pair, load_data
from sarm.hub import local_model
from sarm.models import read_tokenizer
from sarm.records import TrainedSarm
from sarm.reward_model.model import SarmModel
from sarm.reward_model.sae import TopKSae
from sarm.reward_model.scoring import encode_texts
from sarm.reward_model.weights import read_config
from sarm.run import Attempt, RunDir
from sarm.training.train import (
    Floats,
    Ints,
    Latents,
    Texts,
    clustered_accuracy,
    cross_validated_points,
    differences,
    distinct_texts,
    endless_states,
    fold_accuracy,
    pair_points,
    pair_weights,
    prompt_folds,
    sae_quality,
    token_states,
    train_heads,
    train_sae,
)

JUDGED_TEXTS = 512
"""Conversations whose every token measures the SAE."""


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Collect activations, train the SAE, train the heads, judge them, save."""
    settings, device = config.train_sarm, "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    data = load_data(config.data)
    pairs = [pair for pair in data.pairs if pair.prompt.part is not None]
    trains = np.array([pair.prompt.part == "sarm_train" for pair in pairs])
    if not trains.any():
        raise UserError("no pairs fall in sarm_train; give a data source a sarm_train fraction")

    # 1. The frozen model's first layers.
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
    torch.nn.Module.to(model, device)
    tokenizer = read_tokenizer(folder, config.policy.chat_template_kwargs)

    # 2. The SAE, on the texts of the training pairs.
    chosen = [pair for pair, is_training in zip(pairs, trains.tolist(), strict=True) if is_training]
    states_of = partial(
        token_states,
        model,
        tokenizer,
        config=settings,
        tokens_per_batch=config.sarm.tokens_per_batch,
    )
    training_texts = distinct_texts(chosen)
    states = endless_states(lambda: states_of(training_texts.messages), model.sae.normalise)
    sae = train_sae(
        states,
        model.config.hidden_size,
        settings,
        device=device,
        seed=config.seed,
        progress=lambda i, n: attempt.progress(i, n, "SAE"),
    )
    # Saved in float16; the head is trained on what the saved SAE gives.
    for weight in (sae.encoder.weight, sae.decoder.weight):
        weight.data = weight.data.half().float()
    model.sae.load_state_dict(sae.state_dict())

    # 3. The heads, on the latents of every pair's texts.
    texts = distinct_texts(pairs)
    encoded = encode_texts(
        model,
        tokenizer,
        texts.messages,
        extra_ranks=0,
        tokens_per_batch=config.sarm.tokens_per_batch,
        max_length=settings.max_length,
        progress=lambda i, n: attempt.progress(i, n, "texts"),
    )
    pair_z = differences(
        Latents(encoded.indices.long(), encoded.values.double()), texts, settings.d_sae
    )
    folds = prompt_folds(data, pairs, settings.folds)
    weights = np.zeros(len(pairs))
    weights[trains] = pair_weights(chosen)
    heads = train_heads(
        pair_z, weights, folds, settings, progress=lambda i, n: attempt.progress(i, n, "head")
    )
    model.score.weight.data = torch.from_numpy(heads.shipped.weight).float().unsqueeze(0).to(device)

    # 4. How good it is.
    dense = encoded.states.double()
    dense = (dense - dense.mean(1, keepdim=True)) / dense.std(1, keepdim=True)
    pair_dense = differences(
        Latents(torch.arange(dense.shape[1]).repeat(len(dense), 1), dense), texts, dense.shape[1]
    )
    dense_heads = train_heads(pair_dense, weights, folds, settings)
    metrics = {
        "cross_validated": by_source(
            pairs, cross_validated_points(pair_z, heads, folds.outer), folds.outer
        ),
        "cross_validated_dense": by_source(
            pairs, cross_validated_points(pair_dense, dense_heads, folds.outer), folds.outer
        ),
        "held_out": by_source(pairs, pair_points(pair_z @ heads.shipped.weight)),
        "held_out_dense": by_source(pairs, pair_points(pair_dense @ dense_heads.shipped.weight)),
        "training_loss_cross_validated": heads.shipped.loss,
        "l2": heads.shipped.l2,
        "fold_l2": [head.l2 for head in heads.by_fold],
        "l2_dense": dense_heads.shipped.l2,
        "sae": sae_metrics(model.sae, states_of, pairs, training_texts, config),
        "pairs": Counter(f"{pair.source}/{pair.prompt.part}" for pair in pairs),
        "texts": len(texts.messages),
        "training_tokens": int(
            encoded.n_tokens[
                torch.cat([texts.chosen, texts.rejected])[np.tile(trains, 2)].unique()
            ].sum()
        ),
        "truncated": int(encoded.truncated.sum()),
        "device": (
            torch.cuda.get_device_name()
            if device == "cuda"
            else platform.processor() or platform.machine()
        ),
        "date": datetime.now(UTC).date().isoformat(),
    }

    # 5. Save.
    out = attempt.directory("sarm")
    save_sarm(model, out)
    (out / "README.md").write_text(model_card(config, metrics), encoding="utf-8")
    TrainedSarm(**metrics).write(attempt.path("metrics.json"))
    attempt.publish(device=device)
    print(accuracy_table(config, metrics), flush=True)
    if settings.output is not None:
        replace_folder(out, ROOT / settings.output)


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
            if pair.source == source and (folds is not None or pair.prompt.part != "sarm_train")
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
    sae: TopKSae, states_of: Any, pairs: Sequence[Pair], training: Texts, config: Config
) -> dict[str, dict[str, float]]:
    """The SAE at all tokens of training and of held-out texts, and at the latters' reward
    positions.
    """
    held_out = distinct_texts([pair for pair in pairs if pair.prompt.part != "sarm_train"]).messages
    settings = config.train_sarm
    found = {}
    wanted = (
        ("training_tokens", training.messages, "token"),
        ("held_out_tokens", held_out, "token"),
        ("held_out_reward_positions", held_out, "last"),
    )
    for name, messages, positions in wanted:
        # Spread over the texts, which are ordered by prompt.
        some = messages[:: max(len(messages) // JUDGED_TEXTS, 1)]
        if some:
            states = torch.cat(
                list(
                    itertools.chain(
                        states_of(some, config=settings.model_copy(update={"positions": positions}))
                    )
                )
            )
            found[name] = sae_quality(sae, states)._asdict()
    return found


def save_sarm(model: SarmModel, folder: Path) -> None:
    """The SAE in float16 and the head in float32; the decoder layers stay the backbone's."""
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
    model.save_pretrained(folder, state_dict=halved)


def replace_folder(source: Path, target: Path) -> None:
    """Copy a folder to where a config can name it, in place of what was there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    shutil.copytree(source, scratch)
    if target.exists():
        old = target.with_name(f"{scratch.name}.old")
        target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old)
    else:
        scratch.rename(target)


def accuracy_table(config: Config, metrics: dict[str, Any]) -> str:
    """Pair accuracy by source, as Markdown."""
    lines = [
        (
            f"| source | trained on | {config.train_sarm.folds} prompt folds | dense states | pairs"
            " / prompts | shipped head, held-out prompts | pairs / prompts |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for source, folds in metrics["cross_validated"].items():
        dense, held = metrics["cross_validated_dense"][source], metrics["held_out"].get(source)
        trained = "yes" if metrics["pairs"].get(f"{source}/sarm_train") else "no"
        cells = [
            config.data.sources[source].label,
            trained,
            _figure(folds),
            _figure(dense),
            f"{folds['pairs']:,} / {folds['prompts']:,}",
            _figure(held) if held else "",
            f"{held['pairs']:,} / {held['prompts']:,}" if held else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def model_card(config: Config, metrics: dict[str, Any]) -> str:
    """What was trained on what, how, and how good it is."""
    t = config.train_sarm
    revision = f" at {config.policy.revision}" if config.policy.revision else ""
    trained = ", ".join(
        f"{n:,} of {key.split('/')[0]}"
        for key, n in sorted(metrics["pairs"].items())
        if key.endswith("/sarm_train")
    )
    quality = ((name.replace("_", " "), q) for name, q in metrics["sae"].items())
    rows = [
        f"| {name} | {q['fvu']:.3f} | {q['l0']:.1f} | {q['never_active']:,} | {q['negative']:.2%} |"
        for name, q in quality
    ]
    return f"""# SARM on {config.policy.model}

A sparse autoencoder-enhanced reward model (arXiv 2508.08746): the first {t.layer} decoder layers of the frozen
{config.policy.model}{revision}, a TopK SAE of {t.d_sae:,} latents (k {t.k}) and a linear head.
This folder holds SAE and head; the layers are read from that model.

Command: `python -m jobs train_sarm --config configs/{config.name}.yaml --run RUN`
Seed {config.seed}; {metrics["device"]}; {metrics["date"]}.

## Training
- Pairs of the part `sarm_train`: {trained}.
- SAE: by SAELens on states at positions `{t.positions}`, {t.sae_steps:,} Adam steps of {t.sae_batch:,} states, learning rate
  {t.sae_learning_rate:g}; the training texts hold {metrics["training_tokens"]:,} tokens.
- Head: Bradley-Terry, sources counted alike, L2 strength {metrics["l2"]:g} by cross-validation inside the training
  pairs (in the folds: {", ".join(f"{v:g}" for v in metrics["fold_l2"])}).

## Pair accuracy
Mean ± standard error over prompt folds: a fold is judged by a head that saw none of its prompts, with an L2 strength
chosen without them. "Dense states": a head of the same kind on the states themselves, for what the SAE costs. The
shipped head is judged on the prompts outside `sarm_train`, its standard error clustered by prompt.

{accuracy_table(config, metrics)}

## SAE
| states | FVU | L0 | latents never active there | states with a kept value below zero |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _figure(accuracy: dict[str, Any]) -> str:
    """`0.912 ± 0.013`; of one prompt there is no standard error."""
    error = accuracy["standard_error"]
    return f"{accuracy['mean']:.3f} ± " + (f"{error:.3f}" if math.isfinite(error) else "n/a")
