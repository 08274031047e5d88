"""What grows with the rows and the nodes: a stage on the echo engine over simulated nodes.

Self-conversations of two turns through the whole stage: requests, Ray Data, tasks, parts, Parquet,
signatures. The nodes are processes of one machine (`ray.cluster_utils.Cluster`) and share its
cores, so more nodes are no faster here: what is looked for is what grows faster than the work. A
node has one replica. The driver is a process of its own for every size.

Figures, for each `<rows>_rows_<nodes>_nodes`: `driver_gb` (peak), `s_per_1000_rows`,
`driver_cpu_s_per_1000_rows` (what the scheduler and the writer cost), `files` (written while the
stage ran), `lost` and `doubled` ids, which must be 0.

Run: python benchmarks/scale.py --out benchmarks/results
     python benchmarks/scale.py --out /tmp/results --tiny
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import harness
import numpy as np
from harness import Figures, Machine, Run, Series, Settings

from opencharacter import pipeline
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution import schema
from opencharacter.runtime import cluster
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import SHARDS, Store, digests

SIZES = [
    *((rows, 1) for rows in (1000, 12_000, 100_000)),
    *((rows, nodes) for rows in (10_000, 100_000) for nodes in (2, 4, 8)),
    (1_000_000, 4),
]
STAGE = "introspection/interaction"
SETTINGS: Settings = {"repeats": 1, "seats": 256, "object_store_mb": 200, "environment": {}}
TINY: Settings = {"seats": 16, "object_store_mb": 100}


def make_job(settings: Settings, rows: int, nodes: int, storage: Path) -> Job:
    """The stage's job, its models echoes."""
    role = {"model": "echo:", "name": "echo", "self_name": "Echo", "max_model_len": 4096}
    roles = ("teacher", "student", "judge", "prompt_generator")
    sizes = {"free": rows // 2, "leading": rows // 2, "turns": 2, "limits": {"after": 10**9}}
    recipe = {
        "name": "scale",
        "roles": dict.fromkeys(roles, role),
        "introspection": {"interaction": sizes},
    }
    pool = {"replicas": nodes, "cpus": 0.1, "max_num_seqs": settings["seats"]}
    placement = {"pools": {"student": pool}, "training": {"cpus": 1}}
    found = pipeline.jobs(
        Recipe.model_validate(recipe),
        [schema.load("poeticism")],
        Placement.model_validate(placement),
        Store.at(str(storage)),
    )
    return next(job for job in found if job.stage.name == STAGE)


def run_size(rows: int, nodes: int, settings: Settings) -> Iterator[Run]:
    """One stage over a cluster of its own."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    memory = settings["object_store_mb"] * 10**6
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": memory}
    made = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes):
        made.add_node(num_cpus=1, object_store_memory=memory)
    os.environ["RAY_ADDRESS"] = made.address
    try:
        for _ in range(settings["repeats"]):
            with tempfile.TemporaryDirectory() as storage:
                job = make_job(settings, rows, nodes, Path(storage))
                cluster.connect(job.placement)
                yield {"series": f"{rows}_rows_{nodes}_nodes", **measure(job, rows)}
    finally:
        ray.shutdown()
        made.shutdown()


def measure(job: Job, rows: int) -> Run:
    """Run the stage; what it took, and whether every id is there once."""
    began, cpu = time.time(), time.process_time()
    job.stage.module.build(job)
    took, worked = time.time() - began, time.process_time() - cpu
    peak = peak_of_this_process()
    ids = digests(job.store.read_table(job.dataset, columns=["id"])["id"])
    there = len(np.unique(ids))
    return {
        "driver_gb": peak,
        "s_per_1000_rows": took / rows * 1000,
        "driver_cpu_s_per_1000_rows": worked / rows * 1000,
        "files": len(list(Path(job.store.path(job.dataset, SHARDS)).glob("*.parquet"))),
        "lost": rows - there,
        "doubled": len(ids) - there,
    }


def peak_of_this_process() -> float:
    """Peak memory of this process alone, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (held,) = (line for line in lines if line.startswith("VmHWM"))
    return int(held.split()[1]) / 1e6


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Of each size."""
    return {
        f"{name}_{kind}": harness.figure([run[kind] for run in runs])
        for name, runs in sorted(series.items())
        for kind in runs[0]
        if kind != "series"
    }


BENCHMARK = harness.Benchmark(
    name="scale",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={f"{n}_rows_{m}_nodes": partial(run_size, n, m) for n, m in [*SIZES, (200, 2)]},
    figures=figures,
    extra=("200_rows_2_nodes",),
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
