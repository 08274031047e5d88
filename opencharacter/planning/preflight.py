"""Checks that refuse a run before it starts: models, training settings, and the stages' own."""

from __future__ import annotations

from opencharacter import lora, models
from opencharacter.errors import UserError
from opencharacter.runtime.rebuild import is_rebuilt
from opencharacter.runtime.stage import Job


def require_models(selected: list[Job]) -> None:
    """Raise UserError if a model that cannot be downloaded is missing, or an endpoint's key is."""
    for job in selected:
        roles = [(name, getattr(job.recipe.roles, name)) for name in job.stage.roles]
        roles += [("judge", role) for role in getattr(job.config, "panel", ())]
        for name, role in roles:
            missing = models.missing_requirement(role)
            if missing and (role.endpoint or not models.is_hub(role.model)):
                raise UserError(f"role {name}: missing {missing}")


def check_training(selected: list[Job]) -> None:
    """Raise UserError for more workers than rows in a batch, or a rank that no engine supports."""
    for job in selected:
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


def check_stages(selected: list[Job], rebuild: str | None) -> None:
    """Call `check(job)` of the stages that will run, and read the files that they depend on."""
    for job in selected:
        if job.state()[0] != "done" or is_rebuilt(job, rebuild):
            _ = job.fingerprint  # reads the files that are part of the identity
            getattr(job.stage.module, "check", lambda _: None)(job)
