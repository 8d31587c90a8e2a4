"""Philox against the published numbers, numpy's and Triton's; what is drawn is even and never
drawn twice.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from sarm.config import ROOT
from sarm.llama.sampling import row_keys
from sarm.philox import LABELS, MASK, ROUNDING, philox, random_words, uniforms, words_of

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


def words(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    return [int(word) for word in philox([torch.tensor(c) for c in counter], key)]


def by_the_paper(counter: tuple[int, ...], key: tuple[int, int], bits: int) -> list[int]:
    """Figure 1 of Salmon et al. in Python's own integers, for words of 32 or 64 bits."""
    m0, m1, w0, w1 = {
        32: (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85),
        64: (0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
    }[bits]
    whole, (c0, c1, c2, c3), (k0, k1) = (1 << bits) - 1, counter, key
    for _ in range(10):
        a, b = c0 * m0, c2 * m1
        c0, c1, c2, c3 = b >> bits ^ c1 ^ k0, b & whole, a >> bits ^ c3 ^ k1, a & whole
        k0, k1 = k0 + w0 & whole, k1 + w1 & whole
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((MASK,) * 4, (MASK, MASK), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_known_answers_of_random123(counter, key, expected) -> None:
    assert words(counter, key) == [int(word, 16) for word in expected.split()]


def test_any_counter_against_the_paper_and_the_paper_against_numpy() -> None:
    """numpy has the cipher for 64-bit words: it vouches for the arithmetic, which then vouches for
    ours at counters that no list of known answers holds.
    """
    draw = np.random.default_rng(0)
    for _ in range(50):
        *counter, k0, k1 = (int(x) for x in draw.integers(0, 2**64, 6, dtype=np.uint64))
        theirs = np.random.Philox(
            counter=np.array(counter, np.uint64), key=np.array([k0, k1], np.uint64)
        )
        counter[0] = (counter[0] + 1) % 2**64  # numpy counts up before it draws
        assert theirs.random_raw(4).tolist() == by_the_paper(tuple(counter), (k0, k1), 64)
        small, key = tuple(c & MASK for c in counter), (k0 & MASK, k1 & MASK)
        assert words(small, key) == by_the_paper(small, key, 32)


def test_words_broadcast_and_keys_may_be_signed() -> None:
    keys = torch.tensor([-1, 5, -(2**63), 2**40 + 3])
    positions = torch.tensor([0, 7, 4096])
    together = uniforms(keys[:, None], positions)
    assert together.shape == (4, 3)
    for row, key in enumerate(keys.tolist()):
        for column, position in enumerate(positions.tolist()):
            high, low, *_ = by_the_paper((position, 0, 0, 0), (key % 2**32, key % 2**64 >> 32), 32)
            assert float(together[row, column]) == ((high << 32 | low) >> 12) / 2**52
    assert words_of(-1) == (MASK, MASK)


def test_uniforms_are_even_in_every_direction() -> None:
    many = uniforms(row_keys(0, 0, [str(i) for i in range(500)])[:, None], torch.arange(200))
    counts = torch.histc(many, 100, 0, 1)
    # chi-squared of 99 degrees of freedom: beyond 149 once in a thousand
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 149
    assert float(many.min()) >= 0 and float(many.max()) < 1
    for lag in (many[:, 1:] - 0.5) * (many[:, :-1] - 0.5), (many[1:] - 0.5) * (many[:-1] - 0.5):
        assert abs(float(lag.mean()) * 12) < 4 / len(lag.flatten()) ** 0.5


def test_no_number_is_drawn_twice_over_seeds_steps_prompts_positions_and_purposes() -> None:
    keys = torch.cat(
        [
            row_keys(seed, step, [f"{prompt}#{sample}" for prompt in range(5) for sample in (0, 1)])
            for seed in (0, 1, 11)
            for step in (0, 1, 110)
        ]
    )
    drawn = uniforms(keys[:, None], torch.arange(300)).flatten()
    assert len(drawn) == 27_000 and len(drawn.unique()) == len(drawn)
    a, b = (random_words(4000, 7, purpose, torch.device("cpu")) for purpose in (LABELS, ROUNDING))
    assert int((a == b).sum()) == 0


@pytest.mark.parametrize("n", [1, 4, 1023])
def test_random_words_do_not_depend_on_how_many_are_drawn(n: int) -> None:
    long = random_words(5000, -3, ROUNDING, torch.device("cpu"))
    assert torch.equal(random_words(n, -3, ROUNDING, torch.device("cpu")), long[:n])
    assert long.min() >= 0 and long.max() <= MASK
    assert long[:4].tolist() == by_the_paper((0, 0, 0, ROUNDING), (MASK - 2, MASK), 32)
    assert abs(float(long.double().mean()) / 2**31 - 1) < 0.03


IN_KERNELS = """
import torch, triton, triton.language as tl
from sarm import philox, philox_triton

@triton.jit
def whole(out, key, N: tl.constexpr, PURPOSE: tl.constexpr):
    blocks = tl.arange(0, 2)[:, None] * N + tl.arange(0, N)[None, :]
    at = tl.arange(0, 2)[:, None] * 4 * N + tl.arange(0, 4 * N)[None, :]
    tl.store(out + at, philox_triton.random_words(key, blocks, PURPOSE).to(tl.int64))

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
keys = torch.tensor([0, -1, 5, -(2**63), 2**40 + 3] * 40, device=device)
positions = (torch.arange(200, dtype=torch.int32, device=device) * 7919) % 4096
theirs = philox_triton.uniforms(keys, positions)
assert torch.equal(theirs, philox.uniforms(keys, positions.long()))
for key in (3, -3, 2**45 + 1, -(2**63)):
    for purpose in (philox.LABELS, philox.ROUNDING):
        out = torch.empty(256, dtype=torch.int64, device=device)
        whole[(1,)](out, key, 32, purpose)
        assert torch.equal(out, philox.random_words(256, key, purpose, device)), (key, purpose)
print("equal")
"""


def test_kernels_draw_the_same() -> None:
    env = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    # A kernel is read from its file.
    done = subprocess.run(
        [sys.executable, "-c", _from_a_file(IN_KERNELS)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def _from_a_file(code: str) -> str:
    return (
        "import runpy, tempfile, pathlib\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    path = pathlib.Path(folder) / 'kernels.py'\n"
        f"    path.write_text({code!r})\n"
        "    runpy.run_path(str(path))\n"
    )
