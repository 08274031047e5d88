"""What makes starts short, and work fast on cores that other processes use too."""

import os

import pytest
import ray
from samples import ECHO_ROLE

from opencharacter import models
from opencharacter.config.placement import Placement, Pool
from opencharacter.config.roles import Role
from opencharacter.engines.backends import cache_environment, engine_arguments, environment
from opencharacter.engines.spec import EngineSpec
from opencharacter.errors import UserError
from opencharacter.runtime import cluster
from opencharacter.runtime.cluster import GIB


def test_compiled_graphs_are_kept_in_the_cache_of_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path))
    folders = {
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torchinductor"),
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path / "flashinfer"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    for name in folders:
        monkeypatch.delenv(name, raising=False)
    assert cache_environment() == folders


def test_folders_that_the_environment_sets_are_used(monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/fast/vllm")
    assert cache_environment()["VLLM_CACHE_ROOT"] == "/fast/vllm"


@pytest.mark.parametrize("chosen", [None, "1"])
def test_a_gpu_host_compiles_no_sampler_unless_the_environment_asks_for_it(monkeypatch, chosen):
    name = "VLLM_USE_FLASHINFER_SAMPLER"
    monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(name, chosen)
    spec = EngineSpec(Role(**ECHO_ROLE), Pool(gpus=1))
    assert environment(spec)[name] == (chosen or "0")


@pytest.mark.parametrize(
    ("address", "chosen", "policy"),
    [("", None, "PASSIVE"), ("", "ACTIVE", "ACTIVE"), ("10.0.0.1:6379", None, None)],
)
def test_waiting_threads_sleep_in_a_ray_that_a_command_starts(monkeypatch, address, chosen, policy):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("OMP_WAIT_POLICY", chosen or "")
    if chosen is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    for name in cluster.CPU_ENVIRONMENT | cluster.LOCAL_ENVIRONMENT:
        if name != "OMP_WAIT_POLICY":
            monkeypatch.setenv(name, "")  # so that the test's end restores it
    found = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: found.append(os.environ.get("OMP_WAIT_POLICY")))
    monkeypatch.setattr(cluster, "node_resources", lambda _: [])
    monkeypatch.setattr(cluster, "check_fits", lambda *_: None)
    cluster.connect(Placement())
    assert found == [policy]


def test_processes_keep_freed_memory_in_a_ray_without_gpus():
    on_gpu = Placement.model_validate({"training": {"gpus": 1}})
    names = {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX"}
    assert names <= cluster.local_environment(Placement()).keys()
    assert names.isdisjoint(cluster.local_environment(on_gpu))


@pytest.mark.parametrize(
    ("dtype", "gpus", "fast", "memory_gib", "expected"),
    [
        ("auto", 0, False, 2, "float32"),
        ("auto", 0, True, 2, "auto"),  # bf16 is faster where the hardware multiplies it
        ("auto", 0, False, 1, "auto"),  # float32 would not fit
        ("auto", 1, False, 2, "auto"),
        ("bfloat16", 0, False, 2, "bfloat16"),
    ],
)
def test_engines_take_the_faster_data_type_of_a_cpu(
    monkeypatch, tmp_path, dtype, gpus, fast, memory_gib, expected
):
    monkeypatch.setattr(models, "fast_bf16", lambda: fast)
    footprint = models.MemoryFootprint(weights=GIB, per_token=1)
    monkeypatch.setattr(models, "memory_footprint", lambda _: footprint)
    role = Role(**ECHO_ROLE | {"model": "org/model", "dtype": dtype})
    spec = EngineSpec(role, Pool(gpus=gpus, memory_gib=memory_gib))
    assert engine_arguments(spec, tmp_path)["dtype"] == expected
    assert engine_arguments(spec)["dtype"] == dtype  # for `plan`, which knows no machine


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (8, 4), (64, 8)])
def test_an_engine_on_a_cpu_has_a_thread_for_every_second_core(monkeypatch, cores, threads):
    monkeypatch.setattr("joblib.cpu_count", lambda: cores)
    role = Role(**ECHO_ROLE)
    assert environment(EngineSpec(role, Pool()))["OMP_NUM_THREADS"] == str(threads)
    assert "OMP_NUM_THREADS" not in environment(EngineSpec(role, Pool(gpus=1)))


def test_a_quantized_model_has_an_engine_of_its_own_that_keeps_its_weights():
    role = Role(**ECHO_ROLE | {"model": "org/model"})
    fp8 = role.model_copy(update={"quantization": "fp8"})
    plain, quantized = (EngineSpec(each, Pool(gpus=1)) for each in (role, fp8))
    assert "quantization" not in engine_arguments(plain)
    assert engine_arguments(quantized)["quantization"] == "fp8"
    assert plain.key() != quantized.key()
    assert plain.swap_group
    assert not quantized.swap_group  # replaced weights could not be verified
    with pytest.raises(UserError, match="needs a GPU"):
        engine_arguments(EngineSpec(fp8, Pool()))
