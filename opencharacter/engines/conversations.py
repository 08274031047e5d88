"""Conversations with engines, and the Ray Data task that runs them.

A row of a generated dataset is a whole conversation. A stage provides a *row function*, which
receives the request's row and a `Conversation` and returns the fields to add. The task runs many
conversations concurrently and every one at its own pace: no turn waits for another row.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from opencharacter.config.roles import Sampling
from opencharacter.engines.backends import ENGINE_ERROR, start
from opencharacter.engines.replicas import EngineClient, EngineReplicas, num_slots
from opencharacter.engines.served import RunningApp, ServedSpec
from opencharacter.engines.spec import Engine, EngineSpec, Reply
from opencharacter.errors import RowFailed, StageFailed
from opencharacter.runtime.progress import ProgressReporter
from opencharacter.runtime.stage import TOKEN_COLUMNS
from opencharacter.runtime.store import Shards
from opencharacter.text.chat import THINK_CLOSE, THINK_OPEN, Message, row_id, row_seed, strip_think
from opencharacter.text.filters import whole_sentences
from opencharacter.text.statistics import model_texts

MAX_LEADING_ERRORS = 50
"""A task fails after this many engine errors if no row before them got past the engine."""
FLUSH_SECONDS = 5
"""Finished rows are written at least this often."""
FLUSH_ROWS = 512
"""Finished rows are written as soon as there are this many; also the rows of a file at most."""
ROWS_PER_BATCH = 1000
"""Rows that are converted between Arrow and Python objects at once."""
Row = dict[str, Any]
ROW_FIELDS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("drop_reason", pa.string()),
    pa.field("error", pa.string()),
    pa.field("tokens_in", pa.int64()),
    pa.field("tokens_out", pa.int64()),
    pa.field("cached_tokens", pa.int64()),
]
"""Columns that every generated dataset has in addition to its own."""


@dataclass
class Conversation:
    """One row's access to the engines; applies the row's seed and counts its tokens.

    Args:
        engine: the engine, shared by all rows of the task.
        seed: the row's seed, or None; its n-th reply is sampled with `seed + n`.
        thinks: whether the model starts its replies with a think block.
        partner: a conversation with another role's model, for rows that need two models.
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
        """Generate a reply with the row's seed and remove its think block.

        Args:
            messages: the conversation; the last message is the user's.
            sampling: sampling parameters. With `trim`, a reply that reached its token limit is
                cut back to whole sentences.
            prefill: beginning of the reply, which the model continues.

        Raises:
            RowFailed: if the engine cannot answer, or the think block was never closed.
        """
        seed = None if self.seed is None else (self.seed + self.replies) % 2**31
        self.replies += 1
        reply = await self.engine.reply(messages, sampling, seed=seed, prefill=prefill)
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        self.cached_tokens += reply.cached_tokens
        reply = replace(reply, text=self._without_thinking(reply.text, THINK_CLOSE in prefill))
        if sampling.trim and reply.finish_reason == "length":
            trimmed = whole_sentences(reply.text)
            return replace(reply, text=trimmed, finish_reason="trimmed") if trimmed else reply
        return reply

    def _without_thinking(self, text: str, closed: bool) -> str:
        """Return the text after the think block, which must not enter the chat history.

        Args:
            text: a generated reply.
            closed: whether the prefill has closed the think block.
        """
        visible = strip_think(text)
        if visible is not None:
            return visible
        if not closed and (self.thinks or text.lstrip().startswith(THINK_OPEN)):
            raise RowFailed("thought_unclosed")
        return text

    def total_tokens(self, column: str) -> int:
        """Return the sum of one of `TOKEN_COLUMNS` over this conversation and its partner."""
        return getattr(self, column) + (self.partner.total_tokens(column) if self.partner else 0)


RowFn = Callable[[Row, Conversation], Awaitable[Row]]
"""A row function: takes a request's row and its conversation, returns the fields to add.

It raises `RowFailed` to drop the row.
"""


@dataclass(frozen=True)
class EngineRef:
    """A picklable reference to an engine, from which a task connects to it.

    Args:
        spec: the engine.
        replicas: its running replicas; None for an engine without weights.
    """

    spec: EngineSpec
    replicas: EngineReplicas | RunningApp | None

    def connect(self) -> Engine:
        if isinstance(self.spec, ServedSpec):
            return self.spec.connect()
        if isinstance(self.replicas, EngineReplicas):
            return EngineClient(replace(self.replicas, spec=self.spec))
        return start(self.spec)


def run_conversations(block: pa.Table, **settings: Any) -> Iterator[pa.Table]:
    """Run the conversations of a block of requests; a function for Ray Data's `map_batches`.

    This is a task and not an actor, because Ray starts a new process for every actor, which costs
    about a second per stage. A task reuses a process of an earlier stage, with all its imports.

    Args:
        block: requests, one per row.
        settings: keyword arguments of `ConversationRunner`.

    Yields:
        A table with the number of rows `stored`, each time that some were.
    """
    runner = ConversationRunner(**settings)
    with asyncio.Runner() as loop:
        counts = aiter(runner.run(block))
        while (count := loop.run(next_or_none(counts))) is not None:
            yield pa.table({"stored": [count]})


async def next_or_none(numbers: AsyncIterator[int]) -> int | None:
    """Return the next item of an asynchronous iterator, or None at its end."""
    return await anext(numbers, None)


class ConversationRunner:
    """Runs one conversation per slot concurrently and stores the rows as they finish.

    Args:
        engine_ref: the engine that replies.
        partner: another engine that the row function may use, or None.
        row_fn: the stage's row function.
        shards: where rows are written.
        stage: name of the stage, which enters the rows' seeds.
        seed: the recipe's seed, or None for unseeded sampling.
        counters: handle of a `progress.ProgressCounters` actor.
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
        self.engine, self.thinks = engine_ref.connect(), engine_ref.spec.role.thinks
        self.partner = partner and (partner.connect(), partner.spec.role.thinks)
        self.num_slots, self.row_fn, self.shards = num_slots(engine_ref.spec), row_fn, shards
        self.stage, self.seed, self.progress = stage, seed, ProgressReporter(counters)
        self.finished: list[Row] = []
        self.flush_due = asyncio.Event()
        self.leading_errors: int | None = 0
        """Engine errors so far, or None once a row got past the engine."""

    async def run(self, block: pa.Table) -> AsyncIterator[int]:
        """Run the conversations of a block.

        The names of the block's files begin with a hash of its first id. If Ray repeats a lost
        task, the rows that its predecessor stored are skipped.

        Args:
            block: requests, one per row.

        Yields:
            The number of rows in each file that was written.
        """
        name = "shard-" + row_id(block["id"][0].as_py())
        stored = self.shards.ids(name)
        rows = (row for row in iter_rows(block) if row["id"] not in stored)
        workers = asyncio.gather(*(self._worker(rows) for _ in range(self.num_slots)))
        workers.add_done_callback(lambda _: self.flush_due.set())
        done = False
        while not done:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.flush_due.wait(), FLUSH_SECONDS)
            self.flush_due.clear()
            done = workers.done()
            finished, self.finished = self.finished, []
            for start_row in range(0, len(finished), FLUSH_ROWS):
                yield await self._store(finished[start_row : start_row + FLUSH_ROWS], name)
        self.progress.send()
        await workers

    async def _worker(self, rows: Iterator[Row]) -> None:
        """Run one conversation after another, taking rows from the shared iterator."""
        for row in rows:
            result = await self._run_row(row)
            self.finished.append(result)  # looked up after the await: a flush replaces the list
            if len(self.finished) >= FLUSH_ROWS:
                self.flush_due.set()
            await asyncio.sleep(0)  # let other workers run even if this row never had to wait

    async def _run_row(self, row: Row) -> Row:
        conversation = self._conversation(row)
        result: Row = {"drop_reason": None, "error": None}
        self.progress.add(started=1)
        try:
            result |= await self.row_fn(row, conversation)
        except RowFailed as failed:
            result |= {"drop_reason": failed.reason, "error": failed.detail[:500]}
        self._check_leading_errors(result)
        dropped = result["drop_reason"] is not None
        self.progress.add(
            texts=[] if dropped else model_texts(row | result),
            finished=1,
            dropped=dropped,
            tokens_out=conversation.total_tokens("tokens_out"),
        )
        tokens = {  # a request may carry the tokens of an earlier phase
            name: (row.get(name) or 0) + conversation.total_tokens(name) for name in TOKEN_COLUMNS
        }
        columns = self.shards.schema.names
        return {**{k: v for k, v in row.items() if k in columns}, **tokens, **result}

    def _conversation(self, row: Row) -> Conversation:
        seed = self._row_seed(row.get("seed_id") or row["id"])
        conversation = Conversation(for_conversation(self.engine), seed, self.thinks)
        if self.partner:
            engine, thinks = self.partner
            partner_seed = self._row_seed(row["id"])
            conversation.partner = Conversation(for_conversation(engine), partner_seed, thinks)
        return conversation

    def _check_leading_errors(self, result: Row) -> None:
        """Fail the stage if the engine has failed every row so far: it would fail the rest too."""
        if result["drop_reason"] != ENGINE_ERROR:
            self.leading_errors = None
        elif self.leading_errors is not None:
            self.leading_errors += 1
            if self.leading_errors >= MAX_LEADING_ERRORS:
                raise StageFailed(
                    f"the first {MAX_LEADING_ERRORS} conversations of {self.stage} all failed; "
                    f"the last error: {result['error']}"
                )

    def _row_seed(self, key: str) -> int | None:
        return None if self.seed is None else row_seed(self.seed, self.stage, key)

    async def _store(self, rows: list[Row], name: str) -> int:
        """Write a file of rows in a thread, while the conversations continue."""
        table = pa.Table.from_pylist(rows, schema=self.shards.schema)
        await asyncio.to_thread(self.shards.write, table, name)
        return len(rows)


def for_conversation(engine: Engine) -> Engine:
    """Return the engine for one conversation, which stays on one of several replicas."""
    return engine.for_conversation() if isinstance(engine, EngineClient) else engine


def iter_rows(table: pa.Table) -> Iterator[Row]:
    """Iterate over the rows as Python objects, of which only a few exist at a time."""
    for batch in table.to_batches(max_chunksize=ROWS_PER_BATCH):
        yield from batch.to_pylist()
