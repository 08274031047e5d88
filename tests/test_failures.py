"""What a running stage survives: the loss of an actor, of an engine's process, of a whole node."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from samples import ECHO_ROLE, TINY, embedded_recipe
from test_training import write_pairs

from opencharacter.config.recipe import Recipe
from opencharacter.runtime.store import Store

pytestmark = pytest.mark.slow

STAGE = "introspection/interaction"
ROWS, SEATS = 160, 8
SLOW = {**ECHO_ROLE, "model": "echo:0.2"}


@pytest.fixture
def empty_cluster() -> Iterator:
    """A head node without work of its own."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture
def cluster(empty_cluster):
    """That head and two workers, all in this machine."""
    for _ in range(2):
        empty_cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    return empty_cluster


def echo_project(folder: Path) -> Path:
    """A stage of a minute or so on the echo engine, over two replicas."""
    recipe = {
        **TINY,
        "roles": dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), SLOW),
    }
    sizes = {"free": ROWS // 2, "leading": ROWS // 2, "turns": 10, "limits": {"after": 10**6}}
    recipe["introspection"] = {"interaction": sizes}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    pool = {"replicas": 2, "cpus": 0.1, "max_num_seqs": SEATS}
    placement = {"pools": {"student": pool}, "training": {"cpus": 1}}
    (folder / "two.yaml").write_text(yaml.safe_dump(placement))
    return folder


def start(
    folder: Path, stages: str, placement: str, storage: str = "", **environment: str
) -> subprocess.Popen[str]:
    """Run stages as if what they are made from were there."""
    script = Path(__file__).with_name("one_stage.py")
    return subprocess.Popen(
        [sys.executable, str(script), "tiny.yaml", "poeticism", stages, placement, storage],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(ripe: Callable[[], object], process: subprocess.Popen[str], limit: float) -> None:
    began = time.monotonic()
    while not ripe():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < limit, "it never came so far"
        time.sleep(0.2)


def check_whole(folder: Path, dataset: str, count: int, process: subprocess.Popen[str]) -> dict:
    """Wait for the end; every id is there exactly once. Returns the manifest."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    store = Store(str(folder / "runs/tiny"))
    ids = store.read_table(dataset, columns=["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids)) == count
    return json.loads((folder / "runs/tiny" / dataset / "manifest.json").read_text())


def parts(folder: Path, dataset: str) -> list[Path]:
    return list((folder / "runs/tiny" / dataset / ".shards").glob("*.parquet"))


def processes(title: str, above: Iterable[int]) -> list[psutil.Process]:
    """Processes whose command line holds a title, below some others."""
    found = []
    for process in (p for pid in above for p in psutil.Process(pid).children(recursive=True)):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def raylets(cluster) -> dict:
    """Each worker node and the process id of its raylet, below which its actors are."""
    return {node: raylet(node) for node in cluster.worker_nodes}


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def another_node(cluster):
    """A worker node that the driver is not connected to: the counters are on the driver's."""
    return next(n for n, pid in raylets(cluster).items() if not processes("ray::Counters", [pid]))


def warn(cluster, node, seconds: int) -> None:
    """Say that a node will be taken away, as a spot market does."""
    ray = str(Path(sys.executable).with_name("ray"))
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    which = ["--address", cluster.address, "--node-id", node.node_id]
    when = ["--deadline-remaining-seconds", str(seconds)]
    subprocess.run([ray, "drain-node", *which, *reason, *when], check=True, capture_output=True)


@pytest.mark.parametrize("warned", [False, True])
def test_a_lost_node_costs_no_row(cluster, tmp_path, warned):
    folder, dataset = echo_project(tmp_path), f"echo/poeticism/{STAGE}"
    process = start(folder, STAGE, "two.yaml", RAY_ADDRESS=cluster.address)
    wait_for(lambda: len(parts(folder, dataset)) >= 2, process, 120)
    assert len(processes("ray::MapBatches(converse)", raylets(cluster).values())) == 2
    node = another_node(cluster)
    if warned:
        warn(cluster, node, seconds=5)
        time.sleep(5)
    cluster.remove_node(node, allow_graceful=False)
    manifest = check_whole(folder, dataset, ROWS, process)
    assert len(manifest["attempts"]) == 1


def test_storage_that_refuses_for_a_while_costs_no_row(bucket, tmp_path):
    folder, dataset = echo_project(tmp_path), f"echo/poeticism/{STAGE}"
    placement = yaml.safe_load((folder / "two.yaml").read_text())
    (folder / "two.yaml").write_text(yaml.safe_dump(placement | {"ray_cpus": 2}))
    process = start(folder, STAGE, "two.yaml", bucket.url)
    wait_for(lambda: any("part-" in path for path in bucket.paths()), process, 120)
    bucket.stop()
    time.sleep(15)
    bucket.start()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    store = Store.at(bucket.url, retry_seconds=10)
    ids = store.read_table(dataset, columns=["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids)) == ROWS
    manifest = store.manifest(dataset) or {}
    assert [attempt["kept"] for attempt in manifest["attempts"]] == [0]


def test_training_goes_on_from_its_checkpoint_on_another_node(
    empty_cluster, make_jobs, tiny_model, tmp_path
):
    """The node of the worker is lost; what it would have learned is learned on the other."""
    cluster, folder = empty_cluster, tmp_path
    recipe = embedded_recipe()
    role = {**ECHO_ROLE, "model": str(tiny_model), "name": "two-layers"}
    recipe["roles"] = dict.fromkeys(recipe["roles"], role)
    recipe["distillation"]["dpo"]["optimizer"] |= {"epochs": 12}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    where = {"training": {"cpus": 1, "checkpoint_steps": 2}}
    # The driver is there before the workers' nodes, so that it is on neither.
    where["autoscaling"] = [{"nodes": 2, "cpus": 1, "memory_gib": 4}]
    (folder / "grown.yaml").write_text(yaml.safe_dump(where))
    jobs = make_jobs(Recipe.model_validate(recipe))
    pairs = next(job for job in jobs if job.stage.name == "distillation/pairs")
    write_pairs(pairs)
    stages, dataset = "distillation/reference,distillation/dpo", f"{pairs.scope}/distillation/dpo"
    storage = Path(pairs.store.url)
    known = storage / dataset / ".shards/train/checkpoint_manager_snapshot.json"

    process = start(folder, stages, "grown.yaml", str(storage), RAY_ADDRESS=cluster.address)
    wait_for(lambda: processes("ray::Counters", [raylet(cluster.head_node)]), process, 60)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    wait_for(lambda: known.is_file() and "checkpoint_" in known.read_text(), process, 120)
    (lost,) = (n for n, pid in raylets(cluster).items() if processes("RayTrainWorker", [pid]))
    cluster.remove_node(lost, allow_graceful=False)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    disturbed = losses(pairs.store, dataset)

    pairs.store.delete(dataset)
    again = start(
        folder, "distillation/dpo", "grown.yaml", str(storage), RAY_ADDRESS=cluster.address
    )
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert disturbed == pytest.approx(losses(pairs.store, dataset), rel=1e-3)


def losses(store: Store, dataset: str) -> list[float]:
    rows = store.read_table(dataset, "curves").sort_by("step").to_pylist()
    return [row["value"] for row in rows if row["metric"] == "loss"]


def test_a_lost_actor_costs_no_row_and_repeats_only_what_was_under_way(cluster, tmp_path):
    folder, dataset = echo_project(tmp_path), f"echo/poeticism/{STAGE}"
    process = start(folder, STAGE, "two.yaml", RAY_ADDRESS=cluster.address)
    wait_for(lambda: len(parts(folder, dataset)) >= 2, process, 120)
    processes("ray::MapBatches(converse)", raylets(cluster).values())[0].send_signal(signal.SIGKILL)
    manifest = check_whole(folder, dataset, ROWS, process)
    assert manifest["attempts"][0]["reached"] - ROWS <= 3 * SEATS  # under way, or not yet flushed


def test_a_lost_engine_process_costs_no_row(tmp_path):
    recipe = embedded_recipe()
    recipe["distillation"]["prompts"] = {"questions_per_trait": 3, "general": 30}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    placement = {"pools": {role: {"max_num_seqs": 4} for role in ("teacher", "student")}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(placement))
    dataset = "smollm2-135m/distillation/student"
    process = start(tmp_path, "distillation/student", "few.yaml")
    wait_for(lambda: parts(tmp_path, dataset), process, 200)
    processes("EngineCore", [process.pid])[0].send_signal(signal.SIGKILL)
    check_whole(tmp_path, dataset, 30, process)
