"""Conversations at scale: rows -> Ray Data -> tasks that ask engines -> Parquet, resumable.

The tasks write finished rows to `.shards/`; those are also the checkpoint: a rerun asks only for
the ids that are not there. See CONTRIBUTING.md for why this and not Ray Data's own row checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.read_api import from_blocks

from opencharacter.config.placement import LIGHT_TASK_CPUS, fits
from opencharacter.config.recipe import Role
from opencharacter.engines import allocation
from opencharacter.engines.allocation import acquire
from opencharacter.engines.backends import ENGINE_ERROR
from opencharacter.engines.conversations import (
    ROW_FIELDS,
    ROWS_PER_CHUNK,
    EngineRef,
    Row,
    RowFn,
    converse,
)
from opencharacter.engines.spec import EngineSpec, engine_spec
from opencharacter.errors import StageFailed
from opencharacter.runtime.progress import (
    GenerationProgress,
    ProgressLine,
    active_seconds,
    console,
    start_counters,
)
from opencharacter.runtime.stage import AttemptLog, Job
from opencharacter.runtime.store import SHARDS, RemoteDir, Shards, among, digests

BLOCK_ROWS = 25_000
"""Requests of a task at most: what is lost at a task's end is then little of it."""


def generate(
    job: Job,
    requests: Iterable[Row],
    row_fn: RowFn,
    role: str,
    fields: list[pa.Field],
    part: str = "",
    adapter: RemoteDir | None = None,
    model: Role | None = None,
    partner: str = "",
) -> Shards:
    """Have every requested conversation, each id exactly once.

    Args:
        job: the stage that asks; its dataset holds the parts until the stage is written.
        requests: rows with a string `id`, and a `seed_id` where seeds are to be shared.
        row_fn: the row function.
        role: which role's model answers.
        fields: columns of the result beside `ROW_FIELDS`: of the request or added by `talk`.
        part: names the pass, for a stage that generates more than once.
        adapter: LoRA adapter to apply to the role's weights.
        model: answers in the role's place, where the role has several.
        partner: role whose model the row function may ask as well, as `talk.partner`.

    Returns:
        The rows in storage, dropped ones with their reason.
    """
    schema = pa.schema([ROW_FIELDS[0], *fields, *ROW_FIELDS[1:]])
    folder = RemoteDir(job.store, "/".join(filter(None, (job.dataset, SHARDS, part))))
    shards = Shards(folder, schema)
    shards.forget(ENGINE_ERROR)
    todo = Requests.of(requests, shards.stored())
    attempts = AttemptLog(job, kept=len(todo.asked) - todo.rows, part=part)
    if todo.rows:
        spec = engine_spec(job, role, adapter, model)
        other = engine_spec(job, partner) if partner else None
        title = " ".join(filter(None, (job.dataset, part)))
        with ExitStack() as holding:
            _stream(job, todo, spec, other, row_fn, shards, attempts, title, holding)
        lost = int((~among(todo.asked, shards.stored())).sum())
        if lost:
            raise StageFailed(f"{job.dataset} has no answer for {lost} rows; run it again")
    return shards


@dataclass(frozen=True)
class Requests:
    """What a stage asks for: in Ray's store, which spills to disk what it has no room for.

    Args:
        asked: digest of every id.
        chunks: references to tables of `REQUESTS` rows, but for the last, of what is not stored.
        first: the first of those tables.
        rows: in all of them.
    """

    asked: np.ndarray
    chunks: list[Any]
    first: pa.Table
    rows: int

    @classmethod
    def of(cls, rows: Iterable[Row], stored: np.ndarray) -> Requests:
        """Put rows into Ray's store, but for those whose digests are among some in order."""
        asked, chunks, sizes, first = [np.empty(0, np.uint64)], [], [], pa.table({})
        for chunk in in_chunks(new_rows(rows, stored, asked)):
            table = pa.Table.from_pylist(chunk)
            first = first if chunks else table
            chunks.append(ray.put(table))
            sizes.append(len(table))
        return cls(np.concatenate(asked), chunks, first, sum(sizes))


def in_chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists of `REQUESTS`."""
    left = iter(rows)
    while chunk := list(islice(left, ROWS_PER_CHUNK)):
        yield chunk


def new_rows(rows: Iterable[Row], stored: np.ndarray, asked: list[np.ndarray]) -> Iterator[Row]:
    """Rows whose ids are not stored; the digests of all are added to those asked for."""
    for chunk in in_chunks(rows):
        asked.append(digests(pa.array([row["id"] for row in chunk], pa.string())))
        # Paper: its code resumes by file: one that exists counts as whole.
        known = among(asked[-1], stored).tolist()
        yield from (row for row, there in zip(chunk, known, strict=True) if not there)


def is_warm(job: Job, role: str, adapter: RemoteDir | None) -> bool:
    """Whether the engine that a role needs is running already."""
    return allocation.is_warm(engine_spec(job, role, adapter))


def together(job: Job, role: str, adapter: RemoteDir | None, other: str) -> bool:
    """Whether the engines of two roles can run side by side."""
    rooms = {
        spec.key(): spec.resources
        for spec in (engine_spec(job, role, adapter), engine_spec(job, other))
    }
    return fits(rooms.values(), allocation.capacity(job.placement.autoscaling_limit))


def _stream(
    job: Job,
    todo: Requests,
    spec: EngineSpec,
    other: EngineSpec | None,
    row_fn: RowFn,
    shards: Shards,
    attempts: AttemptLog,
    title: str,
    holding: ExitStack,
) -> None:
    gpus = sum(s.pool.replicas * s.pool.gpus for s in (spec, other) if s)
    counters = start_counters(job.dataset, gpus)
    tasks = 1 if spec.role.endpoint else spec.pool.replicas  # an endpoint's limit is one task's
    rows = block_rows(todo.rows, tasks)
    quieten()
    baseline = job.baseline(todo.first)
    total = len(todo.asked)
    meter = GenerationProgress(
        counters, total, attempts, getattr(job.config, "limits", None), baseline
    )
    with ProgressLine(console, title, meter):
        resource_requests = [spec, *([other] if other else [])]
        held = holding.enter_context(
            acquire(job.dataset, resource_requests, job.placement.autoscaling_limit)
        )
        engine_ref = EngineRef(spec, held.fleet(spec))
        partner = other and EngineRef(other.shared_by(tasks), held.fleet(other))
        meter.begin()
    with ray.data.DataContext.current(telling_at_once()):
        # Unlike from_arrow, from_blocks reads the blocks' sizes here and not in a task for each.
        shares = [{"from": at, "to": min(at + rows, todo.rows)} for at in range(0, todo.rows, rows)]
        dataset = from_blocks([pa.Table.from_pylist([share]) for share in shares]).map_batches(
            converse,
            fn_kwargs={
                "chunks": todo.chunks,
                "engine_ref": engine_ref,
                "partner": partner,
                "row_fn": row_fn,
                "shards": shards,
                "stage": job.stage.name,
                "seed": job.recipe.seed if job.recipe.seeded_sampling else None,
                "counters": counters,
            },
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=tasks),
            num_cpus=LIGHT_TASK_CPUS,
        )
    with ProgressLine(console, title, meter):
        for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            if meter.fault:
                raise StageFailed(job.refused(meter.fault))
    meter()  # once more: the sums of the last second
    held.busy = active_seconds(counters)
    counters.end.remote()


def telling_at_once() -> ray.data.DataContext:
    """Ray Data's settings for tasks whose results are to leave them as they come."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1
    return context


def quieten() -> None:
    """Leave the telling to our own line."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # a full disk, and not that "a UDF failed"
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it raises what it logs


def block_rows(rows: int, tasks: int) -> int:
    """Rows per block: a task's share of all, if those are not too many for one task.

    Where a block ends, its seats stand empty one by one until its longest conversation is over.
    """
    return min(BLOCK_ROWS, math.ceil(rows / tasks))
