"""Every file in clusters/ is accepted by the tool that reads it.

No package contains KubeRay's schema. KubeRay's own fields are compared with the lists below, the
pods and claims inside are validated with Kubernetes' schema, and Ray's autoscaler reads the worker
groups.
"""

import os
import subprocess
import zipfile
from pathlib import Path

import kubernetes_validate
import moto
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from opencharacter.config.files import load_placement
from opencharacter.config.placement import fits
from opencharacter.planning.cost import planning_resources
from opencharacter.runtime.cluster import GIB, autoscaled_nodes, check_fits, ray_resources

CLUSTERS = Path(__file__).parent.parent / "clusters"
NAMES = [
    "aws",
    "gpu-cluster",
    "gpu-node",
    "hf-jobs",
    "kuberay",
    "laptop",
    "single-gpu",
    "single-gpu-shared",
    "skypilot",
    "slurm",
]
HOST = ray_resources(cpus=96, gpus=8, memory_gib=700)
MACHINES = {
    "laptop": [ray_resources(cpus=2, gpus=0, memory_gib=5)],
    "single-gpu": [ray_resources(cpus=16, gpus=1, memory_gib=80)],
    "single-gpu-shared": [ray_resources(cpus=16, gpus=1, memory_gib=80)],
    "gpu-node": [HOST],
    "gpu-cluster": [HOST] * 4,
    "hf-jobs": [ray_resources(cpus=23, gpus=1, memory_gib=256)],
    "slurm": [HOST] * 2,
    "skypilot": [ray_resources(cpus=80, gpus=8, memory_gib=700)] * 2,
    "aws": [],
    "kuberay": [],
}
FIELDS = {
    "RayJob": """entrypoint backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished
        rayClusterSpec""",
    "RayService": "serveConfigV2 rayClusterConfig",
    "cluster": """rayVersion authOptions enableInTreeAutoscaling autoscalerOptions headGroupSpec
        workerGroupSpecs""",
    "autoscaler": "idleTimeoutSeconds upscalingMode",
    "head": "rayStartParams template",
    "workers": "groupName replicas minReplicas maxReplicas rayStartParams template",
}
"""The fields of KubeRay's ray.io/v1 that are used here."""
KUBERNETES = "1.30"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((CLUSTERS / name).read_text()))


def test_each_cluster_folder_has_all_files():
    assert sorted(p.name for p in CLUSTERS.iterdir() if p.is_dir()) == NAMES
    for name in NAMES:
        assert (CLUSTERS / name / "README.md").is_file()
        assert load_placement(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_placement_fits_its_machines(name):
    placement = load_placement(name)
    check_fits(placement, MACHINES[name] + autoscaled_nodes(placement))


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_uses_all_gpus_of_a_placement(name):
    placement = load_placement(name)
    nodes = MACHINES[name] + autoscaled_nodes(placement)
    assert planning_resources(placement).gpus == sum(node["GPU"] for node in nodes)


def test_five_small_engines_share_one_gpu():
    placement = load_placement("single-gpu-shared")
    check_fits(placement, MACHINES["single-gpu-shared"])
    assert fits(
        [placement.pools.student.resources] * 5, planning_resources(placement)
    )  # in a plan too
    student = placement.pools.student
    assert 5 * student.gpus <= 1 and 5 * (student.gpu_memory_utilization or 1) < 0.9


def same(resources: dict[str, float], node: dict[str, float]) -> bool:
    """Whether a started node has the resources that a placement expects."""
    started = {kind: n for kind, n in resources.items() if kind in ("CPU", "GPU") or ":" in kind}
    expected = {kind: n for kind, n in node.items() if kind != "memory"}
    return started == expected and 0 <= resources["memory"] - node["memory"] < 100 * GIB


def test_ray_up_accepts_the_aws_cluster_and_starts_the_nodes_of_the_placement():
    (config,) = documents("aws/cluster.yaml")
    with moto.mock_aws():  # it knows the sizes of real instances
        filled = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(config))
    validate_config(filled)  # the order of `ray up`
    types = filled["available_node_types"]
    placement = load_placement("aws")
    for group, name in zip(placement.autoscaling, ("h100", "l40s"), strict=True):
        node = autoscaled_nodes(placement.model_copy(update={"autoscaling": (group,)}))[0]
        assert same(types[name]["resources"], node)
        assert types[name]["max_workers"] == group.nodes
        assert types[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["max_workers"] == sum(group.nodes for group in placement.autoscaling)
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["head"]["resources"]["CPU"] == 0


def kuberay(name: str) -> tuple[dict, dict]:
    """A KubeRay document and its cluster."""
    (found,) = (d for d in documents(f"kuberay/{name}.yaml") if d["apiVersion"] == "ray.io/v1")
    return found, found["spec"].get("rayClusterSpec") or found["spec"]["rayClusterConfig"]


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_every_field_belongs_to_kuberay(name):
    found, cluster = kuberay(name)
    assert found.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert found["spec"].keys() <= set(FIELDS[found["kind"]].split())
    assert cluster.keys() <= set(FIELDS["cluster"].split())
    assert cluster.get("autoscalerOptions", {}).keys() <= set(FIELDS["autoscaler"].split())
    assert cluster["headGroupSpec"].keys() == set(FIELDS["head"].split())
    assert cluster["rayVersion"] == "2.60.0"
    assert cluster["authOptions"] == {"mode": "token"}
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() == set(FIELDS["workers"].split())
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_pods_and_claims_are_valid_for_kubernetes(name):
    _, cluster = kuberay(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}}
        kubernetes_validate.validate(pod | {"template": group["template"]}, KUBERNETES, strict=True)
    for document in documents(f"kuberay/{name}.yaml"):
        if document["apiVersion"] == "v1":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_the_autoscaler_on_kuberay_can_start_the_nodes_of_the_placement(name):
    _, cluster = kuberay(name)
    resource = {"metadata": {"name": "c", "namespace": "n"}, "spec": cluster}
    config = autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)
    validate_config(config)
    types = config["available_node_types"]
    placement = load_placement("kuberay")
    for group, kind in zip(placement.autoscaling, ("h100", "l40s"), strict=True):
        node = autoscaled_nodes(placement.model_copy(update={"autoscaling": (group,)}))[0]
        assert same(types[kind]["resources"], node)
        assert types[kind]["max_workers"] == group.nodes
    assert types["headgroup"]["resources"]["CPU"] == 0


def test_serve_accepts_the_config_of_the_rayservice():
    found, _ = kuberay("rayservice")
    inside = yaml.safe_load(found["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(inside).applications
    assert application.args["placement"] == "kuberay"


def test_the_rayjob_runs_a_valid_command():
    from typer.testing import CliRunner

    from opencharacter.cli.main import app

    found, _ = kuberay("rayjob")
    program, command, recipe, *options = found["spec"]["entrypoint"].split()
    assert (program, command, recipe) == ("opencharacter", "run", "llama-3.1-8b")
    storage = options.index("--storage")
    planned = CliRunner().invoke(app, ["plan", recipe, *options[:storage]])
    assert planned.exit_code == 0, planned.output


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in --nodelist=*) export NODE=${1#*=};; esac
  shift
done
exec "$@"
"""
RECORD = """#!/bin/bash
token="mode=$RAY_AUTH_MODE token=${#RAY_AUTH_TOKEN}"
echo "$NODE ${0##*/} $* address=${RAY_ADDRESS-} $token" >> "$LOG"
case "$*" in
  *--block) exec sleep 20;;
  status) grep -o 'ray start' "$LOG" | sed 's/.*/ 1 node_0/';;
esac
"""


def test_the_slurm_script_starts_ray_on_all_nodes_and_runs_the_command_on_the_first(tmp_path):
    """With stand-ins for Slurm's commands, ray and opencharacter, which record how they are run."""
    programs = {
        "srun": SRUN,
        "scontrol": "#!/bin/bash\nprintf 'a1\\na2\\n'\n",
        "ray": RECORD,
        "opencharacter": RECORD,
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "a[1-2]", "JOB_ID": "20001", "GPUS_ON_NODE": "8", "CPUS_ON_NODE": "96"}
    log = tmp_path / "log"
    done = subprocess.run(
        ["bash", CLUSTERS / "slurm" / "run.sbatch", "run", "demo", "-c", "humor"],
        env={
            **{f"SLURM_{name}": value for name, value in slurm.items()},
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LOG": str(log),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    token = "mode=token token=64"
    resources = "--num-gpus=8 --num-cpus=96 --disable-usage-stats --block"
    assert lines[-1] == f"a1 opencharacter run demo -c humor address=a1:20001 {token}"
    head = f"a1 ray start --head --node-ip-address=a1 --port=20001 {resources} address= {token}"
    assert head in lines
    assert f"a2 ray start --address=a1:20001 {resources} address= {token}" in lines
    assert f"a1 ray status address=a1:20001 {token}" in lines


def test_the_skypilot_task_runs_a_valid_command_on_the_machines_of_its_placement():
    (task,) = documents("skypilot/run.yaml")
    assert (
        task["num_nodes"] * 8
        == planning_resources(load_placement("skypilot")).gpus
        == task["num_nodes"] * task["resources"]["accelerators"]["H100"]
    )
    from typer.testing import CliRunner

    from opencharacter.cli.main import app

    command, *options = task["envs"]["ARGUMENTS"].split()
    assert command == "run"
    planned = CliRunner().invoke(app, ["plan", *options])
    assert planned.exit_code == 0, planned.output
    assert all(value is None for value in task["secrets"].values())


def test_no_file_for_a_cluster_contains_a_secret_or_disables_the_token():
    for path in CLUSTERS.rglob("*.*"):
        text = path.read_text()
        assert "RAY_AUTH_MODE: disabled" not in text
        assert not [word for word in ("hf_", "sk-", "AKIA") if f"={word}" in text], path


def test_the_working_directory_of_a_submitted_job_is_small(tmp_path):
    """The ignore files exclude the environment, the git history and runs."""
    package = tmp_path / "sent.zip"
    create_package(str(CLUSTERS.parent), package, include_gitignore=True)
    names = zipfile.ZipFile(package).namelist()
    assert {name.split("/")[0] for name in names} >= {"opencharacter", "constitutions", "clusters"}
    assert not [name for name in names if name.startswith((".git/", ".venv", "runs", "tests"))]
    assert package.stat().st_size < 2_000_000
