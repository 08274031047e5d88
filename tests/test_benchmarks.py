"""Benchmarks run at their smallest size and write the figures that they document."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
OURS = {
    "opencharacter_cpu_ms_per_token",
    "opencharacter_tokens_per_s",
    "prefix_hit_rate",
    "roofline_fraction",
    "seconds_after_last_reply",
    "seconds_before_first_request",
}
EXPECTED = {
    "generation": {
        *OURS,
        "opencharacter_seeded_tokens_per_s",
        "opencharacter_seeded_cpu_ms_per_token",
        "async_llm_tokens_per_s",
        "async_llm_cpu_ms_per_token",
        "ratio_to_async_llm",
        "vllm_generate_tokens_per_s",
        "vllm_generate_cpu_ms_per_token",
        "ray_data_llm_tokens_per_s",
        "ratio_to_vllm_generate",
        "ratio_to_ray_data_llm",
        "seeded_ratio",
    },
    "interaction": {
        *OURS,
        "barrier_tokens_per_s",
        "barrier_cpu_ms_per_token",
        "barrier_cached_tokens_per_s",
        "barrier_cached_cpu_ms_per_token",
        "async_llm_tokens_per_s",
        "async_llm_cpu_ms_per_token",
        "ratio_to_async_llm",
        "ratio_to_barrier",
        "ratio_to_barrier_cached",
        "prefix_hit_rate_first_side",
        "prefix_hit_rate_second_side",
    },
}

pytestmark = pytest.mark.slow


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    return harness


@pytest.mark.parametrize("name", EXPECTED)
def test_a_tiny_generation_benchmark_writes_all_figures(name, tmp_path):
    script = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--tiny", "--out", str(tmp_path)]
    ran = subprocess.run(script, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / f"{name}.json").read_text())
    keys = {"name", "device", "date", "command", "versions", "settings", "figures"}
    assert result.keys() == keys
    assert result["figures"].keys() == EXPECTED[name]
    for figure in result["figures"].values():
        assert figure["repeats"] >= 1
        assert all(math.isfinite(value) for value in figure.values())
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    parts = [json.loads(f.read_text()) for f in (tmp_path / f"{name}-parts").glob("*.json")]
    work = {run["tokens"] for part in parts for run in part.get("runs", [])}
    assert len(work) == 1  # every implementation generated the same number of tokens


def test_a_tiny_merge_benchmark_writes_its_errors(tmp_path):
    script = [sys.executable, str(BENCHMARKS / "merge.py"), "--tiny", "--out", str(tmp_path)]
    ran = subprocess.run(script, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((tmp_path / "merge.json").read_text())["figures"]
    assert figures["merge_relative_error"]["median"] == 0
    assert 0 < figures["svd_relative_error"]["median"] < 1


def test_a_stage_on_two_simulated_nodes_loses_and_duplicates_no_row(tmp_path):
    name = "200_rows_2_nodes"
    script = [sys.executable, str(BENCHMARKS / "scale.py"), "--tiny", "--out", str(tmp_path)]
    # Ray of another test may have left an authentication token; these nodes use none.
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    ran = subprocess.run([*script, "--ways", name], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((tmp_path / "scale.json").read_text())["figures"]
    assert figures[f"{name}_lost"]["median"] == figures[f"{name}_doubled"]["median"] == 0
    assert 0 < figures[f"{name}_driver_gb"]["median"] < 0.5


def test_a_tiny_training_benchmark_writes_all_figures_and_matches_the_loss_of_trl(tmp_path):
    script = [sys.executable, str(BENCHMARKS / "training.py"), "--tiny", "--out", str(tmp_path)]
    ran = subprocess.run(script, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads((tmp_path / "training.json").read_text())["figures"]
    names = ("dpo_tokens_per_s", "dpo_ratio_to_trl_tuned", "dpo_peak_fraction", "fp8_ratio")
    for name in (*names, "sft_peak_fraction", "trl_liger_tokens_per_s", "reference_tokens_per_s"):
        assert figures[name]["median"] > 0
    assert figures["loss_difference"]["median"] < 1e-3


def test_repeats_use_new_prompts_with_the_same_lengths(harness):
    import generation

    one, other = (generation.workload(generation.SETTINGS, repeat, 9) for repeat in "ab")
    assert [row["max_tokens"] for row in one] == [row["max_tokens"] for row in other]
    assert {row["prompt"] for row in one}.isdisjoint(row["prompt"] for row in other)


def test_a_process_that_exceeds_its_time_limit_is_killed_with_its_children(harness, tmp_path):
    child = "import os, time; os.setpgrp(); print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(harness.ProcessFailed, match="not finished after 3 s"):
        harness.run([sys.executable, "-c", parent], tmp_path / "log", 3)
    pid = int((tmp_path / "log").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_error_of_a_failed_process_ends_with_its_log(harness, tmp_path):
    with pytest.raises(harness.ProcessFailed, match=r"exit code 1\n(.|\n)*ZeroDivisionError"):
        harness.run([sys.executable, "-c", "1 / 0"], tmp_path / "log", 30)


def test_a_ratio_ranges_over_all_pairs_of_repeats(harness):
    ratio = harness.ratio([2.0, 4.0, 3.0], [1.0, 2.0])
    assert ratio == {"median": 2.0, "min": 1.0, "max": 4.0, "repeats": 2}


def test_the_roofline_of_an_8b_model_counts_weights_and_kv_cache(harness):
    import engines

    alone = engines.roofline(engines.SETTINGS, {"rows": 1, "context": 0}, 4.3e12)
    weights = 15.0e9  # bytes of the 8.03 billion parameters without the embedding
    assert alone == pytest.approx(4.3e12 / weights, rel=0.01)
    filled = engines.roofline(engines.SETTINGS, {"rows": 9999, "context": 1000}, 4.3e12)
    assert filled == pytest.approx(256 * 4.3e12 / (weights + 256 * 1000 * 131_072), rel=0.01)


def test_an_interrupted_series_keeps_its_finished_repeats(harness, tmp_path):
    def breaks_off(settings):
        yield {"series": "ours", "seconds": 1, "tokens": 1}
        raise KeyboardInterrupt

    task = {"way": "ours", "settings": {}}
    (tmp_path / "ours.json").write_text(json.dumps(task))
    made = harness.Benchmark("name", tmp_path, {}, {}, {"ours": breaks_off}, dict)
    with pytest.raises(KeyboardInterrupt):
        harness.do_task(made, tmp_path / "ours.json")
    kept = harness.kept_runs(tmp_path, harness.Task("ours", "ours", {}))
    assert kept == [{"series": "ours", "seconds": 1, "tokens": 1}]


def test_a_variant_changes_settings_unless_it_is_the_base(harness):
    import engines

    for name, variant in engines.variants().items():
        settings = harness.merged(engines.SETTINGS, variant)
        assert settings.keys() == engines.SETTINGS.keys(), name
        assert (settings == engines.SETTINGS) == (name == "base"), name
