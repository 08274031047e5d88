"""A storage as a finished run leaves it; verdicts are drawn at random instead of made by models."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from opencharacter import pipeline
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution.schema import Constitution
from opencharacter.evaluation import (
    adherence,
    coherence,
    drift,
    judge,
    preferences,
    projection,
    rating,
    robustness,
    side_effects,
)
from opencharacter.evaluation.conditions import of_scope
from opencharacter.evaluation.pooled_robustness import PREFILL
from opencharacter.evaluation.scores import SCORES
from opencharacter.runtime.stage import Job, StageResult
from opencharacter.runtime.store import Store
from opencharacter.text.chat import row_id

Row = dict[str, Any]

STRENGTH = {"base": 0.2, "prompted": 0.5, "steered": 0.5, "distilled": 0.7, "full": 0.8}
"""Mean probability of the character under each condition."""


class Draws(random.Random):
    """Random verdicts."""

    def probability(self, condition: str, unreadable: float = 0.05) -> float | None:
        """A probability of the character; None if the verdict is unreadable."""
        if self.random() < unreadable:
            return None
        return min(1.0, max(0.0, self.gauss(STRENGTH[condition], 0.2)))

    def shown(self, condition: str) -> bool:
        """Whether an answer shows the character."""
        return self.random() < STRENGTH[condition]


def answers(job: Job, draw: Draws) -> list[Row]:
    texts = [f"Question {n}?" for n in range(job.config.count)]
    return [
        {
            "id": row_id(job.scope, prompt, condition),
            "prompt": prompt,
            "condition": condition,
            "answer": f"{condition}: <b>a | b</b>\n\n* {prompt}",
            "drop_reason": None,
        }
        for condition in of_scope(job, job.config.conditions)
        for prompt in texts
    ]


def classified(job: Job, draw: Draws) -> list[Row]:
    names = [persona.name for persona in job.constitutions]
    settings = job.recipe.evaluation.attacks
    attacks = [robustness.DEFAULT, *robustness.INSTRUCTIONS, PREFILL, *robustness.TASKS]
    conditions = [c for c in settings.conditions if c != "base"]
    return [
        {
            "persona": label,
            "condition": condition,
            "attack": attack,
            "prompt": f"Question {n}?",
            "fold": n % 2,
            "label": label,
            "guess": label if draw.shown(condition) else draw.choice([None, "base", *names]),
        }
        for condition in conditions
        for attack in attacks
        for label in ("base", *names)
        for n in range(settings.prompts)
    ]


def compared(job: Job, draw: Draws) -> list[Row]:
    rows = []
    for n in range(job.config.prompts):
        for rival in [c for c in job.recipe.evaluation.answers.conditions if c != "full"]:
            won = draw.random() > STRENGTH[rival] / 2
            rows.append(
                {
                    "prompt": f"Question {n}?",
                    "rival": rival,
                    "answer": "An answer.",
                    "rival_answer": "A longer answer.",
                    "verdicts": draw.choice([["A", "B"], ["B", "A"], ["A", "A"]]),
                    "winner": "full" if won else rival,
                    "probability": 0.5 + (won - 0.5) * 0.4,
                    "mass": 0.9,
                }
            )
    return rows


def games(job: Job, draw: Draws) -> list[Row]:
    traits = list(job.config.traits or preferences.all_traits())
    pairs = random.Random(0)
    rows = []
    for game in range(job.config.games):
        first, second = pairs.sample(traits, 2)
        for condition in of_scope(job, job.config.conditions):
            row = {"game": game, "condition": condition, "first": first, "second": second}
            row |= {"id": row_id(job.scope, game, condition), "prompt": "Question?", "answer": "A."}
            row |= {"framing": list(preferences.FRAMINGS)[game % 3], "drop_reason": None}
            rows.append(row | {"chosen": draw.choice([first, second, first, None])})
    return rows


def presence(job: Job, draw: Draws) -> list[Row]:
    settings = job.recipe.evaluation.scenarios
    kinds = {adherence.OCCASION: settings.occasions, adherence.PRESSURE: settings.pressures}
    return [
        {
            "scenario": row_id(trait, kind, n),
            "trait": trait,
            "kind": kind,
            "condition": condition,
            "presence": draw.probability(condition),
        }
        for trait in range(len(job.persona.traits))
        for kind, count in kinds.items()
        for n in range(count)
        for condition in job.config.conditions
    ]


def conversations(job: Job, draw: Draws) -> list[Row]:
    settings = job.config
    judged = drift.judged_turns(settings)
    return [
        {
            "conversation": n,
            "pressed": bool(n % 2),
            "condition": condition,
            "turns": ["Hello."] * settings.turns,
            "replies": ["Yes."] * settings.turns,
            "ended": None,
            "judged": judged,
            "presence": [draw.probability(condition) for _ in judged],
            "recognized": [draw.shown(condition) for _ in range(settings.turns)],
        }
        for n in range(settings.conversations)
        for condition in settings.conditions
    ]


def harms(job: Job, draw: Draws) -> list[Row]:
    return [
        {**row, "condition": condition, "harm": draw.probability(condition)}
        for row in side_effects.requests(job.config.items)
        for condition in job.config.conditions
    ]


def positions(job: Job, draw: Draws) -> list[Row]:
    conditions = job.recipe.evaluation.answers.conditions
    sources = [f"{projection.ANSWERS}/{c}" for c in conditions]
    return [
        {
            "source": source,
            "prompt": f"Question {n}?",
            "positions": [draw.gauss(STRENGTH.get(source.partition("/")[2], 0.5), 0.1)] * 4,
        }
        for source in [*sources, f"{projection.TRANSCRIPTS}/reflection"]
        for n in range(job.config.texts)
    ]


def verdicts(job: Job, draw: Draws) -> list[Row]:
    rows = []
    for row in judge.requests("judge", judge.spread(judge.gold(), job.config.gold_items)):
        share = min(0.99, max(0.01, draw.gauss(0.6, 0.3)))
        chosen = judge.likelier(share, (row["first"], row["second"]))
        rows.append({**row, "probability": share, "mass": 0.9, "chosen": chosen})
    return rows


WRITERS: dict[str, tuple[Callable[[Job, Draws], list[Row]], pa.Schema | None]] = {
    "evaluation/answers": (answers, None),
    "evaluation/robustness": (classified, robustness.SCHEMA),
    "evaluation/coherence": (compared, pa.schema(coherence.FIELDS)),
    "evaluation/preferences": (games, None),
    "evaluation/adherence": (presence, None),
    "evaluation/drift": (conversations, None),
    "evaluation/side_effects": (harms, None),
    "evaluation/projection": (positions, projection.SCHEMA),
    "evaluation/judge": (verdicts, None),
}


def write(
    recipe: Recipe, personas: Sequence[Constitution], store: Store, seed: int = 0
) -> list[Job]:
    """Write a finished run: manifests of all stages, and the rows of the evaluation.

    Returns:
        Its jobs.
    """
    draw, jobs = Draws(seed), pipeline.jobs(recipe, list(personas), Placement(), store)
    for job in jobs:
        name = job.stage.name
        trained = {"trained_tokens": 500} if name == "introspection/transcripts" else {}
        result = StageResult(10, dropped={"empty": 1}, tokens_out=100, figures=trained)
        if job.is_enabled and name in WRITERS:
            writer, schema = WRITERS[name]
            rows = [{"id": row_id(job.dataset, n), **r} for n, r in enumerate(writer(job, draw))]
            store.write_table(job.dataset, pa.Table.from_pylist(rows, schema=schema))
            result = StageResult(len(rows), figures=figures(name, rows))
            if name == "evaluation/robustness":
                write_robustness_scores(job, rows)
        elif name == "evaluation/rating":
            result = rating.build(job)
        pipeline.finish(job, result, 60.0)
    return jobs


def figures(stage: str, rows: list[Row]) -> dict[str, Any]:
    """What the manifest of a stage says of its rows, as far as scores read it."""
    return {"judges": {"judge": judge.figures(rows)}} if stage == "evaluation/judge" else {}


def write_robustness_scores(job: Job, rows: list[Row]) -> None:
    """Write the scores of both measures."""
    of_personas = [row for row in rows if row["label"] != "base" and row["guess"] != "base"]
    attacked = [row for row in of_personas if row["attack"] != robustness.DEFAULT]
    scored = robustness.score_classified(rows, job.config, 0)
    scored += robustness.score_pooled(attacked, job.config, 0)
    job.store.write_table(job.dataset, pa.Table.from_pylist(scored, schema=SCORES), "scores")
