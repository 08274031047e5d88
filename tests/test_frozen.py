"""Products with frozen weights: the rounding error of FP8, and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from opencharacter.config.recipe import Lora
from opencharacter.errors import UserError
from opencharacter.training import adapters
from opencharacter.training.frozen import (
    Fp8Weight,
    InputCache,
    LoraProduct,
    PlainWeight,
    fuse_lora,
    quantize_linear,
    quantize_rows,
)

SCALING = 2.0


def load_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def peft_model(path):
    """A model with an adapter that has an effect, the same at each call."""
    torch.manual_seed(0)
    model = adapters.add_lora(load_model(path), Lora(rank=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def layer():
    """An input (2, 5, 64), a weight (32, 64) and adapter matrices of rank 4, with gradients."""
    torch.manual_seed(0)
    x, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 64), (4, 64), (32, 4)))
    return x, torch.randn(32, 64), a, b


def plain(x, weight, a, b):
    """The layer as separate operations."""
    return x @ weight.T + SCALING * ((x @ a.T) @ b.T)


def relative(approximate: torch.Tensor, exact: torch.Tensor) -> float:
    return float((approximate - exact).detach().norm() / exact.detach().norm())


def gradients(output: torch.Tensor, inputs) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(output, inputs, torch.randn_like(output)))


def test_each_row_keeps_its_largest_value_whatever_the_scale_of_the_others():
    matrix = torch.tensor([[1e-4, -5e-5], [300.0, 1.0], [0.0, 0.0]])
    values, scales = quantize_rows(matrix)
    restored = values.float() * scales
    assert torch.allclose(restored.abs().amax(1), matrix.abs().amax(1))
    assert restored[2].tolist() == [0, 0]


def test_the_fused_layer_and_its_gradients_equal_the_separate_operations(layer):
    x, weight, a, b = layer
    fused, exact = LoraProduct.apply(x, a, b, PlainWeight(weight), x.dtype, SCALING), plain(*layer)
    assert torch.allclose(fused, exact, atol=1e-5)
    for mine, theirs in zip(gradients(fused, (x, a, b)), gradients(exact, (x, a, b)), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_an_fp8_layer_is_off_by_rounding_alone(layer):
    x, weight, a, b = layer
    quantized = LoraProduct.apply(x, a, b, Fp8Weight(weight, InputCache()), x.dtype, SCALING)
    exact = plain(*layer)
    assert 0 < relative(quantized, exact) < 0.05
    mine, theirs = gradients(quantized, (x, a, b)), gradients(exact, (x, a, b))
    assert 0 < relative(mine[0], theirs[0]) < 0.05
    for adapter, expected in zip(mine[1:], theirs[1:], strict=True):
        assert torch.allclose(adapter, expected, atol=1e-4)  # no FP8 in the adapter's gradients


def test_an_input_is_quantized_again_once_it_has_changed():
    cache, x = InputCache(), torch.randn(4, 16)
    first = cache.quantized(x)
    assert cache.quantized(x) is first
    assert cache.quantized(x.view(4, 16)) is first
    x.mul_(2)
    assert cache.quantized(x) is not first


def test_a_model_that_is_only_read_may_run_in_inference_mode():
    cache = InputCache()
    with torch.inference_mode():
        x = torch.randn(4, 16)
        assert cache.quantized(x) is not cache.quantized(x)


def test_peft_layers_keep_their_outputs_and_gradients_when_they_are_fused(tiny_model):
    model, fused = peft_model(tiny_model), peft_model(tiny_model)
    fuse_lora(fused, fp8=False)
    ids = torch.arange(3, 23)[None]
    for one in (model, fused):
        one(input_ids=ids, labels=ids).loss.backward()
    mine, theirs = (
        {n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (fused, model)
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in mine)


def test_weights_that_are_kept_in_bf16_give_the_loss_and_gradients_of_autocast(tiny_model):
    models = peft_model(tiny_model), peft_model(tiny_model)
    fuse_lora(models[0])
    fuse_lora(models[1], keep_in=torch.bfloat16)
    ids, results = torch.arange(3, 23)[None], []
    for model in models:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_fp8_moves_the_loss_by_little_and_releases_the_weights(tiny_model):
    model, quantized = peft_model(tiny_model), peft_model(tiny_model)
    fuse_lora(quantized, fp8=True)
    ids = torch.arange(3, 23)[None]
    losses = [float(m(input_ids=ids, labels=ids).loss.detach()) for m in (model, quantized)]
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.02
    frozen = [m.base_layer.weight for m in quantized.modules() if hasattr(m, "lora_A")]
    assert {weight.numel() for weight in frozen} == {0}


def test_a_model_that_is_only_read_runs_in_fp8_too(tiny_model):
    model, quantized = (load_model(tiny_model) for _ in range(2))
    quantize_linear(quantized, adapters.adapted_layers(quantized))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        exact, rounded = (
            torch.log_softmax(m(input_ids=ids).logits, -1) for m in (model, quantized)
        )
    assert 0 < float((exact - rounded).abs().mean()) < 0.05


def test_a_layer_whose_shape_fp8_does_not_support_is_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(20, 32))
    with pytest.raises(UserError, match=r"multiples of 16, but 0 is \(32, 20\).*bf16"):
        quantize_linear(model, ["0"])
