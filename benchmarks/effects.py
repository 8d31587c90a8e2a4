"""What all latents' effects cost on top of scoring the same texts once: `python
benchmarks/effects.py`.

The peer is the scoring itself: `encode_texts` alone against `encode_texts` and then the head-level
and re-selected effects of every latent on two parts, alternating in one run. Permutation tests and
intervals are timed apart. By default the shape of SmolLM2-135M cut at layer 15 with 4,608 latents
and random weights, in bf16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import torch

from sarm.config import SarmConfig, parse_config
from sarm.probing.contrast import Contrast
from sarm.probing.effects import Encoded, latent_effects, latent_table
from sarm.reward_model.interventions import Ranks
from sarm.reward_model.model import SarmModel, load_sarm
from sarm.reward_model.scoring import encode_texts
from sarm.reward_model.weights import SarmModelConfig
from tests.tiny import tiny_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sarm", help="folder of a SARM; default: SmolLM2's shape, random weights")
    parser.add_argument(
        "--prompts",
        type=int,
        default=48,
        help="each with one chosen and one rejected text; half are discovery",
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = (
        load_sarm(SarmConfig(model=args.sarm)) if args.sarm else (random_sarm(), tiny_tokenizer())
    )
    texts, contrasts = conversations(args.prompts)
    weight = model.head_weight.detach().float().cpu().numpy()
    alone, with_effects, effects = [], [], []
    for repeat in range(args.repeats):
        # Alternating which goes first, so that a machine slowing down favours neither.
        for extra_ranks in (0, 16) if repeat % 2 else (16, 0):
            began = time.perf_counter()
            encoded = encode_texts(
                model,
                tokenizer,
                texts,
                extra_ranks=extra_ranks,
                tokens_per_batch=4096,
                max_length=512,
            )
            scored = time.perf_counter()
            if extra_ranks == 0:
                alone.append(scored - began)
                continue
            states, ranks = (
                encoded.states.numpy(),
                Ranks(encoded.indices.numpy(), encoded.values.numpy(), model.k, model.d_sae),
            )
            for contrast in contrasts.values():
                latent_effects(ranks, weight, contrast, 0, model.d_sae)
            ended = time.perf_counter()
            with_effects.append(ended - began)
            effects.append(ended - scored)
    began = time.perf_counter()
    table = latent_table(
        Encoded(pd.DataFrame(), ranks, states, weight), contrasts, 0, model.d_sae, table_config()
    )
    statistics_s = time.perf_counter() - began
    tokens, where = (
        int(encoded.n_tokens.sum()),
        f"{model.device}, {torch.get_num_threads()} threads",
    )
    print(
        f"{len(texts)} texts, {tokens} tokens, {model.d_sae} latents, k {model.k}, {where}, median"
        f" of {args.repeats}"
    )
    print(
        f"scoring alone            {statistics.median(alone):8.3f} s "
        f" {tokens / statistics.median(alone):8.0f} tokens/s"
    )
    print(
        f"scoring and all effects  {statistics.median(with_effects):8.3f} s  of which effects"
        f" {statistics.median(effects):.3f} s"
    )
    print(
        "ratio                   "
        f" {statistics.median(b / a for a, b in zip(alone, with_effects, strict=True)):8.3f} "
        " (goal: at most 1.10)"
    )
    print(
        "ratio from parts        "
        f" {1 + statistics.median(e / a for a, e in zip(alone, effects, strict=True)):8.3f}  (1 +"
        " effects / scoring)"
    )
    print(
        f"table with statistics    {statistics_s:8.3f} s  apart: 20,000 permutations of"
        f" {int(table['tested'].sum())} tested latents, intervals, two parts"
    )


def random_sarm() -> SarmModel:
    """SmolLM2-135M's shape to layer 15, random weights."""
    torch.manual_seed(0)
    llama = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 15,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    model = SarmModel(SarmModelConfig(**llama, d_sae=4608, k=64, use_topk=True)).eval()
    model.model.to(torch.bfloat16)
    torch.nn.init.normal_(model.sae.encoder.weight)
    torch.nn.init.normal_(model.score.weight, std=0.01)
    return model


def conversations(prompts: int) -> tuple[list[list[dict[str, str]]], dict[str, Contrast]]:
    """Texts of 40 to 300 tokens, and the contrasts of discovery and validation."""
    rng = np.random.default_rng(0)
    words = [
        "I",
        "cannot",
        "help",
        "you",
        "because",
        "it",
        "would",
        "harm",
        "someone",
        "please",
        "tell",
        "me",
        "first",
        "take",
        "the",
        "thing",
    ]
    texts = []
    for _ in range(2 * prompts):
        question, answer = (
            " ".join(rng.choice(words, n)) for n in (rng.integers(8, 30), rng.integers(10, 140))
        )
        texts.append(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )
    half, contrasts = prompts // 2, {}
    for part, first, n in (("discovery", 0, half), ("validation", half, prompts - half)):
        rows = np.arange(2 * first, 2 * (first + n))
        contrasts[part] = Contrast(
            rows, np.repeat(np.arange(n), 2), np.tile([1.0, 0.0], n), np.tile([0.0, 1.0], n), n
        )
    return texts, contrasts


def table_config():  # type: ignore[no-untyped-def]
    source = {"format": "jsonl", "label": "none", "path": "none", "split": {"discovery": 1.0}}
    return parse_config(
        {
            "name": "bench",
            "policy": {"model": "none"},
            "sarm": {"model": "none"},
            "data": {"sources": {"none": source}},
        },
        "bench",
    )


if __name__ == "__main__":
    main()
