"""Checkpoints: an interrupted run ends as the uninterrupted one to the bit, and no torn or foreign
one is chosen.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sarm.config import UserError
from sarm.llama.weights import gathered
from sarm.ppo.learner import checkpoint
from sarm.ppo.learner.checkpoint import Piece
from sarm.ppo.learner.distributed import World
from sarm.ppo.learner.optimizer import State, compacted, expanded
from sarm.ppo.learner.shards import engine_pieces
from tests.ranks import (
    PlantedReward,
    join_ranks,
    process_context,
    start_ranks,
    tiny_ppo,
    tiny_trainer,
)
from tests.tiny import tiny_tokenizer

ALONE = World()
FP8 = {"rollout_dtype": "fp8", "rollout_mismatch_max": 9.0}


def write(
    folder: Path,
    step: int,
    attempt: str = "a",
    keep_last: int = 9,
    world: World = ALONE,
    value: float = 0.0,
) -> Path:
    pieces = [
        Piece("x", 0, torch.full((1000,), value)),
        Piece("y", 5, torch.arange(5)),
        Piece("y", 0, torch.arange(-5, 0)),
    ]
    return checkpoint.save(
        folder,
        step,
        {"step": step},
        pieces,
        world=world,
        made_with="c",
        attempt=attempt,
        keep_last=keep_last,
    )


def newest(folder: Path, config: str = "c") -> int | None:
    loaded = checkpoint.load(folder, world=ALONE, made_with=config)
    return loaded.step if loaded else None


# --- files
# ------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    write(tmp_path, 4, value=0.1)
    loaded = checkpoint.load(tmp_path, world=ALONE, made_with="c")
    assert loaded is not None and (loaded.step, loaded.state) == (4, {"step": 4})
    with loaded.tensors as tensors:
        assert torch.equal(tensors.read("x"), torch.full((1000,), 0.1))
        assert tensors.read("y").tolist() == list(range(-5, 5)) and tensors.read(
            "y", 3, 4
        ).tolist() == [-2, -1, 0, 1]
        for name, start, length in (("z", 0, None), ("y", 8, 3), ("x", 1000, 1)):
            with pytest.raises(UserError, match=f"does not hold elements .* of {name}"):
                tensors.read(name, start, length)


def test_the_newest_complete_one_wins(tmp_path: Path) -> None:
    for step, attempt in ((9, "a"), (20, "b"), (10, "c")):
        write(tmp_path, step, attempt)
    assert newest(tmp_path) == 20
    assert newest(tmp_path, "another config") is None


@pytest.mark.parametrize(
    "damage", ["no manifest", "cut short", "altered", "half a manifest", "file gone"]
)
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


def test_only_the_last_are_kept_and_others_unfinished_ones_left_while_saving(
    tmp_path: Path,
) -> None:
    (tmp_path / "step-00000001.other").mkdir()
    for step in range(1, 5):
        write(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000001.other",
        "step-00000003.a",
        "step-00000004.a",
    ]


@pytest.mark.parametrize("hurt", [0, 1])
@pytest.mark.parametrize("reader", [0, 1])
def test_every_file_is_verified_whoever_reads(tmp_path: Path, hurt: int, reader: int) -> None:
    """One rank of three reads what two wrote: each file is some rank's to verify, none is left
    out.
    """
    path = write(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / "rank-00000.safetensors").read_bytes()
    (path / "rank-00001.safetensors").write_bytes(data)
    manifest["files"]["rank-00001.safetensors"] = manifest["files"]["rank-00000.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"ranks": 2}))
    (path / f"rank-{hurt:05d}.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = checkpoint.load(tmp_path, world=OneOf(reader, 3), made_with="c")
    assert (found is None) == (hurt == reader)
    assert newest(tmp_path) is None


class OneOf(World):
    """A rank whose siblings say nothing and find nothing broken; it proposes as rank 0 would."""

    def broadcast_text(self, text: str) -> str:
        return text or next(self.names)

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.names = iter(["step-00000003.a", ""])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_a_full_disk_is_an_error_and_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path, 2)
    assert newest(tmp_path) == 1


def test_a_file_that_cannot_be_written_whole_is_an_error_too(tmp_path: Path) -> None:
    """Told by safetensors' own exception, which is no OSError."""
    write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(OSError, match="rank-00000"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest(tmp_path) == 1


def test_what_another_version_wrote_is_neither_read_nor_swept_away(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    (folder / checkpoint.MANIFEST).write_text(
        json.dumps(manifest | {"schema": checkpoint.SCHEMA - 1})
    )
    with pytest.raises(UserError, match="another version of this code"):
        newest(tmp_path)
    assert folder.exists()
    write(tmp_path, 2)
    assert newest(tmp_path) == 2


def writer(folder: Path, attempt: str) -> None:
    pieces = [Piece("x", 0, torch.arange(300_000.0))]
    for step in range(1, 10_000):
        checkpoint.save(
            folder,
            step,
            {"step": step},
            pieces,
            world=ALONE,
            made_with="c",
            attempt=attempt,
            keep_last=1,
        )


def test_killed_at_any_point_a_complete_checkpoint_is_left(tmp_path: Path) -> None:
    last = 0
    for attempt, delay_s in enumerate((0.05, 0.173)):
        process = process_context().Process(target=writer, args=(tmp_path, f"a{attempt}"))
        process.start()
        while not checkpoint.complete(tmp_path, "c"):
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(delay_s)
        process.kill()
        process.join()
        loaded = checkpoint.load(tmp_path, world=ALONE, made_with="c")
        assert loaded is not None
        with loaded.tensors as tensors:
            assert torch.equal(tensors.read("x"), torch.arange(300_000.0))
        last = max(last, loaded.step)
    assert last > 1


# --- to the bit
# ------------------------------------------------------------------------------------------------


def uninterrupted_and_resumed(
    world: World,
    policy: Path,
    folder: Path,
    settings: dict[str, Any],
    dtype: str = "float32",
    trim: bool = False,
) -> list[dict[str, str]]:
    """Four steps at once; then two, a checkpoint, and two more by a trainer of its own. The steps'
    numbers.
    """
    ppo = tiny_ppo(
        num_mini_batches=2,
        micro_batch_tokens=80,
        kl_controller="adaptive",
        missing_eos_penalty=0.3,
        **settings,
    )
    whole = tiny_trainer(world, policy, PlantedReward(worth=0.5), ppo, dtype=dtype, trim=trim)
    lines = [numbers(whole.run_step()) for _ in range(4)]

    first = tiny_trainer(world, policy, PlantedReward(worth=0.5), ppo, dtype=dtype, trim=trim)
    for _ in range(2):
        first.run_step()
    checkpoint.save(
        folder,
        2,
        first.state(),
        first.learner.pieces(),
        world=world,
        made_with="c",
        attempt="a",
        keep_last=1,
    )
    torch.manual_seed(99)  # a new process has other random numbers
    second = tiny_trainer(world, policy, PlantedReward(worth=0.5), ppo, dtype=dtype, trim=trim)
    loaded = checkpoint.load(folder, world=world, made_with="c")
    assert loaded is not None
    second.restore(loaded.state, loaded)
    assert [numbers(second.run_step()) for _ in range(2)] == lines[2:]

    ours, theirs = (
        {piece[:2]: piece.values for piece in engine_pieces(trainer.learner.engine)}
        for trainer in (second, whole)
    )
    assert ours.keys() == theirs.keys() and any("/exp_avg_sq" in name for name, _ in ours)
    assert all(torch.equal(ours[piece], theirs[piece]) for piece in ours)
    with gathered(second.learner.actor, whole.learner.actor):
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                second.learner.actor.parameters(), whole.learner.actor.parameters(), strict=True
            )
        )
    state, other = second.state(), whole.state()
    assert {**state, "training_s": 0} == {**other, "training_s": 0}
    return lines


def numbers(metrics: dict[str, float]) -> dict[str, str]:
    """To the last bit, and NaN equal to itself."""
    return {
        key: value.hex()
        for key, value in metrics.items()
        if not key.startswith(("time/", "gpu/")) and "per_s" not in key and key != "eps"
    }


def one_rank_cases(world: World, policy: Path, folder: Path) -> None:
    uninterrupted_and_resumed(world, policy, folder / "lora", {"lora": {"rank": 2, "alpha": 4}})
    fp8 = FP8 | {"lora": {"rank": 2, "alpha": 4}}
    lines = uninterrupted_and_resumed(world, policy, folder / "fp8", fp8)
    assert all(float.fromhex(line["rollout/logprob_mismatch"]) > 1e-3 for line in lines)
    lines = uninterrupted_and_resumed(
        world,
        policy_of_sentences(policy, folder / "policy"),
        folder / "trimmed",
        {"max_new_tokens": 16},
        trim=True,
    )
    trimmed = [
        float.fromhex(line["response/scored_length"]) < float.fromhex(line["response/length"])
        for line in lines
    ]
    assert any(trimmed[:2]) and any(trimmed[2:]), "before the checkpoint and after it"


def policy_of_sentences(policy: Path, folder: Path) -> Path:
    """The policy, saying full stops and spaces often."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), tiny_tokenizer()
    with torch.no_grad():
        for token in (".", "Ġ"):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] *= 10
    model.save_pretrained(folder)
    return folder


def two_rank_cases(world: World, policy: Path, folder: Path) -> None:
    for stage in (2, 3):
        uninterrupted_and_resumed(world, policy, folder / f"zero{stage}", {"zero_stage": stage})
    uninterrupted_and_resumed(world, policy, folder / "fp8", FP8 | {"zero_stage": 3})
    assert "torch._inductor.compile_fx" not in sys.modules, "seconds of every rank's start"


def test_resumed_equals_uninterrupted_to_the_bit(tiny_policy: Path, tmp_path: Path) -> None:
    groups = [
        start_ranks(worker, size, tiny_policy, tmp_path)
        for worker, size in ((two_rank_cases, 2), (one_rank_cases, 1))
    ]
    for group in groups:
        join_ranks(group)


def bf16_cases(world: World, policy: Path, folder: Path) -> None:
    """Full fine-tuning with float32 master weights in each of ZeRO's optimizers, and LoRA beside
    sharded bf16 weights.
    """
    for stage in (1, 2, 3):
        uninterrupted_and_resumed(
            world, policy, folder / f"full{stage}", {"zero_stage": stage}, "bfloat16"
        )
    uninterrupted_and_resumed(
        world,
        policy,
        folder / "lora3",
        {"zero_stage": 3, "lora": {"rank": 2, "alpha": 4}},
        "bfloat16",
    )
    uninterrupted_and_resumed(world, policy, folder / "compact", {"weights": "compact"}, "bfloat16")


@pytest.mark.slow
def test_resumed_bf16_equals_uninterrupted_to_the_bit(tiny_policy: Path, tmp_path: Path) -> None:
    join_ranks(start_ranks(bf16_cases, 2, tiny_policy, tmp_path))


# --- on another number of ranks
# ---------------------------------------------------------------------------------------

Case = tuple[str, dict[str, Any], dict[str, Any], str]
"""Name, settings before the checkpoint, settings after it, data type."""

LORA = {"lora": {"rank": 2, "alpha": 4}}
FLOAT32: list[Case] = [
    ("lora", LORA, LORA, "float32"),
    ("full", {}, {}, "float32"),
    ("zero2", {"zero_stage": 2}, {"zero_stage": 2}, "float32"),
    ("zero3", {"zero_stage": 3}, {"zero_stage": 3}, "float32"),
]
EVERY: list[Case] = [
    *FLOAT32,
    ("zero1", {"zero_stage": 1}, {"zero_stage": 1}, "float32"),
    ("zero2 to none", {"zero_stage": 2}, {}, "float32"),
    ("none to zero3", {}, {"zero_stage": 3}, "float32"),
    *(
        (f"bf16 zero{stage}", {"zero_stage": stage}, {"zero_stage": stage}, "bfloat16")
        for stage in (1, 2, 3)
    ),
    ("bf16 lora zero3", LORA | {"zero_stage": 3}, LORA | {"zero_stage": 3}, "bfloat16"),
    ("compact", {"weights": "compact"}, {"weights": "compact"}, "bfloat16"),
    ("compact to zero2", {"weights": "compact"}, {"zero_stage": 2}, "bfloat16"),
    ("zero2 to compact", {"zero_stage": 2}, {"weights": "compact"}, "bfloat16"),
]


def changing_ppo(settings: dict[str, Any]) -> Any:
    return tiny_ppo(
        num_mini_batches=2,
        micro_batch_tokens=80,
        kl_controller="adaptive",
        learning_rate=3e-4,
        **settings,
    )


def uninterrupted(world: World, policy: Path, folder: Path, cases: list[Case]) -> None:
    """Four steps, with a checkpoint after two."""
    for name, before, _, dtype in cases:
        trainer = tiny_trainer(
            world, policy, PlantedReward(worth=0.5), changing_ppo(before), dtype=dtype
        )
        lines = [trainer.run_step() for _ in range(2)]
        keep(trainer, world, folder, f"{name} of {world.size}")
        lines += [trainer.run_step() for _ in range(2)]
        if world.rank == 0:
            (folder / f"{name} of {world.size}.json").write_text(json.dumps(lines[2:]))


def gone_on(world: World, policy: Path, folder: Path, cases: list[Case], old: int) -> None:
    """The last two of those steps on these ranks, from the checkpoint of `old`; and what they
    restored, saved again.
    """
    for name, _, after, dtype in cases:
        trainer = tiny_trainer(
            world, policy, PlantedReward(worth=0.5), changing_ppo(after), dtype=dtype
        )
        loaded = checkpoint.load(folder / f"{name} of {old}", world=world, made_with="c")
        assert loaded is not None and loaded.ranks == old
        trainer.restore(loaded.state, loaded)
        keep(trainer, world, folder, f"{name} of {old} on {world.size}")
        lines = [trainer.run_step() for _ in range(2)]
        if world.rank == 0:
            (folder / f"{name} of {old} on {world.size}.json").write_text(json.dumps(lines))


def keep(trainer: Any, world: World, folder: Path, name: str) -> None:
    """A checkpoint, and the policy beside it."""
    checkpoint.save(
        folder / name,
        2,
        trainer.state(),
        trainer.learner.pieces(),
        world=world,
        made_with="c",
        attempt="a",
        keep_last=1,
    )
    with gathered(trainer.learner.actor):
        if world.rank == 0:
            torch.save(
                {name: p.detach().clone() for name, p in trainer.learner.actor.named_parameters()},
                folder / f"{name}.pt",
            )


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    loaded = checkpoint.load(folder, world=ALONE, made_with="c")
    assert loaded is not None
    with loaded.tensors as tensors:
        return {
            name: tensors.read(name)
            for name in tensors.names()
            if not name.startswith("generator.")
        }


def made_into_the_other(
    kept: dict[str, torch.Tensor], like: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Float32 masters and moments from weights in halves, or the other way round, parameter by
    parameter.
    """
    # Made where the weights lie: a GPU's exponentials, of which scales consist, differ in the last
    # bit.
    place = "cuda" if torch.cuda.is_available() else "cpu"
    made = {}
    for parameter in [name.removesuffix("/weight") for name in kept if name.endswith("/weight")]:
        weight, step = kept[f"{parameter}/weight"], kept[f"{parameter}/step"]
        if f"{parameter}/low" in kept:
            fields = expanded(
                weight, State(*(kept[f"{parameter}/{field}"] for field in State._fields))
            )._asdict()
        else:
            moments = (
                kept[f"{parameter}/{field}"].to(place) for field in ("exp_avg", "exp_avg_sq")
            )
            upper, state = compacted(weight.to(place), *moments, like[f"{parameter}/weight"].dtype)
            fields = {
                field: values.cpu()
                for field, values in {"weight": upper, **state._asdict()}.items()
            }
        made |= {
            f"{parameter}/{field}": values for field, values in {**fields, "step": step}.items()
        }
    return made


def assert_went_on(folder: Path, cases: list[Case], old: int, new: int) -> None:
    for name, before, after, dtype in cases:
        was, now = f"{name} of {old}", f"{name} of {old} on {new}"
        kept, restored = whole_tensors(folder / was), whole_tensors(folder / now)
        assert any("/exp_avg_sq" in field for field in kept)
        crossed = before.get("weights") != after.get("weights")
        expected = made_into_the_other(kept, restored) if crossed else kept
        assert expected.keys() == restored.keys()
        assert all(torch.equal(expected[field], restored[field]) for field in expected), name
        policy, again = torch.load(folder / f"{was}.pt"), torch.load(folder / f"{now}.pt")
        # ZeRO keeps the value head in bfloat16 too.
        differ = sum(
            int(
                (policy[field].to(again[field].dtype) != again[field].to(policy[field].dtype)).sum()
            )
            for field in policy
        )
        # Halfway between two bfloat16 numbers ours rounds up and torch to even: one weight in
        # 65,536.
        assert differ <= (5 if crossed else 0), name
        # in bfloat16 another rounding is another token, and after it another response
        if dtype == "float32":
            lines, uninterrupted_lines = (
                json.loads((folder / f"{run}.json").read_text()) for run in (now, was)
            )
            for line, whole in zip(lines, uninterrupted_lines, strict=True):
                for loss in ("loss/policy_avg", "loss/value_avg", "loss/total", "objective/scores"):
                    assert line[loss] == pytest.approx(whole[loss], abs=1e-4), (name, loss)


def test_one_rank_goes_on_as_two_and_two_as_one(tiny_policy: Path, tmp_path: Path) -> None:
    for group in [
        start_ranks(uninterrupted, size, tiny_policy, tmp_path, FLOAT32) for size in (1, 2)
    ]:
        join_ranks(group)
    for group in [
        start_ranks(gone_on, size, tiny_policy, tmp_path, FLOAT32, 3 - size) for size in (1, 2)
    ]:
        join_ranks(group)
    assert_went_on(tmp_path, FLOAT32, 1, 2)
    assert_went_on(tmp_path, FLOAT32, 2, 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("old, new", [(2, 4), (4, 2), (1, 3)])
def test_any_number_of_ranks_goes_on_from_any_other(
    tiny_policy: Path, tmp_path: Path, old: int, new: int
) -> None:
    join_ranks(start_ranks(uninterrupted, old, tiny_policy, tmp_path, EVERY), timeout_s=600)
    join_ranks(start_ranks(gone_on, new, tiny_policy, tmp_path, EVERY, old), timeout_s=600)
    assert_went_on(tmp_path, EVERY, old, new)


def gpu_cases(world: World, policy: Path, folder: Path) -> None:
    # attention's backward pass adds up in any order otherwise
    torch.use_deterministic_algorithms(True)
    uninterrupted_and_resumed(world, policy, folder / "compact", {"weights": "compact"}, "bfloat16")
    uninterrupted_and_resumed(
        world, policy, folder / "lora", {"lora": {"rank": 2, "alpha": 4}}, "bfloat16"
    )
    for name, settings in (("fp8", FP8), ("fp8-lora", FP8 | {"lora": {"rank": 2, "alpha": 4}})):
        uninterrupted_and_resumed(world, policy, folder / name, settings, "bfloat16")


@pytest.mark.gpu
def test_resumed_on_a_gpu_equals_uninterrupted_to_the_bit(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    join_ranks(start_ranks(gpu_cases, 1, tiny_policy, tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_gpu_goes_on_as_two_and_two_as_one(tiny_policy: Path, tmp_path: Path) -> None:
    cases = [case for case in EVERY if case[0] == "lora" or case[3] == "bfloat16"]
    for group in [
        start_ranks(uninterrupted, size, tiny_policy, tmp_path, cases) for size in (1, 2)
    ]:
        join_ranks(group)
    for group in [
        start_ranks(gone_on, size, tiny_policy, tmp_path, cases, 3 - size) for size in (1, 2)
    ]:
        join_ranks(group)
    assert_went_on(tmp_path, cases, 1, 2)
    assert_went_on(tmp_path, cases, 2, 1)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
@pytest.mark.timeout(600)
def test_four_gpus_go_on_from_four_and_from_two(tiny_policy: Path, tmp_path: Path) -> None:
    cases = [case for case in EVERY if case[0] == "lora" or case[3] == "bfloat16"]
    for old in (4, 2):
        join_ranks(start_ranks(uninterrupted, old, tiny_policy, tmp_path, cases))
    for old in (4, 2):
        join_ranks(start_ranks(gone_on, 4, tiny_policy, tmp_path, cases, old))
        assert_went_on(tmp_path, cases, old, 4)
