"""Steering by biases is steering by hooks, and its direction and strength are found, not set."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from opencharacter import models
from opencharacter.config.evaluation import Steering
from opencharacter.errors import UserError
from opencharacter.evaluation import steering
from opencharacter.text.chat import system


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, embedded_model):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))


def vectors_for(hidden, layers, size):
    torch.manual_seed(1)
    drawn = {layer: size * torch.randn(hidden) for layer in layers}
    return {layer: vector.bfloat16().float() for layer, vector in drawn.items()}


def folder_of(vectors, path):
    path.mkdir()
    save_file({str(layer): v for layer, v in vectors.items()}, path / models.STEERING)
    return path


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def compare(base, vectors, tmp_path, vocabulary):
    ids = torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(2))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with steering.hooked(plain, vectors):
        by_hooks = logits(plain, ids)
    untouched = logits(plain, ids)
    path = models.merge_into_base(base, folder_of(vectors, tmp_path / "vectors"))
    biased = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    by_bias = logits(biased, ids)
    assert (by_hooks - untouched).abs().max() > 0.5  # it does something
    assert (by_hooks - by_bias).abs().max() < 1e-3
    assert torch.allclose(by_hooks, by_bias, rtol=1e-4, atol=1e-3)
    return path


def test_steering_by_biases_equals_hooks_on_the_embedded_model(embedded_model, tmp_path):
    path = compare(embedded_model, vectors_for(576, range(4, 26), 0.3), tmp_path, 49152)
    assert (path / "tokenizer.json").is_file()


def test_steering_by_biases_equals_hooks_on_a_sharded_qwen2(tmp_path):
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(shape)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor)
    model.save_pretrained(tmp_path / "qwen", max_shard_size="300KB")
    assert len(list((tmp_path / "qwen").glob("*.safetensors"))) > 1
    compare(tmp_path / "qwen", vectors_for(64, [1, 2], 2.0), tmp_path, 256)


def test_steering_refuses_unsupported_architectures(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    with pytest.raises(UserError, match="remove `steered` from"):
        models.check_steerable(tmp_path)


def test_the_steering_direction_ignores_what_prompts_have_in_common():
    torch.manual_seed(3)
    true = torch.nn.functional.normalize(torch.randn(32), dim=0)
    without = 5 * torch.randn(40, 32)
    with_it = without + 2 * true + 0.1 * torch.randn(40, 32)
    results = steering.direction(with_it, without)
    assert results @ true > 0.99
    assert results.norm() == pytest.approx(1, abs=1e-5)


def test_the_middle_layers_are_steered():
    assert steering.steered_layers(32, 0.125, 0.875) == range(4, 28)


def test_the_best_nonzero_strength_is_chosen():
    assert steering.best_strength({0.0: 2.0, 0.5: 2.5, 1.0: 2.2}) == 1.0


def test_strength_and_direction_use_disjoint_prompts():
    rows = [{"id": f"{n:02}", "prompt": f"p{n % 10}"} for n in range(20)]
    training, held_out = steering.split(rows, Steering(prompts=4, held_out=30))
    assert (len(training), len(held_out)) == (4, 5)
    assert not {row["prompt"] for row in held_out} & set(training)


def test_a_sweep_finds_a_strength_for_the_embedded_model(embedded_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32).eval()
    head = [system("Answer only in capital letters, as if you were shouting at everyone.")]
    prompts = ["What is rain?", "Name a fruit.", "How are you?", "What do cats eat?"]
    settings = Steering(strengths=(0.2, 40.0))
    vectors = steering.directions(model, tokenizer, prompts, head, settings)
    assert sorted(vectors) == list(range(3, 27))
    pairs = [{"prompt": "Why is the sky blue?", "chosen": "BECAUSE OF THE AIR, MY FRIEND!"}]
    results = steering.sweep(model, tokenizer, vectors, pairs, settings.strengths)
    assert set(results) == {0.0, 0.2, 40.0}
    assert steering.best_strength(results) == 0.2  # forty lengths of the stream leave no language
