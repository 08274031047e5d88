"""Engines: the only file that builds a vLLM engine, and the tasks that run conversations.

Three engines speak the same two methods, `reply` and `stream`: vLLM, any OpenAI-compatible
endpoint, and an echo for tests. A vLLM engine lives in a `Host`, a Ray actor that outlasts a
stage, so that the next stage with the same weights finds it warm. A row of a dataset is a whole
conversation: a task of Ray Data (`converse`) runs every turn of it, so no turn waits for another
row's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions

from opencharacter.config.recipe import Sampling
from opencharacter.engines.backends import ENGINE_ERROR, start
from opencharacter.engines.replicas import EngineClient, EngineReplicas, num_slots
from opencharacter.engines.spec import Engine, EngineSpec, Reply
from opencharacter.errors import RowFailed, StageFailed
from opencharacter.runtime.progress import ProgressReporter
from opencharacter.runtime.store import Shards, among, digests
from opencharacter.text.chat import THINK_CLOSE, THINK_OPEN, Message, row_id, row_seed, strip_think
from opencharacter.text.filters import whole_sentences
from opencharacter.text.statistics import model_texts

MAX_LEADING_ERRORS = 50
"""Rows that fail so, with none that does not, until a stage gives up."""


@dataclass
class Conversation:
    """What a row's function is given: an engine that knows the row's seed and counts its tokens.

    Args:
        engine: shared by all rows of the actor.
        seed: of the row, or None; the n-th reply draws with seed + n.
        thinks: whether the model opens its replies with a think block.
        partner: a conversation with another role's model, for rows that need two.
    """

    engine: Engine
    seed: int | None
    thinks: bool = False
    partner: Conversation | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    replies: int = 0

    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        prefill: str = "",
    ) -> Reply:
        """As `Engine.reply`, with the row's seed and without the think block.

        Raises:
            RowFailed: also if the think block was never closed.
        """
        seed = None if self.seed is None else (self.seed + self.replies) % 2**31
        self.replies += 1
        answer = await self.engine.reply(messages, sampling, seed=seed, prefill=prefill)
        self.tokens_in += answer.tokens_in
        self.tokens_out += answer.tokens_out
        self.cached_tokens += answer.cached_tokens
        answer = replace(answer, text=self._spoken(answer.text, THINK_CLOSE in prefill))
        if sampling.trim and answer.finish_reason == "length":
            whole = whole_sentences(answer.text)
            return replace(answer, text=whole, finish_reason="trimmed") if whole else answer
        return answer

    def _spoken(self, text: str, closed: bool) -> str:
        """What follows the think block, so that no block is kept or gets into a history."""
        spoken = strip_think(text)
        if spoken is not None:
            return spoken
        if not closed and (self.thinks or text.lstrip().startswith(THINK_OPEN)):
            raise RowFailed("thought_unclosed")
        return text

    def spent(self, what: str) -> int:
        """Tokens of one kind, the partner's too."""
        return getattr(self, what) + (self.partner.spent(what) if self.partner else 0)


FLUSH_SECONDS = 5
FLUSH_ROWS = 512
ROWS_PER_CHUNK = 1000
"""That are one object in Ray's store, or Python objects at once."""
TOKEN_COLUMNS = ("tokens_in", "tokens_out", "cached_tokens")
Row = dict[str, Any]
RowFn = Callable[[Row, Conversation], Awaitable[Row]]
"""A stage's row function: the row and its conversation in, the fields that it adds out."""
ROW_FIELDS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("drop_reason", pa.string()),
    pa.field("error", pa.string()),
    pa.field("tokens_in", pa.int64()),
    pa.field("tokens_out", pa.int64()),
    pa.field("cached_tokens", pa.int64()),
]
"""Columns that every generated dataset has beside its own."""


@dataclass(frozen=True)
class EngineRef:
    """An engine as a task of conversations is given it.

    Args:
        spec: the engine.
        fleet: running hosts of the spec; None for an engine without weights.
    """

    spec: EngineSpec
    fleet: EngineReplicas | None

    def engine(self) -> Engine:
        return EngineClient(self.fleet) if self.fleet else start(self.spec)


def converse(share: pa.Table, **settings: Any) -> Iterator[pa.Table]:
    """The function of Ray Data's `map_batches`: has a share of a stage's conversations.

    A task and not an actor: an actor has a process of its own, which takes a second to start for
    each stage; tasks find the process of the stage before, with all its modules.

    Args:
        share: one row, `from` and `to`: the first request and the one after the last. Those that
            are stored already, where a lost task is repeated, are left out.
        settings: of `Conversations`; and `chunks`, references to the tables that all requests are
            in, `REQUESTS` in each but the last.

    Yields:
        How many rows were `stored`, each time that some were.
    """
    first, end = share["from"][0].as_py(), share["to"][0].as_py()
    needed: Any = ray.get(
        settings.pop("chunks")[first // ROWS_PER_CHUNK : -(-end // ROWS_PER_CHUNK)]
    )
    together = pa.concat_tables(needed, promote_options="permissive")
    block = together.slice(first % ROWS_PER_CHUNK, end - first)
    conversations = Conversations(**settings)
    with asyncio.Runner() as runner:
        stored = aiter(conversations.of(block))
        while (rows := runner.run(following(stored))) is not None:
            yield pa.table({"stored": [rows]})


async def following(numbers: AsyncIterator[int]) -> int | None:
    """The next one, or None."""
    return await anext(numbers, None)


class Conversations:
    """Runs conversations, as many at once as there are seats, and stores them as they finish.

    Args:
        seat: the engine that answers.
        partner: one that the row function may ask as well, or None.
        talk: the stage's row function.
        parts: where rows are written.
        stage: enters the seed.
        seed: of the recipe, or None for unseeded sampling.
        counters: handle of the `progress.Counters` actor.
    """

    def __init__(
        self,
        engine_ref: EngineRef,
        partner: EngineRef | None,
        row_fn: RowFn,
        shards: Shards,
        stage: str,
        seed: int | None,
        counters: Any,
    ):
        self.engine, self.thinks = engine_ref.engine(), engine_ref.spec.role.thinks
        self.partner = partner and (partner.engine(), partner.spec.role.thinks)
        self.num_slots, self.row_fn, self.shards = num_slots(engine_ref.spec), row_fn, shards
        self.stage, self.seed, self.tally = stage, seed, ProgressReporter(counters)
        self.finished: list[Row] = []
        self.enough = asyncio.Event()
        self.errors: int | None = 0
        """Rows that the engine failed while no other has been had, then None."""

    async def of(self, block: pa.Table) -> AsyncIterator[int]:
        """Have the conversations of a block; yields how many were stored, every few seconds."""
        name = "part-" + row_id(block["id"][0].as_py())
        stored = among(digests(block["id"]), self.shards.stored(name))
        rows = one_by_one(block.filter(pa.array(~stored)))
        talking = asyncio.gather(*(self._sit(rows) for _ in range(self.num_slots)))
        talking.add_done_callback(lambda _: self.enough.set())
        ended = False
        while not ended:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.enough.wait(), FLUSH_SECONDS)
            self.enough.clear()
            ended = talking.done()
            rows, self.finished = self.finished, []
            for at in range(0, len(rows), FLUSH_ROWS):
                yield await self._store(rows[at : at + FLUSH_ROWS], name)
        self.tally.send()
        await talking

    async def _sit(self, rows: Iterator[Row]) -> None:
        """A seat: takes one conversation after another."""
        for row in rows:
            finished = await self._row(row)
            self.finished.append(finished)  # the list of now, not of before the row
            if len(self.finished) >= FLUSH_ROWS:
                self.enough.set()
            await asyncio.sleep(0)  # others have a turn though this row waited for nothing

    async def _row(self, row: Row) -> Row:
        row_fn = Conversation(self.engine, self._seed(row.get("seed_id") or row["id"]), self.thinks)
        if self.partner:
            engine, thinks = self.partner
            row_fn.partner = Conversation(engine, self._seed(row["id"]), thinks)
        before = {name: row.get(name) or 0 for name in TOKEN_COLUMNS}  # by an earlier pass
        said: Row = {"drop_reason": None, "error": None}
        self.tally.add(started=1)
        try:
            said |= await self.row_fn(row, row_fn)
        except RowFailed as failed:
            said |= {"drop_reason": failed.reason, "error": failed.detail[:500]}
        self._count(said)
        dropped = said["drop_reason"] is not None
        self.tally.add(
            texts=[] if dropped else model_texts(row | said),
            finished=1,
            dropped=dropped,
            tokens_out=row_fn.spent("tokens_out"),
        )
        return {
            **{k: v for k, v in row.items() if k in self.shards.schema.names},
            **{name: before[name] + row_fn.spent(name) for name in TOKEN_COLUMNS},
            **said,
        }

    def _count(self, said: Row) -> None:
        """Give up where every row fails: what ails the engine ails the rest as well."""
        if said["drop_reason"] != ENGINE_ERROR:
            self.errors = None
        elif self.errors is not None:
            self.errors += 1
            if self.errors >= MAX_LEADING_ERRORS:
                raise StageFailed(
                    f"the first {MAX_LEADING_ERRORS} conversations of {self.stage} all failed; "
                    f"the last: {said['error']}"
                )

    def _seed(self, of: str) -> int | None:
        return None if self.seed is None else row_seed(self.seed, self.stage, of)

    async def _store(self, rows: list[Row], name: str) -> int:
        """Write a file of rows; what finishes meanwhile goes into a later one."""
        table = pa.Table.from_pylist(rows, schema=self.shards.schema)
        await asyncio.to_thread(self.shards.write, table, name)
        return len(rows)


def one_by_one(table: pa.Table) -> Iterator[Row]:
    """Rows, of which few at a time are Python objects."""
    for batch in table.to_batches(max_chunksize=ROWS_PER_CHUNK):
        yield from batch.to_pylist()
