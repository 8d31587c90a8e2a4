"""Is the SARM opened right? What it does on the data at hand beside what its card says of it:
`python -m jobs check_sarm --config C --run R`, or `make check-sarm`.

Publishes check.json, and card.json: what was measured, in the form of a card. Has nothing to do
where `check_sarm.card` is unset, and opens nothing where the SARM has no card. Stops where a figure
is off, unless `check_sarm.off` is warn.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sarm.config import ROOT, Config, UserError
from sarm.hub import local_model
from sarm.records import SarmCard, SarmCheck
from sarm.run import Attempt, RunDir


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Compare, publish, or say what is off and why that may be."""
    file, card = card_file(config), None
    if file is not None:
        attempt.note_file(file)
        card = SarmCard.read(file)
    elif not config.check_sarm.measure:
        SarmCheck(verdict="no card", source="").write(attempt.path("check.json"))
        attempt.publish()
        return
    check, measured, device = checked(config, card, attempt)
    for row in check.rows:
        print(told(row), flush=True)
    if check.verdict == "off":
        said = sentence(config.sarm.model, check)
        if config.check_sarm.off == "stop":
            raise UserError(f"{said}; check_sarm.off=warn goes on all the same")
        print(f"warning: {said}", file=sys.stderr)
    check.write(attempt.path("check.json"))
    measured.write(attempt.path("card.json"))
    attempt.publish(device=device)


def card_file(config: Config) -> Path | None:
    """None where the config names none, or the SARM's own and it has none. Raises UserError where
    the one it names is not there.
    """
    card = config.check_sarm.card
    if card is None:
        return None
    if card == "own":
        own = local_model(config.sarm.model, config.sarm.revision) / "card.json"
        return own if own.is_file() else None
    file = ROOT / card
    if not file.is_file():
        raise UserError(f"check_sarm.card: there is no file {file}; correct it")
    return file


def checked(
    config: Config, card: SarmCard | None, attempt: Attempt
) -> tuple[SarmCheck, SarmCard, str]:
    """(the comparison, what was measured as a card, the device)."""
    from sarm.data.conversations import pinned_template, tokenize_conversations
    from sarm.evaluation import sarm_check
    from sarm.reward_model.model import load_sarm

    given, missing = sarm_check.samples(config, card)
    model, tokenizer = load_sarm(config.sarm)
    facts = sarm_check.facts_of(model, tokenizer, config.sarm.dtype, pinned_template(tokenizer))

    def progress(done: int, total: int) -> None:
        attempt.progress(done, total, "texts")

    found = sarm_check.measure(model, tokenizer, given, config.sarm, progress=progress)
    measured = SarmCard(
        source=f"measured by check_sarm on {model.device.type}",
        d_sae=facts.d_sae,
        k=facts.k,
        layers=facts.layers,
        dtype=facts.dtype,
        template_sha256=facts.template_sha256,
        benchmarks=[one.benchmark for one in found],
    )
    if card is None:
        check = SarmCheck(verdict="measured", source="")
        return check, measured, str(model.device)
    check = sarm_check.compared(card, facts, found, missing)
    if check.verdict == "off" and given:
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenize_conversations(tokenizer, [said], 99)[0].ids
        bos = tokenizer.bos_token_id
        now = next((i for i, id_ in enumerate(ids) if id_ != bos), 0)
        tried = {
            how: sarm_check.measure(model, tokenizer, given, config.sarm, **ways)
            for how, ways in sarm_check.other_ways(now, bos is not None).items()
        }
        causes = sarm_check.likeliest(card, facts, tried, check)
        check = check.model_copy(update={"causes": causes})
    return check, measured, str(model.device)


def told(row: dict[str, object]) -> str:
    mark = "OFF" if row["off"] else "ok"
    return (
        f"{mark:4}{row['what']}: {row['found']:.6g}, published {row['published']:.6g}"
        f" (may differ by {row['tolerance']:.2g})"
    )


def sentence(model: str, check: SarmCheck) -> str:
    """What is off, and the likeliest causes."""
    off = [row for row in check.rows if row["off"]]
    figures = ", ".join(
        f"{row['what']} {row['found']:.4g} instead of {row['published']:.4g} ±"
        f" {row['tolerance']:.2g}"
        for row in off[:3]
    )
    more = f" and {len(off) - 3} more" if len(off) > 3 else ""
    causes = "; ".join(check.causes) or "not ruled out: another release than the card's"
    return (
        f"{model} does not do what {check.source} says of it ({figures}{more}), so it may not be"
        f" opened as it was trained: {causes}"
    )
