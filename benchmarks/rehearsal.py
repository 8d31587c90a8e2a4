"""The reference run's phases at the real shapes with random weights, each phase's time and peak
memory beside the plan's: `python benchmarks/rehearsal.py --folder /scratch/rehearsal`.

Writes a policy, a SARM and data of the sizes of Llama-3.1-8B-Instruct, Llama-SARM-4B and the
benchmarks into the folder (about 27 GB), makes a config of configs/llama31-8b.yaml with three steps
of PPO on one GPU, and runs every phase by `python -m jobs`. Random weights decide nothing: what is
measured is time and memory. `--tiny` does the same at tiny shapes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sarm.config import ROOT, Config, load_config, set_key
from sarm.cost import counts, planned
from sarm.ppo.learner.memory_plan import KNOWN, OUTSIDE_GIB, Gpus, Sarm, Shape
from sarm.run import RunDir
from tests import reference

PHASES = ("fetch", "encode", "probe", "select", "steer", "calibrate", "ppo", "evaluate", "report")
LLAMA, SARM = KNOWN[reference.POLICY], KNOWN[reference.SARM]
TINY = Shape(64, 128, 4, 4, 2, 16, reference.WORDS + len(reference.SPECIAL), False)
TINY_SARM = Sarm(TINY._replace(layers=2), 256)


class Row(NamedTuple):
    """One phase as it went; None where there is nothing to tell."""

    phase: str
    seconds: float
    planned_s: float | None
    peak_gib: float | None
    planned_gib: float | None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a look on a CPU")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    folder = args.folder.absolute()
    policy, sarm = (TINY, TINY_SARM) if args.tiny else (LLAMA, SARM)
    assert isinstance(policy, Shape) and isinstance(sarm, Sarm)
    if not (folder / "config.yaml").exists():
        write_inputs(folder, policy, sarm)
        write_config(folder, tiny=args.tiny)
    config = load_config(folder / "config.yaml", args.overrides)
    rows = []
    for phase in args.phases:
        rows.append(run_phase(phase, config, folder / "run", policy, sarm))
        print("\n".join(table(rows)), flush=True)


# What the run reads


def write_inputs(folder: Path, policy: Shape, sarm: Sarm) -> None:
    """Models of these shapes, in the published layout, and data of tests/reference.py."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = reference.policy_files()
    beside = {n: data for n, data in files.items() if not n.startswith("model")}
    sizes = {
        "hidden_size": policy.hidden,
        "intermediate_size": policy.intermediate,
        "num_attention_heads": policy.heads,
        "num_key_value_heads": policy.kv_heads,
        "vocab_size": policy.vocab,
    }
    k = 3 * policy.hidden // 64
    own = {"sae_source_layer": sarm.trunk.layers, "sae_latent_size": sarm.d_sae, "sae_k": k}
    nested = reference.SARM_KEYS["nested"]["sarm_param"] | own
    for name, layers, more in (
        ("policy", policy.layers, {}),
        ("sarm", sarm.trunk.layers, {"sarm_param": nested}),
    ):
        place = reference.write_files(beside, folder / name)
        keys = reference.POLICY_KEYS | sizes | {"num_hidden_layers": layers} | more
        (place / "config.json").write_text(json.dumps(keys))
        write_layers(place, policy, layers, device, head=name == "policy")
    write_sae(folder / "sarm", policy.hidden, sarm.d_sae, device)
    (folder / "rb2.parquet").write_bytes(reference.reward_bench())
    (folder / "hh.jsonl.gz").write_bytes(reference.hh_harmless())
    reference.write_files(reference.rmb_pairs(), folder / "rmb")


def write_layers(place: Path, shape: Shape, layers: int, device: str, *, head: bool) -> None:
    """Random bf16 weights, a file a layer, and the index that lists them."""
    h, kv = shape.hidden, shape.kv_heads * shape.head_dim
    torch.manual_seed(layers)
    outer = {"model.embed_tokens.weight": (shape.vocab, h), "model.norm.weight": (h,)}
    shapes = [outer | ({"lm_head.weight": (shape.vocab, h)} if head else {})]
    for n in range(layers):
        layer = {
            "self_attn.q_proj": (shape.heads * shape.head_dim, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, shape.heads * shape.head_dim),
            "mlp.gate_proj": (shape.intermediate, h),
            "mlp.up_proj": (shape.intermediate, h),
            "mlp.down_proj": (h, shape.intermediate),
            "input_layernorm": (h,),
            "post_attention_layernorm": (h,),
        }
        shapes.append({f"model.layers.{n}.{name}.weight": size for name, size in layer.items()})
    where = {}
    for n, one in enumerate(shapes):
        file = f"model-{n + 1:05d}-of-{len(shapes):05d}.safetensors"
        save_file({k: random_weight(size, device) for k, size in one.items()}, place / file)
        where |= dict.fromkeys(one, file)
    index = {"metadata": {}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def random_weight(size: tuple[int, ...], device: str) -> torch.Tensor:
    """bf16: ones for a norm, else with variance 1 / fan-in, so that states stay finite."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, device=device) / size[1] ** 0.5).to(torch.bfloat16).cpu()


def write_sae(place: Path, hidden: int, d_sae: int, device: str) -> None:
    """A random SAE and head, added to the folder's index."""
    encoder = torch.nn.functional.normalize(torch.randn(d_sae, hidden, device=device), dim=1).cpu()
    tensors = {
        "sae.pre_bias": torch.zeros(hidden),
        "sae.latent_bias": torch.zeros(d_sae),
        "sae.encoder.weight": encoder,
        "sae.decoder.weight": encoder.T.contiguous(),
        "score.weight": 0.05 * torch.randn(1, d_sae),
    }
    save_file({k: t.to(torch.bfloat16) for k, t in tensors.items()}, place / "sae.safetensors")
    index = json.loads((place / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "sae.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    AutoTokenizer.from_pretrained(place)  # it is whole


def write_config(folder: Path, *, tiny: bool) -> None:
    """The reference config on these folders, one arm and three steps."""
    tree = yaml.safe_load((ROOT / "configs" / "llama31-8b.yaml").read_text(encoding="utf-8"))
    for name, file in (("rb2", "rb2.parquet"), ("rmb", "rmb"), ("hh", "hh.jsonl.gz")):
        source = tree["data"]["sources"][name]
        for key in ("repo", "revision", "files", "url", "sha256"):
            source.pop(key, None)
        source["path"] = str(folder / file)
    tree["policy"] = {"model": str(folder / "policy")}
    tree["sarm"] = {"model": str(folder / "sarm"), "tokens_per_batch": 16384}
    cut: dict[str, Any] = {
        "check_sarm.card": None,
        "seed_report": None,
        "limits.gpu_hours": None,
        "encode.shards": 1,
        "probe.shards": 1,
        "ppo.arms": ["penalty"],
        "ppo.steps": 3,
        "ppo.penalty.tau": None,  # where random latents lie, nobody knows
        "ppo.penalty.tau_quantile": 0.5,
    }
    if tiny:
        cut |= {
            "probe.permutations": 500,
            "probe.min_prompts_active": 5,
            "select.random_candidates": 8,
            "calibrate.prompts": 8,
            "calibrate.control_pairs": 12,
            "ppo.batch_size": 4,
            "ppo.max_prompt_tokens": 192,
            "ppo.max_new_tokens": 8,
            "evaluate.prompts": 8,
            "evaluate.max_new_tokens": 8,
        }
    for key, value in cut.items():
        set_key(tree, f"{key}={json.dumps(value)}")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


# What it takes


def run_phase(phase: str, config: Config, run: Path, policy: Shape, sarm: Sarm) -> Row:
    """Run every unit of a phase. Raises CalledProcessError where it fails."""
    print(f"=== {phase}", flush=True)
    RunDir.create(run, config)
    watch, began = Watch(), time.monotonic()
    subprocess.run([sys.executable, "-m", "jobs", phase, "--run", str(run)], cwd=ROOT, check=True)
    seconds = time.monotonic() - began
    seconds_planned, gib = plan_of(phase, config, run, policy, sarm)
    return Row(phase, seconds, seconds_planned, watch.ended(), gib)


def plan_of(
    phase: str, config: Config, run: Path, policy: Shape, sarm: Sarm
) -> tuple[float | None, float | None]:
    """(seconds of all the phase's jobs one after another, GiB on the GPU), as planned."""
    data = RunDir(run, config).read("fetch").json("models.json")["data"]
    known, gpu = counts(data["pairs"], data["prompts"]), Gpus(1, 80)
    costs = [c for c in planned(config, policy, sarm, known, gpu) if c.phase == phase]
    gib = None
    if phase == "ppo":  # for the GPU that it ran on, by the longest prompt that there was
        metrics = RunDir(run, config).read("ppo", config.units("ppo")[0]).path("metrics.jsonl")
        gib = json.loads(metrics.read_text().splitlines()[-1]).get("gpu/planned_peak_gib")
        gib = gib and gib + OUTSIDE_GIB
    return (sum(c.jobs * c.seconds for c in costs) if costs else None), gib


class Watch:
    """The most memory that the first GPU has in use, looked at twice a second."""

    def __init__(self) -> None:
        self.peak: float | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        if shutil.which("nvidia-smi"):
            self.thread.start()

    def _look(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        while not self.over.wait(0.5):
            said = subprocess.run([*query, f"--id={first}"], capture_output=True, text=True).stdout
            if said.strip().isdigit():
                self.peak = max(self.peak or 0.0, int(said) / 1024)

    def ended(self) -> float | None:
        """GiB; None where no GPU tells."""
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()
        return self.peak


def table(rows: list[Row]) -> list[str]:
    def said(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [f"{'phase':10}{'s':>9}{'planned s':>11}{'GiB':>8}{'planned GiB':>13}"]
    for row in rows:
        lines.append(
            f"{row.phase:10}{row.seconds:9.1f}{said(row.planned_s, 1):>11}"
            f"{said(row.peak_gib, 1):>8}{said(row.planned_gib, 1):>13}"
        )
    return lines


if __name__ == "__main__":
    main()
