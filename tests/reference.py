"""The reference run in small: models, data and config in the layout in which the real ones are
published, random and a few hundred kilobytes large.

    files = policy_files()              # Llama-3.1-8B-Instruct's, as the hub gives them
    files = sarm_files("nested")        # Llama-SARM-4B's, of either generation of config keys
    publish(hub)                        # all that configs/llama31-8b.yaml names, on a loopback hub
    config = write_config(hub, path)    # that config, its sizes cut
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from sarm.config import ROOT
from tests.fakes.hub import Hub

POLICY, SARM = "meta-llama/Llama-3.1-8B-Instruct", "Schrieffer/Llama-SARM-4B"
TOKEN = "hf_of_an_account_with_the_licence"
HIDDEN, LAYERS, SOURCE_LAYER, D_SAE, K = 64, 4, 2, 256, 16
WORDS = 512
"""Entries of the vocabulary before its special tokens; the real one has 128,000."""
RMB_COMMIT = "7" * 40

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(3, 248)),
]
BOS, END_OF_TEXT, EOM, EOT = (
    WORDS + SPECIAL.index(token)
    for token in ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
)

CHAT_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]["role"] == "system" %}
  {%- set said = messages[0]["content"] | trim %}{%- set rest = messages[1:] %}
{%- else %}
  {%- set said = "" %}{%- set rest = messages %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is defined and tools %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{{- said + "<|eot_id|>" }}
{%- for message in rest %}
  {%- if message["role"] not in ("user", "assistant") %}
    {{- raise_exception("no role " + message["role"] + " here") }}
  {%- endif %}
  {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
  {{- message["content"] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
"""What Llama 3.1's template writes of a conversation without tools: a system turn with two dates,
whether or not one was given, and every text trimmed.
"""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Llama 3 cuts a text before it merges bytes: contractions, words with what stands before
them, three digits, signs, line ends, blanks.
"""

POLICY_KEYS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": [END_OF_TEXT, EOM, EOT],
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 2 * HIDDEN,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": WORDS + len(SPECIAL),
}
SARM_KEYS: dict[str, dict[str, Any]] = {
    "nested": {
        "sarm_param": {
            "sae_source_layer": SOURCE_LAYER,
            "sae_latent_size": D_SAE,
            "sae_k": K,
            "sae_use_sequence_level": True,
            "sarm_use_activation": True,
        }
    },
    "top": {
        "sae_hidden_state_source_layer": SOURCE_LAYER,
        "sae_latent_size": D_SAE,
        "sae_k": K,
        "sae_use_sequence_level": True,
        "sarm_use_topk": True,
        "sarm_train_mode": 1,
    },
}
"""By the generation of upstream's code that wrote config.json."""


# Models


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    """A byte-level BPE of Llama 3.1's form, trained on the demo's texts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] for row in _demo()], trainer)
    assert tokenizer.get_vocab_size() == WORDS
    tokenizer.add_special_tokens(SPECIAL)
    begin = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", BOS)],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), begin])
    return tokenizer


def tokenizer_files(**more: Any) -> dict[str, bytes]:
    """tokenizer.json and the two files beside it. There is no pad token."""
    added = {
        str(WORDS + n): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for n, token in enumerate(SPECIAL)
    }
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", **more}
    return {
        "tokenizer.json": _tokenizer().to_str().encode(),
        "tokenizer_config.json": _json(
            {
                "added_tokens_decoder": added,
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": True,
                "model_input_names": ["input_ids", "attention_mask"],
                "model_max_length": 131072,
                "tokenizer_class": "PreTrainedTokenizerFast",
                **named,
            }
        ),
        "special_tokens_map.json": _json(named),
    }


def policy_files() -> dict[str, bytes]:
    """A policy's repository: four shards and their index, and what lies beside them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**POLICY_KEYS | {"initializer_range": 0.2}))
        with torch.no_grad():
            model.lm_head.weight.normal_(0, 0.1)
            model.lm_head.weight[EOT] *= 6  # about one token in ten ends the turn
    stops = {"bos_token_id": BOS, "eos_token_id": [END_OF_TEXT, EOM, EOT]}
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return {
        **_sharded(model.state_dict(), 4),
        **tokenizer_files(),
        "config.json": _json(POLICY_KEYS),
        "generation_config.json": _json({**stops, **sampled, "transformers_version": "4.42.3"}),
        "original/params.json": _json({"dim": HIDDEN, "n_layers": LAYERS}),
        "original/consolidated.00.pth": b"a pickle that nobody is to open",
        "README.md": b"# A model card\n",
    }


def sarm_files(keys: str = "nested", k: int = K) -> dict[str, bytes]:
    """A SARM's repository: the first half of a Llama, an unused final norm, SAE and head in two
    shards, with code that nobody is to run. `keys`: "nested" or "top".
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LlamaConfig(
            **POLICY_KEYS | {"initializer_range": 0.2, "num_hidden_layers": SOURCE_LAYER}
        )
        layers = LlamaForCausalLM(config).model.state_dict()
        encoder = torch.nn.functional.normalize(torch.randn(D_SAE, HIDDEN), dim=1)
        state = {f"model.{name}": tensor for name, tensor in layers.items()} | {
            "sae.pre_bias": 0.1 * torch.randn(HIDDEN),
            "sae.latent_bias": 0.1 * torch.randn(D_SAE),
            "sae.encoder.weight": encoder,
            "sae.decoder.weight": encoder.T.contiguous(),
            "score.weight": 0.2 * torch.randn(1, D_SAE),
        }
    mine = json.loads(json.dumps(SARM_KEYS[keys]))
    mine.get("sarm_param", mine)["sae_k"] = k
    written = (
        POLICY_KEYS
        | mine
        | {
            "architectures": ["LlamaSARM"],
            "auto_map": {"AutoModelForSequenceClassification": "modeling_sarm_llama.LlamaSARM"},
            "num_hidden_layers": SOURCE_LAYER,
            "eos_token_id": EOT,
            "pad_token_id": WORDS + SPECIAL.index("<|finetune_right_pad_id|>"),
        }
    )
    return {
        **_sharded(state, 2),
        **tokenizer_files(pad_token="<|finetune_right_pad_id|>"),
        "config.json": _json(written),
        "modeling_sarm_llama.py": b"raise SystemExit('code of a checkpoint was run')\n",
        "README.md": b"# A model card\n",
    }


def _sharded(state: dict[str, torch.Tensor], number: int) -> dict[str, bytes]:
    """bf16 tensors in files of about the same size, in order, and the index that lists them."""
    total, shard, size = sum(t.numel() for t in state.values()), 0, 0
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(number)]
    for name, tensor in state.items():
        shard = min(number - 1, max(shard, size * number // total))
        shards[shard][name] = tensor.to(torch.bfloat16).contiguous()
        size += tensor.numel()
    names = [f"model-{n:05d}-of-{number:05d}.safetensors" for n in range(1, number + 1)]
    files = {
        name: save(tensors, metadata={"format": "pt"})
        for name, tensors in zip(names, shards, strict=True)
    }
    assert all(shards)
    where = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
    index = {"metadata": {"total_size": 2 * total}, "weight_map": where}
    return {**files, "model.safetensors.index.json": _json(index)}


def write_files(files: dict[str, bytes], folder: Path) -> Path:
    """A repository's files in a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


# Data


def _demo() -> list[dict[str, Any]]:
    lines = (ROOT / "data" / "demo" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def reward_bench() -> bytes:
    """RewardBench 2's Parquet file: 96 prompts of Safety, with one right and three wrong answers
    each, and a few of the other five subsets.
    """
    demo = _demo()
    rows = []
    for n, one in enumerate(demo[:96]):
        wrong = [demo[(n + step) % len(demo)]["rejected"] for step in (0, 7, 31)]
        rows.append(_item(str(n), "Safety", one["prompt"], [one["chosen"]], wrong))
    for subset in ("Factuality", "Precise IF", "Math", "Focus"):
        for n, one in enumerate(demo[100:108]):
            wrong = [demo[(n + step) % len(demo)]["rejected"] for step in (3, 5, 8)]
            rows.append(_item(f"{subset}-{n}", subset, one["prompt"], [one["chosen"]], wrong))
    for n, one in enumerate(demo[120:124]):
        other = demo[n + 200]
        both = [one["chosen"], other["chosen"]]
        wrong = [one["rejected"], other["rejected"]]
        rows.append(_item(f"ref:{n}", "Ties", one["prompt"], both[:1], wrong))
        rows.append(_item(f"tied:{n}", "Ties", one["prompt"], both, wrong))
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def _item(
    id_: str, subset: str, prompt: str, chosen: list[str], rejected: list[str]
) -> dict[str, Any]:
    return {
        "id": id_,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "num_correct": len(chosen),
        "num_rejected": len(rejected),
        "total_completions": len(chosen) + len(rejected),
        "models": ["human"] * (len(chosen) + len(rejected)),
        "subset": subset,
        "additional_metadata": {"category": None},
    }


def hh_harmless() -> bytes:
    """HH-RLHF's transcripts, gzipped JSON Lines."""
    lines = []
    for one in _demo()[200:260]:
        asked = f"\n\nHuman: {one['prompt']}\n\nAssistant: "
        lines.append(_json({side: asked + one[side] for side in ("chosen", "rejected")}))
    return gzip.compress(b"\n".join(lines), mtime=0)


def rmb_pairs() -> dict[str, bytes]:
    """Two scenarios of RMB's pairwise set, by their paths in its repository."""
    files = {}
    for scenario, start in (("S1", 300), ("S2", 330)):
        rows = [
            {
                "pair_uid": f"{scenario}-{n}",
                "conversation_input": [
                    {"role": "user", "content": one["prompt"], "language": "en"}
                ],
                "chosen": {"llm_name": "a", "answer": one["chosen"]},
                "reject": {"llm_name": "b", "answer": one["rejected"]},
                "category_path": f"Pairwise_set/Harmlessness/{scenario}",
            }
            for n, one in enumerate(_demo()[start : start + 30])
        ]
        files[f"RMB_dataset/Pairwise_set/Harmlessness/{scenario}.json"] = _json(rows)
    return files


# The run


def publish(hub: Hub) -> None:
    """All that the reference config names, the policy behind its gate."""
    hub.add(POLICY, policy_files(), gated=True)
    hub.add(SARM, sarm_files())
    parquet = "data/test-00000-of-00001.parquet"
    hub.add("allenai/reward-bench-2", {parquet: reward_bench()}, kind="datasets")
    hub.add("Anthropic/hh-rlhf", {"harmless-base/test.jsonl.gz": hh_harmless()}, kind="datasets")
    hub.raw |= {f"o/r/{RMB_COMMIT}/{file}": data for file, data in rmb_pairs().items()}
    hub.tokens[TOKEN] = {POLICY}
    hub.tokens["hf_of_an_account_without"] = set()


def write_config(hub: Hub, path: Path, **more: Any) -> Path:
    """configs/llama31-8b.yaml with its sizes cut for a CPU, RMB from the loopback server, and the
    dotted keys in `more`.
    """
    from sarm.config import set_key

    tree = yaml.safe_load((ROOT / "configs" / "llama31-8b.yaml").read_text(encoding="utf-8"))
    rmb = {
        "url": hub.raw_url,
        "revision": RMB_COMMIT,
        "sha256": {file: hashlib.sha256(data).hexdigest() for file, data in rmb_pairs().items()},
    }
    tree["data"]["sources"]["rmb"] |= rmb
    tree["data"]["sources"]["lookalikes"]["limit"] = 8
    cut = {
        "sarm.tokens_per_batch": 4096,
        "encode.shards": 1,
        "probe.shards": 1,
        "probe.permutations": 500,
        "probe.bootstrap": 100,
        "probe.min_prompts_active": 5,
        "select.listed": 4,
        "select.random_candidates": 8,
        "calibrate.prompts": 8,
        "calibrate.control_pairs": 12,
        "ppo.arms": ["penalty"],
        "ppo.steps": 4,
        "ppo.batch_size": 8,
        "ppo.micro_batch_tokens": 2048,
        "ppo.max_prompt_tokens": 192,
        "ppo.max_new_tokens": 8,
        "ppo.checkpoint_every": 2,
        "ppo.penalty.tau": 1.5,  # states are narrower than the real ones, and latents weaker
        "evaluate.prompts": 8,
        "evaluate.max_new_tokens": 8,
        "steer.bootstrap": 100,
        **more,
    }
    for key, value in cut.items():
        set_key(tree, f"{key}={json.dumps(value)}")
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def write_card(path: Path) -> Path:
    """A card of the SARM's own: sizes, three weights of its head, and what it does on RewardBench 2
    here, in bfloat16.
    """
    from sarm.config import parse_config
    from sarm.data.conversations import pinned_template
    from sarm.evaluation import sarm_check
    from sarm.records import SarmCard
    from sarm.reward_model.model import load_sarm

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_files(sarm_files(), Path(scratch) / "sarm")
        data = Path(scratch) / "test.parquet"
        data.write_bytes(reward_bench())
        rb2 = {"format": "rewardbench2", "label": "RB2", "path": str(data), "split": {"test": 1.0}}
        tree = {
            "name": "card",
            "policy": {"model": str(folder)},
            "sarm": {"model": str(folder), "tokens_per_batch": 4096},
            "data": {"sources": {"rb2": rb2}},
        }
        config = parse_config(tree, "card")
        given, _ = sarm_check.samples(config, None)
        model, tokenizer = load_sarm(config.sarm)
        facts = sarm_check.facts_of(model, tokenizer, "bfloat16", pinned_template(tokenizer))
        found = sarm_check.measure(model, tokenizer, given, config.sarm)
    SarmCard(
        source="its own figures",
        d_sae=D_SAE,
        k=K,
        layers=SOURCE_LAYER,
        dtype="bfloat16",
        template_sha256=facts.template_sha256,
        head={str(latent): f"{facts.head(latent):.2e}" for latent in (3, 5, 8)},
        benchmarks=[one.benchmark for one in found],
    ).write(path)
    return path


def _json(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False).encode()
