"""Families of models as tiny random ones: sampler, trainer, reference and evaluation give the
log-probabilities of the model's own forward, and what is saved opens as it was, or the policy is
refused with its reason.

`python -m pytest -m slow tests/llama/test_families.py` asks all of them and compares the answers
with the table of docs/your-model.md; three of them are among the fast tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sarm.config import ROOT, LoraConfig, PpoConfig, UserError
from sarm.llama.generate import forced, generate, response_logprobs
from sarm.models import check_policy, open_policy
from sarm.ppo.learner.actor import make_actor
from sarm.ppo.learner.distributed import World
from sarm.ppo.learner.export import try_export
from sarm.ppo.learner.reference import Reference
from tests.tiny import tiny_tokenizer

NATS = 1e-4
TEMPERATURE = 0.7
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
SCALED = {"logits_scaling": 8.0, "embedding_multiplier": 12.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Qwen2, Qwen2.5": ("Qwen2", {"use_sliding_window": False}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Qwen3-MoE": ("Qwen3Moe", {"head_dim": 8, "moe_intermediate_size": 16, **EXPERTS}),
    "Mistral": ("Mistral", {"head_dim": 8, "sliding_window": 8}),
    "Mixtral": ("Mixtral", {"sliding_window": None, **EXPERTS}),
    "Gemma 2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 8}),
    "Gemma 3": ("Gemma3Text", {"head_dim": 8, "sliding_window": 8, "num_hidden_layers": 6}),
    "Phi 3": ("Phi3", {"pad_token_id": 4}),
    "Phi 2": ("Phi", {}),
    "Granite": ("Granite", SCALED),
    "Cohere": ("Cohere", {"logit_scale": 0.0625}),
    "OLMo 2": ("Olmo2", {}),
    "SmolLM3": ("SmolLM3", {"pad_token_id": 4}),
    "GPT-NeoX": ("GPTNeoX", {"rotary_pct": 0.5}),
}
SAMPLE = ("Qwen2, Qwen2.5", "Granite", "Mixtral")
QUESTIONS = ([5, 9, 40, 41, 70, 7], [8, 120], [30] * 11, [77, 12, 13])


def write_family(name: str, folder: Path) -> Path:
    kind, more = FAMILIES[name]
    tokenizer = tiny_tokenizer()
    ids = {f"{t}_token_id": getattr(tokenizer, f"{t}_token_id") for t in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{kind}Config")(
        **({"vocab_size": len(tokenizer)} | SIZES | ids | more)
    )
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():  # biases and norms are zeros and ones at first
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """By the model's `forward` on one row by itself."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    logprobs = (logits.float() / TEMPERATURE).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def perturb(actor: Any) -> None:
    """Adapters begin as no change."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)


def outcome(name: str, folder: Path, lora: bool) -> str:
    """`yes`, or why the family is refused; fails where log-probabilities disagree."""
    write_family(name, folder)
    try:
        check_policy(folder, {})
        policy = open_policy(folder, "float32")
    except UserError as error:
        return str(error)
    ppo = PpoConfig(lora=LoraConfig(rank=4, alpha=8) if lora else None)
    reference = open_policy(folder, "float32")
    policy.set_attn_implementation("eager")  # as the trainer does on a CPU
    actor = make_actor(policy, ppo, seed=0)
    try_export(folder, actor, tiny_tokenizer(), "owner/base", folder, World())
    perturb(actor)
    rollout = generate(
        actor.policy,
        [list(q) for q in QUESTIONS],
        keys=list("abcd"),
        max_new_tokens=12,
        temperature=TEMPERATURE,
        top_p=1.0,
        seed=1,
        eos_ids=[3],
        pad_id=4,
        max_rows=3,
    )
    responses = [rollout.ids(row) for row in range(len(QUESTIONS))]
    assert sum(map(len, responses)) > 20
    teacher = forced(rollout.prompts, responses, 0, torch.device("cpu"))
    actor.eval()
    with torch.no_grad():
        trained = actor(teacher.ids, teacher.predicts, teacher.labels, TEMPERATURE)[0]
    judged = response_logprobs(
        actor.policy, rollout.prompts, responses, temperature=TEMPERATURE, tokens_per_batch=64
    )
    frozen = Reference(reference, 0).logprobs(
        teacher.ids, teacher.predicts, teacher.labels, TEMPERATURE
    )
    own = [
        own_logprobs(actor.policy, p, r) for p, r in zip(rollout.prompts, responses, strict=True)
    ]
    base = [own_logprobs(reference, p, r) for p, r in zip(rollout.prompts, responses, strict=True)]
    for what, ours, theirs in (
        ("sampler", rollout.logprobs[rollout.mask], torch.cat(own)),
        ("trainer", trained, torch.cat(own)),
        ("evaluation", torch.cat(judged), torch.cat(own)),
        ("reference", frozen, torch.cat(base)),
    ):
        off = float((ours - theirs).abs().max())
        assert off <= NATS, f"{name}: the {what} is {off:.2g} nats off the model's own forward"
    return "yes"


def table() -> dict[str, str]:
    """The rows of the page's table: family to `yes` or the reason."""
    page = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (yes|no: [^|]+) \|$", page, re.MULTILINE)
    return dict(rows)


def agrees(found: str, said: str) -> bool:
    return found == said == "yes" or (said.startswith("no: ") and said[4:] in found)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", SAMPLE)
def test_some_families_are_as_the_page_says(name: str, lora: bool, tmp_path: Path) -> None:
    assert agrees(outcome(name, tmp_path / "m", lora), table()[name])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SAMPLE])
def test_every_family_is_as_the_page_says(name: str, lora: bool, tmp_path: Path) -> None:
    found = outcome(name, tmp_path / "m", lora)
    assert agrees(found, table()[name]), found


def test_the_page_has_every_family() -> None:
    assert list(table()) == list(FAMILIES)
