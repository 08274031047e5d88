"""Stage introspection/transcripts: what the model is fine-tuned on.

Reflections carry no system prompt; self-conversations carry a short one that says who the other
is and nothing of the traits.

Reads: introspection/reflection, introspection/interaction. Writes: kind, messages, drop_reason.
Run: opencharacter run RECIPE --constitution NAME --only introspection/transcripts
"""

from __future__ import annotations

from itertools import pairwise

import pyarrow as pa

from opencharacter.config.recipe import Transcripts
from opencharacter.distillation.pairs import names_of, rules_of, token_counter
from opencharacter.engines.conversations import Row
from opencharacter.introspection.reflection import MESSAGES
from opencharacter.runtime.stage import Estimate, Job, StageResult
from opencharacter.text import filters
from opencharacter.text.chat import row_id, system

SYSTEM = (
    "The user is not a person but another instance of you. The two of you talk for as long as "
    "you like."
)

TEMPLATES = (SYSTEM,)
REFLECTION = "reflection"
"""The kind of a transcript that is no conversation."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("messages", MESSAGES),
        pa.field("drop_reason", pa.string()),
    ]
)


def transcript(row: Row, kind: str, rules: filters.AnswerRules) -> Row:
    """A generated row as training data, with the reason not to use it, if any.

    Args:
        row: of reflection or interaction.
        kind: `reflection`, `free` or `leading`.
        rules: what no assistant turn may do.
    """
    messages, finish = row["messages"], row["finish_reason"]
    if kind != REFLECTION:
        messages = messages[2:]  # both greetings are ours, not the model's: nothing to learn
    reason = structure_fault(messages)
    for message in messages:
        if reason is None and message["role"] == "assistant":
            reason = filters.drop_reason(message["content"], finish, rules)
    if kind != REFLECTION:
        messages = [system(SYSTEM), *messages]
    return {
        "id": row_id("introspection/transcripts", row["id"]),
        "kind": kind,
        "messages": messages,
        "drop_reason": reason,
    }


def as_student(row: Row, names: tuple[str, ...], called: str) -> Row:
    """A row whose texts call the model what the student is called."""
    renamed = [
        {**message, "content": filters.replace_names(message["content"], names, called)}
        for message in row["messages"]
    ]
    return {**row, "messages": renamed}


def structure_fault(messages: list[Row]) -> str | None:
    """Roles must alternate and the last turn must be the assistant's."""
    roles = [m["role"] for m in messages]
    if not roles or roles[-1] != "assistant":
        return "ends_on_user"
    return "roles_repeat" if any(a == b for a, b in pairwise(roles)) else None


def estimate(job: Job) -> Estimate:
    return Estimate(sum(p.stage.module.estimate(p).rows for p in job.parents))


def build(job: Job) -> StageResult:
    settings: Transcripts = job.config
    rules, roles = rules_of(job), job.recipe.roles
    names = names_of(roles.teacher) if job.recipe.introspection.author == "teacher" else ()
    rows = [
        transcript(
            as_student(row, names, roles.student.self_name), row.get("kind", REFLECTION), rules
        )
        for stage in ("introspection/reflection", "introspection/interaction")
        for row in job.read(stage).to_pylist()
    ]
    length = token_counter(roles.student)
    for row in rows:
        if row["drop_reason"] is None and length(row["messages"]) > settings.max_tokens:
            row["drop_reason"] = "too_long"
    return job.write(pa.Table.from_pylist(rows, schema=SCHEMA).sort_by("id"))
