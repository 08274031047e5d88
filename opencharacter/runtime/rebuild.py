"""Rebuilds: which datasets `--rebuild` replaces, and how an interrupted rebuild is resumed."""

from __future__ import annotations

from rich.markup import escape

from opencharacter.runtime.progress import console
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import REBUILDS, fingerprint


def derives_from(job: Job, stage_name: str) -> bool:
    """Whether a job belongs to a stage or depends on a job that does."""
    return job.stage.name == stage_name or any(derives_from(p, stage_name) for p in job.parents)


def is_rebuilt(job: Job, rebuild: str | None) -> bool:
    """Whether a run with `--rebuild` makes a job again even if it is done."""
    return rebuild is not None and derives_from(job, rebuild)


def begin_rebuild(selected: list[Job], rebuild: str) -> str:
    """Delete the datasets that a rebuild replaces, unless this rebuild has begun already.

    A marker in storage records that they have been deleted. The same command after an
    interruption finds it and resumes instead of starting over.

    Args:
        selected: jobs of the run.
        rebuild: name of the stage.

    Returns:
        Path of the marker, to be deleted when all replaced datasets are done.
    """
    store, replaced = selected[0].store, [job for job in selected if derives_from(job, rebuild)]
    marker = f"{REBUILDS}/{fingerprint({job.dataset: job.fingerprint for job in replaced})}"
    if store.exists(marker) and any(job.state()[0] != "done" for job in replaced):
        console.print(
            "resuming an unfinished rebuild; to start it over, delete "
            + escape(store.address(marker)),
            soft_wrap=True,
            highlight=False,
        )
        return marker
    for job in replaced:
        store.delete(job.dataset)
    datasets = [job.dataset for job in replaced]
    store.write_json(f"{marker}/rebuild.json", {"stage": rebuild, "replaces": datasets})
    return marker
