"""Write a card for each selected latent: `python -m jobs cards --config C --run R` -> cards.json.

Encode kept every text's ranks; the few texts that are shown are read again, for what the latents do
at every token. Where the config names an endpoint (`cards.label`), it also puts a name to each
latent and scores it; that needs a network, so under Slurm run this phase where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sarm.config import Config, LabelConfig, UserError
from sarm.data.datasets import Text, load_data, texts_to_encode
from sarm.hub import local_model
from sarm.models import read_tokenizer
from sarm.probing.cards import activity, label_rows, latent_cards
from sarm.probing.effects import Encoded, read_encoded
from sarm.probing.siblings import by_direction, by_firing
from sarm.records import Cards, Features
from sarm.reward_model.lens import lens_words
from sarm.reward_model.model import load_sae, load_sarm
from sarm.reward_model.token_activations import TokenActivations, token_activations
from sarm.run import Attempt, RunDir

Reader = Callable[[Sequence[Text], Sequence[int]], list[TokenActivations]]


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Publish the cards. Raises UserError where the endpoint fails: then there are none, and
    running again starts anew.
    """
    selected = attempt.read("select")
    encoded = read_encoded(attempt.read_shards("encode"))
    texts = texts_of(config, encoded)
    found = latent_cards(
        encoded,
        Features.read(selected.path("features.json")),
        pd.read_parquet(selected.path("table.parquet")),
        texts,
        config.cards,
        config.seed,
    )
    add_siblings_and_words(found, encoded, config)
    if found["texts"]:
        read = activations_reader(config)
        add_activations(found, texts, read)
        if config.cards.label is not None:
            add_labels(found, encoded, texts, config, config.cards.label, read, attempt)
    Cards(**found).write(attempt.path("cards.json"))
    attempt.publish(n_cards=len(found["cards"]), n_minimal_edits=found["minimal_edits"]["n"])


def texts_of(config: Config, encoded: Encoded) -> list[Text]:
    """The texts that were encoded, row by row. Raises UserError where the data changed since."""
    by_id = {text.id: text for text in texts_to_encode(load_data(config.data))}
    try:
        return [by_id[id_] for id_ in encoded.texts["text_id"]]
    except KeyError as error:
        raise UserError(
            f"text {error} was encoded and is no longer in the data; run encode again in a new run"
        ) from None


def add_siblings_and_words(found: dict[str, Any], encoded: Encoded, config: Config) -> None:
    """What resembles each latent, and the words of its direction, in place."""
    latents = [card["latent"] for card in found["cards"]]
    sae = load_sae(config.sarm).sae
    directions = sae.directions().detach() if sae.decoder is not None else None
    firing = by_firing(latents, encoded.ranks)
    along = by_direction(latents, directions.numpy()) if directions is not None else {}
    words: list[dict[str, Any]] = []
    found["why_no_words"] = "the SARM's checkpoint has no decoder"
    if directions is not None:
        folder = local_model(config.policy.model, config.policy.revision)
        tokenizer = read_tokenizer(folder, config.policy.chat_template_kwargs)
        words, found["why_no_words"] = lens_words(folder, directions[latents], tokenizer)
        for latent, siblings in firing.items():
            for one in siblings:
                one["cosine"] = float(directions[latent] @ directions[one["latent"]])
    for i, card in enumerate(found["cards"]):
        card["siblings"] = {
            "direction": along.get(card["latent"], []),
            "firing": firing[card["latent"]],
        }
        card["words"] = words[i] if words else None


def activations_reader(config: Config) -> Reader:
    """What reads some latents at every token of some texts; the SARM is opened once."""
    model, tokenizer = load_sarm(config.sarm)

    def read(texts: Sequence[Text], latents: Sequence[int]) -> list[TokenActivations]:
        conversations = [text.messages for text in texts]
        length = config.sarm.max_length
        return token_activations(model, tokenizer, conversations, latents, max_length=length)

    return read


def add_activations(found: dict[str, Any], texts: Sequence[Text], read: Reader) -> None:
    """Every shown text's tokens, and what each card's latent does at them, in place."""
    latents = [card["latent"] for card in found["cards"]]
    rows = sorted(int(row) for row in found["texts"])
    by_row = dict(zip(rows, read([texts[row] for row in rows], latents), strict=True))
    for row, activations in by_row.items():
        found["texts"][str(row)]["tokens"] = activations.tokens
    for i, card in enumerate(found["cards"]):
        for example in (*card["top"], *card["near_misses"], *card["controls"]):
            example |= by_row[example["row"]].of(i)


def add_labels(
    found: dict[str, Any],
    encoded: Encoded,
    texts: Sequence[Text],
    config: Config,
    label: LabelConfig,
    read: Reader,
    attempt: Attempt,
) -> None:
    """Ask for a label of every card, in place."""
    # httpx, for those who want labels
    from sarm.probing.labels import Endpoint, Example, Tokens, labelled

    latents = [card["latent"] for card in found["cards"]]
    active = activity(encoded, latents)
    with Endpoint(label) as endpoint:
        for done, card in enumerate(found["cards"]):
            attempt.progress(done, len(latents), "latents labelled")
            rows = label_rows(
                active[card["latent"]], encoded, config.cards, label.held_out, config.seed
            )
            shown, silent, held_active, held_silent = (
                [
                    Example(texts[row].messages[-2]["content"], texts[row].messages[-1]["content"])
                    for row in kind
                ]
                for kind in rows
            )
            held = read([texts[row] for row in rows.held_active], [card["latent"]])
            tokens = [
                Tokens(one.tokens, np.flatnonzero(one.kept[:, 0] & (one.a[:, 0] > 0)).tolist())
                for one in held
            ]
            card["label"] = labelled(
                endpoint, shown, silent, held_active, held_silent, tokens, config.seed
            )
    found["labels"] = {"endpoint": label.url, "model": label.model}
