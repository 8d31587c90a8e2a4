"""Tiny real models for tests: a policy, a SARM as upstream publishes it, and their tokenizer.

`python -m tests.tiny outputs/tiny` writes what `configs/tiny.yaml` names. No downloads; float32 on
the CPU.
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from sarm.config import ROOT, Config, parse_config, set_key

D_IN = 32
SOURCE_LAYER = 2
SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")

# Trains a few dozen merges, so that a word is not a token a letter.
CORPUS = """I cannot help you with that because it would harm someone. Please tell me what you \
would like to do instead.
Here are the steps that you asked for: first take the thing, then make the other thing, and then \
do it again.
How can I make this work? What is the best way to do it? Sure, here is how you do it. I am sorry, \
but I will not.
The people who have been hurt by this should call for help; there are ways to stay safe and to \
keep others safe."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role']"
    " }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}{% if"
    " add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@lru_cache(maxsize=1)
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    # Like Llama 3: tokenising plain text adds a BOS, and so would tokenising a templated text that
    # has one.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama 3's chat template; its pad is not its eot, and both
    pad sides work.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def llama_config(**changes: Any) -> LlamaConfig:
    """A Llama of hidden size 32 with two layers and grouped key-value heads."""
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": D_IN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    return LlamaConfig(**(settings | changes))


def write_tiny_policy(path: str | Path, seed: int = 0) -> Path:
    """A random two-layer causal model and its tokenizer. It ends its turn on about one token in
    ten.
    """
    return _written(path, _policy_files(seed))


def write_tiny_sarm(path: str | Path, seed: int = 0, d_sae: int = 64, k: int = 8) -> Path:
    """A random SARM in upstream's layout: `model_type: llama`, nested `sarm_param`, the unused
    final norm included.
    """
    return _written(path, _sarm_files(seed, d_sae, k))


def _written(path: str | Path, files: dict[str, bytes]) -> Path:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def _files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@lru_cache
def _policy_files(seed: int) -> dict[str, bytes]:
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama_config())
        with torch.no_grad():
            model.lm_head.weight.normal_(0, 0.1)
            model.lm_head.weight[tiny_tokenizer().eos_token_id] *= 6
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return _files(folder)


@lru_cache
def _sarm_files(seed: int, d_sae: int, k: int) -> dict[str, bytes]:
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
        torch.manual_seed(1000 + seed)
        config = llama_config(num_hidden_layers=SOURCE_LAYER)
        backbone = LlamaModel(config)
        tensors = {f"model.{name}": tensor for name, tensor in backbone.state_dict().items()}
        encoder = torch.nn.functional.normalize(torch.randn(d_sae, D_IN), dim=1)
        tensors |= {
            "sae.pre_bias": 0.1 * torch.randn(D_IN),
            "sae.latent_bias": 0.1 * torch.randn(d_sae),
            "sae.encoder.weight": encoder,
            "sae.decoder.weight": encoder.T.contiguous(),
            "score.weight": 0.2 * torch.randn(1, d_sae),
        }
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        keys = config.to_dict() | {
            "architectures": ["LlamaSARM"],
            "sarm_param": {
                "sae_source_layer": SOURCE_LAYER,
                "sae_latent_size": d_sae,
                "sae_k": k,
                "sae_use_sequence_level": True,
                "sarm_use_activation": True,
            },
        }
        (Path(folder) / "config.json").write_text(json.dumps(keys, indent=1))
        tiny_tokenizer().save_pretrained(folder)
        return _files(folder)


def tiny_config(tmp_path: str | Path, **overrides: Any) -> Config:
    """`configs/tiny.yaml` with models under `tmp_path`, written where absent.

    Overrides are dotted keys: `tiny_config(tmp_path, **{"ppo.steps": 2})`.
    """
    policy, sarm = Path(tmp_path) / "models" / "policy", Path(tmp_path) / "models" / "sarm"
    if not (policy / "config.json").exists():
        write_tiny_policy(policy)
    if not (sarm / "config.json").exists():
        write_tiny_sarm(sarm)
    tree = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    tree["policy"]["model"], tree["sarm"]["model"] = str(policy), str(sarm)
    for dotted, value in overrides.items():
        set_key(tree, f"{dotted}={json.dumps(value)}")
    return parse_config(tree, "tiny.yaml")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(write_tiny_policy(folder / "policy"))
    print(write_tiny_sarm(folder / "sarm"))
