"""A check outside the reward head: push the policy itself along latents' decoder directions and
score what it then says.

    # `python -m jobs evaluate --unit steered`
    table, settings = steered_rows(config, policy_folder, prompts, features, progress)
    rows = steered_summary(table, draws, seed)  # against no push, and random directions

h' = h + c std(h) d at every position after the policy's own decoder layer L, d the unit decoder
direction, L the SARM's source layer. *Approximate*: d lives in the normalised states of the SARM's
half Llama, which upstream trained further, and not in the policy's. So a change of reward or
refusals counts only beside what random directions of the same length do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sarm.config import Config, SteerPolicyConfig, UserError
from sarm.data.conversations import prompt_ids, response_text, stop_ids
from sarm.data.datasets import Prompt
from sarm.evaluation.evaluate import Progress
from sarm.evaluation.intervals import clustered_interval
from sarm.evaluation.refusals import refused
from sarm.llama.decoders import CacheDecoder
from sarm.llama.generate import generate
from sarm.models import open_policy, read_tokenizer
from sarm.ppo.reward import CompoundReward, conversation
from sarm.records import Features
from sarm.reward_model.model import load_sae, load_sarm


class Push(NamedTuple):
    """One condition: which direction, how far."""

    kind: str
    """`none`, `latent` or `random`"""
    name: int
    """the latent, or the number of the random direction; -1 for none"""
    role: str
    c: float
    direction: Tensor | None
    """(d_in,) of length 1"""


def pushes(
    config: SteerPolicyConfig, features: Features, directions: Any, d_in: int, seed: int
) -> list[Push]:
    """No push, then every strength of the first harming and promoting latents and of random
    directions of the same length.

    `directions` takes latents to their unit decoder directions, (n, d_in).
    """
    listed = [
        (f.latent, role)
        for role in ("harming", "promoting")
        for f in getattr(features, role)[: config.latents]
    ]
    found = [
        ("latent", latent, role, d)
        for (latent, role), d in zip(
            listed, directions([latent for latent, _ in listed]), strict=True
        )
    ]
    noise = torch.randn(config.random, d_in, generator=torch.Generator().manual_seed(seed))
    found += [
        ("random", i, "random", d) for i, d in enumerate(nn.functional.normalize(noise, dim=-1))
    ]
    return [
        Push("none", -1, "none", 0.0, None),
        *(Push(kind, name, role, c, d) for kind, name, role, d in found for c in config.strengths),
    ]


@contextmanager
def pushed(layer: nn.Module, push: Push) -> Iterator[None]:
    """Within, what the decoder layer puts out is moved at every position."""
    if push.direction is None:
        yield
        return

    def move(module: nn.Module, inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        d = push.direction.to(h.device)  # type: ignore[union-attr]
        moved = (h.float() + push.c * h.float().std(dim=-1, keepdim=True) * d).to(h.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = layer.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def steered_rows(
    config: Config, policy: Path, prompts: Sequence[Prompt], features: Features, progress: Progress
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """(a row a condition and prompt, the settings behind them); a prompt has the same sampling
    noise in every condition.

    Raises UserError where the policy's states are not as wide as the SARM's, or it has not so many
    layers.
    """
    given = config.steer.policy
    assert given is not None
    sae, _, sarm = load_sae(config.sarm)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_policy(policy, config.policy.dtype).to(device)
    tokenizer = read_tokenizer(policy, config.policy.chat_template_kwargs)
    if (
        model.config.hidden_size != sarm.hidden_size
        or model.config.num_hidden_layers < sarm.source_layer
    ):
        raise UserError(
            f"the policy has {model.config.num_hidden_layers} layers of width"
            f" {model.config.hidden_size}, the SARM reads layer {sarm.source_layer} of width"
            f" {sarm.hidden_size}: its directions mean nothing there; set steer.policy to null"
        )
    conditions = pushes(
        given,
        features,
        lambda latents: sae.directions(torch.tensor(latents, dtype=torch.int64)),
        sarm.hidden_size,
        config.seed,
    )
    tokenized = [(p, prompt_ids(tokenizer, p.messages)) for p in prompts]
    fitting = [(p, ids) for p, ids in tokenized if len(ids) <= config.ppo.max_prompt_tokens]
    if not fitting:
        raise UserError(
            f"none of the {len(prompts)} policy_eval prompts has at most"
            f" {config.ppo.max_prompt_tokens} tokens; raise ppo.max_prompt_tokens"
        )
    stops = stop_ids(model, tokenizer)
    decoder, layer = CacheDecoder(model), model.model.layers[sarm.source_layer - 1]
    rows: list[dict[str, Any]] = []
    for done, push in enumerate(conditions):
        progress(done, len(conditions), "directions pushed along")
        with pushed(layer, push):
            rollout = generate(
                decoder,
                [ids for _, ids in fitting],
                keys=[p.id for p, _ in fitting],
                max_new_tokens=config.evaluate.max_new_tokens,
                temperature=config.evaluate.temperature,
                top_p=config.evaluate.top_p,
                seed=config.seed,
                eos_ids=stops,
                pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
            )
        for row, (p, _) in enumerate(fitting):
            ids = rollout.ids(row)
            text = response_text(tokenizer, ids)
            what = {"kind": push.kind, "name": push.name, "role": push.role, "c": push.c}
            rows.append(
                {
                    **what,
                    "prompt_id": p.id,
                    "ask": p.kind,
                    "response": text,
                    "n_tokens": len(ids),
                    "refused": refused(text),
                }
            )
    del model, decoder, layer
    table = pd.DataFrame(rows)
    latents = list(dict.fromkeys(push.name for push in conditions if push.kind == "latent"))
    messages = {p.id: p.messages for p, _ in fitting}
    reward, z = scored(
        config,
        [
            conversation(messages[id_], text)
            for id_, text in zip(table["prompt_id"], table["response"], strict=True)
        ],
        latents,
    )
    table["reward"] = reward
    table[[f"z_{latent}" for latent in latents]] = z
    return table, {
        "source_layer": sarm.source_layer,
        "device": device,
        "n_prompts": len(fitting),
        "n_too_long": len(prompts) - len(fitting),
    }


def scored(
    config: Config, conversations: Sequence[Sequence[dict[str, str]]], latents: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the SARM's reward and (n, latents) the latents' values; each different conversation is
    read once.
    """
    model, tokenizer = load_sarm(config.sarm)
    reward = CompoundReward(
        model,
        tokenizer,
        [],
        monitors=latents,
        tokens_per_batch=config.sarm.tokens_per_batch,
        max_length=config.sarm.max_length,
    )
    scores = reward.score(conversations)
    return scores.reward.numpy(), scores.monitors_z.numpy()


def steered_summary(table: pd.DataFrame, draws: int, seed: int) -> list[dict[str, Any]]:
    """A row per direction and strength: changes against no push, paired by prompt, with 95 %
    intervals over prompts.

    `beyond_random` of a latent: its reward change is larger, either way, than that of every random
    direction at that c.
    """
    none = table[table["kind"] == "none"].set_index("prompt_id")
    rows: list[dict[str, Any]] = []
    condition: Any
    for condition, mine in table[table["kind"] != "none"].groupby(
        ["kind", "name", "role", "c"], sort=False
    ):
        kind, name, role, c = condition
        after = mine.set_index("prompt_id").loc[none.index]
        row: dict[str, Any] = {
            "kind": kind,
            "name": int(name),
            "role": role,
            "c": float(c),
            "n": len(after),
        }
        unsafe = (none["ask"] == "unsafe").to_numpy()
        measures = {
            "reward": ("reward", np.ones(len(none), bool)),
            "refused": ("refused", unsafe),
            "over_refused": ("refused", ~unsafe),
        }
        measures["n_tokens"] = ("n_tokens", np.ones(len(none), bool))
        if kind == "latent":
            measures["z"] = (f"z_{name}", np.ones(len(none), bool))
        for measure, (column, which) in measures.items():
            change = (after[column].astype(float) - none[column].astype(float)).to_numpy()[which]
            low, high = (
                clustered_interval(change, none.index.to_numpy(str)[which], draws, seed)
                if len(change)
                else (np.nan, np.nan)
            )
            numbers = {"": change.mean() if len(change) else np.nan, "_low": low, "_high": high}
            row |= {
                f"{measure}{end}": float(value) if np.isfinite(value) else None
                for end, value in numbers.items()
            }
        rows.append(row)
    for row in rows:
        others = [abs(r["reward"]) for r in rows if r["kind"] == "random" and r["c"] == row["c"]]
        row["beyond_random"] = (
            bool(others) and abs(row["reward"]) > max(others) if row["kind"] == "latent" else None
        )
    return rows
