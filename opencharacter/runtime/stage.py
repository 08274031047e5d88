"""What a stage is, what a job is, and what a stage's module provides.

A *stage* is one line of `pipeline.STAGES`. A *job* is a stage applied to one scope: a
constitution, a student or a persona. Running a job calls `build(job)` of the stage's module,
`opencharacter/<group>/<name>.py`.

A stage module is written as pure functions on rows and these module-level names. Its docstring
begins with `Stage <group>/<name>:`.

    build(job) -> StageResult       required: makes the dataset, usually by `job.write(rows)`.
    estimate(job) -> Estimate       required: rows and tokens that `build` will take, for `plan`.
    resource_requests(job)          the engines and training workers that `build` acquires, as a
                                    list of phases, each a tuple of `ResourceRequest`s that are
                                    held together. Without it the job runs on the driver alone.
    is_enabled(job) -> bool         whether the recipe uses the stage. Otherwise its dataset is
                                    empty; it is made without being scheduled or printed.
    check(job)                      raises UserError before the run starts if it cannot succeed.
    notes(job) -> Iterable[str]     lines that `plan` prints about the stage.
    live(job) -> list[str]          lines about the results so far, while the stage runs.
    scores(job) -> list[dict]       rows of `SCORES` that evaluation/report collects.
    report(job) -> list[Section]    sections that evaluation/report shows; both read stored data.
    provisional(job) -> list        sections about what is stored so far, while the job is not done.
    identity(job) -> dict           inputs that decide the result and are not listed below.
    TEMPLATES: tuple[str, ...]      prompt templates that decide the result.
    RULES: tuple[module, ...]       modules whose rules decide the result; each has a `VERSION`.

The fingerprint of a job covers everything that decides its result: the stage's section of the
recipe, the seed, its roles' models and the content of those on this machine's disk, its
constitution, `identity`, `TEMPLATES`, the versions of its `RULES`, and the fingerprints of its
parents. `Job.payload` holds these values, and the manifest stores them, so that a dataset that no
longer matches can be explained field by field.
"""

from __future__ import annotations

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

from opencharacter import models
from opencharacter.config.placement import Placement, Resources
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Role
from opencharacter.constitution.schema import Constitution
from opencharacter.errors import StageFailed
from opencharacter.runtime.staleness import FORMAT_FIELD
from opencharacter.runtime.store import (
    ATTEMPTS,
    FORMAT_VERSION,
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

TOKEN_COLUMNS = ("tokens_in", "tokens_out", "cached_tokens")
MEASURED_ROWS = 2000
"""Generated rows whose texts are measured. Stages that make training data measure all rows."""
BATCH_ROWS = 1000
"""Rows that are converted to Python objects at a time."""

Scope = Literal["constitution", "student", "persona"]
"""What a dataset belongs to: a constitution (shared by all students), a student (shared by all
personas), or a persona (one student with one constitution)."""
State = Literal["done", "partial", "stale", "missing"]
"""What storage holds of a job: its finished dataset, an unfinished one, one with another
fingerprint, or nothing."""


class ResourceRequest(Protocol):
    """Resources that a job holds during a phase of its work: an engine, or training workers.

    Jobs whose requests have equal keys share one engine.
    """

    @property
    def resources(self) -> Resources: ...

    @property
    def max_concurrent_jobs(self) -> int: ...

    @property
    def role_name(self) -> str: ...

    @property
    def swap_group(self) -> str: ...

    @property
    def sleeps(self) -> bool: ...

    def key(self) -> str: ...


@dataclass(frozen=True)
class TrainingWorkers:
    """Training processes, which are never shared between jobs.

    Args:
        owner: the job's dataset.
        resources: of all workers together.
        count: number of workers.
        max_concurrent_jobs: always 1.
        role_name: always empty, since training generates nothing.
        swap_group: always empty, since workers are not reused.
        sleeps: always false, since workers end after their work.
    """

    owner: str
    resources: Resources
    count: int = 1
    max_concurrent_jobs: int = 1
    role_name: str = ""
    swap_group: str = ""
    sleeps: bool = False

    def key(self) -> str:
        return f"workers of {self.owner}"


@dataclass(frozen=True)
class Stage:
    """One line of the pipeline's table.

    Args:
        name: `group/module`; also the folder of its datasets.
        scope: what its datasets belong to.
        reads: names of the stages whose datasets it reads.
        roles: roles whose models decide its result.
        disposable: whether a stale dataset is rebuilt without `--rebuild`. For cheap stages that
            summarize all personas of a run, so that personas can be added later.
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
    """What a job will process, known before it runs.

    Args:
        rows: rows of its dataset.
        tokens_in: prompt tokens.
        tokens_out: generated tokens, those of the judge included.
        trained: tokens of the training set, times the number of epochs.
        judged: those of `tokens_out` that the judge generates beside the student.
        read: tokens that training workers process without a backward pass.
    """

    rows: int
    tokens_in: int = 0
    tokens_out: int = 0
    trained: int = 0
    judged: int = 0
    read: int = 0


@dataclass(frozen=True)
class StageResult:
    """What `build` returns for the manifest.

    Args:
        rows: rows of the dataset, dropped ones included.
        dropped: number of dropped rows by reason.
        schema: columns, each as `name: type`.
        tokens_in: prompt tokens.
        tokens_out: generated tokens.
        cached_tokens: those of `tokens_in` that the prefix cache held.
        figures: further numbers of the stage, by name.
    """

    rows: int
    dropped: dict[str, int] = field(default_factory=dict)
    schema: list[str] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A stage in one scope, with everything that `build` needs.

    Creating a job and computing its fingerprint read nothing from storage.

    Args:
        stage: its line of the pipeline's table.
        recipe: what is made.
        placement: where it runs; never part of the fingerprint.
        store: where datasets are stored.
        constitution: None for a stage of the student alone.
        constitutions: all constitutions of the run.
        parents: the jobs whose datasets it reads.
    """

    stage: Stage
    recipe: Recipe
    placement: Placement
    store: Store
    constitution: Constitution | None
    constitutions: tuple[Constitution, ...]
    parents: tuple[Job, ...]

    @property
    def scope(self) -> str:
        """The folder of what the dataset belongs to."""
        student = self.recipe.roles.student.name
        constitution = self.constitution.name if self.constitution else ""
        return {
            "constitution": constitution,
            "student": student,
            "persona": f"{student}/{constitution}",
        }[self.stage.scope]

    @property
    def dataset(self) -> str:
        """Path of the dataset below the storage root."""
        return f"{self.scope}/{self.stage.name}"

    @property
    def adapter(self) -> RemoteDir:
        """Directory of the adapter, for a stage that makes one."""
        return RemoteDir(self.store, f"{self.dataset}/adapter")

    @property
    def config(self) -> Any:
        """The stage's section of the recipe."""
        return self.recipe.config(self.stage.name)

    @property
    def persona(self) -> Constitution:
        """The constitution, for a stage that always has one."""
        assert self.constitution is not None
        return self.constitution

    @property
    def roles(self) -> dict[str, Role]:
        """The models that decide the result, those of a panel of judges included, by name."""
        panel = getattr(self.config, "panel", ())
        return {name: getattr(self.recipe.roles, name) for name in self.stage.roles} | {
            f"panel.{judge.name}": judge for judge in panel
        }

    # ------------------------------------------------------------------------ identity and state

    @cached_property
    def payload(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        module = self.stage.module
        identity = getattr(module, "identity", None)
        return {
            "stage": self.stage.name,
            "scope": self.scope,
            "config": self.config.identity(),
            "seed": self.recipe.seed,
            "seeded_sampling": self.recipe.seeded_sampling,
            "roles": {name: models.identity(role) for name, role in self.roles.items()},
            "constitution": self.constitution.digest() if self.constitution else None,
            "inputs": identity(self) if identity else {},
            "templates": row_id(*getattr(module, "TEMPLATES", ())),
            "rules": rule_versions(module),
            "parents": {parent.dataset: parent.fingerprint for parent in self.parents},
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the payload."""
        return fingerprint(self.payload)

    def state(self) -> tuple[State, list[str]]:
        """Compare storage with this job.

        Returns:
            The state, and for a stale job the differences, each as `field: old -> new`.
        """
        stored = self.store.manifest(self.dataset, any_format=True)
        finished = stored is not None
        if stored is None:
            stored = self.store.read_json(f"{self.dataset}/{SHARDS}/{ATTEMPTS}")
        if stored is None:
            return "missing", []
        if stored["fingerprint"] == self.fingerprint:
            return "done" if finished else "partial", []
        written = stored.get("format_version", 1)
        if written < FORMAT_VERSION:
            return "stale", [f"{FORMAT_FIELD}: {written} -> {FORMAT_VERSION}"]
        return "stale", diff(stored["payload"], self.payload)

    # -------------------------------------------------------------------------------- resources

    @property
    def is_enabled(self) -> bool:
        """Whether the recipe uses the stage; otherwise there is nothing to do."""
        is_enabled = getattr(self.stage.module, "is_enabled", None)
        return is_enabled is None or is_enabled(self)

    def workers(self) -> TrainingWorkers:
        """The training workers of the placement, for this job."""
        training = self.placement.training
        return TrainingWorkers(self.dataset, training.resources, training.workers)

    def single_worker(self) -> TrainingWorkers:
        """A worker for a task of this job that runs in a single process."""
        return TrainingWorkers(self.dataset, self.placement.training.single.resources)

    @cached_property
    def resource_requests(self) -> list[tuple[ResourceRequest, ...]]:
        """What the job holds in each phase; empty if it runs on the driver alone."""
        resource_requests = getattr(self.stage.module, "resource_requests", None)
        return resource_requests(self) if resource_requests else []

    @property
    def writer(self) -> str | None:
        """The role that generates the rows, or None if nothing is generated."""
        first = self.resource_requests[0][0] if self.resource_requests else None
        return first.role_name or None if first else None

    # ------------------------------------------------------------------------ reading and writing

    def parent(self, name: str) -> Job:
        """Return the only parent of the stage `name`."""
        (parent,) = (p for p in self.parents if p.stage.name == name)
        return parent

    def nearest_ancestor(self, name: str) -> Job | None:
        """Return the nearest job of the stage `name` that this job depends on, or None."""
        candidates = (p if p.stage.name == name else p.nearest_ancestor(name) for p in self.parents)
        return next(filter(None, candidates), None)

    def read(self, name: str) -> pa.Table:
        """Read the rows of all parents of the stage `name`, without dropped rows, sorted by id."""
        return without_dropped(read_all(self.parents, name)).sort_by("id")

    def write(
        self,
        rows: pa.Table | Shards,
        baseline: TextBaseline | None = None,
        figures: dict[str, Any] | None = None,
        **fields: Any,
    ) -> StageResult:
        """Write the dataset, then check the recipe's data-quality limits.

        Args:
            rows: a table, or generated rows, which are read a few files at a time.
            baseline: what the texts are compared with; derived from the job if None.
            figures: numbers for the manifest; the text statistics are added to them.
            fields: further fields of the result.

        Raises:
            StageFailed: if too many rows were dropped, or the texts exceed a limit.
        """
        tables = [rows] if isinstance(rows, pa.Table) else rows
        self.store.write_tables(self.dataset, tables, rows.schema)
        small = [name for name in ("drop_reason", *TOKEN_COLUMNS) if name in rows.schema.names]
        table = self.store.read_table(self.dataset, columns=small)
        dropped = count_drop_reasons(table)
        check_drop_rate(self.dataset, len(table), dropped, self.config)
        stride = 1 if isinstance(rows, pa.Table) else math.ceil(len(table) / MEASURED_ROWS)
        figures = (figures or {}) | self._text_statistics(baseline, max(1, stride))
        schema = [f"{column.name}: {column.type}" for column in rows.schema]
        tokens = {name: column_sum(table, name) for name in TOKEN_COLUMNS}
        return StageResult(len(table), dropped, schema, figures=figures, **{**tokens, **fields})

    # ------------------------------------------------------------------------------ data quality

    def baseline(self, rows: pa.Table) -> TextBaseline:
        """What the texts of this job are compared with.

        That is the language of the prompts and, if the pairs of the persona are known, the
        teacher's distinctive words.

        Args:
            rows: rows of the job. Without a `prompt` column, the language is the constitution's.
        """
        has_prompts = "prompt" in rows.schema.names
        prompts = rows["prompt"].slice(0, LANGUAGE_PROMPTS).to_pylist() if has_prompts else []
        if not prompts and self.constitution:
            prompts = [t.trait for t in self.constitution.traits]
        pairs = self.nearest_ancestor("distillation/pairs")
        manifest = pairs and pairs.store.manifest(pairs.dataset)
        figures = manifest["figures"] if manifest else {}
        return TextBaseline(
            language=language_of(prompts),
            trait_words=frozenset(figures.get("trait_words", ())),
            rate=figures.get("text_statistics", {}).get("trait_words"),
        )

    def quality_failure(self, reason: str) -> str:
        """Return the error message for texts that exceed a limit."""
        return (
            f"{self.dataset} failed a data-quality limit: {reason}. Inspect the rows and fix the "
            f"cause, or change `limits` of {self.stage.name} in the recipe"
        )

    def _text_statistics(self, baseline: TextBaseline | None, stride: int) -> dict[str, Any]:
        """Measure the stored texts of a stage that has limits.

        Args:
            baseline: what the texts are compared with.
            stride: measure every `stride`-th row. Near-duplicates are searched only if it is 1.

        Raises:
            StageFailed: if the texts exceed a limit.
        """
        limits = getattr(self.config, "limits", None)
        if limits is None:
            return {}
        if baseline is None:
            first_rows = next(self.store.scan(self.dataset, LANGUAGE_PROMPTS), pa.table({}))
            baseline = self.baseline(first_rows)
        statistics = measure(texts(self.store.scan(self.dataset, BATCH_ROWS), stride), baseline)
        if stride == 1:
            duplicates = near_duplicates(texts(self.store.scan(self.dataset, BATCH_ROWS)))
            statistics["near_duplicates"] = sum(duplicates) / max(statistics["texts"], 1)
        reason = exceeded_limit(statistics, limits)
        if reason:
            raise StageFailed(self.quality_failure(reason))
        return {"text_statistics": statistics}


def rule_versions(module: ModuleType) -> dict[str, int]:
    """Versions of the modules in a stage module's `RULES`, by their names in the package."""
    return {
        rules.__name__.removeprefix("opencharacter."): rules.VERSION
        for rules in getattr(module, "RULES", ())
    }


def read_all(jobs: Iterable[Job], name: str, columns: list[str] | None = None) -> pa.Table:
    """Read the rows of all jobs of the stage `name` as one table, dropped rows included."""
    selected = (job for job in jobs if job.stage.name == name)
    return pa.concat_tables(
        [job.store.read_table(job.dataset, columns=columns) for job in selected]
    )


def texts(tables: Iterable[pa.Table], stride: int = 1) -> Iterator[str]:
    """Yield the texts that the model wrote, from every `stride`-th row that was not dropped."""
    for table in tables:
        rows = without_dropped(table)
        for row in rows.take(list(range(0, len(rows), stride))).to_pylist():
            yield from model_texts(row)


def without_dropped(table: pa.Table) -> pa.Table:
    """Return the rows that have no drop reason."""
    if "drop_reason" not in table.schema.names:
        return table
    return table.filter(pc.is_null(table["drop_reason"]))


def count_drop_reasons(table: pa.Table) -> dict[str, int]:
    """Count dropped rows by reason, the most frequent first."""
    if "drop_reason" not in table.schema.names:
        return {}
    counts = table["drop_reason"].drop_null().value_counts().to_pylist()
    return dict(Counter({each["values"]: each["counts"] for each in counts}).most_common())


def check_drop_rate(dataset: str, rows: int, dropped: dict[str, int], config: Any) -> None:
    """Raise StageFailed if all rows were dropped, or more than `max_drop_rate` of them."""
    limit = getattr(config, "max_drop_rate", 1.0)
    total = sum(dropped.values())
    if not total or (total <= limit * rows and total < rows):
        return
    reason, count = next(iter(dropped.items()))
    raise StageFailed(
        f"{dataset} dropped {total} of {rows} rows ({total / rows:.0%}, limit {limit:.0%}), most "
        f"often for {reason!r} ({count}); inspect them in {dataset}/.shards, then fix the cause or "
        "raise max_drop_rate"
    )


def column_sum(table: pa.Table, column: str) -> int:
    """Sum an integer column; 0 if the table does not have it."""
    return pc.sum(table[column]).as_py() or 0 if column in table.schema.names else 0
