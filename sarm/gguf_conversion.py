"""A Llama in a GGUF file as a Hugging Face folder: `convert_llama_gguf(gguf, out)`.

Of the GGUF's conventions: names `blk.3.attn_q`, queries and keys permuted for rotary pairs that lie
side by side, and the tokenizer's own splitting named by `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def convert_llama_gguf(gguf: Path, out: Path) -> None:
    """Write a Llama GGUF as a Hugging Face folder in bfloat16, with its tokenizer and chat
    template.

    The weights are dequantised with the gguf package itself: what transformers does with a GGUF
    (dequantise, keep packed) has changed between its versions, this has to give the same bits
    always.
    """
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(gguf)
    field = {
        name: value.contents()
        for name, value in reader.fields.items()
        if not name.startswith("tokenizer.ggml.token")
    }
    config = _llama_config(
        LlamaConfig, field, tied=all(t.name != "output.weight" for t in reader.tensors)
    )
    weights = {}
    for tensor in reader.tensors:
        # A copy, since what is not quantised comes as a view of the mapped file.
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _unpermute(weight, config.head_dim)
        weights[_llama_name(tensor.name)] = weight.to(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if field["tokenizer.ggml.pre"] == "smollm":
        _split_digits(tokenizer)
    tokenizer.save_pretrained(out)


def _llama_config(kind: Any, field: dict[str, Any], *, tied: bool) -> Any:
    heads = field["llama.attention.head_count"]
    return kind(
        vocab_size=field["llama.vocab_size"],
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=field["llama.attention.head_count_kv"],
        head_dim=field["llama.embedding_length"] // heads,
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=field["tokenizer.ggml.bos_token_id"],
        eos_token_id=field["tokenizer.ggml.eos_token_id"],
        pad_token_id=field["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )


def _llama_name(name: str) -> str:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`."""
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in whole:
        return whole[name]
    inner = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{inner[kind]}.{suffix}"


def _unpermute(weight: Any, head_dim: int) -> Any:
    """Undo llama.cpp's reordering of query and key rows (rotary pairs adjacent) to Hugging Face's
    (halves).
    """
    rows, columns = weight.shape
    return (
        weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
        .transpose(1, 2)
        .reshape(rows, columns)
    )


def _split_digits(tokenizer: Any) -> None:
    """llama.cpp's `smollm` pre-tokenizer, the model's own: every digit by itself, then byte level.

    transformers reads the GGUF's vocabulary but gives every such tokenizer plain byte level.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
