"""Stage evaluation/report: one HTML page about a student and its personas.

The page is collected: each stage that contributed to a persona provides its own scores and
sections by `scores(job)` and `report(job)`. This module adds what the manifests of all stages say.

Reads: the manifests and, through their stages, the datasets of the run. Writes: report.html; scores
(every number of the page as Parquet).
Run: opencharacter report RECIPE --constitution NAME
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pyarrow as pa

from opencharacter.constitution.schema import Constitution
from opencharacter.evaluation import paper
from opencharacter.evaluation.report.rendering import render
from opencharacter.evaluation.report.sections import (
    DataQuality,
    DatasetStatistics,
    Headline,
    PersonaReport,
    ReportData,
    Section,
    Settings,
    Stages,
    StageSummary,
    TextStatistic,
    arrange,
)
from opencharacter.evaluation.scores import SCORES, Score, score_row
from opencharacter.runtime.attempts import repeated_work
from opencharacter.runtime.stage import Estimate, Job, StageResult
from opencharacter.text import statistics
from opencharacter.training import trackers

PAGE, PROVISIONAL_PAGE = "report.html", "report-so-far.html"
"""The page, and that of an unfinished run, which is deleted when the run is finished."""


def lineage(job: Job, persona: Constitution) -> list[Job]:
    """All jobs that a persona's part of the page depends on, parents first, each once."""
    jobs: dict[str, Job] = {}
    for parent in job.parents:
        if parent.constitution in (None, persona):
            for ancestor in [*lineage(parent, persona), parent]:
                jobs.setdefault(ancestor.dataset, ancestor)
    return list(jobs.values())


def collect(jobs: list[Job], function: str) -> list[Any]:
    """Call a function of the jobs' stage modules, where they define it, and chain the results.

    Args:
        jobs: the jobs, which are passed to the function.
        function: `scores` or `report`.
    """
    functions = ((getattr(job.stage.module, function, None), job) for job in jobs)
    return [item for call, job in functions if call for item in call(job)]


def persona_report(
    job: Job, persona: Constitution, jobs: list[Job], unfinished: Sequence[Job] = ()
) -> PersonaReport:
    """Collect the sections about one persona.

    Args:
        job: the report's job.
        persona: the persona's constitution.
        jobs: the finished jobs of the persona's lineage.
        unfinished: the others, which show what they have so far.
    """
    collected = [*collect(jobs, "report"), *collect(list(unfinished), "provisional")]
    sections: list[Section] = [s for s in collected if s.persona in ("", persona.name)]
    sections += [
        DataQuality(datasets=data_quality(jobs), descriptions=statistics.DESCRIPTIONS),
        Stages(stages=list(map(stage_summary, jobs))),
        Settings(values=flatten(job.recipe.identity())),
    ]
    return PersonaReport(
        name=persona.name,
        description=persona.description,
        assertions=[trait.trait for trait in persona.traits],
        sections=arrange(sections),
    )


def manifest_of(job: Job) -> dict[str, Any]:
    """The manifest of a finished job."""
    manifest = job.store.manifest(job.dataset)
    assert manifest is not None, job.dataset
    return manifest


def stage_summary(job: Job) -> StageSummary:
    """Summarize the manifest of a finished job."""
    manifest = manifest_of(job)
    return StageSummary(
        dataset=job.dataset,
        rows=manifest["rows"],
        dropped=manifest["dropped"],
        seconds=manifest["seconds"],
        tokens_out=manifest["tokens_out"],
        redone=repeated_work(manifest["attempts"]),
    )


def data_quality(jobs: list[Job]) -> list[DatasetStatistics]:
    """The text statistics of the jobs that measured them."""
    return [measured for job in jobs if (measured := dataset_statistics(job))]


def dataset_statistics(job: Job) -> DatasetStatistics | None:
    """The text statistics of a finished job; None if it has none."""
    measured = dict(manifest_of(job)["figures"].get("text_statistics", {}))
    if not measured:
        return None
    texts, limits = int(measured.pop("texts")), statistics.allowed_ranges(job.config.limits)
    return DatasetStatistics(
        job.dataset,
        texts,
        [TextStatistic(name, value, *limits.get(name, ())[:2]) for name, value in measured.items()],
    )


def statistic_scores(persona: str, jobs: list[Job]) -> list[dict[str, Any]]:
    """Text statistics as rows of `SCORES`."""
    return [
        score_row(
            persona,
            f"text_statistic_{statistic.name}",
            None,
            measured.dataset,
            Score(statistic.value, None, None, measured.texts),
        )
        for measured in data_quality(jobs)
        for statistic in measured.statistics
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings by their dotted names; empty values are left out."""
    if not isinstance(value, dict):
        return {prefix: str(value)} if value not in (None, [], "") else {}
    return {
        name: text
        for key, item in value.items()
        for name, text in flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }


def estimate(job: Job) -> Estimate:
    return Estimate(0)


def build(job: Job) -> StageResult:
    personas, rows = [], []
    lineages = {persona.name: lineage(job, persona) for persona in job.constitutions}
    for persona in job.constitutions:
        jobs = lineages[persona.name]
        personas.append(persona_report(job, persona, jobs))
        rows += collect(jobs, "scores") + statistic_scores(persona.name, jobs)
    report = report_data(job, personas, list(chain.from_iterable(lineages.values())))
    job.store.write_bytes(f"{job.dataset}/{PAGE}", render(report).encode())
    job.store.delete(f"{job.dataset}/{PROVISIONAL_PAGE}")
    unique = {tuple(row.values()): row for row in rows}
    table = pa.Table.from_pylist(list(unique.values()), schema=SCORES)
    job.store.write_table(job.dataset, table, "scores")
    trackers.log_scores(job, table.to_pylist())
    compared = paper.compared_lines(job.recipe, table.to_pylist())
    figures = {"headlines": headlines(personas), "paper": compared}
    return StageResult(rows=len(table), figures=figures)


def report_data(job: Job, personas: list[PersonaReport], jobs: list[Job]) -> ReportData:
    """The page of some personas.

    Args:
        job: the report's job.
        personas: their sections.
        jobs: the finished jobs that the sections are about.
    """
    versions: dict[str, str] = {}
    for ancestor in jobs:
        versions |= manifest_of(ancestor)["versions"]
    return ReportData(
        student=job.recipe.roles.student.name,
        recipe=job.recipe.name,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        personas=personas,
        versions=versions,
        docs_url=job.config.docs_url or "",
    )


def write_provisional(job: Job, refresh_seconds: int = 0) -> str:
    """Write the page of an unfinished run: what is finished, and results so far.

    Args:
        job: the report's job.
        refresh_seconds: seconds after which a browser loads the page again; 0 for never.

    Returns:
        The page's path or URL.
    """
    personas: list[PersonaReport] = []
    jobs: dict[str, Job] = {}
    states: dict[str, bool] = {}
    for persona in job.constitutions:
        ancestors = {ancestor.dataset: ancestor for ancestor in lineage(job, persona)}
        for name, ancestor in ancestors.items():
            states.setdefault(name, ancestor.state()[0] == "done")
        done = [ancestor for name, ancestor in ancestors.items() if states[name]]
        unfinished = [ancestor for name, ancestor in ancestors.items() if not states[name]]
        personas.append(persona_report(job, persona, done, unfinished))
        jobs |= ancestors
    report = replace(
        report_data(job, personas, [jobs[name] for name, done in states.items() if done]),
        finished=sum(states[name] for name in jobs if jobs[name].is_enabled),
        unfinished=[name for name in jobs if jobs[name].is_enabled and not states[name]],
        refresh_seconds=refresh_seconds,
    )
    job.store.write_bytes(f"{job.dataset}/{PROVISIONAL_PAGE}", render(report).encode())
    return job.store.address(job.dataset, PROVISIONAL_PAGE)


def headlines(personas: list[PersonaReport]) -> dict[str, Any]:
    """The first headline score of each persona, for the manifest."""
    return {
        persona.name: vars(section.score)
        for persona in personas
        for section in reversed(persona.sections)
        if isinstance(section, Headline)
    }
