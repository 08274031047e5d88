"""The microbatches of one training worker."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from opencharacter.config.recipe import Optimizer
from opencharacter.training import packing
from opencharacter.training.packing import Example, LossDenominators, Pack


class PackedBatches(Dataset[tuple[list[Pack], LossDenominators]]):
    """The packs of one worker for each optimizer step, over all epochs.

    The examples of a step depend on the seed alone, and every worker gets the same number of packs.

    Args:
        examples: the training examples.
        optimizer: global batch size and number of epochs.
        seed: seed of the shuffling.
        max_tokens: maximum tokens of a pack.
        rank: rank of this worker.
        world_size: number of workers.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        optimizer: Optimizer,
        seed: int,
        max_tokens: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.examples, self.max_tokens = examples, max_tokens
        self.rank, self.world_size = rank, world_size
        self.steps: list[list[int]] = []
        size = optimizer.global_batch_size
        for epoch in range(optimizer.epochs):
            generator = torch.Generator().manual_seed(seed + epoch)
            order = torch.randperm(len(examples), generator=generator).tolist()
            self.steps += [order[start : start + size] for start in range(0, len(order), size)]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> tuple[list[Pack], LossDenominators]:
        batch = [self.examples[i] for i in self.steps[step]]
        lengths = [packing.num_tokens(example) for example in batch]
        packs = packing.assign_to_packs(lengths, self.max_tokens, self.world_size)
        own_packs = packs[self.rank :: self.world_size]
        return (
            [packing.pack([batch[i] for i in indices]) for indices in own_packs],
            packing.loss_denominators(batch),
        )
