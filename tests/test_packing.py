"""Packing: no token is lost or padded, and sequences do not attend to each other."""

import itertools
import random

import pytest
import torch

from opencharacter.config.recipe import Lora, Optimizer
from opencharacter.config.roles import Role
from opencharacter.training import adapters, packing
from opencharacter.training.batches import PackedBatches
from opencharacter.training.packing import Tokens

ROLE = Role(model="tiny", name="tiny", self_name="Tiny")


@pytest.fixture(scope="module")
def model(tiny_model):
    return adapters.load(tiny_model, ROLE, on_gpu=False).eval()


def sequence(size: int, seed: int = 0) -> Tokens:
    ids = random.Random(size + seed).choices(range(100, 40_000), k=size)
    return Tokens(ids, [i for i in range(1, size) if i % 3])


def scores(model, *examples):
    with torch.no_grad():
        return packing.log_probs(model, packing.pack(examples))


def test_packing_does_not_change_the_logits_of_a_sequence(model, tiny_model):
    from transformers import AutoModelForCausalLM

    examples = [[sequence(20)], [sequence(41), sequence(7)], [sequence(33)]]
    packed = scores(model, *examples)
    alone = torch.cat([scores(model, [tokens]) for example in examples for tokens in example])
    assert torch.allclose(packed, alone, atol=1e-5)

    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = []
    for tokens in (tokens for example in examples for tokens in example):
        with torch.no_grad():
            rows = plain(torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
        expected += [rows[i - 1, tokens.ids[i]] for i in tokens.loss_positions]
    assert torch.allclose(packed, torch.stack(expected), atol=1e-5)


def test_sequences_in_a_pack_do_not_attend_to_each_other(model):
    example = [sequence(30)]
    first = scores(model, [sequence(25, seed=1)], example)
    second = scores(model, [sequence(25, seed=2)], example)
    size = len(example[0].loss_positions)
    assert torch.equal(first[-size:], second[-size:])
    assert not torch.equal(first[:-size], second[:-size])


def test_a_sliding_window_hides_earlier_tokens():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 12, 8) for _ in range(3))
    whole = packing.sequence_by_sequence(query, key, value, [0, 12], None, None)
    window = packing.sequence_by_sequence(query, key, value, [0, 12], None, 4)
    last = packing.sequence_by_sequence(
        query[:, :, 8:], key[:, :, 8:], value[:, :, 8:], [0, 4], None, None
    )
    assert torch.allclose(window[:, :, :4], whole[:, :, :4], atol=1e-6)
    assert torch.allclose(window[:, :, -1], last[:, :, -1], atol=1e-6)


def test_padded_sequences_get_the_same_attention_and_gradients_as_single_ones():
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = [0, 9, 21, 28]
    shapes = ((1, 6, 28, 8), (1, 2, 28, 8), (1, 2, 28, 8))
    states = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    weights = torch.randn(1, 6, 28, 8, generator=generator)
    results, (query, key, value) = [], states
    for compute in (packing.padded, packing.sequence_by_sequence):
        output = compute(query, key, value, cu_seqlens, 0.3)
        results.append([output, *torch.autograd.grad((output * weights).sum(), states)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_long_sequences_and_lengths_that_differ_much_are_not_padded():
    assert packing.fits_padding([0, 60, 140, 230])
    assert not packing.fits_padding([0, 60, 140, 140 + packing.MAX_SHORT + 1])
    assert not packing.fits_padding([0, 200, 210, 220, 230])


def test_a_cpu_computes_logits_of_tokens_with_a_loss_alone(model, monkeypatch):
    from trl.trainer import utils

    rows = []
    product = utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction,
        "apply",
        lambda hidden, *options: rows.append(len(hidden)) or product(hidden, *options),
    )
    batch = packing.pack([[sequence(20), sequence(30)]])
    values = scores(model, [sequence(20), sequence(30)])
    assert rows == [len(batch.scored_positions)] and 0 < rows[0] < batch.input_ids.numel()
    whole = model(**batch.inputs()).logits[0].log_softmax(-1)
    labels = batch.shift_labels[0, batch.scored_positions]
    expected = whole[batch.scored_positions].gather(1, labels[:, None])[:, 0]
    assert torch.allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_example_is_in_exactly_one_pack_and_packs_are_balanced(workers):
    lengths = [random.Random(i).randint(50, 900) for i in range(32)]
    packs = packing.assign_to_packs(lengths, 2048, workers)
    assert sorted(i for pack in packs for i in pack) == list(range(32))
    assert len(packs) % workers == 0
    loads = [sum(lengths[i] for i in pack) for pack in packs]
    assert max(loads) <= 2048
    assert max(loads) - min(loads) <= max(lengths)
    assert len(packs) <= -(-sum(lengths) // 2048) + workers


def test_an_example_over_the_token_budget_gets_its_own_pack():
    assert packing.assign_to_packs([500, 10, 20], 100) == [[0], [2, 1]]


def test_workers_without_rows_get_an_empty_pack(model):
    assert packing.assign_to_packs([5], 100, workers=2) == [[0], []]
    idle = packing.pack([])
    assert idle.num_sequences == 0
    assert packing.log_probs(model, idle).shape == (0,)


def test_a_batch_does_not_depend_on_the_number_of_workers():
    examples = [[sequence(10 + i)] for i in range(21)]
    optimizer = Optimizer(global_batch_size=8, epochs=2)

    def rows(world: int) -> list[list[int]]:
        parts = [PackedBatches(examples, optimizer, 3, 60, r, world) for r in range(world)]
        for step in range(len(parts[0])):
            assert len({len(part[step][0]) for part in parts}) == 1
        return [
            sorted(
                size
                for part in parts
                for pack in part[step][0]
                for size in pack.cu_seqlens.diff().tolist()
                if pack.num_sequences
            )
            for step in range(len(parts[0]))
        ]

    assert rows(1) == rows(2) == rows(3)
    assert [len(step) for step in rows(1)] == [8, 8, 5, 8, 8, 5]
    assert sorted(itertools.chain(*rows(1)[:3])) == [len(e[0].ids) for e in examples]


def test_gradients_do_not_depend_on_the_packing(tiny_model):
    from opencharacter.introspection.sft import sft_loss

    def gradient(max_tokens: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = adapters.add_lora(
            adapters.load(tiny_model, ROLE, on_gpu=False), Lora(rank=4, alpha=8)
        )
        batches = PackedBatches([[sequence(20 + i)] for i in range(6)], Optimizer(), 0, max_tokens)
        packs, denominators = batches[0]
        for pack in packs:
            sft_loss(packing.log_probs(model, pack), pack, denominators)["loss"].backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert gradients
        return torch.cat(gradients)

    assert torch.allclose(gradient(10_000), gradient(40), atol=1e-6)
