"""Write a run's SARM and latents for other tools: `make export RUN=...`, or `python -m jobs export
--run R`.

Publishes saelens/ (SAELens' files, and the head beside them), delphi/ (its latent cache),
neuronpedia/ (SAEDashboard's JSON of the latents that have a card, where cards is done),
steering.json (upstream's format) and differences.json: what SAELens will read otherwise in this
run's texts. Needs encode and select, and no GPU.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch

from sarm.config import Config, UserError
from sarm.data.conversations import tokenize_conversations
from sarm.data.datasets import load_data, texts_to_encode
from sarm.probing.effects import read_encoded
from sarm.records import Cards, Differences, Features, json_text
from sarm.reward_model.adapter import is_adapted
from sarm.reward_model.delphi import reward_windows, write_cache
from sarm.reward_model.model import load_sae, load_tokenizer
from sarm.reward_model.neuronpedia import dashboard_batch
from sarm.reward_model.sae import SaelensDifference, saelens_difference, to_saelens
from sarm.reward_model.weights import open_folder
from sarm.run import Attempt, RunDir

COMPARED_TEXTS = 256
WINDOW_TOKENS = 128
"""Of a text, as delphi shows it: those that end at the reward position."""
DELPHI_SHARDS = 8


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Export; what SAELens cannot say as a SARM means it is warned of, with its size."""
    features = Features.read(attempt.read("select").path("features.json"))
    encoded = read_encoded(attempt.read_shards("encode"))
    sae, head_weight, settings = load_sae(config.sarm)
    opened = open_folder(config.sarm.model, config.sarm.revision, use_topk=config.sarm.use_topk)
    layer = settings.source_layer
    backbone = settings.backbone["model"] if settings.backbone else config.sarm.model
    to_saelens(
        sae,
        attempt.directory("saelens"),
        model_name=backbone,
        source_layer=layer,
        head_weight=head_weight,
        metadata={
            "context_size": config.sarm.max_length,
            "neuronpedia_id": None,
            "sarm": config.sarm.model,
            "sarm_revision": config.sarm.revision,
        },
    )
    some = np.unique(np.linspace(0, len(encoded.states) - 1, COMPARED_TEXTS).astype(int))
    difference = saelens_difference(sae, head_weight, torch.from_numpy(encoded.states[some]))
    warnings = difference_warnings(
        difference,
        backbone,
        own_layers=settings.backbone is None,
        adapted_by=config.sarm.model if is_adapted(opened) else None,
    )
    tokenizer = load_tokenizer(config.sarm)
    texts = {text.id: text for text in texts_to_encode(load_data(config.data))}
    gone = [id_ for id_ in encoded.texts["text_id"] if id_ not in texts]
    if gone:
        raise UserError(
            f"{len(gone)} encoded texts, such as {gone[0]}, are no longer in the data; bring the"
            " data back as they were, or run encode again in a new run"
        )
    tokenized = tokenize_conversations(
        tokenizer, [texts[id_].messages for id_ in encoded.texts["text_id"]], config.sarm.max_length
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    windows = reward_windows([t.ids for t in tokenized], WINDOW_TOKENS, int(pad or 0))
    write_cache(
        attempt.directory("delphi"),
        encoded.ranks,
        windows,
        hookpoint=f"layers.{layer - 1}",
        model_name=backbone,
        shards=DELPHI_SHARDS,
    )
    folders = ["saelens", "delphi"]
    if run.done("cards"):
        cards = Cards.read(attempt.read("cards").path("cards.json")).tree()
        batch = dashboard_batch(cards, model_id=backbone, layer=layer - 1, sae_set=config.name)
        target = attempt.directory("neuronpedia") / "batch-0.json"
        target.write_text(json_text(batch, indent=None), encoding="utf-8")
        folders.append("neuronpedia")
    else:
        attempt.note_missing("cards", "all")  # so that it is done again once there are cards
        print("note: cards is not done, so there is no neuronpedia/", file=sys.stderr)
    attempt.path("steering.json").write_text(json.dumps(features.steering_file), encoding="utf-8")
    Differences(
        saelens=difference._asdict(), warnings=warnings, delphi_example_ctx_len=WINDOW_TOKENS
    ).write(attempt.path("differences.json"))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    published = attempt.publish()
    for folder in folders:
        print(published.directory(folder))


def difference_warnings(
    difference: SaelensDifference, backbone: str, *, own_layers: bool, adapted_by: str | None = None
) -> list[str]:
    """What a reader of the export has to know, in sentences; `adapted_by` is the SARM whose own
    low-rank updates `backbone`'s layers lack.
    """
    warnings = []
    if difference.rows_with_negative_latent:
        warnings.append(
            f"SAELens sets latents below zero to zero, and {difference.rows_with_negative_latent}"
            f" of {difference.n} texts keep one: there its activations are not the SARM's (rewards"
            f" differ by up to {difference.largest_reward:.3g})"
        )
    if difference.reselected:
        warnings.append(
            "SAELens normalises with another epsilon and keeps other latents in"
            f" {difference.reselected} places of {difference.n} texts"
        )
    if own_layers:
        warnings.append(
            f"the activations are those of {backbone}'s own layers, which were trained further:"
            " hook these and not the stock model's"
        )
    if adapted_by is not None:
        warnings.append(
            f"the activations are those of {backbone}'s layers with the adapter of {adapted_by}"
            " merged in, and cfg.json can name the bare layers alone, on which the latents mean"
            " something else: hook the merged ones"
            f" (sarm.reward_model.model.SarmModel.from_pretrained({adapted_by!r}).model)"
        )
    if backbone.startswith("embedded:"):
        warnings.append(
            f"cfg.json names {backbone}, which no hub has: give the model to SAELens by hand"
        )
    return warnings
