"""Conversations at scale: rows -> Ray Data -> a pool of engine actors -> Parquet, resumable.

The actors write finished rows to `.parts/`; those are also the checkpoint: a rerun asks only for
the ids that are not there. See CONTRIBUTING.md for why this and not Ray Data's own row checkpoint.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data.read_api import from_blocks

from opencharacter import engine
from opencharacter.config import Pool, Role
from opencharacter.engine import (
    ROW_FIELDS,
    ConversationActor,
    EngineSpec,
    Row,
    Seat,
    Talk,
    hosts,
    seats,
)
from opencharacter.errors import StageFailed
from opencharacter.progress import Line, Meter, console, new_counters
from opencharacter.stage import Attempts, Job
from opencharacter.store import PARTS, Folder, Parts

AHEAD = 4
"""Rows at an actor over its seats. A block leaves whole, with its longest conversation; at twice
the seats, a third of them would wait for that."""
CHUNK = 1000
"""Requests that are Python objects at once."""
LIGHT = 0.05
"""CPUs that Ray reserves for what only waits or writes: the engines hold the rest."""


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
        spec = spec_of(job, role, folded, model)
        other = spec_of(job, partner, None) if partner else None
        title = " ".join(filter(None, (job.dataset, part)))
        _stream(job, todo, spec, other, talk, parts, attempts, asked.num_rows, title)
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


def spec_of(job: Job, role: str, folded: Folder | None, model: Role | None = None) -> EngineSpec:
    """The engine that a role needs."""
    pool: Pool = getattr(job.placement.pools, role)
    return EngineSpec(model or getattr(job.recipe.roles, role), pool, folded)


def is_warm(job: Job, role: str, folded: Folder | None) -> bool:
    """Whether the engine that a role needs is running already."""
    return engine.is_warm(spec_of(job, role, folded))


def together(job: Job, role: str, folded: Folder | None, other: str) -> bool:
    """Whether the engines of two roles can run side by side."""
    return engine.fit_together(spec_of(job, role, folded), spec_of(job, other, None))


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
) -> None:
    gpus = sum(s.pool.replicas * s.pool.gpus for s in (spec, other) if s)
    counters = new_counters(job.dataset, gpus)
    rows = block_rows(todo.num_rows, spec.pool.replicas, seats(spec))
    in_flight = max(2, math.ceil(AHEAD * seats(spec) / rows))
    blocks = [todo.slice(at, rows) for at in range(0, todo.num_rows, rows)]
    quieten()
    expected = job.expected(todo)
    meter = Meter(counters, total, attempts, getattr(job.section, "limits", None), expected)
    with Line(console, title, meter):
        seat = Seat(spec, hosts(spec) if spec.has_weights else None)
        partner = other and Seat(other, hosts(other) if other.has_weights else None)
        meter.begin()
    # Unlike from_arrow, from_blocks reads the blocks' sizes here and not in a task for each.
    dataset = from_blocks(blocks).map_batches(
        ConversationActor,
        fn_constructor_kwargs={
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
        compute=ray.data.ActorPoolStrategy(
            size=spec.pool.replicas,
            max_tasks_in_flight_per_actor=in_flight,
        ),
        num_cpus=LIGHT,
        max_concurrency=in_flight,
    )
    with Line(console, title, meter):
        for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):  # stored ids
            if meter.fault:
                raise StageFailed(job.refused(meter.fault))
    meter()  # once more: the sums of the last second
    counters.end.remote()


def quieten() -> None:
    """Leave the telling to our own line."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = (
        True  # a disk that is full says so, not that a UDF failed
    )
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it raises what it logs
    # Ray 2.60 has another name for max_concurrency, which 2.58 does not know.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*is deprecated")


def block_rows(rows: int, replicas: int, seats: int) -> int:
    """Rows per block: few enough for every replica to get several, and for a quarter of the seats.

    Many rows a block keep blocks few: each costs Ray Data some 20 ms of a core.
    """
    return max(1, min(seats // 4, rows // (4 * replicas)))
