"""A stored run, and its scores as Markdown tables."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from opencharacter import pipeline
from opencharacter.config import files
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution import schema
from opencharacter.constitution.schema import Constitution
from opencharacter.errors import UserError
from opencharacter.evaluation.paper import mean_of
from opencharacter.evaluation.report.formatting import bare_text, interval_text
from opencharacter.evaluation.report.sections import Change
from opencharacter.evaluation.report.stage import collect
from opencharacter.evaluation.scores import Score
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import Store

Row = dict[str, Any]
Cells = Mapping[str, Score | None]

CONTROL = "neutral"
"""The persona without a character, which means over personas leave out."""
BASE, PROMPTED, DISTILLED, FULL = "base", "prompted", "distilled", "full"
AGAINST_BASE, AGAINST_PROMPTED, AGAINST_DISTILLED = (
    f"full against {name}" for name in (BASE, PROMPTED, DISTILLED)
)
"""Columns of paired changes."""
SCORED = (
    "evaluation/judge",
    "evaluation/robustness",
    "evaluation/coherence",
    "evaluation/adherence",
    "evaluation/rating",
    "evaluation/drift",
    "evaluation/side_effects",
    "evaluation/projection",
    "evaluation/capabilities",
)
"""The stages whose scores are shown."""
KEY = ("persona", "measure", "condition", "about")
VALUES = tuple(field.name for field in fields(Score))


# -------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class StoredRun:
    """What a storage holds of a run.

    Args:
        recipe: the recipe that the newest manifest was written with.
        personas: the packaged constitutions with a folder in the storage.
        jobs: all jobs that the recipe uses.
        manifests: of the finished jobs, by dataset.
    """

    recipe: Recipe
    personas: list[Constitution]
    jobs: list[Job]
    manifests: dict[str, dict[str, Any]]

    def finished(self, stage: str) -> dict[str, Job]:
        """The finished jobs of a stage with their rows, by persona; those of the student as ""."""
        return {
            job.constitution.name if job.constitution else "": job
            for job in self.jobs
            if job.stage.name == stage and self.has_rows(job)
        }

    def has_rows(self, job: Job) -> bool:
        """Whether a job is finished and its rows are in the storage."""
        stored = job.store.exists(f"{job.dataset}/rows.parquet")
        return job.dataset in self.manifests and stored

    @property
    def names(self) -> list[str]:
        """The names of the personas."""
        return [persona.name for persona in self.personas]

    @cached_property
    def scores(self) -> list[Row]:
        """The rows of `SCORES` of the finished stages."""
        jobs = [job for stage in SCORED for job in self.finished(stage).values()]
        return collect(jobs, "scores")

    @cached_property
    def indexed(self) -> dict[tuple[str | None, ...], Score]:
        """The scores by persona, measure, condition and about."""
        return {
            tuple(row[name] for name in KEY): Score(**{n: row[n] for n in VALUES})
            for row in self.scores
        }

    def find(
        self, persona: str, measure: str, condition: str | None, about: str | None
    ) -> Score | None:
        """One score; None if it was not measured."""
        return self.indexed.get((persona, measure, condition, about))


def open_run(storage: str, recipe: str) -> StoredRun:
    """Open the run of a student.

    Args:
        storage: path or URL of the storage.
        recipe: a recipe with the student's name. It names the models, which a run may have taken
            from folders; all other settings are those of the manifests.

    Raises:
        UserError: if the storage holds no persona of the student.
    """
    store, named = Store.at(storage), files.load_recipe(recipe)
    student = named.roles.student.name
    names = [name for name in schema.packaged() if name in store.folders(student)]
    if not names:
        raise UserError(
            f"{store.address()} has no folder {student} with packaged personas; give the storage "
            "of a run and its recipe"
        )
    personas = schema.load_all(names)
    jobs = pipeline.jobs(named, personas, Placement(), store)
    manifests = read_manifests(jobs)
    if not manifests:
        raise UserError(f"{store.address()} has no finished dataset of {student}; finish the run")
    newest = max(manifests.values(), key=lambda manifest: manifest["finished"])
    written = Recipe.model_validate(newest["recipe"]).model_copy(update={"roles": named.roles})
    placement = Placement.model_validate(newest["placement"])
    jobs = [job for job in pipeline.jobs(written, personas, placement, store) if job.is_enabled]
    used = [job.dataset for job in jobs if job.dataset in manifests]
    return StoredRun(written, personas, jobs, {dataset: manifests[dataset] for dataset in used})


def read_manifests(jobs: Iterable[Job]) -> dict[str, dict[str, Any]]:
    """The manifests of the finished jobs, by dataset."""
    found = {job.dataset: job.store.manifest(job.dataset) for job in jobs}
    return {dataset: manifest for dataset, manifest in found.items() if manifest}


def spans(manifest: Mapping[str, Any]) -> list[tuple[datetime.datetime, datetime.datetime]]:
    """When each attempt at a dataset began and ended, as far as it is recorded."""
    end = datetime.datetime.fromisoformat(manifest["finished"])
    last = (end - datetime.timedelta(seconds=manifest["seconds"]), end)
    attempts = [
        (
            datetime.datetime.fromisoformat(attempt["at"]),
            datetime.datetime.fromisoformat(attempt["updated"]),
        )
        for attempt in manifest["attempts"]
        if "updated" in attempt
    ]
    return [*attempts, last]


def wall_seconds(manifests: Iterable[Mapping[str, Any]]) -> float:
    """The time in which at least one stage was under way."""
    total, reached = 0.0, None
    for began, ended in sorted(span for manifest in manifests for span in spans(manifest)):
        start = began if reached is None else max(began, reached)
        total += max(0.0, (ended - start).total_seconds())
        reached = ended if reached is None else max(reached, ended)
    return total


# ---------------------------------------------------------------------------------------- tables


def cell(score: Score | None) -> str:
    """A score with its interval; its unit is that of the table."""
    if score is None:
        return "-"
    if score.value is None:
        return "not scored"
    return f"{bare_text(score, score.value)} ({interval_text(score)})"


def changed(score: Score | None) -> Change | None:
    """A score as a change, which is shown in percentage points."""
    return Change(**vars(score)) if score else None


def correlation_text(score: Score | None) -> str:
    """A correlation with its interval."""
    if score is None or score.value is None:
        return "-"
    return f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})"


def counts(scores: Iterable[Score | None]) -> str:
    """The numbers of scored and of unscored items in a row: one, or the least and the greatest."""
    known = [score for score in scores if score]
    if not known:
        return "-"
    return f"{ends([s.n for s in known])}; {ends([s.unscored for s in known])}"


def ends(numbers: Sequence[int]) -> str:
    """A number, or the least and the greatest of several."""
    return " to ".join(f"{n:,}" for n in sorted({min(numbers), max(numbers)}))


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines
    )


def table(caption: str, rows: Mapping[str, Cells], columns: Sequence[str], label: str = "") -> str:
    """A table of scores with its caption; columns without any score are left out.

    Args:
        caption: says what the cells are, and their unit.
        rows: the cells of each row, by the row's name.
        columns: the names of the columns.
        label: what a row is.
    """
    shown = [name for name in columns if any(cells.get(name) for cells in rows.values())]
    if not shown:
        return ""
    lines = (
        [name, *(cell(cells.get(column)) for column in shown), counts(cells.values())]
        for name, cells in rows.items()
        if any(cells.values())
    )
    header = [label, *shown, "n; unscored"]
    return f"{caption}\n\n{grid(header, lines)}"


def mean_cells(
    rows: Mapping[str, Cells], kinds: Mapping[str, type[Score]] | None = None
) -> dict[str, Score | None]:
    """The mean over personas of each column, without the control; a single persona's own cells.

    A column that a persona lacks has no mean. The interval is the mean of the personas' intervals,
    which contains that of the mean whatever the correlation of their errors.

    Args:
        rows: the cells of each persona.
        kinds: the kind of score of the columns that are no proportions.
    """
    averaged = [cells for name, cells in rows.items() if name != CONTROL and any(cells.values())]
    mean: dict[str, Score | None] = {}
    for column in dict.fromkeys(name for cells in averaged for name in cells):
        scores = [score for cells in averaged if (score := cells.get(column))]
        if len(scores) == len(averaged):
            mean[column] = (kinds or {}).get(column, Score)(**vars(mean_of(scores)))
    return mean


def with_mean(
    rows: Mapping[str, Cells], kinds: Mapping[str, type[Score]] | None = None
) -> dict[str, Cells]:
    """Rows of personas, with the mean of several below; arguments as in `mean_cells`."""
    measured = {name: cells for name, cells in rows.items() if any(cells.values())}
    count = len(measured.keys() - {CONTROL})
    return measured | ({f"mean of {count}": mean_cells(rows, kinds)} if count > 1 else {})


def missing(run: StoredRun, stage: str) -> str:
    """A sentence about the personas whose dataset of a stage is not in the storage."""
    needed = [job for job in run.jobs if job.stage.name == stage]
    if not needed:
        return "The recipe leaves this out."
    absent = [job.scope.rpartition("/")[2] for job in needed if not run.has_rows(job)]
    if len(absent) == len(needed):
        return f"Not measured: the storage has no finished {stage}."
    return f"Not finished for {', '.join(absent)}." if absent else ""


def joined(*parts: str) -> str:
    """Paragraphs and tables, without those that are empty."""
    return "\n\n".join(part for part in parts if part)
