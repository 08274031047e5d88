"""Which engine starts before a job needs it. Used by the run and by `plan`'s simulation alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_

from opencharacter.config.placement import Resources, fits
from opencharacter.engines.spec import EngineSpec
from opencharacter.runtime.schedule import requests_of, worker_resources
from opencharacter.runtime.stage import Job, ResourceRequest


def engine_to_start(
    waiting: Sequence[Job],
    running: Sequence[Job],
    engines: Mapping[str, ResourceRequest],
    available: Resources,
) -> EngineSpec | None:
    """Choose an engine that waiting jobs need and that can start before they can, or None.

    It has to fit beside all running engines and the largest training to come. If the adapter of an
    engine is not trained yet, another engine of its model is started, as a spare whose weights are
    replaced later. There is one spare of a kind at a time.

    Args:
        waiting: jobs that have not started, in the order of the pipeline's table.
        running: jobs that run.
        engines: all running engines by key, idle and starting ones included.
        available: resources of the cluster.
    """
    unfinished = [*waiting, *running]
    wanted = requests_of(waiting)
    needed = {request.key() for request in [*wanted, *requests_of(running)]}
    spares = {engine.swap_group for key, engine in engines.items() if key not in needed} - {""}
    training_now = worker_resources(running)
    training_later = reduce(or_, worker_resources(waiting), Resources())
    held = [engine.resources for engine in engines.values()] + training_now + [training_later]
    for request in wanted:
        # An application has all adapters, and deploys itself for the first job that needs it.
        if type(request) is not EngineSpec or not request.has_weights:
            continue
        if request.key() in engines or request.swap_group in spares:
            continue
        if request.sleeps and training_now:
            continue  # it would take the memory that sleeping engines leave to the training
        spec = request if is_trained(request, unfinished) else replace(request, adapter=None)
        if spec is not request and (not spec.swap_group or spec.swap_group != request.swap_group):
            continue  # an engine that cannot get the adapter later: steering vectors, for instance
        if fits([*held, spec.resources], available):
            return spec
    return None


def is_trained(spec: EngineSpec, unfinished: Iterable[Job]) -> bool:
    """Whether no unfinished job makes the adapter of an engine."""
    return spec.adapter is None or not any(job.adapter == spec.adapter for job in unfinished)
