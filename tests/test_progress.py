"""The metrics and actor names of a running stage in Ray's dashboard and Prometheus."""

import time
import urllib.request
from unittest.mock import Mock

import ray

from opencharacter.runtime import progress

DATASET = "a/dataset/of/this/test"


def exported(name: str) -> float | None:
    """The sum of a metric at the port that Prometheus scrapes."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    lines = urllib.request.urlopen(url, timeout=5).read().decode().splitlines()
    start = f"ray_opencharacter_{name}_total{{"
    found = [line for line in lines if line.startswith(start) and DATASET in line]
    return sum(float(line.split()[-1]) for line in found) if found else None


def test_rows_tokens_drops_and_gpu_seconds_are_exported_to_prometheus(cpu_ray):
    counters = progress.start_counters(DATASET, gpus=2)
    ray.get(counters.add.remote({"finished": 8, "dropped": 1, "tokens_out": 640}, []))
    time.sleep(0.5)
    assert ray.get(counters.read.remote())["finished"] == 8
    deadline = time.monotonic() + 30
    while exported("rows") is None and time.monotonic() < deadline:
        time.sleep(0.5)
    assert exported("rows") == 8
    assert exported("dropped_rows") == 1
    assert exported("tokens") == 640
    assert (exported("gpu_seconds") or 0) >= 1


def test_progress_actors_have_readable_names(cpu_ray):
    counters = progress.start_counters("humor/distillation/teacher", gpus=0)
    ray.get(counters.read.remote())
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert any(name.startswith("progress of humor/distillation/teacher #") for name in names)


def test_lost_counters_restart_from_zero(cpu_ray):
    counters = progress.start_counters("loving/distillation/teacher", gpus=0)
    ray.get(counters.add.remote({"finished": 8}, []))
    ray.kill(counters, no_restart=False)
    deadline = time.monotonic() + 30
    while ray.get(counters.read.remote()) and time.monotonic() < deadline:
        time.sleep(0.1)
    ray.get(counters.add.remote({"finished": 2}, []))
    assert ray.get(counters.read.remote()) == {"finished": 2}
    assert progress.active_seconds(counters) == 0


def test_training_whose_counts_were_lost_shows_its_step(monkeypatch):
    """Counters that restart from 0 are no reason to fail a training that has ended well."""
    sums: dict[str, float] = {"kept": 2, "step": 6, "steps": 9, "seconds": 8}
    monkeypatch.setattr(progress.ray, "get", lambda _: sums)
    attempts = Mock()
    line = progress.TrainingProgress(Mock(), attempts)
    assert line() == "step 6/9, 6s left"
    attempts.note.assert_called_once_with(6, 2, done=6, total=9)
    sums = {"step": 7, "seconds": 10}
    assert line() == "step 7"
    sums = {}
    assert line() == "starting the trainer"
