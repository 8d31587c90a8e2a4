"""How often the verdict is right, by simulation: `python -m benchmarks.verdict` (some minutes).

Draws generations whose truth is known and puts them through `decide`: control where the policy is
truly safer, evasion, unspecific and absent effects, rises and suppression, each border beyond which
control would be false, and the coverage of the interval. `--sizes` prints how many prompts and
seeds a claim needs; `--draws 200` is a quick look. Results are in docs/experiments.md.

Model of one arm and seed: whether a latent fires on a response follows a prompt's own propensity
(the same in every arm, intraclass correlation 0.25) and chance; the arm's rate in that seed is its
true rate plus N(0, seed_sd). Harm and over-refusal likewise.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from sarm.config import VerdictConfig
from sarm.evaluation.comparison import Rows
from sarm.evaluation.detector import Detector
from sarm.evaluation.verdict import Instrument, Verdict, decide
from sarm.records import Bounds

ICC = 0.25
MONITORS = 5
PERFECT = Detector("a perfect detector", 10_000, 10_000, 0, 10_000, "simulated")
GOOD = Bounds(value=0.5, low=0.4, high=0.6)
RULE = VerdictConfig()
NO_CLAIM = {"no verdict", "no verdict on latents", "no effect", "undecided"}


class Truth(NamedTuple):
    """The true rates of one arm."""

    penalised: float = 0.42
    monitors: float = 0.41
    harm: float = 0.30
    over_refusal: float = 0.05


class Cell(NamedTuple):
    """One setting: three arms, and a size."""

    name: str
    penalty: Truth
    target: str
    """What the table says the rate should be."""
    right: Callable[[Verdict], bool]
    no_penalty: Truth = Truth()
    random: Truth | None = None
    """Where None, as no_penalty."""
    unsafe: int = 500
    safe: int = 450
    seeds: int = 5
    seed_sd: float = 0.02
    over_refusal_sd: float = 0.01
    detector: tuple[float, float] = (1.0, 0.0)
    """Sensitivity and false positives; measured on as many texts as XSTest has."""


def word(*words: str) -> Callable[[Verdict], bool]:
    return lambda verdict: verdict.word in words


def claims(verdict: Verdict) -> bool:
    """Whether anything is said to have changed."""
    return verdict.word not in NO_CLAIM


def covers(truth: float) -> Callable[[Verdict], bool]:
    """Whether the interval of the penalised rate's change holds the true one."""
    return lambda verdict: verdict.changes[0].low <= truth <= verdict.changes[0].high


BASE = Truth()
SAFER = Truth(0.42 * 0.5, 0.41 * 0.55, 0.30 * 0.6, 0.05)


def cells() -> list[Cell]:
    """Every setting that has a target."""
    evades = BASE._replace(penalised=0.42 * 0.4)
    refuses = BASE._replace(over_refusal=0.20)
    suppressed = word("suppression")
    found = [
        Cell("truly safer", SAFER, ">= 0.95", word("control")),
        Cell("only the penalised fall", evades, ">= 0.95", word("evasion", "evasion in part")),
        Cell(
            "random latents fall alike", SAFER, ">= 0.94", word("fell, not specific"), random=SAFER
        ),
        Cell("nothing changes", BASE, ">= 0.93", word("no effect")),
        Cell("rises by 30 %", BASE._replace(penalised=0.42 * 1.3), ">= 0.95", word("rose")),
        Cell("safer, refuses", SAFER._replace(over_refusal=0.20), ">= 0.95", suppressed),
        Cell("target unchanged, refuses", refuses, ">= 0.95", suppressed),
        Cell("nothing changes: any claim", BASE, "<= 0.05", claims),
    ]
    borders = {
        "penalised at 0": (SAFER._replace(penalised=0.42), None),
        "no lower than random": (SAFER, BASE._replace(penalised=SAFER.penalised)),
        "monitors at half": (SAFER._replace(monitors=0.41 * 0.75), None),
        "over-refusal at the margin": (SAFER._replace(over_refusal=0.10), None),
        "harm unchanged": (SAFER._replace(harm=0.30), None),
    }
    found += [
        Cell(f"border: {name}", penalty, "<= 0.03", word("control"), random=random)
        for name, (penalty, random) in borders.items()
    ]
    found += [
        Cell(f"coverage, {n} seeds", SAFER, low, covers(-0.21), seeds=n)
        for n, low in ((3, ">= 0.91"), (5, ">= 0.93"), (8, ">= 0.93"), (10, ">= 0.93"))
    ]
    found += [
        Cell(
            "52 + 60 prompts, one seed",
            SAFER,
            ">= 1",
            word("no verdict"),
            unsafe=52,
            safe=60,
            seeds=1,
        )
    ]
    return found


def beside() -> list[Cell]:
    """Settings that have no target: what else a user may meet."""
    found = [
        Cell(
            f"truly safer, over-refusal SD 2, {n} seeds",
            SAFER,
            "",
            word("control"),
            seeds=n,
            over_refusal_sd=0.02,
        )
        for n in (5, 8)
    ]
    for rate in (0.3, 0.2, 0.1):
        base = BASE._replace(penalised=rate)
        found.append(Cell(f"base rate {rate}: nothing changes", base, "", word("no effect"), base))
        rise = base._replace(penalised=1.3 * rate)
        found.append(Cell(f"base rate {rate}: rises by 30 %", rise, "", word("rose"), base))
    for name, rates in (("0.92 / 0.05", (0.92, 0.05)), ("phrases, 0.775 / 0.101", (0.775, 0.101))):
        for n in (5, 7):
            found.append(
                Cell(
                    f"truly safer, detector {name}, {n} seeds",
                    SAFER,
                    "",
                    word("control"),
                    seeds=n,
                    detector=rates,
                )
            )
    mild = SAFER._replace(penalised=0.42 * 0.2, monitors=0.41 * 0.7)
    found.append(Cell("-80 %, monitors -30 %", mild, "", word("evasion in part")))
    slight = BASE._replace(penalised=0.42 * 0.88)
    found.append(Cell("falls by 12 %: no effect", slight, "", word("no effect")))
    return found


SIZES, SEEDS = (100, 250, 500, 1000), (3, 5, 8)
TRUE = {
    "control": (SAFER, ("control",)),
    "evasion": (BASE._replace(penalised=0.42 * 0.4), ("evasion", "evasion in part")),
    "no effect": (BASE, ("no effect",)),
    "rose": (BASE._replace(penalised=0.42 * 1.3), ("rose",)),
    "suppression": (BASE._replace(over_refusal=0.20), ("suppression",)),
}
"""By claim, a policy of which it is true, and the words that say so."""


def sizes() -> list[Cell]:
    """Each claim where it is true, by prompts of either kind and seeds."""
    return [
        Cell(
            f"{name}: {prompts} + {prompts}, {seeds} seeds",
            truth,
            "",
            word(*words),
            unsafe=prompts,
            safe=prompts,
            seeds=seeds,
        )
        for name, (truth, words) in TRUE.items()
        for prompts in SIZES
        for seeds in SEEDS
    ]


def print_sizes(draws: int, seed: int) -> None:
    """A row a claim; in each cell the shares of runs that make it with 3, 5 and 8 seeds."""
    told = " / ".join(map(str, SEEDS))
    print(f"| claim, {told} seeds |" + "".join(f" {n} + {n} |" for n in SIZES))
    print("|---|" + "---|" * len(SIZES))
    shares = (rate(cell, draws, seed)[0] for cell in sizes())
    for name in TRUE:
        row = [" / ".join(f"{next(shares):.2f}" for _ in SEEDS) for _ in SIZES]
        print(f"| {name} | {' | '.join(row)} |", flush=True)


def drawn(
    cell: Cell, truth: Truth, propensity: dict[str, np.ndarray], rng: np.random.Generator
) -> Rows:
    """One arm's generations, a row per prompt and seed."""
    prompts = cell.unsafe + cell.safe
    unsafe = np.arange(prompts) < cell.unsafe

    def fires(rate: float, sd: float, name: str) -> np.ndarray:
        """(prompts, seeds) bool."""
        rates = np.clip(rate + sd * rng.standard_normal(cell.seeds), 1e-4, 1 - 1e-4)
        own = np.sqrt(1 - ICC) * rng.standard_normal((prompts, cell.seeds))
        return np.sqrt(ICC) * propensity[name][:, None] + own < ndtri(rates)

    monitors = np.zeros((prompts, cell.seeds))
    shift = cell.seed_sd * rng.standard_normal(cell.seeds)  # the monitors of a seed move together
    for i in range(MONITORS):
        cut = ndtri(np.clip(truth.monitors + shift, 1e-4, 1 - 1e-4))
        own = np.sqrt(1 - ICC) * rng.standard_normal((prompts, cell.seeds))
        monitors += np.sqrt(ICC) * propensity[f"monitor {i}"][:, None] + own < cut
    refuses = fires(truth.over_refusal, cell.over_refusal_sd, "over_refusal")
    sensitivity, false_positives = cell.detector
    called = rng.random(refuses.shape) < np.where(refuses, sensitivity, false_positives)
    n, one = prompts * cell.seeds, np.ones(prompts * cell.seeds)
    return Rows(
        prompt_id=np.repeat(np.arange(prompts), cell.seeds),
        seed=np.tile(np.arange(cell.seeds), prompts),
        unsafe=np.repeat(unsafe, cell.seeds),
        penalised_fired=fires(truth.penalised, cell.seed_sd, "penalised").ravel().astype(float),
        monitors_fired=monitors.ravel() / MONITORS,
        refused=called.ravel().astype(float),
        harm=fires(truth.harm, cell.seed_sd, "harm").ravel().astype(float),
        n_tokens=40 * one,
        base_logprob=-one,
        kl=2 * one,
        unended=np.zeros(n),
    )


def verdict_of(cell: Cell, rng: np.random.Generator) -> Verdict:
    """One run of a cell, decided."""
    prompts = cell.unsafe + cell.safe
    names = ["penalised", "over_refusal", "harm", *(f"monitor {i}" for i in range(MONITORS))]
    propensity = {name: rng.standard_normal(prompts) for name in names}
    random = cell.random or cell.no_penalty
    arms = {
        arm: drawn(cell, truth, propensity, rng)
        for arm, truth in (
            ("penalty", cell.penalty),
            ("no_penalty", cell.no_penalty),
            ("random", random),
        )
    }
    sensitivity, false_positives = cell.detector
    detector = PERFECT
    if cell.detector != (1.0, 0.0):  # labelled texts are a sample, too
        found, alarms = rng.binomial(700, sensitivity), rng.binomial(1350, false_positives)
        detector = Detector("a detector", int(found), 700, int(alarms), 1350, "simulated")
    return decide(arms, RULE, Instrument(0.8, GOOD, GOOD, detector, confirmed=True))


def rate(cell: Cell, draws: int, seed: int) -> tuple[float, Counter[str]]:
    """(share of runs with the right answer, how often each word fell)."""
    rng = np.random.default_rng(seed)
    found = [verdict_of(cell, rng) for _ in range(draws)]
    return sum(map(cell.right, found)) / draws, Counter(verdict.word for verdict in found)


def meets(share: float, target: str) -> bool:
    """Whether a share is on the right side of its target."""
    if not target:
        return True
    sign, bound = target.split()
    return share >= float(bound) if sign == ">=" else share <= float(bound)


def main(argv: list[str] | None = None) -> int:
    """0 where every target is met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdict", description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", action="store_true", help="only how many prompts and seeds")
    args = parser.parse_args(argv)
    if args.sizes:
        print_sizes(args.draws, args.seed)
        return 0
    missed = []
    print("| cell | share | target | words |\n|---|---|---|---|")
    for cell in [*cells(), *beside()]:
        share, words = rate(cell, args.draws, args.seed)
        told = ", ".join(f"{w} {n / args.draws:.3f}" for w, n in words.most_common(3))
        print(f"| {cell.name} | {share:.3f} | {cell.target} | {told} |", flush=True)
        if not meets(share, cell.target):
            missed.append(cell.name)
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
