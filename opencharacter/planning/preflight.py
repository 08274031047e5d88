"""Checks that refuse a run before anything starts: models, training settings, stages."""

from __future__ import annotations

from opencharacter import models, pipeline
from opencharacter.errors import UserError
from opencharacter.runtime.stage import Job


def require_models(selected: list[Job]) -> None:
    """Refuse a run whose local models are not there; hub models are downloaded when needed."""
    for job in selected:
        roles = [(name, getattr(job.recipe.roles, name)) for name in job.stage.roles]
        roles += [("judge", role) for role in getattr(job.config, "panel", ())]
        for name, role in roles:
            missing = models.missing_requirement(role)
            if missing and (role.endpoint or not models.is_hub(role.model)):
                raise UserError(f"role {name}: missing {missing}")


def check_training(selected: list[Job]) -> None:
    """Refuse more workers than a batch has rows, and ranks that no engine takes."""
    for job in selected:
        workers = job.placement.training.workers
        if hasattr(job.config, "optimizer") and workers > job.config.optimizer.global_batch_size:
            raise UserError(
                f"global_batch_size {job.config.optimizer.global_batch_size} is too small for "
                f"{workers} training workers: some would have nothing to do; use "
                "fewer workers or a larger batch"
            )
        if job.stage.name == "persona/merge":
            ranks = sum(parent.config.lora.rank for parent in job.parents)
            models.allowed_rank(job.config.rank or ranks)


def check_stages(selected: list[Job], rebuild: str | None) -> None:
    """Refuse what a stage itself knows that it will lack, and files that cannot be read."""
    for job in selected:
        if job.state()[0] != "done" or pipeline.replaced(job, rebuild):
            _ = job.fingerprint  # reads all that the result depends on
            getattr(job.stage.module, "check", lambda _: None)(job)
