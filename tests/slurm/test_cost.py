"""Disk and GPU-hours of a run: parameter counts that their makers publish, and sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sarm.config import ROOT, load_config
from sarm.ppo.learner.memory_plan import Shape, find_shape
from sarm.run import RunDir
from slurm import submit
from slurm.cost import count_texts, disk, kept_latents, needed_bytes, shapes
from tests.fakes.site import Site
from tests.runs import fetched, publish


def test_the_sizes_are_those_that_the_models_have() -> None:
    policy, sarm = shapes(load_config(ROOT / "configs" / "llama31-8b.yaml"))
    assert policy is not None and policy.parameters == 8_030_261_248
    assert sarm is not None and (sarm.trunk.layers, sarm.d_sae) == (16, 65536)
    config = load_config(ROOT / "configs" / "smollm2.yaml")
    policy, sarm = shapes(config)
    assert policy is not None and policy.parameters == 134_515_008
    assert sarm is not None and (sarm.trunk.hidden, sarm.d_sae, kept_latents(config, sarm)) == (
        576,
        4608,
        32,
    )


def test_a_model_unknown_here_is_none_and_said(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shapes(site.run.config) == (None, None)
    assert site.submit("--dry-run") == 0
    assert "disk of what p, s makes is not known here" in capsys.readouterr().out


def test_adapters_are_those_that_peft_makes(tiny_policy: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    found = find_shape(str(tiny_policy), None)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert isinstance(found, Shape) and found.parameters == model.num_parameters()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert found.lora(4) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_the_reference_run_by_hand(tmp_path: Path) -> None:
    config = load_config(
        ROOT / "configs" / "llama31-8b.yaml",
        ["ppo.lora=null", "ppo.seeds=[0]", "ppo.arms=[penalty,no_penalty]"],
    )
    run = RunDir(tmp_path / "run", config)
    parts = {part.phase: part for part in disk(config, run)}
    assert parts["ppo"].stays == 2 * 2 * 8_030_261_248
    assert parts["ppo"].passing == 2 * 2 * 12 * 8_030_261_248, (
        "two policies, the last checkpoint and the one being written"
    )
    assert parts["encode"].stays is None
    assert needed_bytes(config, run) == 2 * 8_030_261_248 * (2 + 2 * 12) + 320 * 65536
    ppo = config.ppo.model_copy(update={"kl_distances": (0.5, 1.0, 2.0), "keep_state": True})
    keeping = config.model_copy(update={"ppo": ppo})
    parts = {part.phase: part for part in disk(keeping, RunDir(tmp_path / "run", keeping))}
    assert parts["ppo"].stays == 2 * (4 * 2 + 12) * 8_030_261_248, (
        "of two units the policy, three kept ones and the optimizer's state"
    )
    assert parts["ppo"].what == "8 policies"


def test_encoded_states_follow_from_the_pairs_that_fetch_counted(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "smollm2.yaml")
    run = RunDir.create(tmp_path / "run", config)
    assert count_texts(run) is None
    pairs = {"demo/discovery": 100, "demo/ppo": 7, "demo/test": 20}
    publish(run, "fetch", files={"models.json": fetched("0" * 64, pairs=pairs)})
    assert count_texts(run) == 240
    encode = next(part for part in disk(config, run) if part.phase == "encode")
    assert encode.stays == 240 * (4 * 576 + 8 * (32 + config.encode.extra_ranks))


def test_a_dry_run_tells_disk_and_gpu_hours_a_phase(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--cluster",
        "example-two-partitions",
        "--config",
        "configs/llama31-8b.yaml",
        "--run",
        str(site.path.parent / "new"),
        "--dry-run",
    ]
    assert submit.main(words) == 0
    out = capsys.readouterr().out
    # Two arms and one seed on four GPUs for two hours each.
    assert "### ppo         2 jobs     16.0 GPU-hours at most  33.5 GB 2 policies, and " in out
    assert "###   ppo no_penalty" in out and "from fetch to report where no job waits" in out
    assert "GPU-hours by the time limits" in out and "in the run directory at most" in out
    assert not (site.path.parent / "new").exists() and not site.jobs
