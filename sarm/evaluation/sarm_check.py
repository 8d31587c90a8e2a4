"""Whether a SARM was opened right: what it does on benchmarks, beside what its card says of it.

    given, missing = samples(config, card)
    found = measure(model, tokenizer, given, config.sarm)
    check = compared(card, facts, found, missing)  # `python -m jobs check_sarm`

A figure is off where it differs from the card's by more than three standard errors of a sample of
its size. Then what is often wrong is tried: another number of BOS tokens, no TopK before the head.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sarm.config import Config, SarmConfig, SourceConfig
from sarm.data.conversations import Tokenized, end_of_turn_id, tokenize_conversations
from sarm.data.datasets import prompt_id, read_source
from sarm.data.files import read_records
from sarm.data.formats import messages_of, texts_of
from sarm.data.sources import source_files
from sarm.evaluation.rewardbench2 import Item, subset_score
from sarm.records import Benchmark, Row, SarmCard, SarmCheck
from sarm.reward_model.scoring import Encoded, encode_texts
from sarm.run import file_sha256

ERRORS = 3.0
"""Standard errors that a figure may be off by."""
FIGURES = {
    "best_of_n": "best of n",
    "pair_accuracy": "pair accuracy",
    "fvu": "FVU",
    "mean_k": "mean k",
    "negative": "kept values below zero",
}
Floats = NDArray[np.float64]


class Sample(NamedTuple):
    """The part of a benchmark that is measured."""

    benchmark: Benchmark
    """Without figures."""
    items: list[Item]


class Found(NamedTuple):
    """What a SARM does on one sample."""

    benchmark: Benchmark
    fvu_error: float
    """Its FVU's standard error; NaN where there is no FVU."""


class Facts(NamedTuple):
    """How a SARM was opened."""

    d_sae: int
    k: int
    layers: int
    dtype: str
    template_sha256: str
    pad_ends_turns: bool
    """Its pad token is the end of a turn."""
    head: Callable[[int], float]


# What there is to measure


def samples(config: Config, card: SarmCard | None) -> tuple[list[Sample], list[str]]:
    """(the card's benchmarks that the data sources hold, the labels of those that they do not);
    without a card every source that has pairs.
    """
    held = [
        sample
        for name, source in config.data.sources.items()
        for sample in _held(name, source, config.check_sarm.prompts)
    ]
    if card is None:
        return held, []
    found, missing = [], []
    for wanted in card.benchmarks:
        mine = next((s for s in held if _is(s.benchmark, wanted)), None)
        if mine is None:
            missing.append(wanted.label)
        else:
            found.append(mine._replace(benchmark=wanted))
    return found, missing


def _is(held: Benchmark, wanted: Benchmark) -> bool:
    return (held.format, held.subset) == (wanted.format, wanted.subset) and (
        wanted.sha256 in (None, held.sha256)
    )


def _held(name: str, source: SourceConfig, most: int | None) -> list[Sample]:
    """Of RewardBench 2 every subset that its files have, whichever the source reads."""
    if source.format == "prompts":
        return []
    files = source_files(name, source)
    sha256 = file_sha256(files[0]) if len(files) == 1 else None
    if source.format == "rewardbench2":
        by_subset: dict[str, list[Item]] = {}
        for file in files:
            for where, record in read_records(file):
                chosen, rejected = (
                    texts_of(record, side, where) for side in ("chosen", "rejected")
                )
                item = Item(
                    str(record.get("id")),
                    messages_of(record, "prompt", where),
                    chosen + rejected,
                    len(chosen),
                )
                by_subset.setdefault(str(record.get("subset")), []).append(item)
        return [
            Sample(
                Benchmark(
                    label=f"RewardBench 2 {subset}",
                    format=source.format,
                    subset=subset,
                    sha256=sha256,
                ),
                _first(items, most),
            )
            for subset, items in by_subset.items()
        ]
    answers: dict[str, tuple[Any, dict[str, None], dict[str, None]]] = {}
    for row in read_source(name, source, Counter()):
        _, right, wrong = answers.setdefault(prompt_id(row.messages), (row.messages, {}, {}))
        right |= dict.fromkeys(row.chosen)
        wrong |= dict.fromkeys(row.rejected)
    items = [
        Item(id_, messages, (*right, *wrong), len(right))
        for id_, (messages, right, wrong) in answers.items()
        if right and wrong
    ]
    benchmark = Benchmark(
        label=source.label, format=source.format, subset=source.subset, sha256=sha256
    )
    return [Sample(benchmark, _first(items, most))] if items else []


def _first(items: list[Item], most: int | None) -> list[Item]:
    """Those with the smallest hash; both items of a question of Ties, or neither."""

    def place(item: Item) -> tuple[str, str]:
        question = item.id.rpartition(":")[2]
        return hashlib.sha256(question.encode()).hexdigest(), item.id

    return sorted(items, key=place)[:most]


# Measuring


def measure(
    model: Any,
    tokenizer: Any,
    given: Sequence[Sample],
    sarm: SarmConfig,
    *,
    bos: int | None = None,
    topk: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Found]:
    """The figures of each sample, by one forward a response. `bos` BOS tokens instead of those
    that a conversation has; without `topk`, rewards by the head on every latent.
    """

    def tokenize(*conversations: Any) -> list[Tokenized]:
        found = tokenize_conversations(*conversations)
        return found if bos is None else [with_bos(t, tokenizer.bos_token_id, bos) for t in found]

    encoded = encode_texts(
        model,
        tokenizer,
        [
            (*item.messages, {"role": "assistant", "content": response})
            for sample in given
            for item in sample.items
            for response in item.responses
        ],
        extra_ranks=0,
        tokens_per_batch=sarm.tokens_per_batch,
        max_length=sarm.max_length,
        progress=progress,
        tokenize=tokenize,
    )
    rewards = encoded.rewards if topk else dense_rewards(model, encoded.states)
    found, start = [], 0
    for sample in given:
        stop = start + sum(len(item.responses) for item in sample.items)
        mine = Encoded(*(part[start:stop] for part in encoded))
        found.append(_figures(model, sample, mine, rewards[start:stop].tolist()))
        start = stop
    return found


def with_bos(text: Tokenized, bos: int, number: int) -> Tokenized:
    """The same text behind so many BOS tokens."""
    own = next((i for i, id_ in enumerate(text.ids) if id_ != bos), len(text.ids))
    ids = [bos] * number + text.ids[own:]
    return text._replace(ids=ids, reward_position=len(ids) - 1)


@torch.no_grad()
def dense_rewards(model: Any, states: torch.Tensor) -> torch.Tensor:
    """(n,) the head on all preactivations, as where no TopK runs."""
    parts = [
        model.sae.preactivations(part.to(model.device)) @ model.head_weight
        for part in states.split(256)
    ]
    return torch.cat(parts).cpu()


def _figures(model: Any, sample: Sample, encoded: Encoded, rewards: list[float]) -> Found:
    left = iter(rewards)
    by_item = [[next(left) for _ in item.responses] for item in sample.items]
    k = model.k
    kept = encoded.values[:, :k]
    subset = sample.benchmark.subset if sample.benchmark.format == "rewardbench2" else None
    error, variance = reconstruction(model.sae, encoded)
    fvu = float(error.sum() / variance.sum()) if len(error) else math.nan
    figures = {
        "prompts": len(sample.items),
        "pair_accuracy": pair_accuracy(sample.items, by_item),
        "best_of_n": math.nan if subset is None else subset_score(subset, sample.items, by_item),
        "fvu": fvu,
        "mean_k": float((kept != 0).sum(1).double().mean()),
        "negative": float((kept < 0).double().mean()),
    }
    plain = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in figures.items()
    }
    spread = (
        float(np.sqrt(((error - fvu * variance) ** 2).sum()) / variance.sum())
        if len(error)
        else math.nan
    )
    return Found(sample.benchmark.model_copy(update=plain), spread)


def pair_accuracy(items: Sequence[Item], rewards: Sequence[Sequence[float]]) -> float:
    """The mean over prompts of how many pairs of a right and a wrong response are in order."""
    shares = []
    for item, given in zip(items, rewards, strict=True):
        pairs = [(c, r) for c in given[: item.right] for r in given[item.right :]]
        shares.append(sum((c > r) + 0.5 * (c == r) for c, r in pairs) / len(pairs))
    return float(np.mean(shares)) if shares else math.nan


@torch.no_grad()
def reconstruction(sae: Any, encoded: Encoded) -> tuple[Floats, Floats]:
    """(squared error of the reconstruction, squared distance to the mean), (n,) each, of the
    normalised states; empty where the SAE has no decoder.
    """
    if sae.decoder is None or not len(encoded.states):
        return np.zeros(0), np.zeros(0)
    device = sae.pre_bias.device
    target = torch.cat([sae.normalise(part.to(device)) for part in encoded.states.split(256)])
    mean, error = target.mean(0), []
    for part in target.split(256):
        a = sae.encoder(part - sae.pre_bias) + sae.latent_bias
        error.append((sae.decode(sae.topk(a)) - part).pow(2).sum(-1))
    variance = (target - mean).pow(2).sum(-1)
    return torch.cat(error).double().cpu().numpy(), variance.double().cpu().numpy()


# Comparing


def compared(
    card: SarmCard, facts: Facts, found: Sequence[Found], missing: Sequence[str]
) -> SarmCheck:
    """The card's figures beside those found."""
    rows = [
        _row(what, published, getattr(facts, what), 0.0)
        for what in ("d_sae", "k", "layers")
        if (published := getattr(card, what)) is not None
    ]
    for latent, written in card.head.items():
        digit = float(Decimal(1).scaleb(Decimal(written).as_tuple().exponent))  # type: ignore[arg-type]
        weight = facts.head(int(latent)) if int(latent) < facts.d_sae else math.nan
        rows.append(_row(f"head weight of {latent}", float(written), weight, 0.5001 * digit))
    by_place = {(b.format, b.subset, b.sha256): b for b in card.benchmarks}
    for one in found:
        mine = one.benchmark
        published = by_place[mine.format, mine.subset, mine.sha256]
        for key, name in FIGURES.items():
            said, value = getattr(published, key), getattr(mine, key)
            if said is not None and value is not None:
                tolerance = tolerances(said, mine.prompts or 1, one.fvu_error)[key]
                rows.append(_row(f"{mine.label}: {name}", said, value, tolerance, mine.prompts))
    if card.overall is not None and (overall := _overall(found)) is not None:
        value, error = overall
        rows.append(_row("RewardBench 2: mean of subsets", card.overall, value, ERRORS * error))
    off = any(row["off"] for row in rows)
    verdict = "nothing to compare" if not rows else "off" if off else "as published"
    values: Row = {"verdict": verdict, "source": card.source, "rows": rows, "missing": [*missing]}
    return SarmCheck(**values)


def tolerances(said: float, prompts: int, fvu_error: float) -> dict[str, float]:
    """How far each kind of figure may lie from what is said of it, measured on so many prompts.

    Of no failures in n, three in n are still possible: a share's error is never less than 1 / n.
    """
    share = ERRORS * max(math.sqrt(max(said * (1 - said), 0.0) / prompts), 1 / prompts)
    return {
        "best_of_n": share,
        "pair_accuracy": share,
        "negative": share,
        "fvu": ERRORS * fvu_error + 0.02 * abs(said),
        "mean_k": 0.005 * said,
    }


def _row(
    what: str, published: float, found: float, tolerance: float, prompts: int | None = None
) -> Row:
    return {
        "what": what,
        "published": published,
        "found": found,
        "tolerance": tolerance,
        "prompts": prompts,
        "off": not abs(found - published) <= tolerance,
    }


def _overall(found: Sequence[Found]) -> tuple[float, float] | None:
    """(the mean of RewardBench 2's six subsets, its standard error), where all are there."""
    scores = [
        (f.benchmark.best_of_n, f.benchmark.prompts or 1)
        for f in found
        if f.benchmark.format == "rewardbench2" and f.benchmark.best_of_n is not None
    ]
    if len(scores) < 6:
        return None
    variances = [max(s * (1 - s), 0.0) / n for s, n in scores]
    return sum(s for s, _ in scores) / len(scores), math.sqrt(sum(variances)) / len(scores)


# Where it is off


def likeliest(
    card: SarmCard, facts: Facts, tried: Mapping[str, Sequence[Found]], check: SarmCheck
) -> list[str]:
    """Causes in words, those first for which something speaks. `tried`: what was found under each
    other way of reading, named so that `with ...` goes on.
    """
    told = []
    for name, said in (("k", card.k), ("d_sae", card.d_sae), ("layers", card.layers)):
        if said is not None and said != getattr(facts, name):
            told.append(
                f"config.json gives {name} {getattr(facts, name)} where the card has {said}"
            )
    for how, found in tried.items():
        again = compared(card, facts, found, ())
        figures = {row["what"] for row in check.rows if row["off"] and row["prompts"]}
        if figures and not any(row["off"] for row in again.rows if row["what"] in figures):
            told.append(f"with {how} these figures are as published")
    if card.template_sha256 is not None and card.template_sha256 != facts.template_sha256:
        told.append("the chat template is another one than the card's")
    if card.dtype is not None and card.dtype != facts.dtype:
        told.append(f"sarm.dtype is {facts.dtype} where the card's figures are of {card.dtype}")
    if facts.pad_ends_turns:
        told.append("its pad token is the end of a turn, at which other code may have pooled")
    rest = {
        "the TopK flag": "TopK",
        "the number of BOS tokens": "BOS",
        "the chat template": "template",
        "pad equal to the end of turn": "pad token",
        "the dtype": "dtype",
    }
    left = [what for what, word in rest.items() if not any(word in line for line in told)]
    return [*told, f"not ruled out: {', '.join(left)}"] if left else told


def other_ways(bos_now: int, has_bos: bool) -> dict[str, dict[str, Any]]:
    """Other ways to read the same texts: arguments of `measure` by what they are."""
    numbers = {0: "no BOS", 1: "one BOS", 2: "two BOS tokens"}
    ways: dict[str, dict[str, Any]] = {"no TopK before the head": {"topk": False}}
    if has_bos:
        ways |= {name: {"bos": n} for n, name in numbers.items() if n != bos_now}
    return ways


def facts_of(model: Any, tokenizer: Any, dtype: str, template: str) -> Facts:
    return Facts(
        model.d_sae,
        model.k,
        model.config.source_layer,
        dtype,
        hashlib.sha256(template.encode()).hexdigest(),
        tokenizer.pad_token_id == end_of_turn_id(tokenizer),
        lambda latent: float(model.head_weight[latent].detach()),
    )
