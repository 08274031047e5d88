import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter.config.placement import Placement, Resources, fits
from opencharacter.errors import UserError
from opencharacter.runtime import cluster
from opencharacter.runtime.cluster import GIB, check_fits, connect

SMALL = {"CPU": 16, "memory": 100 * GIB}
FOUR = {"CPU": 32, "GPU": 4, "memory": 200 * GIB}
EIGHT = {"CPU": 96, "GPU": 8, "memory": 1000 * GIB}


def placed(**teacher) -> Placement:
    return Placement.model_validate({"name": "here", "pools": {"teacher": teacher}})


def test_a_replica_must_fit_on_one_node():
    wide = placed(gpus=8, tensor_parallel=8, cpus=8, memory_gib=64)
    check_fits(wide, [SMALL, EIGHT])
    with pytest.raises(UserError) as refused:
        check_fits(wide, [FOUR, FOUR])
    message = str(refused.value)
    assert "'here': teacher requests 8 GPUs in one node, the largest node has 4; choose" in message
    assert "\n" not in message


def test_replicas_must_fit_on_the_cluster_together():
    check_fits(placed(replicas=2, gpus=4, cpus=8), [FOUR, FOUR])
    with pytest.raises(UserError, match=r"3 x \(4 GPUs, 8 CPUs, 2 GiB of memory\).*room for 2"):
        check_fits(placed(replicas=3, gpus=4, cpus=8), [FOUR, FOUR])


def test_memory_must_fit():
    with pytest.raises(UserError, match="300 GiB of memory in one node, the largest node has 200;"):
        check_fits(placed(gpus=4, memory_gib=300), [FOUR])


def test_replicas_can_share_a_gpu():
    check_fits(placed(replicas=8, gpus=0.5), [FOUR])
    with pytest.raises(UserError, match="room for 8"):
        check_fits(placed(replicas=9, gpus=0.5), [FOUR])


def test_training_must_fit_as_well():
    with pytest.raises(UserError, match="training requests 9 x"):
        check_fits(Placement.model_validate({"training": {"workers": 9, "gpus": 1}}), [EIGHT])


def test_a_required_accelerator_must_be_available():
    cards = EIGHT | {"accelerator_type:H100": 1}
    check_fits(placed(replicas=8, gpus=1, accelerator="H100"), [cards])
    with pytest.raises(UserError, match="requests 1 H200 in one node, the largest node has 0;"):
        check_fits(placed(gpus=1, accelerator="H200"), [cards])


WEIGHTS = ECHO_ROLE | {"model": "org/model"}
FAR = WEIGHTS | {"endpoint": "http://127.0.0.1:1/v1"}


def with_roles(**changes):
    return recipe_of(
        ECHO_ROLE, roles=dict.fromkeys(("student", "prompt_generator"), ECHO_ROLE) | changes
    )


def test_endpoints_and_echo_models_request_no_resources():
    four = {role: {"gpus": 4} for role in ("teacher", "judge")}
    wide = Placement.model_validate({"pools": four})
    check_fits(wide, [SMALL], with_roles(teacher=FAR, judge=ECHO_ROLE))
    with pytest.raises(UserError, match="teacher requests 4 GPUs"):
        check_fits(wide, [SMALL], with_roles(teacher=WEIGHTS, judge=FAR))
    panel = with_roles(teacher=FAR, judge=FAR)
    judge = panel.evaluation.judge.model_copy(update={"panel": (panel.roles.teacher,)})
    near = judge.model_copy(
        update={"panel": (with_roles(teacher=WEIGHTS, judge=FAR).roles.teacher,)}
    )
    for settings, refused in ((judge, False), (near, True)):
        evaluation = panel.evaluation.model_copy(update={"judge": settings})
        recipe = panel.model_copy(update={"evaluation": evaluation})
        owners = [request.owner for request in cluster.bundle_requests(wide, recipe)]
        assert ("judge" in owners) == refused


def test_max_gpus_per_node_counts_nodes_that_have_the_accelerator_or_may_be_added(monkeypatch):
    cards = FOUR | {"accelerator_type:H100": 1}
    there = [{"Alive": True, "Resources": node} for node in (SMALL, EIGHT, cards)]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: there)
    assert cluster.max_gpus_per_node(Placement()) == 8
    wanted = {"training": {"accelerator": "H100", "gpus": 1}}
    assert cluster.max_gpus_per_node(Placement.model_validate(wanted)) == 4
    node = {"nodes": 1, "gpus": 8, "cpus": 96, "memory_gib": 500, "accelerator": "H100"}
    grown = Placement.model_validate(wanted | {"autoscaling": [node]})
    assert cluster.max_gpus_per_node(grown) == 4  # of a machine's own Ray
    monkeypatch.setenv("RAY_ADDRESS", "of a cluster")
    assert cluster.max_gpus_per_node(grown) == 8


def test_a_tensor_parallel_size_over_the_gpus_is_refused():
    with pytest.raises(ValueError, match="tensor_parallel 8 needs as many GPUs"):
        placed(gpus=4, tensor_parallel=8)


@pytest.mark.parametrize(("cores", "ray_cpus", "cpus"), [(1, None, 3), (8, None, 8), (8, 2, 2)])
def test_a_ray_on_two_cores_has_room_for_an_idle_engine_beside_a_training(
    monkeypatch, cores, ray_cpus, cpus
):
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: cores)
    placement = Placement(ray_cpus=ray_cpus)
    assert cluster.local_options(placement)["num_cpus"] == cpus
    beside = [placement.training.resources, placement.pools.student.resources]
    assert fits(beside, Resources(cpus=cpus, memory_gib=8)) == (cpus > 2)


def test_nodes_that_may_be_added_count_only_on_a_cluster(cpu_ray, monkeypatch):
    node = {"nodes": 1, "gpus": 8, "cpus": 96, "memory_gib": 500}
    wide = placed(gpus=8, tensor_parallel=8, cpus=8, memory_gib=64)
    grown = Placement.model_validate(wide.model_dump() | {"autoscaling": [node]})
    with pytest.raises(UserError, match="largest node has 0"):
        connect(grown)
    monkeypatch.setenv("RAY_ADDRESS", "of a cluster")  # Ray runs already and is not joined again
    connect(grown)
    with pytest.raises(UserError, match="largest node has 0"):
        connect(wide)


@pytest.mark.parametrize(
    ("address", "error", "expected"),
    [
        (
            None,
            Exception("The current node timed out during startup.\nThe GCS is overloaded."),
            "Ray did not start on this machine (The current node timed out during startup. The GCS "
            "is overloaded); try again when the machine is less busy",
        ),
        (
            "10.0.0.1:6379",
            ConnectionError(),
            "cannot join the Ray cluster at 10.0.0.1:6379 (ConnectionError); check RAY_ADDRESS",
        ),
    ],
)
def test_a_ray_that_cannot_start_or_be_joined_is_one_line_with_the_remedy(
    monkeypatch, address, error, expected
):
    def init(**_):
        raise error

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as refused:
        connect(Placement())
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)
