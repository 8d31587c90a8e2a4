"""A policy's or judge's folder at the door: every fault is one sentence that names it, in fetch and
where the model is opened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from jobs.fetch import look_over
from sarm.config import ChatModelConfig, EvaluateConfig, SarmConfig, UserError
from sarm.data.conversations import check_system
from sarm.model_files import Weights, is_finite
from sarm.models import (
    check_judge,
    check_policy,
    check_rotation,
    open_judge,
    open_policy,
    read_tokenizer,
)
from sarm.reward_model.model import SarmModel, check_sarm, load_sae, load_sarm
from tests.tiny import CHAT_TEMPLATE, llama_config, tiny_tokenizer

WHOLE = "model.safetensors"


def edit(file: Path, **keys: Any) -> None:
    tree = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (tree | keys).items() if v is not None}))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / WHOLE)
    state = change(state) or state
    save_file(state, folder / WHOLE, metadata={"format": "pt"})


def put(name: str, at: tuple[int, ...], value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name][at] = value

    return change


def retokenize(folder: Path, add: list[str] | None = None, **changes: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if add:
        tokenizer.add_tokens(add)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def stored(folder: Path, dtype: torch.dtype) -> None:
    tensors(folder, lambda state: {name: t.mul(9).to(dtype) for name, t in state.items()})


def template(folder: Path, silenced: str) -> None:
    """A chat template that leaves out what one role says."""
    content = "{{ message['content'] | trim }}"
    assert content in CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(
        CHAT_TEMPLATE.replace(
            content, f"{{% if message['role'] != '{silenced}' %}}{content}{{% endif %}}"
        )
    )


def dangling(folder: Path) -> None:
    (folder / WHOLE).unlink()
    (folder / WHOLE).symlink_to("../blobs/nowhere")


def cut(folder: Path) -> None:
    (folder / WHOLE).write_bytes((folder / WHOLE).read_bytes()[:-100])


def pointer(folder: Path) -> None:
    (folder / WHOLE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


def index(folder: Path, weight_map: Any) -> None:
    (folder / WHOLE).rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


SHARD = "model-00001-of-00001.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / WHOLE).unlink(), r"holds neither model\.safetensors nor"),
    "another name": (lambda f: (f / WHOLE).rename(f / "old.safetensors"), r"only old\.safetensors"),
    "a link that leads nowhere": (dangling, "leads nowhere"),
    "cut short": (cut, "cannot be read"),
    "a git-LFS pointer": (pointer, "git lfs pull"),
    "an index of a missing shard": (lambda f: index(f, {UP: "x.safetensors"}), "is missing"),
    "an index of missing tensors": (lambda f: index(f, {"lost": SHARD}), "such as lost"),
    "an empty index": (lambda f: index(f, {}), "no weight_map"),
    "an index of another folder's file": (lambda f: index(f, {UP: "../x"}), r"names '\.\./x'"),
    "an index of no file": (lambda f: index(f, {UP: None}), "names None"),
    "weights in 8 bits": (lambda f: stored(f, torch.float8_e4m3fn), "is stored as F8_E4M3"),
    "weights in whole numbers": (lambda f: stored(f, torch.int8), "is stored as I8"),
    "a quantised config": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "fp8"}),
        "has a quantization_config",
    ),
    "an adapter beside": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter"),
    "a config whose sizes are words": (
        lambda f: edit(f / "config.json", hidden_size="big"),
        "hidden_size",
    ),
    "a config of no activation": (lambda f: edit(f / "config.json", hidden_act="nope"), "nope"),
    "a template without the answers": (
        lambda f: template(f, "assistant"),
        "leaves out or rewrites what the assistant says",
    ),
    "a template of the last turn alone": (
        lambda f: (f / "chat_template.jinja").write_text(
            CHAT_TEMPLATE.replace("in messages %}", "in messages[-1:] %}")
        ),
        "leaves out or rewrites what the user says",
    ),
    "a template that opens no turn": (
        lambda f: (f / "chat_template.jinja").write_text(
            CHAT_TEMPLATE.replace("if add_generation_prompt", "if false")
        ),
        r"opens no assistant turn.*assistant<\|end_header_id\|>",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "a config cut short": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
}
POLICY: dict[str, tuple[Callable[[Path], Any], str]] = {
    "fewer layers than its weights": (
        lambda f: edit(f / "config.json", num_hidden_layers=1),
        r"9 tensors that its config\.json has no place for.*layers\.1",
    ),
    "ties weights that differ": (
        lambda f: edit(f / "config.json", tie_word_embeddings=True),
        "ties lm_head.*two that differ",
    ),
    "stops at words": (
        lambda f: edit(f / "generation_config.json", eos_token_id="<|eot_id|>"),
        "eos_token_id '<",
    ),
    "stops below zero": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[3, -1]),
        r"eos_token_id \[3, -1\]",
    ),
    "a generation config cut short": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ['),
        r"generation_config\.json is not JSON",
    ),
    "one tensor missing": (
        lambda f: tensors(f, lambda s: {n: t for n, t in s.items() if n != UP}),
        f"lacks 1.*{UP}",
    ),
    "a wrapper's prefix": (
        lambda f: tensors(f, lambda s: {f"module.{k}": v for k, v in s.items()}),
        "lacks 21 tensors.*prefix",
    ),
    "another shape": (
        lambda f: edit(f / "config.json", intermediate_size=60),
        "another shape.*mlp",
    ),
    "a bias": (
        lambda f: tensors(
            f, lambda s: s | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
        ),
        "no place for.*q_proj.bias",
    ),
    "NaN": (lambda f: tensors(f, put(UP, (3, 5), float("nan"))), f"{UP} holds.*NaN"),
    "inf": (
        lambda f: tensors(f, put("lm_head.weight", (9, 1), float("-inf"))),
        "lm_head.*infinite",
    ),
    "no tokenizer": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "no tokenizer|embeddings",
    ),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    "a word beyond the embedding": (lambda f: retokenize(f, add=["zyzzyva"]), "'zyzzyva'.*384"),
    "pads beyond": (
        lambda f: retokenize(f, pad_token="<|new pad|>"),
        "as pad_token and 384 embeddings",
    ),
    "stops beyond": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[3, 999]),
        "999 as a stop token",
    ),
    "a generation config that cannot be saved": (
        lambda f: edit(f / "generation_config.json", num_return_sequences=3),
        "num_return_sequences",
    ),
    "attention that is not here": (
        lambda f: edit(f / "config.json", attn_implementation="flash_attention_3"),
        "cannot be opened",
    ),
    "an unknown architecture": (
        lambda f: edit(f / "config.json", model_type="mamba9"),
        "cannot be opened.*mamba9",
    ),
    "caps its logits": (
        lambda f: edit(f / "config.json", final_logit_softcapping=30.0),
        "final_logit_softcapping 30.0",
    ),
}


@pytest.mark.parametrize("fault", [*FILES, *POLICY])
def test_a_faulty_policy_is_refused_at_the_door(
    fault: str, tiny_policy: Path, tmp_path: Path
) -> None:
    change, says = (FILES | POLICY)[fault]
    folder = Path(shutil.copytree(tiny_policy, tmp_path / "policy"))
    change(folder)
    with pytest.raises(UserError, match=says) as told:
        check_policy(folder, {})
    assert "\n" not in str(told.value)


OPENED = (
    "one tensor missing",
    "NaN",
    "a bias",
    "an adapter beside",
    "fewer layers than its weights",
    "ties weights that differ",
    "weights in 8 bits",
    "a generation config cut short",
)


@pytest.mark.parametrize("fault", OPENED)
def test_and_where_it_is_opened(fault: str, tiny_policy: Path, tmp_path: Path) -> None:
    change, says = (FILES | POLICY)[fault]
    folder = Path(shutil.copytree(tiny_policy, tmp_path / "policy"))
    change(folder)
    with pytest.raises(UserError, match=says):
        open_policy(folder, "float32")


def test_a_whole_policy_passes_whatever_lies_beside_its_weights(
    tiny_policy: Path, tmp_path: Path
) -> None:
    """A copy under another name, a stale index, a value head of a trainer: none is taken."""
    folder = Path(shutil.copytree(tiny_policy, tmp_path / "policy"))
    other = {name: tensor * 0 for name, tensor in load_file(folder / WHOLE).items()}
    save_file(other, folder / "model_old.safetensors", metadata={"format": "pt"})
    save_file(other, folder / SHARD, metadata={"format": "pt"})
    weight_map = dict.fromkeys(other, SHARD)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tensors(folder, lambda state: state | {"v_head.summary.weight": torch.zeros(1, 32)})
    check_policy(folder, {})
    opened = open_policy(folder, "float32")
    theirs = load_file(tiny_policy / WHOLE)
    assert all(torch.equal(p, theirs[name]) for name, p in opened.named_parameters())


SARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bias of the encoder": (
        lambda f: tensors(f, lambda s: s | {"sae.encoder.bias": torch.ones(64)}),
        r"sae\.encoder\.bias.*does not compute with",
    ),
    "a bias of the head": (
        lambda f: tensors(f, lambda s: s | {"score.bias": torch.ones(1)}),
        r"score\.bias",
    ),
    "a threshold": (
        lambda f: tensors(f, lambda s: s | {"sae.threshold": torch.ones(64)}),
        r"sae\.threshold",
    ),
    "NaN in the encoder": (
        lambda f: tensors(f, put("sae.encoder.weight", (7, 5), float("nan"))),
        r"sae\.encoder\.weight holds.*NaN",
    ),
    "inf in the head": (
        lambda f: tensors(f, put("score.weight", (0, 7), float("inf"))),
        r"score\.weight holds.*infinite",
    ),
}


def sarm_param(**keys: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        param = json.loads((folder / "config.json").read_text())["sarm_param"]
        edit(folder / "config.json", sarm_param=param | keys)

    return change


SARM |= {
    "an untrained head": (
        lambda f: tensors(f, lambda s: s | {"score.weight": 0 * s["score.weight"]}),
        r"score\.weight is zero everywhere",
    ),
    "an untrained encoder": (
        lambda f: tensors(f, lambda s: s | {"sae.encoder.weight": 0 * s["sae.encoder.weight"]}),
        r"sae\.encoder\.weight is zero everywhere",
    ),
    "a k that is true": (sarm_param(sae_k=True), "sae_k"),
    "a list of ks": (sarm_param(sae_k=[8]), "sae_k"),
    "TopK in words": (sarm_param(sarm_use_activation="false"), "'false' for whether TopK"),
    "sizes in a list": (lambda f: edit(f / "config.json", sarm_param=[8]), r"sarm_param \[8\]"),
    "layers of a word": (lambda f: edit(f / "config.json", backbone="x"), "backbone 'x'"),
    "layers of nobody": (lambda f: edit(f / "config.json", backbone={}), r"backbone \{\}"),
}
SARM_WHOLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bias of a layer": (
        lambda f: tensors(
            f, lambda s: s | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
        ),
        r"q_proj\.bias",
    ),
    "NaN in a layer": (lambda f: tensors(f, put(UP, (0, 0), float("nan"))), f"{UP} holds"),
    "a rotation by the batch": (
        lambda f: edit(
            f / "config.json", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}
        ),
        "rope_type longrope",
    ),
    "a word beyond the embedding": (lambda f: retokenize(f, add=["zyzzyva"]), "'zyzzyva'.*384"),
}


@pytest.mark.parametrize("fault", [*FILES, *SARM, *SARM_WHOLE])
def test_a_faulty_sarm_is_refused_at_the_door(fault: str, tiny_sarm: Path, tmp_path: Path) -> None:
    change, says = (FILES | SARM | SARM_WHOLE)[fault]
    folder = Path(shutil.copytree(tiny_sarm, tmp_path / "sarm"))
    change(folder)
    config = SarmConfig(model=str(folder), dtype="float32")
    with pytest.raises(UserError, match=says):
        check_sarm(config)
    if "config" not in fault:
        with pytest.raises(UserError, match=says):
            load_sarm(config, device="cpu")


@pytest.mark.parametrize("fault", SARM)
def test_so_is_its_sae_by_itself(fault: str, tiny_sarm: Path, tmp_path: Path) -> None:
    change, says = SARM[fault]
    folder = Path(shutil.copytree(tiny_sarm, tmp_path / "sarm"))
    change(folder)
    with pytest.raises(UserError, match=says):
        load_sae(SarmConfig(model=str(folder)))


def test_what_a_sarm_does_not_use_may_be_odd(tiny_sarm: Path, tmp_path: Path) -> None:
    """Its own attention is computed, nothing is padded, and special tokens come from the template
    alone: a [PAD] beyond the embeddings, as upstream's training adds, is never reached.
    """
    folder = Path(shutil.copytree(tiny_sarm, tmp_path / "sarm"))
    edit(folder / "config.json", attn_implementation="flash_attention_2", pad_token_id=384)
    retokenize(folder, pad_token="[PAD]")
    check_sarm(SarmConfig(model=str(folder), dtype="float32"))
    model, tokenizer = load_sarm(SarmConfig(model=str(folder), dtype="float32"), device="cpu")
    assert len(tokenizer) == 385 and model.config.vocab_size == 384
    theirs = load_file(tiny_sarm / WHOLE)
    assert torch.equal(model.score.weight, theirs["score.weight"])


def test_other_safetensors_beside_a_sarm_are_not_read(tiny_sarm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sarm, tmp_path / "sarm"))
    other = {name: -tensor for name, tensor in load_file(folder / WHOLE).items()}
    save_file(other, folder / "zz.safetensors", metadata={"format": "pt"})
    theirs = load_file(tiny_sarm / WHOLE)
    assert torch.equal(SarmModel.from_pretrained(folder).score.weight, theirs["score.weight"])
    sae, head, _ = load_sae(SarmConfig(model=str(folder)))
    assert torch.equal(head, theirs["score.weight"][0])
    assert torch.equal(sae.encoder.weight, theirs["sae.encoder.weight"])


@pytest.mark.parametrize("how", [{"dtype": "auto"}, {}, {"torch_dtype": torch.bfloat16}])
def test_a_sarms_dtype_is_the_one_asked_for(how: Any, tiny_sarm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sarm, tmp_path / "sarm"))
    edit(folder / "config.json", dtype="float64")
    wanted = how.get("torch_dtype", torch.float64)
    assert SarmModel.from_pretrained(folder, **how).model.embed_tokens.weight.dtype == wanted
    with pytest.raises(UserError, match="no dtype 'half of it'"):
        SarmModel.from_pretrained(folder, dtype="half of it")


def test_finite_is_told_by_sums_that_do_not_overflow() -> None:
    large = torch.full((1000,), 3e38)
    assert is_finite(large) and is_finite(large.bfloat16()) and is_finite(torch.arange(3))
    assert is_finite(torch.full((1000,), 60000.0, dtype=torch.float16))
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not is_finite(torch.tensor([1.0, bad, -bad]).half())


def test_a_rotation_by_the_longest_row_is_refused_where_rows_get_that_long() -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    config = llama_config()
    config.rope_parameters = rope
    check_rotation(config, 64, "m")
    with pytest.raises(UserError, match=r"more than 64 tokens.*up to 65"):
        check_rotation(config, 65, "m")
    check_rotation(llama_config(), 10_000, "m")


# Judges

LABELS: dict[str, Any] = {
    "id2label": {0: "safe", 1: "unsafe"},
    "label2id": {"safe": 0, "unsafe": 1},
}
SMALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def write_judge(folder: Path, model: Any, **changes: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "longest"), [("bert", 64), ("roberta", 60), ("llama without pad", 4096)]
)
def test_a_published_judge_is_padded_and_cut_at_its_positions(
    kind: str, longest: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    if kind == "bert":
        model: Any = BertForSequenceClassification(BertConfig(**SMALL, **LABELS))
    elif kind == "roberta":  # whose positions begin behind the padding's
        model = RobertaForSequenceClassification(RobertaConfig(**SMALL, **LABELS, pad_token_id=3))
    else:
        model = LlamaForSequenceClassification(llama_config(pad_token_id=None, **LABELS))
    unset = {"pad_token": None} if "without" in kind else {"model_max_length": int(1e30)}
    folder = write_judge(tmp_path / "judge", model, **unset)
    check_judge(folder)
    opened, tokenizer, found = open_judge(folder, "float32")
    assert found == longest
    rows = tokenizer(
        ["word " * 999, "a"],
        truncation=True,
        max_length=min(found, 99),
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        together = opened(**rows).logits
        alone = opened(**tokenizer(["a"], return_tensors="pt")).logits
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: edit(f / "config.json", num_hidden_layers=1), "9 tensors.*no place for"),
        (lambda f: edit(f / "config.json", max_position_embeddings=9), "reads 9 tokens at most"),
        (lambda f: edit(f / "tokenizer_config.json", model_max_length=3), "reads 3 tokens at most"),
        (lambda f: stored(f, torch.float8_e5m2), "F8_E5M2"),
    ],
    ids=["layers", "positions", "longest text", "8 bits"],
)
def test_a_faulty_judge_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    model = LlamaForSequenceClassification(llama_config(**LABELS))
    folder = write_judge(tmp_path / "judge", model)
    check_judge(folder)
    change(folder)
    for look in (check_judge, lambda judge: open_judge(judge, "float32")):
        with pytest.raises(UserError, match=says):
            look(folder)


def test_a_system_prompt_that_the_template_drops_is_refused_for_the_arm_that_needs_it(
    tiny_policy: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_policy, tmp_path / "policy"))
    check_system(read_tokenizer(folder, {}))
    template(folder, "system")
    model = ChatModelConfig(model=str(folder))
    look_over(model, folder, EvaluateConfig(arms=("best_of_n",)))
    with pytest.raises(UserError, match=r"leaves system messages out.*evaluate\.arms"):
        look_over(model, folder, EvaluateConfig(arms=("prompted",)))


def test_a_judge_without_its_head_is_refused(tiny_policy: Path) -> None:
    with pytest.raises(UserError, match=r"lacks 1 tensors, such as score\.weight"):
        check_judge(tiny_policy)


def test_a_folder_without_tensors_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no safetensors"):
        Weights(tmp_path)
