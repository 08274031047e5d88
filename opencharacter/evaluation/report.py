"""Stage evaluation/report: one HTML page about a student and its personas.

Reads: every manifest of the run, evaluation/answers, evaluation/preferences.
Writes: report.html, scores (every number on the page as Parquet).
Run: opencharacter report RECIPE --constitution NAME
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from opencharacter import quality
from opencharacter.chat import row_id
from opencharacter.evaluation.page import (
    Curve,
    PersonaReport,
    Quality,
    Report,
    Sample,
    Signature,
    StageLine,
    TraitShare,
    page,
)
from opencharacter.evaluation.scores import Score, wilson
from opencharacter.stage import Estimate, Job, Outcome, kept, redone

CURVES = {
    "distillation/dpo": (
        "DPO",
        ("loss", "dpo/sigmoid", "dpo/nll", "dpo/kl", "dpo/margin", "dpo/accuracy"),
    ),
    "introspection/sft": ("SFT", ("loss", "mean_token_accuracy", "grad_norm", "learning_rate")),
}

SCORES = pa.schema(
    [
        pa.field("persona", pa.string(), nullable=False),
        pa.field("measure", pa.string(), nullable=False),
        pa.field("condition", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("unscored", pa.int64(), nullable=False),
    ]
)


def told_apart(base: list[str], persona: list[str], folds: int) -> Score:
    """Accuracy of a classifier that attributes answers to the base model or the persona.

    TF-IDF of characters (1 to 4) and logistic regression, cross-validated so that both answers to
    a prompt are in the same fold. The interval counts prompts, not answers, as independent.

    Args:
        base: answers of the base model, one a prompt.
        persona: the persona's answers to the same prompts.
        folds: of the cross-validation; fewer if there are fewer prompts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    both = [(b, p) for b, p in zip(base, persona, strict=True) if b and p]
    n = len(both)
    if n < 4:
        return Score(None, None, None, 0, len(base))
    texts = [text for answers in both for text in answers]
    labels, groups = np.tile([0, 1], n), np.repeat(np.arange(n), 2)
    model = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    split = GroupKFold(min(folds, n))
    guesses = np.asarray(cross_val_predict(model, texts, labels, groups=groups, cv=split))
    return wilson(float(np.sum(guesses == labels)) / 2, n, len(base) - n)


def trait_shares(games: list[dict[str, Any]]) -> list[TraitShare]:
    """For each trait, how often it was chosen when on offer, the largest change first."""
    traits = sorted({row[side] for row in games for side in ("first", "second")})
    shares = [
        TraitShare(trait, share_of(trait, games, "base"), share_of(trait, games, "full"))
        for trait in traits
    ]
    return sorted(shares, key=lambda s: -abs((s.persona.value or 0) - (s.base.value or 0)))


def share_of(trait: str, games: list[dict[str, Any]], condition: str) -> Score:
    """One trait's share under one condition; games without a verdict count as unscored."""
    offered = [
        row
        for row in games
        if row["condition"] == condition and trait in (row["first"], row["second"])
    ]
    scored = [row["chosen"] for row in offered if row["chosen"]]
    return wilson(scored.count(trait), len(scored), len(offered) - len(scored))


def curves(job: Job) -> Iterator[Curve]:
    """The plotted curves of a training stage."""
    training, metrics = CURVES[job.stage.name]
    rows = job.store.read_table(job.dataset, "curves").sort_by("step").to_pylist()
    for metric in metrics:
        points = [(row["step"], row["value"]) for row in rows if row["metric"] == metric]
        if points:
            yield Curve(training, metric, points)


def stage_line(job: Job) -> StageLine:
    """A finished stage as a line of the page."""
    manifest = job.store.manifest(job.dataset)
    assert manifest is not None, job.dataset
    return StageLine(
        job.dataset,
        manifest["rows"],
        manifest["dropped"],
        manifest["seconds"],
        manifest["tokens_out"],
        redone(manifest["attempts"]),
    )


def quality_line(job: Job) -> Quality | None:
    """The signatures of a finished stage's texts, or None if it has none."""
    manifest = job.store.manifest(job.dataset)
    measured = dict(manifest["figures"].get("signatures", {})) if manifest else {}
    if not measured:
        return None
    texts, limits = int(measured.pop("texts")), quality.bounds(job.section.limits)
    return Quality(
        job.dataset,
        texts,
        [Signature(name, value, *limits.get(name, ())[:2]) for name, value in measured.items()],
    )


def ancestors(jobs: list[Job]) -> list[Job]:
    """The jobs and all that they were made from, parents first, each once."""
    found: dict[str, Job] = {}
    for job in jobs:
        for one in [*ancestors(list(job.parents)), job]:
            found.setdefault(one.dataset, one)
    return list(found.values())


def persona_report(job: Job, parents: list[Job]) -> PersonaReport:
    """All that is known of one persona.

    Args:
        job: the report's.
        parents: those of its parents that belong to the persona.
    """
    by_name = {p.stage.name: p for p in parents}
    answers, preferences = by_name["evaluation/answers"], by_name["evaluation/preferences"]
    samples = side_by_side(kept(answers.store.read_table(answers.dataset)).to_pylist())
    games = kept(preferences.store.read_table(preferences.dataset)).to_pylist()
    lineage = ancestors(parents)
    constitution = answers.persona
    base, persona = [s.base for s in samples], [s.persona for s in samples]
    return PersonaReport(
        name=constitution.name,
        description=constitution.description,
        assertions=[t.trait for t in constitution.traits],
        told_apart=told_apart(base, persona, job.section.folds),
        stages=[stage_line(one) for one in lineage],
        quality=list(filter(None, map(quality_line, lineage))),
        meanings=quality.MEANING,
        curves=[c for one in lineage if one.stage.name in CURVES for c in curves(one)],
        samples=samples[: job.section.samples],
        traits=trait_shares(games),
        settings=flat(job.recipe.identity()),
    )


def side_by_side(rows: list[dict[str, Any]]) -> list[Sample]:
    """Prompts that both conditions answered, in an order that no answer decides."""
    said = {(row["prompt"], row["condition"]): row["answer"] for row in rows}
    prompts = sorted({prompt for prompt, _ in said}, key=row_id)
    both = ((p, said.get((p, "base")), said.get((p, "full"))) for p in prompts)
    return [Sample(p, base, full) for p, base, full in both if base and full]


def flat(value: Any, at: str = "") -> dict[str, str]:
    """Nested settings as dotted names, those that are empty left out."""
    if not isinstance(value, dict):
        return {at: str(value)} if value not in (None, [], "") else {}
    return {
        k: v
        for key, item in value.items()
        for k, v in flat(item, f"{at}.{key}" if at else key).items()
    }


def score_rows(persona: PersonaReport) -> list[dict[str, Any]]:
    """Every score of a persona as a row of `SCORES`."""
    scores = [("told_apart", None, persona.told_apart)]
    for share in persona.traits:
        scores += [(share.trait, "base", share.base), (share.trait, "persona", share.persona)]
    return [
        {"persona": persona.name, "measure": measure, "condition": condition, **vars(score)}
        for measure, condition, score in scores
    ]


def estimate(job: Job) -> Estimate:
    return Estimate(0)


def build(job: Job) -> Outcome:
    personas = []
    for constitution in job.constitutions:
        mine = [p for p in job.parents if p.constitution == constitution]
        personas.append(persona_report(job, mine))
    packages = ("opencharacter", "ray", "torch", "transformers", "trl", "peft")
    report = Report(
        student=job.recipe.roles.student.name,
        recipe=job.recipe.name,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        personas=personas,
        versions={name: version(name) for name in packages},
    )
    job.store.write_bytes(f"{job.dataset}/report.html", page(report).encode())
    rows = [row for persona in personas for row in score_rows(persona)]
    job.store.write_table(job.dataset, pa.Table.from_pylist(rows, schema=SCORES), "scores")
    figures = {p.name: vars(p.told_apart) for p in personas}
    return Outcome(rows=len(rows), figures=figures)
