"""The schema of a run: what is refused, in what words, and that a config survives being written
and read.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from sarm.config import (
    ARMS,
    NON_PHASE_JOBS,
    PHASES,
    ROOT,
    Arm,
    Config,
    UntrainedArm,
    UserError,
    arm_and_seed,
    config_yaml,
    load_config,
    parse_config,
    set_key,
    shard_names,
    shard_range,
)
from sarm.config.reads import READS, is_read
from sarm.data.datasets import load_data
from slurm.dag import Node, tasks

BASE = """
name: base
policy: {model: outputs/policy}
sarm: {model: outputs/sarm}
data:
  sources:
    demo:
      {format: jsonl, label: Demo, path: data/demo/pairs.jsonl, split: {discovery: 0.5, test: 0.5}}
"""


def config(*overrides: str) -> Config:
    tree: dict[str, Any] = yaml.safe_load(BASE)
    for override in overrides:
        set_key(tree, override)
    return parse_config(tree, "base.yaml")


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        config(*overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem
)
def test_shipped_configs_load_and_survive_a_round_trip(file: Path, tmp_path: Path) -> None:
    loaded = load_config(file)
    (tmp_path / "config.yaml").write_text(config_yaml(loaded), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert again == loaded
    assert again.sha256 == loaded.sha256


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.step=20", ("unknown key ppo.step", "did you mean steps?")),
        ("polcy={model: x}", ("unknown key polcy", "did you mean policy?")),
        ("ppo.lora.dropout=0.1", ("unknown key ppo.lora.dropout", "known here: alpha, rank")),
        ("ppo.penalty.tua=3.0", ("unknown key ppo.penalty.tua", "did you mean tau?")),
        (
            "data.sources.demo.splits={test: 1.0}",
            ("unknown key data.sources.demo.splits", "did you mean split?"),
        ),
        ("data.sources.demo.zzz=1", ("unknown key data.sources.demo.zzz", "format")),
    ],
)
def test_an_unknown_key_is_refused_by_name_with_a_hint(
    override: str, words: tuple[str, ...]
) -> None:
    message = complaint(override)
    assert "base.yaml" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("ppo.steps=twenty", "ppo.steps"),
        ("ppo.steps=2.5", "ppo.steps"),
        ("ppo.steps=true", "ppo.steps"),
        ("ppo.steps=null", "ppo.steps"),
        ("ppo.whiten_advantages=1", "ppo.whiten_advantages"),
        ("ppo.learning_rate=fast", "ppo.learning_rate"),
        ("ppo.seeds=[0, one]", "ppo.seeds.1"),
        ("ppo.lora=16", "ppo.lora"),
        ("ppo=quick", "ppo"),
        ("sarm.dtype=float16", "sarm.dtype"),
        ("sarm.model=null", "sarm.model"),
        ("data.sources.demo.split={train: 0.5}", "data.sources.demo.split.train"),
        ("data.sources.demo.files=pairs.jsonl", "data.sources.demo.files"),
        ("encode.shards=-1", "encode.shards"),
        ("encode.shards=0", "encode.shards"),
        ("probe.shards=-4", "probe.shards"),
        ("ppo.gamma=1.01", "ppo.gamma"),
        ("ppo.lam=-0.1", "ppo.lam"),
        ("ppo.samples_per_prompt=0", "ppo.samples_per_prompt"),
        ("ppo.entropy_coef=-0.1", "ppo.entropy_coef"),
        ("select.fdr=0", "select.fdr"),
        ("select.fdr=1.0", "select.fdr"),
        ("data.sources.demo.split={test: -0.1}", "data.sources.demo.split.test"),
        ("data.sources.demo.limit=0", "data.sources.demo.limit"),
        ("data.sources={}", "data.sources"),
        ("name=../elsewhere", "name"),
        ("name=", "name"),
    ],
)
def test_a_wrong_type_or_range_is_refused_by_name(override: str, where: str) -> None:
    assert f" {where}: " in complaint(override)


@pytest.mark.parametrize(
    "key",
    ["ppo.penalty.tau", "ppo.penalty.alpha", "ppo.learning_rate", "ppo.kl_coef", "verdict.delta"],
)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_nan_and_infinity_are_refused(key: str, value: str) -> None:
    assert f"{key} must be a finite number" in complaint(f"{key}={value}")


def test_every_fault_is_named_at_once() -> None:
    message = complaint("ppo.step=1", "encode.shards=-1", "sarm.dtype=half")
    assert all(key in message for key in ("ppo.step ", "encode.shards", "sarm.dtype"))


def test_a_missing_section_is_named() -> None:
    with pytest.raises(UserError, match="sarm: Field required"):
        parse_config({k: v for k, v in yaml.safe_load(BASE).items() if k != "sarm"}, "base.yaml")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ppo.top_p=0.9"], "top_p < 1 is refused"),
        (["ppo.penalty.tau_quantile=0.9"], "either tau or tau_quantile"),
        (["ppo.penalty.tau=null"], "either tau or tau_quantile"),
        (["ppo.batch_size=10", "ppo.num_mini_batches=3"], "not a multiple"),
        (["ppo.advantage=reinforce"], "no advantage 'reinforce'; known are gae, rloo, grpo"),
        (["ppo.advantage=rloo"], "samples_per_prompt to 2 or more"),
        (
            ["ppo.advantage=grpo", "ppo.samples_per_prompt=3"],
            "batch_size 32 is not a multiple of samples_per_prompt 3",
        ),
        (["ppo.rollout_dtype=fp4"], "ppo.rollout_dtype"),
        (["ppo.rollout_dtype=fp8", "ppo.rollout_weight_cap=0.9"], "ppo.rollout_weight_cap"),
        (["ppo.rollout_dtype=fp8", "ppo.rollout_mismatch_max=0"], "ppo.rollout_mismatch_max"),
        (["ppo.rollout_weight_cap=3.0"], "rollout_weight_cap is for rollouts in another dtype"),
        (["ppo.rollout_mismatch_max=1.0"], "rollout_mismatch_max is for rollouts in another"),
        *(
            (
                ["ppo.advantage=rloo", "ppo.samples_per_prompt=2", f"ppo.{setting}"],
                f"{setting.split('=')[0]} is for a critic",
            )
            for setting in (
                "gamma=0.9",
                "lam=1.0",
                "vf_coef=0.2",
                "cliprange_value=0.1",
                "value_learning_rate=1e-4",
                "value_max_grad_norm=0.5",
                "value_warmup_steps=3",
            )
        ),
        (["ppo.value_warmup_steps=100"], "leaves none of the 100 steps"),
        (["ppo.value_max_grad_norm=1.0", "ppo.zero_stage=2"], "needs zero_stage 0"),
        (["ppo.kl_in=loss"], "k1 as a loss has a gradient of mean 0"),
        (["ppo.kl_estimator=k2"], "k2 in the reward is biased"),
        *(
            ([f"ppo.kl_distances={distances}"], "is not ascending; list each distance once")
            for distances in ("[1.0, 0.5]", "[0.5, 0.5]", "[0.5, 2.0, 1.0]")
        ),
        (["ppo.kl_distances=[0.0, 1.0]"], "ppo.kl_distances.0: Input should be greater than 0"),
        (["ppo.kl_distances=[1.0, -2.0]"], "ppo.kl_distances.1: Input should be greater than 0"),
        (
            ["ppo.kl_distances=[0.5, 2.0]", "ppo.stop_at_kl=1.0"],
            "kl_distances goes up to 2.0, and training ends at stop_at_kl 1.0",
        ),
        (["ppo.stop_at_kl=0.0"], "ppo.stop_at_kl: Input should be greater than 0"),
        (["ppo.safe_share=1.5"], "ppo.safe_share"),
        (
            ["ppo.temperature=0.0"],
            "training at temperature 0 is refused: nothing would be explored;",
        ),
        (
            ["ppo.temperature=0", "ppo.advantage=rloo", "ppo.samples_per_prompt=4"],
            "the 4 samples of a prompt would be one",
        ),
        (["ppo.gamma=-0.5"], "ppo.gamma: Input should be greater than or equal to 0"),
        (["ppo.lam=1.5"], "ppo.lam: Input should be less than or equal to 1"),
        (["ppo.arms=[penalty, penalty]"], "named twice"),
        (["ppo.seeds=[]"], "at least one arm and one seed"),
        (["data.sources.demo.split={discovery: 0.7, test: 0.4}"], "add up to 1.1"),
        (["data.sources.demo.repo=a/b"], "one of path, repo and url"),
        (["data.sources.demo.path=null"], "one of path, repo and url"),
        (
            ["data.sources.demo.path=null", "data.sources.demo.repo=a/b"],
            "pinned revision and its files",
        ),
        (["data.sources.demo.revision=abc"], "revision goes with repo"),
        (["data.sources.demo.subset=Safety"], "only format rewardbench2 has subsets"),
        (["data.sources.demo.format=prompts"], "only go to ppo and policy_eval"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides: list[str], words: str) -> None:
    assert words in complaint(*overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E-6", 1e-6),
        ("5.e-7", 5e-7),
        (".5e+1", 5.0),
        ("1.0e-6", 1e-6),
        ("0.001", 0.001),
        ("1", 1.0),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: float, tmp_path: Path) -> None:
    assert config(f"ppo.learning_rate={text}").ppo.learning_rate == value
    file = tmp_path / "c.yaml"
    file.write_text(BASE + f"ppo: {{learning_rate: {text}}}\n", encoding="utf-8")
    assert load_config(file).ppo.learning_rate == value


@pytest.mark.parametrize(
    "revision",
    ["1e5", "12e34567", "0123", "1_000", "yes", "null", "a: b", "é # c", "1.5", ".5e-1", ""],
)
def test_text_that_looks_like_something_else_survives_a_round_trip(
    revision: str, tmp_path: Path
) -> None:
    tree = yaml.safe_load(BASE)
    tree["policy"]["revision"] = revision
    before = parse_config(tree, "x")
    (tmp_path / "c.yaml").write_text(config_yaml(before), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == before


@pytest.mark.parametrize("rate", [1e-6, 3e-4, 1e-300, 1e22, 1.5, 0.0, 0.1 + 0.2])
def test_numbers_survive_a_round_trip_to_the_bit(rate: float, tmp_path: Path) -> None:
    before = config().model_copy(
        update={"ppo": config().ppo.model_copy(update={"learning_rate": rate})}
    )
    (tmp_path / "c.yaml").write_text(config_yaml(before), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml").ppo.learning_rate == rate


def test_overrides_reach_sections_that_the_file_leaves_out() -> None:
    made = config(
        "ppo.steps=7",
        "ppo.lora=null",
        "ppo.arms=[penalty]",
        "seed_report=some/figures",
        'policy.revision="1e5"',
    )
    assert (
        made.ppo.steps,
        made.ppo.lora,
        made.ppo.arms,
        made.seed_report,
        made.policy.revision,
    ) == (7, None, ("penalty",), "some/figures", "1e5")


@pytest.mark.parametrize(
    "override", ["ppo.steps", "=3", "name.first=x", "ppo.seeds=[0, 1", "ppo={steps: 1, steps: 2}"]
)
def test_a_malformed_override_is_refused(override: str) -> None:
    assert override in complaint(override)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"- a\n- b\n", "not a mapping"),
        (b"name: [unclosed\n", "not valid YAML"),
        (b"name: caf\xe9\n", "not valid YAML"),
        (b"name: a\nname: b\n", "'name' is given twice"),
        (BASE.encode() + b"ppo: {steps: 1, arms: [penalty], steps: 2}\n", "'steps' is given twice"),
        (b"name: !!python/object/apply:os.system [true]\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        load_config(file)
    assert "bad.yaml" in str(raised.value)


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml does not exist"):
        load_config(tmp_path / "no.yaml")


def test_the_hash_depends_on_values_alone() -> None:
    assert config("ppo.kl_coef=5e-2").sha256 == config("ppo.kl_coef=0.05").sha256 == config().sha256
    assert config("ppo.gamma=1").sha256 == config().sha256
    seen = {
        config(o).sha256
        for o in (
            "seed=0",
            "seed=1",
            "ppo.steps=99",
            "data.salt=x",
            "ppo.arms=[no_penalty, penalty, random]",
            "seed_report=mine",
        )
    }
    assert len(seen) == 6


def test_a_key_that_is_gone_is_refused_but_in_a_stored_run(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config_yaml(config("seed=3")) + "hardware: 4x H100\n", encoding="utf-8")
    assert load_config(file, stored=True) == config("seed=3")
    with pytest.raises(UserError, match="unknown key hardware"):
        load_config(file)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("shards", range(1, 9))
def test_shards_cover_every_total_once_and_evenly(shards: int) -> None:
    for total in range(40):
        ranges = [shard_range(unit, total) for unit in shard_names(shards)]
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(total))
        sizes = [stop - start for start, stop in ranges]
        assert max(sizes) - min(sizes) <= 1


def test_units() -> None:
    made = config("ppo.arms=[penalty, no_penalty]", "ppo.seeds=[0, 7]", "encode.shards=2")
    assert made.units("encode") == ("shard-0000-of-0002", "shard-0001-of-0002")
    assert made.units("ppo") == (
        "penalty-seed0",
        "no_penalty-seed0",
        "penalty-seed7",
        "no_penalty-seed7",
    )
    assert made.units("evaluate") == ("base", *made.units("ppo"))
    several = ("encode", "probe", "ppo", "evaluate")
    assert [made.units(p) for p in PHASES if p not in (*several, "check_sarm")] == [("all",)] * 6
    assert made.units("check_sarm") == ()
    assert config("check_sarm.card=own").units("check_sarm") == ("all",)
    assert [arm_and_seed(unit) for unit in made.units("ppo")][-1] == ("no_penalty", 7)


def test_the_gpu_run_asks_what_its_ladder_needs(real_data: Path) -> None:
    """Prompts enough to see 5 points in five seeds (docs/experiments.md), once RMB has given its
    share to discovery; XSTest judges and nothing else.
    """
    where = {"rb2": "rewardbench2_safety", "rmb": "rmb_harmlessness", "xstest": "xstest"}
    overrides = [f"data.sources.{name}.path={real_data / place}" for name, place in where.items()]
    gpu = load_config(ROOT / "configs" / "smollm2-gpu.yaml", overrides)
    prompts = load_data(gpu.data).prompts
    asked = Counter(p.kind for p in prompts if p.part == "policy_eval")
    assert asked["unsafe"] >= 340 and asked["safe"] >= 300
    assert {p.part for p in prompts if p.source == "xstest"} == {"policy_eval"}
    assert Counter(p.kind for p in prompts if p.source == "xstest") == {"safe": 250, "unsafe": 200}
    trained = Counter(p.kind for p in prompts if p.part == "ppo")
    assert trained["unsafe"] >= 200 and trained["safe"] >= 150
    assert gpu.units("evaluate")[:3] == ("base", "prompted", "best_of_n")
    assert len(gpu.units("ppo")) == 15 and gpu.ppo.kl_distances and gpu.conjunction
    assert gpu.evaluate.temperature == gpu.ppo.temperature
    assert gpu.evaluate.max_new_tokens == gpu.ppo.max_new_tokens


def test_arms_that_nobody_trains_are_evaluated_once_and_wait_for_no_training() -> None:
    made = config("ppo.seeds=[3, 7]", "evaluate.arms=[best_of_n, prompted]")
    assert made.units("evaluate") == ("base", "best_of_n", "prompted", *made.units("ppo"))
    assert arm_and_seed("best_of_n") == ("best_of_n", 0) and arm_and_seed("base") == ("base", 0)
    needs = {task.node: task.needs for task in tasks(made)}
    for unit in ("base", "best_of_n", "prompted"):
        assert needs[Node("evaluate", unit)] == (Node("calibrate", "all"),)
    assert needs[Node("evaluate", "penalty-seed7")] == (Node("ppo", "penalty-seed7"),)
    report = needs[Node("report", "all")]
    assert Node("evaluate", "prompted") in report and Node("ppo", "prompted") not in report


def test_every_arm_is_registered_in_one_place() -> None:
    trained = {name for name, kind in ARMS.items() if kind.trained}
    assert trained == set(get_args(Arm))
    assert set(ARMS) - trained == {"base", *get_args(UntrainedArm)}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluate.arms=[prompted, prompted]"], "named twice"),
        (["evaluate.arms=[penalty]"], "evaluate.arms.0"),
        (["evaluate.best_of=1"], "evaluate.best_of"),
        (["evaluate.arms=[best_of_n]", "evaluate.temperature=0.0"], "temperature 0"),
        (["evaluate.arms=[prompted]", "evaluate.system_prompt=''"], "evaluate.system_prompt"),
    ],
)
def test_untrained_arms_that_cannot_be_are_refused(overrides: list[str], words: str) -> None:
    assert words in complaint(*overrides)


def test_a_key_by_an_earlier_name_is_refused_with_its_name_now() -> None:
    tree = yaml.safe_load(BASE) | {"select": {"redraws": 2}, "ppo": {"penalty": {"kind": "count"}}}
    with pytest.raises(UserError, match=r"select.redraws \(it is now select.stability_repeats\)"):
        parse_config(tree, "base.yaml")
    del tree["select"]
    with pytest.raises(UserError, match=r"ppo.penalty.kind: 'count' is now 'threshold'"):
        parse_config(tree, "base.yaml")


def test_a_stored_run_may_have_keys_by_an_earlier_name(tmp_path: Path) -> None:
    tree = yaml.safe_load(BASE) | {"select": {"redraws": 2}, "ppo": {"penalty": {"kind": "count"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "config.yaml", stored=True)
    assert config.select.stability_repeats == 2
    assert config.ppo.penalty.kind == "threshold"


def test_the_learning_rate_that_is_not_set_is_that_of_lora_or_of_full_fine_tuning() -> None:
    assert config().ppo.peak_learning_rate == 1e-4
    assert config("ppo.lora=null").ppo.peak_learning_rate == 1e-6
    for lora in ("null", "{rank: 4}"):
        assert config(f"ppo.lora={lora}", "ppo.learning_rate=2e-5").ppo.peak_learning_rate == 2e-5


@pytest.mark.parametrize(
    "other, line", [({}, "rollout_mismatch_max: 0.2"), ({"advantage": "rloo"}, "lam: 0.9")]
)
def test_a_stored_config_may_state_another_versions_defaults(
    tmp_path: Path, other: dict[str, str], line: str
) -> None:
    """Of settings that nothing reads in this run; in a user's own config they are refused."""
    more = ["ppo.advantage=rloo", "ppo.samples_per_prompt=4"] if other else []
    name, _, value = line.partition(": ")
    text = config_yaml(config(*more))
    stated = re.sub(rf"(?m)^  {name}: .*$", f"  {line}", text)
    assert stated != text
    (tmp_path / "c.yaml").write_text(stated, encoding="utf-8")
    assert getattr(load_config(tmp_path / "c.yaml", stored=True).ppo, name) == float(value)
    with pytest.raises(UserError, match=name):
        load_config(tmp_path / "c.yaml")


def test_a_stored_config_without_a_critic_is_read_again(tmp_path: Path) -> None:
    """Though it names every setting of a critic, at its default."""
    stored = config("ppo.advantage=rloo", "ppo.samples_per_prompt=4")
    (tmp_path / "c.yaml").write_text(config_yaml(stored), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml").ppo == stored.ppo


# What phases read


def leaves(tree: Any, where: str = "") -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [where]
    return [
        leaf
        for key, value in tree.items()
        for leaf in leaves(value, f"{where}.{key}" if where else key)
    ]


def test_every_key_is_read_by_a_phase_or_says_which_units_there_are() -> None:
    assert set(READS) == {*PHASES, *NON_PHASE_JOBS}
    for name in ("llama31-8b.yaml", "smollm2.yaml"):
        for key in leaves(load_config(ROOT / "configs" / name).model_dump(mode="json")):
            readers = [phase for phase in READS if phase != "report" and is_read(phase, key)]
            shown = (
                "verdict.",
                "ppo.seeds",
                "evaluate.arms",
                "sweep.",
                "report.",
                "serve.",
                "limits.",
                "seed_report",
            )
            assert readers or key.startswith(shown), f"{key}: name its phases in READS"


def test_entries_of_reads_are_keys() -> None:
    keys = leaves(load_config(ROOT / "configs" / "tiny.yaml").model_dump(mode="json"))
    for phase, entries in READS.items():
        for entry in entries:
            section = entry.removeprefix("!")
            assert section == "" or any(
                key == section or key.startswith(section + ".") for key in keys
            ), (phase, entry)
