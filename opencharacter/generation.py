"""Conversations at scale: rows -> Ray Data -> tasks that ask engines -> Parquet, resumable.

The tasks write finished rows to `.parts/`; those are also the checkpoint: a rerun asks only for
the ids that are not there. See CONTRIBUTING.md for why this and not Ray Data's own row checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data.read_api import from_blocks

from opencharacter import engine
from opencharacter.config import LIGHT, Role, fits
from opencharacter.engine import (
    ROW_FIELDS,
    EngineSpec,
    Row,
    Seat,
    Talk,
    converse,
    hold,
)
from opencharacter.errors import StageFailed
from opencharacter.progress import Line, Meter, console, new_counters, worked
from opencharacter.stage import Attempts, Job
from opencharacter.store import PARTS, Folder, Parts

BLOCK_ROWS = 25_000
"""Requests of a task at most: what is lost at a task's end is then little of it."""
CHUNK = 1000
"""Requests that are Python objects at once."""


def generate(
    job: Job,
    requests: Iterable[Row],
    talk: Talk,
    role: str,
    fields: list[pa.Field],
    part: str = "",
    folded: Folder | None = None,
    model: Role | None = None,
    partner: str = "",
) -> Parts:
    """Have every requested conversation, each id exactly once.

    Args:
        job: the stage that asks; its dataset holds the parts until the stage is written.
        requests: rows with a string `id`, and a `seed_id` where seeds are to be shared.
        talk: the row function.
        role: which role's model answers.
        fields: columns of the result beside `ROW_FIELDS`: of the request or added by `talk`.
        part: names the pass, for a stage that generates more than once.
        folded: adapter to fold into the role's weights.
        model: answers in the role's place, where the role has several.
        partner: role whose model the row function may ask as well, as `talk.partner`.

    Returns:
        The rows in storage, dropped ones with their reason.
    """
    schema = pa.schema([ROW_FIELDS[0], *fields, *ROW_FIELDS[1:]])
    folder = Folder(job.store, "/".join(filter(None, (job.dataset, PARTS, part))))
    parts = Parts(folder, schema)
    asked, have = as_table(requests), parts.ids()
    todo = without(asked, have)
    attempts = Attempts(job, kept=len(have), part=part)
    if todo.num_rows:
        spec = job.engine(role, folded, model)
        other = job.engine(partner) if partner else None
        title = " ".join(filter(None, (job.dataset, part)))
        with ExitStack() as holding:
            _stream(job, todo, spec, other, talk, parts, attempts, asked.num_rows, title, holding)
        lost = without(asked, parts.ids()).num_rows
        if lost:
            raise StageFailed(f"{job.dataset} has no answer for {lost} rows; run it again")
    return parts


def as_table(rows: Iterable[Row]) -> pa.Table:
    """Rows as a table, of which only a chunk at a time are Python objects."""
    left, tables = iter(rows), []
    while chunk := list(islice(left, CHUNK)):
        tables.append(pa.Table.from_pylist(chunk))
    nothing = pa.table({"id": pa.array([], pa.string())})
    return pa.concat_tables(tables or [nothing], promote_options="permissive").combine_chunks()


def without(table: pa.Table, ids: pa.Array) -> pa.Table:
    """The rows whose id is not among those given."""
    return table.filter(pc.invert(pc.is_in(table["id"], value_set=ids)))


def is_warm(job: Job, role: str, folded: Folder | None) -> bool:
    """Whether the engine that a role needs is running already."""
    return engine.is_warm(job.engine(role, folded))


def together(job: Job, role: str, folded: Folder | None, other: str) -> bool:
    """Whether the engines of two roles can run side by side."""
    rooms = {spec.key(): spec.room for spec in (job.engine(role, folded), job.engine(other))}
    return fits(rooms.values(), engine.capacity(job.placement.cluster))


def _stream(
    job: Job,
    todo: pa.Table,
    spec: EngineSpec,
    other: EngineSpec | None,
    talk: Talk,
    parts: Parts,
    attempts: Attempts,
    total: int,
    title: str,
    holding: ExitStack,
) -> None:
    counters = new_counters()
    replicas = spec.pool.replicas
    rows = block_rows(todo.num_rows, replicas)
    quieten()
    expected = job.expected(todo)
    meter = Meter(counters, total, attempts, getattr(job.section, "limits", None), expected)
    with Line(console, title, meter):
        needs = [spec, *([other] if other else [])]
        held = holding.enter_context(hold(job.dataset, needs, job.placement.cluster))
        seat, partner = Seat(spec, held.fleet(spec)), other and Seat(other, held.fleet(other))
        meter.begin()
    with ray.data.DataContext.current(telling_at_once()):
        # Unlike from_arrow, from_blocks reads the blocks' sizes here and not in a task for each.
        blocks = [todo.slice(at, rows) for at in range(0, todo.num_rows, rows)]
        dataset = from_blocks(blocks).map_batches(
            converse,
            fn_kwargs={
                "seat": seat,
                "partner": partner,
                "talk": talk,
                "parts": parts,
                "stage": job.stage.name,
                "seed": job.recipe.seed if job.recipe.seeded_sampling else None,
                "counters": counters,
            },
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=replicas),
            num_cpus=LIGHT,
        )
    with Line(console, title, meter):
        for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            if meter.fault:
                raise StageFailed(job.refused(meter.fault))
    meter()  # once more: the sums of the last second
    held.busy = worked(counters)


def telling_at_once() -> ray.data.DataContext:
    """Ray Data's settings for tasks whose results are to leave them as they come."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1
    return context


def quieten() -> None:
    """Leave the telling to our own line."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def block_rows(rows: int, replicas: int) -> int:
    """Rows per block: a replica's share of all, if those are not too many for one task.

    Where a block ends, its seats stand empty one by one until its longest conversation is over.
    """
    return min(BLOCK_ROWS, math.ceil(rows / replicas))
