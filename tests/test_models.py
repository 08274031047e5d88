import json
import os
import shutil
import threading
import time
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import ECHO_ROLE, TINY
from transformers import AutoModelForCausalLM

from opencharacter import cache, models
from opencharacter.config.placement import Training
from opencharacter.config.recipe import Lora, Recipe
from opencharacter.config.roles import Role
from opencharacter.errors import UserError
from opencharacter.runtime import manifests
from opencharacter.runtime.stage import StageResult
from opencharacter.runtime.staleness import explain_stale
from opencharacter.text.templates import load_tokenizer
from opencharacter.training import adapters, packing, trainer
from opencharacter.training.packing import Tokens

ECHO_ROLES = dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), ECHO_ROLE)
IDS = [2, *range(5, 25)]


def student(tiny_gemma) -> Any:
    role = Role(model=str(tiny_gemma), name="gemma", self_name="Gemma")
    return adapters.load(tiny_gemma, role, on_gpu=False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits


def test_only_the_decoder_of_a_multimodal_model_is_trained(tiny_gemma):
    made = student(tiny_gemma)
    stock = logits(AutoModelForCausalLM.from_pretrained(tiny_gemma)).log_softmax(-1)
    adapted = adapters.add_lora(made, Lora(rank=4, alpha=8)).train()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7  # A and B of seven layers in two blocks
    assert all(".language_model.layers." in name for name in trained)
    loss_positions = list(range(1, len(IDS)))
    computed = packing.log_probs(adapted, packing.pack([[Tokens(IDS, loss_positions)]]))
    expected = stock[0, :-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    assert torch.allclose(computed, expected, atol=1e-4)
    computed.sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_its_adapter_applies_to_the_stock_model_and_merges_into_its_files(
    tiny_gemma, tmp_path, monkeypatch, recwarn
):
    from peft import PeftModel

    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    adapted = adapters.add_lora(student(tiny_gemma), Lora(rank=4, alpha=8))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(tiny_gemma)
    before = logits(stock)
    applied = logits(PeftModel.from_pretrained(stock, tmp_path / "adapter"))
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    folder = models.merge_into_base(tiny_gemma, tmp_path / "adapter")
    merged = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.allclose(merged, applied, atol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-2)
    old, new = (load_file(path / models.WEIGHTS) for path in (tiny_gemma, folder))
    assert old.keys() == new.keys()
    changed = [name for name in old if not old[name].equal(new[name])]
    assert len(changed) == 2 * 7
    assert all(name.startswith("language_model.model.layers.") for name in changed)


def test_a_model_without_plain_weights_is_refused_before_training(tiny_gemma, tmp_path):
    shutil.copytree(tiny_gemma, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tiny_gemma / models.WEIGHTS)
    odd = {name.replace("up_proj.weight", "up_proj.qweight"): t for name, t in tensors.items()}
    save_file(odd, tmp_path / models.WEIGHTS, metadata={"format": "pt"})
    rows = pa.table({"id": ["a"], "drop_reason": pa.array([None], pa.string())})
    task = SimpleNamespace(
        placement=Training(),
        role=Role(model=str(tmp_path), name="odd", self_name="Odd"),
        config=SimpleNamespace(held_out=0),
        base_adapter=None,
        store=SimpleNamespace(read_table=lambda _: rows),
        data="rows",
        make_examples=lambda *_: [],
    )
    with pytest.raises(UserError, match=r"no weight for model\.language_model\.layers\.0.*up_proj"):
        trainer.train_loop_per_worker(task)


def test_concurrent_requests_create_a_folder_once(tmp_path):
    created = []

    def make(folder):
        time.sleep(0.1)
        (folder / "file").write_text("whole")
        created.append(folder)

    threads = [
        threading.Thread(target=cache.create_once, args=(tmp_path / "target", make))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_failed_folder_is_created_by_the_next_request(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cache.create_once(tmp_path / "target", lambda _: 1 / 0)
    assert list(tmp_path.iterdir()) == []
    assert cache.create_once(tmp_path / "target", lambda _: None).is_dir()


def local_recipe(model, **fields) -> Recipe:
    role = {"model": str(model), "name": "local", "self_name": "Local", "max_model_len": 2048}
    roles = ECHO_ROLES | {"student": role | fields}
    return Recipe.model_validate(TINY | {"roles": roles})


@pytest.fixture
def local_model(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(tiny_model, tmp_path / "model")


def job_of(make_jobs, recipe: Recipe, name: str):
    return next(job for job in make_jobs(recipe) if job.stage.name == name)


def test_a_byte_changed_in_local_weights_makes_their_datasets_stale(local_model, make_jobs):
    before = job_of(make_jobs, local_recipe(local_model), "distillation/student")
    assert before.fingerprint == job_of(make_jobs, before.recipe, before.stage.name).fingerprint
    manifests.finish(before, StageResult(0), 0, {})
    with (local_model / models.WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    (local_model / "README.md").write_text("decides nothing")
    state, differences = job_of(make_jobs, before.recipe, before.stage.name).state()
    assert state == "stale"
    assert [line.partition(":")[0] for line in differences] == [
        "roles.student.weights.model.safetensors"
    ]
    assert explain_stale(differences) == (
        "made from other weights (model.safetensors of the student has changed)"
    )
    other = job_of(make_jobs, before.recipe, "distillation/teacher")
    assert "weights" not in other.payload["roles"]["teacher"]


def test_endpoints_and_missing_paths_have_no_content(local_model):
    role = Role(model=str(local_model), name="local", self_name="Local")
    assert sorted(models.identity(role)["weights"]) == sorted(
        path.name for path in local_model.iterdir()
    )
    endpoint = role.model_copy(update={"endpoint": "http://localhost/v1"})
    missing = role.model_copy(update={"model": str(local_model / "none")})
    assert "weights" not in models.identity(endpoint) | models.identity(missing)


def test_an_unchanged_file_is_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_text("first")
    read = []
    monkeypatch.setattr(cache, "file_hash", lambda path: read.append(path) or str(len(read)))
    assert [cache.cached_file_hash(file) for _ in range(2)] == ["1", "2"]  # it is too young
    os.utime(file, (1, 1))
    assert [cache.cached_file_hash(file) for _ in range(2)] == ["3", "3"]
    os.utime(file, (2, 2))
    assert cache.cached_file_hash(file) == "4"


def test_a_file_of_the_hub_is_not_read(tmp_path):
    blob = tmp_path / "models--a--b" / "blobs" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.touch()
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert cache.cached_file_hash(tmp_path / "model.safetensors") == "ab" * 32


def test_the_manifest_records_the_commit_of_a_hub_model(tmp_path, make_jobs, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--a--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = local_recipe("a/model", revision="v2")
    job = job_of(make_jobs, recipe, "distillation/student")
    manifest = manifests.finish(job, StageResult(0), 0, {})
    assert manifest["model_commits"] == {"student": commit}
    assert job.payload["roles"]["student"]["revision"] == "v2"
    unpinned = job_of(make_jobs, local_recipe("a/model"), "distillation/student")
    assert "revision" not in unpinned.payload["roles"]["student"]
    seen = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda model, **options: seen.update(options) or str(tmp_path),
    )
    models.resolve_role(recipe.roles.student)
    assert seen["revision"] == "v2"
    with pytest.raises(ValueError, match="revision 'v2' is for models on the Hugging Face Hub"):
        local_recipe("/models/model", revision="v2")


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<file_sep>\n{% endfor %}"


def test_a_role_can_have_a_chat_template_of_its_own(local_model, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    fields = {"model": str(local_model), "name": "local", "self_name": "Local"}
    role = Role.model_validate(fields | {"chat_template": str(tmp_path / "own.jinja")})
    assert role == Role.model_validate(fields | {"chat_template": TEMPLATE})
    folder = models.resolve_role(role)
    tokenizer = load_tokenizer(folder, role)
    assert tokenizer.chat_template == TEMPLATE
    end = tokenizer.convert_tokens_to_ids("<file_sep>")
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == sorted([end, tokenizer.eos_token_id])
    assert (folder / models.WEIGHTS).samefile(local_model / models.WEIGHTS)
    assert models.resolve_role(role) == folder
    assert load_tokenizer(local_model, role).chat_template == TEMPLATE
    with pytest.raises(ValueError, match="neither a readable file"):
        Role.model_validate(fields | {"chat_template": "missing.jinja"})


def test_a_gguf_file_is_a_model(tmp_path, embedded_model, monkeypatch):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    role = Role(model=str(path), name="small", self_name="Small")
    assert models.missing_requirement(role) == f"weights at {path}"
    with pytest.raises(UserError, match="no config"):
        models.resolve_role(role)
    path.symlink_to(models.embedded_gguf("smollm2-135m"))
    assert models.missing_requirement(role) is None
    assert models.local_weights(role.model) is None
    monkeypatch.setattr(
        models,
        "convert_gguf",
        lambda _, target: shutil.copytree(embedded_model, target, dirs_exist_ok=True),
    )
    folder = models.resolve_role(role)
    assert models.local_weights(role.model) == folder
    assert folder.name.startswith("small-")
    assert list(models.identity(role)["weights"]) == ["small.gguf"]
