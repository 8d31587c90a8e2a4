"""The GPU's decoder: its kernels and its loop against plain torch and against transformers.

On a CPU Triton's interpreter runs the kernels, which is slow, so the loop there runs on plain
versions of them. On a GPU everything is as users have it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sarm.data.conversations import prompt_ids
from sarm.llama import decode_kernels, graph_decoder
from sarm.llama.decoders import CacheDecoder, LlamaDecoder
from sarm.llama.generate import generate
from sarm.llama.graph_decoder import GraphDecoder
from sarm.llama.sampling import row_keys, sample
from sarm.llama.weights import side_by_side
from sarm.philox import uniforms
from tests.tiny import llama_config

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
QUESTIONS = (
    "hello",
    "how can I do this thing or the other",
    "what is the best way to make it work again and again?",
    "no",
    "why",
    "do it again",
)


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a GPU the loop runs on the kernels' plain versions."""
    if not CUDA:
        for kernel in (plain_attend, plain_draw, plain_advance, plain_uniforms):
            monkeypatch.setattr(graph_decoder, kernel.__name__.removeprefix("plain_"), kernel)


def rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def plain_attend(qkv, keys, values, cos, sin, positions, scale):
    kv, d = keys.shape[1], keys.shape[3]
    out = []
    for row, n in enumerate(positions.tolist()):
        q, k, v = qkv[row].view(-1, d).split([qkv.shape[1] // d - 2 * kv, kv, kv])
        keys[row, :, n], values[row, :, n] = rotated(k, cos[n], sin[n]), v
        seen = (keys[row, None, :, : n + 1], values[row, None, :, : n + 1])
        out.append(
            F.scaled_dot_product_attention(
                rotated(q, cos[n], sin[n])[None, :, None], *seen, scale=scale, enable_gqa=True
            ).flatten()
        )
    return torch.stack(out)


def plain_draw(logits, noise, counts, temperature):
    return sample(logits, plain_uniforms(noise, counts), temperature, 1.0)


def plain_uniforms(keys, positions):
    return uniforms(keys, positions.long())


def plain_advance(
    drawn, drawn_logprobs, stops, limit, tokens, positions, counts, alive, responses, logprobs
):
    for row in alive.nonzero().flatten().tolist():
        responses[row, counts[row]], logprobs[row, counts[row]], tokens[row] = (
            drawn[row],
            drawn_logprobs[row],
            drawn[row],
        )
        positions[row] += 1
        counts[row] += 1
        alive[row] = int(int(drawn[row]) not in stops.tolist() and counts[row] < limit)


@pytest.fixture
def model(tiny_policy: Path) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    with torch.no_grad():  # seldom ends, so that responses have all lengths
        model.lm_head.weight[model.config.eos_token_id] *= 0.7
    return model.eval().to(DEVICE)


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer) -> list[list[int]]:
    return [prompt_ids(tiny_tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]


def run(model, prompts, **changes):
    settings = {
        "max_new_tokens": 20,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 0,
        "eos_ids": [3],
        "pad_id": 4,
    } | changes
    return generate(model, prompts, keys=[str(p) for p in prompts], **settings)


def same(one, other) -> None:
    assert one.responses.tolist() == other.responses.tolist()
    assert one.mask.tolist() == other.mask.tolist()
    assert one.truncated.tolist() == other.truncated.tolist()
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=2e-5)


# Kernels


@pytest.mark.parametrize("heads, kv, d", [(4, 2, 16), (9, 3, 64), (4, 4, 8)])
def test_attention_is_that_of_torch_over_the_cache(heads: int, kv: int, d: int) -> None:
    torch.manual_seed(0)
    b, capacity = 3, 128
    # nothing cached; less than a block; more
    lengths = torch.tensor([0, 5, 70], dtype=torch.int32, device=DEVICE)
    qkv = torch.randn(b, (heads + 2 * kv) * d, device=DEVICE)
    keys, values = (torch.randn(b, kv, capacity, d, device=DEVICE) for _ in range(2))
    angles = torch.rand(capacity, d // 2, device=DEVICE).repeat(1, 2) * 6
    cos, sin = angles.cos(), angles.sin()
    plain_keys, plain_values = keys.clone(), values.clone()
    plain = plain_attend(qkv, plain_keys, plain_values, cos, sin, lengths, d**-0.5)
    torch.testing.assert_close(
        decode_kernels.attend(qkv, keys, values, cos, sin, lengths, d**-0.5),
        plain,
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(keys, plain_keys, rtol=0, atol=1e-6)
    torch.testing.assert_close(values, plain_values, rtol=0, atol=0)


@pytest.mark.parametrize("v", [6, 4096, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_drawing_is_sampling_by_the_same_noise(v: int, temperature: float) -> None:
    torch.manual_seed(v)
    b = 64 if CUDA else 8
    logits = torch.randn(b, v, device=DEVICE) * 3
    logits[:, 1] = float("-inf")
    noise = row_keys(0, 0, [str(i) for i in range(b)]).to(DEVICE)
    counts = torch.arange(b, dtype=torch.int32, device=DEVICE)
    tokens, logprobs = decode_kernels.draw(logits, noise, counts, temperature)
    plain = sample(logits, plain_uniforms(noise, counts), temperature, 1.0)
    assert torch.equal(tokens, plain.tokens)
    torch.testing.assert_close(logprobs, plain.logprobs, rtol=0, atol=2e-6)


def test_drawing_has_the_softmax_distribution() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, float("-inf"), 1.0, 0.0], device=DEVICE)
    n = 200_000 if CUDA else 200
    noise = row_keys(1, 0, [str(i) for i in range(n)]).to(DEVICE)
    tokens, _ = decode_kernels.draw(
        logits.expand(n, -1).contiguous(),
        noise,
        torch.zeros(n, dtype=torch.int32, device=DEVICE),
        1.0,
    )
    p = torch.softmax(logits.double().cpu(), 0)
    counts = torch.bincount(tokens.cpu(), minlength=6).double()
    kept = p > 0
    assert counts[~kept].sum() == 0
    # Chi-square with four degrees of freedom; 23.5 is exceeded one time in ten thousand, and the
    # noise is fixed.
    assert float(((counts - n * p)[kept] ** 2 / (n * p[kept])).sum()) < 23.5


def test_a_nan_logit_shows_in_the_log_probability() -> None:
    logits = torch.zeros(1, 8, device=DEVICE)
    logits[0, 3] = float("nan")
    tokens, logprobs = decode_kernels.draw(
        logits,
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
        1.0,
    )
    assert 0 <= int(tokens) < 8 and not bool(torch.isfinite(logprobs).all())


def test_rows_move_on_until_they_stop() -> None:
    state = dict(
        tokens=torch.tensor([5, 6, 7, 8], device=DEVICE),
        positions=torch.tensor([3, 4, 5, 6], dtype=torch.int32, device=DEVICE),
        counts=torch.tensor([0, 1, 3, 2], dtype=torch.int32, device=DEVICE),
        alive=torch.tensor([1, 1, 1, 0], dtype=torch.int32, device=DEVICE),
        responses=torch.zeros(4, 4, dtype=torch.int64, device=DEVICE),
        logprobs=torch.zeros(4, 4, device=DEVICE),
    )
    drawn, logprobs = (
        torch.tensor([9, 2, 9, 9], device=DEVICE),
        torch.tensor([-1.0, -2.0, -3.0, -4.0], device=DEVICE),
    )
    decode_kernels.advance(
        drawn,
        logprobs,
        torch.tensor([1, 2], device=DEVICE),
        torch.tensor([4], dtype=torch.int32, device=DEVICE),
        **state,
    )
    assert state["tokens"].tolist() == [9, 2, 9, 8]
    assert state["positions"].tolist() == [4, 5, 6, 6]
    assert state["counts"].tolist() == [1, 2, 4, 2]
    assert state["alive"].tolist() == [1, 0, 0, 0]  # goes on; a stop token; the limit; was dead
    assert state["responses"].tolist() == [[9, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 9], [0, 0, 0, 0]]
    assert state["logprobs"].tolist() == [[-1, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0, -3], [0, 0, 0, 0]]


# The decoder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"top_p": 0.7},
        {"eos_ids": [3, 246]},
        {"eos_ids": []},
        {"max_new_tokens": 1},
    ],
)
def test_it_answers_as_the_plain_decoder_does(on_any_device, model, prompts, changes) -> None:
    same(
        run(GraphDecoder(model, graphs=CUDA), prompts, **changes),
        run(CacheDecoder(model), prompts, **changes),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
)
def test_it_knows_llamas_variants(on_any_device, prompts, changes) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(**changes)).eval().to(DEVICE)
    same(run(GraphDecoder(model, graphs=CUDA), prompts), run(CacheDecoder(model), prompts))


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_waiting_prompts_take_the_places_of_ended_rows(on_any_device, model, prompts, rows) -> None:
    waiting = [p for p in prompts for _ in range(3)]
    keys = [str(i) for i in range(len(waiting))]
    settings = {
        "keys": keys,
        "max_new_tokens": 16,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 0,
        "eos_ids": [3],
        "pad_id": 4,
    }
    told: list[tuple[int, int]] = []
    got = generate(
        GraphDecoder(model, graphs=CUDA),
        waiting,
        max_rows=rows,
        progress=lambda done, total: told.append((done, total)),
        **settings,
    )
    assert len(set(got.mask.sum(1).tolist())) > 1
    same(got, generate(LlamaDecoder(model), waiting, **settings))
    assert told[-1] == (len(waiting), len(waiting)) and told == sorted(told)


def test_a_batch_stops_at_its_last_living_row(on_any_device, model, prompts, monkeypatch) -> None:
    decoder, steps = GraphDecoder(model, graphs=CUDA), []
    first = run(decoder, prompts, max_new_tokens=200)
    slots = next(iter(decoder._shapes.values()))
    step = type(slots).run
    monkeypatch.setattr(type(slots), "run", lambda self: steps.append(1) or step(self))
    same(run(decoder, prompts, max_new_tokens=200), first)
    assert int(first.mask.sum(1).max()) < 200
    # one step is under way when the last row is seen to have ended
    assert len(steps) <= int(first.mask.sum(1).max()) + 1


def test_a_graph_sees_changed_weights_and_no_old_cache(on_any_device, model, prompts) -> None:
    decoder = GraphDecoder(model, graphs=CUDA)
    before = run(decoder, prompts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    decoder.refresh()
    after = run(decoder, prompts)
    assert len(decoder._shapes) == 1 and after.responses.tolist() != before.responses.tolist()
    same(after, run(GraphDecoder(model, graphs=False), prompts))
    same(after, run(CacheDecoder(model), prompts))


def test_shapes_share_one_cache_in_which_nothing_old_is_read(on_any_device, model, prompts) -> None:
    decoder, plain = GraphDecoder(model, graphs=CUDA), CacheDecoder(model)
    few, long = prompts[:3], [prompt * 30 for prompt in prompts[:3]]
    same(run(decoder, prompts, max_new_tokens=70), run(plain, prompts, max_new_tokens=70))
    held = decoder._cache.data_ptr(), len(decoder._cache)
    decoder._cache.fill_(float("nan"))
    same(run(decoder, few), run(plain, few))
    assert len(decoder._shapes) == 2 and held == (decoder._cache.data_ptr(), len(decoder._cache))
    same(run(decoder, long), run(plain, long))
    # the old graphs read a cache that is no more
    assert len(decoder._shapes) == 1 and len(decoder._cache) > held[1]
    decoder.release()
    assert not decoder._shapes and not len(decoder._cache)
    same(run(decoder, few), run(plain, few))


def test_weights_that_moved_are_captured_anew(on_any_device, model, prompts) -> None:
    decoder = GraphDecoder(model, graphs=CUDA)
    run(decoder, prompts)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.data = -weight.data
    decoder.refresh()
    # off a GPU there is no graph that could go stale, so the answers alone would not tell
    assert not decoder._shapes
    same(run(decoder, prompts), run(CacheDecoder(model), prompts))


def test_lora_is_merged_at_every_refresh(on_any_device, prompts, tiny_policy) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    tuned = (
        get_peft_model(policy, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
        .eval()
        .to(DEVICE)
    )
    decoder = GraphDecoder(tuned, graphs=CUDA)
    run(decoder, prompts)
    for round_ in range(2):
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(
                        torch.randn(
                            parameter.shape,
                            generator=torch.Generator().manual_seed(len(name) + round_),
                        )
                        * 0.3
                    )
        decoder.refresh()
        same(run(decoder, prompts), run(CacheDecoder(tuned), prompts))


def test_weights_side_by_side_are_one_view() -> None:
    whole = torch.randn(6, 4)
    parts = list(whole.split([2, 1, 3]))
    view = side_by_side(parts)
    assert view is not None and view.data_ptr() == whole.data_ptr() and torch.equal(view, whole)
    assert side_by_side(parts[::-1]) is None
    assert side_by_side([parts[0], parts[2]]) is None
    assert side_by_side([whole[:, :2], whole[:, 2:]]) is None


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_greedy_is_that_of_transformers_in_float32(on_any_device, prompts) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).eval().to(DEVICE)
    got = run(GraphDecoder(model), prompts, temperature=0.0, eos_ids=[])
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=DEVICE)
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=4,
        )
        assert got.ids(row) == theirs[0, len(prompt) :].tolist()
