"""Running stages survive the loss of tasks, engine processes, nodes and, for a while, storage."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from process_tree import descendants, wait_for_descendants
from samples import ECHO_ROLE, TINY, embedded_recipe
from test_training import write_pairs

from opencharacter.config.recipe import Recipe
from opencharacter.runtime.store import Store

pytestmark = pytest.mark.slow

STAGE = "introspection/interaction"
ROWS, NUM_SLOTS = 160, 8
SLOW = {**ECHO_ROLE, "model": "echo:0.2"}


@pytest.fixture
def empty_cluster() -> Iterator:
    """A cluster with only a head node, which runs no tasks."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    yield cluster
    cluster.shutdown()


@pytest.fixture
def cluster(empty_cluster):
    """The head node and two worker nodes, all on this machine."""
    for _ in range(2):
        empty_cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    return empty_cluster


def echo_project(folder: Path) -> Path:
    """Write a recipe and a placement for a stage of about a minute: two echo replicas."""
    recipe = {
        **TINY,
        "roles": dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), SLOW),
    }
    sizes = {"free": ROWS // 2, "leading": ROWS // 2, "turns": 10, "limits": {"min_texts": 10**6}}
    recipe["introspection"] = {"interaction": sizes}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    pool = {"replicas": 2, "cpus": 0.1, "max_num_seqs": NUM_SLOTS}
    placement = {"pools": {"student": pool}, "training": {"cpus": 1}}
    (folder / "two.yaml").write_text(yaml.safe_dump(placement))
    return folder


def start(
    folder: Path, stages: str, placement: str, storage: str = "", **environment: str
) -> subprocess.Popen[str]:
    """Start a process that runs stages without their parents."""
    script = Path(__file__).with_name("one_stage.py")
    return subprocess.Popen(
        [sys.executable, str(script), "tiny.yaml", "poeticism", stages, placement, storage],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str], timeout: float
) -> None:
    start_time = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - start_time < timeout, "timed out"
        time.sleep(0.2)


def check_complete(folder: Path, dataset: str, count: int, process: subprocess.Popen[str]) -> dict:
    """Wait for the process; check that every id is stored exactly once; return the manifest."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    store = Store(str(folder / "runs/tiny"))
    ids = store.read_table(dataset, columns=["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids)) == count
    return json.loads((folder / "runs/tiny" / dataset / "manifest.json").read_text())


def shard_files(folder: Path, dataset: str) -> list[Path]:
    return list((folder / "runs/tiny" / dataset / ".shards").glob("*.parquet"))


def raylets(cluster) -> dict:
    """The process id of the raylet of each worker node; its workers are child processes."""
    return {node: raylet(node) for node in cluster.worker_nodes}


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def another_node(cluster):
    """A worker node other than the driver's, which is where the counters run."""
    return next(
        n for n, pid in raylets(cluster).items() if not descendants([pid], "ray::ProgressCounters")
    )


def announce_preemption(cluster, node, seconds: int) -> None:
    """Announce that a node will be preempted, as providers of spot instances do."""
    ray = str(Path(sys.executable).with_name("ray"))
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    which = ["--address", cluster.address, "--node-id", node.node_id]
    when = ["--deadline-remaining-seconds", str(seconds)]
    subprocess.run([ray, "drain-node", *which, *reason, *when], check=True, capture_output=True)


@pytest.mark.parametrize("announced", [False, True])
def test_no_row_is_lost_with_a_node(cluster, tmp_path, announced):
    folder, dataset = echo_project(tmp_path), f"echo/poeticism/{STAGE}"
    process = start(folder, STAGE, "two.yaml", RAY_ADDRESS=cluster.address)
    wait_for(lambda: len(shard_files(folder, dataset)) >= 2, process, 120)
    title = "ray::MapBatches(run_conversations)"
    assert len(wait_for_descendants(raylets(cluster).values(), title, count=2)) == 2
    node = another_node(cluster)
    if announced:
        announce_preemption(cluster, node, seconds=5)
        time.sleep(5)
    cluster.remove_node(node, allow_graceful=False)
    manifest = check_complete(folder, dataset, ROWS, process)
    assert len(manifest["attempts"]) == 1


def test_no_row_is_lost_while_storage_is_unavailable(bucket, tmp_path):
    folder, dataset = echo_project(tmp_path), f"echo/poeticism/{STAGE}"
    placement = yaml.safe_load((folder / "two.yaml").read_text())
    (folder / "two.yaml").write_text(yaml.safe_dump(placement | {"ray_cpus": 2}))
    process = start(folder, STAGE, "two.yaml", bucket.url)
    wait_for(lambda: any("shard-" in path for path in bucket.paths()), process, 120)
    bucket.stop()
    time.sleep(15)
    bucket.start()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    store = Store.at(bucket.url, retry_seconds=10)
    ids = store.read_table(dataset, columns=["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids)) == ROWS
    manifest = store.manifest(dataset) or {}
    assert [attempt["kept"] for attempt in manifest["attempts"]] == [0]


def test_training_resumes_from_its_checkpoint_on_another_node(
    empty_cluster, make_jobs, tiny_model, tmp_path
):
    """The worker's node is lost; the losses equal those of an undisturbed training."""
    cluster, folder = empty_cluster, tmp_path
    recipe = embedded_recipe()
    role = {**ECHO_ROLE, "model": str(tiny_model), "name": "two-layers"}
    recipe["roles"] = dict.fromkeys(recipe["roles"], role)
    recipe["distillation"]["dpo"]["optimizer"] |= {"epochs": 12}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    placement = {"training": {"cpus": 1, "checkpoint_steps": 2}}
    # The driver starts before the worker nodes, so it runs on neither of them.
    placement["autoscaling"] = [{"nodes": 2, "cpus": 1, "memory_gib": 4}]
    (folder / "grown.yaml").write_text(yaml.safe_dump(placement))
    jobs = make_jobs(Recipe.model_validate(recipe))
    pairs = next(job for job in jobs if job.stage.name == "distillation/pairs")
    write_pairs(pairs)
    stages, dataset = "distillation/reference,distillation/dpo", f"{pairs.scope}/distillation/dpo"
    storage = Path(pairs.store.url)
    snapshot = storage / dataset / ".shards/train/checkpoint_manager_snapshot.json"

    process = start(folder, stages, "grown.yaml", str(storage), RAY_ADDRESS=cluster.address)
    wait_for(lambda: descendants([raylet(cluster.head_node)], "ray::ProgressCounters"), process, 60)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    wait_for(lambda: snapshot.is_file() and "checkpoint_" in snapshot.read_text(), process, 120)
    (lost,) = (n for n, pid in raylets(cluster).items() if descendants([pid], "RayTrainWorker"))
    cluster.remove_node(lost, allow_graceful=False)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    disturbed = losses(pairs.store, dataset)

    pairs.store.delete(dataset)
    again = start(
        folder, "distillation/dpo", "grown.yaml", str(storage), RAY_ADDRESS=cluster.address
    )
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert disturbed == pytest.approx(losses(pairs.store, dataset), rel=1e-3)


def losses(store: Store, dataset: str) -> list[float]:
    rows = store.read_table(dataset, "curves").sort_by("step").to_pylist()
    return [row["value"] for row in rows if row["metric"] == "loss"]


def test_no_row_is_lost_with_a_task_and_only_rows_in_flight_are_repeated(cluster, tmp_path):
    folder, dataset = echo_project(tmp_path), f"echo/poeticism/{STAGE}"
    process = start(folder, STAGE, "two.yaml", RAY_ADDRESS=cluster.address)
    wait_for(lambda: len(shard_files(folder, dataset)) >= 2, process, 120)
    wait_for_descendants(raylets(cluster).values(), "ray::MapBatches(run_conversations)")[0].kill()
    manifest = check_complete(folder, dataset, ROWS, process)
    assert (
        manifest["attempts"][0]["reached"] - ROWS <= 3 * NUM_SLOTS
    )  # in flight, or not yet flushed


def test_no_row_is_lost_with_an_engine_process(tmp_path):
    recipe = embedded_recipe()
    recipe["distillation"]["prompts"] = {"questions_per_trait": 3, "general": 30}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    placement = {"pools": {role: {"max_num_seqs": 4} for role in ("teacher", "student")}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(placement))
    dataset = "smollm2-135m/distillation/student"
    process = start(tmp_path, "distillation/student", "few.yaml")
    wait_for(lambda: shard_files(tmp_path, dataset), process, 200)
    wait_for_descendants([process.pid], "EngineCore")[0].kill()
    check_complete(tmp_path, dataset, 30, process)
