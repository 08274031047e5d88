"""How the overhead of a stage scales with rows and nodes, with the echo engine on simulated nodes.

Each run is a whole interaction stage with conversations of two turns: requests, Ray Data, tasks,
shards, Parquet and text statistics. The nodes are processes of one machine
(`ray.cluster_utils.Cluster`) and share its cores, so more nodes are not faster here; the benchmark
looks for costs that grow faster than the work. Each node has one replica. Every size has a driver
process of its own.

Figures for each `<rows>_rows_<nodes>_nodes`: `driver_gb` (peak memory), `s_per_1000_rows`,
`driver_cpu_s_per_1000_rows` (cost of scheduling and writing), `files` (written while the stage
ran), and the numbers of `lost` and `doubled` ids, which must be 0.

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
import pyarrow.compute as pc
from harness import Figures, Machine, Run, Series, Settings

from opencharacter import pipeline
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution import schema
from opencharacter.runtime import cluster
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import SHARDS, Store

SIZES = [
    *((rows, 1) for rows in (1000, 12_000, 100_000)),
    *((rows, nodes) for rows in (10_000, 100_000) for nodes in (2, 4, 8)),
    (1_000_000, 4),
]
STAGE = "introspection/interaction"
SETTINGS: Settings = {"repeats": 1, "num_slots": 256, "object_store_mb": 200, "environment": {}}
TINY: Settings = {"num_slots": 16, "object_store_mb": 100}


def make_job(settings: Settings, rows: int, nodes: int, storage: Path) -> Job:
    """Return the stage's job, whose models are all echo engines."""
    role = {"model": "echo:", "name": "echo", "self_name": "Echo", "max_model_len": 4096}
    roles = ("teacher", "student", "judge", "prompt_generator")
    sizes = {"free": rows // 2, "leading": rows // 2, "turns": 2, "limits": {"min_texts": 10**9}}
    recipe = {
        "name": "scale",
        "roles": dict.fromkeys(roles, role),
        "introspection": {"interaction": sizes},
    }
    pool = {"replicas": nodes, "cpus": 0.1, "max_num_seqs": settings["num_slots"]}
    placement = {"pools": {"student": pool}, "training": {"cpus": 1}}
    jobs = pipeline.jobs(
        Recipe.model_validate(recipe),
        [schema.load("poeticism")],
        Placement.model_validate(placement),
        Store.at(str(storage)),
    )
    return next(job for job in jobs if job.stage.name == STAGE)


def run_size(rows: int, nodes: int, settings: Settings) -> Iterator[Run]:
    """Run the stage on a new cluster, once per repeat."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    memory = settings["object_store_mb"] * 10**6
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": memory}
    simulated = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes):
        simulated.add_node(num_cpus=1, object_store_memory=memory)
    os.environ["RAY_ADDRESS"] = simulated.address
    try:
        for _ in range(settings["repeats"]):
            with tempfile.TemporaryDirectory() as storage:
                job = make_job(settings, rows, nodes, Path(storage))
                cluster.connect(job.placement)
                yield {"series": f"{rows}_rows_{nodes}_nodes", **measure(job, rows)}
    finally:
        ray.shutdown()
        simulated.shutdown()


def measure(job: Job, rows: int) -> Run:
    """Run the stage once; return its costs, and the numbers of lost and doubled ids."""
    start_time, start_cpu = time.time(), time.process_time()
    job.stage.module.build(job)
    seconds, cpu_seconds = time.time() - start_time, time.process_time() - start_cpu
    peak = peak_of_this_process()
    ids = job.store.read_table(job.dataset, columns=["id"])["id"]
    distinct = pc.count_distinct(ids).as_py()
    return {
        "driver_gb": peak,
        "s_per_1000_rows": seconds / rows * 1000,
        "driver_cpu_s_per_1000_rows": cpu_seconds / rows * 1000,
        "files": len(list(Path(job.store.path(job.dataset, SHARDS)).glob("*.parquet"))),
        "lost": rows - distinct,
        "doubled": len(ids) - distinct,
    }


def peak_of_this_process() -> float:
    """Return the peak memory of this process in GB, without its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1e6


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Return the figures of every size."""
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
