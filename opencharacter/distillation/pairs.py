"""Stage distillation/pairs: preference pairs of the teacher's and the student's answers.

The teacher's answer is the chosen one and the student's answer the rejected one. Both are cleaned
and checked; a pair that fails a check keeps its row and gets a drop reason. Existing pairs
(`distillation.pairs.source`, see `imported`) are checked in the same way.

Reads: distillation/teacher, distillation/student (both scopes).
Writes: prompt_id, kind, sample, prompt, chosen, rejected, drop_reason.
Run: opencharacter run RECIPE --constitution NAME --only distillation/pairs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from opencharacter import models
from opencharacter.config.base import ECHO
from opencharacter.config.roles import Role
from opencharacter.distillation import imported
from opencharacter.distillation.prompts import imported_rows
from opencharacter.engines.conversations import Row
from opencharacter.errors import UserError
from opencharacter.runtime.stage import Estimate, Job, StageResult, without_dropped
from opencharacter.text import filters
from opencharacter.text.chat import Message, assistant, row_id, user
from opencharacter.text.statistics import TextBaseline, distinctive_words
from opencharacter.text.templates import load_tokenizer

RULES = (filters,)
NO_PAIRS = (
    "pairs {}: no row has a rejected answer; set it as distillation.teacher.source, so that the "
    "student answers the prompts"
)
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("chosen", pa.string()),
        pa.field("rejected", pa.string()),
        pa.field("drop_reason", pa.string()),
    ]
)

TokenCounter = Callable[[list[Message]], int]
"""Returns the number of tokens of a conversation."""


def make_pair(
    chosen: Row, rejected: Row, rules: filters.AnswerRules, names: tuple[str, ...], self_name: str
) -> Row:
    """Clean both answers of a pair and determine its drop reason.

    Args:
        chosen: the teacher's row.
        rejected: the student's row for the same prompt and sample.
        rules: checks that both answers must pass.
        names: names of the teacher, which are replaced in its answer.
        self_name: the student's name, which replaces them.

    Returns:
        A row of `SCHEMA`.
    """
    sides = {"chosen": chosen, "rejected": rejected}
    texts = {side: row["answer"] or "" for side, row in sides.items()}
    texts["chosen"] = filters.replace_names(texts["chosen"], names, self_name)
    reasons = []
    for side, row in sides.items():
        reason = filters.drop_reason(texts[side], row["finish_reason"], rules)
        if reason:
            reasons.append(f"{side}_{reason}")
    if texts["chosen"] == texts["rejected"]:
        reasons.append("identical")
    return {
        "id": row_id("distillation/pairs", chosen["id"], rejected["id"]),
        "prompt_id": chosen["prompt_id"],
        "kind": chosen["kind"],
        "sample": chosen["sample"],
        "prompt": chosen["prompt"],
        **texts,
        "drop_reason": reasons[0] if reasons else None,
    }


def model_names(role: Role) -> tuple[str, ...]:
    """Return the names that a model may use for itself."""
    return (role.self_name, *role.aliases)


def answer_rules(job: Job) -> filters.AnswerRules:
    """Return the checks for a persona's answers.

    Args:
        job: a job of the persona whose config has `max_repeated` and `quoted_words`.
    """
    config, roles = job.config, job.recipe.roles
    trait_ngrams = (
        ngram
        for trait in job.persona.traits
        for ngram in filters.word_ngrams(trait.trait, config.quoted_words)
    )
    return filters.AnswerRules(
        max_repeated=config.max_repeated,
        quotable=frozenset(trait_ngrams),
        quoted_words=config.quoted_words,
        names=filters.foreign_names(model_names(roles.teacher), model_names(roles.student)),
    )


def exceeds_max_tokens(row: Row, limit: int, count_tokens: TokenCounter) -> bool:
    """Return whether the chosen or the rejected conversation has more tokens than the limit."""
    return any(
        count_tokens([user(row["prompt"]), assistant(row[side])]) > limit
        for side in ("chosen", "rejected")
    )


def match_answers(teacher: list[Row], student: list[Row]) -> list[tuple[Row, Row]]:
    """Match the answers of teacher and student by prompt and sample; omit those without a match."""
    by_key = {(row["prompt_id"], row["sample"]): row for row in student}
    matches = ((row, by_key.get((row["prompt_id"], row["sample"]))) for row in teacher)
    return [(chosen, rejected) for chosen, rejected in matches if rejected is not None]


def token_counter(role: Role) -> TokenCounter:
    """Return a function that counts tokens with a role's chat template, or words for `echo:`."""
    if role.model.startswith(ECHO):
        return lambda messages: sum(len(m["content"].split()) for m in messages)
    tokenizer = load_tokenizer(models.resolve_role(role), role)
    return lambda messages: len(
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    )


def imported_pairs(job: Job) -> tuple[list[tuple[Row, Row]], Any]:
    """Return the pairs of the source, with the ids of generated ones, and the source's contents."""
    source, persona = job.config.source, job.persona.name
    prompts = {row["prompt"]: row for row in imported_rows(job, source)}
    contents = imported.read(source, persona)
    matches = []
    for row in contents.rows:
        prompt = prompts[row["prompt"]]
        key = (prompt["id"], row["sample"])
        student = job.recipe.roles.student.name
        scope = student if prompt["kind"] == "general" else job.scope
        shared = {"prompt_id": prompt["id"], "kind": prompt["kind"], "prompt": row["prompt"]}
        shared |= {"sample": row["sample"], "finish_reason": row["finish_reason"]}
        teacher_id = row_id("distillation/teacher", persona, *key)
        student_id = row_id("distillation/student", scope, *key)
        chosen = {"id": teacher_id, "answer": row["answer"], **shared}
        matches.append((chosen, {"id": student_id, "answer": row["rejected"], **shared}))
    return matches, contents


def check(job: Job) -> None:
    """Raise UserError before a run if the source of the pairs has none."""
    source = job.config.source
    if source and not any(r["rejected"] for r in imported.read(source, job.persona.name).rows):
        raise UserError(NO_PAIRS.format(imported.locate(source, job.persona.name)))


def identity(job: Job) -> dict[str, Any]:
    source = job.config.source
    return {"pairs": imported.source_digest(source, job.persona.name)} if source else {}


def notes(job: Job) -> list[str]:
    source = job.config.source
    if source is None:
        return []
    located = imported.locate(source, job.persona.name)
    return [f"pairs of {located}; neither teacher nor student answer prompts"]


def estimate(job: Job) -> Estimate:
    from opencharacter.distillation import teacher

    return Estimate(teacher.estimate(job.parent("distillation/teacher")).rows)


def build(job: Job) -> StageResult:
    config, roles = job.config, job.recipe.roles
    figures: dict[str, Any] = {}
    if config.source:
        matches, contents = imported_pairs(job)
        figures["content"] = contents.digest
        unpaired = 0
    else:
        teacher = job.read("distillation/teacher").to_pylist()
        student = job.read("distillation/student").to_pylist()
        matches = match_answers(teacher, student)
        unpaired = len(teacher) + len(student) - 2 * len(matches)
    names = model_names(roles.teacher)
    rules = answer_rules(job)
    count_tokens = token_counter(roles.student)
    rows = []
    for chosen, rejected in matches:
        row = make_pair(chosen, rejected, rules, names, roles.student.self_name)
        if row["drop_reason"] is None and exceeds_max_tokens(row, config.max_tokens, count_tokens):
            row["drop_reason"] = "too_long"
        rows.append(row)
    table = pa.Table.from_pylist(rows, schema=SCHEMA).sort_by("id")
    usable = without_dropped(table)
    words = distinctive_words(usable["chosen"].to_pylist(), usable["rejected"].to_pylist())
    baseline = TextBaseline(job.baseline(usable).language, frozenset(words))
    figures |= {"trait_words": words, "unpaired": unpaired}
    return job.write(table, baseline, figures=figures)
