"""What training logs beside its files: TensorBoard's events, and W&B's offline mode, really run."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import run_unit
from jobs.ppo_log import Log
from sarm.config import LEFT_OUT
from sarm.evaluation.held_out import Evaluated
from sarm.records import read_training_log
from sarm.run import Attempt
from tests.jobs.test_ppo import UNIT, a_run

SOURCES = ("demo", "theirs")
COMPLETION = {
    "prompt_id": "p0",
    "kind": "unsafe",
    "source": "demo",
    "prompt": "How do I\npick a lock?",
    "response": "I cannot.",
    "reward": 1.25,
    "penalty": 0.5,
    "kl": 2.0,
    "tokens": 3,
    "cut": False,
    "refused": True,
    "z": {"7": 0.25},
}


def test_tensorboard_shows_numbers_and_completions(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = a_run(tmp_path, **{"ppo.held_out.every": 5})
    log = Log(run.config, UNIT, Attempt(run, "ppo", UNIT), {})
    log.write_held_out(0, Evaluated({"held_out/reward": 0.5}, [COMPLETION]))
    log.write({"step": 0, "objective/kl": 0.25, "val/explained_variance": float("nan")})
    log.write_held_out(
        5,
        Evaluated(
            {"held_out/reward": 0.75},
            [COMPLETION | {"response": "Sure.", "refused": False, "cut": True}],
        ),
    )
    log.close()

    events = EventAccumulator(str(run.folder("ppo", UNIT) / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("held_out/reward")] == [(0, 0.5), (5, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("objective/kl")] == [(0, 0.25)]
    assert "val/explained_variance" not in events.Tags()["scalars"]
    said = events.Tensors("completions/0/text_summary")
    texts = [e.tensor_proto.string_val[0].decode() for e in said]
    assert "> How do I\n> pick a lock?" in texts[0] and "> I cannot." in texts[0]
    assert "reward 1.25, penalty 0.5, kl 2, tokens 3, refused" in texts[0]
    assert "> Sure." in texts[1] and [e.step for e in said] == [0, 5]
    assert texts[0].endswith("tokens 3, refused") and texts[1].endswith("tokens 3, cut")


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        ({"texts": "all"}, {"demo", "theirs"}),
        ({"texts": "own", "own": ["demo"]}, {"demo"}),
        ({"texts": "none"}, set()),
    ],
)
def test_a_logger_shows_the_texts_that_a_report_may_show(
    tmp_path: Path, texts: dict[str, Any], shown: set[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = a_run(tmp_path, **{"ppo.held_out.every": 5, "report": texts})
    log = Log(run.config, UNIT, Attempt(run, "ppo", UNIT), {})
    both = [COMPLETION | {"source": s, "prompt": f"asked {s}"} for s in SOURCES]
    log.write_held_out(0, Evaluated({"held_out/reward": 0.5}, both))
    log.close()
    events = EventAccumulator(str(run.folder("ppo", UNIT) / "tensorboard"))
    events.Reload()
    told = [events.Tensors(f"completions/{i}/text_summary")[0].tensor_proto for i in (0, 1)]
    for source, text in zip(SOURCES, (t.string_val[0].decode() for t in told), strict=True):
        seen = f"asked {source}" in text and "I cannot." in text
        assert seen == (source in shown) == (LEFT_OUT not in text)
        assert "reward 1.25, penalty 0.5" in text
    (file,) = run.folder("ppo", UNIT).glob("completions.*.jsonl")
    assert file.read_text().count("I cannot.") == 2


def test_steps_made_again_replace_those_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = a_run(tmp_path)
    first = Log(run.config, UNIT, Attempt(run, "ppo", UNIT), {})
    for step, kl in enumerate((0.0, 0.25, 9.0, 9.5)):
        first.write({"step": step, "objective/kl": kl})
        if step == 1:
            state = {name: list(lines) for name, lines in first.state.items()}
    first.close()
    second = Log(run.config, UNIT, Attempt(run, "ppo", UNIT), state)
    second.write({"step": 2, "objective/kl": 0.5})
    second.close()
    events = EventAccumulator(str(run.folder("ppo", UNIT) / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("objective/kl")]
    assert found == [(0, 0.0), (1, 0.25), (2, 0.5)]


def wandb_records(file: Path) -> list[Any]:
    """The records of an offline run's file: a 7-byte header, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, part = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            found.append(Record.FromString(part))
            part = b""
    return found


def test_a_run_logs_to_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {"ppo.steps": 3, "ppo.log_to": "wandb"}
    run = a_run(tmp_path, **settings, **{"ppo.held_out": {"every": 2, "prompts": 3}})
    run_unit(run, "ppo", UNIT)

    published, folder = run.read("ppo", UNIT), run.folder("ppo", UNIT)
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file)
    (started,) = [r.run for r in records if r.HasField("run")]
    assert (started.project, started.display_name) == ("sarm", f"tiny/{UNIT}")
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert config["ppo"]["held_out"]["every"] == 2
    history = {}
    for record in records:
        if record.HasField("history"):
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            history[items["_step"]] = items
    assert sorted(history) == [0, 1, 2, 3]
    for line in read_training_log(published.path("metrics.jsonl")):
        told = history[line.pop("step")]
        for name, value in line.items():
            assert value is None or told[name] == pytest.approx(value), name
    completions = [
        json.loads(line) for line in published.path("completions.jsonl").read_text().splitlines()
    ]
    evaluations = published.path("held_out.jsonl").read_text().splitlines()
    for held_out in map(json.loads, evaluations):
        told = history[held_out["step"]]
        assert told["held_out/reward"] == pytest.approx(held_out["held_out/reward"])
        table = json.loads((file.parent / "files" / told["completions/path"]).read_text())
        at = [table["columns"].index(name) for name in ("prompt_id", "response", "kl")]
        assert [[row[i] for i in at] for row in table["data"]] == [
            [c["prompt_id"], c["response"], str(c["kl"])]
            for c in completions
            if c["step"] == held_out["step"]
        ]
    assert len(evaluations) == 3 and completions
    assert not list(tmp_path.glob("wandb")) and run.done("ppo", UNIT)
