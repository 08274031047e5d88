import shutil
import threading
import time
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opencharacter import cache, models
from opencharacter.config.placement import Training
from opencharacter.config.recipe import Lora
from opencharacter.config.roles import Role
from opencharacter.errors import UserError
from opencharacter.training import adapters, packing, trainer
from opencharacter.training.packing import Tokens

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
        base_adapter=None,
        store=SimpleNamespace(read_table=lambda _: rows),
        data="rows",
        make_examples=lambda *_: [],
    )
    with pytest.raises(UserError, match=r"no weight for model\.language_model\.layers\.0.*up_proj"):
        trainer.train_loop_per_worker({"task": task})


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
