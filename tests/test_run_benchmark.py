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
    "rest": "share_generating",
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run

    return run


def test_the_shares_of_the_wall_time_add_up_to_one(benchmark):
    parts = dict.fromkeys(("work_seconds", "starting_seconds", "swap_seconds"), 0)
    driver = {**MANIFEST, **parts, "seconds": 40.0, "rest": "share_driver"}
    driver |= {"held_seconds": 0.0, "busy_seconds": 0.0, "engines_started": []}
    driver |= {"engines_swapped": []}
    first = benchmark.summarize(
        [MANIFEST, MANIFEST, driver], "opencharacter", 150, [(0, 40), (20, 60)]
    )
    second = benchmark.summarize([{**MANIFEST, "engines_swapped": []}], "restarts", 300, [])
    figures = benchmark.figures(
        {"opencharacter": [first], "restarts": [second]}, benchmark.SETTINGS, {}
    )
    medians = {name: value["median"] for name, value in figures.items()}
    shares = {name: value for name, value in medians.items() if name.startswith("share_")}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    assert shares["share_working"] == pytest.approx(0.5)
    assert shares["share_generating"] == pytest.approx(20 / 240, rel=1e-4)
    assert shares["share_driver"] == pytest.approx(40 / 240, rel=1e-4)
    assert shares["share_training"] == 0
    assert medians["idle_share"] == pytest.approx(0.25)
    assert medians["wall_idle_share"] == pytest.approx(0.6)
    assert medians["speedup"] == pytest.approx(2)
    assert medians["weight_swaps"] == 2 and medians["restarts_weight_swaps"] == 0


def test_idle_time_is_that_of_gpus_where_there_are_some(benchmark):
    manifest = {**MANIFEST, "gpu_seconds": 40.0, "gpu_busy_seconds": 10.0}
    assert benchmark.summarize([manifest], "opencharacter", 1, [])["idle_share"] == pytest.approx(
        0.75
    )


def test_the_benchmark_runs_every_stage_of_its_recipe_with_one_model(benchmark, tmp_path):
    sizes = {"introspection": {"interaction": {"free": 500}}}
    for model in (None, "/weights"):  # the recipe's own, and the one of BENCHMARK_MODEL
        recipe = benchmark.make_recipe(benchmark.SETTINGS | {"model": model, "sizes": sizes})
        roles = recipe.roles
        models = {role.model for role in (roles.teacher, roles.student, roles.judge)}
        assert len(models) == 1 and model in (None, *models)
        assert recipe.introspection.interaction.free == 500
    jobs = benchmark.make_jobs(benchmark.SETTINGS | benchmark.TINY, tmp_path)
    assert {"distillation/dpo", "introspection/sft"} <= {job.stage.name for job in jobs}


def test_what_a_job_does_beside_its_work_is_counted_by_its_kind(benchmark, tmp_path):
    jobs = benchmark.make_jobs(benchmark.SETTINGS | benchmark.TINY, tmp_path)
    kinds = {job.stage.name: benchmark.rest_of(job) for job in jobs}
    assert kinds["distillation/dpo"] == "share_training"
    assert kinds["introspection/reflection"] == "share_generating"
    assert kinds["persona/merge"] == "share_driver"
