"""Checkpoints: an interrupted run ends as the uninterrupted one to the bit, and no torn or foreign one is chosen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sarm.config import UserError
from sarm.ppo import checkpoint
from sarm.ppo.decoders import gathered
from sarm.ppo.world import World
from tests.ranks import PlantedReward, join_ranks, start_ranks, tiny_ppo, tiny_trainer

ALONE = World()


def write(folder: Path, step: int, attempt: str = "a", keep_last: int = 9, world: World = ALONE, value: float = 0.0) -> Path:
    tensors = {"x": torch.full((1000,), value), "n": torch.tensor(3)}
    return checkpoint.save(folder, step, {"step": step}, tensors, world=world, made_with="c", attempt=attempt, keep_last=keep_last)


def newest(folder: Path, config: str = "c") -> int | None:
    loaded = checkpoint.load(folder, world=ALONE, made_with=config)
    return loaded.step if loaded else None


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    write(tmp_path, 4, value=0.1)
    loaded = checkpoint.load(tmp_path, world=ALONE, made_with="c")
    assert loaded is not None and (loaded.step, loaded.state) == (4, {"step": 4})
    assert torch.equal(loaded.tensors["x"], torch.full((1000,), 0.1)) and int(loaded.tensors["n"]) == 3


def test_the_newest_complete_one_wins(tmp_path: Path) -> None:
    for step, attempt in ((9, "a"), (20, "b"), (10, "c")):
        write(tmp_path, step, attempt)
    assert newest(tmp_path) == 20
    assert newest(tmp_path, "another config") is None


@pytest.mark.parametrize("damage", ["no manifest", "cut short", "altered", "half a manifest", "file gone"])
def test_a_torn_checkpoint_is_never_chosen(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    torn = write(tmp_path, 2)
    tensors, manifest = torn / "rank-00000.safetensors", torn / "manifest.json"
    data = tensors.read_bytes()
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "cut short":
        tensors.write_bytes(data[:-1])
    elif damage == "altered":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:50])
    else:
        tensors.unlink()
    assert newest(tmp_path) == 1


def test_a_late_writer_cannot_touch_another_attempts_checkpoint(tmp_path: Path) -> None:
    """It writes folders of its own, so the same step of two attempts lies side by side."""
    first, second = write(tmp_path, 5, "one", value=1.0), write(tmp_path, 5, "two", value=2.0)
    assert first != second
    assert newest(tmp_path) == 5
    (tmp_path / "step-00000007.late").mkdir()
    (tmp_path / "step-00000007.late" / "rank-00000.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == 5
    assert not (tmp_path / "step-00000007.late").exists()


def test_only_the_last_are_kept_and_others_unfinished_ones_left_while_saving(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.other").mkdir()
    for step in range(1, 5):
        write(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001.other", "step-00000003.a", "step-00000004.a"]


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"ranks": 4}))
    with pytest.raises(UserError, match="written by 4 ranks, and this job has 1"):
        newest(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path, 2)
    assert newest(tmp_path) == 1


WRITER = """
import sys, torch
from pathlib import Path
from sarm.ppo import checkpoint
from sarm.ppo.decoders import gathered
from sarm.ppo.world import World
tensors = {"x": torch.arange(300_000.0)}
print("ready", flush=True)
for step in range(1, 10_000):
    checkpoint.save(Path(sys.argv[1]), step, {"step": step}, tensors, world=World(), made_with="c", attempt=sys.argv[2], keep_last=1)
"""


def test_killed_at_any_point_a_complete_checkpoint_is_left(tmp_path: Path) -> None:
    last = 0
    for attempt, delay_s in enumerate((0.05, 0.173)):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), f"a{attempt}"], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while not checkpoint.complete(tmp_path, "c"):
            time.sleep(0.005)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        loaded = checkpoint.load(tmp_path, world=ALONE, made_with="c")
        assert loaded is not None and torch.equal(loaded.tensors["x"], torch.arange(300_000.0))
        last = max(last, loaded.step)
    assert last > 1


# --- to the bit -------------------------------------------------------------------------------------------------------


def uninterrupted_and_resumed(world: World, policy: Path, folder: Path, settings: dict[str, Any], dtype: str = "float32") -> None:
    """Four steps at once; then two, a checkpoint, and two more by a trainer of its own."""
    ppo = tiny_ppo(num_mini_batches=2, micro_batch_tokens=80, kl_controller="adaptive", missing_eos_penalty=0.3, **settings)
    whole = tiny_trainer(world, policy, PlantedReward(worth=0.5), ppo, dtype=dtype)
    lines = [numbers(whole.run_step()) for _ in range(4)]

    first = tiny_trainer(world, policy, PlantedReward(worth=0.5), ppo, dtype=dtype)
    for _ in range(2):
        first.run_step()
    checkpoint.save(folder, 2, first.state(), first.tensors(), world=world, made_with="c", attempt="a", keep_last=1)
    torch.manual_seed(99)  # a new process has other random numbers
    second = tiny_trainer(world, policy, PlantedReward(worth=0.5), ppo, dtype=dtype)
    loaded = checkpoint.load(folder, world=world, made_with="c")
    assert loaded is not None
    second.restore(loaded.state, loaded.tensors)
    assert [numbers(second.run_step()) for _ in range(2)] == lines[2:]

    ours, theirs = second.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys() and any(name.startswith("exp_avg_sq") for name in ours)
    # The weights by name: ZeRO 3 pads its partitions with what lies in memory.
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith(("exp_avg", "step")))
    with gathered(second.actor, whole.actor):
        assert all(torch.equal(a, b) for a, b in zip(second.actor.parameters(), whole.actor.parameters(), strict=True))
    state, other = second.state(), whole.state()
    assert {**state, "training_s": 0} == {**other, "training_s": 0}


def numbers(metrics: dict[str, float]) -> dict[str, str]:
    """To the last bit, and NaN equal to itself."""
    return {key: value.hex() for key, value in metrics.items() if not key.startswith(("time/", "gpu/")) and "per_s" not in key and key != "eps"}


def one_rank_cases(world: World, policy: Path, folder: Path) -> None:
    uninterrupted_and_resumed(world, policy, folder / "lora", {"lora": {"rank": 2, "alpha": 4}})


def two_rank_cases(world: World, policy: Path, folder: Path) -> None:
    for stage in (2, 3):
        uninterrupted_and_resumed(world, policy, folder / f"zero{stage}", {"zero_stage": stage})


def test_resumed_equals_uninterrupted_to_the_bit(tiny_policy: Path, tmp_path: Path) -> None:
    groups = [start_ranks(worker, size, tiny_policy, tmp_path) for worker, size in ((two_rank_cases, 2), (one_rank_cases, 1))]
    for group in groups:
        join_ranks(group)


def bf16_cases(world: World, policy: Path, folder: Path) -> None:
    """Full fine-tuning with float32 master weights in each of ZeRO's optimizers, and LoRA beside sharded bf16 weights."""
    for stage in (1, 2, 3):
        uninterrupted_and_resumed(world, policy, folder / f"full{stage}", {"zero_stage": stage}, "bfloat16")
    uninterrupted_and_resumed(world, policy, folder / "lora3", {"zero_stage": 3, "lora": {"rank": 2, "alpha": 4}}, "bfloat16")
    uninterrupted_and_resumed(world, policy, folder / "compact", {"weights": "compact"}, "bfloat16")


@pytest.mark.slow
def test_resumed_bf16_equals_uninterrupted_to_the_bit(tiny_policy: Path, tmp_path: Path) -> None:
    join_ranks(start_ranks(bf16_cases, 2, tiny_policy, tmp_path))


def gpu_cases(world: World, policy: Path, folder: Path) -> None:
    torch.use_deterministic_algorithms(True)  # attention's backward pass adds up in any order otherwise
    uninterrupted_and_resumed(world, policy, folder / "compact", {"weights": "compact"}, "bfloat16")
    uninterrupted_and_resumed(world, policy, folder / "lora", {"lora": {"rank": 2, "alpha": 4}}, "bfloat16")


@pytest.mark.gpu
def test_resumed_on_a_gpu_equals_uninterrupted_to_the_bit(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    join_ranks(start_ranks(gpu_cases, 1, tiny_policy, tmp_path))
