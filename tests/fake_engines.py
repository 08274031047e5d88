"""Run stages with engines without a model, whose replies name their weights, and disturb a swap.

Run: python fake_engines.py DISTURBANCE RECIPE CONSTITUTION STAGE[,STAGE] PLACEMENT

DISTURBANCE is what is lost in the middle of the first swap: the process of an `engine`, the `actor`
of an engine, or the `node` of an actor. With `nothing`, nothing is lost. With `session`, nothing is
lost either, but Ray is shut down at the end, and the same stages are run in a new one, with the
storage `again`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import one_stage
import psutil
import ray

from opencharacter.engines import generate, replicas
from opencharacter.engines.spec import EngineSpec, Reply

SWAPS = Path.cwd() / "swaps"
"""Folder with a file for each engine that has half of its new weights."""
LAYERS, SECONDS_PER_LAYER = 4, 0.5


class FakeEngine:
    """Has the interface of `VllmEngine`; gets new weights one layer after another."""

    def __init__(self, spec: EngineSpec):
        self.engine = self
        self.core = subprocess.Popen(["sleep", "90"])
        self.layers = [weights_name(spec)] * LAYERS

    @property
    def errored(self) -> bool:
        """Whether its process has died."""
        return self.core.poll() is not None

    async def swap(self, spec: EngineSpec) -> None:
        for layer in range(LAYERS):
            if layer == LAYERS // 2:
                (SWAPS / f"{os.getpid()}-{self.core.pid}").touch()
            await asyncio.sleep(SECONDS_PER_LAYER)
            self.check()
            self.layers[layer] = weights_name(spec)

    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        self.check()
        weights = " and ".join(sorted(set(self.layers)))
        return Reply(f"The answer {seed} of the weights {weights}.", "stop", 1, 1, 0)

    def check(self) -> None:
        if self.errored:
            raise RuntimeError("the process of the engine has died")

    def close(self) -> None:
        self.core.kill()
        self.core.wait()


async def start_engine(spec: EngineSpec) -> FakeEngine:
    """Replaces the function that starts vLLM."""
    return FakeEngine(spec)


def weights_name(spec: EngineSpec) -> str:
    return "full" if spec.weights else "base"


def disturb(disturbance: str, cluster) -> None:
    """Wait for the middle of the first swap, and end a process or a node."""
    while not (files := list(SWAPS.iterdir())):
        time.sleep(0.02)
    actor, core = map(int, files[0].name.split("-"))
    if disturbance == "engine":
        os.kill(core, signal.SIGKILL)
    elif disturbance == "actor":
        os.kill(actor, signal.SIGKILL)
    else:
        ancestors = {parent.pid for parent in psutil.Process(actor).parents()}
        (node,) = (n for n in cluster.worker_nodes if raylet(n) in ancestors)
        cluster.remove_node(node, allow_graceful=False)


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def start_cluster():
    """Start two nodes, and a head without CPUs, on which the driver runs."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    return cluster


def main(disturbance: str, *arguments: str) -> None:
    SWAPS.mkdir()
    # Ray sends the class of the actor to its processes by value, with the names that it refers to.
    replicas.start_engine = start_engine  # type: ignore
    generate.fit_together = lambda *_: False  # so that weights are swapped although both would fit
    cluster = start_cluster() if disturbance == "node" else None
    if disturbance in ("engine", "actor", "node"):
        threading.Thread(target=disturb, args=(disturbance, cluster), daemon=True).start()
    one_stage.main(*arguments)
    ray.shutdown()
    if disturbance == "session":
        one_stage.main(*arguments, storage="again")
    if cluster:
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
