"""Replacing the weights of a running engine: its checks, real engines, and lost processes.

A fresh engine is the reference: after a swap, an engine must generate the same text.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch
import yaml
from process_tree import descendants, wait_for_descendants
from samples import embedded_recipe
from test_failures import check_complete, shard_files, start
from torch import nn

from opencharacter import cache, lora, pipeline
from opencharacter.config.placement import Placement, Pool, Resources
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Sampling
from opencharacter.constitution import schema
from opencharacter.engines import allocation
from opencharacter.engines.allocation import acquire
from opencharacter.engines.replicas import EngineClient
from opencharacter.engines.spec import EngineSpec
from opencharacter.engines.weights import (
    WeightsDiffer,
    WeightSwapping,
    add_to_group,
    check_compatible,
    check_sums,
    tensor_sums,
)
from opencharacter.runtime.store import RemoteDir, Store
from opencharacter.text.chat import user

save_file = pytest.importorskip("safetensors.torch").save_file

NORM, LINEAR = "model.layers.0.norm.weight", "model.layers.0.mlp.weight"
CHECKPOINT = {
    "model.embed_tokens.weight": torch.arange(12.0).reshape(4, 3),
    NORM: torch.ones(3),
    LINEAR: torch.linspace(-1, 1, 12).reshape(4, 3),
}


def write_checkpoint(folder: Path, tensors: dict | None = None, **config) -> Path:
    folder.mkdir()
    save_file(tensors or CHECKPOINT, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


# --------------------------------------------------------------------------------- before a swap


def test_checkpoints_that_differ_only_in_values_are_compatible(tmp_path):
    current = write_checkpoint(tmp_path / "current", _name_or_path="a")
    scaled = {name: tensor * 2 for name, tensor in CHECKPOINT.items()}
    check_compatible(current, write_checkpoint(tmp_path / "new", scaled, _name_or_path="b"))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model.layers.0.mlp.bias": torch.zeros(4)}, "mlp.bias"),
        ({LINEAR: torch.zeros(3, 4)}, "mlp.weight"),
        ({LINEAR: torch.zeros(4, 3, dtype=torch.bfloat16)}, "mlp.weight"),
    ],
)
def test_other_names_shapes_and_dtypes_are_refused(tmp_path, change, name):
    current = write_checkpoint(tmp_path / "current")
    with pytest.raises(WeightsDiffer, match=name):
        check_compatible(current, write_checkpoint(tmp_path / "new", {**CHECKPOINT, **change}))


def test_another_architecture_is_refused(tmp_path):
    current = write_checkpoint(tmp_path / "current")
    with pytest.raises(WeightsDiffer, match="model_type"):
        check_compatible(current, write_checkpoint(tmp_path / "new", model_type="qwen2"))


# ----------------------------------------------------------------------------------- after a swap


def sums_of(tensors: dict) -> dict:
    return {name: tensor_sums(tensor) for name, tensor in tensors.items()}


def groups_of(tensors: dict) -> dict:
    groups: dict = {}
    for name, sums in sums_of(tensors).items():
        add_to_group(groups, name, sums)
    return groups


def test_fused_and_padded_weights_have_the_sums_of_the_files():
    stored = {
        "model.layers.1.q_proj.weight": torch.randn(4, 3),
        "model.layers.1.k_proj.weight": torch.randn(2, 3),
        "model.embed_tokens.weight": torch.randn(5, 3),
    }
    query, key, embeddings = stored.values()
    fused = {
        "model.layers.1.qkv_proj.weight": torch.cat([query, key]),
        "model.embed_tokens.weight": torch.cat([embeddings, torch.zeros(3, 3)]),
    }
    check_sums([(sums_of(fused), groups_of(stored))])
    old = {**fused, "model.layers.1.qkv_proj.weight": torch.cat([query, key * 1.0001])}
    with pytest.raises(WeightsDiffer, match="in layer 1"):
        check_sums([(sums_of(old), groups_of(stored))])


def test_workers_that_share_a_model_have_its_sums_together():
    parts = [{NORM: CHECKPOINT[NORM], LINEAR: part} for part in CHECKPOINT[LINEAR].split(2)]
    stored = groups_of({name: CHECKPOINT[name] for name in (NORM, LINEAR)})
    check_sums([(sums_of(part), stored) for part in parts])
    with pytest.raises(WeightsDiffer):
        check_sums([(sums_of(part), stored) for part in parts[:1]])


class PackedLinear(nn.Linear):
    """A layer whose weights are packed for a kernel after they were loaded, as on a CPU."""

    class Method:
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def __init__(self) -> None:
        super().__init__(3, 4, bias=False)
        self.quant_method = PackedLinear.Method()


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_weights_that_are_packed_after_loading_are_verified_too(tmp_path, wrong):
    folder = write_checkpoint(tmp_path / "new", {"layers.0.weight": torch.ones(4, 3)})
    model = nn.ModuleDict({"layers": nn.ModuleList([PackedLinear()])})

    class Worker(WeightSwapping):
        class model_runner:
            get_model = staticmethod(lambda: model)

        class model_config:
            dtype, hf_text_config = torch.float32, None

        device = "cpu"

        def reload_weights(self, weights_path):
            layer = model["layers"][0]
            layer.weight = nn.Parameter(torch.ones(4, 3) + wrong)
            layer.quant_method.process_weights_after_loading(layer)

    Worker().swap_weights(str(folder))
    results = [Worker().swap_weights(str(folder))]  # a second swap, as in a long run
    with pytest.raises(WeightsDiffer) if wrong else contextlib.nullcontext():
        check_sums(results)


# ------------------------------------------------------------------------------------ real engines

ROOM = Resources(cpus=2, memory_gib=5)
SAMPLING = Sampling(max_tokens=16, temperature=0.8, top_p=1.0)


def write_adapter(model: Path, folder: Path, seed: int) -> Path:
    """Write a LoRA adapter with random weights for some layers of a model."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(0, config["num_hidden_layers"], 3):
        name = f"{lora.PEFT_PREFIX}model.layers.{layer}.mlp.down_proj"
        tensors[name + lora.LORA_A] = torch.randn(8, inner) / 30
        tensors[name + lora.LORA_B] = torch.randn(hidden, 8) / 30
    folder.mkdir(parents=True)
    save_file(tensors, folder / lora.ADAPTER_WEIGHTS)
    settings = {"r": 8, "lora_alpha": 16, "peft_type": "LORA"}
    (folder / lora.ADAPTER_CONFIG).write_text(json.dumps(settings))
    return folder


def replies(job: str, spec: EngineSpec, report=lambda _: None) -> tuple[list[str], dict]:
    """Acquire an engine; return its replies to two questions, and the resource usage."""
    questions = ("What does the sea say at night?", "Name a good friend.")

    async def reply(client: EngineClient) -> list[str]:
        answers = [client.reply([user(q)], SAMPLING, seed=7) for q in questions]
        return [answer.text for answer in await asyncio.gather(*answers)]

    with acquire(job, [spec], ROOM, report) as allocated:
        replicas = allocated.replicas(spec)
        assert replicas is not None
        texts = asyncio.run(reply(EngineClient(replicas)))
    return texts, allocation.resource_usage(job)


@pytest.mark.slow
def test_outputs_after_a_swap_equal_those_of_a_fresh_engine_even_if_one_is_killed(
    cpu_ray, embedded_model, tmp_path, capsys
):
    role = Recipe.model_validate(embedded_recipe()).roles.student
    # One sequence at a time: how a CPU rounds depends on the number of sequences in a step.
    base = EngineSpec(role.model_copy(update={"max_model_len": 512}), Pool(max_num_seqs=1))
    write_adapter(embedded_model, tmp_path / "persona/merge/adapter", seed=1)
    full = EngineSpec(
        base.role, base.pool, RemoteDir(Store(str(tmp_path)), "persona/merge/adapter")
    )

    base_texts, started = replies("base", base)
    full_texts, swapped = replies("full", full)
    again_texts, back = replies("again", base)
    assert full_texts != base_texts
    assert again_texts == base_texts
    assert started["engines_started"] == [base.label]
    assert (swapped["engines_started"], swapped["engines_swapped"]) == ([], [full.label])
    assert (back["engines_started"], back["engines_swapped"]) == ([], [base.label])
    assert 0 < swapped["swap_seconds"] < started["starting_seconds"]

    # The engine hangs during the next swap, and its actor is killed.
    core, actor = only_process("EngineCore"), only_process("ray::EngineActor")
    assert descendants(raylets(), "VLLM::Worker") == []  # the engine runs the model itself
    core.suspend()

    def kill(preparation: str) -> None:
        if preparation == "swapping weights":
            threading.Timer(2, actor.send_signal, [signal.SIGKILL]).start()

    fresh_texts, restarted = replies("fresh", full, kill)
    assert fresh_texts == full_texts
    assert (restarted["engines_started"], restarted["engines_swapped"]) == ([full.label], [])
    assert "an engine is started" in capsys.readouterr().out
    with contextlib.suppress(psutil.NoSuchProcess):
        core.resume()
    allocation.stop_unused_engines()


def only_process(title: str) -> psutil.Process:
    """The process of Ray with a title, of which there is one."""
    (process,) = wait_for_descendants(raylets(), title)
    return process


def raylets() -> list[int]:
    return [
        process.pid
        for process in descendants([os.getpid()], "raylet")
        if process.name() == "raylet"
    ]


class Answering:
    """A run of a persona's evaluation/answers, which replaces its engine's weights once.

    Args:
        folder: the working folder, with a storage and a cache of its own.
        model: folder of the embedded model.
    """

    def __init__(self, folder: Path, model: Path):
        folder.mkdir()
        data = embedded_recipe()
        data["evaluation"]["answers"] |= {
            "conditions": ["base", "prompted", "full"],
            "count": 4,
        }
        (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
        recipe, store = Recipe.model_validate(data), Store(str(folder / "runs/tiny"))
        jobs = pipeline.jobs(recipe, [schema.load("poeticism")], Placement(), store)
        by_name = {job.stage.name: job for job in jobs}
        prompts = by_name["distillation/prompts"]
        store.write_table(prompts.dataset, pa.table({"id": ["1"], "prompt": ["Hello?"]}))
        write_adapter(model, by_name["persona/merge"].adapter.local(), seed=2)
        self.folder, self.store, self.job = folder, store, by_name["evaluation/answers"]
        self.cache = folder / "cache"
        shutil.copytree(cache.cache_dir() / "models", self.cache / "models")
        compiled = str(cache.cache_dir() / "vllm")
        self.environment = {"OPENCHARACTER_CACHE": str(self.cache), "VLLM_CACHE_ROOT": compiled}

    def start(self, placement: dict, **environment: str) -> subprocess.Popen[str]:
        # One conversation at a time, so that a repeated run has the same ones in each step, and
        # room for one engine, so that its weights are replaced.
        placement = {"pools": {"student": {"max_num_seqs": 1, "cpus": 1.2}}, **placement}
        (self.folder / "few.yaml").write_text(yaml.safe_dump(placement))
        environment = {**self.environment, **environment}
        return start(self.folder, f"{self.job.stage.name}@persona", "few.yaml", **environment)

    def await_swap(self, process: subprocess.Popen[str]) -> None:
        """Wait for the beginning of the swap, where the adapter is merged."""
        start_time = time.monotonic()
        while not (self.cache / "merged").is_dir():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() - start_time < 300
            time.sleep(0.02)

    def finish(self, process: subprocess.Popen[str]) -> tuple[dict, list[str]]:
        """Return the manifest and the answers, each id exactly once."""
        manifest = check_complete(self.folder, self.job.dataset, 8, process)
        rows = self.store.read_table(self.job.dataset).sort_by("id")
        return manifest, rows["answer"].to_pylist()


@pytest.fixture(scope="module")
def undisturbed(embedded_model, tmp_path_factory) -> list[str]:
    """The answers of a run that nothing disturbed."""
    run = Answering(tmp_path_factory.mktemp("undisturbed") / "run", embedded_model)
    manifest, answers = run.finish(run.start({"ray_cpus": 2}))
    assert (len(manifest["engines_started"]), len(manifest["engines_swapped"])) == (1, 1)
    return answers


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_during_a_swap_resumes_with_the_same_answers(
    undisturbed, embedded_model, tmp_path
):
    run = Answering(tmp_path / "run", embedded_model)
    process = run.start({"ray_cpus": 2})
    run.await_swap(process)
    process.kill()
    process.wait()
    assert shard_files(run.folder, run.job.dataset) == []
    assert list((run.folder / "runs/tiny" / run.job.dataset / ".shards/prompted").glob("*.parquet"))
    manifest, answers = run.finish(run.start({"ray_cpus": 2}))
    assert (len(manifest["engines_started"]), manifest["engines_swapped"]) == (1, [])
    assert answers == undisturbed
