"""Generate a dataset of conversations: requests -> Ray Data -> tasks -> engines -> Parquet.

The blocks of the Ray Data dataset are the requests themselves. `map_batches` runs one task per
block (see `run_conversations`). The tasks send the requests to the engines, write finished rows to
`.shards/` and return only their number. The shards are also the checkpoint: a rerun requests only
the ids that are missing there. A block holds the requests of a task from its start to its end,
because the slots of a task become idle one by one when its block runs out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data.read_api import from_blocks

from opencharacter.config.placement import LIGHT_TASK_CPUS
from opencharacter.config.roles import Role
from opencharacter.engines import allocation
from opencharacter.engines.allocation import acquire
from opencharacter.engines.backends import ENGINE_ERROR
from opencharacter.engines.conversations import (
    ROW_FIELDS,
    ROWS_PER_BATCH,
    EngineRef,
    Row,
    RowFn,
    run_conversations,
)
from opencharacter.engines.spec import EngineSpec, engine_spec
from opencharacter.errors import StageFailed
from opencharacter.runtime.attempts import AttemptLog
from opencharacter.runtime.progress import (
    GenerationProgress,
    ProgressLine,
    active_seconds,
    console,
    start_counters,
)
from opencharacter.runtime.schedule import fits_at_once
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import SHARDS, RemoteDir, Shards
from opencharacter.runtime.threads import run_side_by_side

K = TypeVar("K")
T = TypeVar("T")
MAX_BLOCK_ROWS = 25_000
"""Requests per task at most, which bounds the memory of a task."""


def generate(
    job: Job,
    requests: Iterable[Row],
    row_fn: RowFn,
    role: str,
    fields: list[pa.Field],
    phase: str = "",
    adapter: RemoteDir | Role | None = None,
    model: Role | None = None,
    partner: str = "",
) -> Shards:
    """Run the row function on every request and store each result exactly once.

    Args:
        job: the job that generates; its dataset holds the shards until the stage is written.
        requests: rows with a string `id`, and a `seed_id` if several rows share a seed.
        row_fn: the row function.
        role: the role whose model replies.
        fields: columns of the result in addition to `ROW_FIELDS`, taken from the request or added
            by the row function.
        phase: distinguishes the calls of a stage that generates more than once.
        adapter: LoRA adapter to apply to the role's model, or None; or another model in its place.
        model: replaces the role's model, for roles with several models.
        partner: role whose model the row function may use as `conversation.partner`.

    Returns:
        The stored rows, including dropped ones with their reason.

    Raises:
        StageFailed: if an engine fails, a data-quality limit is exceeded, or rows are missing.
    """
    schema = pa.schema([ROW_FIELDS[0], *fields, *ROW_FIELDS[1:]])
    folder = RemoteDir(job.store, "/".join(filter(None, (job.dataset, SHARDS, phase))))
    shards = Shards(folder, schema)
    shards.delete_dropped(ENGINE_ERROR)
    work = Requests.collect(requests, shards.ids())
    attempts = AttemptLog(job, kept=len(work.ids) - len(work.missing), part=phase)
    if len(work.missing):
        engines = [engine_spec(job, role, adapter, model)]
        engines += [engine_spec(job, partner)] if partner else []
        title = " ".join(filter(None, (job.dataset, phase)))
        _stream(job, work, engines, row_fn, shards, attempts, title)
        lost = len(work.ids - shards.ids())
        if lost:
            raise StageFailed(
                f"{job.dataset}: {lost} rows were not stored; run the same command again"
            )
    return shards


@dataclass(frozen=True)
class Requests:
    """The requests of a stage.

    Args:
        ids: ids of all requests.
        missing: the requests whose rows are not stored yet, one per row.
    """

    ids: set[str]
    missing: pa.Table

    @classmethod
    def collect(cls, rows: Iterable[Row], stored: set[str]) -> Requests:
        """Convert requests to Arrow, leaving out those whose ids are stored."""
        ids: set[str] = set()
        tables = [pa.table({})]
        for batch in batched(rows, ROWS_PER_BATCH):
            ids.update(row["id"] for row in batch)
            # Paper: its code resumes by file and takes any file that exists for complete.
            missing = [row for row in batch if row["id"] not in stored]
            tables += [pa.Table.from_pylist(missing)] if missing else []
        return cls(ids, pa.concat_tables(tables, promote_options="permissive"))

    def blocks(self, tasks: int) -> list[pa.Table]:
        """Split the missing requests into blocks for a number of concurrent tasks."""
        rows = block_rows(len(self.missing), tasks)
        return [self.missing.slice(first, rows) for first in range(0, len(self.missing), rows)]


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Group rows into lists of `size`; the last one may be shorter."""
    remaining = iter(rows)
    while batch := list(islice(remaining, size)):
        yield batch


def generate_side_by_side(
    job: Job,
    function: Callable[[K], T],
    engines: Mapping[K, EngineSpec],
    others: Sequence[EngineSpec] = (),
) -> dict[K, T]:
    """Call a function that generates for each of several engines.

    If all engines fit into the cluster, it is called at the same time for all of them, otherwise
    first for those that are ready soonest. Several calls would exceed the request limit of an
    endpoint, so they follow each other if there is one.

    Args:
        job: the job that generates.
        function: called with each key.
        engines: the engine that the function uses, by key.
        others: engines that it uses in addition with every key.
    """
    used = [*engines.values(), *others]
    together = fit_together(job, used) and not any(spec.role.endpoint for spec in used)
    with allocation.kept_from_swaps(engines.values() if together else ()):
        soonest_first = sorted(engines, key=lambda key: allocation.effort(engines[key]))
        calls = [partial(function, key) for key in soonest_first]
        results = run_side_by_side(calls) if together else [call() for call in calls]
    return dict(zip(soonest_first, results, strict=True))


def fit_together(job: Job, engines: Iterable[EngineSpec]) -> bool:
    """Whether engines fit into the cluster side by side."""
    return fits_at_once(engines, allocation.capacity(job.placement.autoscaling_resources))


def _stream(
    job: Job,
    work: Requests,
    engines: list[EngineSpec],
    row_fn: RowFn,
    shards: Shards,
    attempts: AttemptLog,
    title: str,
) -> None:
    """Stream the missing requests through Ray Data while the engines are held.

    Args:
        job: the job that generates.
        work: its requests.
        engines: the engine that replies and, if the row function uses one, the partner's.
        row_fn: the row function.
        shards: where the tasks write rows.
        attempts: log of the stage's attempts.
        title: heading of the progress line.
    """
    gpus = sum(spec.pool.replicas * spec.pool.gpus for spec in engines)
    counters = start_counters(job.dataset, gpus)
    first, *others = engines
    # An endpoint limits its requests for all tasks together, so one task uses it.
    tasks = 1 if first.role.endpoint else first.pool.replicas
    silence_ray_data()
    progress = GenerationProgress(
        counters,
        len(work.ids),
        attempts,
        getattr(job.config, "limits", None),
        job.baseline(work.missing),
        live_results(job),
    )
    with ExitStack() as stack:
        with ProgressLine(console, title, progress):
            allocated = stack.enter_context(
                acquire(job.dataset, engines, job.placement.autoscaling_resources, progress.prepare)
            )
            refs = [EngineRef(first, allocated.replicas(first))]
            refs += [EngineRef(spec.shared_by(tasks), allocated.replicas(spec)) for spec in others]
            progress.begin()
        settings = {
            "engine_ref": refs[0],
            "partner": refs[1] if others else None,
            "row_fn": row_fn,
            "shards": shards,
            "stage": job.stage.name,
            "seed": job.recipe.seed if job.recipe.seeded_sampling else None,
            "counters": counters,
        }
        dataset = stored_counts(work.blocks(tasks), settings, tasks)
        with ProgressLine(console, title, progress):
            for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                if progress.fault:
                    raise StageFailed(job.quality_failure(progress.fault))
        progress()  # once more, for what the tasks reported last
        allocated.work_seconds = active_seconds(counters)
    counters.end.remote()


def live_results(job: Job) -> Callable[[], list[str]] | None:
    """Return what describes the results so far, for a stage whose module defines `live`."""
    live = getattr(job.stage.module, "live", None)
    return partial(live, job) if live else None


def stored_counts(blocks: list[pa.Table], settings: dict[str, Any], tasks: int) -> ray.data.Dataset:
    """Return the dataset that runs the conversations when it is iterated over.

    Args:
        blocks: requests; each block is the input of one task.
        settings: keyword arguments of `ConversationRunner`.
        tasks: tasks that run concurrently.

    Returns:
        Numbers of stored rows, in the order in which they were stored.
    """
    with ray.data.DataContext.current(unbuffered_context()):
        # from_arrow would start a task per block to determine its size; from_blocks does it here.
        return from_blocks(blocks).map_batches(
            run_conversations,
            fn_kwargs=settings,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=tasks),
            num_cpus=LIGHT_TASK_CPUS,
        )


def unbuffered_context() -> ray.data.DataContext:
    """Return Ray Data settings under which a task's output leaves it immediately.

    Tasks with large blocks are spread over the nodes too. Ray Data would run them on the node that
    holds the blocks.
    """
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1
    # Not by plain assignment, for which Ray 2.60 prints a deprecation warning. Its default for
    # small blocks is SPREAD already.
    object.__setattr__(context, "scheduling_strategy_large_args", "SPREAD")
    return context


def silence_ray_data() -> None:
    """Disable Ray Data's own progress bars and logs, which would disturb the progress line."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # "disk full" instead of "a UDF failed"
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # Ray logs what it also raises


def block_rows(rows: int, tasks: int) -> int:
    """Rows per block: an equal part for each task, up to `MAX_BLOCK_ROWS`.

    Larger blocks are better: when a block runs out, the slots of its task become idle one by one
    until its longest conversation has ended.
    """
    return min(MAX_BLOCK_ROWS, math.ceil(rows / tasks))
