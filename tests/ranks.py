"""Run a test's function on one or more gloo ranks, a job that a test stops, or code under Triton's
interpreter, in processes of their own.

The processes are forked from one that has imported all of it: on a CPU, importing torch,
transformers and DeepSpeed takes longer than most tests' steps.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sarm.config import PpoConfig
from sarm.data.datasets import Prompt
from sarm.ppo.reward import CompoundReward, Penalised
from sarm.reward_model.scoring import Encoded
from tests.tiny import tiny_tokenizer

WORDS = ("help", "make", "steps", "harm", "people", "safe", "thing", "please")


def process_context() -> Any:
    """Starts processes that have torch and the trainer imported, by a fork; on a machine with a
    GPU by a spawn, as a process that has used one cannot be forked.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["tests.forked"])
    return context


def run_interpreted(code: str) -> None:
    """Run Python code where Triton interprets kernels, with random numbers of its own. Triton
    decides on import: here, where conftest had it interpret, otherwise in a process of its own.
    Raises what the code raises.
    """
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            exec(code, {})
        return
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, mp_context=process_context()) as pool,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(exec, code, {}).result(timeout=280)


def start_job(*words: str) -> BaseProcess:
    """`python -m jobs` with these words, torch imported already; its exit code and what signals do
    to it are those of the command.
    """
    process = process_context().Process(target=_job, args=(words,))
    process.start()
    return process


def _job(words: tuple[str, ...]) -> None:
    from jobs.__main__ import main

    sys.exit(main(list(words)))


def start_ranks(worker: Callable[..., None], size: int, *args: Any) -> list[BaseProcess]:
    """`worker(world, *args)` on each of `size` ranks; give them to `join_ranks`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        process_context().Process(target=_rank, args=(worker, rank, size, port, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def join_ranks(processes: list[BaseProcess], expect: int = 0, timeout_s: float = 240) -> None:
    """Wait for all; fails where one exits with another code than `expect`."""
    for process in processes:
        process.join(timeout_s)
    for process in processes:
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [expect] * len(processes)


def run_ranks(worker: Callable[..., None], size: int, *args: Any) -> None:
    join_ranks(start_ranks(worker, size, *args))


def _rank(
    worker: Callable[..., None], rank: int, size: int, port: int, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from sarm.ppo.learner.distributed import start_world

    worker(start_world(), *args)


class PlantedReward(CompoundReward):
    """A compound reward whose latent 0 fires, at 1, on responses with the letter `letter`, which
    it pays `worth`.
    """

    def __init__(self, alpha: float = 1.0, letter: str = "e", worth: float = 0.0) -> None:
        self.letter, self.worth = letter, worth
        super().__init__(_NoModel(), tiny_tokenizer(), [Penalised(0, 0.5, alpha)], monitors=[1])  # type: ignore[arg-type]

    def _encode(self, conversations) -> Encoded:  # type: ignore[no-untyped-def]
        texts = [c[-1]["content"] for c in conversations]
        fires = torch.tensor([float(self.letter in text) for text in texts])
        values = torch.stack([fires, torch.tensor([len(text) / 100 for text in texts])], 1).reshape(
            -1, 2
        )
        n = len(texts)
        none = torch.zeros(n, dtype=torch.bool)
        indices = torch.tensor([[0, 1]], dtype=torch.int32).expand(n, -1)
        return Encoded(
            indices,
            values,
            self.worth * fires + values[:, 1],
            torch.zeros(n, 4),
            torch.ones(n, dtype=torch.int32),
            none,
            none,
        )


class _NoModel(torch.nn.Module):
    d_sae, k = 4, 2
    head_weight = torch.zeros(4)


def some_prompts(n: int = 12) -> list[Prompt]:
    """Of different lengths."""
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 5)) for i in range(n)]
    return [
        Prompt(f"{i:016x}", ({"role": "user", "content": text},), "test", "unsafe", "", "ppo")
        for i, text in enumerate(texts)
    ]


def tiny_ppo(**changes: Any) -> PpoConfig:
    """Full fine-tuning of the tiny policy in float32, a few tokens a response."""
    settings = {
        "steps": 4,
        "batch_size": 8,
        "max_new_tokens": 8,
        "micro_batch_tokens": 200,
        "learning_rate": 1e-3,
        "lora": None,
        "kl_coef": 0.05,
        "reward_scale": "running_sd",
    }
    return PpoConfig.model_validate(settings | changes)


def tiny_trainer(
    world: Any,
    policy: Path,
    reward: CompoundReward,
    ppo: PpoConfig,
    seed: int = 0,
    dtype: str = "float32",
    trim: bool = False,
) -> Any:
    from sarm.ppo.trainer import Trainer

    model = copy.deepcopy(_opened(policy, dtype))
    return Trainer(
        ppo, model, tiny_tokenizer(), reward, some_prompts(), seed=seed, world=world, trim=trim
    )


@lru_cache
def _opened(policy: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy, dtype=dtype)


def gradients(trainer: Any) -> dict[str, Tensor]:
    """By parameter, of the whole optimizer step, whatever the ZeRO stage keeps of them. A
    collective.
    """
    from deepspeed.utils import safe_get_full_grad

    return {
        name: safe_get_full_grad(p).detach().clone()
        for name, p in trainer.learner.actor.named_parameters()
        if p.requires_grad
    }
