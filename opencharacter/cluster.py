"""The Ray that a command runs on: the one that submitted it, or one of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import ray

from opencharacter.config import Placement
from opencharacter.errors import UserError

GIB = 2**30


def connect(placement: Placement) -> None:
    """Join the Ray cluster of `RAY_ADDRESS` (set inside a submitted job), else start one here.

    Raises:
        UserError: if the cluster cannot hold the placement.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        own: dict[str, Any] = {} if address else local_options(placement)
        # "local", or Ray would join any that runs on this machine.
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own
        )
    check_fits(placement, ray.cluster_resources())


def local_options(placement: Placement) -> dict[str, Any]:
    """How to start a Ray for one command: private to this machine, no dashboard."""
    return {
        "num_cpus": placement.ray_cpus or os.cpu_count(),
        "object_store_memory": int(placement.object_store_gib * GIB),
        "include_dashboard": False,
    }


def check_fits(placement: Placement, resources: Mapping[str, float]) -> None:
    """Refuse a placement that asks for more than the cluster has, role by role."""
    wanted = {
        name: (pool.replicas * pool.cpus, pool.replicas * pool.gpus)
        for name, pool in iter_pools(placement)
    }
    training = placement.training
    wanted["training"] = (training.workers * training.cpus, training.workers * training.gpus)
    for name, needs in wanted.items():
        for kind, amount in zip(("CPU", "GPU"), needs, strict=True):
            there = resources.get(kind, 0)
            if amount > there:
                raise UserError(
                    f"placement {placement.name!r}: {name} asks for {amount:g} {kind}s, this "
                    f"Ray cluster has {there:g}; choose another --placement or add nodes"
                )


def iter_pools(placement: Placement):
    """The pools by role."""
    return [(name, getattr(placement.pools, name)) for name in type(placement.pools).model_fields]
