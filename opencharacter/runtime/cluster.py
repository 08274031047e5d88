"""Connecting to Ray, and checking that a placement fits the cluster."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray

from opencharacter.config.placement import AutoscalingGroup, Placement, Pool, Training
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Role
from opencharacter.errors import UserError

GIB = 2**30
ACCELERATOR_PREFIX = "accelerator_type:"
LOCAL_ENVIRONMENT = {
    # Threads of torch that wait for each other sleep. By default they spin, which is many times
    # slower as soon as another process uses the cores, such as an engine beside training.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Nobody takes this machine away in an orderly way, so that Ray Train need not watch for it.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Environment of the processes of a Ray that a command starts."""
CPU_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(64 * GIB),
    "MALLOC_ARENA_MAX": "1",
}
"""The same without GPUs: glibc keeps freed memory for the next tensor. By default it returns large
blocks to the system, which then clears every page of the next tensor."""


LEAST_LOCAL_CPUS = 3
"""CPUs of a Ray that a command starts on a machine of fewer cores. An idle engine reserves a CPU
and uses none, so it need not be stopped for a training on two cores."""


def connect(placement: Placement, recipe: Recipe | None = None) -> None:
    """Join the Ray cluster at `RAY_ADDRESS` (set inside a submitted job), or start Ray here.

    Args:
        placement: what will run there.
        recipe: roles without weights of their own need no resources; if None, all roles have some.

    Raises:
        UserError: if Ray cannot be joined or started, or the placement does not fit the cluster.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        options: dict[str, Any] = {} if address else local_options(placement)
        if not address:
            for name, value in local_environment(placement).items():
                os.environ.setdefault(name, value)  # which the workers of this Ray inherit
        try:
            # Without "local", Ray would join any cluster that runs on this machine.
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
        except Exception as error:  # Ray raises bare ones, such as when its start takes too long
            raise UserError(start_problem(address, error)) from error
    check_fits(placement, node_resources(placement), recipe)


def start_problem(address: str | None, error: Exception) -> str:
    """Return in one line why Ray cannot be joined or started, and what to do.

    Args:
        address: the cluster's; None if Ray was to start here.
        error: what `ray.init` raised.
    """
    reason = " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
    if address:
        return (
            f"cannot join the Ray cluster at {address} ({reason}); check RAY_ADDRESS and, with "
            "`ray status`, that the cluster runs"
        )
    return (
        f"Ray did not start on this machine ({reason}); try again when the machine is less busy, "
        "and check that memory and space in the temporary folder are free. Ray's logs are in "
        f"{ray_logs()}"
    )


def ray_logs() -> str:
    """Return the folder of the logs of the last Ray that started on this machine."""
    return f"{os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs"


def node_resources(placement: Placement) -> list[dict[str, float]]:
    """Return the resources of each node by Ray's names, including nodes that may be added."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return alive + (autoscaled_nodes(placement) if os.environ.get("RAY_ADDRESS") else [])


def max_gpus_per_node(placement: Placement) -> float:
    """Return the most GPUs of any node that has the training accelerator."""
    accelerator = accelerator_resource(placement.training).keys()
    nodes = (node for node in node_resources(placement) if accelerator <= node.keys())
    return max((node.get("GPU", 0) for node in nodes), default=0)


def local_options(placement: Placement) -> dict[str, Any]:
    """Return the arguments of `ray.init` that start a Ray for one command, without a dashboard."""
    return {
        "num_cpus": local_cpus(placement),
        "object_store_memory": int(placement.object_store_gib * GIB),
        "include_dashboard": False,
    }


def local_environment(placement: Placement) -> dict[str, str]:
    """Return the environment of the processes of a Ray that is started for one command."""
    gpus = any(pool.gpus for _, pool in iter_pools(placement)) or placement.training.gpus
    return LOCAL_ENVIRONMENT if gpus else LOCAL_ENVIRONMENT | CPU_ENVIRONMENT


def local_cpus(placement: Placement) -> int:
    """Return the CPUs of a Ray that is started for one command."""
    return placement.ray_cpus or max(os.cpu_count() or 1, LEAST_LOCAL_CPUS)


class BundleRequest(NamedTuple):
    """Equal bundles of resources that a part of a placement requests.

    Args:
        owner: a role, or `training`.
        bundles: number of bundles.
        bundle: resources by Ray's names (CPU, GPU, memory in bytes), all on one node.
    """

    owner: str
    bundles: int
    bundle: dict[str, float]


def bundle_requests(placement: Placement, recipe: Recipe | None = None) -> list[BundleRequest]:
    """Return what a placement requests from Ray for each role and for training."""
    engines = [
        BundleRequest(
            name,
            pool.replicas,
            ray_resources(pool.cpus, pool.gpus, pool.memory_gib) | accelerator_resource(pool),
        )
        for name, pool in iter_pools(placement)
        if recipe is None or any(role.has_weights for role in models_of(recipe, name))
    ]
    training = placement.training
    bundle = ray_resources(training.cpus, training.gpus, memory_gib=0)
    bundle |= accelerator_resource(training)
    return [*engines, BundleRequest("training", training.workers, bundle)]


def models_of(recipe: Recipe, name: str) -> list[Role]:
    """Return the models that use a role's pool."""
    panel = recipe.evaluation.judge.panel if name == "judge" else ()
    return [getattr(recipe.roles, name), *panel]


def ray_resources(cpus: float, gpus: float, memory_gib: float) -> dict[str, float]:
    """Return amounts by Ray's names."""
    return {"GPU": gpus, "CPU": cpus, "memory": memory_gib * GIB}


def accelerator_resource(
    settings: Pool | Training | AutoscalingGroup, amount: float = 0.001
) -> dict[str, float]:
    """Return the resource that stands for a type of GPU, if one is required.

    A node has 1 of it, and each request takes a thousandth, as with Ray's `accelerator_type`.
    """
    return {f"{ACCELERATOR_PREFIX}{settings.accelerator}": amount} if settings.accelerator else {}


def autoscaled_nodes(placement: Placement) -> list[dict[str, float]]:
    """Return the resources of each node that the cluster may add."""
    return [
        ray_resources(group.cpus, group.gpus, group.memory_gib)
        | accelerator_resource(group, amount=1)
        for group in placement.autoscaling
        for _ in range(group.nodes)
    ]


def check_fits(
    placement: Placement, nodes: Sequence[Mapping[str, float]], recipe: Recipe | None = None
) -> None:
    """Refuse a placement whose roles do not fit the cluster, each taken by itself.

    Args:
        placement: what is requested.
        nodes: resources of each node by Ray's names.
        recipe: as in `connect`.

    Raises:
        UserError: naming the role, what it requests, and what is available.
    """
    for owner, bundles, bundle in bundle_requests(placement, recipe):
        capacity = sum(bundles_per_node(node, bundle) for node in nodes)
        if capacity >= bundles:
            continue
        lacking = [kind for kind in bundle if bundle[kind] > max(n.get(kind, 0) for n in nodes)]
        if lacking:
            most = max(node.get(lacking[0], 0) for node in nodes)
            requested = f"{format_amount(lacking[0], bundle[lacking[0]])} in one node"
            available = f"the largest node has {format_amount(lacking[0], most).split()[0]}"
        else:
            amounts = ", ".join(format_amount(kind, n) for kind, n in bundle.items() if n)
            requested = f"{bundles} x ({amounts}), each in one node"
            available = f"the nodes of this Ray cluster have room for {capacity}"
        raise UserError(
            f"placement {placement.name!r}: {owner} requests {requested}, {available}; choose "
            "another --placement, add nodes, or list under `autoscaling` what the cluster may add"
        )


def bundles_per_node(node: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Return how many bundles fit on a node."""
    return min(int(node.get(kind, 0) / n + 1e-6) for kind, n in bundle.items() if n)


def format_amount(kind: str, amount: float) -> str:
    """Format an amount of a resource, such as `4 GPUs`."""
    if kind.startswith(ACCELERATOR_PREFIX):
        return f"{math.ceil(amount)} {kind.removeprefix(ACCELERATOR_PREFIX)}"
    return f"{amount / GIB:.3g} GiB of memory" if kind == "memory" else f"{amount:g} {kind}s"


def iter_pools(placement: Placement) -> list[tuple[str, Pool]]:
    """Return the pools with the names of their roles."""
    return [(name, getattr(placement.pools, name)) for name in type(placement.pools).model_fields]
