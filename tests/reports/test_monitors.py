"""Which monitors the report says that the verdict counts, and why the others do not."""

from __future__ import annotations

from pathlib import Path

from reports.frames import read_run
from reports.monitors import left_out, monitor_choice, monitors_sentence
from reports.probe_sections import features
from sarm.config import SelectConfig
from sarm.probing.monitors import MonitorCandidate
from sarm.probing.select import monitors_lack
from sarm.records import Monitor
from tests.runs import MONITOR_TAUS, evaluated_run, feature

SELECT = SelectConfig(monitors=3, monitor_max_cosine=0.3, monitor_max_correlation=0.5)


def candidate(latent: int, tau: float = 0.5, cosine: float = 0.1, correlation: float = 0.1):
    like = {"tau": tau, "max_cosine": cosine, "max_correlation": correlation}
    return Monitor(**feature(latent, "harming") | like)


def test_a_candidate_is_left_out_for_what_its_numbers_show() -> None:
    """Above a tau as high a latent fires at most as often, which shows a rate that is too low and
    no rate that is enough.
    """

    def why(one: Monitor, rates: dict[int, tuple[float, float]], *, full: bool = False) -> str:
        return left_out(one, SELECT, rates, full=full)

    assert why(candidate(7, cosine=0.4), {}) == "|cos| with a penalised one 0.40"
    assert why(candidate(7, correlation=0.5), {}) == "|correlation| with a penalised one 0.50"
    assert why(candidate(7), {7: (0.0, 0.01)}) == "base rate at most 0.01, outside 0.1 to 0.9"
    assert why(candidate(7, tau=0.0), {7: (0.0, 0.01)}) == "base rate 0.01, outside 0.1 to 0.9"
    for rates in ({7: (0.6, 0.01)}, {7: (0.0, 0.3)}, {}):
        assert why(candidate(7), rates).startswith("on the base policy's responses a rate outside")
        assert why(candidate(7), rates, full=True) == "beyond the first 3"


def test_a_monitor_that_hardly_fires_in_the_evaluation_does_not_count(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path / "run", seeds=(0, 1, 2))
    frames = read_run(run)
    first, second = MONITOR_TAUS
    assert monitor_choice(run, frames) == {"counted": [first, second], "dropped": []}
    rows = frames.every
    rows.loc[rows["arm"] == "base", f"z_{second}"] = 0.0
    found = monitor_choice(run, frames)
    assert found["counted"] == [first]
    shown = {"features": frames.features.tree() if frames.features else None}
    blocks = features(shown | {"monitor_choice": found})
    assert f"1 monitor counts: {first}. Of the" in getattr(blocks[-1], "text", "")
    assert found["dropped"] == [
        {"latent": second, "why": "rate in the evaluation outside 0.1 to 0.9"}
    ]


def test_what_select_finds_are_candidates() -> None:
    found = [MonitorCandidate(i, 0.0, 0.1, 0.1) for i in range(3)]
    said = monitors_lack(found[:2], found, SELECT)
    assert said.startswith("2 candidates for 3 monitors, before calibrate asks how often they fire")
    assert "of 3 confirmed harming latents" in said


def test_the_sentence_counts_and_names() -> None:
    dropped = [{"latent": i, "why": "base rate 0.01"} for i in (4, 5)]
    said = monitors_sentence({"counted": [3], "dropped": dropped})
    assert said == "1 monitor counts: 3. Of the candidates left out: 4, 5 (base rate 0.01)."
    assert monitors_sentence({"counted": [3, 9], "dropped": []}) == "2 monitors count: 3, 9."
    assert monitors_sentence({"counted": [], "dropped": dropped}).startswith("0 monitors count.")
    assert monitors_sentence({"counted": [], "dropped": []}) == ""
