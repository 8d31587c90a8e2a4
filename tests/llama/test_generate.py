"""Decoding against transformers' own, noise against its promise."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sarm.data.conversations import prompt_ids, stop_ids
from sarm.llama import decoders
from sarm.llama.decoders import CacheDecoder, LlamaDecoder
from sarm.llama.generate import generate, packs, response_logprobs
from sarm.llama.packed import pack
from sarm.llama.weights import LlamaWeights
from tests.tiny import llama_config

QUESTIONS = (
    "hello",
    "how can I do this thing or the other",
    "what is the best way to make it work again and again?",
    "no",
)


@pytest.fixture(scope="module")
def model(tiny_policy: Path) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    with torch.no_grad():  # seldom ends, so that responses have all lengths
        model.lm_head.weight[model.config.eos_token_id] *= 0.7
    return model.eval()


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer) -> list[list[int]]:
    return [prompt_ids(tiny_tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]


def run(model, prompts, *, keys=None, **changes):
    settings = {
        "max_new_tokens": 24,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 0,
        "eos_ids": [3],
        "pad_id": 4,
    } | changes
    return generate(model, prompts, keys=keys or [str(p) for p in prompts], **settings)


@pytest.mark.parametrize("decoder", [LlamaDecoder, CacheDecoder])
@pytest.mark.parametrize("eos_ids", [[3], [3, 246], []])
def test_greedy_is_that_of_transformers(model, prompts, decoder, eos_ids) -> None:
    got = run(decoder(model), prompts, temperature=0.0, eos_ids=eos_ids)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=eos_ids or None,
            pad_token_id=4,
        )
        assert got.ids(row) == theirs[0, len(prompt) :].tolist()
        assert bool(got.truncated[row]) == (got.ids(row)[-1] not in eos_ids)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
)
def test_llama_decoder_knows_llamas_variants(prompts, changes) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(**changes)).eval()
    assert LlamaWeights.knows(model)
    assert (
        run(model, prompts, temperature=0.0).responses.tolist()
        == run(CacheDecoder(model), prompts, temperature=0.0).responses.tolist()
    )


def test_logprobs_are_those_of_teacher_forcing(model, prompts) -> None:
    got = run(model, prompts, temperature=0.7)
    assert len({len(got.ids(i)) for i in range(4)}) > 1
    teacher = response_logprobs(
        model, prompts, [got.ids(i) for i in range(4)], temperature=0.7, tokens_per_batch=70
    )
    for i, prompt in enumerate(prompts):
        ids = got.ids(i)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        plain = F.log_softmax(logits / 0.7, -1)[range(len(ids)), ids]
        torch.testing.assert_close(got.logprobs[i][got.mask[i]], plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(teacher[i], plain, rtol=0, atol=1e-5)
        assert (
            not got.logprobs[i][~got.mask[i]].any() and (got.responses[i][~got.mask[i]] == 4).all()
        )


def test_lora_is_merged_into_the_copy_and_nowhere_else(model, prompts, tiny_policy) -> None:
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32),
        LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"),
    )
    decoder = LlamaDecoder(tuned)
    before = run(decoder, prompts, temperature=0.0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    weights = {name: p.clone() for name, p in tuned.named_parameters()}
    decoder.refresh()
    after = run(decoder, prompts, temperature=0.0)
    assert all(torch.equal(p, weights[name]) for name, p in tuned.named_parameters())
    assert after.responses.tolist() != before.responses.tolist()
    assert (
        after.responses.tolist()
        == run(CacheDecoder(tuned), prompts, temperature=0.0).responses.tolist()
    )


def test_noise_follows_the_key_and_not_the_row_or_batch(model, prompts) -> None:
    together = run(model, prompts)
    turned = run(model, prompts[::-1])
    one_by_one = run(model, prompts, max_rows=1)
    for i in range(4):
        assert together.ids(i) == turned.ids(3 - i) == one_by_one.ids(i)
    for other in ({"seed": 1}, {"step": 1}, {"keys": list("abcd")}):
        assert run(model, prompts, **other).responses.tolist() != together.responses.tolist()
    twice = run(model, [prompts[0]] * 2, keys=["x#0", "x#1"])
    assert twice.ids(0) != twice.ids(1)


def test_finished_rows_leave_the_batch(model, prompts, monkeypatch) -> None:
    rows = []
    step = LlamaDecoder.step
    monkeypatch.setattr(
        LlamaDecoder, "step", lambda self, tokens: rows.append(len(tokens)) or step(self, tokens)
    )
    got = run(model, prompts * 4, keys=[str(i) for i in range(16)], max_new_tokens=40)
    lengths = got.mask.sum(1)
    assert len(rows) == int(lengths.max()) - 1
    assert sum(rows) * decoders.KEEP_SHARE <= int(lengths.sum())


def test_what_prompts_share_is_read_once(model, prompts, monkeypatch) -> None:
    """Several samples of a prompt, prompts with one header: the same answers as one by one."""
    read = []
    monkeypatch.setattr(
        decoders, "pack", lambda rows, device: read.append(pack(rows, device)) or read[-1]
    )
    header = list(range(10, 40))
    some = [header + prompt * 2 for prompt in prompts for _ in range(3)]
    keys = [str(i) for i in range(len(some))]
    together = run(model, some, keys=keys, eos_ids=[])
    assert len(read) == 1 and len(read[0].ids) <= len(header) + 2 * sum(map(len, prompts))
    alone = run(model, some, keys=keys, eos_ids=[], max_rows=1)
    assert together.responses.tolist() == alone.responses.tolist()
    assert together.ids(0) != together.ids(1)


@pytest.mark.skipif(
    not decoders.lays_out(torch.zeros(1, dtype=torch.bfloat16)),
    reason="oneDNN multiplies no bf16 here",
)
def test_weights_laid_out_for_the_cpu_are_as_near_to_float32_and_follow_updates(
    model, prompts, monkeypatch
) -> None:
    def errors(policy) -> dict[bool, float]:
        exact = run(LlamaDecoder(policy.float()), prompts, temperature=0.0, max_new_tokens=1)
        found = {}
        for laid in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(decoders, "lays_out", lambda w, laid=laid: laid)
                decoder = LlamaDecoder(rounded)
                before = decoder.start(prompts, 3)
                with torch.no_grad():
                    rounded.model.layers[0].mlp.up_proj.weight.mul_(1.5)
                    rounded.lm_head.weight.mul_(0.5)
                decoder.refresh()
                after = decoder.start(prompts, 3)
                assert not torch.allclose(before, after, atol=1e-2)
                tokens = exact.responses[:, 0]
                with torch.no_grad():
                    expected = torch.stack(
                        [
                            policy.float()(torch.tensor([[*p, int(t)]])).logits[0, -1]
                            for p, t in zip(prompts, tokens, strict=True)
                        ]
                    )
                found[laid] = float((decoder.step(tokens).float() - expected).norm())
                rounded.load_state_dict(start)
        return found

    rounded = copy.deepcopy(model).bfloat16()
    start = {name: weight.clone() for name, weight in rounded.state_dict().items()}
    changed = copy.deepcopy(rounded)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        changed.lm_head.weight.mul_(0.5)
    found = errors(changed)
    assert found[True] < 1.3 * found[False]


def test_packs_keep_the_budget_and_every_row() -> None:
    lengths = [5, 9, 1, 30, 5, 9]
    batches = packs(lengths, 20)
    assert sorted(i for b in batches for i in b) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 20 for b in batches)
    assert batches[0] == [3] and len(batches) == 3


def test_stop_ids_of_model_and_tokenizer(model, tiny_tokenizer) -> None:
    assert stop_ids(model, tiny_tokenizer) == (3,)
    model.generation_config.eos_token_id = [9, 3]
    assert stop_ids(model, tiny_tokenizer) == (3, 9)
    model.generation_config.eos_token_id = 3
