"""The reference run's fetch, from a gated hub on loopback: what is written down of it, and what is
refused before any GPU is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sarm.config import ROOT, UserError, load_config, parse_config
from sarm.data.conversations import tokenize_conversation
from sarm.data.sources import source_files
from sarm.models import check_policy, read_tokenizer
from sarm.pinned import pinned
from sarm.reward_model.model import load_sarm
from sarm.run import Attempt, RunDir
from slurm.fetch import to_bring
from tests import reference
from tests.fakes.hub import Hub

SHARD = "model-00003-of-00004.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        reference.publish(hub)
        yield hub


def python(hub: Hub, folder: Path, *words: str, token: str | None = None, **more: str) -> str:
    """What Python says on a machine with an empty cache under `folder`, its exit code first."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(folder / "hf"), "SARM_CACHE": str(folder / "cache"), **more}
    env |= {"HF_ENDPOINT": hub.endpoint, "no_proxy": "*"} | ({"HF_TOKEN": token} if token else {})
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, text=True, capture_output=True
    )
    return f"{done.returncode} {done.stdout}{done.stderr}"


def opened(hub: Hub, folder: Path, *, token: str | None, limit: str = "unlimited") -> str:
    """The policy's folder as `local_model` downloads it, or the sentence of its refusal."""
    code = f"""
from sarm.config import UserError
from sarm.hub import hub_commit, local_model
try:
    commit = hub_commit({reference.POLICY!r}, "main", "config.json")
    print(local_model({reference.POLICY!r}, commit, download=True))
except UserError as error:
    print("error:", error)
"""
    script = folder / "open.py"
    script.write_text(code)
    shell = f'ulimit -f {limit}; exec "$@"'
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.endpoint, "no_proxy": "*"}
    env |= {"PYTHONPATH": str(ROOT)} | ({"HF_TOKEN": token} if token else {})
    done = subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, str(script)],
        env=env,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


# What comes, and what is written down


def test_fetch_writes_down_what_main_stood_at_and_every_phase_opens_that(
    hub: Hub, tmp_path: Path
) -> None:
    card = reference.write_card(tmp_path / "card.json")
    config = reference.write_config(hub, tmp_path / "config.yaml", **{"check_sarm.card": str(card)})
    run = tmp_path / "run"
    words = ("-m", "jobs", "fetch", "--config", str(config), "--run", str(run))
    hub.cut[SHARD] = [50_000]
    said = python(hub, tmp_path, *words, token=reference.TOKEN)
    assert said.startswith("0 "), said
    assert hub.bearers("/store/") == {None}, "the token went to another host"
    models = RunDir.open(run).read("fetch").json("models.json")
    policy, sarm = (hub.repositories[f"models/{n}"] for n in (reference.POLICY, reference.SARM))
    assert (models["policy"]["revision"], models["policy"]["commit"]) == ("main", policy.commit)
    assert models["sarm"]["sizes"] == {"d_sae": 256, "k": 16, "layers": 2}
    assert models["policy"]["sha256"][SHARD] == hashlib.sha256(policy.files[SHARD]).hexdigest()
    assert {f.name for f in Path(models["sarm"]["path"]).iterdir()} == {
        name for name in sarm.files if not name.endswith((".py", ".md"))
    }
    assert not any(path.endswith((".pth", ".py")) for _, path, _ in hub.asked)
    files = models["data"]["files"]
    assert [file["commit"] for file in files["rmb"]] == [reference.RMB_COMMIT] * 2
    (rb2,) = files["rb2"]
    assert rb2["revision"] == "main" and len(rb2["commit"]) == 40
    assert models["data"]["pairs"]["rmb/test"] == 60

    # main moves, and another run's fetch moves the cache that both share
    moved = hub.add(
        reference.POLICY, reference.policy_files() | {"LICENSE.txt": b"new"}, gated=True
    )
    hub.add(reference.SARM, reference.sarm_files(k=8))
    both = "\n".join(
        [
            "from jobs.__main__ import main",
            f"assert main({[*words[2:-1], str(tmp_path / 'later')]!r}) == 0",
            f"assert main({['check_sarm', '--run', str(run)]!r}) == 0",
            f"assert main({['fetch', '--run', str(run), '--force']!r}) == 0",
        ]
    )
    said = python(hub, tmp_path, "-c", both, token=reference.TOKEN)
    assert said.startswith("0 "), said
    check = RunDir.open(run).read("check_sarm").json("check.json")
    assert check["verdict"] == "as published" and len(check["rows"]) > 20
    now = pinned(RunDir.open(run))
    assert now.policy.revision == policy.commit != moved
    assert now.data.sources["rb2"].revision == rb2["commit"]
    assert now.data.sources["rmb"].revision == reference.RMB_COMMIT
    later = RunDir.open(tmp_path / "later").read("fetch").json("models.json")
    assert later["policy"]["commit"] == moved and later["sarm"]["sizes"]["k"] == 8
    again = RunDir.open(run).read("fetch").json("models.json")
    assert again["policy"]["commit"] == policy.commit, "a second fetch of a run went on to main"


@pytest.mark.parametrize("keys", ["nested", "top"])
def test_a_sarm_of_either_generation_is_opened_as_it_was_published(
    keys: str, tmp_path: Path
) -> None:
    folder = reference.write_files(reference.sarm_files(keys), tmp_path / keys)
    said = {"model": str(folder), "dtype": "float32", "tokens_per_batch": 512}
    tree = reference_tree(tmp_path) | {"sarm": said}
    model, tokenizer = load_sarm(parse_config(tree, "test").sarm)
    assert (model.d_sae, model.k, model.config.source_layer) == (256, 16, 2)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    talk = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": " So. "}]
    text = tokenize_conversation(tokenizer, talk, 100)
    assert text.ids[:1] == [reference.BOS] and text.ids[1] != reference.BOS
    assert text.ids[-1] == reference.EOT and text.reward_position == len(text.ids) - 1
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(text.ids)
    out = model(torch.tensor([text.ids]))
    values, indices = out.latent_values[0].detach(), out.latent_indices[0]
    weights = model.head_weight.detach()
    assert float(out.logits.detach()) == pytest.approx(
        float((values * weights[indices]).sum()), abs=1e-5
    )


def test_a_policy_of_that_layout_passes_every_check(tmp_path: Path) -> None:
    folder = reference.write_files(reference.policy_files(), tmp_path / "policy")
    check_policy(folder, {})
    assert read_tokenizer(folder, {}).pad_token is None
    folder.joinpath("model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match=r"00002-of-00004.* is missing; fetch the model again"):
        check_policy(folder, {})


def reference_tree(tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    source = {"format": "jsonl", "label": "D", "path": str(path), "split": {"test": 1.0}}
    return {"name": "t", "policy": {"model": str(tmp_path)}, "data": {"sources": {"d": source}}}


# What is refused


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "is gated and there is no token: accept its licence on the hub, set HF_TOKEN"),
        ("hf_of_an_account_without", "is gated and this token may not read it"),
        ("hf_mistyped", "the hub does not know this token"),
    ],
)
def test_a_gate_that_stays_shut_shows_before_anything_is_downloaded(
    hub: Hub, tmp_path: Path, token: str | None, says: str
) -> None:
    config = reference.write_config(hub, tmp_path / "config.yaml")
    words = ("-m", "jobs", "fetch", "--config", str(config), "--run", str(tmp_path / "run"))
    said = python(hub, tmp_path, *words, token=token)
    assert said.startswith("2 ") and says in said, said
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert not hub.bearers("/store/"), "something was downloaded"


def test_half_a_download_and_a_full_quota_are_a_sentence_and_gone_on_with(
    hub: Hub, tmp_path: Path
) -> None:
    # the hub's client writes ten megabytes at a time
    big = bytes(range(256)) * 2**17
    hub.add(reference.POLICY, reference.policy_files() | {SHARD: big}, gated=True)
    said = opened(hub, tmp_path, token=reference.TOKEN, limit=str(15 * 1024))
    assert "took no more of meta-llama" in said and "run make fetch again: whole files" in said
    hub.cut[SHARD] = [10] * 20  # it tries again by itself, a few times
    said = opened(hub, tmp_path, token=reference.TOKEN)
    assert "could not be fetched" in said and "run make fetch again: whole files" in said, said
    hub.cut[SHARD] = [12_000_000]
    hub.asked.clear()
    folder = Path(opened(hub, tmp_path, token=reference.TOKEN))
    assert (folder / SHARD).read_bytes() == big
    assert [asked for _, asked in hub.ranges if asked > "bytes=0"] == ["bytes=10485760-"]
    fetched = {path for method, path, _ in hub.asked if method == "GET" and "/store/" in path}
    assert fetched == {f"/store/{hashlib.sha256(big).hexdigest()}"}, "whole files came again"


def url_source(hub: Hub, **more: object) -> object:
    files = reference.rmb_pairs()
    tree = {
        "format": "rmb_pairs",
        "label": "RMB",
        "url": hub.raw_url,
        "revision": reference.RMB_COMMIT,
        "sha256": {file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        "split": {"test": 1.0},
        **more,
    }
    data = {"sources": {"rmb": tree}}
    given = {"name": "t", "policy": {"model": "p"}, "sarm": {"model": "s"}, "data": data}
    return parse_config(given, "test").data.sources["rmb"]


def test_a_repositorys_files_come_once_and_are_those_that_the_config_names(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    source = url_source(hub)
    place = tmp_path / "cache" / "data" / reference.RMB_COMMIT
    first = place / "RMB_dataset" / "Pairwise_set" / "Harmlessness" / "S1.json"
    # laid in another folder, such as the repository's inner one
    (place / "Harmlessness").mkdir(parents=True)
    (place / "Harmlessness" / "S1.json").write_bytes(b"[]")
    with pytest.raises(UserError, match=rf"rmb: {first} is not there; run make fetch .*, or lay"):
        source_files("rmb", source)
    hub.raw[f"o/r/{reference.RMB_COMMIT}/{first.relative_to(place)}"] += b" "
    with pytest.raises(UserError, match=r"has SHA-256 .* it is not the file that the config names"):
        source_files("rmb", source, download=True)
    assert not list(place.rglob("*.json.*")) and not first.exists()
    reference.publish(hub)
    files = source_files("rmb", source, download=True)
    asked = len(hub.asked)
    assert files[0] == first and source_files("rmb", source) == files
    assert source_files("rmb", source, download=True) == files and len(hub.asked) == asked
    first.write_bytes(b"[]")
    with pytest.raises(UserError, match=r"S1\.json is not RMB_dataset/.* remove it and run make"):
        source_files("rmb", source, download=True)
    first.unlink()
    del hub.raw[f"o/r/{reference.RMB_COMMIT}/{first.relative_to(place)}"]
    with pytest.raises(UserError, match=r"S1\.json answers 404"):
        source_files("rmb", source, download=True)


def test_where_no_network_is_the_address_and_the_place_are_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SARM_CACHE", str(tmp_path))
    source = url_source(hub, url="http://127.0.0.1:9/{revision}/{file}")
    with pytest.raises(
        UserError, match=rf"could not be fetched .* by hand as {tmp_path}/data/7777"
    ):
        source_files("rmb", source, download=True)


def test_what_is_to_be_brought_by_hand_names_each_file_of_a_repository_and_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SARM_CACHE", str(tmp_path))
    config = load_config(ROOT / "configs" / "llama31-8b.yaml")
    told = to_bring(config).splitlines()
    rmb = config.data.sources["rmb"]
    (line,) = (line for line in told if line.strip().startswith("https") and "/S3.json" in line)
    path = "RMB_dataset/Pairwise_set/Harmlessness/S3.json"
    assert f"RMB-Reward-Model-Benchmark/{rmb.revision}/{path}  as " in line
    assert f" as {tmp_path}/data/{rmb.revision}/FILE" in line
    assert f"  HF_HUB_CACHE=hub hf download {reference.POLICY} --revision main" in told


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("revision", "main", "40 digits of a commit"),
        ("url", "https://host/{revision}", "have {file}"),
        ("url", "file:///etc/{revision}/{file}", "begin with https"),
        ("sha256", {"../a.json": "0" * 64}, "no path within a repository"),
        ("sha256", {"/etc/a.json": "0" * 64}, "no path within a repository"),
        ("sha256", {"a.json": "abc"}, "sha256"),
        ("sha256", {}, "go together"),
        ("path", "data", "give one of path, repo and url"),
        ("files", ["a.json"], "leave files out"),
    ],
)
def test_a_repository_source_that_names_no_commit_or_file_is_refused(
    hub: Hub, key: str, value: object, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        url_source(hub, **{key: value})


def test_an_earlier_fetch_of_a_run_is_remembered_under_another_config(tmp_path: Path) -> None:
    """Commits are by repository and revision, whichever section names it."""
    config = load_config(ROOT / "configs" / "llama31-8b.yaml")
    run = RunDir.create(tmp_path / "run", config)
    assert pinned(run) == config
    attempt = Attempt(run, "fetch")
    model = {"model": config.policy.model, "revision": "main", "commit": "c" * 40, "path": "/p"}
    file = {"path": "/d", "repo": "Anthropic/hh-rlhf", "revision": "main", "commit": "d" * 40}
    data = {"files": {"hh": [file | {"sha256": ""}]}, "prompts": {}, "pairs": {}, "skipped": {}}
    models = {name: model | {"sha256": {}} for name in ("policy", "sarm")} | {"data": data}
    attempt.path("models.json").write_text(json.dumps({"schema": 1, **models}))
    attempt.publish()
    now = pinned(run)
    assert now.policy.revision == "c" * 40 and now.sarm.revision == "main"
    assert [now.data.sources[n].revision for n in ("hh", "rb2")] == ["d" * 40, "main"]
    assert run.config.policy.revision == "main"
