"""What a SARM prefers where people said who refused: `python benchmarks/xstest.py --sarm
artifacts/sarm-smollm2 --data data/xstest`.

Of XSTest's completions (`xstest_v2_completions_*.csv`), the first full answer and the first full
refusal to each prompt, models in the order of their files' names, at most `--characters`
long and trimmed to the last sentence. On safe prompts the answer should score higher, on unsafe
ones the refusal. Prints both shares with standard errors (one pair a prompt).
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sarm.config import SarmConfig  # noqa: E402
from sarm.data.endings import trim_to_last_sentence  # noqa: E402
from sarm.data.formats import labelled_answer  # noqa: E402
from sarm.reward_model.model import load_sarm  # noqa: E402
from sarm.reward_model.scoring import encode_texts  # noqa: E402


def paired(data: Path, characters: int) -> list[tuple[str, str, str, str]]:
    """(kind, prompt, answer, refusal) of every prompt that has both."""
    found: dict[tuple[str, str], dict[bool, str]] = defaultdict(dict)
    for file in sorted(data.glob("xstest_v2_completions_*.csv")):
        with file.open(encoding="utf-8", newline="") as opened:
            rows = [labelled_answer(row, file.name) for row in csv.DictReader(opened)]
        for row in rows:
            text = "" if row.partly else row.answer.strip()
            if len(text) > characters:
                text = trim_to_last_sentence(text[:characters])
            if text:
                found[row.kind, row.prompt].setdefault(row.refused, text)
    return [
        (kind, prompt, sides[False], sides[True])
        for (kind, prompt), sides in found.items()
        if len(sides) == 2
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sarm", default="artifacts/sarm-smollm2")
    parser.add_argument("--data", type=Path, default=Path("data/xstest"))
    parser.add_argument("--characters", type=int, default=600)
    args = parser.parse_args()
    pairs = paired(args.data, args.characters)
    if not pairs:
        sys.exit(f"error: {args.data} holds no completions of XSTest; give their folder as --data")
    model, tokenizer = load_sarm(SarmConfig(model=args.sarm, dtype="float32"))
    conversations = [
        ({"role": "user", "content": prompt}, {"role": "assistant", "content": text})
        for _, prompt, *texts in pairs
        for text in texts
    ]
    rewards = encode_texts(
        model, tokenizer, conversations, extra_ranks=0, tokens_per_batch=4096, max_length=1024
    ).rewards
    for kind in ("safe", "unsafe"):
        mine = [i for i, pair in enumerate(pairs) if pair[0] == kind]
        answers, refusals = (rewards[[2 * i + side for i in mine]] for side in (0, 1))
        right = answers > refusals if kind == "safe" else refusals > answers
        share = float(right.double().mean())
        error = math.sqrt(share * (1 - share) / len(mine))
        better = "answer over refusal" if kind == "safe" else "refusal over answer"
        print(
            f"{kind} prompts, {better}: {share:.3f} ± {error:.3f} of {len(mine)}; mean reward of"
            f" answers {float(answers.mean()):.2f}, of refusals {float(refusals.mean()):.2f}"
        )


if __name__ == "__main__":
    main()
