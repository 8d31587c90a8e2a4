"""A run's latents in the JSON that SAEDashboard writes and Neuronpedia imports:
`dashboard_batch(cards, model_id=..., layer=..., sae_set=...)`.

As `NeuronpediaDashboardBatch` of sae-dashboard 0.8.0 reads it
(https://github.com/jbloomAus/SAEDashboard, sae_dashboard/neuronpedia/neuronpedia_dashboard.py).
Values by token are those after TopK, which dashboards take to be at least 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from sarm.reward_model.token_activations import WINDOW

TOP = -1.0
"""What bin_min and bin_contains of the top activations are."""


def dashboard_batch(
    cards: Mapping[str, Any], *, model_id: str, layer: int, sae_set: str
) -> dict[str, Any]:
    """`cards` is cards.json; `layer` counts from 0."""
    return {
        "model_id": model_id,
        "layer": layer,
        "sae_set": sae_set,
        "sae_id_suffix": None,
        "features": [_feature(card, cards) for card in cards["cards"]],
    }


def _feature(card: Mapping[str, Any], cards: Mapping[str, Any]) -> dict[str, Any]:
    edges = card["histogram"]["edges"]
    words = card["words"] or {"up": [], "down": []}
    # Read by place in all three lists: of a SARM without directions there is no cosine, and none.
    firing = [one for one in card["siblings"].get("firing", []) if "cosine" in one]
    return {
        "feature_index": card["latent"],
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [one["latent"] for one in firing],
        # SAEDashboard keeps the cosine of the directions under this name
        "correlated_features_l1": [round(one["cosine"], 3) for one in firing],
        "correlated_features_pearson": [round(one["phi"], 3) for one in firing],
        "neg_str": [word["word"] for word in words["down"]],
        "neg_values": [round(word["logit"], 3) for word in words["down"]],
        "pos_str": [word["word"] for word in words["up"]],
        "pos_values": [round(word["logit"], 3) for word in words["up"]],
        "frac_nonzero": card["density"]["all"] or 0.0,
        "freq_hist_data_bar_values": [
            round((low + high) / 2, 3) for low, high in itertools.pairwise(edges)
        ],
        "freq_hist_data_bar_heights": [
            float(chosen + rejected)
            for chosen, rejected in zip(
                card["histogram"]["chosen"], card["histogram"]["rejected"], strict=True
            )
        ],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "n_prompts_total": cards["n_texts"],
        "n_tokens_in_prompt": WINDOW,
        "dataset": "",
        "decoder_weights_dist": [],
        "activations": [
            *(_activation(e, cards, TOP, card["top"][0]["z"], TOP) for e in card["top"]),
            *(
                _activation(e, cards, 0.0, 0.0, 1.0 - (card["density"]["all"] or 0.0))
                for e in (*card["near_misses"], *card["controls"])
            ),
        ],
        "vector": [],
    }


def _activation(
    example: Mapping[str, Any],
    cards: Mapping[str, Any],
    bin_min: float,
    bin_max: float,
    bin_contains: float,
) -> dict[str, Any]:
    """One text; the reward position, its last token, is the one that it was chosen for."""
    kept = set(example["kept"])
    values = [max(0.0, a) if i in kept else 0.0 for i, a in enumerate(example["a"])]
    return {
        "bin_min": bin_min,
        "bin_max": round(bin_max, 3),
        "bin_contains": round(bin_contains, 3),
        "qualifying_token_index": len(values) - 1,
        "tokens": cards["texts"][str(example["row"])]["tokens"],
        "values": [round(value, 3) for value in values],
    }
