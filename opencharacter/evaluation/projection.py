"""Stage evaluation/projection: do answers and transcripts lie along the constitution's direction?

The untrained student reads the answers of every condition to the same held-out prompts, and the
transcripts of SFT, without the constitution. Distances are from the answers of `base`, in SD of
these; see residual. Where evaluation/adherence measured the same conditions, the report shows both.

Reads: evaluation/direction, evaluation/answers, introspection/transcripts. Writes: source, prompt,
positions by layer (null: not read).
Run: opencharacter run RECIPE --constitution NAME --only evaluation/projection
"""

from __future__ import annotations

from typing import Any

import numpy as np

from opencharacter.config.roles import Role
from opencharacter.distillation import teacher
from opencharacter.errors import StageFailed
from opencharacter.evaluation import adherence, residual, steering
from opencharacter.evaluation.conditions import in_order, kept_rows
from opencharacter.evaluation.direction import DIRECTIONS, SCHEMA, direction_table, with_positions
from opencharacter.evaluation.report.sections import Cells, Distance, ScoreTable, Section
from opencharacter.evaluation.scores import score_row
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import Message, assistant, row_id, user

Row = dict[str, Any]

ANSWERS, TRANSCRIPTS = "answers", "transcripts"
BASE = "base"


def answer_texts(rows: list[Row], count: int) -> list[Row]:
    """The answers of all conditions to the first prompts by their hash."""
    prompts = set(sorted({row["prompt"] for row in rows}, key=row_id)[:count])
    return [
        text(
            f"{ANSWERS}/{row['condition']}",
            row["prompt"],
            [user(row["prompt"]), assistant(row["answer"])],
        )
        for row in rows
        if row["prompt"] in prompts and row["answer"]
    ]


def transcript_texts(rows: list[Row], count: int) -> list[Row]:
    """The first transcripts of each kind by their id; the first user turn stands for a prompt."""
    taken: dict[str, int] = {}
    texts = []
    for row in sorted(rows, key=lambda row: row["id"]):
        taken[row["kind"]] = taken.get(row["kind"], 0) + 1
        if taken[row["kind"]] <= count:
            first = next(m["content"] for m in row["messages"] if m["role"] == "user")
            texts.append(text(f"{TRANSCRIPTS}/{row['kind']}", first, row["messages"], row["id"]))
    return texts


def text(source: str, prompt: str, messages: list[Message], key: str = "") -> Row:
    """A text with what identifies it and the conversation to read."""
    id = row_id("evaluation/projection", source, key or prompt)
    return {"id": id, "source": source, "prompt": prompt, "messages": messages}


def measure(
    role: Role,
    directions: np.ndarray,
    conversations: list[list[Message]],
    max_tokens: int,
    on_gpu: bool,
) -> list[list[float] | None]:
    """The positions of conversations along the directions; runs in a Ray task."""
    import torch

    model, tokenizer = steering.load_student(role, on_gpu)
    found = torch.from_numpy(directions)
    return residual.project(model, tokenizer, found, conversations, max_tokens)


# ------------------------------------------------------------------------------------------ stage


def is_enabled(job: Job) -> bool:
    return job.config.texts > 0 and job.recipe.evaluation.direction.texts > 0


def identity(job: Job) -> dict[str, Any]:
    return {"enabled": is_enabled(job)}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.single_worker(),)] if is_enabled(job) else []


def estimate(job: Job) -> Estimate:
    if not is_enabled(job):
        return Estimate(0)
    answers, limit = job.recipe.evaluation.answers, job.recipe.evaluation.direction.max_tokens
    count, interaction = job.config.texts, job.recipe.introspection.interaction
    per_kind = (interaction.free, interaction.leading)
    reflection = job.parent("introspection/transcripts").parent("introspection/reflection")
    reflections = reflection.stage.module.estimate(reflection).rows
    transcripts = sum(min(count, n) for n in (reflections, *per_kind))
    rows = min(count, answers.count) * len(answers.conditions)
    tokens = min(limit, 40 + teacher.expected_tokens(answers.sampling))
    return Estimate(rows + transcripts, read=rows * tokens + transcripts * limit)


def build(job: Job) -> StageResult:
    if not is_enabled(job):
        return job.write(SCHEMA.empty_table(), figures={"skipped": "the recipe has no texts"})
    count = job.config.texts
    rows = answer_texts(job.read("evaluation/answers").to_pylist(), count)
    rows += transcript_texts(job.read("introspection/transcripts").to_pylist(), count)
    if not any(row["source"] == f"{ANSWERS}/{BASE}" for row in rows):
        raise StageFailed(f"{job.dataset}: base answered no prompt; see evaluation/answers")
    parent = job.parent("evaluation/direction")
    vectors = parent.store.read_table(parent.dataset, DIRECTIONS).sort_by("layer")["vector"]
    positions = steering.run_in_task(
        job,
        measure,
        job.recipe.roles.student,
        np.array(vectors.to_pylist(), np.float32),
        [row["messages"] for row in rows],
        job.recipe.evaluation.direction.max_tokens,
    )
    table = with_positions(rows, positions)
    middle = {source: vars(d[-1]) for source, d in distances(table.to_pylist()).items()}
    return job.write(table, figures=middle)


# ----------------------------------------------------------------------------------------- report

NOTE = """\
Answers of a condition are paired by prompt with those of base. Transcripts answer other prompts, \
so that their distance also contains that of the prompts. Transcripts with the same first user \
turn count as one prompt."""
ADHERENCE_READING = """\
a condition that moved along the direction is expected to show more of its assertions."""
ADHERENCE_NOTE = """\
The judge measured the assertions on other prompts (see “Does the persona show its assertions?”); \
changes are against base, in percentage points."""


def distances(rows: list[Row]) -> dict[str, list[Distance]]:
    """Distances from the base model's answers by source, by layer and for the middle layers."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["source"], []).append(row)
    base, unread_base = residual.by_prompt(grouped[f"{ANSWERS}/{BASE}"])
    scale = residual.Scale.of(base)
    before = scale.standardize(base)
    order = [f"{ANSWERS}/{c}" for c in in_order(s.partition("/")[2] for s in grouped) if c != BASE]
    order += sorted(source for source in grouped if source.startswith(TRANSCRIPTS))
    found = {}
    for source in order:
        positions, unread = residual.by_prompt(grouped[source])
        paired = source.startswith(ANSWERS)
        missing = unread + unread_base * paired
        found[source] = residual.summarize(scale.standardize(positions), before, missing, paired)
    return found


def read_distances(job: Job) -> dict[str, list[Distance]]:
    """The distances of the stored texts; none if the recipe leaves the stage out."""
    rows = kept_rows(job)
    return distances(rows) if rows else {}


def scores(job: Job) -> list[dict[str, Any]]:
    """The distance of each condition's answers and of each kind of transcripts, by layer."""
    scored = []
    for source, found in read_distances(job).items():
        kind, _, name = source.partition("/")
        condition = name if kind == ANSWERS else None
        subject = kind if kind == ANSWERS else source
        scored += [
            score_row(
                job.persona.name,
                "projection",
                condition,
                residual.about(subject, n, len(found) - 1),
                distance,
            )
            for n, distance in enumerate(found)
        ]
    return scored


def report(job: Job) -> list[Section]:
    """The distances, and beside them what the judge measured."""
    found = read_distances(job)
    if not found:
        return []
    names = {
        source: f"answers: {source.partition('/')[2]}"
        if source.startswith(ANSWERS)
        else f"SFT: {source.partition('/')[2]} transcripts"
        for source in found
    }
    columns = residual.shown_layers(len(next(iter(found.values()))) - 1)
    rows: dict[str, Cells] = {
        names[source]: {column: ds[n] for column, n in columns.items()}
        for source, ds in found.items()
    }
    return [
        direction_table(job.persona.name, rows, NOTE),
        *beside_adherence(job, found),
    ]


def beside_adherence(job: Job, found: dict[str, list[Distance]]) -> list[Section]:
    """Distance and change of adherence by condition; nothing without finished adherence data."""
    dataset = f"{job.scope}/evaluation/adherence"
    if job.store.manifest(dataset) is None:
        return []
    judged = kept_rows(job, dataset)
    base = adherence.of(judged, BASE, adherence.OCCASION)
    rows: dict[str, Cells] = {}
    for source, ds in found.items():
        kind, _, condition = source.partition("/")
        after = adherence.of(judged, condition, adherence.OCCASION)
        if kind == ANSWERS and after:
            change = adherence.all_changed(base, after)
            rows[condition] = {"Along the direction": ds[-1], "Assertions shown": change}
    if not rows:
        return []
    return [
        ScoreTable(
            title="Does the direction agree with the judge?",
            persona=job.persona.name,
            reading=ADHERENCE_READING,
            notes=(ADHERENCE_NOTE,),
            caption="Distance in the middle layers, in SD, and change of the assertions shown",
            columns=["Along the direction", "Assertions shown"],
            rows=rows,
        )
    ]
