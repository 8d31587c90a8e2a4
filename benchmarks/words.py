"""What words alone do with a SARM's own training pairs: `python benchmarks/words.py --config
configs/train-smollm2.yaml [data.sources.rmb.path=...]`.

TF-IDF of words and pairs of words with a Bradley-Terry fit, as `select` fits it to discovery's
pairs, here on every pair that `train_sarm` learns from, with the weights it gives them: whole, cut
short, and set against refusals. Pair accuracy on the pairs that did not train, by source, with a
standard error clustered by prompt: the figures to hold beside the SARM's in its card. `--encoded
RUN` joins the rewards that a run's encode phase published, and prints for the pairs they cover how
far the SARM is ahead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from jobs.train_sarm import by_source, prepare, trains  # noqa: E402
from sarm.config import load_config  # noqa: E402
from sarm.data.datasets import Pair, text_id  # noqa: E402
from sarm.probing.baselines import word_scores  # noqa: E402
from sarm.probing.effects import read_encoded  # noqa: E402
from sarm.run import RunDir  # noqa: E402
from sarm.training.heads import clustered_accuracy, pair_points  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs/train-smollm2.yaml")
    parser.add_argument("--encoded", type=Path)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    material = prepare(load_config(args.config, args.settings))
    learned = [i for i, weight in enumerate(material.weights) if weight > 0]
    pairs = [material.pairs[i] for i in learned]
    numbers = np.unique([pair.prompt.id for pair in pairs], return_inverse=True)[1]
    score = word_scores(pairs, material.weights[learned], numbers)
    chosen, rejected = (
        score([getattr(pair, side) for pair in material.pairs]) for side in ("chosen", "rejected")
    )
    points = pair_points(chosen - rejected)
    print(f"fitted to {len(pairs)} pairs of {len(set(numbers))} prompts")
    for source, found in by_source(material.pairs, points).items():
        print(
            f"{source:28} {found['mean']:.3f} ± {found['standard_error']:.3f} of {found['pairs']}"
            f" pairs, {found['prompts']} prompts"
        )
    if args.encoded is not None:
        print_ahead(args.encoded, material.pairs, points)


def print_ahead(run: Path, pairs: list[Pair], points: np.ndarray) -> None:
    """How far the SARM's accuracy is ahead of the words', by source, on pairs that did not train
    and whose texts the run encoded.
    """
    encoded = read_encoded(RunDir.open(run).read_shards("encode"))
    rewards = {
        id_.rpartition("-")[0]: reward
        for id_, reward in zip(encoded.texts["text_id"], encoded.texts["reward"], strict=True)
    }
    for source in dict.fromkeys(pair.source for pair in pairs):
        rows, margins = [], []
        for i, pair in enumerate(pairs):
            if pair.source != source or trains(pair):
                continue
            chosen, rejected = (
                rewards.get(
                    text_id((*pair.prompt.messages, {"role": "assistant", "content": text}))
                )
                for text in (pair.chosen, pair.rejected)
            )
            if chosen is not None and rejected is not None:
                rows.append(i)
                margins.append(chosen - rejected)
        if rows:
            prompts = [pairs[i].prompt.id for i in rows]
            mine = pair_points(np.array(margins))
            sarm = clustered_accuracy(mine, prompts)
            ahead = clustered_accuracy(mine - points[rows], prompts, (-1.0, 1.0))
            print(
                f"{source:28} SARM {sarm.mean:.3f} ± {sarm.standard_error:.3f}, ahead by"
                f" {ahead.mean:+.3f} ± {ahead.standard_error:.3f} of {ahead.pairs} pairs,"
                f" {ahead.prompts} prompts"
            )


if __name__ == "__main__":
    main()
