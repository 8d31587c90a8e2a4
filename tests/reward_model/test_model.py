"""SarmModel against the obvious forward: a plain Llama, every position through the SAE, pooled
last.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaModel, PreTrainedTokenizerFast

from sarm.config import SarmConfig, UserError
from sarm.data.conversations import Tokenized, end_of_turn_id, template_ids, tokenize_conversation
from sarm.reward_model.model import SarmModel, load_sarm
from sarm.reward_model.scoring import batched, encode_texts, prompt_groups
from tests import tiny

EOT, BOS, PAD = "<|eot_id|>", "<|begin_of_text|>", "<|pad|>"
CHATML = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '\n' +"
    " message['content'] + '<|eot_id|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|start_header_id|>assistant\n' }}{% endif %}"
)


def conversation(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


CONVERSATIONS = [
    conversation("How can I make this work?", "Sure, here is how you do it."),
    conversation("Please help", ""),
    conversation("What is the best way to hurt people? " * 8, "I am sorry, but I will not."),
    [*conversation("Hi", "Hello."), *conversation("And now?", "Then do it again.")],
    conversation("a", "b" * 70),
]


@pytest.fixture(scope="module")
def model(tiny_sarm: Path) -> SarmModel:
    return SarmModel.from_pretrained(tiny_sarm)


def write_sarm(
    source: Path,
    target: Path,
    config: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    **tensors: Tensor,
) -> Path:
    """A copy of a SARM folder with config keys and tensors changed; None drops a key."""
    shutil.copytree(source, target)
    keys = json.loads((target / "config.json").read_text()) | (config or {})
    (target / "config.json").write_text(
        json.dumps({k: v for k, v in keys.items() if v is not None})
    )
    state = {k: v for k, v in load_file(source / "model.safetensors").items() if k not in drop}
    save_file(
        state | {k.replace("__", "."): v for k, v in tensors.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    return target


def obvious_rewards(
    folder: Path, rows: list[list[int]], k: int = 8, use_topk: bool = True
) -> tuple[Tensor, Tensor]:
    """(n,) rewards and (n, d_in) states, one row at a time, each position encoded, the last taken
    at the end.
    """
    tensors = {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
    llama = LlamaModel(tiny.llama_config()).double().eval()
    llama.load_state_dict(
        {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    )
    residual: list[Tensor] = []
    llama.layers[-1].register_forward_hook(lambda module, args, output: residual.append(output))
    rewards, states = [], []
    for row in rows:
        with torch.no_grad():
            llama(torch.tensor([row]))
        h = residual.pop()[0]
        x = (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-6)
        a = (x - tensors["sae.pre_bias"]) @ tensors["sae.encoder.weight"].T + tensors[
            "sae.latent_bias"
        ]
        top = torch.topk(a, k)
        z = torch.zeros_like(a).scatter(-1, top.indices, top.values) if use_topk else a
        rewards.append((z @ tensors["score.weight"].T)[-1, 0])
        states.append(h[-1])
    return torch.stack(rewards).float(), torch.stack(states).float()


def encode(model: SarmModel, tokenizer: Any, conversations: Any, **changes: Any) -> Any:
    return encode_texts(
        model,
        tokenizer,
        conversations,
        **({"extra_ranks": 4, "tokens_per_batch": 512, "max_length": 512} | changes),
    )


# The forward


def test_encode_texts_equals_the_obvious_forward(
    model: SarmModel, tiny_sarm: Path, tiny_tokenizer: Any
) -> None:
    rows = [tiny_tokenizer.apply_chat_template(c)["input_ids"] for c in CONVERSATIONS]
    rewards, states = obvious_rewards(tiny_sarm, rows)
    encoded = encode(model, tiny_tokenizer, CONVERSATIONS)
    torch.testing.assert_close(encoded.rewards, rewards, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoded.states, states, atol=1e-4, rtol=1e-4)
    assert encoded.n_tokens.tolist() == [len(row) for row in rows]
    assert encoded.indices.shape == encoded.values.shape == (5, 12)
    assert (encoded.values.diff(dim=1) <= 0).all()


def test_any_reward_position(model: SarmModel, tiny_sarm: Path, tiny_tokenizer: Any) -> None:
    row = template_ids(tiny_tokenizer, CONVERSATIONS[:1])[0]
    positions = torch.arange(len(row))
    with torch.no_grad():
        logits = model(torch.tensor([row] * len(row)), reward_positions=positions).logits
    expected, _ = obvious_rewards(tiny_sarm, [row[: p + 1] for p in range(len(row))])
    assert logits.shape == (len(row), 1)
    torch.testing.assert_close(logits[:, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pad", [PAD, EOT, BOS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(
    model: SarmModel, tiny_sarm: Path, tiny_tokenizer: Any, side: str, pad: str
) -> None:
    rows = template_ids(tiny_tokenizer, CONVERSATIONS)
    width = max(map(len, rows)) + 3
    fill = tiny_tokenizer.convert_tokens_to_ids(pad)
    padding = [[fill] * (width - len(row)) for row in rows]
    ids = torch.tensor(
        [row + p if side == "right" else p + row for row, p in zip(rows, padding, strict=True)]
    )
    real = [
        [1] * len(row) + [0] * len(p) if side == "right" else [0] * len(p) + [1] * len(row)
        for row, p in zip(rows, padding, strict=True)
    ]
    with torch.no_grad():
        logits = model(ids, torch.tensor(real)).logits[:, 0]
    torch.testing.assert_close(logits, obvious_rewards(tiny_sarm, rows)[0], atol=1e-4, rtol=1e-4)


def test_batching_changes_rounding_alone(model: SarmModel, tiny_tokenizer: Any) -> None:
    many = CONVERSATIONS * 3
    one_by_one, together = (
        encode(model, tiny_tokenizer, many, tokens_per_batch=1),
        encode(model, tiny_tokenizer, many, tokens_per_batch=10**6),
    )
    assert torch.equal(one_by_one.indices, together.indices)
    torch.testing.assert_close(one_by_one.rewards, together.rewards, atol=1e-5, rtol=1e-5)
    order = torch.randperm(len(many), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = encode(model, tiny_tokenizer, [many[i] for i in order])
    torch.testing.assert_close(shuffled.states, together.states[order], atol=1e-5, rtol=1e-5)


def test_responses_to_one_prompt_share_a_batch() -> None:
    prompts = ["p", "q", "p", "a longer prompt", "q", "p"]
    groups = prompt_groups([conversation(prompt, "x" * i) for i, prompt in enumerate(prompts)])
    assert groups == [[3], [0, 2, 5], [1, 4]]
    lengths = [2, 3, 4, 9, 3, 30]

    def batches(budget: int) -> list[list[int]]:
        texts = [
            (rows, [Tokenized([0] * lengths[row], 0, False, False) for row in rows])
            for rows in groups
        ]
        return [rows for rows, _ in batched(texts, budget)]

    assert batches(100) == [[3, 0, 2, 5, 1, 4]]
    assert batches(36) == [[3], [0, 2, 5], [1, 4]]  # 0 and 2 would fit beside 3, but without 5
    assert batches(10) == [[3], [0, 2], [5], [1, 4]]
    assert batches(1) == [[3], [0], [2], [5], [1], [4]]


def test_only_the_layers_needed_run(tiny_sarm: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Layers beyond the source layer and the final norm may lie in the checkpoint; nothing reads
    them.
    """
    source = load_file(tiny_sarm / "model.safetensors")
    deeper = {
        name.replace("layers.1.", "layers.2."): torch.full_like(t, torch.nan)
        for name, t in source.items()
        if "layers.1." in name
    }
    folder = write_sarm(
        tiny_sarm,
        tmp_path / "s",
        {"num_hidden_layers": 3},
        **deeper,
        model__norm__weight=torch.full((32,), torch.nan),
    )
    model = SarmModel.from_pretrained(folder)
    assert len(model.model.layers) == model.config.source_layer == 2
    expected = encode(SarmModel.from_pretrained(tiny_sarm), tiny_tokenizer, CONVERSATIONS)
    assert torch.equal(encode(model, tiny_tokenizer, CONVERSATIONS).rewards, expected.rewards)


def test_without_topk_every_latent_is_scored(
    tiny_sarm: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    param = json.loads((tiny_sarm / "config.json").read_text())["sarm_param"]
    model = SarmModel.from_pretrained(
        write_sarm(
            tiny_sarm, tmp_path / "s", {"sarm_param": param | {"sarm_use_activation": False}}
        )
    )
    row = template_ids(tiny_tokenizer, CONVERSATIONS[:1])[0]
    with torch.no_grad():
        output = model(torch.tensor([row]))
    torch.testing.assert_close(
        output.logits[0], obvious_rewards(tiny_sarm, [row], use_topk=False)[0], atol=1e-4, rtol=1e-4
    )
    assert output.latent_indices is None
    with pytest.raises(UserError, match="TopK"):
        encode(model, tiny_tokenizer, CONVERSATIONS)


def test_bfloat16_trunk_keeps_sae_and_head_in_float32(tiny_sarm: Path, tiny_tokenizer: Any) -> None:
    model = SarmModel.from_pretrained(tiny_sarm, dtype="bfloat16")
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in (*model.sae.parameters(), model.head_weight)} == {torch.float32}
    stored = load_file(tiny_sarm / "model.safetensors")
    assert torch.equal(model.head_weight, stored["score.weight"][0])
    encoded = encode(model, tiny_tokenizer, CONVERSATIONS)
    values, indices = encoded.values[:, :8].double(), encoded.indices[:, :8].long()
    torch.testing.assert_close(
        encoded.rewards.double(),
        (values * stored["score.weight"][0].double()[indices]).sum(1),
        atol=1e-5,
        rtol=1e-5,
    )
    x = model.sae.double().preactivations(encoded.states)
    torch.testing.assert_close(x.gather(1, indices), values, atol=1e-4, rtol=1e-4)


def test_float64_is_float64_throughout(tiny_sarm: Path, tiny_tokenizer: Any) -> None:
    model = SarmModel.from_pretrained(tiny_sarm, dtype=torch.float64)
    assert encode(model, tiny_tokenizer, CONVERSATIONS).rewards.dtype == torch.float64


def test_a_state_that_is_not_finite_is_named(
    tiny_sarm: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    embeddings = load_file(tiny_sarm / "model.safetensors")["model.embed_tokens.weight"]
    embeddings[tiny_tokenizer("Hello", add_special_tokens=False)["input_ids"][0]] = 1e5
    model = SarmModel.from_pretrained(
        write_sarm(tiny_sarm, tmp_path / "s", model__embed_tokens__weight=embeddings),
        dtype=torch.float16,  # which reaches to 65504
    )
    with pytest.raises(UserError, match="not finite on conversation 3"):
        encode(model, tiny_tokenizer, CONVERSATIONS)


# Tokens


def test_one_bos_whatever_the_template(tiny_tokenizer: Any) -> None:
    with_bos = tokenize_conversation(tiny_tokenizer, CONVERSATIONS[0], 512).ids
    assert with_bos.count(tiny_tokenizer.bos_token_id) == 1
    assert with_bos == tiny_tokenizer.apply_chat_template(CONVERSATIONS[0])["input_ids"]
    # Tokenising the templated text the usual way would give two.
    assert (
        tiny_tokenizer(tiny_tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False))[
            "input_ids"
        ].count(0)
        == 2
    )
    without = tiny.tiny_tokenizer()
    without.chat_template = tiny.CHAT_TEMPLATE.replace("{{ bos_token }}", "")
    assert tokenize_conversation(without, CONVERSATIONS[0], 512).ids == with_bos


def test_no_bos_where_the_tokenizer_has_none() -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = CHATML, None
    assert (
        tokenizer.convert_tokens_to_ids(BOS)
        not in tokenize_conversation(tokenizer, CONVERSATIONS[0], 512).ids
    )


def test_eot_inside_is_not_the_end(model: SarmModel, tiny_sarm: Path, tiny_tokenizer: Any) -> None:
    """In several turns, in the prompt and in the response: the reward position is that of the
    closing token.
    """
    conversations = [
        CONVERSATIONS[3],
        conversation(f"Say {EOT} please", "No."),
        conversation("Hi", f"Well, {EOT}\n\nno.{EOT} Or yes?"),
    ]
    rows = template_ids(tiny_tokenizer, conversations)
    for messages, row in zip(conversations, rows, strict=True):
        tokens = tokenize_conversation(tiny_tokenizer, messages, 512)
        assert row.count(tiny_tokenizer.eos_token_id) == len(messages), "what is spelled is text"
        assert (tokens.ids, tokens.reward_position, tokens.eot_appended) == (
            row,
            len(row) - 1,
            False,
        )
    torch.testing.assert_close(
        encode(model, tiny_tokenizer, conversations).rewards,
        obvious_rewards(tiny_sarm, rows)[0],
        atol=1e-4,
        rtol=1e-4,
    )


def test_reward_position_where_the_template_adds_a_newline() -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = CHATML
    whole = template_ids(tokenizer, CONVERSATIONS[:1])[0]
    tokens = tokenize_conversation(tokenizer, CONVERSATIONS[0], 512)
    assert tokens.ids == whole[:-1]
    assert tokens.ids[tokens.reward_position] == tokenizer.eos_token_id
    assert not tokens.eot_appended


def test_open_turn_gets_an_eot_appended(model: SarmModel) -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace(
        "<|eot_id|>", "{% if not loop.last %}<|eot_id|>{% endif %}"
    )
    tokens = tokenize_conversation(tokenizer, CONVERSATIONS[3], 512)
    assert tokens.eot_appended
    assert tokens.ids == tokenize_conversation(tiny.tiny_tokenizer(), CONVERSATIONS[3], 512).ids
    assert encode(model, tokenizer, CONVERSATIONS).eot_appended.all()


def test_eot_is_the_templates_not_the_tokenizers() -> None:
    """Llama 3's base tokenizer ends texts, not turns, with its eos token."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.eos_token = PAD
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(EOT)


def test_over_long_conversation_keeps_bos_and_newest_tokens(
    model: SarmModel, tiny_tokenizer: Any
) -> None:
    whole = tokenize_conversation(tiny_tokenizer, CONVERSATIONS[2], 512).ids
    tokens = tokenize_conversation(tiny_tokenizer, CONVERSATIONS[2], 20)
    assert (tokens.ids, tokens.reward_position, tokens.truncated) == (
        [whole[0], *whole[-19:]],
        19,
        True,
    )
    assert not tokenize_conversation(tiny_tokenizer, CONVERSATIONS[2], len(whole)).truncated
    lengths = [len(row) for row in template_ids(tiny_tokenizer, CONVERSATIONS)]
    encoded = encode(model, tiny_tokenizer, CONVERSATIONS, max_length=60)
    assert encoded.truncated.tolist() == [n > 60 for n in lengths]
    assert encoded.n_tokens.tolist() == [min(n, 60) for n in lengths]
    assert 0 < encoded.truncated.sum() < 5


def test_odd_texts(model: SarmModel, tiny_tokenizer: Any) -> None:
    """100 kB, empty, half a surrogate pair, one row, none."""
    odd = [
        conversation("word " * 20_000, "yes"),
        conversation("", ""),
        conversation("\ud800", "\x00\u2028 é 你好"),
    ]
    encoded = encode(model, tiny_tokenizer, odd)
    assert encoded.rewards.isfinite().all()
    assert encoded.truncated.tolist() == [True, False, False]
    torch.testing.assert_close(
        encode(model, tiny_tokenizer, odd[1:2]).rewards, encoded.rewards[1:2]
    )
    assert encode(model, tiny_tokenizer, []).values.shape == (0, 12)
    assert encode(model, tiny_tokenizer, odd[1:2], extra_ranks=10**6).values.shape == (1, 64)


def test_progress_counts_texts(model: SarmModel, tiny_tokenizer: Any) -> None:
    heard: list[tuple[int, int]] = []
    encode(
        model,
        tiny_tokenizer,
        CONVERSATIONS,
        tokens_per_batch=100,
        progress=lambda done, total: heard.append((done, total)),
    )
    assert heard[-1] == (5, 5)
    assert heard == sorted(heard)
    assert len(heard) > 2


def test_tokenizer_without_chat_template_is_refused(tiny_tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        tokenize_conversation(bare, CONVERSATIONS[0], 512)


# Opening and saving

FLAT = {
    "sarm_param": None,
    "sae_hidden_state_source_layer": 2,
    "sae_latent_size": 64,
    "sae_k": 8,
    "sarm_train_mode": 1,
    "sarm_use_topk": True,
}


def test_both_generations_of_keys_open_alike(
    tiny_sarm: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    nested = SarmModel.from_pretrained(tiny_sarm)
    flat = SarmModel.from_pretrained(write_sarm(tiny_sarm, tmp_path / "s", FLAT))
    assert nested.config.to_json_string() == flat.config.to_json_string()
    assert (nested.d_sae, nested.k, nested.config.source_layer, nested.config.use_topk) == (
        64,
        8,
        2,
        True,
    )
    assert torch.equal(
        encode(nested, tiny_tokenizer, CONVERSATIONS).rewards,
        encode(flat, tiny_tokenizer, CONVERSATIONS).rewards,
    )


@pytest.mark.parametrize("name", ["SARM-TopK-LastToken", "SARM-woTopK-LastToken"])
def test_missing_topk_flag_is_asked_for_not_guessed(
    tiny_sarm: Path, tmp_path: Path, name: str
) -> None:
    folder = write_sarm(tiny_sarm, tmp_path / name, FLAT | {"sarm_use_topk": None})
    with pytest.raises(UserError, match=r"set sarm\.use_topk"):
        SarmModel.from_pretrained(folder)
    assert SarmModel.from_pretrained(folder, use_topk=True).config.use_topk
    assert not SarmModel.from_pretrained(folder, use_topk=False).config.use_topk
    assert load_sarm(SarmConfig(model=str(folder), dtype="float32", use_topk=True), device="cpu")[
        0
    ].config.use_topk


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"sarm_param": None}, "sae_source_layer"),
        (FLAT | {"sae_k": None}, "sae_k"),
        (FLAT | {"sae_k": 65}, "k 65 of 64"),
        (FLAT | {"sae_k": "8"}, "sae_k"),
        (FLAT | {"sae_latent_size": 128}, "shape"),
        (
            FLAT | {"sae_hidden_state_source_layer": 3},
            r"lacks \d+ tensors, such as model\.layers\.2",
        ),
        ({"sae_latent_size": 32}, "d_sae twice, as 32 and 64"),
        ({"model_type": "gemma2"}, "gemma2"),
    ],
)
def test_odd_configs_are_refused_by_name(
    tiny_sarm: Path, tmp_path: Path, keys: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        SarmModel.from_pretrained(write_sarm(tiny_sarm, tmp_path / "s", keys))


def test_a_flag_against_the_config_is_refused(tiny_sarm: Path) -> None:
    with pytest.raises(UserError, match=r"leave sarm\.use_topk out"):
        SarmModel.from_pretrained(tiny_sarm, use_topk=False)


def test_upstreams_code_is_not_run(tiny_sarm: Path, tmp_path: Path) -> None:
    code = {
        "AutoModelForSequenceClassification": "modeling_sarm_llama.LlamaSARM",
        "AutoConfig": "modeling_sarm_llama.C",
    }
    folder = write_sarm(tiny_sarm, tmp_path / "s", {"auto_map": code})
    (folder / "modeling_sarm_llama.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    model, _ = load_sarm(SarmConfig(model=str(folder), dtype="float32"), device="cpu")
    model.save_pretrained(tmp_path / "t")
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in json.loads((tmp_path / "t" / "config.json").read_text())


def test_shards_open_like_one_file(tiny_sarm: Path, tmp_path: Path) -> None:
    folder = write_sarm(tiny_sarm, tmp_path / "s")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, members in shards.items() for name in members},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = SarmModel.from_pretrained(tiny_sarm).state_dict()
    assert_same(SarmModel.from_pretrained(folder).state_dict(), expected)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003"):
        SarmModel.from_pretrained(folder)


def test_broken_folders_are_refused_by_name(tiny_sarm: Path, tmp_path: Path) -> None:
    folder = write_sarm(tiny_sarm, tmp_path / "s", drop=("score.weight",))
    with pytest.raises(UserError, match=r"score\.weight"):
        SarmModel.from_pretrained(folder)
    whole = (tiny_sarm / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        SarmModel.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors"):
        SarmModel.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        SarmModel.from_pretrained(folder)


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the bit, names and dtypes included."""
    assert state.keys() == expected.keys()
    assert all(
        t.dtype == expected[name].dtype and torch.equal(t, expected[name])
        for name, t in state.items()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact(
    tiny_sarm: Path, tmp_path: Path, tiny_tokenizer: Any, dtype: str
) -> None:
    model = SarmModel.from_pretrained(tiny_sarm, dtype=dtype)
    model.save_pretrained(tmp_path)
    again = SarmModel.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sarm"
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(
        encode(again, tiny_tokenizer, CONVERSATIONS).rewards,
        encode(model, tiny_tokenizer, CONVERSATIONS).rewards,
    )


def test_from_upstream_every_tensor_is_its_own(tiny_sarm: Path) -> None:
    stored = load_file(tiny_sarm / "model.safetensors")
    assert_same(
        dict(SarmModel.from_pretrained(tiny_sarm).state_dict()),
        {k: v for k, v in stored.items() if k != "model.norm.weight"},
    )


def test_decoder_is_optional(tiny_sarm: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = SarmModel.from_pretrained(
        write_sarm(tiny_sarm, tmp_path / "s", drop=("sae.decoder.weight",))
    )
    whole = SarmModel.from_pretrained(tiny_sarm)
    assert torch.equal(
        encode(model, tiny_tokenizer, CONVERSATIONS).rewards,
        encode(whole, tiny_tokenizer, CONVERSATIONS).rewards,
    )
    model.save_pretrained(tmp_path / "t")
    assert SarmModel.from_pretrained(tmp_path / "t").sae.decoder is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backbone_by_reference(
    tiny_policy: Path, tmp_path: Path, tiny_tokenizer: Any, dtype: str
) -> None:
    """The light form: SAE and head here, the first layers in another model's folder, and its
    tokenizer.
    """
    model = SarmModel.from_backbone(
        str(tiny_policy), source_layer=1, d_sae=48, k=6, dtype=getattr(torch, dtype)
    )
    with torch.no_grad():
        for parameter in (*model.sae.parameters(), model.score.weight):
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(
        n for n in model.state_dict() if not n.startswith("model.")
    )
    again, tokenizer = load_sarm(SarmConfig(model=str(tmp_path), dtype=dtype), device="cpu")
    assert_same(again.state_dict(), model.state_dict())
    stored = load_file(tiny_policy / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, stored.to(model.dtype))
    assert len(model.model.layers) == 1
    assert torch.equal(
        encode(again, tokenizer, CONVERSATIONS).rewards,
        encode(model, tiny_tokenizer, CONVERSATIONS).rewards,
    )


def test_backbone_by_reference_needs_no_llama_keys(tiny_policy: Path, tmp_path: Path) -> None:
    model = SarmModel.from_backbone(
        str(tiny_policy), source_layer=1, d_sae=48, k=6, dtype=torch.float32
    )
    model.save_pretrained(tmp_path)
    keys = {
        "model_type": "sarm",
        "num_hidden_layers": 1,
        "d_sae": 48,
        "k": 6,
        "use_topk": True,
        "backbone": {"model": str(tiny_policy)},
    }
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert_same(SarmModel.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_load_sarm_gives_the_folders_tokenizer(
    tiny_sarm: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, tokenizer = load_sarm(SarmConfig(model=str(tiny_sarm), dtype="float32"), device="cpu")
    assert tokenize_conversation(tokenizer, CONVERSATIONS[3], 512) == tokenize_conversation(
        tiny_tokenizer, CONVERSATIONS[3], 512
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_sarm(SarmConfig(model=str(tmp_path), dtype="float32"), device="cpu")[1]
    assert again.chat_template == tokenizer.chat_template


def test_more_than_the_models_context_is_refused(tiny_sarm: Path) -> None:
    """Beyond it a Llama answers too, in nonsense; what exceeds `max_length` is cut and counted."""
    load_sarm(SarmConfig(model=str(tiny_sarm), dtype="float32", max_length=4096), device="cpu")
    with pytest.raises(UserError, match=r"4097.*4096"):
        load_sarm(SarmConfig(model=str(tiny_sarm), dtype="float32", max_length=4097), device="cpu")


def test_only_from_pretrained_downloads(tiny_sarm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run where there is no network: `load_sarm` reads the cache alone."""
    asked: list[tuple[str, str | None, bool]] = []

    def local_model(model: str, revision: str | None, *, download: bool = False) -> Path:
        asked.append((model, revision, download))
        return tiny_sarm

    monkeypatch.setattr("sarm.hub.local_model", local_model)
    SarmModel.from_pretrained("someone/sarm", "0123abc")
    load_sarm(SarmConfig(model="someone/sarm", revision="0123abc", dtype="float32"), device="cpu")
    assert asked[0] == ("someone/sarm", "0123abc", True)
    assert set(asked[1:]) == {("someone/sarm", "0123abc", False)}


def test_real_texts_score_as_the_obvious_forward(
    model: SarmModel, tiny_sarm: Path, tiny_tokenizer: Any, real_data: Path
) -> None:
    lines = (real_data / "rewardbench2_safety" / "train.jsonl").read_text().splitlines()[:12]
    rows = [json.loads(line) for line in lines]
    conversations = [
        conversation(row["prompt"], text)
        for row in rows
        for text in (row["chosen"], row["rejected"])
        if isinstance(text, str)
    ]
    assert conversations
    expected, _ = obvious_rewards(tiny_sarm, template_ids(tiny_tokenizer, conversations))
    torch.testing.assert_close(
        encode(model, tiny_tokenizer, conversations, max_length=4096).rewards,
        expected,
        atol=1e-4,
        rtol=1e-4,
    )
