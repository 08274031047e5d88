"""The conditions that are compared: one student in several states, asked the same things.

`base` is the student as it came, `prompted` the same with the constitution as its system prompt,
`steered` the same with a constant vector added within (see steering), `distilled` the student after
DPO, `full` the trained persona. Two more are made of trained personas: `blended` is several of them
in one (see persona/blend), `tuned` the persona after training on plain data (see persona/tune).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc

from opencharacter.config.recipe import Condition, Recipe
from opencharacter.distillation import teacher
from opencharacter.engines.conversations import Conversation, Row, RowFn
from opencharacter.engines.spec import EngineSpec, engine_spec
from opencharacter.runtime.stage import Job, kept
from opencharacter.runtime.store import RemoteDir
from opencharacter.text.chat import Message, row_id, system

TRAINED = {
    "steered": "evaluation/steering",
    "distilled": "distillation/dpo",
    "full": "persona/merge",
    "blended": "persona/blend",
    "tuned": "persona/tune",
}
"""The stage that made what is folded into the student's weights."""


def compared(recipe: Recipe, condition: Condition) -> bool:
    """Whether any stage of a recipe compares a condition: others are not made."""
    stages = (recipe.evaluation.answers, recipe.evaluation.preferences, recipe.evaluation.attacks)
    return any(condition in stage.conditions for stage in stages)


def in_order(names: Iterable[str]) -> list[str]:
    """Conditions as they are listed everywhere: the untrained first."""
    there = set(names)
    return [condition for condition in get_args(Condition) if condition in there]


def weights(job: Job, condition: Condition) -> RemoteDir | None:
    """What a condition adds to the student's weights; None for the student itself."""
    made_by = TRAINED.get(condition)
    return job.parent(made_by).adapter if made_by else None


def engines(job: Job, conditions: Sequence[Condition]) -> list[EngineSpec]:
    """The student's engines under some conditions, each once."""
    made = [engine_spec(job, "student", weights(job, c)) for c in conditions]
    return list({spec.key(): spec for spec in made}.values())


def before(job: Job, condition: Condition) -> list[Message]:
    """What stands before the conversation under a condition."""
    if condition != "prompted":
        return []
    return teacher.opening(job.persona, exemplars=False)


def joined(head: list[Message], text: str) -> Message:
    """One system message of what stands there already and more: templates refuse two."""
    return system("\n\n".join([*(message["content"] for message in head), text]))


async def in_turn(row: Row, talk: Conversation, first: RowFn, then: RowFn) -> Row:
    """An answer, and at once what another model says of it."""
    assert talk.partner is not None
    said = await first(row, talk)
    row.update(said)  # kept even if the partner fails
    return said | await then(row, talk.partner)


def under_each_condition(
    job: Job,
    requests: list[Row],
    talk: Any,
    fields: list[pa.Field],
    conditions: Sequence[Condition],
    judged: RowFn | None = None,
    judged_fields: Sequence[pa.Field] = (),
) -> pa.Table:
    """Have each request answered once under every condition, from the condition's own weights.

    Where student and judge have room side by side, an answer goes to the judge as soon as it is
    there, while others are still being written; elsewhere the judge begins when all conditions
    have answered, so that its engine starts once.

    Args:
        job: the stage that asks.
        requests: rows with an `id`, which all conditions share and draw their seed from.
        talk: the row function; takes `before` as a keyword.
        fields: columns of the answers, `condition` among them.
        conditions: to compare.
        judged: row function of the judge, which sees the row with its answer.
        judged_fields: columns that the judge adds.
    """
    from opencharacter.engines.generate import generate, is_warm, together

    warm_first = sorted(conditions, key=lambda c: not is_warm(job, "student", weights(job, c)))
    tables, said = [], dict[str, pa.Table]()
    for condition in warm_first:
        adapter, whole = weights(job, condition), [*fields, *judged_fields]
        answer = partial(talk, before=before(job, condition))
        rows = of_condition(requests, condition)
        if judged is None:
            tables.append(
                generate(job, rows, answer, "student", fields, condition, adapter).table()
            )
        elif together(job, "student", adapter, "judge"):
            both = partial(in_turn, first=answer, then=judged)
            parts = generate(job, rows, both, "student", whole, condition, adapter, partner="judge")
            tables.append(parts.table())
        else:
            part = f"{condition}-answers"
            said[condition] = generate(job, rows, answer, "student", fields, part, adapter).table()
    for condition, answered in said.items():
        assert judged is not None
        asked, whole = kept(answered).to_pylist(), [*fields, *judged_fields]
        tables.append(generate(job, asked, judged, "judge", whole, condition).table())
        tables.append(answered.filter(pc.is_valid(answered["drop_reason"])))
    return pa.concat_tables(tables, promote_options="default").sort_by("id")


def of_condition(requests: list[Row], condition: Condition) -> list[Row]:
    """Requests as rows of one condition."""
    return [
        {**row, "id": row_id(row["id"], condition), "condition": condition, "seed_id": row["id"]}
        for row in requests
    ]
