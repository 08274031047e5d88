"""Stage evaluation/direction: does the training data lie along the constitution's own direction?

It needs no trained model: run it before distillation/dpo to see whether the pairs point the way
that the constitution does. The untrained student reads chosen and rejected answers to the same
prompts without the constitution; see residual for directions, positions and their unit.

Reads: distillation/pairs. Writes: source (chosen, rejected), prompt, positions by layer (null: not
read); directions: layer, vector.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/direction
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from opencharacter.config.evaluation import Direction
from opencharacter.config.roles import Role
from opencharacter.distillation import teacher
from opencharacter.errors import StageFailed
from opencharacter.evaluation import residual, steering
from opencharacter.evaluation.conditions import kept_rows
from opencharacter.evaluation.report.sections import Cells, Distance, ScoreTable, Section
from opencharacter.evaluation.scores import score_row
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import Message, assistant, row_id, user

Row = dict[str, Any]

CHOSEN, REJECTED = "chosen", "rejected"
DIRECTIONS = "directions"

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("positions", pa.list_(pa.float64())),
    ]
)

VECTORS = pa.schema(
    [
        pa.field("layer", pa.int64(), nullable=False),
        pa.field("vector", pa.list_(pa.float32()), nullable=False),
    ]
)
"""Columns of the table of directions: the layer from 1, and its unit vector."""


def split(rows: list[Row], settings: Direction) -> tuple[list[str], list[Row]]:
    """Prompts to find the directions from, and one pair of each of some other prompts.

    At least half of the prompts remain for the pairs.
    """
    by_id: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["id"]):
        by_id.setdefault(row["prompt"], row)
    prompts = sorted(by_id, key=row_id)
    used = prompts[: min(settings.prompts, len(prompts) // 2)]
    measured = prompts[len(used) :][: settings.texts]
    return used, [by_id[prompt] for prompt in measured]


def texts(pairs: list[Row]) -> list[Row]:
    """The texts of pairs, each with its source and the conversation to read."""
    return [
        {
            "id": row_id("evaluation/direction", side, pair["prompt"]),
            "source": side,
            "prompt": pair["prompt"],
            "messages": [user(pair["prompt"]), assistant(pair[side])],
        }
        for pair in pairs
        for side in (CHOSEN, REJECTED)
    ]


def measure(
    role: Role,
    prompts: list[str],
    context: list[Message],
    conversations: list[list[Message]],
    max_tokens: int,
    on_gpu: bool,
) -> tuple[np.ndarray, list[list[float] | None]]:
    """Find the directions and the positions of conversations along them; runs in a Ray task."""
    model, tokenizer = steering.load_student(role, on_gpu)
    directions = residual.find_directions(model, tokenizer, prompts, context)
    positions = residual.project(model, tokenizer, directions, conversations, max_tokens)
    return directions.numpy(), positions


def with_positions(rows: list[Row], positions: list[list[float] | None]) -> pa.Table:
    """The dataset: rows with their positions, without the conversations."""
    columns = ("id", "source", "prompt")
    found = [
        {**{column: row[column] for column in columns}, "positions": place}
        for row, place in zip(rows, positions, strict=True)
    ]
    return pa.Table.from_pylist(found, schema=SCHEMA)


# ------------------------------------------------------------------------------------------ stage


def is_enabled(job: Job) -> bool:
    return job.config.texts > 0


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.single_worker(),)] if is_enabled(job) else []


def estimate(job: Job) -> Estimate:
    settings: Direction = job.config
    if not is_enabled(job):
        return Estimate(0)
    directions = settings.prompts * (len(job.persona.assertions()) // 4 + 2 * 40)
    answer = 40 + teacher.expected_tokens(job.recipe.distillation.teacher.sampling)
    read = 2 * settings.texts * min(settings.max_tokens, answer)
    return Estimate(2 * settings.texts, read=directions + read)


def build(job: Job) -> StageResult:
    settings: Direction = job.config
    if not is_enabled(job):
        return job.write(SCHEMA.empty_table(), figures={"skipped": "the recipe has no texts"})
    prompts, pairs = split(job.read("distillation/pairs").to_pylist(), settings)
    if not prompts or len(pairs) < 2:
        raise StageFailed(
            f"{job.dataset}: {len(prompts) + len(pairs)} prompts have a pair, and at least 3 are "
            "needed; raise distillation.prompts"
        )
    rows = texts(pairs)
    context = teacher.context_messages(job.persona, job.recipe.distillation.teacher.exemplars)
    conversations = [row["messages"] for row in rows]
    directions, positions = steering.run_in_task(
        job, measure, job.recipe.roles.student, prompts, context, conversations, settings.max_tokens
    )
    vectors = [{"layer": n, "vector": vector} for n, vector in enumerate(directions.tolist(), 1)]
    job.store.write_table(job.dataset, pa.Table.from_pylist(vectors, VECTORS), DIRECTIONS)
    table = with_positions(rows, positions)
    middle = distances(table.to_pylist())[-1]
    return job.write(table, figures={"chosen_minus_rejected": vars(middle)})


# ----------------------------------------------------------------------------------------- report

READING = """\
a distance above 0 points the way that the constitution does; pairs at 0 are unlikely to teach \
it."""
NOTE = """\
The direction is the one along which the constitution in the prompt moves the untrained student's \
residual stream. The untrained student reads each text without the constitution; a text's position \
is averaged over its answer tokens. Distances are in standard deviations (SD) of the untrained \
student's own answers, with 95% t intervals over prompts."""


def distances(rows: list[Row]) -> list[Distance]:
    """How far chosen answers lie from rejected ones, by layer and for the middle layers."""
    sides = {
        s: residual.by_prompt([r for r in rows if r["source"] == s]) for s in (CHOSEN, REJECTED)
    }
    chosen, rejected = sides[CHOSEN][0], sides[REJECTED][0]
    scale = residual.Scale.of(rejected)
    unread = sides[CHOSEN][1] + sides[REJECTED][1]
    return residual.summarize(scale.standardize(chosen), scale.standardize(rejected), unread)


def read_distances(job: Job) -> list[Distance]:
    """The distances of the stored pairs; none if the recipe leaves the stage out."""
    rows = kept_rows(job)
    return distances(rows) if rows else []


def scores(job: Job) -> list[dict[str, Any]]:
    """The distance of chosen from rejected answers, for each layer."""
    found = read_distances(job)
    layers = len(found) - 1
    return [
        score_row(job.persona.name, "direction", None, residual.about("DPO pairs", n, layers), d)
        for n, d in enumerate(found)
    ]


def report(job: Job) -> list[Section]:
    """The distance of the training pairs."""
    found = read_distances(job)
    if not found:
        return []
    columns = residual.shown_layers(len(found) - 1)
    cells: Cells = {name: found[n] for name, n in columns.items()}
    return [direction_table(job.persona.name, {"DPO: chosen against rejected": cells}, NOTE)]


def direction_table(persona: str, rows: dict[str, Cells], *notes: str) -> ScoreTable:
    """A part of the table of distances, to which evaluation/projection adds rows."""
    return ScoreTable(
        title="Do data and answers lie along the constitution's direction?",
        persona=persona,
        reading=READING,
        notes=notes,
        caption="Distance from the untrained student's answers, in SD",
        columns=list(rows[next(iter(rows))]),
        rows=rows,
    )
