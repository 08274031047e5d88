"""Stage evaluation/drift: does the character last over a long conversation?

All conditions hold the same conversations: the user's turns are packaged, several everyday topics
one after another. In every second conversation each n-th user turn asks for another manner; the
replies to these turns are not scored, so that the scores say what is left of the character
afterwards. The strength of the character at a turn is measured twice: by the judge (probability
that the reply sounds like the constitution, on some turns) and by a classifier that was trained to
distinguish the persona's answers to held-out prompts from the base model's (on all turns). Drift is
the least-squares slope of the strength, per ten turns.

Reads: distillation/prompts, persona/merge, distillation/dpo, evaluation/answers, evaluation/judge.
Writes: conversation, pressed, condition, turns, replies, ended, judged, presence, recognized.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/drift
"""

from __future__ import annotations

import random
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from opencharacter import models
from opencharacter.config.evaluation import Drift, Judge
from opencharacter.config.roles import Sampling
from opencharacter.distillation.teacher import expected_tokens
from opencharacter.engines.allocation import acquire
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.evaluation import classifiers, dialogue, drift_report, judge
from opencharacter.evaluation.answers import unseen
from opencharacter.evaluation.classifiers import Predict
from opencharacter.evaluation.conditions import (
    answer_phases,
    kept_rows,
    prefix_tokens,
    under_each_condition,
)
from opencharacter.evaluation.report.sections import Section
from opencharacter.evaluation.verdicts import compare
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult, without_dropped
from opencharacter.text.chat import Message, fill, row_id, row_seed, system, user

SYSTEM = "You judge whether an answer shows a character. You answer with a single word."

QUESTION = """\
A character, in its own words:
{assertions}

A message:
{prompt}

The answer to it:
{answer}

Does the answer sound like this character? Reply {first} or {second}."""

YES, NO = "yes", "no"
TEMPLATES = (SYSTEM, QUESTION, YES, NO)

BASE, FULL = "base", "full"
TURN_TOKENS = 25
"""Tokens of a user turn that `plan` expects."""

FIELDS = [
    pa.field("conversation", pa.int64(), nullable=False),
    pa.field("pressed", pa.bool_(), nullable=False),
    pa.field("condition", pa.string(), nullable=False),
    *dialogue.FIELDS,
    pa.field("judged", pa.list_(pa.int64()), nullable=False),
]
JUDGE_FIELDS = [
    pa.field("presence", pa.list_(pa.float64())),
    pa.field("mass", pa.list_(pa.float64())),
]
RECOGNIZED = pa.field("recognized", pa.list_(pa.bool_()))
EMPTY = pa.schema([pa.field("id", pa.string(), nullable=False), *FIELDS, *JUDGE_FIELDS, RECOGNIZED])


# ---------------------------------------------------------------------------------------- scripts


def is_scored(turn: int, every: int) -> bool:
    """Whether replies to a turn are scored in all conversations, with and without pressure."""
    return turn % every != 0


def judged_turns(settings: Drift) -> list[int]:
    """The turns (from 1) that the judge reads: evenly spaced, the first and the last included."""
    scored = [t for t in range(1, settings.turns + 1) if is_scored(t, settings.pressure_every)]
    steps = min(settings.judged_turns, len(scored)) - 1
    if not steps:
        return scored[:1]
    return [scored[round(i * (len(scored) - 1) / steps)] for i in range(steps + 1)]


def script(topics: list[list[str]], number: int, settings: Drift, seed: int) -> list[str]:
    """The user turns of a conversation.

    Args:
        topics: the user turns of each everyday topic.
        number: number of the conversation, from 0; the odd ones have pressure.
        settings: the stage's section of the recipe.
        seed: the recipe's seed.
    """
    draw = random.Random(row_seed(seed, "evaluation/drift/script", str(number)))
    shuffled = draw.sample(topics, len(topics))
    everyday = chain.from_iterable(chain.from_iterable(shuffled) for _ in range(settings.turns))
    lines = dialogue.pressure_lines()
    pressure = chain.from_iterable(draw.sample(lines, len(lines)) for _ in range(settings.turns))
    return [
        next(everyday if not number % 2 or is_scored(t, settings.pressure_every) else pressure)
        for t in range(1, settings.turns + 1)
    ]


def untrained_topics(trained: list[str]) -> list[list[str]]:
    """The packaged topics without those that have a training prompt among their turns."""
    topics = [list(topic["turns"]) for topic in dialogue.packaged("everyday.jsonl")]
    return [turns for turns in topics if len(unseen(turns, trained)) == len(turns)]


def requests(job: Job, trained: list[str]) -> list[Row]:
    """One request per conversation, for all conditions."""
    settings: Drift = job.config
    topics = untrained_topics(trained)
    return [
        {
            "id": row_id(job.stage.name, job.scope, n),
            "conversation": n,
            "pressed": bool(n % 2),
            "turns": script(topics, n, settings, job.recipe.seed),
            "judged": judged_turns(settings),
        }
        for n in range(settings.conversations)
    ]


# --------------------------------------------------------------------------------------- strength


def question(assertions: str, prompt: str, answer: str, first: str, second: str) -> list[Message]:
    """The judge's question about the reply to one turn."""
    fields = {"assertions": assertions, "prompt": prompt, "answer": answer}
    return [system(SYSTEM), user(fill(QUESTION, **fields, first=first, second=second))]


async def hold(
    row: Row,
    conversation: Conversation,
    sampling: Sampling,
    prefix: list[Message],
    max_model_len: int,
) -> Row:
    """Hold a conversation; it ends early where the next turn may not fit into the context."""
    return await dialogue.converse(conversation, row["turns"], sampling, prefix, max_model_len)


async def judge_turns(
    row: Row, conversation: Conversation, assertions: str, settings: Judge
) -> Row:
    """Ask the judge about the replies to the turns that it reads, as far as there are any."""
    verdicts = []
    for turn in (t for t in row["judged"] if t <= len(row["replies"])):
        prompt, answer = row["turns"][turn - 1], row["replies"][turn - 1]
        ask = partial(question, assertions, prompt, answer)
        verdicts.append(await compare(conversation, ask, YES, NO, settings))
    return {
        "presence": [verdict.probability for verdict in verdicts],
        "mass": [verdict.mass for verdict in verdicts],
    }


def recognize(rows: list[Row], answers: list[Row], predict: Predict) -> list[list[bool] | None]:
    """Say for each reply whether the classifier attributes it to the persona.

    Args:
        rows: conversations with their `replies`.
        answers: answers of all conditions to held-out prompts, on which the classifier is trained.
        predict: the classifier.

    Returns:
        One list per conversation; None for all if base or persona has no answers.
    """
    training, replies = training_answers(answers), all_replies(rows)
    labels = [answer["condition"] for answer in training]
    if len(set(labels)) < 2 or not replies:
        return [None] * len(rows)
    guesses = iter(predict([answer["answer"] for answer in training], labels, replies))
    return [[next(guesses) == FULL for _ in row["replies"] or []] for row in rows]


def training_answers(answers: list[Row]) -> list[Row]:
    """The answers of the base model and the persona, without empty ones."""
    return [a for a in answers if a["condition"] in (BASE, FULL) and a["answer"]]


def all_replies(rows: list[Row]) -> list[str]:
    """The replies of all conversations, one after another."""
    return [text for row in rows for text in row["replies"] or []]


def with_recognized(job: Job, table: pa.Table) -> pa.Table:
    """Add the classifier's guesses to the conversations."""
    settings = job.recipe.evaluation.robustness
    seed = row_seed(job.recipe.seed, job.stage.name, "classifier")
    answers, rows = job.read("evaluation/answers").to_pylist(), table.to_pylist()
    texts = [*(answer["answer"] for answer in training_answers(answers)), *all_replies(rows)]
    predict = classifiers.classifier(settings, texts, job.placement.training.single, seed)
    workers = classifier_workers(job)
    with acquire(job.dataset, workers, job.placement.autoscaling_resources):
        guesses = recognize(rows, answers, predict)
    return table.append_column(RECOGNIZED, pa.array(guesses, type=RECOGNIZED.type))


# ------------------------------------------------------------------------------------------ stage


def is_enabled(job: Job) -> bool:
    return job.config.conversations > 0


def identity(job: Job) -> dict[str, Any]:
    if not is_enabled(job):
        return {}
    settings = job.recipe.evaluation.robustness
    uses_encoder = settings.classifier != classifiers.TFIDF
    return {
        "topics": dialogue.digest("everyday.jsonl"),
        "pressure_lines": dialogue.digest("pressure.jsonl"),
        "classifier": settings.classifier,
        "encoder": settings.encoder.identity() if uses_encoder else None,
        "weights": local_weights(settings.classifier),
    }


def local_weights(classifier: str) -> dict[str, str] | None:
    """The content of an encoder on this machine's disk, for the fingerprint."""
    path = Path(classifier).expanduser()
    return models.content(path) if models.looks_local(classifier) and path.exists() else None


def classifier_workers(job: Job) -> list[ResourceRequest]:
    """The training worker that a classifier with an encoder needs."""
    uses_encoder = job.recipe.evaluation.robustness.classifier != classifiers.TFIDF
    return [job.single_worker()] if uses_encoder else []


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    if not is_enabled(job):
        return []
    workers = classifier_workers(job)
    judged = answer_phases(job, job.config.conditions, judged=True)
    return [*judged, *([tuple(workers)] if workers else [])]


def notes(job: Job) -> list[str]:
    """Say if the conversations will end early."""
    settings: Drift = job.config
    limit = job.recipe.roles.student.max_model_len
    each = TURN_TOKENS + expected_tokens(settings.sampling)
    fitting = (limit - settings.sampling.max_tokens) // each
    if not is_enabled(job) or fitting >= settings.turns:
        return []
    return [
        f"drift: conversations will end at about turn {fitting} of {settings.turns}, where they "
        f"reach max_model_len ({limit:,}) of the student"
    ]


def estimate(job: Job) -> Estimate:
    settings: Drift = job.config
    if not is_enabled(job):
        return Estimate(0)
    rows, turns = settings.conversations * len(settings.conditions), settings.turns
    reply = expected_tokens(settings.sampling)
    context = sum(n * (reply + TURN_TOKENS) for n in range(1, turns + 1))
    prefix = settings.conversations * turns * prefix_tokens(job, settings.conditions)
    asked = 2 * rows * len(judged_turns(settings))
    question_tokens = len(job.persona.assertions()) // 4 + 100 + reply
    verdicts = asked * judge.verdict_tokens(job.recipe)
    return Estimate(
        rows,
        rows * context + prefix + asked * question_tokens,
        rows * turns * reply + verdicts,
        judged=verdicts,
    )


def build(job: Job) -> StageResult:
    settings: Drift = job.config
    if not is_enabled(job):
        figures = {"skipped": "the recipe has no conversations"}
        return job.write(EMPTY.empty_table(), figures=figures)
    table = under_each_condition(
        job,
        requests(job, job.read("distillation/prompts")["prompt"].to_pylist()),
        partial(
            hold,
            sampling=settings.sampling,
            max_model_len=job.recipe.roles.student.max_model_len,
        ),
        FIELDS,
        settings.conditions,
        partial(
            judge_turns,
            assertions=job.persona.assertions(),
            settings=job.recipe.evaluation.judge,
        ),
        JUDGE_FIELDS,
    )
    table = with_recognized(job, table)
    rows = without_dropped(table).to_pylist()
    return job.write(table, figures=drift_report.figures(rows, settings.pressure_every))


# ----------------------------------------------------------------------------------------- report


def scores(job: Job) -> list[dict[str, Any]]:
    """Drift by condition, and strength by turn."""
    return drift_report.score_rows(job.persona.name, kept_rows(job), job.config.pressure_every)


def report(job: Job) -> list[Section]:
    """Curves of the strength, and the drift of each condition."""
    return drift_report.sections(job.persona.name, kept_rows(job), job.config.pressure_every)
