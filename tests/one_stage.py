"""Run stages without their parents.

Run: python one_stage.py RECIPE CONSTITUTION STAGE[,STAGE] PLACEMENT [STORAGE]
A stage that runs in several scopes is named as STAGE@SCOPE; otherwise its first one is run.
"""

import sys
import time
from pathlib import Path

from opencharacter import pipeline
from opencharacter.config import files
from opencharacter.constitution import schema
from opencharacter.runtime import cluster
from opencharacter.runtime.store import Store


def main(
    recipe_name: str, persona: str, stages: str, placement_name: str, storage: str = ""
) -> None:
    recipe = files.load_recipe(recipe_name)
    placement = files.load_placement(placement_name)
    store = Store.at(storage or f"runs/{recipe.name}", placement.storage_retry_seconds)
    jobs = pipeline.jobs(recipe, [schema.load(persona)], placement, store)
    cluster.connect(placement)
    for stage in stages.split(","):
        name, _, scope = stage.partition("@")
        job = next(j for j in jobs if j.stage.name == name and scope in ("", j.stage.scope))
        start_time = time.monotonic()
        result = job.stage.module.build(job)
        seconds = time.monotonic() - start_time
        pipeline.finish(job, result, seconds)
        print(f"{result.rows / seconds:.0f} rows/s")
    print("peak MB:", peak_memory())


def peak_memory() -> float:
    """Peak memory of this process in MB.

    `getrusage` would include the peak of the process that forked this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1000


if __name__ == "__main__":
    main(*sys.argv[1:])
