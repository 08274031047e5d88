"""Run jobs without their parents.

python one_stage.py RECIPE CONSTITUTION STAGE[,STAGE] PLACEMENT [STORAGE]
"""

import sys
import time
from pathlib import Path

from opencharacter import pipeline
from opencharacter.config import files
from opencharacter.constitution import schema
from opencharacter.runtime import cluster
from opencharacter.runtime.store import Store


def main(recipe: str, persona: str, stages: str, placement: str, storage: str = "") -> None:
    made = files.load_recipe(recipe)
    where = files.load_placement(placement)
    store = Store.at(storage or f"runs/{made.name}", where.storage_retry_seconds)
    jobs = pipeline.jobs(made, [schema.load(persona)], where, store)
    cluster.connect(where)
    for stage in stages.split(","):
        job = next(j for j in jobs if j.stage.name == stage)
        began = time.monotonic()
        outcome = job.stage.module.build(job)
        seconds = time.monotonic() - began
        pipeline.finish(job, outcome, seconds)
        print(f"{outcome.rows / seconds:.0f} rows/s")
    print("peak MB:", peak())


def peak() -> float:
    """Of this process; what getrusage says begins with the peak of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (held,) = (line for line in lines if line.startswith("VmHWM"))
    return int(held.split()[1]) / 1000


if __name__ == "__main__":
    main(*sys.argv[1:])
