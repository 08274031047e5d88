"""The benchmark of the whole method sums the manifests of a run."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MANIFEST = {
    "scope": "echo",
    "stage": "evaluation/answers",
    "seconds": 100.0,
    "tokens_out": 5000,
    "held_seconds": 80.0,
    "busy_seconds": 60.0,
    "gpu_seconds": 0.0,
    "gpu_busy_seconds": 0.0,
    "work_seconds": 60.0,
    "starting_seconds": 25.0,
    "swap_seconds": 5.0,
    "engines_started": ["student"],
    "engines_swapped": ["student with an adapter"],
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run

    return run


def test_the_shares_of_the_wall_time_add_up_to_one(benchmark):
    first = benchmark.summarize([MANIFEST, MANIFEST], "opencharacter", 150)
    second = benchmark.summarize([{**MANIFEST, "engines_swapped": []}], "restarts", 300)
    figures = benchmark.figures(
        {"opencharacter": [first], "restarts": [second]}, benchmark.SETTINGS, {}
    )
    medians = {name: value["median"] for name, value in figures.items()}
    shares = [medians[f"share_{part}"] for part in ("working", "starting", "swapping", "other")]
    assert shares == pytest.approx([0.6, 0.25, 0.05, 0.1])
    assert medians["idle_share"] == pytest.approx(0.25)
    assert medians["speedup"] == pytest.approx(2)
    assert medians["weight_swaps"] == 2 and medians["restarts_weight_swaps"] == 0


def test_idle_time_is_that_of_gpus_where_there_are_some(benchmark):
    manifest = {**MANIFEST, "gpu_seconds": 40.0, "gpu_busy_seconds": 10.0}
    assert benchmark.summarize([manifest], "opencharacter", 1)["idle_share"] == pytest.approx(0.75)


def test_the_benchmark_runs_every_stage_of_its_recipe_with_one_model(benchmark, tmp_path):
    recipe = benchmark.make_recipe(benchmark.SETTINGS)
    roles = recipe.roles
    assert {r.model for r in (roles.teacher, roles.student, roles.judge)} == {
        benchmark.SETTINGS["model"]
    }
    assert recipe.introspection.interaction.free == 500
    jobs = benchmark.make_jobs(benchmark.SETTINGS | benchmark.TINY, tmp_path)
    assert {"distillation/dpo", "introspection/sft"} <= {job.stage.name for job in jobs}
