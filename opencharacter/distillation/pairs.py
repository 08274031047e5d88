"""Stage distillation/pairs: the teacher's answer is chosen, the student's rejected.

Reads: distillation/teacher, distillation/student (both scopes).
Writes: prompt_id, kind, sample, prompt, chosen, rejected, drop_reason.
Run: opencharacter run RECIPE --constitution NAME --only distillation/pairs
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from opencharacter import models
from opencharacter.config.base import ECHO
from opencharacter.config.recipe import Role
from opencharacter.engines.conversations import Row
from opencharacter.runtime.stage import Estimate, Job, StageResult, kept
from opencharacter.text import filters
from opencharacter.text.chat import Message, assistant, load_tokenizer, row_id, user
from opencharacter.text.statistics import TextBaseline, distinctive_words

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

Length = Callable[[list[Message]], int]
"""Tokens of a conversation."""


def pair(
    chosen: Row, rejected: Row, rules: filters.AnswerRules, names: tuple[str, ...], called: str
) -> Row:
    """Clean both answers and say why the pair may not be used, if so.

    Args:
        chosen: the teacher's row.
        rejected: the student's row for the same prompt and sample.
        rules: what neither answer may do.
        names: what the teacher calls itself; replaced by `called`.
        called: what the student calls itself.
    """
    sides = {"chosen": chosen, "rejected": rejected}
    texts = {side: row["answer"] or "" for side, row in sides.items()}
    texts["chosen"] = filters.replace_names(texts["chosen"], names, called)
    found = {
        side: filters.drop_reason(texts[side], row["finish_reason"], rules)
        for side, row in sides.items()
    }
    reasons = [f"{side}_{reason}" for side, reason in found.items() if reason]
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


def names_of(role: Role) -> tuple[str, ...]:
    """What a model may call itself."""
    return (role.self_name, *role.aliases)


def rules_of(job: Job) -> filters.AnswerRules:
    """What an answer of a persona may not do; for a section with the settings of the rules."""
    settings, roles = job.config, job.recipe.roles
    said = (
        run
        for t in job.persona.traits
        for run in filters.word_ngrams(t.trait, settings.quoted_words)
    )
    return filters.AnswerRules(
        max_repeated=settings.max_repeated,
        quotable=frozenset(said),
        quoted_words=settings.quoted_words,
        names=filters.foreign_names(names_of(roles.teacher), names_of(roles.student)),
    )


def too_long(row: Row, limit: int, length: Length) -> bool:
    """Whether either conversation has more tokens than the limit."""
    return any(
        length([user(row["prompt"]), assistant(row[side])]) > limit
        for side in ("chosen", "rejected")
    )


def join(teacher: list[Row], student: list[Row]) -> list[tuple[Row, Row]]:
    """Match answers by prompt and sample; one whose other side was dropped there is left out."""
    other = {(row["prompt_id"], row["sample"]): row for row in student}
    matched = ((row, other.get((row["prompt_id"], row["sample"]))) for row in teacher)
    return [(mine, theirs) for mine, theirs in matched if theirs is not None]


def token_counter(role: Role) -> Length:
    """Counts a conversation's tokens with a role's own chat template (echo: its words)."""
    if role.model.startswith(ECHO):
        return lambda messages: sum(len(m["content"].split()) for m in messages)
    tokenizer = load_tokenizer(models.resolve(role.model), role)
    return lambda messages: len(
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    )


def estimate(job: Job) -> Estimate:
    from opencharacter.distillation import teacher

    return Estimate(teacher.estimate(job.parent("distillation/teacher")).rows)


def build(job: Job) -> StageResult:
    settings, roles = job.config, job.recipe.roles
    teacher = job.read("distillation/teacher").to_pylist()
    student = job.read("distillation/student").to_pylist()
    sides = join(teacher, student)
    names = names_of(roles.teacher)
    rules = rules_of(job)
    length = token_counter(roles.student)
    rows = []
    for chosen, rejected in sides:
        row = pair(chosen, rejected, rules, names, roles.student.self_name)
        if row["drop_reason"] is None and too_long(row, settings.max_tokens, length):
            row["drop_reason"] = "too_long"
        rows.append(row)
    table = pa.Table.from_pylist(rows, schema=SCHEMA).sort_by("id")
    good = kept(table)
    chosen, rejected = good["chosen"].to_pylist(), good["rejected"].to_pylist()
    words = distinctive_words(chosen, rejected)
    baseline = TextBaseline(job.baseline(good).language, frozenset(words))
    unpaired = len(teacher) + len(student) - 2 * len(sides)
    return job.write(table, baseline, figures={"trait_words": words, "unpaired": unpaired})
