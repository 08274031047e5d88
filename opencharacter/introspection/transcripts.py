"""Stage introspection/transcripts: the transcripts that the model is fine-tuned on.

Reflections have no system prompt. Self-conversations have a short one, which says who the other
speaker is and does not mention any traits. For comparisons at an equal amount of training data,
`introspection.transcripts.trained_tokens` limits the tokens with a loss.

Reads: introspection/reflection, introspection/interaction. Writes: kind, messages, drop_reason.
Run: opencharacter run RECIPE --constitution NAME --only introspection/transcripts
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pyarrow as pa

from opencharacter import models
from opencharacter.config.base import ECHO
from opencharacter.config.recipe import Transcripts
from opencharacter.config.roles import Role
from opencharacter.distillation.pairs import answer_rules, model_names, token_counter
from opencharacter.engines.conversations import Row
from opencharacter.introspection.reflection import MESSAGES
from opencharacter.runtime.stage import Estimate, Job, StageResult
from opencharacter.text import filters
from opencharacter.text.chat import row_id, system
from opencharacter.text.templates import load_tokenizer

SYSTEM = (
    "The user is not a person but another instance of you. The two of you talk for as long as "
    "you like."
)

TEMPLATES = (SYSTEM,)
RULES = (filters,)
REFLECTION = "reflection"
"""The kind of transcripts that are not self-conversations."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("messages", MESSAGES),
        pa.field("drop_reason", pa.string()),
    ]
)


def make_transcript(row: Row, kind: str, rules: filters.AnswerRules) -> Row:
    """Convert a generated row to training data and determine its drop reason.

    Args:
        row: a row of reflection or interaction.
        kind: `reflection`, `free` or `leading`.
        rules: checks that every assistant turn must pass.

    Returns:
        A row of `SCHEMA`.
    """
    messages, finish_reason = row["messages"], row["finish_reason"]
    if kind != REFLECTION:
        messages = messages[2:]  # the two greetings are fixed texts, not the model's own
    reason = structure_error(messages)
    for message in messages:
        if reason is None and message["role"] == "assistant":
            reason = filters.drop_reason(message["content"], finish_reason, rules)
    if kind != REFLECTION:
        messages = [system(SYSTEM), *messages]
    return {
        "id": row_id("introspection/transcripts", row["id"]),
        "kind": kind,
        "messages": messages,
        "drop_reason": reason,
    }


def rename_to_student(row: Row, names: tuple[str, ...], self_name: str) -> Row:
    """Replace the names of another model by the student's name in all messages of a row."""
    renamed = [
        {**message, "content": filters.replace_names(message["content"], names, self_name)}
        for message in row["messages"]
    ]
    return {**row, "messages": renamed}


def structure_error(messages: list[Row]) -> str | None:
    """Return the drop reason if roles do not alternate or the last turn is not the assistant's."""
    roles = [m["role"] for m in messages]
    if not roles or roles[-1] != "assistant":
        return "ends_on_user"
    return "roles_repeat" if any(a == b for a, b in pairwise(roles)) else None


def text_token_counter(role: Role) -> Callable[[str], int]:
    """Return a function that counts the student's tokens of a text, or words for `echo:`."""
    if role.model.startswith(ECHO):
        return lambda text: len(text.split())
    tokenizer = load_tokenizer(models.resolve_role(role), role)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def within_budget(
    rows: list[Row], budget: int | None, count: Callable[[str], int]
) -> tuple[list[Row], int]:
    """Leave out the transcripts, by the order of their ids, with which a budget would be exceeded.

    Ids are hashes, so every kind keeps about the same share. Dropped rows stay.

    Args:
        rows: rows of `SCHEMA`.
        budget: tokens of all assistant turns together, or None.
        count: counts the tokens of a text.

    Returns:
        The rows that stay and the number of their tokens.
    """
    kept, total = [], 0
    for row in sorted(rows, key=lambda row: row["id"]):
        turns = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        tokens = sum(map(count, turns)) if row["drop_reason"] is None else 0
        if budget is None or total + tokens <= budget:
            kept.append(row)
            total += tokens
    return kept, total


def estimate(job: Job) -> Estimate:
    return Estimate(sum(p.stage.module.estimate(p).rows for p in job.parents))


def build(job: Job) -> StageResult:
    config: Transcripts = job.config
    rules, roles = answer_rules(job), job.recipe.roles
    names = model_names(roles.teacher) if job.recipe.introspection.author == "teacher" else ()
    generated = (
        rename_to_student(row, names, roles.student.self_name)
        for stage in ("introspection/reflection", "introspection/interaction")
        for row in job.read(stage).to_pylist()
    )
    rows = [make_transcript(row, row.get("kind", REFLECTION), rules) for row in generated]
    count_tokens = token_counter(roles.student)
    for row in rows:
        if row["drop_reason"] is None and count_tokens(row["messages"]) > config.max_tokens:
            row["drop_reason"] = "too_long"
    kept, tokens = within_budget(rows, config.trained_tokens, text_token_counter(roles.student))
    table = pa.Table.from_pylist(kept, schema=SCHEMA)
    return job.write(table, figures={"trained_tokens": tokens})
