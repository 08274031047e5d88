"""Run one job without its parents: python one_stage.py RECIPE CONSTITUTION STAGE PLACEMENT."""

import sys
import time
from pathlib import Path

from opencharacter import cluster, config, constitution, pipeline
from opencharacter.store import Store


def main(recipe: str, persona: str, stage: str, placement: str) -> None:
    made = config.load_recipe(recipe)
    where = config.load_placement(placement)
    store = Store.at(f"runs/{made.name}")
    jobs = pipeline.jobs(made, [constitution.load(persona)], where, store)
    job = next(j for j in jobs if j.stage.name == stage)
    cluster.connect(where)
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
