"""SARM as a Hugging Face model: a Llama cut at half depth, a TopK SAE and a linear head (arXiv 2508.08746).

`SarmModel.from_pretrained(folder)` opens what upstream publishes, unconverted and without its code;
`encode_texts` scores conversations. The state at the reward position is taken before the SAE, so only one position
a text is encoded; SAE and head compute in float32 whatever the trunk's dtype.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm, rotate_half

from sarm.config import SarmConfig, UserError
from sarm.sae import TopKSae

Messages = Sequence[Mapping[str, str]]

TEMPLATE_DATE = "26 Jul 2024"
"""Given to chat templates that print a date: Llama 3.1's default; Llama 3.2 would otherwise print today's."""

MLP_TOKENS = 4096
"""Positions that go through an MLP at once."""


class SarmModelConfig(LlamaConfig):
    """A Llama config whose `num_hidden_layers` counts the layers kept, and the SAE's sizes."""

    model_type = "sarm"

    d_sae: int = 0
    k: int = 0
    use_topk: bool = True
    has_decoder: bool = True
    """Whether the checkpoint holds the SAE's decoder."""
    backbone: dict[str, Any] | None = None
    """`{"model": ..., "revision": ...}` where the Llama layers are another model's and not saved with this one."""

    @property
    def source_layer(self) -> int:
        """How many decoder layers run; the SAE reads what the last of them leaves in the residual stream."""
        return self.num_hidden_layers


@dataclass
class SarmOutput(ModelOutput):
    """What `SarmModel` returns."""

    logits: Tensor | None = None
    """(B, 1) the reward"""
    states: Tensor | None = None
    """(B, d_in) at the reward position"""
    latent_values: Tensor | None = None
    """(B, k) descending; (B, d_sae) without TopK"""
    latent_indices: Tensor | None = None
    """(B, k); None without TopK"""


class SarmModel(PreTrainedModel):
    """A SARM. Its parameters keep upstream's names: `model.*`, `sae.*`, `score.weight`."""

    config_class = SarmModelConfig
    config: SarmModelConfig
    base_model_prefix = "model"
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = {"sae", "score"}  # noqa: RUF012

    def __init__(self, config: SarmModelConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        # The SAE reads the bare residual stream; upstream's checkpoints carry a final norm that nothing runs.
        self.model.norm = nn.Identity()
        self.sae = TopKSae(config.hidden_size, config.d_sae, config.k, decoder=config.has_decoder)
        self.score = nn.Linear(config.d_sae, 1, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path_or_hub: str | Path,
        revision: str | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        use_topk: bool | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> SarmModel:
        """Open a SARM folder or hub repository: upstream's (either generation of config keys) or `save_pretrained`'s.

        `dtype` is the trunk's, the checkpoint's own by default. `use_topk` is needed where the config does not say
        whether TopK runs before the head. Other keywords go to `PreTrainedModel.from_pretrained`.
        Raises UserError where the folder is no whole SARM.
        """
        folder = _folder(path_or_hub, revision, local_files_only)
        keys = read_config(folder)
        backbone = keys.get("backbone")
        weights = [_Weights(folder)]
        if backbone:
            backbone_folder = _folder(backbone["model"], backbone.get("revision"), local_files_only)
            keys = read_config(backbone_folder) | keys
            weights.append(_Weights(backbone_folder))
        config = model_config(keys, folder, use_topk=use_topk, decoder="sae.decoder.weight" in weights[0])
        with torch.device("meta"):
            wanted = {name: parameter.shape for name, parameter in cls(config).named_parameters()}
        state = _read_tensors(wanted, weights, folder)
        if dtype is None:
            dtype = keys.get("dtype") or keys.get("torch_dtype") or "float32"
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        model = super().from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)
        model.config.name_or_path = str(path_or_hub)
        return model

    @classmethod
    def from_backbone(
        cls, model: str, revision: str | None = None, *, source_layer: int, d_sae: int, k: int, dtype: torch.dtype = torch.bfloat16, **kwargs: Any
    ) -> SarmModel:
        """The first layers of a Llama with an SAE and a head yet to be set; saved without those layers, by reference."""
        folder = _folder(model, revision, local_files_only=True)
        keys = read_config(folder) | {
            "num_hidden_layers": source_layer,
            "d_sae": d_sae,
            "k": k,
            "use_topk": True,
            "model_type": "sarm",
            "backbone": {"model": model, "revision": revision},
        }
        config = model_config(keys, folder)
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in cls(config).named_parameters()}
        own = {name: torch.zeros(shape) for name, shape in shapes.items() if not name.startswith("model.")}
        trunk = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
        state = _read_tensors(trunk, [_Weights(folder)], folder) | own
        return super().from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Save in this project's form, `model_type: sarm`; layers that `config.backbone` names are left out."""
        if self.config.backbone and "state_dict" not in kwargs:
            kwargs["state_dict"] = {name: t for name, t in self.state_dict().items() if not name.startswith("model.")}
        super().save_pretrained(save_directory, **kwargs)

    @property
    def d_sae(self) -> int:
        return self.config.d_sae

    @property
    def k(self) -> int:
        return self.config.k

    @property
    def head_weight(self) -> Tensor:
        """(d_sae,) float32: what a latent of value one adds to the reward."""
        return self.score.weight[0]

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None, reward_positions: Tensor | None = None) -> Tensor:
        """The residual stream after the source layer at one position a row, (B, d_in) in the SAE's dtype.

        `input_ids`, `attention_mask` (B, L), padded on either side; `reward_positions` (B,), by default the last
        position attended to. Pad and end-of-turn ids mean nothing here.
        """
        width = torch.arange(input_ids.shape[1], device=input_ids.device)
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if reward_positions is not None:
            real = real & (width <= reward_positions.unsqueeze(1))
        return self.packed_states(input_ids[real], real.sum(1).tolist())

    def packed_states(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """The residual stream after the source layer at each row's end, (B, d_in) in the SAE's dtype.

        `ids` (T,) are the rows' tokens one after another, without padding; `lengths` sum to T.
        """
        packed = _pack(lengths, ids.device)
        h = self.model.embed_tokens(ids)
        cos, sin = (t[0] for t in self.model.rotary_emb(h, packed.positions.unsqueeze(0)))
        for layer in self.model.layers[:-1]:
            h = _add_mlp(layer, h + _attention(layer.self_attn, _norm(layer.input_layernorm, h), cos, sin, packed))
        # Of the last layer one position a row is wanted; the others serve as keys and values alone.
        last = self.model.layers[-1]
        mixed = _attention_at_ends(last.self_attn, _norm(last.input_layernorm, h), cos, sin, packed)
        return _add_mlp(last, h[packed.ends] + mixed).to(self.sae.pre_bias.dtype)

    def rewards(self, values: Tensor, indices: Tensor) -> Tensor:
        """The reward of sparse latents, (B, k) each, to (B,)."""
        return (values * self.head_weight[indices]).sum(-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, reward_positions: Tensor | None = None) -> SarmOutput:
        """Score rows of tokens; arguments as for `states`."""
        states = self.states(input_ids, attention_mask, reward_positions)
        a = self.sae.preactivations(states)
        if not self.config.use_topk:
            return SarmOutput(logits=self.score(a), states=states, latent_values=a)
        values, indices = self.sae.topk(a)
        return SarmOutput(logits=self.rewards(values, indices).unsqueeze(-1), states=states, latent_values=values, latent_indices=indices)


class _Packed(NamedTuple):
    """Where rows of different lengths lie one after another: everything but attention runs on real positions alone."""

    positions: Tensor
    """(T,) within its row"""
    rows: Tensor
    """(T,)"""
    ends: Tensor
    """(B,) packed index of each row's last position"""
    padded: Tensor
    """(B, L) packed index of each position; behind a row's end, its last: no causal query there is ever read"""


def _pack(lengths: Sequence[int], device: torch.device) -> _Packed:
    counts = torch.tensor(lengths)
    starts = counts.cumsum(0) - counts
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    positions = torch.arange(len(rows)) - starts[rows]
    padded = starts.unsqueeze(1) + torch.minimum(torch.arange(int(counts.max())), counts.unsqueeze(1) - 1)
    return _Packed(*(t.to(device, non_blocking=True) for t in (positions, rows, starts + counts - 1, padded)))


def _norm(norm: LlamaRMSNorm, h: Tensor) -> Tensor:
    """LlamaRMSNorm by the fused kernel; on the CPU the same to the bit."""
    return nn.functional.rms_norm(h, h.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (N, heads, head_dim) by (N, head_dim) each."""
    return heads * cos.unsqueeze(1) + rotate_half(heads) * sin.unsqueeze(1)


def _attention(attention: LlamaAttention, normed: Tensor, cos: Tensor, sin: Tensor, packed: _Packed) -> Tensor:
    """Causal attention within each row, (T, d_in) to (T, d_in)."""
    heads = (normed.shape[0], -1, attention.head_dim)
    queries = _rotate(attention.q_proj(normed).view(heads), cos, sin)[packed.padded].transpose(1, 2)
    keys = _rotate(attention.k_proj(normed).view(heads), cos, sin)[packed.padded].transpose(1, 2)
    values = attention.v_proj(normed).view(heads)[packed.padded].transpose(1, 2)
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=attention.scaling, enable_gqa=True)
    return attention.o_proj(mixed.transpose(1, 2)[packed.rows, packed.positions].flatten(1))


def _attention_at_ends(attention: LlamaAttention, normed: Tensor, cos: Tensor, sin: Tensor, packed: _Packed) -> Tensor:
    """What `_attention` gives at each row's end, (T, d_in) to (B, d_in)."""
    heads, ends = (normed.shape[0], -1, attention.head_dim), packed.ends
    keys = _rotate(attention.k_proj(normed).view(heads), cos, sin)[packed.padded].transpose(1, 2)
    values = attention.v_proj(normed).view(heads)[packed.padded].transpose(1, 2)
    queries = _rotate(attention.q_proj(normed[ends]).view(len(ends), -1, attention.head_dim), cos[ends], sin[ends])
    # The heads that share keys and values stand where the queries of several positions would.
    queries = queries.view(len(ends), keys.shape[1], -1, attention.head_dim)
    seen = torch.arange(keys.shape[2], device=ends.device) <= packed.positions[ends].unsqueeze(1)
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen[:, None, None, :], scale=attention.scaling)
    return attention.o_proj(mixed.flatten(1))


def _add_mlp(layer: LlamaDecoderLayer, h: Tensor) -> Tensor:
    """The second half of a decoder layer, some positions at a time: its wide middle would else set the peak of memory."""
    return h + torch.cat([layer.mlp(_norm(layer.post_attention_layernorm, part)) for part in h.split(MLP_TOKENS)])


# Opening checkpoints


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises UserError."""
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json; give the folder of a SARM") from None
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON ({error}); fetch the model again") from None
    if keys.get("model_type") not in ("llama", "sarm"):
        raise UserError(f"{folder} is a {keys.get('model_type')} model; only the Llama family is supported")
    return keys


def model_config(keys: dict[str, Any], folder: Path, *, use_topk: bool | None = None, decoder: bool = True) -> SarmModelConfig:
    """A config of ours from config.json's keys: our own, upstream's nested `sarm_param`, or its older flat ones.

    Raises UserError where a size is missing, or whether TopK runs is neither said nor given: folder names lie
    ("woTopK" has "TopK" in it).
    """
    nested = keys.get("sarm_param") or {}
    candidates = {
        "source_layer": (
            keys.get("num_hidden_layers") if keys["model_type"] == "sarm" else None,
            nested.get("sae_source_layer"),
            keys.get("sae_hidden_state_source_layer"),
        ),
        "d_sae": (keys.get("d_sae"), nested.get("sae_latent_size"), keys.get("sae_latent_size")),
        "k": (keys.get("k"), nested.get("sae_k"), keys.get("sae_k")),
        "use_topk": (keys.get("use_topk"), nested.get("sarm_use_activation"), keys.get("sarm_use_topk")),
    }
    found: dict[str, Any] = {}
    for name, values in candidates.items():
        said = {value for value in values if value is not None}
        if len(said) > 1:
            raise UserError(f"{folder / 'config.json'} gives {name} twice, as {' and '.join(map(str, sorted(said)))}; correct it")
        found[name] = said.pop() if said else None
    for name, upstream in (("source_layer", "sae_source_layer"), ("d_sae", "sae_latent_size"), ("k", "sae_k")):
        if not isinstance(found[name], int) or found[name] < 1:
            raise UserError(f"{folder / 'config.json'} does not give {upstream} in sarm_param as a positive number, so it is no SARM's; add it if it is")
    if found["use_topk"] is None and use_topk is None:
        raise UserError(f"{folder / 'config.json'} does not say whether TopK runs before the head; set sarm.use_topk to true or false")
    if found["use_topk"] is not None and use_topk is not None and bool(found["use_topk"]) != use_topk:
        raise UserError(f"sarm.use_topk is {use_topk} but {folder / 'config.json'} says {bool(found['use_topk'])}; leave sarm.use_topk out")
    if found["k"] > found["d_sae"]:
        raise UserError(f"{folder / 'config.json'} keeps k {found['k']} of {found['d_sae']} latents; correct it")
    # What is set below, what upstream means for its own code, and what `from_pretrained` decides.
    dropped = {"model_type", "architectures", "auto_map", "num_hidden_layers", "has_decoder", "tie_word_embeddings", "dtype", "torch_dtype"}
    llama = {key: value for key, value in keys.items() if key not in dropped | found.keys() and not key.startswith(("sae_", "sarm_"))}
    return SarmModelConfig(
        **llama,
        num_hidden_layers=found["source_layer"],
        d_sae=found["d_sae"],
        k=found["k"],
        use_topk=bool(found["use_topk"] if use_topk is None else use_topk),
        has_decoder=decoder,
        tie_word_embeddings=False,
    )


class _Weights:
    """A folder's safetensors, one file or shards, by tensor name."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else sorted(p.name for p in folder.glob("*.safetensors"))
        if not names:
            raise UserError(f"{folder} holds no safetensors; pickled weights are not read, convert them first")
        self.files: dict[str, Path] = {}
        for name in names:
            try:
                with safe_open(folder / name, "pt") as tensors:
                    self.files |= dict.fromkeys(tensors.keys(), folder / name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{folder / name} cannot be read ({error}); fetch the model again") from None

    def __contains__(self, name: str) -> bool:
        return name in self.files


def _read_tensors(wanted: Mapping[str, torch.Size], weights: Sequence[_Weights], folder: Path) -> dict[str, Tensor]:
    """The wanted tensors and no others, each from the first folder that has it. Raises UserError on missing ones and other shapes."""
    missing = [name for name in wanted if not any(name in w for w in weights)]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} tensors, such as {missing[0]}; it is no whole SARM, fetch it again")
    where: dict[Path, list[str]] = {}
    for name in wanted:
        where.setdefault(next(w.files[name] for w in weights if name in w), []).append(name)
    state: dict[str, Tensor] = {}
    for file, names in where.items():
        with safe_open(file, "pt") as tensors:
            # Copied out of the mapped file: there a tensor's alignment, and with it a product's rounding, depends on the file's layout.
            state |= {name: tensors.get_tensor(name).clone() for name in names}
    for name, tensor in state.items():
        if tensor.shape != wanted[name]:
            raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)} where config.json makes it {tuple(wanted[name])}; correct config.json")
    return state


def _folder(model: str | Path, revision: str | None, local_files_only: bool) -> Path:
    if os.path.isdir(model):
        return Path(model)
    from sarm.hub import local_model

    return local_model(str(model), revision, download=not local_files_only)


def load_sarm(config: SarmConfig, device: torch.device | str | None = None) -> tuple[SarmModel, PreTrainedTokenizerBase]:
    """The configured SARM and its tokenizer, on the current GPU where there is one; without network. Raises UserError."""
    folder = _folder(config.model, config.revision, local_files_only=True)
    model = SarmModel.from_pretrained(folder, dtype=config.dtype, use_topk=config.use_topk, local_files_only=True)
    tokenizer = load_tokenizer(config)
    nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, tokenizer


class SaeAndHead(NamedTuple):
    """The part of a SARM after its backbone, on the CPU in float32."""

    sae: TopKSae
    head_weight: Tensor
    """(d_sae,)"""
    config: SarmModelConfig


def load_sae(config: SarmConfig) -> SaeAndHead:
    """The configured SARM without its decoder layers, which are not read. Raises UserError."""
    folder = _folder(config.model, config.revision, local_files_only=True)
    keys, weights = read_config(folder), [_Weights(folder)]
    if backbone := keys.get("backbone"):
        keys = read_config(_folder(backbone["model"], backbone.get("revision"), local_files_only=True)) | keys
    settings = model_config(keys, folder, use_topk=config.use_topk, decoder="sae.decoder.weight" in weights[0])
    sae = TopKSae(settings.hidden_size, settings.d_sae, settings.k, decoder=settings.has_decoder)
    wanted = {f"sae.{name}": parameter.shape for name, parameter in sae.named_parameters()} | {"score.weight": torch.Size([1, settings.d_sae])}
    state = {name: tensor.float() for name, tensor in _read_tensors(wanted, weights, folder).items()}
    head_weight = state.pop("score.weight")[0]
    sae.load_state_dict({name.removeprefix("sae."): tensor for name, tensor in state.items()})
    return SaeAndHead(sae, head_weight, settings)


def load_tokenizer(config: SarmConfig) -> PreTrainedTokenizerBase:
    """The configured SARM's tokenizer: its own, else its backbone's."""
    folder = _folder(config.model, config.revision, local_files_only=True)
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    backbone = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("backbone")
    if not own and backbone:
        folder = _folder(backbone["model"], backbone.get("revision"), local_files_only=True)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


# From conversations to tokens


class Tokenized(NamedTuple):
    """One conversation as tokens."""

    ids: list[int]
    """Up to the reward position: what comes after it cannot change the state there."""
    reward_position: int
    """Of the end-of-turn token that closes the last assistant turn."""
    truncated: bool
    """Whether the oldest tokens were dropped to fit."""
    eot_appended: bool
    """Whether the template left the last turn open."""


def tokenize_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int) -> Tokenized:
    """Apply the chat template: one BOS, and the end-of-turn token of the last turn as reward position.

    An end-of-turn token inside a text does not end it. A turn that the template leaves open, as of a response cut
    short, gets the token appended. Longer than `max_length`, a conversation keeps its BOS and its newest tokens.
    """
    return tokenize_conversations(tokenizer, [messages], max_length)[0]


def tokenize_conversations(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], max_length: int) -> list[Tokenized]:
    """`tokenize_conversation` for many at once: the tokenizer shares them out among cores."""
    eot, bos = end_of_turn_id(tokenizer), tokenizer.bos_token_id
    tokenized = []
    for ids in template_ids(tokenizer, conversations):
        last = len(ids) - 1 - ids[::-1].index(eot) if eot in ids else -1
        closed = last >= 0 and _is_blank(tokenizer, ids[last + 1 :])
        ids = ids[: last + 1] if closed else [*ids, eot]
        truncated = len(ids) > max_length
        if truncated:
            first = ids[:1] if ids[0] == bos and max_length > 1 else []
            ids = first + ids[len(ids) - max_length + len(first) :]
        tokenized.append(Tokenized(ids, len(ids) - 1, truncated, not closed))
    return tokenized


def template_ids(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], **template: Any) -> list[list[int]]:
    """Each conversation's tokens under the chat template, with exactly one BOS where the tokenizer has a use for one.

    `template` goes to the template, such as `add_generation_prompt=True`.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; use an instruct model's tokenizer")
    if not conversations:
        return []
    texts = [str(tokenizer.apply_chat_template([dict(m) for m in c], tokenize=False, date_string=TEMPLATE_DATE, **template)) for c in conversations]
    # JSON can carry half a surrogate pair, which is no text to a tokenizer.
    texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    # Most templates write the BOS themselves; with special tokens on, tokenising would add a second.
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        rows = [ids if ids[:1] == [bos] else [bos, *ids] for ids in rows]
    return rows


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special token with which the chat template closes an assistant turn; the tokenizer's eos where it leaves it open."""
    return _end_of_turn_id(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=8)
def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> int:
    ids = template_ids(tokenizer, [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])[0]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = max((i for i, id_ in enumerate(ids) if id_ in special), default=-1)
    if last >= 0 and _is_blank(tokenizer, ids[last + 1 :]):
        return ids[last]
    if tokenizer.eos_token_id is None:
        raise UserError(f"the chat template of {tokenizer.name_or_path} ends a turn with no special token and there is no eos_token; set one")
    return tokenizer.eos_token_id


def _is_blank(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    return not ids or not str(tokenizer.decode(ids)).strip()


# Scoring


class Encoded(NamedTuple):
    """What a SARM makes of n conversations, in the order they were given; on the CPU."""

    indices: Tensor
    """(n, k + extra) int32"""
    values: Tensor
    """(n, k + extra) float32, descending; ranks beyond k are runners-up, no latents"""
    rewards: Tensor
    """(n,) float32"""
    states: Tensor
    """(n, d_in) float32, at the reward position"""
    n_tokens: Tensor
    """(n,) int32, after truncation"""
    truncated: Tensor
    """(n,) bool: oldest tokens dropped to fit"""
    eot_appended: Tensor
    """(n,) bool: the last turn was left open"""


def encode_texts(
    model: SarmModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    *,
    extra_ranks: int,
    tokens_per_batch: int,
    max_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Encode and score conversations, in batches of like length of at most `tokens_per_batch` padded tokens.

    Which batch a text falls in changes its figures by rounding alone. `progress` hears of (texts done, texts).
    Raises UserError where TopK is off or a state is not finite.
    """
    if not model.config.use_topk:
        raise UserError(f"{model.config.name_or_path} runs no TopK before its head, so it has no sparse latents to encode; use a TopK SARM")
    tokenized = tokenize_conversations(tokenizer, conversations, max_length)
    n, ranks = len(tokenized), min(model.k + extra_ranks, model.d_sae)
    dtype = model.sae.pre_bias.dtype
    states = torch.empty(n, model.config.hidden_size, dtype=dtype)
    values, indices = torch.empty(n, ranks, dtype=dtype), torch.empty(n, ranks, dtype=torch.int32)
    rewards, done = torch.empty(n, dtype=dtype), 0
    with torch.inference_mode():
        for rows in length_batches([len(t.ids) for t in tokenized], tokens_per_batch):
            batch = [tokenized[row] for row in rows]
            ids = torch.tensor([id_ for t in batch for id_ in t.ids])
            h = model.packed_states(ids.to(model.device), [len(t.ids) for t in batch])
            if not h.isfinite().all():
                bad = rows[int((~h.isfinite().all(-1)).nonzero()[0])]
                where = f"{model.config.name_or_path} gives a state that is not finite on conversation {bad}"
                raise UserError(f"{where}; set sarm.dtype to float32 or check its weights")
            top = model.sae.topk(model.sae.preactivations(h), ranks)
            states[rows], values[rows], indices[rows] = h.cpu(), top.values.cpu(), top.indices.cpu().int()
            rewards[rows] = model.rewards(top.values[:, : model.k], top.indices[:, : model.k]).cpu()
            done += len(rows)
            if progress is not None:
                progress(done, n)
    return Encoded(
        indices,
        values,
        rewards,
        states,
        torch.tensor([len(t.ids) for t in tokenized], dtype=torch.int32),
        torch.tensor([t.truncated for t in tokenized], dtype=torch.bool),
        torch.tensor([t.eot_appended for t in tokenized], dtype=torch.bool),
    )


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Rows in batches of like length, longest first, each padded to at most `tokens_per_batch` tokens or of one row."""
    rows: list[int] = []
    # Longest first: what does not fit in memory fails at once.
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if rows and lengths[rows[0]] * (len(rows) + 1) > tokens_per_batch:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
