"""Stage evaluation/capabilities: how much ability does the training cost?

lm-evaluation-harness asks the untrained student and the trained persona the same documents, so
that changes are paired. Each question of this package's own task, `commonplace`, is also asked as
a chat message that requests a letter. If the right option is the most likely one but the reply
names no letter, the model lost the format, not the knowledge.

The stage runs in two scopes: the untrained student's results belong to the student and serve every
persona.

Reads: persona/merge, evaluation/capabilities of the student. Writes: task, metric, document, value,
answer; scores (persona).
Run: opencharacter run RECIPE --constitution NAME --only evaluation/capabilities
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from opencharacter import cache
from opencharacter.config.evaluation import Capabilities, Capability
from opencharacter.config.placement import Resources
from opencharacter.engines.allocation import acquire
from opencharacter.engines.conversations import Row
from opencharacter.errors import UserError
from opencharacter.evaluation.harness import (
    ALL_METRICS,
    CHAT,
    FORMAT_LOST,
    IN_CHAT,
    NO_ANSWER,
    OTHER_FORM,
    OWN,
    QUESTION,
    READABLE,
    WRONG,
    measure,
    questions,
)
from opencharacter.evaluation.paper import CAPABILITIES_NOTE
from opencharacter.evaluation.report.sections import Cells, Change, ScoreTable, Section
from opencharacter.evaluation.scores import (
    SCORES,
    Z95,
    Score,
    distinct,
    find_score,
    score_row,
    wilson,
)
from opencharacter.runtime.attempts import AttemptLog
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult, TrainingWorkers
from opencharacter.runtime.store import SHARDS

TEMPLATES = (QUESTION, CHAT)
PASSIVE_WAIT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Lets OpenMP threads wait without spinning: on a busy machine with two cores, 16 questions took
23 s instead of 151 s."""
READ_TOKENS = 300
"""Tokens that `plan` expects of a document, or of a few-shot example, with all its options."""

SIZES = {
    "truthfulqa_mc2": 817,
    "winogrande": 1267,
    "hellaswag": 10042,
    "arc_challenge": 1172,
    "mmlu": 14042,
    OWN: 80,
}
"""Number of documents of the paper's tasks and of ours, for `plan`."""
SUBTASKS = {"mmlu": 57}
"""Number of subtasks of a task, each with at most `documents` documents; others have one."""
ROWS_PER_DOCUMENT = {"hellaswag": 2, "arc_challenge": 2, OWN: 7}
"""Number of metrics of a task that are kept, for `plan`; others have one."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("document", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("answer", pa.string()),
    ]
)

# ------------------------------------------------------------------------------------------ scores


def mean(values: Sequence[float]) -> Score:
    """A mean of values in 0 .. 1, with a Wilson interval (conservative for graded values)."""
    return wilson(sum(values), len(values))


def paired_change(before: Sequence[float], after: Sequence[float]) -> Score:
    """The mean change of the same documents, with its 95 % interval.

    The interval of Agresti and Min (2005) for pairs of 0 and 1, which adds two pseudo-pairs so that
    it has a width if no document changed. It also holds for graded values.

    Args:
        before: values in 0 .. 1.
        after: values of the same documents, in the same order.
    """
    changes = [b - a for a, b in zip(before, after, strict=True)]
    n = len(changes)
    if not n:
        return Score(None, None, None, 0)
    centre = sum(changes) / (n + 2)
    spread = (sum(c * c for c in changes) + 1) / (n + 2) - centre**2
    half = Z95 * math.sqrt(spread / (n + 2))
    return Score(sum(changes) / n, max(-1.0, centre - half), min(1.0, centre + half), n)


def compare_scores(persona: str, base: list[Row], full: list[Row]) -> list[dict[str, Any]]:
    """Rows of `SCORES`: base, persona and the paired change, by task and metric.

    A document that only one of the two answered is unscored.
    """
    rows = []
    measured = {(r["task"], r["metric"]) for r in [*base, *full]}
    for task, metric in sorted(measured, key=lambda key: (key[0], ALL_METRICS.index(key[1]))):
        sides = [
            {r["document"]: r["value"] for r in side if (r["task"], r["metric"]) == (task, metric)}
            for side in (base, full)
        ]
        paired = sorted(sides[0].keys() & sides[1].keys())
        before, after = ([side[document] for document in paired] for side in sides)
        unpaired = len(sides[0].keys() ^ sides[1].keys())
        change = replace(paired_change(before, after), unscored=unpaired)
        about = f"{task} {metric}"
        for condition, values in (("base", before), ("full", after)):
            rows.append(score_row(persona, "capability", condition, about, mean(values)))
        rows.append(score_row(persona, "capability_change", "full", about, change))
    return rows


# ------------------------------------------------------------------------------------------- stage


def check(job: Job) -> None:
    """Check before a run that the harness has all tasks and their data.

    Raises:
        UserError: if it is not installed, does not know a task or cannot load a task's data.
    """
    settings: Capabilities = job.config
    if not settings.tasks or job.constitution is not None:  # the student's job has checked
        return
    remedy = "or leave the task out of evaluation.capabilities.tasks ([] skips the stage)"
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluation/capabilities needs lm-evaluation-harness, which is not installed: "
            f"pip install '.[capabilities]' in the checkout, {remedy}"
        )
    if settings.include and not Path(settings.include).is_dir():
        raise UserError(f"evaluation.capabilities.include {settings.include!r}: no such folder")
    for name in (task.task for task in settings.tasks if task.task != OWN):
        load_data(name, settings.include, remedy)


def load_data(name: str, include: str | None, remedy: str) -> None:
    """Let the harness load a task and its data, which are cached for later runs."""
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=include)
    if name not in tasks.all_tasks:
        raise UserError(
            f"task {name!r} is neither in lm-evaluation-harness nor in evaluation.capabilities."
            f"include; correct the name, {remedy}"
        )
    try:
        tasks.load([name])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the data of task {name!r} cannot be loaded ({reason}); load it once with network "
            f"access and share that cache (HF_HOME), {remedy}"
        ) from None


def measure_tasks(job: Job, adapter: Any) -> pa.Table:
    """Rows of all tasks, each measured in its own process; stored tasks are not measured again."""
    import ray

    settings, placement = job.config, job.placement
    pool, cpus = placement.pools.student, placement.training.single.cpus
    todo = [task for task in settings.tasks if not job.store.exists(shard_path(job, task))]
    attempts = AttemptLog(job, kept=len(settings.tasks) - len(todo))
    remote = ray.remote(measure).options(
        num_cpus=cpus, num_gpus=pool.gpus, runtime_env={"env_vars": PASSIVE_WAIT}
    )
    role = job.recipe.roles.student
    running = {
        remote.remote(role, adapter, t, settings, pool.gpus, int(max(1, cpus))): t for t in todo
    }
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        task = running.pop(done)
        rows = pa.Table.from_pylist(ray.get(done), schema=SCHEMA)
        job.store.write_table(f"{job.dataset}/{SHARDS}", rows, task.task)
        attempts.note(len(settings.tasks) - len(running))
    tables = (job.store.read_table(f"{job.dataset}/{SHARDS}", t.task) for t in settings.tasks)
    return pa.concat_tables([SCHEMA.empty_table(), *tables]).sort_by("id")


def shard_path(job: Job, task: Capability) -> str:
    return f"{job.dataset}/{SHARDS}/{task.task}.parquet"


def identity(job: Job) -> dict[str, Any]:
    settings: Capabilities = job.config
    own = any(task.task == OWN for task in settings.tasks)
    folder = Path(settings.include) if settings.include else None
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    return {str(path.relative_to(folder or "")): cache.file_hash(path) for path in files} | (
        {OWN: cache.file_hash(questions())} if own else {}
    )


def is_enabled(job: Job) -> bool:
    """Return whether the recipe names tasks."""
    return bool(job.config.tasks)


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    resources = Resources(
        cpus=job.placement.training.single.cpus, gpus=job.placement.pools.student.gpus
    )
    return [(TrainingWorkers(job.dataset, resources),)] if job.config.tasks else []


def num_documents(task: str, limit: int | None) -> int:
    """Number of a task's documents, as far as it is known; an upper bound for subtasks."""
    size = SIZES.get(task, 0)
    return size if limit is None else min(size, limit * SUBTASKS.get(task, 1))


def estimate(job: Job) -> Estimate:
    settings: Capabilities = job.config
    documents = {task: num_documents(task.task, settings.documents) for task in settings.tasks}
    rows = sum(n * ROWS_PER_DOCUMENT.get(task.task, 1) for task, n in documents.items())
    read = sum(n * ((task.shots or 0) + 1) * READ_TOKENS for task, n in documents.items())
    return Estimate(rows, read=read)


def build(job: Job) -> StageResult:
    if not job.config.tasks:
        return job.write(SCHEMA.empty_table(), figures={"skipped": "the recipe names no tasks"})
    adapter = job.constitution and job.parent("persona/merge").adapter
    requests, limit = resource_requests(job)[0], job.placement.autoscaling_resources
    with acquire(job.dataset, requests, limit) as allocation:
        began = time.monotonic()
        table = measure_tasks(job, adapter)
        allocation.work_seconds = time.monotonic() - began
    result = job.write(table)
    if job.constitution:
        student = job.parent("evaluation/capabilities")
        base = student.store.read_table(student.dataset).to_pylist()
        scored = compare_scores(job.constitution.name, base, table.to_pylist())
        rows = pa.Table.from_pylist(scored, schema=SCORES)
        job.store.write_table(job.dataset, rows, "scores")
    return result


# ----------------------------------------------------------------------------------------- report

NOTE = """\
Base and persona answer the same documents (lm-evaluation-harness). Changes are in percentage \
points, with 95% intervals for paired data."""
FORMAT_NOTE = """\
The questions of this package's task are also asked in chat, where the reply should be a letter. \
If the right option is the most likely one but no letter can be read in the reply, the persona has \
lost the format, not the knowledge. Right, right in another form (the option's text without its \
letter), wrong, and no answer count every reply once."""
PAPER_TASKS = frozenset(SIZES) - {OWN}

METRIC_LABELS = {
    "acc": "accuracy",
    "acc_norm": "accuracy by likelihood per byte",
    "exact_match": "exact match",
    IN_CHAT: "right in chat",
    OTHER_FORM: "right in chat, but in another form",
    WRONG: "wrong in chat",
    NO_ANSWER: "no answer in chat",
    READABLE: "readable letter in chat",
    FORMAT_LOST: "known, but format lost in chat",
}


def scores(job: Job) -> list[dict[str, Any]]:
    """The persona's scores; none of the student's job, or if the recipe names no tasks."""
    if not job.store.exists(f"{job.dataset}/scores.parquet"):
        return []
    return job.store.read_table(job.dataset, "scores").to_pylist()


def report(job: Job) -> list[Section]:
    """The change of each task's metrics; nothing of the student's job."""
    return [capability_table(scores(job))] if job.constitution else []


def capability_table(rows: list[dict[str, Any]]) -> ScoreTable:
    """Base, persona and change (columns) by task and metric (rows)."""
    abouts = distinct(rows, "capability_change", "about")
    tasks = {about.split()[0] for about in abouts}
    cells: dict[str, Cells] = {}
    for about in abouts:
        task, metric = about.split()
        change = find_score(rows, "capability_change", "full", about)
        cells[f"{task}: {METRIC_LABELS.get(metric, metric)}"] = {
            "Base": find_score(rows, "capability", "base", about),
            "Persona": find_score(rows, "capability", "full", about),
            "Change": change and Change(**vars(change)),
        }
    return ScoreTable(
        title="Which abilities changed?",
        reading="an interval of the change below 0 means that training cost some of the ability.",
        notes=(
            NOTE,
            *[FORMAT_NOTE] * (OWN in tasks),
            *[CAPABILITIES_NOTE] * (not tasks.isdisjoint(PAPER_TASKS)),
        ),
        caption="Share of the documents, and its change",
        columns=["Base", "Persona", "Change"],
        rows=cells,
        empty="Nothing was measured: the recipe names no tasks.",
    )
