"""Train the refusal classifier: `python -m jobs train_refusals --config
configs/train-refusals.yaml --run R`.

Publishes the folder `refusal-classifier`; `train_refusals.output` is a copy of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sarm.config import ROOT, Config
from sarm.data.datasets import load_data
from sarm.evaluation.refusal_classifier import RefusalClassifier, load_classifier, save_classifier
from sarm.run import Attempt, RunDir
from sarm.training.publish import refuse_foreign, replace_folder
from sarm.training.refusals import (
    CUT_CHARACTERS,
    Labelled,
    Quality,
    labelled_pairs,
    quality,
    read_labels,
    read_texts,
    train_classifier,
    variants,
    xstest_answers,
)


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Label, train, judge, save."""
    settings = config.train_refusals
    if settings.output is not None:
        refuse_foreign(ROOT / settings.output, "train_refusals")
    data = [
        *labelled_pairs(
            load_data(config.data).pairs, settings.certain, read_labels(ROOT / settings.labels)
        ),
        *read_texts(ROOT / settings.texts),
    ]
    classifier, found = train_classifier(
        data, settings.l2, settings.folds, lambda i, n: attempt.progress(i, n, "folds")
    )
    out = attempt.directory("refusal-classifier")
    save_classifier(classifier, out)
    judged = {}
    if settings.xstest is not None:
        # What was saved is judged, not what was fitted.
        judged = judged_by(load_classifier(out), xstest_answers(ROOT / settings.xstest))
    (out / "README.md").write_text(card(config, data, classifier, found, judged), encoding="utf-8")
    attempt.publish()
    print(quality_table(found | judged), flush=True)
    if settings.output is not None:
        replace_folder(out, ROOT / settings.output, "train_refusals")


def judged_by(
    classifier: RefusalClassifier, answers: Sequence[Labelled]
) -> dict[str, list[Quality]]:
    """The quality on labelled answers, of whole, cut and trimmed texts, all and by source."""
    refuses = np.array([answer.refuses for answer in answers])
    source = np.array([answer.source for answer in answers])
    forms = [
        np.array(classifier.refuses(texts))
        for texts in zip(*(variants(answer.text) for answer in answers), strict=True)
    ]
    rows = {"XSTest": np.ones(len(answers), dtype=bool)} | {
        f"XSTest, {name}": source == name for name in dict.fromkeys(source.tolist())
    }
    return {
        name: [quality(form[mine], refuses[mine]) for form in forms] for name, mine in rows.items()
    }


def quality_table(rows: dict[str, list[Quality]]) -> str:
    """Sensitivity and false positives by source, as Markdown."""
    lines = [
        (
            f"| texts | refuse / comply | whole | cut at {CUT_CHARACTERS} characters | cut and"
            " trimmed |"
        ),
        "|---|---|---|---|---|",
    ]
    for name, forms in rows.items():
        cells = [f"{q.sensitivity:.3f} / {q.false_positives:.3f}" for q in forms]
        count = f"{forms[0].refusals:,} / {forms[0].compliances:,}"
        lines.append(f"| {' | '.join([name, count, *cells])} |")
    return "\n".join(lines)


def card(
    config: Config,
    data: Sequence[Labelled],
    classifier: RefusalClassifier,
    found: dict[str, list[Quality]],
    judged: dict[str, list[Quality]],
) -> str:
    """What was trained on what, how, and how good it is."""
    labels = {name: source.label for name, source in config.data.sources.items()}
    count = Counter((row.source, row.refuses) for row in data)
    rows = "\n".join(
        f"| {labels.get(name, 'our own texts')} | {count[name, True]:,} | {count[name, False]:,} |"
        for name in dict.fromkeys(row.source for row in data)
    )
    named = {labels.get(name, "our own texts"): forms for name, forms in found.items()}
    judgement = (
        "\n## XSTest\nAnswers of five models whose two annotators agree on full refusal or full"
        " compliance (arXiv 2308.01263), which took no part in training, nor in choosing the"
        f" model or its threshold.\n\n{quality_table(judged)}\n"
        if judged
        else ""
    )
    name = config.name
    command = f"python -m jobs train_refusals --config configs/{name}.yaml --run outputs/{name}"
    return f"""# Refusal classifier

Says how likely a response in English refuses a request: logistic regression on hashed words and
pairs of words of its first 80 words, with those of the opening counted once more; float16 weights.
From {classifier.threshold:g} on a response counts as a refusal. It reads the response alone.
`sarm/evaluation/refusal_classifier.py` runs it.

Command: `{command}`

## Data
Each response whole, cut at {CUT_CHARACTERS} characters, and trimmed to its last sentence end.

| responses of | refuse | comply |
|---|---|---|
{rows}

Labels: our own pairs and texts by how they were written; others where single labels
(`{config.train_refusals.labels}`) or phrases that leave no doubt say so, and left out elsewhere. A
source's refusals and its compliances each count by the square root of their number; L2 strength
{config.train_refusals.l2:g}.

## Quality
Sensitivity / false positives. Cross-validated over {config.train_refusals.folds} folds of prompts,
with the threshold that maximises their difference over these sources; labels made by phrases
flatter.

{quality_table(named)}
{judgement}"""
