"""The conditions that evaluations compare: variants of one student that get the same requests.

`base` is the untrained student, `prompted` the same with the constitution as its system prompt,
`steered` the same with steering vectors in its middle layers (see steering), `distilled` the
student after DPO, and `full` the trained persona. Two more are derived from trained personas:
`blended` is a weighted sum of several personas (see persona/blend), and `tuned` is the persona
after further training on general data (see persona/tune).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from opencharacter.config.evaluation import Condition
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Role
from opencharacter.distillation import teacher
from opencharacter.engines.conversations import Conversation, Row, RowFn
from opencharacter.engines.spec import EngineSpec, engine_spec
from opencharacter.evaluation.scores import Score, wilson
from opencharacter.runtime.stage import Job, ResourceRequest, without_dropped
from opencharacter.runtime.store import RemoteDir
from opencharacter.text.chat import Message, row_id, system


@dataclass(frozen=True)
class Variant:
    """How a condition differs from the untrained student.

    Args:
        adapter_stage: the stage whose adapter or steering vectors are merged into the student's
            weights; None for the student's own weights.
        recognized_as: the condition whose answers the classifier of evaluation/robustness is
            trained on, for a condition that should still be recognized as another one; None for
            the condition itself.
    """

    adapter_stage: str | None = None
    recognized_as: Condition | None = None


VARIANTS: dict[Condition, Variant] = {
    "base": Variant(),
    "prompted": Variant(),
    "steered": Variant("evaluation/steering"),
    "distilled": Variant("distillation/dpo"),
    "full": Variant("persona/merge"),
    "blended": Variant("persona/blend", recognized_as="full"),
    "tuned": Variant("persona/tune", recognized_as="full"),
}
"""All conditions, in the order in which they are listed everywhere."""

CHARACTERS_PER_TOKEN = 4
"""For `plan`."""

TRAINED = tuple(v.adapter_stage for v in VARIANTS.values() if v.adapter_stage)
"""The stages that make the conditions' adapters."""


def uses_condition(recipe: Recipe, condition: Condition) -> bool:
    """Whether any stage of a recipe compares a condition; the others are not trained."""
    evaluation = recipe.evaluation
    compared = [*evaluation.answers.conditions, *evaluation.preferences.conditions]
    compared += evaluation.attacks.conditions
    compared += evaluation.adherence.conditions if evaluation.scenarios.is_used else ()
    compared += evaluation.drift.conditions if evaluation.drift.conversations else ()
    compared += evaluation.side_effects.conditions if evaluation.side_effects.items else ()
    return condition in compared


def in_order(names: Iterable[str]) -> list[Condition]:
    """The distinct conditions among the names, in the order of `VARIANTS`."""
    present = set(names)
    return [condition for condition in VARIANTS if condition in present]


def of_scope(job: Job, conditions: Iterable[Condition]) -> list[Condition]:
    """Those conditions that a job answers, if the stage runs for the student and for each persona.

    `base` is the same for all personas and belongs to the student, the others to a persona.
    """
    of_persona = job.constitution is not None
    return [condition for condition in conditions if (condition != "base") == of_persona]


def condition_adapter(job: Job, condition: Condition) -> RemoteDir | Role | None:
    """The adapter that a condition adds to the student's weights; None for the student's own.

    It is a model if the recipe evaluates one in the place of the persona.
    """
    if condition == "full" and job.recipe.evaluation.subject.model:
        return job.recipe.evaluation.subject.model
    stage = VARIANTS[condition].adapter_stage
    return job.parent(stage).adapter if stage else None


def engines(job: Job, conditions: Sequence[Condition]) -> list[EngineSpec]:
    """The student's engines under some conditions, each once."""
    specs = [engine_spec(job, "student", condition_adapter(job, c)) for c in conditions]
    return list({spec.key(): spec for spec in specs}.values())


def answer_phases(
    job: Job, conditions: Sequence[Condition], judged: bool = False
) -> list[tuple[ResourceRequest, ...]]:
    """The requests of a job whose conditions answer side by side, if there is room for that.

    Args:
        job: the stage's job.
        conditions: the conditions to compare.
        judged: whether a judge gets the answers.
    """
    judge = [engine_spec(job, "judge")] if judged else []
    return [(*engines(job, conditions), *judge)] if conditions else []


def prefix_messages(job: Job, condition: Condition) -> list[Message]:
    """The messages that precede a conversation under a condition."""
    if condition != "prompted":
        return []
    return teacher.context_messages(job.persona, exemplars=False)


def prefix_tokens(job: Job, conditions: Sequence[Condition]) -> int:
    """Tokens that `plan` expects before a prompt, summed over the conditions."""
    messages = (m for condition in conditions for m in prefix_messages(job, condition))
    return sum(len(message["content"]) // CHARACTERS_PER_TOKEN for message in messages)


def system_message(prefix: list[Message], text: str) -> Message:
    """One system message with the content of a prefix and more: templates reject two."""
    return system("\n\n".join([*(message["content"] for message in prefix), text]))


async def answer_and_judge(
    row: Row, conversation: Conversation, answer_fn: RowFn, judge_fn: RowFn
) -> Row:
    """Answer a row and pass it to the judge, which is the conversation's partner."""
    assert conversation.partner is not None
    answered = await answer_fn(row, conversation)
    row.update(answered)  # kept even if the judge fails
    return answered | await judge_fn(row, conversation.partner)


def under_each_condition(
    job: Job,
    requests: list[Row],
    answer_fn: Any,
    fields: list[pa.Field],
    conditions: Sequence[Condition],
    judge_fn: RowFn | None = None,
    judge_fields: Sequence[pa.Field] = (),
) -> pa.Table:
    """Answer each request once under every condition, with the condition's own weights.

    If the engines of all conditions fit beside each other, they answer at the same time, otherwise
    one after another. If the engines of student and judge fit beside each other, the judge gets
    each answer as soon as it is finished, while others are still being generated. Otherwise the
    judge starts after all conditions have answered, so that its engine starts only once.

    Args:
        job: the stage's job.
        requests: rows with an `id`, which all conditions share and derive their seed from.
        answer_fn: row function of the student, with the keyword argument `prefix`.
        fields: columns of the answers, including `condition`.
        conditions: the conditions to compare.
        judge_fn: row function of the judge, which gets the row with its answer.
        judge_fields: columns that the judge adds.
    """
    from opencharacter.engines.generate import fit_together, generate, generate_side_by_side

    specs: dict[Condition, EngineSpec] = {
        c: engine_spec(job, "student", condition_adapter(job, c)) for c in conditions
    }
    judge = [engine_spec(job, "judge")] if judge_fn else []
    all_fields = [*fields, *judge_fields]

    def answers(condition: Condition) -> tuple[pa.Table, bool]:
        """Return the answers under a condition and whether they have been judged, if needed."""
        adapter = condition_adapter(job, condition)
        answer = partial(answer_fn, prefix=prefix_messages(job, condition))
        rows = with_condition(requests, condition)
        if judge_fn is None:
            shards = generate(job, rows, answer, "student", fields, condition, adapter)
        elif fit_together(job, [specs[condition], *judge]):
            both = partial(answer_and_judge, answer_fn=answer, judge_fn=judge_fn)
            shards = generate(
                job, rows, both, "student", all_fields, condition, adapter, partner="judge"
            )
        else:
            phase = f"{condition}-answers"
            shards = generate(job, rows, answer, "student", fields, phase, adapter)
            return shards.table(), False
        return shards.table(), True

    tables = []
    answered = generate_side_by_side(job, answers, specs, judge)
    for condition, (table, complete) in answered.items():
        if complete:
            tables.append(table)
            continue
        assert judge_fn is not None
        rows = without_dropped(table).to_pylist()
        tables.append(generate(job, rows, judge_fn, "judge", all_fields, condition).table())
        tables.append(table.filter(pc.is_valid(table["drop_reason"])))
    return pa.concat_tables(tables, promote_options="default").sort_by("id")


def with_condition(requests: list[Row], condition: Condition) -> list[Row]:
    """The requests as rows of one condition."""
    return [
        {**row, "id": row_id(row["id"], condition), "condition": condition, "seed_id": row["id"]}
        for row in requests
    ]


def kept_rows(job: Job, dataset: str | None = None) -> list[Row]:
    """The rows of a finished dataset that were not dropped; of the job's own if None is given."""
    return without_dropped(job.store.read_table(dataset or job.dataset)).to_pylist()


def missing_shares(rows: Iterable[Row], column: str, name: str) -> dict[str, Score]:
    """The share of rows whose value is missing, by condition.

    Args:
        rows: rows with a `condition`.
        column: the column of the value, for instance of a verdict.
        name: what is counted, with a field for the condition.
    """
    values: dict[str, list[Any]] = {}
    for row in rows:
        values.setdefault(row["condition"], []).append(row[column])
    return {
        name.format(condition): wilson(values[condition].count(None), len(values[condition]))
        for condition in in_order(values)
    }
