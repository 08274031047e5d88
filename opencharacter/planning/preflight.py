"""Checks that refuse a run before it starts: models, training settings, and the stages' own."""

from __future__ import annotations

from typing import Any

from opencharacter import lora, models
from opencharacter.config.base import ECHO, EMBEDDED
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Role
from opencharacter.distillation.imported import source_of
from opencharacter.errors import UserError
from opencharacter.runtime.rebuild import is_rebuilt
from opencharacter.runtime.stage import Job
from opencharacter.text.templates import (
    check_continuation,
    check_template,
    check_thoughts,
    check_trainable,
    load_tokenizer,
)
from opencharacter.training import trackers
from opencharacter.training.architectures import check_student


def require_models(selected: list[Job]) -> None:
    """Raise UserError if a model that cannot be downloaded is missing, or an endpoint's key is."""
    for job in selected:
        for name, role in job_roles(job):
            missing = models.missing_requirement(role)
            if missing and (role.endpoint or not models.is_hub(role.model)):
                raise UserError(f"role {name}: missing {missing}")


def job_roles(job: Job) -> list[tuple[str, Role]]:
    """Return the names and models of the roles that a job uses."""
    names = (name for name in job.stage.roles if name != "teacher" or asks_teacher(job.recipe))
    roles = [(name, getattr(job.recipe.roles, name)) for name in names]
    return roles + [("judge", role) for role in getattr(job.config, "panel", ())]


def asks_teacher(recipe: Recipe) -> bool:
    """Whether the teacher generates: not if its answers exist already, unless it is the author."""
    return source_of(recipe.distillation) is None or recipe.introspection.author == "teacher"


def check_training(selected: list[Job]) -> None:
    """Raise UserError for a student that cannot be trained, or settings that cannot work.

    These are more workers than rows in a batch, a rank that no engine supports, and a tracker that
    is not installed.
    """
    for job in selected:
        if hasattr(job.config, "optimizer"):
            trackers.check(job.placement.tracking)
        if hasattr(job.config, "optimizer") or job.stage.name == "distillation/reference":
            check_student(job.recipe.roles.student, job.placement.training)
        workers = job.placement.training.workers
        if hasattr(job.config, "optimizer") and workers > job.config.optimizer.global_batch_size:
            raise UserError(
                f"global_batch_size {job.config.optimizer.global_batch_size} is too small for "
                f"{workers} training workers, because each needs at least one row; use fewer "
                "workers or a larger global_batch_size"
            )
        if job.stage.name == "persona/merge":
            ranks = sum(parent.config.lora.rank for parent in job.parents)
            lora.allowed_rank(job.config.rank or ranks)


def will_run(job: Job, rebuild: str | None) -> bool:
    """Whether a run makes the dataset of a selected job."""
    return job.state()[0] != "done" or is_rebuilt(job, rebuild)


def check_templates(selected: list[Job], rebuild: str | None) -> None:
    """Raise UserError if a role's chat template does not work for the stages that will run.

    A template is skipped if its tokenizer is neither on this machine nor can be downloaded.
    """
    prefilled: dict[tuple[str, Role], bool] = {}
    for job in selected:
        for key in job_roles(job) if will_run(job, rebuild) else ():
            prefilled[key] = prefilled.get(key, False) or getattr(job.config, "prefill", False)
    for (name, role), prefill in prefilled.items():
        if role.model.startswith((ECHO, EMBEDDED)):  # the embedded model's template is tested
            continue
        tokenizer = find_tokenizer(role)
        if tokenizer is None:
            continue
        try:
            check_template(tokenizer)
            if name == "student":
                check_trainable(tokenizer)
                if role.thinks:
                    check_thoughts(tokenizer)
            if role.endpoint and prefill:
                check_continuation(tokenizer)
        except UserError as error:
            raise UserError(f"role {name}: {error}") from None


def find_tokenizer(role: Role) -> Any:
    """Load a role's tokenizer, which is downloaded if need be; None if it is not available.

    An endpoint's model may have any name, so nothing is downloaded for it.
    """
    folder = models.local_weights(role.model, role.revision)
    if folder is None and models.is_hub(role.model) and not role.endpoint:
        folder = models.download_tokenizer(role.model, role.revision)
    try:
        return load_tokenizer(folder, role) if folder else None
    except (OSError, ValueError):  # loading the model reports the cause
        return None


def check_stages(selected: list[Job], rebuild: str | None) -> None:
    """Call `check(job)` of the stages that will run, and read the files that they depend on."""
    for job in selected:
        if will_run(job, rebuild):
            _ = job.fingerprint  # reads the files that are part of the identity
            getattr(job.stage.module, "check", lambda _: None)(job)
