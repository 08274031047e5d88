"""The Ray that a command runs on: the one that submitted it, or one of its own."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray

from opencharacter.config.placement import AutoscalingGroup, Placement, Pool, Training
from opencharacter.config.recipe import Recipe, Role
from opencharacter.errors import UserError

GIB = 2**30
CARD = "accelerator_type:"


def connect(placement: Placement, recipe: Recipe | None = None) -> None:
    """Join the Ray cluster of `RAY_ADDRESS` (set inside a submitted job), else start one here.

    Args:
        placement: what is to run there.
        recipe: whose models; every role counts as one with weights where absent.

    Raises:
        UserError: if the cluster cannot hold the placement.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        own: dict[str, Any] = {} if address else local_options(placement)
        # "local", or Ray would join any that runs on this machine.
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own
        )
    check_fits(placement, nodes(placement), recipe)


def nodes(placement: Placement) -> list[dict[str, float]]:
    """What each node has, by Ray's names: of those there, and of those that a cluster may add."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return there + (coming(placement) if os.environ.get("RAY_ADDRESS") else [])


def max_gpus_per_node(placement: Placement) -> float:
    """The most GPUs of one node that has the card of training."""
    wanted = card(placement.training).keys()
    able = (node for node in nodes(placement) if wanted <= node.keys())
    return max((node.get("GPU", 0) for node in able), default=0)


def local_options(placement: Placement) -> dict[str, Any]:
    """How to start a Ray for one command: private to this machine, no dashboard."""
    return {
        "num_cpus": placement.ray_cpus or os.cpu_count(),
        "object_store_memory": int(placement.object_store_gib * GIB),
        "include_dashboard": False,
    }


class Ask(NamedTuple):
    """What a part of a placement asks of Ray: so many bundles, each of them on one node."""

    who: str
    copies: int
    each: dict[str, float]
    """By Ray's names: CPU, GPU, and memory in bytes."""


def asks(placement: Placement, recipe: Recipe | None = None) -> list[Ask]:
    """All that a placement asks for, one role at a time."""
    made = [
        Ask(name, pool.replicas, as_resources(pool.cpus, pool.gpus, pool.memory_gib) | card(pool))
        for name, pool in iter_pools(placement)
        if recipe is None or any(role.has_weights for role in models_of(recipe, name))
    ]
    training = placement.training
    each = as_resources(training.cpus, training.gpus, memory_gib=0) | card(training)
    return [*made, Ask("training", training.workers, each)]


def models_of(recipe: Recipe, name: str) -> list[Role]:
    """The models that use a role's pool."""
    panel = recipe.evaluation.judge.panel if name == "judge" else ()
    return [getattr(recipe.roles, name), *panel]


def as_resources(cpus: float, gpus: float, memory_gib: float) -> dict[str, float]:
    """Amounts by Ray's names."""
    return {"GPU": gpus, "CPU": cpus, "memory": memory_gib * GIB}


def card(of: Pool | Training | AutoscalingGroup, share: float = 0.001) -> dict[str, float]:
    """The kind of card by Ray's name: a node has 1, whoever wants it asks for a thousandth."""
    return {f"{CARD}{of.accelerator}": share} if of.accelerator else {}


def coming(placement: Placement) -> list[dict[str, float]]:
    """What each node has that the cluster may add."""
    return [
        as_resources(group.cpus, group.gpus, group.memory_gib) | card(group, share=1)
        for group in placement.autoscaling
        for _ in range(group.nodes)
    ]


def check_fits(
    placement: Placement, nodes: Sequence[Mapping[str, float]], recipe: Recipe | None = None
) -> None:
    """Refuse a placement that the cluster has no room for, role by role.

    Args:
        placement: what is asked for.
        nodes: what each node has, by Ray's names.
        recipe: as in `connect`.

    Raises:
        UserError: naming the role, what it asks for, and what is there.
    """
    for who, copies, each in asks(placement, recipe):
        room = sum(times(node, each) for node in nodes)
        if room >= copies:
            continue
        lacking = [kind for kind in each if each[kind] > max(n.get(kind, 0) for n in nodes)]
        if lacking:
            most = max(node.get(lacking[0], 0) for node in nodes)
            wanted = f"{amount(lacking[0], each[lacking[0]])} in one node"
            there = f"the largest has {amount(lacking[0], most).split()[0]}"
        else:
            bundle = ", ".join(amount(kind, n) for kind, n in each.items() if n)
            wanted = f"{copies} x ({bundle}), each in one node"
            there = f"the nodes of this Ray cluster have room for {room}"
        raise UserError(
            f"placement {placement.name!r}: {who} asks for {wanted}, {there}; choose another "
            "--placement, add nodes, or say in `grows` what the cluster may add"
        )


def times(node: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How often a bundle goes into a node."""
    return min(int(node.get(kind, 0) / n + 1e-6) for kind, n in each.items() if n)


def amount(kind: str, number: float) -> str:
    """A resource in words."""
    if kind.startswith(CARD):
        return f"{math.ceil(number)} {kind.removeprefix(CARD)}"
    return f"{number / GIB:.3g} GiB of memory" if kind == "memory" else f"{number:g} {kind}s"


def iter_pools(placement: Placement) -> list[tuple[str, Pool]]:
    """The pools by role."""
    return [(name, getattr(placement.pools, name)) for name in type(placement.pools).model_fields]
