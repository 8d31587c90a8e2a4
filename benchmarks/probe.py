"""The two heavy parts of the probe on one GPU: `python benchmarks/probe.py [--d-sae 65536 --texts
256 --prompts 450]`.

Direction: every latent's direction added to every text's state, everything after it computed again,
against the peer that does it latent by latent in TF32 (add, normalise, encode, TopK, head), timed
on a few latents. Results are compared with a float64 recomputation from the states. Permutations:
labels permuted within prompts, counted for every latent without early stopping, against the CPU's
sparse product on a share of the latents and permutations, whose p must be the same. Random weights
of the reference SARM's shape; without a GPU give smaller sizes.

`python benchmarks/probe.py --table [--before FOLDER]` times instead what the probe phase does with
every latent but moving along its direction, with early stopping: the table of effects, intervals
and p of discovery and validation, and of two sources of discovery. FOLDER holds another checkout
(`git archive COMMIT | tar -x -C FOLDER`), which does the same in turns, as it would do it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import scipy.sparse
import torch

from sarm.probing import direction, permutation
from sarm.probing.contrast import Contrast
from sarm.probing.permutation import permutation_p
from sarm.reward_model.sae import TopKSae

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(__file__).resolve().parent.parent

TABLE = """
import sys, time
from types import SimpleNamespace as Settings
import numpy as np
import pandas as pd
import torch
from sarm.probing import effects

d_sae, prompts, k = map(int, sys.argv[1:])
device = "cuda" if torch.cuda.is_available() else "cpu"
config = Settings(
    seed=0, probe=Settings(permutations=20_000, bootstrap=1000, min_prompts_active=10),
    select=Settings(effect="head", fdr=0.1, max_density=0.5),
)
spent = []

def synchronized():
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

def timed(*args, **more):
    began = synchronized()
    p = permutation_p(*args, **more)
    spent.append(synchronized() - began)
    return p

permutation_p, effects.permutation_p = effects.permutation_p, timed

def contrast_of(parts, sizes):
    rows = np.concatenate([np.arange(part * sizes, (part + 1) * sizes) for part in parts])
    number, chosen = np.repeat(np.arange(len(rows) // responses), responses), first[rows]
    return effects.Contrast(
        rows, number, chosen, (1 - chosen) / (responses - 1), len(rows) // responses
    )

for responses in (2, 4):
    n = 2 * prompts * responses
    first = (np.arange(n) % responses == 0).astype(float)
    generator = torch.Generator(device).manual_seed(0)
    # How often latents fire differs by orders of magnitude; one in thirty fires on one side more.
    often = 2.0 * torch.randn(d_sae, generator=generator, device=device)
    side = (torch.rand(d_sae, generator=generator, device=device) < 1 / 30).float()
    kept = []
    for start in range(0, n, 64):
        some = torch.from_numpy(first[start : start + 64]).to(device, torch.float32)[:, None]
        noise = torch.empty(len(some), d_sae, device=device).exponential_(generator=generator)
        kept.append((often + side * some - noise.log()).topk(k + 1).indices.int().cpu())
    indices = torch.cat(kept).numpy()
    rng = np.random.default_rng(0)
    values = np.sort(rng.exponential(size=indices.shape), axis=1)[:, ::-1].astype(np.float32)
    encoded = effects.Encoded(
        pd.DataFrame(), effects.Ranks(indices, np.ascontiguousarray(values), k, d_sae),
        np.zeros((n, 1), np.float32), rng.normal(size=d_sae).astype(np.float32),
    )
    half = n // 2
    one = {"discovery": contrast_of([0], half), "validation": contrast_of([1], half)}
    quarter = half // responses // 2 * responses
    two = one | {"first": contrast_of([0], quarter), "second": contrast_of([1], quarter)}
    for name, contrasts in {"one source": one, "two sources": two}.items():
        if name == "two sources" and "first" not in getattr(effects, "PARTS", ()):
            continue
        effects.latent_table(encoded, contrasts, 0, min(64, d_sae), config, device)
        spent.clear()
        began = synchronized()
        table = effects.latent_table(encoded, contrasts, 0, d_sae, config, device)
        took = synchronized() - began
        print(
            f"1 against {responses - 1}, {name}: table {took:.2f} s, of which permutations"
            f" {sum(spent):.2f}; {int(table['tested'].sum())} latents tested,"
            f" {int((table['p'] < 1e-4).sum())} with p < 1e-4"
        )
"""
"""Run in a checkout of its own, whose modules it imports: arguments d_sae, prompts, k."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--k", type=int, default=192)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=450)
    parser.add_argument("--permutations", type=int, default=1_000_000)
    parser.add_argument("--c", type=float, nargs="+", default=[3.0, -3.0])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, torch {torch.__version__}"
    )
    if args.table:
        tables(args.d_sae, args.prompts, args.k, args.before, args.rounds)
        return
    directions(args.d_sae, args.d_in, args.k, args.texts, args.c)
    for responses in (2, 4):
        permutations(args.d_sae, args.prompts, responses, args.permutations)


def timed(work: Callable[[], object]) -> float:
    """Seconds of the second of two calls, the first of which compiles."""
    for _ in range(2):
        _sync()
        began = time.perf_counter()
        work()
        _sync()
    return time.perf_counter() - began


def _sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def random_sae(d_sae: int, d_in: int, k: int) -> tuple[TopKSae, torch.Tensor]:
    """An SAE in float64 whose encoder reads its unit decoder directions, and a head."""
    torch.manual_seed(0)
    with torch.device("meta"):
        sae = TopKSae(d_in, d_sae, k)
    sae = sae.double().to_empty(device=DEVICE)
    with torch.no_grad():
        sae.encoder.weight.copy_(
            torch.nn.functional.normalize(torch.randn(d_sae, d_in, device=DEVICE), dim=1)
        )
        sae.decoder.weight.copy_(
            sae.encoder.weight.T + 0.1 / d_in**0.5 * torch.randn(d_in, d_sae, device=DEVICE)
        )
        sae.pre_bias.copy_(0.1 * torch.randn(d_in, device=DEVICE))
        sae.latent_bias.copy_(0.1 * torch.randn(d_sae, device=DEVICE))
    return sae, 0.01 * torch.randn(d_sae, device=DEVICE, dtype=torch.float64)


def directions(d_sae: int, d_in: int, k: int, n: int, cs: list[float]) -> None:
    sae, weight = random_sae(d_sae, d_in, k)
    states = (3 * torch.randn(n, d_in, device=DEVICE) + 0.2).double()
    base = direction.baseline(sae, weight, states, k)
    rows = direction.tile_rows(base)
    list(direction.direction_changes(base, sae, range(min(rows, d_sae)), cs))
    g_s = timed(lambda: [None for _ in direction.tiles(base, sae, range(d_sae), rows)])
    _sync()
    began = time.perf_counter()
    found = list(direction.direction_changes(base, sae, range(d_sae), cs))
    _sync()
    all_s = time.perf_counter() - began
    flop = 2 * d_sae * d_sae * d_in
    print(
        f"\ndirection: {d_sae} latents x {n} texts, k {k}, d_in {d_in}, {base.candidates.shape[1]}"
        f" candidates, tiles of {rows} latents"
    )
    print(
        f"G = W D, for all c together      {g_s:8.3f} s   {flop / g_s / 1e12:8.1f} TFLOP/s float64"
    )
    print(
        f"all of c = {', '.join(f'{c:g}' for c in cs):<22} {all_s:8.3f} s  "
        f" {(all_s - g_s) / len(cs):8.3f} s per further c"
    )
    one_s = g_s + (all_s - g_s) / len(cs)
    print(
        f"one c with its own G             {one_s:8.3f} s   {d_sae * n / one_s / 1e6:8.1f} million"
        " texts x latents a second"
    )
    each = latent_by_latent(sae.float(), weight.float(), states.float(), k, cs[0])
    print(
        f"latent by latent in TF32         {each * d_sae:8.1f} s   from 64 latents; ratio"
        f" {each * d_sae / one_s:.1f}"
    )
    some = [int(i) for i in torch.linspace(0, d_sae - 1, 48)]
    sae, weight = random_sae(d_sae, d_in, k)
    print("      c  largest effect  mean swapped sorted out   checked  worst / largest  mismatches")
    for c in cs:
        change, swapped = (
            torch.cat([getattr(m[c], name) for m in found]) for name in ("change", "swapped")
        )
        sorted_out = sum(m[c].sorted_out for m in found)
        off = direction.check(sae, base, states, change[some], some, c)
        print(
            f"{c:7g} {float(change.abs().max()):15.4f} {float(swapped.double().mean()):13.2f}"
            f" {sorted_out:10d}",
            end=" ",
        )
        print(f"{off.pairs:9d} {off.worst:16.1e} {off.mismatches:11d}")


@torch.no_grad()
def latent_by_latent(
    sae: TopKSae, weight: torch.Tensor, states: torch.Tensor, k: int, c: float
) -> float:
    """Seconds a latent of the peer: all texts at once, tensor cores allowed, ties left to
    chance.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    step, unit = c * states.std(-1, keepdim=True), sae.directions(torch.arange(64, device=DEVICE))

    def move(i: int) -> torch.Tensor:
        top = torch.topk(sae.preactivations(states + step * unit[i]), k, dim=-1, sorted=False)
        return (weight[top.indices] * top.values).sum(-1)

    each = timed(lambda: [move(i) for i in range(len(unit))]) / len(unit)
    torch.backends.cuda.matmul.allow_tf32 = False
    return each


def permutations(d_sae: int, prompts: int, responses: int, count: int) -> None:
    """One chosen against `responses` - 1 rejected; every latent active on a fifth of the texts."""
    permutation.FIRST = count  # no latent stops early
    n = prompts * responses
    rng = np.random.default_rng(0)
    values = scipy.sparse.random_array((d_sae, n), density=0.2, rng=rng, format="csr")
    number, chosen = (
        np.repeat(np.arange(prompts), responses),
        np.tile(np.arange(responses) == 0, prompts).astype(float),
    )
    contrast = Contrast(np.arange(n), number, chosen, (1 - chosen) / (responses - 1), prompts)
    permutation_p(values[:256], contrast, 1024, 1024, 1, device=DEVICE)
    _sync()
    began = time.perf_counter()
    permutation_p(values, contrast, count, count, 1, device=DEVICE)
    took = time.perf_counter() - began
    share, few = max(d_sae // 64, 1), min(4096, count)
    began = time.perf_counter()
    on_cpu = permutation_p(values[:share], contrast, few, few, 1)
    cpu_s = (time.perf_counter() - began) * (d_sae / share) * (count / few)
    same = np.array_equal(
        on_cpu, permutation_p(values[:share], contrast, few, few, 1, device=DEVICE)
    )
    width = prompts * (responses - 1)
    print(
        f"\npermutations: {d_sae} latents x {prompts} prompts of 1 against {responses - 1} x"
        f" {count} permutations"
    )
    print(
        f"GPU {took:8.2f} s   {2 * d_sae * width * count / took / 1e12:8.1f} TFLOP/s of sums (each"
        " of two int8 products, and with several rejected two more for the squares)"
    )
    print(
        f"CPU {cpu_s:8.0f} s   from {share} latents and {few} permutations,"
        f" {torch.get_num_threads()} threads; ratio {cpu_s / took:.0f}; same p: {same}"
    )


def tables(d_sae: int, prompts: int, k: int, before: Path | None, rounds: int) -> None:
    """The table of the probe by this checkout and by another, in turns; each round compiles and
    warms up by itself.
    """
    for turn in range(rounds):
        for folder in (before, HERE) if before else (HERE,):
            done = subprocess.run(
                [sys.executable, "-c", TABLE, *map(str, (d_sae, prompts, k))],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(folder.resolve())},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            name = "here" if folder is HERE else str(folder)
            print(f"round {turn + 1}, {name}:\n{done.stdout}", end="", flush=True)


if __name__ == "__main__":
    main()
