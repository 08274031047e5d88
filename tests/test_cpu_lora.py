"""Adapters at run time on a CPU: each row gets its own adapter, and rows without one get none."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from opencharacter.engines import cpu_lora

RANK, WIDTH, OUT, SCALE = 8, 24, 16, 1.5
FACTORS = torch.Generator().manual_seed(0)
A = torch.randn(2, 1, RANK, WIDTH, generator=FACTORS)
B = torch.randn(2, 1, OUT, RANK, generator=FACTORS)
X = torch.randn(6, WIDTH, generator=FACTORS)
MIXED = [0, 12, 11, 11, 0, 12]
"""Ids of the adapters of six tokens; 0 for none. Both slots of the batch are filled."""


def wrapper(tokens: list[int], samples: list[int]) -> cpu_lora.GroupedLora:
    made = cpu_lora.GroupedLora(64, 8, "cpu")
    mapping = SimpleNamespace(index_mapping=tokens, prompt_mapping=samples, is_prefill=True)
    made.update_metadata(mapping, [11, 12], 2, 1000)
    return made


def products(ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the adapters add to each row, computed one row at a time."""
    rows = [
        SCALE * x @ A[i - 11, 0].T @ B[i - 11, 0].T if i else torch.zeros(OUT)
        for i, x in zip(ids, X, strict=False)
    ]
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("ids", [MIXED, [0] * 6, [12] * 6, [11, 12, 0, 0, 0, 11]])
def test_each_token_gets_its_own_adapter_and_none_if_it_has_none(ids):
    out = torch.ones(6, OUT)
    wrapper(ids, ids).add_lora_linear(out, X, (A,), (B,), SCALE, (OUT,))
    torch.testing.assert_close(out, 1 + products(ids))


def test_fused_projections_add_to_their_own_slices():
    out = torch.zeros(6, 2 * OUT)
    halves = (OUT, OUT)
    wrapper(MIXED, MIXED).add_lora_linear(out, X, (A, 2 * A), (B, B), SCALE, halves)
    torch.testing.assert_close(out, torch.cat([products(MIXED), 2 * products(MIXED)], 1))


def test_logits_get_the_adapters_of_the_sampled_rows_without_padding():
    sampled = [12, 0, 11]
    padded = torch.cat([B, torch.ones(2, 1, 3, RANK)], 2)
    logits = torch.zeros(3, OUT)
    wrapper(MIXED, sampled).add_lora_logits(logits, X[:3], A, padded, SCALE)
    torch.testing.assert_close(logits, products(sampled))


def test_bfloat16_adapters_are_added_within_the_precision_of_their_type():
    out = torch.zeros(6, OUT, dtype=torch.bfloat16)
    a, b = (A.bfloat16(),), (B.bfloat16(),)
    wrapper(MIXED, MIXED).add_lora_linear(out, X.bfloat16(), a, b, SCALE, (OUT,))
    expected = products(MIXED)
    assert (out.float() - expected).abs().max() < 0.02 * expected.abs().max()
