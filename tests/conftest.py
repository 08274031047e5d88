"""Shared fixtures: an recipes, storage, tiny models with random weights, one Ray per session."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from samples import ECHO_ROLE, FAKE_KEYS, Bucket, recipe_of

from opencharacter import models, pipeline
from opencharacter.config import files
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution import schema
from opencharacter.runtime.store import Store

# Ray workers import row functions from the test modules.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
)
# Credentials of the local S3 server. Ray workers inherit the environment in which Ray was started.
os.environ |= FAKE_KEYS
# Threads of torch that wait for each other sleep, as in the product's workers: other processes run.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SLOW_TEST_SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow and GPU tests a longer timeout, unless a test sets its own."""
    for item in items:
        slow = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        if slow and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TEST_SECONDS))


@pytest.fixture
def echo_recipe() -> Recipe:
    return recipe_of(ECHO_ROLE)


@pytest.fixture
def poet() -> schema.Constitution:
    return schema.load("poeticism")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "runs"))


@pytest.fixture
def make_jobs(store, poet):
    """Return a function that makes the jobs of a recipe in the storage of this test."""

    def make(recipe: Recipe, placement: Placement | None = None):
        return pipeline.jobs(recipe, [poet], placement or Placement(), store)

    return make


@pytest.fixture
def bucket():
    """An empty bucket on a local S3 server that can be stopped and restarted."""
    bucket = Bucket()
    bucket.start()
    bucket.create()
    yield bucket
    bucket.stop()


@pytest.fixture(scope="session")
def cpu_ray():
    """A local Ray cluster with two CPUs that all tests share."""
    import ray

    from opencharacter.runtime import cluster

    cluster.connect(Placement(ray_cpus=2))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    return models.embedded("smollm2-135m")


@pytest.fixture(scope="session")
def tokenizer(embedded_model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_model)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> Path:
    """A two-layer Llama with random weights and the tokenizer of the embedded model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny-model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory, tokenizer) -> Path:
    """A two-layer Gemma 3 with vision tower and random weights, saved under the published names."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 8, "sliding_window": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    path = tmp_path_factory.mktemp("tiny-gemma")
    Gemma3ForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    names = models.tensor_names(path / models.WEIGHTS)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in names
    return path


@pytest.fixture(scope="module")
def browser():
    """The installed Chromium, driven by Playwright. Without it the test is skipped."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs chromium: apt-get install -y chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def write_yaml(tmp_path: Path):
    """Return a function that writes a mapping as a YAML file and returns its path."""
    import yaml

    def write(name: str, data: object) -> str:
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
        return str(path)

    return write


@pytest.fixture
def demo_data() -> dict:
    """The demo recipe as a plain mapping, for tests that modify it."""
    path = files.resource("recipes", "demo.yaml")
    assert path is not None
    return files.read_yaml("recipe", path)


@pytest.fixture
def answering():
    """The recipe fields of a role whose endpoint is a local server that answers immediately."""
    import answering as servers

    server = servers.serve(servers.reply)
    yield {"endpoint": f"http://127.0.0.1:{server.server_port}/v1"}
    server.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path):
    """A folder on a filesystem of 1 MB. Without root, which mounting needs, the test is skipped."""
    import subprocess

    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small filesystem")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
