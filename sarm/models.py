"""A policy's or a judge's folder, looked over and opened: never random weights, never a surprise
after training.

    policy = open_policy(folder, "bfloat16")                    # in every phase that generates
    tokenizer = read_tokenizer(folder, chat_template_kwargs)
    check_policy(folder, chat_template_kwargs)                   # in fetch: all of it, at the door

docs/your-model.md lists what is asked of a model, and which families pass.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from sarm.config import UserError
from sarm.data.conversations import check_template, end_of_turn_id, stop_ids, use_template_kwargs
from sarm.model_files import Weights, check_finite, is_finite, read_json, refuse_altered

REFUSED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    AssertionError,
    IndexError,
    RuntimeError,
    StrictDataclassError,
)
"""What transformers raises on folders that it cannot open."""
AFTER_HEAD = {
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
}
"""Keys of config.json by which a model changes the logits behind its head, and the values under
which it does not: log-probabilities are computed here from the head's own.
"""
PROBE_TOKENS = 12
LEAST_POSITIONS = 32
"""A judge that reads less sees no answer."""
AGREE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Nats between the model's own forward and its head on its last states; 0.05 in half precision."""


def open_policy(folder: Path, dtype: str | torch.dtype) -> Any:
    """The causal language model in a folder, on the CPU, in eval mode, its weights all there and
    finite. Raises UserError saying what is wrong with it.
    """
    model = _opened(AutoModelForCausalLM, folder, "causal language model", dtype=dtype)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.data):
            raise UserError(
                f"{folder}: {name} holds values that are NaN or infinite; fetch the model again, or"
                " take another"
            )
    check_logits(model, str(folder))
    return model


def open_judge(folder: Path, dtype: str | torch.dtype) -> tuple[Any, PreTrainedTokenizerBase, int]:
    """(a classifier, its tokenizer with something to pad with, the longest text that it reads in
    tokens). Raises UserError.
    """
    model = _opened(AutoModelForSequenceClassification, folder, "classifier", dtype=dtype)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.data):
            raise UserError(f"{folder}: {name} holds values that are NaN or infinite")
    return model, *_judge_reading(model, folder)


def _judge_reading(model: Any, folder: Path) -> tuple[PreTrainedTokenizerBase, int]:
    tokenizer = _tokenizer(folder)
    longest = _positions(model, tokenizer)
    if longest < LEAST_POSITIONS:
        raise UserError(
            f"judge {folder} reads {longest} tokens at most, in which no question and answer fit;"
            " correct its max_position_embeddings or the tokenizer's model_max_length"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of judge {folder} has neither pad_token nor eos_token; set one"
            )
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token_id >= embedding_rows(model):
        raise UserError(
            f"judge {folder} pads with token {tokenizer.pad_token_id} and has embeddings for"
            f" {embedding_rows(model)}; set another pad_token"
        )
    return tokenizer, longest


def read_tokenizer(folder: Path, template_kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, whose chat template says what it is given. Raises UserError."""
    tokenizer = use_template_kwargs(_tokenizer(folder), template_kwargs)
    check_template(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Raises UserError where a tokenizer can give tokens that a model with `rows` embeddings has
    none for, or its template refuses a plain question and answer.

    Special tokens that no template writes may lie beyond: a text that spells one is text.
    """
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    reached = {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ not in special}
    reached |= {end_of_turn_id(tokenizer): "the end of a turn"}
    for token, id_ in (
        ("bos_token", tokenizer.bos_token_id),
        ("eos_token", tokenizer.eos_token_id),
    ):
        if id_ is not None:
            reached[id_] = token
    beyond = sorted(id_ for id_ in reached if id_ >= rows)
    if beyond:
        raise UserError(
            f"the tokenizer of {name} has token {beyond[0]} ({reached[beyond[0]]!r}) where the"
            f" model has {rows} embeddings; they do not belong together: take the tokenizer that"
            " the model was trained with"
        )


def check_policy(folder: Path, template_kwargs: Mapping[str, Any]) -> None:
    """All that training a policy and saving it needs of a folder, at the cost of reading its files
    once. Raises UserError.
    """
    check_files(folder)
    model = _opened(AutoModelForCausalLM, folder, "causal language model", device_map="meta")
    check_family(model, str(folder))
    tokenizer = read_tokenizer(folder, template_kwargs)
    check_policy_tokenizer(model, tokenizer, str(folder))
    check_saves(model, tokenizer, folder)
    check_finite(Weights(folder))


def check_judge(folder: Path) -> None:
    """A judge's folder, read once. Raises UserError."""
    model = _opened(AutoModelForSequenceClassification, folder, "classifier", device_map="meta")
    _judge_reading(model, folder)
    check_finite(Weights(folder))


def check_files(folder: Path) -> None:
    """Raises UserError where config.json or the weights are not there, quantised, or altered by
    what lies beside them, or generation_config.json says no stop tokens that can be read:
    transformers would go on without.
    """
    refuse_altered(folder, read_json(folder / "config.json"))
    Weights(folder)
    made = folder / "generation_config.json"
    if made.exists():
        stops = read_json(made).get("eos_token_id")
        listed = stops if isinstance(stops, list) else [0 if stops is None else stops]
        if not all(type(stop) is int and stop >= 0 for stop in listed):
            raise UserError(
                f"{made} has eos_token_id {stops!r}, which is no token or list of tokens; correct"
                " it"
            )


def check_policy_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises UserError where the policy cannot be asked or would never stop."""
    rows = embedding_rows(model)
    check_tokenizer(tokenizer, rows, name)
    for what, id_ in (
        *(("a stop token", id_) for id_ in stop_ids(model, tokenizer)),
        ("pad_token", tokenizer.pad_token_id),
    ):
        if id_ is not None and id_ >= rows:
            raise UserError(
                f"{name} has token {id_} as {what} and {rows} embeddings; correct its"
                " generation_config.json or tokenizer"
            )


def check_saves(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save what a trained policy is saved with, its weights aside, and open that again: what fails
    here would fail after training. Raises UserError.
    """
    with tempfile.TemporaryDirectory(prefix="sarm-") as scratch:
        try:
            model.config.save_pretrained(scratch)
            if (made := getattr(model, "generation_config", None)) is not None:
                made.save_pretrained(scratch)
                GenerationConfig.from_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            AutoTokenizer.from_pretrained(scratch)
        except REFUSED as error:
            raise UserError(
                f"{folder} can be opened but not saved again, so a policy trained from it could not"
                f" be either: {one_line(error)}; correct its generation_config.json, config.json or"
                " tokenizer"
            ) from None


def check_family(model: Any, name: str) -> None:
    """Raises UserError where a model computes log-probabilities otherwise than by `lm_head` on the
    last state of `model`, as sampler, trainer and reference do.
    """
    if not isinstance(getattr(model, "model", None), nn.Module) or not isinstance(
        getattr(model, "lm_head", None), nn.Linear
    ):
        raise UserError(
            f"{name} is a {model.config.model_type} model, whose layers and head are not where a"
            " policy's are looked for (`model`, `lm_head`); use another family"
        )
    config = model.config.get_text_config()
    for key, plain in AFTER_HEAD.items():
        value = getattr(config, key, None)
        if value not in plain:
            raise UserError(
                f"{name} has {key} {value}, by which a {model.config.model_type} model changes the"
                " logits behind its head; sampling and training would disagree: use another family"
            )


@torch.no_grad()
def check_logits(model: Any, name: str) -> None:
    """`check_family`, and that the head on the last states gives the model's own log-probabilities
    on a few tokens. Raises UserError.
    """
    check_family(model, name)
    model.eval()
    rows = embedding_rows(model)
    ids = (torch.arange(1, PROBE_TOKENS + 1, device=model.device) * 7919 % rows)[None]
    own = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    last = model.model(input_ids=ids, use_cache=False).last_hidden_state
    ours = model.lm_head(last).float().log_softmax(-1)
    off = float((own - ours).abs().max())
    if not off <= AGREE.get(model.dtype, 0.05):
        raise UserError(
            f"{name}: the log-probabilities of its own forward and of lm_head on its last states"
            f" differ by {off:.3g} nats; a {model.config.model_type} model cannot be trained here"
        )


def check_rotation(config: Any, longest: int, name: str) -> None:
    """Raises UserError where positions are turned by the longest row of a batch, so that a response
    would depend on its neighbours; `longest` is the longest row that a run has, in tokens.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    turning = rope.get("rope_type")
    reach = (
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )
    if turning in ("dynamic", "longrope") and longest > reach:
        raise UserError(
            f"{name} has rope_type {turning}, under which a response of more than {reach} tokens"
            f" depends on those beside it, and prompts and responses take up to {longest}; lower"
            " ppo.max_prompt_tokens or max_new_tokens"
        )


def embedding_rows(model: Any) -> int:
    """How many tokens a model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def _opened(kind: Any, folder: Path, what: str, **how: Any) -> Any:
    check_files(folder)
    try:
        model, told = kind.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **how,
        )
    except REFUSED as error:
        raise UserError(f"{folder} cannot be opened as a {what}: {one_line(error)}") from None
    for key, fault in (
        ("missing_keys", "lacks {n} tensors, such as {name}, and would run on random ones"),
        (
            "mismatched_keys",
            "has {n} tensors of another shape than config.json says, such as {name}",
        ),
    ):
        if names := sorted(str(name) for name in told.get(key) or ()):
            raise UserError(
                f"{folder} {fault.format(n=len(names), name=names[0])}; fetch the model again, or"
                " save it without a wrapper's prefix"
            )
    if told.get("error_msgs"):
        raise UserError(f"{folder} cannot be opened as a {what}: {told['error_msgs'][0]}")
    unread = [name for name in told.get("unexpected_keys") or () if _is_part(name, model)]
    if unread:
        raise UserError(
            f"{folder} holds {len(unread)} tensors that its config.json has no place for, such as"
            f" {min(unread)}; without them it is another model: correct config.json"
        )
    _refuse_untied(model, folder)
    return model.eval()


def _is_part(name: str, model: Any) -> bool:
    """Whether a tensor that was not read belongs to the model: in a module of its, or in one more
    layer than config.json counts.
    """
    modules = dict(model.named_modules())
    if name.rpartition(".")[0] in modules:
        return True
    lists = (name[: dot.start()] for dot in re.finditer(r"\.\d+\.", name))
    return any(isinstance(modules.get(before), nn.ModuleList) for before in lists)


def _refuse_untied(model: Any, folder: Path) -> None:
    """Raises UserError where config.json ties weights that the files hold twice and differently."""
    weights = Weights(folder)
    tied = getattr(model, "_tied_weights_keys", None) or {}
    if not model.config.get_text_config().tie_word_embeddings or not isinstance(tied, dict):
        return
    for name, other in tied.items():
        if (
            name in weights
            and other in weights
            and not torch.equal(*(weights.read(of) for of in (name, other)))
        ):
            raise UserError(
                f"{folder / 'config.json'} ties {name} to {other}, and the files hold two that"
                " differ; set tie_word_embeddings to false, or fetch the model again"
            )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except REFUSED as error:
        raise UserError(
            f"{folder} has no tokenizer that can be opened ({one_line(error)}); bring"
            " tokenizer.json and tokenizer_config.json"
        ) from None
    return tokenizer


def _positions(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest row that a classifier reads: RoBERTa's first positions are for padding."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    position = next(
        (m for n, m in model.named_modules() if n.endswith("position_embeddings")), None
    )
    if isinstance(position, nn.Embedding) and position.padding_idx is not None:
        limit = position.num_embeddings - position.padding_idx - 1
    return int(min(limit, tokenizer.model_max_length))


def one_line(error: BaseException) -> str:
    """What an exception says, short enough for a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
