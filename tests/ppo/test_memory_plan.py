"""The plan's arithmetic against real models and numbers worked by hand, and that what cannot fit
is refused with them.
"""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sarm.config import ROOT, PpoConfig, UserError
from sarm.ppo.learner.memory_plan import (
    GIB,
    H100,
    KNOWN,
    LLAMA_8B,
    Gpus,
    Plan,
    Sarm,
    Shape,
    bounds,
    main,
    make_plan,
    parse_gpus,
    score_time,
    shape_of,
    step_parts,
)

REFERENCE_JOB = PpoConfig(batch_size=32, max_prompt_tokens=64, max_new_tokens=128)
SARM_BYTES = 9.1e9


def test_parameters_are_counted_as_the_model_counts_them(tiny_policy) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert shape_of(model.config.to_dict()).parameters == model.num_parameters()
    tied = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=50,
            tie_word_embeddings=True,
        )
    )
    assert shape_of(tied.config.to_dict()).parameters == tied.num_parameters()


def test_llama_8b_and_its_sarm() -> None:
    assert LLAMA_8B.parameters == 8_030_261_248
    sarm = KNOWN["Schrieffer/Llama-SARM-4B"]
    assert isinstance(sarm, Sarm) and sarm.bytes == pytest.approx(9.1e9, rel=0.01)
    assert LLAMA_8B.lora(16) == 41_943_040  # as peft prints it for rank 16 on every projection


def test_lora_on_one_gpu_by_hand() -> None:
    plan = make_plan(REFERENCE_JOB, LLAMA_8B, SARM_BYTES, Gpus(1, 79.2))
    assert (plan.zero_stage, plan.checkpointed_layers, plan.micro_batch_tokens) == (0, 0, 32 * 192)
    assert plan.persistent_gib["policy"] * GIB == 2 * LLAMA_8B.parameters
    # 131 kB a token; a row's cache is of a power of two
    assert plan.persistent_gib["KV cache"] * GIB == 32 * 256 * 131072
    assert plan.decode_rows == 32
    # 4 d_model + q, k, v and attention's output + 3 f, in bf16
    kept = 32 * 192 * 32 * 2 * (4 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14336)
    # The pass is recorded, so it keeps its memory.
    responses = 32 * 128 + 511  # in whole steps of 512
    value_head = 4 * responses * 4096
    recorded = plan.persistent_gib["recorded pass"] * GIB
    assert plan.recorded and recorded == pytest.approx(kept + 4096 * 128256 * 3 + value_head)
    # Without a critic no value head; with an entropy bonus its logits' gradient, and the slopes
    # that a frozen head keeps.
    free = {"advantage": "rloo", "samples_per_prompt": 2}
    bonus = free | {"entropy_coef": 0.01}
    for changes, more in ((free, 0), (bonus, 2 * 4096 * 128256 + 2 * responses * 4096)):
        other = make_plan(
            REFERENCE_JOB.model_copy(update=changes), LLAMA_8B, SARM_BYTES, Gpus(1, 79.2)
        )
        found = other.persistent_gib["recorded pass"] * GIB
        assert found == pytest.approx(kept + 4096 * 128256 * 3 + more)
    twice = make_plan(
        REFERENCE_JOB.model_copy(update={"num_ppo_epochs": 2}), LLAMA_8B, SARM_BYTES, Gpus(1, 79.2)
    )
    padding = 4 * 511 * 4096  # which only a recorded pass has
    assert not twice.recorded
    assert twice.transient_gib["update"] * GIB == pytest.approx(recorded - padding)


def test_full_fine_tuning_of_8b_fits_one_gpu_in_eight_bytes() -> None:
    plan = make_plan(
        REFERENCE_JOB.model_copy(update={"lora": None}), LLAMA_8B, SARM_BYTES, Gpus(1, 79.2)
    )
    assert (plan.zero_stage, plan.weights) == (0, "compact")
    assert plan.offloaded_layers == 32 and plan.peak_gib < 0.95 * 78 and not plan.recorded


def test_four_gpus_keep_float32_masters_by_zero_2() -> None:
    plan = make_plan(
        REFERENCE_JOB.model_copy(update={"lora": None}), LLAMA_8B, SARM_BYTES, Gpus(4, 79.2)
    )
    assert (plan.zero_stage, plan.weights) == (2, "float32_master")
    small = make_plan(
        REFERENCE_JOB.model_copy(update={"lora": None}), KNOWN["embedded:smollm2"], 1e9, Gpus(1, 24)
    )  # type: ignore[arg-type]
    assert (small.zero_stage, small.weights, small.checkpointed_layers) == (0, "compact", 0)


def test_what_the_config_says_is_kept() -> None:
    ppo = PpoConfig(
        batch_size=32,
        max_prompt_tokens=64,
        max_new_tokens=128,
        micro_batch_tokens=800,
        gradient_checkpointing=True,
        zero_stage=2,
    )
    plan = make_plan(ppo, LLAMA_8B, SARM_BYTES, Gpus(1, 79.2))
    assert (plan.zero_stage, plan.micro_batch_tokens, plan.checkpointed_layers) == (2, 4 * 192, 32)
    assert plan.applied(ppo).micro_batch_tokens == 768


def test_less_memory_costs_time_and_too_little_is_refused_with_the_numbers() -> None:
    peaks, times = zip(
        *(
            (p.peak_gib, p.train_s)
            for p in (
                make_plan(REFERENCE_JOB, LLAMA_8B, SARM_BYTES, Gpus(1, gib))
                for gib in (96, 79.2, 60, 50)
            )
        ),
        strict=True,
    )
    assert list(peaks) == sorted(peaks, reverse=True) and list(times) == sorted(times)
    with pytest.raises(
        UserError, match=r"LoRA of 8.03 B parameters does not fit.*\(policy 15.0, .* on 1 x 24 GiB"
    ):
        make_plan(REFERENCE_JOB, LLAMA_8B, SARM_BYTES, Gpus(1, 24))
    with pytest.raises(UserError, match=r"set ppo\.lora"):
        make_plan(
            REFERENCE_JOB.model_copy(update={"lora": None}), LLAMA_8B, SARM_BYTES, Gpus(1, 48)
        )


LLAMA_1B = KNOWN["meta-llama/Llama-3.2-1B-Instruct"]
LORA = {"lora": {"rank": 16, "alpha": 32}}
FULL, COMPACT = {"lora": None}, {"lora": None, "weights": "compact", "zero_stage": 0}


@pytest.mark.parametrize(
    "shape, settings, gpus, sequences, prompt, new, step_s, peak_gib",
    [
        (LLAMA_8B, LORA, Gpus(1, 80), 32, 64, 128, 1.472, 65.9),
        (LLAMA_8B, LORA, Gpus(1, 80), 32, 70, 128, 1.524, 66.6),
        (LLAMA_8B, FULL, Gpus(1, 80), 32, 64, 128, 1.702, 74.9),
        (LLAMA_8B, COMPACT, Gpus(1, 80), 32, 64, 128, 1.774, 74.9),
        (LLAMA_1B, FULL, Gpus(1, 80), 32, 64, 64, 0.192, 17.5),
        (LLAMA_8B, LORA, Gpus(2, 80), 64, 64, 128, 1.483, 65.9),
        (LLAMA_8B, COMPACT, Gpus(2, 80), 64, 64, 128, 1.768, 74.9),
        (LLAMA_8B, LORA, Gpus(1, 139), 32, 64, 128, 1.250, 65.9),
        (LLAMA_8B, FULL, Gpus(1, 139), 32, 64, 128, 1.402, 98.8),
        (LLAMA_8B, LORA, Gpus(1, 139), 128, 64, 128, 3.361, 131.7),
        (LLAMA_1B, FULL, Gpus(1, 139), 32, 64, 128, 0.297, 20.6),
        (LLAMA_8B, LORA | {"rollout_dtype": "fp8"}, Gpus(1, 139), 32, 64, 128, 1.097, 59.8),
        (LLAMA_8B, FULL, Gpus(4, 139), 32, 64, 128, 1.078, 80.7),
    ],
)
def test_the_plan_is_within_a_tenth_of_what_was_measured(
    shape: Shape,
    settings: dict[str, object],
    gpus: Gpus,
    sequences: int,
    prompt: int,
    new: int,
    step_s: float,
    peak_gib: float,
) -> None:
    """A step of `benchmarks/ppo.py` on H100s of 80 GB and H200s (docs/experiments.md). Of memory
    too much may be planned for, where logits of small models come in several pieces; under ZeRO
    torch reserved 4 % more than planned.
    """
    ppo = PpoConfig.model_validate(
        {"batch_size": sequences, "max_prompt_tokens": prompt, "max_new_tokens": new, **settings}
    )
    half = shape.layers // 2
    sarm = Sarm(shape._replace(layers=half), 65536 if shape is LLAMA_8B else 16384)
    plan = make_plan(ppo, shape, sarm.bytes, gpus)
    planned_s = plan.rollout_s + score_time(ppo, sarm, gpus) + plan.train_s
    assert planned_s == pytest.approx(step_s, rel=0.1)
    assert 0.95 < plan.peak_gib / peak_gib < 1.12


@pytest.mark.parametrize(
    "weights, gpus, stage, moved, received",
    [
        ("compact", Gpus(1, 80), 0, 12e9, 0),
        ("compact", Gpus(2, 80), 0, 12e9, 2e9),  # an all-reduce of 2 GB: half of it twice
        ("float32_master", Gpus(1, 80), 0, 30e9, 0),
        ("float32_master", Gpus(4, 80), 2, 15.5e9, 3e9),  # a quarter of the states; buckets
        ("float32_master", Gpus(4, 80), 3, 15.5e9, 6e9),
        # Two nodes of two: two adapters of 25 GB/s, a fifth of the 250 GB/s within a node.
        ("float32_master", Gpus(4, 80, 2), 2, 15.5e9, 5 * 3e9),
        # Two of eight: 200 GB/s; sixteen adapters of four nodes are no more, each node has four.
        ("compact", Gpus(16, 80, 2), 0, 12e9, 1.25 * 3.75e9),
        ("compact", Gpus(16, 80, 4), 0, 12e9, 2.5 * 3.75e9),
        # Twelve adapters a node: the wires within it are the bound.
        ("compact", Gpus(24, 80, 2), 0, 12e9, 4e9 * 23 / 24),
    ],
)
def test_an_optimizer_step_by_hand(
    weights: str, gpus: Gpus, stage: int, moved: float, received: float
) -> None:
    """Of 1 B parameters, in bytes of each GPU."""
    found = step_parts(10**9, weights, gpus, stage, H100)
    assert found == {
        "memory of the optimizer": pytest.approx(moved / 2.3e12),
        "transfers between GPUs": pytest.approx(received / 2.5e11),
    }


def test_adapters_are_averaged_and_zero_3_hands_the_policy_round() -> None:
    """Of two GPUs each receives half of the adapters' float32 gradients twice. In ZeRO 3 also half
    of the policy for the reference, judging, forward and backward passes and the decoder; of two
    epochs with two minibatches each those are more, the gradients' sums four.
    """
    part = "transfers between GPUs"
    lora = 4 * LLAMA_8B.lora(16)
    alone, two = (make_plan(REFERENCE_JOB, LLAMA_8B, SARM_BYTES, Gpus(n, 80)) for n in (1, 2))
    assert part not in alone.train_parts
    assert two.train_parts[part] == pytest.approx(lora / 2.5e11)
    over_two = make_plan(REFERENCE_JOB, LLAMA_8B, SARM_BYTES, Gpus(2, 80, 2))
    assert over_two.train_parts[part] == pytest.approx(lora / 2.5e10)
    more = {"zero_stage": 3, "num_ppo_epochs": 2, "num_mini_batches": 2, "batch_size": 8}
    sharded = make_plan(REFERENCE_JOB.model_copy(update=more), LLAMA_8B, SARM_BYTES, Gpus(2, 80))
    assert sharded.checkpointed_layers == 0
    handed = 2 * LLAMA_8B.parameters * (1 + 1 + 2 * 2 + 1) / 2
    assert sharded.train_parts[part] == pytest.approx((handed + 4 * lora) / 2.5e11)


def test_what_bounds_a_step_is_named_until_four_fifths_of_it_are() -> None:
    plan = make_plan(REFERENCE_JOB, LLAMA_8B, SARM_BYTES, Gpus(1, 80))
    by_hand = plan._replace(
        rollout_parts={"reading": 5.0, "small": 0.5}, train_parts={"products": 2.0, "merging": 0.5}
    )
    assert isinstance(by_hand, Plan) and by_hand.rollout_s == 5.5 and by_hand.train_s == 2.5
    assert bounds(by_hand, 2.0) == "reading 50%, products 20%, products of scoring 20%"
    assert bounds(by_hand._replace(rollout_parts={"reading": 45.5}), 2.0) == "reading 91%"


def test_rows_are_decoded_together_where_there_is_room() -> None:
    """By hand: 128 rows of 256 positions take 4 GiB; each token reads the weights once and 96 + 64
    positions of each row and launches small kernels; prompts are read at the rate of training.
    """
    wide = REFERENCE_JOB.model_copy(update={"batch_size": 128, "max_prompt_tokens": 96})
    plan = make_plan(wide, LLAMA_8B, SARM_BYTES, Gpus(1, 140))
    assert plan.decode_rows == 128 and plan.persistent_gib["KV cache"] == 4
    token = 2 * LLAMA_8B.parameters + 128 * (96 + 64) * 131072
    small, read = 32 * 24e-6 + 1e-4, 2 * 32 * LLAMA_8B.layer * 128 * 96 / 560e12
    assert plan.rollout_s == pytest.approx(128 * (token / 4.07e12 + small) + read)
    # Where there is less, a quarter of them, and the weights are read four times.
    waves = make_plan(wide, LLAMA_8B, SARM_BYTES, Gpus(1, 45))
    assert waves.decode_rows == 32 and waves.persistent_gib["KV cache"] == 1
    token = 2 * LLAMA_8B.parameters + 32 * (96 + 64) * 131072
    assert waves.rollout_s == pytest.approx(4 * 128 * (token / 2.94e12 + small) + read)
    # Each of four ranks decodes its own share.
    assert make_plan(wide, LLAMA_8B, SARM_BYTES, Gpus(4, 80)).decode_rows == 32


def test_several_arms_share_a_card() -> None:
    """Each takes no more than it may; it then computes its layers again, and is still recorded."""
    small = KNOWN["embedded:smollm2"]
    assert isinstance(small, Shape)
    ppo = PpoConfig(batch_size=128, max_prompt_tokens=256, max_new_tokens=64)
    alone = make_plan(ppo, small, 5e8, Gpus(1, 80))
    shared = make_plan(ppo.model_copy(update={"gpu_gib": 8}), small, 5e8, Gpus(1, 80))
    assert alone.recorded and alone.checkpointed_layers == 0 and alone.peak_gib > 20
    assert shared.recorded and shared.checkpointed_layers > 0 and shared.decode_rows == 128
    assert shared.peak_gib <= 0.95 * (8 - 1.2)
    # a card with less than an arm may use
    assert make_plan(ppo.model_copy(update={"gpu_gib": 99}), small, 5e8, Gpus(1, 8)) == shared


def test_other_sizes() -> None:
    assert parse_gpus("4x80") == Gpus(4, 80) and parse_gpus("2X141.5") == Gpus(2, 141.5)
    assert parse_gpus("3") == Gpus(3, 80) and parse_gpus("1x8x80") == Gpus(8, 80)
    assert (
        parse_gpus("2x8x141") == Gpus(16, 141, 2)
        and str(Gpus(16, 141, 2)) == "2 nodes of 8 x 141 GiB"
    )
    for text in (
        "many",
        "",
        "0x80",
        "4x",
        "4x1",
        "0x8x80",
        "2x0x80",
        "2x2x8x80",
        "-1x80",
        "-1x-8x80",
    ):
        with pytest.raises(UserError, match="such as 4x80, or nodes"):
            parse_gpus(text)
    assert (
        Shape(8, 16, 1, 2, 1, 4, 10, True).parameters
        == 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 16 + 80 + 8
    )


def test_the_command_prints_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(ROOT / "configs/llama31-8b.yaml"), "--gpus", "1x80"]) == 0
    out = capsys.readouterr().out
    assert (
        "8.03 B parameters, LoRA of rank 16" in out
        and "peak" in out
        and "GPU-hours" in out
        and "disk: 32.1 GB of policies" in out
    )
    assert "bound by " in out and "several nodes" not in out
    config = ["--config", str(ROOT / "configs/llama31-8b.yaml")]
    assert main([*config, "--gpus", "2x8x80", "ppo.lora=null"]) == 0
    out = capsys.readouterr().out
    assert "on 2 nodes of 8 x 80 GiB" in out and "assuming 25 GB/s between nodes" in out
    assert main(["--config", str(ROOT / "configs/llama31-8b.yaml"), "--gpus", "1x16"]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_the_gpu_run_has_a_plan_on_one_gpu(capsys) -> None:
    config = ["--config", str(ROOT / "configs" / "smollm2-gpu.yaml"), "--gpus", "1x80"]
    assert main(config) == 0
    assert "15 policies of 160 steps" in capsys.readouterr().out
    assert main([*config, "sweep={tau: [1.0], alpha: [1.0, 3.0], seeds: [0, 1]}"]) == 0
    assert "19 policies of 160 steps" in capsys.readouterr().out


def test_rollouts_in_fp8_by_hand() -> None:
    """With LoRA the merged bf16 copy of the layers gives way to one byte a weight; in full that
    comes on top. A token reads as many, and the head in bf16.
    """
    fp8_bytes, head = 32 * LLAMA_8B.layer, 2 * 128256 * 4096
    for lora in (True, False):
        ppo = REFERENCE_JOB if lora else REFERENCE_JOB.model_copy(update={"lora": None})
        half = ppo.model_copy(update={"rollout_dtype": "fp8"})
        plain, plan = (make_plan(p, LLAMA_8B, SARM_BYTES, Gpus(1, 139)) for p in (ppo, half))
        before, copy = (p.persistent_gib["decoder's copy"] * 2**30 for p in (plain, plan))
        assert before == (2 * 32 * LLAMA_8B.layer if lora else 0)
        assert copy == pytest.approx(fp8_bytes)
        rows, kv = REFERENCE_JOB.batch_size, 131072
        so_far = rows * (ppo.max_prompt_tokens + ppo.max_new_tokens / 2) * kv
        prompts = 2 * 32 * LLAMA_8B.layer * rows * ppo.max_prompt_tokens / 560e12
        widened = 32 * LLAMA_8B.layer / 1.5e12
        token = fp8_bytes / 3.0e12 + (head + so_far) / 4.07e12 + 32 * 24e-6 + 1e-4
        assert plan.rollout_s == pytest.approx(ppo.max_new_tokens * token + prompts + widened)
        assert plan.train_s == pytest.approx(plain.train_s + 3 * LLAMA_8B.parameters / 2.3e12)
        widest = 2 * 28672 * 4096 / 2**30
        assert plan.transient_gib["rollout"] == pytest.approx(
            plain.transient_gib["rollout"] + widest
        )


def test_the_command_tells_rollouts_in_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(ROOT / "configs/llama31-8b.yaml"), "--gpus", "1x80"]
    assert main([*config, "ppo.rollout_dtype=fp8"]) == 0
    assert "rows decoded at once from weights in fp8" in capsys.readouterr().out
