"""A stage, a job (a stage in one scope), and what a build may use.

A stage is a module with pure row functions and one `build(job) -> Outcome`. It may also have
`needs(job) -> passes`, what each holds at once; `estimate(job) -> Estimate` and `notes(job) ->
lines` for `plan`; `check(job)`, which raises a UserError before a run that it knows cannot end
well; and `identity(job) -> dict` for what its result depends on beside its section of the recipe,
its roles, its constitution and its parents.
"""

from __future__ import annotations

import datetime
import importlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from opencharacter.config.placement import Placement, Resources
from opencharacter.config.recipe import Recipe
from opencharacter.constitution.schema import Constitution
from opencharacter.errors import StageFailed
from opencharacter.runtime.store import (
    ATTEMPTS,
    SHARDS,
    RemoteDir,
    Shards,
    Store,
    diff,
    fingerprint,
)
from opencharacter.text.chat import row_id
from opencharacter.text.statistics import (
    LANGUAGE_PROMPTS,
    TextBaseline,
    exceeded_limit,
    language_of,
    measure,
    model_texts,
    near_duplicates,
)


class ResourceRequest(Protocol):
    """Resources that a job holds for a phase of its work: an engine, or training workers.

    Jobs whose requests have equal keys share what the request stands for.
    """

    @property
    def resources(self) -> Resources: ...

    @property
    def max_concurrent_jobs(self) -> int: ...

    @property
    def role_name(self) -> str: ...

    def key(self) -> str: ...


@dataclass(frozen=True)
class TrainingWorkers:
    """Processes of training, which a job has for itself.

    Args:
        owner: the job's dataset.
        resources: of all of them together.
        count: how many there are.
    """

    owner: str
    resources: Resources
    count: int = 1
    max_concurrent_jobs: int = 1
    role_name: str = ""

    def key(self) -> str:
        return f"workers of {self.owner}"


TOKEN_COLUMNS = ("tokens_in", "tokens_out", "cached_tokens")
MEASURED_ROWS = 2000
"""Generated rows that are measured; the stage that makes training data of them measures all."""
BATCH_ROWS = 1000
"""Rows that are Python objects at once while a table is looked through."""

Scope = Literal["constitution", "student", "persona"]
"""Whom a dataset belongs to: a constitution (shared by all students), a student (shared by all
personas), or a persona (student x constitution)."""


@dataclass(frozen=True)
class Stage:
    """A line of the pipeline's table.

    Args:
        name: `group/module`, also its folder.
        scope: whom its dataset belongs to.
        reads: names of the stages whose datasets it reads.
        roles: models whose identity its result depends on.
        disposable: cheap and derived from the personas of the run: rebuilt without asking when
            stale, so that a persona can be added.
    """

    name: str
    scope: Scope
    reads: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    disposable: bool = False

    @property
    def module(self) -> ModuleType:
        return importlib.import_module("opencharacter." + self.name.replace("/", "."))


@dataclass(frozen=True)
class Estimate:
    """What a stage will take, before it runs: rows written, tokens read and generated (or trained).

    Generated and trained tokens cost very differently; `trained` says which these are. `judged` are
    those of `tokens_out` that the judge writes beside the student, `read` are tokens that training
    workers read and do not learn from.
    """

    rows: int
    tokens_in: int = 0
    tokens_out: int = 0
    trained: int = 0
    judged: int = 0
    read: int = 0


@dataclass(frozen=True)
class StageResult:
    """What a build has to tell the manifest."""

    rows: int
    dropped: dict[str, int] = field(default_factory=dict)
    schema: list[str] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A stage in one scope, with all it needs; its fingerprint needs no stored data."""

    stage: Stage
    recipe: Recipe
    placement: Placement
    store: Store
    constitution: Constitution | None
    constitutions: tuple[Constitution, ...]
    parents: tuple[Job, ...]

    @property
    def scope(self) -> str:
        """The folder of whom it belongs to."""
        student = self.recipe.roles.student.name
        persona = self.constitution.name if self.constitution else ""
        return {
            "constitution": persona,
            "student": student,
            "persona": f"{student}/{persona}",
        }[self.stage.scope]

    @property
    def dataset(self) -> str:
        return f"{self.scope}/{self.stage.name}"

    @property
    def adapter(self) -> RemoteDir:
        """Where a stage that makes an adapter puts it."""
        return RemoteDir(self.store, f"{self.dataset}/adapter")

    @property
    def config(self) -> Any:
        return self.recipe.config(self.stage.name)

    @cached_property
    def payload(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON values."""
        identity = getattr(self.stage.module, "identity", None)
        roles = {r: getattr(self.recipe.roles, r).identity() for r in self.stage.roles}
        return {
            "stage": self.stage.name,
            "scope": self.scope,
            "config": self.config.identity(),
            "seed": self.recipe.seed,
            "seeded_sampling": self.recipe.seeded_sampling,
            "roles": roles,
            "constitution": self.constitution.digest() if self.constitution else None,
            "also": identity(self) if identity else {},
            "templates": row_id(*getattr(self.stage.module, "TEMPLATES", ())),
            "parents": {p.dataset: p.fingerprint for p in self.parents},
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.payload)

    @property
    def persona(self) -> Constitution:
        """The constitution of a stage that has one."""
        assert self.constitution is not None
        return self.constitution

    def workers(self, count: int | None = None) -> TrainingWorkers:
        """The workers of training that this job has for itself; all that the placement says."""
        training = self.placement.training
        count = count or training.workers
        room = training.model_copy(update={"workers": count}).resources
        return TrainingWorkers(self.dataset, room, count)

    @cached_property
    def resource_requests(self) -> list[tuple[ResourceRequest, ...]]:
        """What it holds, pass after pass; nothing where it runs on the driver alone."""
        resource_requests = getattr(self.stage.module, "resource_requests", None)
        return resource_requests(self) if resource_requests else []

    @property
    def writer(self) -> str | None:
        """The role that writes its rows, before others say something of them; None without one."""
        first = self.resource_requests[0][0] if self.resource_requests else None
        return first.role_name or None if first else None

    def parent(self, name: str) -> Job:
        """The one parent of this name."""
        (found,) = (p for p in self.parents if p.stage.name == name)
        return found

    def read(self, name: str) -> pa.Table:
        """Rows of the parents of this name that were not dropped, one table, sorted by id."""
        return kept(read_all(self.parents, name)).sort_by("id")

    def write(
        self,
        rows: pa.Table | Shards,
        baseline: TextBaseline | None = None,
        figures: dict[str, Any] | None = None,
        **outcome: Any,
    ) -> StageResult:
        """Write the rows of this stage; refuse if too many were dropped or a limit is passed.

        Args:
            rows: a table, or generated ones, of which only a few at a time are held.
            expected: what their texts are held against, where the job cannot know.
            figures: of the manifest; the signatures of the texts are added.
            outcome: further fields of the outcome.

        Raises:
            StageFailed: naming the reason that led.
        """
        tables = [rows] if isinstance(rows, pa.Table) else rows
        self.store.write_tables(self.dataset, tables, rows.schema)
        small = [name for name in ("drop_reason", *TOKEN_COLUMNS) if name in rows.schema.names]
        table = self.store.read_table(self.dataset, columns=small)
        dropped = count_drop_reasons(table)
        check_drop_rate(self.dataset, len(table), dropped, self.config)
        every = 1 if isinstance(rows, pa.Table) else math.ceil(len(table) / MEASURED_ROWS)
        figures = (figures or {}) | self._text_statistics(baseline, max(1, every))
        schema = [f"{f.name}: {f.type}" for f in rows.schema]
        tokens = {name: column_sum(table, name) for name in TOKEN_COLUMNS}
        return StageResult(len(table), dropped, schema, figures=figures, **{**tokens, **outcome})

    # ----------------------------------------------------------------------------------- quality

    def ancestor(self, name: str) -> Job | None:
        """The nearest job of this name that this one is made from."""
        found = (p if p.stage.name == name else p.ancestor(name) for p in self.parents)
        return next(filter(None, found), None)

    def baseline(self, rows: pa.Table) -> TextBaseline:
        """What texts are held against: the prompts' language, and the teacher's words if known.

        Args:
            rows: with the prompts, if there are any; the constitution's language counts else.
        """
        named = "prompt" in rows.schema.names
        prompts = rows["prompt"].slice(0, LANGUAGE_PROMPTS).to_pylist() if named else []
        if not prompts and self.constitution:
            prompts = [t.trait for t in self.constitution.traits]
        pairs = self.ancestor("distillation/pairs")
        manifest = pairs and pairs.store.manifest(pairs.dataset)
        figures = manifest["figures"] if manifest else {}
        return TextBaseline(
            language=language_of(prompts),
            trait_words=frozenset(figures.get("trait_words", ())),
            rate=figures.get("text_statistics", {}).get("trait_words"),
        )

    def refused(self, fault: str) -> str:
        """The message of a stage whose texts are beyond a limit."""
        return (
            f"{self.dataset} is not worth going on with. {fault}. Read the rows, mend the cause, "
            f"or change `limits` of {self.stage.name} in the recipe"
        )

    def _text_statistics(self, baseline: TextBaseline | None, every: int) -> dict[str, Any]:
        """The figures about the texts of a stage that has limits, read from storage.

        Args:
            expected: what they are held against.
            every: look at each so-many-th row. Repeats are looked for among all or not at all.
        """
        limits = getattr(self.config, "limits", None)
        if limits is None:
            return {}
        if baseline is None:
            first = next(self.store.scan(self.dataset, LANGUAGE_PROMPTS), pa.table({}))
            baseline = self.baseline(first)
        measured = measure(texts(self.store.scan(self.dataset, BATCH_ROWS), every), baseline)
        if every == 1:
            repeated = sum(near_duplicates(texts(self.store.scan(self.dataset, BATCH_ROWS))))
            measured["near_duplicates"] = repeated / max(measured["texts"], 1)
        fault = exceeded_limit(measured, limits)
        if fault:
            raise StageFailed(self.refused(fault))
        return {"text_statistics": measured}

    # ------------------------------------------------------------------------------- its state

    def state(self) -> tuple[Literal["done", "partial", "stale", "missing"], list[str]]:
        """What storage holds of this job, and for a stale one the fields that differ."""
        found = self.store.manifest(self.dataset)
        if found is None:
            found = self.store.read_json(f"{self.dataset}/{SHARDS}/{ATTEMPTS}")
            if found is None:
                return "missing", []
            if found["fingerprint"] == self.fingerprint:
                return "partial", []
        elif found["fingerprint"] == self.fingerprint:
            return "done", []
        return "stale", diff(found["payload"], self.payload)


def read_all(jobs: Iterable[Job], name: str, columns: list[str] | None = None) -> pa.Table:
    """Rows of the jobs of one name, dropped ones too: a stage in two scopes is one table here."""
    named = (job for job in jobs if job.stage.name == name)
    return pa.concat_tables([job.store.read_table(job.dataset, columns=columns) for job in named])


def texts(tables: Iterable[pa.Table], every: int = 1) -> Iterator[str]:
    """What the model wrote in the rows that were not dropped, or in each so-many-th of them."""
    for table in tables:
        good = kept(table)
        for row in good.take(list(range(0, len(good), every))).to_pylist():
            yield from model_texts(row)


def kept(table: pa.Table) -> pa.Table:
    """The rows without a drop reason."""
    if "drop_reason" not in table.schema.names:
        return table
    return table.filter(pc.is_null(table["drop_reason"]))


def count_drop_reasons(table: pa.Table) -> dict[str, int]:
    """Rows by drop reason, the commonest first."""
    if "drop_reason" not in table.schema.names:
        return {}
    found = table["drop_reason"].drop_null().value_counts().to_pylist()
    return dict(Counter({each["values"]: each["counts"] for each in found}).most_common())


def check_drop_rate(dataset: str, rows: int, dropped: dict[str, int], section: Any) -> None:
    """Raise StageFailed if more rows were dropped than the section allows, or all of them."""
    limit = getattr(section, "max_drop_rate", 1.0)
    lost = sum(dropped.values())
    if not lost or (lost <= limit * rows and lost < rows):
        return
    reason, most = next(iter(dropped.items()))
    raise StageFailed(
        f"{dataset} dropped {lost} of {rows} rows ({lost / rows:.0%}, limit {limit:.0%}), most "
        f"often for {reason!r} ({most}); read them in {dataset}/.shards, mend the cause or raise "
        "max_drop_rate"
    )


def column_sum(table: pa.Table, column: str) -> int:
    """Sum of an integer column; 0 if there is none."""
    return pc.sum(table[column]).as_py() or 0 if column in table.schema.names else 0


class AttemptLog:
    """The note beside an unfinished stage: for each attempt what it kept and how far it came.

    What one attempt had reached and the next one did not find is redone (see `redone`). The unit
    is rows for generation and optimiser steps for training.

    Args:
        job: the stage.
        kept: what earlier attempts had finished.
        part: names the pass, for a stage that generates more than once.
    """

    def __init__(self, job: Job, kept: int, part: str = ""):
        self.job, self.kept = job, kept
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.history = [*job.store.attempts(job.dataset), {"at": now, "part": part, "kept": kept}]
        self.note(kept)

    def note(self, reached: int, kept: int | None = None) -> None:
        """Write how far this attempt has come: rows begun in all, or the last step."""
        self.kept = self.kept if kept is None else kept
        self.history[-1] |= {"reached": reached, "kept": self.kept}
        self.job.store.write_json(
            f"{self.job.dataset}/{SHARDS}/{ATTEMPTS}",
            {
                "fingerprint": self.job.fingerprint,
                "payload": self.job.payload,
                "attempts": self.history,
            },
        )


def repeated_work(history: list[dict[str, Any]]) -> int:
    """Rows or steps that attempts had begun and a later one had to begin again."""
    last: dict[str, dict[str, Any]] = {}
    again = 0
    for attempt in history:
        before = last.get(attempt["part"])
        again += max(0, before["reached"] - attempt["kept"]) if before else 0
        last[attempt["part"]] = attempt
    return again
