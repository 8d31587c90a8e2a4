"""SARM as a Hugging Face model: a Llama cut at half depth, a TopK SAE and a linear head (arXiv
2508.08746).

`SarmModel.from_pretrained(folder)` opens what upstream publishes, unconverted and without its code;
`sarm.reward_model.scoring` scores conversations. The state at the reward position is taken before
the SAE, so only one position a text is encoded; SAE and head compute in float32 whatever the
trunk's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

from sarm.config import SarmConfig, UserError
from sarm.llama.packed import Packed, end_states, pack
from sarm.llama.weights import join_projections
from sarm.model_files import Weights, check_finite, read_tensors
from sarm.models import REFUSED, check_tokenizer, one_line, read_tokenizer
from sarm.reward_model.adapter import merge_adapter, read_adapter
from sarm.reward_model.sae import TopKSae
from sarm.reward_model.weights import (
    TRAINED,
    SarmModelConfig,
    check_tensors,
    model_config,
    model_folder,
    open_folder,
    read_config,
    refuse_untrained,
)


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
        # The SAE reads the bare residual stream; upstream's checkpoints carry a final norm that
        # nothing runs.
        self.model.norm = nn.Identity()
        self.sae = TopKSae(config.hidden_size, config.d_sae, config.k, decoder=config.has_decoder)
        self.score = nn.Linear(config.d_sae, 1, bias=False)
        self.adapter: dict[str, Tensor] = {}
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
        """Open a SARM folder or hub repository: upstream's (either generation of config keys) or
        `save_pretrained`'s.

        `dtype` is the trunk's, the checkpoint's own by default. `use_topk` is needed where the
        config does not say whether TopK runs before the head. Other keywords go to
        `PreTrainedModel.from_pretrained`. Raises UserError where the folder is no whole SARM.
        """
        opened = open_folder(
            path_or_hub, revision, use_topk=use_topk, local_files_only=local_files_only
        )
        wanted = cls.shapes(opened.config)
        check_tensors(opened, wanted)
        state = read_tensors(wanted, opened.weights, opened.folder)
        adapter = read_adapter(opened, wanted)
        merge_adapter(state, adapter)
        dtype = dtype or kwargs.pop("torch_dtype", None)
        if dtype in (None, "auto"):
            dtype = opened.keys.get("dtype") or opened.keys.get("torch_dtype") or "float32"
        if isinstance(dtype, str):
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise UserError(f"{path_or_hub}: there is no dtype {dtype!r}; say float32")
            dtype = getattr(torch, dtype)
        model = super().from_pretrained(
            None, config=opened.config, state_dict=state, dtype=dtype, **kwargs
        )
        model.config.name_or_path = str(path_or_hub)
        model.adapter = adapter
        return model

    @classmethod
    def shapes(cls, config: SarmModelConfig) -> dict[str, torch.Size]:
        """Every tensor of such a SARM; makes none. Raises UserError where transformers cannot
        build it.
        """
        try:
            with torch.device("meta"):
                model = cls(config)
        except REFUSED as error:
            raise UserError(
                f"no SARM can be built as config.json says ({one_line(error)}); fetch it again"
            ) from None
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    @classmethod
    def from_backbone(
        cls,
        model: str,
        revision: str | None = None,
        *,
        source_layer: int,
        d_sae: int,
        k: int,
        dtype: torch.dtype = torch.bfloat16,
        **kwargs: Any,
    ) -> SarmModel:
        """The first layers of a Llama with an SAE and a head yet to be set; saved without those
        layers, by reference.
        """
        folder = model_folder(model, revision, local_files_only=True)
        keys = read_config(folder) | {
            "num_hidden_layers": source_layer,
            "d_sae": d_sae,
            "k": k,
            "use_topk": True,
            "model_type": "sarm",
            "backbone": {"model": model, "revision": revision},
        }
        config = model_config(keys, folder)
        shapes = cls.shapes(config)
        own = {
            name: torch.zeros(shape)
            for name, shape in shapes.items()
            if not name.startswith("model.")
        }
        trunk = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
        state = read_tensors(trunk, [Weights(folder)], folder) | own
        return super().from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Save in this project's form, `model_type: sarm`; layers that `config.backbone` names are
        left out, and what was added to them is kept.
        """
        if self.config.backbone and "state_dict" not in kwargs:
            kwargs["state_dict"] = self.adapter | {
                name: t for name, t in self.state_dict().items() if not name.startswith("model.")
            }
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

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        reward_positions: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the source layer at one position a row, (B, d_in) in the SAE's
        dtype.

        `input_ids`, `attention_mask` (B, L), padded on either side; `reward_positions` (B,), by
        default the last position attended to. Pad and end-of-turn ids mean nothing here.
        """
        width = torch.arange(input_ids.shape[1], device=input_ids.device)
        real = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask.bool()
        )
        if reward_positions is not None:
            real = real & (width <= reward_positions.unsqueeze(1))
        rows = [
            [id_ for id_, is_real in zip(*row, strict=True) if is_real]
            for row in zip(input_ids.tolist(), real.tolist(), strict=True)
        ]
        return self.packed_states(pack(rows, input_ids.device))

    def packed_states(self, packed: Packed) -> Tensor:
        """The residual stream after the source layer at each row's end, (B, d_in) in the SAE's
        dtype.
        """
        return end_states(self.model, packed).to(self.sae.pre_bias.dtype)

    def rewards(self, values: Tensor, indices: Tensor) -> Tensor:
        """The reward of sparse latents, (B, k) each, to (B,)."""
        return (values * self.head_weight[indices]).sum(-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        reward_positions: Tensor | None = None,
    ) -> SarmOutput:
        """Score rows of tokens; arguments as for `states`."""
        states = self.states(input_ids, attention_mask, reward_positions)
        a = self.sae.preactivations(states)
        if not self.config.use_topk:
            return SarmOutput(logits=self.score(a), states=states, latent_values=a)
        values, indices = self.sae.topk(a)
        return SarmOutput(
            logits=self.rewards(values, indices).unsqueeze(-1),
            states=states,
            latent_values=values,
            latent_indices=indices,
        )


def load_sarm(
    config: SarmConfig, device: torch.device | str | None = None
) -> tuple[SarmModel, PreTrainedTokenizerBase]:
    """The configured SARM and its tokenizer, on the current GPU where there is one; without
    network. Raises UserError.
    """
    folder = model_folder(config.model, config.revision, local_files_only=True)
    model = SarmModel.from_pretrained(
        folder, dtype=config.dtype, use_topk=config.use_topk, local_files_only=True
    )
    refuse_untrained(model.state_dict(), folder)
    tokenizer = load_tokenizer(config)
    check_scoring(config, model.config, tokenizer)
    nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if model.device.type == "cuda":
        join_projections(model.model)
    return model, tokenizer


def check_sarm(config: SarmConfig) -> None:
    """Look over the configured SARM's folder as `load_sarm` would, without making the model.
    Raises UserError.
    """
    opened = open_folder(config.model, config.revision, use_topk=config.use_topk)
    check_tensors(opened, SarmModel.shapes(opened.config))
    check_scoring(config, opened.config, load_tokenizer(config))
    own = opened.weights[0]
    refuse_untrained({name: own.read(name) for name in TRAINED}, opened.folder)
    for weights in opened.weights:
        check_finite(weights)


def check_scoring(
    config: SarmConfig, model: SarmModelConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises UserError where conversations of the configured length, under this tokenizer, are
    none that the model reads.
    """
    context = model.max_position_embeddings
    if config.max_length > context:
        raise UserError(
            f"sarm.max_length is {config.max_length} but {config.model} reads {context} tokens at"
            f" most; set it to {context} or less"
        )
    check_tokenizer(tokenizer, model.vocab_size, config.model)


class SaeAndHead(NamedTuple):
    """The part of a SARM after its backbone, in float32."""

    sae: TopKSae
    head_weight: Tensor
    """(d_sae,)"""
    config: SarmModelConfig


def load_sae(config: SarmConfig) -> SaeAndHead:
    """The configured SARM without its decoder layers, which are not read. Raises UserError."""
    opened = open_folder(config.model, config.revision, use_topk=config.use_topk)
    settings = opened.config
    sae = TopKSae(settings.hidden_size, settings.d_sae, settings.k, decoder=settings.has_decoder)
    wanted = {f"sae.{name}": parameter.shape for name, parameter in sae.named_parameters()} | {
        "score.weight": torch.Size([1, settings.d_sae])
    }
    check_tensors(opened, wanted)
    state = {
        name: tensor.float()
        for name, tensor in read_tensors(wanted, opened.weights, opened.folder).items()
    }
    refuse_untrained(state, opened.folder)
    head_weight = state.pop("score.weight")[0]
    sae.load_state_dict({name.removeprefix("sae."): tensor for name, tensor in state.items()})
    return SaeAndHead(sae, head_weight, settings)


def load_tokenizer(config: SarmConfig) -> PreTrainedTokenizerBase:
    """The configured SARM's tokenizer: its own, else its backbone's. Raises UserError."""
    folder = model_folder(config.model, config.revision, local_files_only=True)
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    backbone = read_config(folder).get("backbone")
    if not own and backbone:
        folder = model_folder(backbone["model"], backbone.get("revision"), local_files_only=True)
    return read_tokenizer(folder, config.chat_template_kwargs)
