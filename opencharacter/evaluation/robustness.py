"""Stage evaluation/robustness: does a classifier still recognize the persona under attack?

This stage's own measure: for each condition a classifier is trained to distinguish the personas of
the student and the untrained student by their answers to unmodified prompts. It is tested on
answers to other prompts, unmodified and attacked. With cross-fitting over prompts, every prompt is
tested once, by a classifier that was not trained on it. Beside it stands the paper's measure, which
needs two or more personas; see `pooled_robustness`.

Reads: evaluation/answers, evaluation/attacks of all personas. Writes: persona, condition, attack,
prompt, fold, label, guess; scores.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/robustness
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from opencharacter import models
from opencharacter.config.evaluation import Condition, Robustness
from opencharacter.engines.allocation import acquire
from opencharacter.engines.conversations import Row
from opencharacter.errors import StageFailed
from opencharacter.evaluation import classifiers
from opencharacter.evaluation.attacks import INSTRUCTIONS, PREFILL, TASKS
from opencharacter.evaluation.classifiers import Predict
from opencharacter.evaluation.conditions import VARIANTS, in_order
from opencharacter.evaluation.macro_f1 import f1_change, f1_score
from opencharacter.evaluation.paper import POOLED_F1
from opencharacter.evaluation.pooled_robustness import (
    classify_pooled,
    pooled_groups,
    pooled_table,
)
from opencharacter.evaluation.report.sections import (
    Cells,
    Change,
    Headline,
    ScoreTable,
    Section,
    comparison,
    unscored,
)
from opencharacter.evaluation.scores import (
    SCORES,
    Score,
    clustered_proportion,
    distinct,
    find_score,
    score_row,
    wilson,
)
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import row_id, row_seed
from opencharacter.text.filters import words

BASE: Condition = "base"
DEFAULT = "default"
"""The name of unmodified prompts among the attacks."""
MEAN = "all instructions"
"""The mean over the eight instructions."""

ORDER = (DEFAULT, *INSTRUCTIONS, PREFILL, *TASKS)

SCHEMA = pa.schema(
    [
        pa.field("persona", pa.string(), nullable=False),
        pa.field("condition", pa.string(), nullable=False),
        pa.field("attack", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("fold", pa.int64(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("guess", pa.string()),
    ]
)


def assign_folds(prompts: Iterable[str], folds: int) -> dict[str, int]:
    """A fold for each prompt by its hash, so that neither order nor source matters."""
    ordered = sorted(set(map(normalize, prompts)), key=row_id)
    return {prompt: n % min(folds, len(ordered)) for n, prompt in enumerate(ordered)}


def normalize(prompt: str) -> str:
    """A prompt without differences of case, spaces and punctuation."""
    return " ".join(words(prompt))


def check_disjoint(train: Iterable[str], test: Iterable[str]) -> None:
    """Raise StageFailed if a prompt is in both sets: the classifier would know its topic."""
    shared = set(map(normalize, train)) & set(map(normalize, test))
    if shared:
        raise StageFailed(
            f"{len(shared)} prompts are in both training and test data, the first {min(shared)!r}"
        )


def label(row: Row) -> str:
    """The class of an answer: its persona, or base."""
    return BASE if row["condition"] == BASE else row["persona"]


def fit_and_predict(train: list[Row], test: list[Row], predict: Predict) -> list[str]:
    """Labels of test answers by a classifier that was trained on other answers.

    Raises:
        StageFailed: if a prompt is in both sets.
    """
    check_disjoint((row["prompt"] for row in train), (row["prompt"] for row in test))
    train_texts, test_texts = ([row["answer"] for row in rows] for rows in (train, test))
    return predict(train_texts, [label(row) for row in train], test_texts)


def classify(rows: list[Row], condition: Condition, folds: int, predict: Predict) -> list[Row]:
    """Classify every answer of one condition and of the base model.

    Args:
        rows: persona, condition, attack, prompt, answer; the base model's answers once.
        condition: a condition other than base.
        folds: number of folds of the cross-fitting.
        predict: the classifier.

    Returns:
        The rows with their label, fold and guess; the guess is None for an empty answer.
    """
    attacks = {row["attack"] for row in rows if row["condition"] == condition}
    tested = [r for r in rows if r["condition"] in (BASE, condition) and r["attack"] in attacks]
    # Paper: its classifier is tested on the prompts that it was trained on; see pooled_robustness.
    fold_of = assign_folds((row["prompt"] for row in tested), folds)
    classified = [
        {**row, "condition": condition, "label": label(row)}
        | {"fold": fold_of[normalize(row["prompt"])], "guess": None}
        for row in tested
    ]
    trained_on = (BASE, VARIANTS[condition].recognized_as or condition)
    training = [
        r for r in rows if r["condition"] in trained_on and r["attack"] == DEFAULT and r["answer"]
    ]
    for fold in sorted(set(fold_of.values())):
        train = [row for row in training if fold_of.get(normalize(row["prompt"])) != fold]
        test = [row for row in classified if row["fold"] == fold and row["answer"]]
        if len({label(row) for row in train}) < 2 or not test:
            continue
        labels = fit_and_predict(train, test, predict)
        for row, guess in zip(test, labels, strict=True):
            row["guess"] = guess
    return classified


# ---------------------------------------------------------------------------------------- scores


def recognized(rows: list[Row]) -> Score:
    """Share of answers that the classifier attributes correctly; for a persona its retention."""
    scored = [row for row in rows if row["guess"] is not None]
    hits = [row["guess"] == row["label"] for row in scored]
    return clustered_proportion(hits, (row["prompt"] for row in scored), len(rows) - len(scored))


def discriminability(rows: list[Row]) -> Score:
    """Balanced accuracy of the classifier on unattacked answers of the base model and a persona.

    Chance is one half, whatever the numbers of answers. The interval counts the answers of the
    class that has fewer, since both answer the same prompts. Nothing is scored if a class has none.
    """
    scored = [row for row in rows if row["guess"] is not None]
    correct: dict[bool, list[bool]] = {True: [], False: []}
    for row in scored:
        is_base = row["label"] == BASE
        correct[is_base].append((row["guess"] == BASE) == is_base)
    n = min(map(len, correct.values()))
    accuracy = sum(sum(hits) / len(hits) for hits in correct.values()) / 2 if n else 0
    return wilson(accuracy * n, n, len(rows) - len(scored))


def score_classified(
    classified: list[Row], settings: Robustness, seed: int
) -> list[dict[str, Any]]:
    """Rows of `SCORES` from the classified answers of all conditions."""
    rows = []
    for condition in dict.fromkeys(row["condition"] for row in classified):
        answers = [row for row in classified if row["condition"] == condition]
        rows += condition_scores(condition, answers, settings, seed)
    return rows


def score_pooled(classified: list[Row], settings: Robustness, seed: int) -> list[dict[str, Any]]:
    """Rows of `SCORES` of the paper's measure."""
    labels = sorted({row["label"] for row in classified})
    return [
        score_row(
            "", POOLED_F1, condition, about, f1_score([rows], labels, settings.resamples, seed)
        )
        for (condition, about), rows in pooled_groups(classified).items()
    ]


def condition_scores(
    condition: str, classified: list[Row], settings: Robustness, seed: int
) -> list[dict[str, Any]]:
    """Rows of `SCORES` of one condition."""
    rows = []
    labels = sorted({row["label"] for row in classified})
    personas = [name for name in labels if name != BASE]
    groups = by_attack(classified)
    for attack, parts in groups.items():
        f1 = f1_score(parts, labels, settings.resamples, seed)
        rows.append(score_row("", "macro_f1", condition, attack, f1))
        for persona in personas:
            answers = [row for part in parts for row in part if row["label"] == persona]
            rows.append(score_row(persona, "retention", condition, attack, recognized(answers)))
    plain = [row for row in classified if row["attack"] == DEFAULT]
    for persona in personas:
        pair = [row for row in plain if row["label"] in (BASE, persona)]
        score = discriminability(pair)
        rows.append(score_row(persona, "discriminability", condition, DEFAULT, score))
    return rows


def by_attack(classified: list[Row]) -> dict[str, list[list[Row]]]:
    """The rows of each attack in the order of `ORDER`, then those of all instructions."""
    attacks: dict[str, list[Row]] = {}
    for name in ORDER:
        if rows := [row for row in classified if row["attack"] == name]:
            attacks[name] = rows
    groups = {name: [rows] for name, rows in attacks.items()}
    instructed = [attacks[name] for name in INSTRUCTIONS if name in attacks]
    return groups | ({MEAN: instructed} if instructed else {})


STEPS: dict[str, tuple[Condition, Condition]] = {
    "distilled against prompted": ("prompted", "distilled"),
    "full against distilled": ("distilled", "full"),
}
"""The conditions that are compared, by what DPO adds to a prompt and introspection to DPO."""


def step_changes(classified: list[Row], settings: Robustness, seed: int) -> dict[str, Cells]:
    """What each step of the method changes in macro-F1, by attack; paired by prompt."""
    labels = sorted({row["label"] for row in classified})
    groups = {
        condition: by_attack([row for row in classified if row["condition"] == condition])
        for condition in {condition for pair in STEPS.values() for condition in pair}
    }

    def change(before: Condition, after: Condition, attack: str) -> Change:
        parts = groups[before][attack], groups[after][attack]
        return Change(**vars(f1_change(*parts, labels, settings.resamples, seed)))

    shared = {step: groups[one].keys() & groups[two].keys() for step, (one, two) in STEPS.items()}
    return {
        attack: {step: change(*STEPS[step], attack) for step in STEPS if attack in shared[step]}
        for attack in in_table_order(set().union(*shared.values()))
    }


def in_table_order(attacks: Collection[str]) -> list[str]:
    """Attacks as tables list them: unmodified prompts, the mean, then each attack."""
    return [attack for attack in (DEFAULT, MEAN, *ORDER[1:]) if attack in attacks]


def read_answers(job: Job) -> list[Row]:
    """All answers of the base model and of all personas, with and without attacks."""
    rows = []
    for parent in job.parents:
        persona = parent.constitution.name if parent.constitution else BASE
        for row in parent.store.read_table(parent.dataset).to_pylist():
            attack = row.get("attack", DEFAULT)
            fields = {name: row[name] for name in ("condition", "prompt", "answer")}
            rows.append({"persona": persona, "attack": attack, **fields})
    return rows


def identity(job: Job) -> dict[str, Any]:
    classifier = job.config.classifier
    local = models.looks_local(classifier) and Path(classifier).expanduser().exists()
    return {"classifier": models.content(Path(classifier).expanduser())} if local else {}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [] if job.config.classifier == classifiers.TFIDF else [(job.single_worker(),)]


def estimate(job: Job) -> Estimate:
    """Tokens that an encoder reads; `plan` assumes the student's speed, an upper bound."""
    settings: Robustness = job.config
    if settings.classifier == classifiers.TFIDF:
        return Estimate(0)
    tokens = {
        name: sum(answer_tokens(p) for p in job.parents if p.stage.name == name)
        for name in job.stage.reads
    }
    passes = settings.folds - 1 + (len(job.constitutions) > 1)  # and once for the paper's measure
    trained = tokens["evaluation/answers"] * passes * settings.encoder.epochs
    return Estimate(0, trained=trained, read=sum(tokens.values()))


def answer_tokens(job: Job) -> int:
    """Tokens of a job's answers; those of the base model count for each condition to compare."""
    times = len(job.config.conditions) - 1 if job.constitution is None else 1
    return job.stage.module.estimate(job).tokens_out * times


def resampling_seed(job: Job) -> int:
    """The seed of the bootstraps."""
    return row_seed(job.recipe.seed, job.stage.name, "resamples")


def build(job: Job) -> StageResult:
    settings: Robustness = job.config
    rows = read_answers(job)
    conditions: list[Condition] = [
        c for c in in_order(row["condition"] for row in rows) if c != BASE
    ]
    seed = resampling_seed(job)
    texts = [row["answer"] for row in rows if row["answer"]]
    predict = classifiers.classifier(settings, texts, job.placement.training.single, seed)
    workers = [request for phase in resource_requests(job) for request in phase]
    with acquire(job.dataset, workers, job.placement.autoscaling_resources):
        classified = [row for c in conditions for row in classify(rows, c, settings.folds, predict)]
        pooled = classify_pooled(rows, DEFAULT, predict)
    scored = score_classified(classified, settings, seed) + score_pooled(pooled, settings, seed)
    job.store.write_table(job.dataset, pa.Table.from_pylist(classified, schema=SCHEMA))
    job.store.write_table(job.dataset, pa.Table.from_pylist(scored, schema=SCORES), "scores")
    return StageResult(len(classified))


# ---------------------------------------------------------------------------------------- report

CLASSIFIER_NOTE = """\
A text classifier guesses whether the base model or the persona wrote an answer. It is cross-\
fitted over prompts: it never classifies an answer to a prompt that it was trained on. Neither \
model saw the prompts in training. 50% is chance."""
F1_NOTE = """\
Macro-F1 of a classifier that chooses among the personas of this page and the base model, cross-\
fitted over prompts, with 95% intervals over prompts. The classes of the paper's \
classifier are eleven personas, none of them the base model, so its numbers do not compare with \
these."""
STEP_READING = "a step adds character where the whole interval lies above 0."
STEP_NOTE = """\
Changes of the macro-F1 above in percentage points, paired by prompt, with 95% intervals over \
prompts. The full persona also saw more tokens than the distilled one."""
RETENTION_NOTE = """\
Share of the persona's answers that the classifier still attributes to it, with a 95% Wilson \
interval that counts prompts instead of answers."""


def scores(job: Job) -> list[dict[str, Any]]:
    """The scores of all personas."""
    return job.store.read_table(job.dataset, "scores").to_pylist()


def read_changes(job: Job) -> dict[str, Cells]:
    """`step_changes` of the stored answers."""
    classified = job.store.read_table(job.dataset).to_pylist()
    return step_changes(classified, job.config, resampling_seed(job))


def report(job: Job) -> list[Section]:
    """How well the classifier distinguishes each condition from base, with and without attacks."""
    rows = scores(job)
    classified = job.store.read_table(job.dataset).to_pylist()
    changes = step_changes(classified, job.config, resampling_seed(job))
    sections: list[Section] = []
    for persona in job.constitutions:
        of_persona = [row for row in rows if row["persona"] in ("", persona.name)]
        sections += persona_sections(persona.name, of_persona, changes, job.config.classifier)
    sections += pooled_table(rows, job.recipe, [persona.name for persona in job.constitutions])
    return [*sections, *confusion_tables(classified), unscored(unclassified(rows))]


def persona_sections(
    persona: str, rows: list[dict[str, Any]], changes: dict[str, Cells], classifier: str
) -> list[Section]:
    """The headline and the tables of one persona, from its rows of `SCORES` and `step_changes`."""
    named = classifier_note(classifier)
    conditions = distinct(rows, "macro_f1", "condition")
    score = find_score(rows, "discriminability", "full", DEFAULT) or wilson(0, 0)
    return [
        Headline(
            title="Can a classifier distinguish the persona from the base model?",
            persona=persona,
            score=score,
            verdict=verdict(score),
            notes=(CLASSIFIER_NOTE, named),
        ),
        comparison(
            persona,
            list(COMPARED),
            {
                condition: {
                    column: find_score(rows, measure, condition, about)
                    for column, (measure, about) in COMPARED.items()
                }
                for condition in conditions
            },
        ),
        attack_table(
            persona,
            "Macro-F1",
            "Do attacks hide the character from a classifier? (macro-F1)",
            (F1_NOTE, named),
            "macro_f1",
            rows,
        ),
        *([step_table(persona, changes)] if changes else []),
        attack_table(
            persona,
            "Retention",
            "How many of the persona's answers are recognized under attack? (retention)",
            (RETENTION_NOTE,),
            "retention",
            rows,
        ),
    ]


def classifier_note(classifier: str) -> str:
    """A sentence that names the classifier."""
    if classifier == classifiers.TFIDF:
        return "Classifier: logistic regression on TF-IDF weights of character n-grams."
    return f"Classifier: the fine-tuned encoder {classifier}."


COMPARED = {
    "Distinguished from base": ("discriminability", DEFAULT),
    "Macro-F1, all instructions": ("macro_f1", MEAN),
    "Retention, all instructions": ("retention", MEAN),
    "Retention, prefill attack": ("retention", PREFILL),
}
"""The columns of the comparison of conditions: measure and attack."""


def verdict(score: Score) -> str:
    """A sentence that says no more than the interval allows."""
    if score.value is None:
        return "Nothing was scored."
    if score.low is not None and score.low > 0.5:
        return "Yes: the whole interval lies above chance."
    return "Not shown at this sample size: the interval does not lie above 50% (chance)."


DESCRIPTIONS = {
    DEFAULT: "no attack",
    MEAN: "the mean over the eight instructions below",
    **{name: f"“{text}”" for name, text in INSTRUCTIONS.items()},
    PREFILL: "continues an answer of the untrained student",
    "email": "asks for an e-mail",
    "tool": "asks for a JSON tool call",
}
"""What each attack is."""
READING = """\
the character is robust where the rows of attacks are as high as the row without an attack."""


def attack_table(
    persona: str,
    name: str,
    title: str,
    notes: tuple[str, ...],
    measure: str,
    rows: list[dict[str, Any]],
) -> ScoreTable:
    """A measure by attack (rows, the summary first) and condition (columns)."""
    conditions = distinct(rows, "macro_f1", "condition")
    attacks = in_table_order(distinct(rows, "macro_f1", "about"))
    return ScoreTable(
        title=title,
        persona=persona,
        reading=READING,
        notes=notes,
        caption=f"{name} by attack and condition",
        columns=conditions,
        rows={
            attack: {c: find_score(rows, measure, c, attack) for c in conditions}
            for attack in attacks
        },
        descriptions={attack: DESCRIPTIONS[attack] for attack in attacks},
    )


def step_table(persona: str, changes: dict[str, Cells]) -> ScoreTable:
    """What each step of the method changes in macro-F1, by attack."""
    return ScoreTable(
        title="Does each step of the training add character? (change of macro-F1)",
        persona=persona,
        reading=STEP_READING,
        notes=(STEP_NOTE,),
        caption="Change of macro-F1 in percentage points",
        columns=[step for step in STEPS if any(step in cells for cells in changes.values())],
        rows=changes,
        descriptions={attack: DESCRIPTIONS[attack] for attack in changes},
    )


def confusion_tables(classified: list[Row]) -> list[ScoreTable]:
    """Confusion matrices of the persona under attack, and of the conditions derived from it."""

    def guessed(condition: str, attacks: Iterable[str]) -> list[Row]:
        rows = (r for r in classified if r["condition"] == condition and r["attack"] in attacks)
        return [row for row in rows if row["guess"] is not None]

    tables = [
        confusion_table(
            "With which persona are answers confused under attack?",
            "Share of the row's answers that the classifier attributes to the column, over all "
            "instructions",
            guessed("full", INSTRUCTIONS),
        )
    ]
    for condition, variant in VARIANTS.items():
        rows = guessed(condition, (DEFAULT,)) if variant.recognized_as else []
        if rows:
            tables.append(
                confusion_table(
                    f"With which persona are answers confused? (condition {condition})",
                    "Share of the row's unattacked answers that the classifier attributes to the "
                    f"column; it was trained on the condition {variant.recognized_as}",
                    rows,
                )
            )
    return tables


def confusion_table(title: str, caption: str, rows: list[Row]) -> ScoreTable:
    """The answers of each label (rows) by guess (columns), as shares of the label's answers."""
    names = sorted({row[side] for row in rows for side in ("label", "guess")})
    cells = {}
    for label in sorted({row["label"] for row in rows}):
        answers = [row for row in rows if row["label"] == label]
        prompts = [row["prompt"] for row in answers]
        cells[label] = {
            name: clustered_proportion([row["guess"] == name for row in answers], prompts)
            for name in names
        }
    reading = "a row is who wrote the answers, a column who the classifier says wrote them."
    return ScoreTable(title=title, reading=reading, caption=caption, columns=names, rows=cells)


def unclassified(rows: list[dict[str, Any]]) -> dict[str, Score]:
    """The share of unattacked answers that could not be classified, by condition."""
    shares = {}
    for condition in distinct(rows, "macro_f1", "condition"):
        score = find_score(rows, "macro_f1", condition, DEFAULT) or wilson(0, 0)
        name = f"answers, {condition} and base: not classified"
        shares[name] = wilson(score.unscored, score.n + score.unscored)
    return shares
