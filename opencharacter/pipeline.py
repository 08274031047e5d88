"""The method on one screen: all stages in order, and the loop that runs them.

Read `STAGES` first. Each line names a stage (`group/module`, its module in this package), the scope
of its datasets, the stages whose datasets it reads, and the roles whose models decide its result.
`runtime/stage.py` describes what a stage's module provides.

A dataset belongs to a constitution (shared by all students), a student (shared by all personas) or
a persona (one student with one constitution). A changed recipe field makes the datasets of the
stages that read it stale, and those of every stage that follows. Everything else is kept.
"""

from __future__ import annotations

import importlib
import queue
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from rich.markup import escape

from opencharacter.config.placement import Placement, Resources
from opencharacter.config.recipe import Recipe
from opencharacter.constitution.schema import Constitution
from opencharacter.engines.allocation import (
    capacity,
    delete_applications,
    may_start_early,
    resource_usage,
    running_engines,
    start_early,
    stop_unused_engines,
)
from opencharacter.engines.early import engine_to_start
from opencharacter.errors import OpenCharacterError, StaleError, UserError, one_line_message
from opencharacter.evaluation.conditions import TRAINED
from opencharacter.runtime import manifests
from opencharacter.runtime.progress import console
from opencharacter.runtime.rebuild import begin_rebuild, is_rebuilt
from opencharacter.runtime.schedule import choose, ready, requests_of, worker_resources
from opencharacter.runtime.stage import Job, Stage, StageResult
from opencharacter.runtime.staleness import explain_stale
from opencharacter.runtime.store import Store


def with_report(*stages: Stage) -> tuple[Stage, ...]:
    """The stages, followed by evaluation/report, which reads all stages of the evaluation."""
    names = dict.fromkeys(stage.name for stage in stages if stage.name.startswith("evaluation/"))
    return (*stages, Stage("evaluation/report", "student", tuple(names), disposable=True))


STAGES = with_report(
    Stage("distillation/prompts", "constitution", roles=("prompt_generator",)),
    Stage("distillation/teacher", "constitution", ("distillation/prompts",), ("teacher",)),
    Stage("distillation/student", "student", (), ("student",)),
    Stage("distillation/student", "persona", ("distillation/prompts",), ("student",)),
    Stage(
        "distillation/pairs",
        "persona",
        ("distillation/teacher", "distillation/student"),
        ("teacher", "student"),
    ),
    Stage("distillation/reference", "persona", ("distillation/pairs",), ("student",)),
    Stage("distillation/dpo", "persona", ("distillation/reference",), ("student",)),
    Stage("introspection/reflection", "persona", ("distillation/dpo",), ("student",)),
    Stage("introspection/interaction", "persona", ("distillation/dpo",), ("student",)),
    Stage(
        "introspection/transcripts",
        "persona",
        ("introspection/reflection", "introspection/interaction"),
        ("teacher", "student"),
    ),
    Stage(
        "introspection/sft",
        "persona",
        ("introspection/transcripts", "distillation/dpo"),
        ("student",),
    ),
    Stage("persona/merge", "persona", ("distillation/dpo", "introspection/sft"), ("student",)),
    Stage("persona/blend", "persona", ("persona/merge",), ("student",)),
    Stage("persona/tune", "persona", ("persona/merge", "distillation/student"), ("student",)),
    Stage("evaluation/steering", "persona", ("distillation/pairs",), ("student",)),
    Stage("evaluation/answers", "student", (), ("student",)),
    Stage("evaluation/attacks", "student", ("evaluation/answers",), ("student",)),
    Stage("evaluation/judge", "student", (), ("judge",)),
    Stage("evaluation/preferences", "student", ("evaluation/judge",), ("student", "judge")),
    Stage(
        "evaluation/answers",
        "persona",
        ("distillation/prompts", *TRAINED, "evaluation/answers"),
        ("student",),
    ),
    Stage(
        "evaluation/preferences",
        "persona",
        ("distillation/prompts", *TRAINED, "evaluation/judge"),
        ("student", "judge"),
    ),
    Stage("evaluation/rating", "persona", ("evaluation/preferences",)),
    Stage(
        "evaluation/attacks",
        "persona",
        ("distillation/prompts", *TRAINED, "evaluation/answers"),
        ("student",),
    ),
    Stage(
        "evaluation/robustness",
        "student",
        ("evaluation/answers", "evaluation/attacks"),
        disposable=True,
    ),
    Stage(
        "evaluation/coherence", "persona", ("evaluation/answers", "evaluation/judge"), ("judge",)
    ),
    Stage("evaluation/scenarios", "constitution", ("distillation/prompts",), ("prompt_generator",)),
    Stage(
        "evaluation/adherence",
        "persona",
        ("evaluation/scenarios", *TRAINED, "evaluation/judge"),
        ("student", "judge"),
    ),
    Stage(
        "evaluation/drift",
        "persona",
        ("distillation/prompts", *TRAINED, "evaluation/answers", "evaluation/judge"),
        ("student", "judge"),
    ),
    Stage(
        "evaluation/side_effects",
        "persona",
        (*TRAINED, "evaluation/judge"),
        ("student", "judge"),
    ),
    Stage("evaluation/direction", "persona", ("distillation/pairs",), ("student",)),
    Stage(
        "evaluation/projection",
        "persona",
        ("evaluation/direction", "evaluation/answers", "introspection/transcripts"),
        ("student",),
    ),
    Stage("evaluation/capabilities", "student", (), ("student",)),
    Stage(
        "evaluation/capabilities",
        "persona",
        ("persona/merge", "evaluation/capabilities"),
        ("student",),
    ),
)

NAMES = tuple(dict.fromkeys(stage.name for stage in STAGES))


def jobs(
    recipe: Recipe, constitutions: list[Constitution], placement: Placement, store: Store
) -> list[Job]:
    """List all jobs of a run in the order of `STAGES`. Reads nothing from storage.

    Raises:
        UserError: if a constitution has the student's name.
    """
    student = recipe.roles.student.name
    if any(c.name == student for c in constitutions):
        raise UserError(f"constitution {student!r} has the student's name; rename one of them")
    all_jobs: list[Job] = []
    for stage in STAGES:
        for owner in [None] if stage.scope == "student" else constitutions:
            parents = tuple(job for job in all_jobs if is_parent(job, stage, owner))
            all_jobs.append(
                Job(stage, recipe, placement, store, owner, tuple(constitutions), parents)
            )
    return all_jobs


def is_parent(job: Job, stage: Stage, owner: Constitution | None) -> bool:
    """Whether `stage` reads a job's dataset; without an owner it reads those of all personas."""
    return job.stage.name in stage.reads and (
        owner is None or job.constitution is None or job.constitution == owner
    )


def check_stage_name(name: str | None) -> None:
    """Raise UserError for a stage that does not exist."""
    if name and name not in NAMES:
        raise UserError(f"stage {name!r} is unknown; stages: {', '.join(NAMES)}")


def select(all_jobs: list[Job], only: str | None = None, until: str | None = None) -> list[Job]:
    """Select the jobs of one stage (`only`), or of all stages up to one (`until`).

    Raises:
        UserError: for an unknown stage.
    """
    check_stage_name(only)
    check_stage_name(until)
    up_to = NAMES[: NAMES.index(until) + 1] if until else NAMES
    return [job for job in all_jobs if job.stage.name in ((only,) if only else up_to)]


def check(selected: list[Job], rebuild: str | None) -> None:
    """Refuse a run that would replace data without being asked to, or that lacks its inputs.

    Raises:
        StaleError: if a dataset is stale; says what has changed since it was made.
        UserError: if a stage is unknown, if a parent is neither done nor selected, or if a rebuild
            would leave datasets that were made from what it replaces.
    """
    check_stage_name(rebuild)
    datasets = {job.dataset for job in selected}
    for job in selected:
        state, differences = job.state()
        if state == "stale" and not (job.stage.disposable or is_rebuilt(job, rebuild)):
            raise StaleError(
                f"{job.dataset} was {explain_stale(differences)}; restore what it was made from, "
                f"use another --storage, or replace it with --rebuild {job.stage.name}"
            )
        for parent in job.parents if state != "done" or is_rebuilt(job, rebuild) else ():
            if parent.dataset not in datasets and parent.state()[0] != "done":
                raise UserError(
                    f"{job.dataset} needs {parent.dataset}, which is {parent.state()[0]}; run it "
                    f"first, with --until {parent.stage.name}"
                )
    if rebuild:
        check_rebuild(selected, rebuild)


def check_rebuild(selected: list[Job], rebuild: str) -> None:
    """Refuse a rebuild of selected stages that leaves datasets made from what it replaces.

    They would still count as done: a fingerprint hashes what a dataset is made from by its settings
    and not by its content.

    Raises:
        UserError: naming the first such dataset.
    """
    replaced = {job.dataset for job in selected if is_rebuilt(job, rebuild)}
    run_jobs = selected and jobs(
        selected[0].recipe,
        list(selected[0].constitutions),
        selected[0].placement,
        selected[0].store,
    )
    for job in run_jobs if replaced else ():
        if not is_rebuilt(job, rebuild) or job.dataset in replaced or not job.is_enabled:
            continue
        if job.state()[0] in ("done", "partial"):
            raise UserError(
                f"--rebuild {rebuild} would leave {job.dataset}, which was made from what it "
                "replaces; leave out --only and --until, so that it is made again"
            )


def run(selected: list[Job], rebuild: str | None = None) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run all selected jobs that are not done, concurrently where resources allow it.

    When a job fails, its error is printed and the jobs that do not depend on it continue. The last
    error is raised at the end.

    Args:
        selected: jobs in the order of `STAGES`.
        rebuild: name of a stage whose datasets are made again, with all that depend on them.

    Yields:
        Each job that ran, with its manifest, when it ends. Jobs that the recipe does not use are
        left out.
    """
    check(selected, rebuild)
    marker = begin_rebuild(selected, rebuild) if rebuild else None
    waiting = [job for job in selected if job.state()[0] != "done"]
    running: list[Job] = []
    errors: list[Exception] = []
    results: queue.SimpleQueue[tuple[Job, dict[str, Any] | Exception]] = queue.SimpleQueue()
    if any(request.resources != Resources() for request in requests_of(waiting)):
        trains = bool(worker_resources(waiting))
        threading.Thread(target=import_ahead, args=(trains,), daemon=True).start()
    try:
        while waiting or running:
            while job := next_job(waiting, running):
                waiting.remove(job)
                running.append(job)
                threading.Thread(target=build_in_thread, args=(job, results), daemon=True).start()
            start_engines_early(waiting, running)
            job, result = results.get()
            running.remove(job)
            if isinstance(result, Exception):
                errors.append(result)
                waiting = [other for other in waiting if not depends_on(other, job)]
                if waiting or running:
                    print_failure(job, result)
            elif job.is_enabled:
                yield job, result
    finally:
        delete_applications()
    if errors:
        raise errors[-1]
    if marker:
        selected[0].store.delete(marker)


def import_ahead(trains: bool) -> None:
    """Import what jobs on the driver need and what takes seconds, while the first engine starts.

    Args:
        trains: whether an adapter will be trained.
    """
    _ = importlib.import_module("transformers").AutoTokenizer  # transformers imports it lazily
    if trains:
        importlib.import_module("opencharacter.training.trainer")


def next_job(waiting: list[Job], running: list[Job]) -> Job | None:
    """Stop engines that no remaining job needs; return the job to start now, or None."""
    unfinished = [*waiting, *running]
    if not unfinished:
        return None
    stop_unused_engines(requests_of(unfinished))
    startable = ready(waiting, running)
    if unused := next((job for job in startable if not job.is_enabled), None):
        return unused  # writes its manifest and nothing else
    available = capacity(unfinished[0].placement.autoscaling_resources)
    return choose(startable, running, running_engines(), available)


def start_engines_early(waiting: list[Job], running: list[Job]) -> None:
    """Start engines that waiting jobs will need and that fit beside everything until then."""
    available = capacity(Resources())
    while may_start_early() and (
        spec := engine_to_start(waiting, running, running_engines(), available)
    ):
        start_early(spec)


def depends_on(job: Job, other: Job) -> bool:
    """Whether a job depends on another, directly or not."""
    return any(parent == other or depends_on(parent, other) for parent in job.parents)


def build_in_thread(
    job: Job, results: queue.SimpleQueue[tuple[Job, dict[str, Any] | Exception]]
) -> None:
    """Build a job and put its manifest, or the error that it raised, into the queue."""
    try:
        results.put((job, build(job)))
    except Exception as error:  # `run` raises it when the other jobs have ended
        results.put((job, error))


def build(job: Job) -> dict[str, Any]:
    """Make a job's dataset and return its manifest."""
    if job.state()[0] == "stale":  # disposable or rebuilt; otherwise check() has refused it
        job.store.delete(job.dataset)
    start_time = time.monotonic()
    result: StageResult = job.stage.module.build(job)
    return finish(job, result, time.monotonic() - start_time)


def finish(job: Job, result: StageResult, seconds: float) -> dict[str, Any]:
    """Write the manifest, which marks the dataset as finished, and return it."""
    return manifests.finish(job, result, seconds, resource_usage(job.dataset))


def print_failure(job: Job, error: Exception) -> None:
    """Print why a job failed: one line for an error of this package, else the traceback."""
    if isinstance(error, OpenCharacterError):
        reason = one_line_message(error)
    else:
        reason = "".join(traceback.format_exception(error)).rstrip()
    console.print(
        f"[red]failed[/] {job.dataset}; jobs that do not depend on it continue: {escape(reason)}",
        soft_wrap=True,
        highlight=False,
    )
