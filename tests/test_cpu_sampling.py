"""Sampling on a CPU: the distribution that vLLM's implementation has, in less time."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.utils import apply_penalties as vllm_penalties

from opencharacter.config import files
from opencharacter.config.placement import Pool
from opencharacter.engines import cpu_sampling, cpu_worker
from opencharacter.engines.backends import engine_arguments
from opencharacter.engines.spec import EngineSpec

VOCABULARY = 11
LARGEST = 1 - 2**-53
"""The largest number that `torch.rand` returns in float64."""


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def seeded(seeds: dict[int, int]) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(seed) for row, seed in seeds.items()}


@pytest.mark.parametrize(
    ("number", "expected"), [(0.0, 1), (0.24, 1), (0.25, 3), (0.74, 3), (0.75, 4), (LARGEST, 4)]
)
def test_the_token_is_the_first_whose_cumulative_probability_exceeds_the_number(number, expected):
    probabilities = torch.tensor([[0, 0.25, 0, 0.5, 0.25, 0]])
    uniform = torch.tensor([[number]], dtype=torch.float64)
    assert cpu_sampling.inverse_transform(probabilities, uniform).tolist() == [expected]


def test_the_last_token_of_many_is_found_although_float32_does_not_add_up_to_one():
    probabilities = torch.full((1, 50_000), 1 / 49_999)
    uniform = torch.tensor([[LARGEST]], dtype=torch.float64)
    assert cpu_sampling.inverse_transform(probabilities, uniform).tolist() == [49_999]


def test_infinite_logits_give_a_token_of_the_vocabulary():
    batch = logits(3)
    batch[0, 2], batch[1] = torch.inf, -torch.inf
    tokens, _ = cpu_sampling.sample(batch, {}, None, None)
    assert tokens.max() < VOCABULARY


def test_sampled_tokens_have_the_probabilities_of_the_softmax():
    rows, row = 20_000, logits(1)
    torch.manual_seed(1)
    tokens, processed = cpu_sampling.sample(row.repeat(rows, 1), {}, None, None)
    counts = torch.bincount(tokens, minlength=VOCABULARY)
    expected = rows * row.softmax(-1)[0]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 29.6  # the 0.1 % quantile for 10 degrees of freedom
    assert processed is None


def test_top_k_and_top_p_exclude_the_other_tokens():
    row = logits(1)
    order = row[0].argsort(descending=True).tolist()
    top_k, _ = cpu_sampling.sample(row.repeat(500, 1), {}, torch.full((500,), 2), None)
    top_p, _ = cpu_sampling.sample(row.repeat(500, 1), {}, None, torch.full((500,), 1e-6))
    assert set(top_k.tolist()) == set(order[:2])
    assert set(top_p.tolist()) == {order[0]}


def test_a_seeded_row_does_not_depend_on_its_place_or_on_other_rows():
    batch = logits(4)
    together, _ = cpu_sampling.sample(batch.clone(), seeded({1: 7, 3: 7}), None, None)
    alone, _ = cpu_sampling.sample(batch[3:].clone(), seeded({0: 7}), None, None)
    assert together[3] == alone[0]


@pytest.mark.parametrize("presence", [0.0, 0.5])
def test_penalties_are_those_of_vllm(presence):
    prompts = torch.tensor([[3, 3, 5], [1, VOCABULARY, VOCABULARY], [2, 4, VOCABULARY]])
    outputs, repetition = [[5, 9], [], [-1]], torch.tensor([1.3, 2.0, 1.0])
    generated = torch.tensor([[5, 9], [VOCABULARY] * 2, [VOCABULARY] * 2])
    zeros = torch.zeros(3)
    expected = vllm_penalties(logits(3), prompts, generated, zeros + presence, zeros, repetition)
    metadata = SimpleNamespace(
        no_penalties=False,
        prompt_token_ids=prompts,
        presence_penalties=zeros + presence,
        frequency_penalties=zeros,
        repetition_penalties=repetition,
    )
    torch.testing.assert_close(cpu_sampling.apply_penalties(logits(3), metadata, outputs), expected)


def test_engines_on_a_cpu_use_this_worker_and_others_do_not():
    role = files.load_recipe("demo").roles.student
    on_cpu, on_gpu = (engine_arguments(EngineSpec(role, Pool(gpus=n))) for n in (0, 1))
    module, _, name = on_cpu["worker_cls"].rpartition(".")
    assert (module, name) == (cpu_worker.__name__, cpu_worker.Worker.__name__)
    assert "worker_cls" not in on_gpu
