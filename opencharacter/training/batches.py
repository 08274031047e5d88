"""The microbatches of one training worker."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from opencharacter.config.recipe import Optimizer
from opencharacter.text.chat import row_id
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


def split_held_out(rows: pa.Table, share: float) -> tuple[pa.Table, pa.Table]:
    """Return the rows to train on, and those that are held out.

    A row's place depends on its prompt, so that no prompt is in both, or else on its id. A larger
    share holds out the same rows and others.

    Args:
        rows: rows with `id`, and perhaps `prompt_ids`.
        share: share of held-out rows, in [0, 1).
    """
    if not share:
        return rows, rows.slice(0, 0)
    column = "prompt_ids" if "prompt_ids" in rows.schema.names else "id"
    mask = pa.array([fraction(key) < share for key in rows[column].to_pylist()], pa.bool_())
    return rows.filter(pc.invert(mask)), rows.filter(mask)


def fraction(key: object) -> float:
    """Return a number in [0, 1) that a key determines."""
    return int(row_id("held out", key)[:13], 16) / 16**13


def held_out_batch(
    examples: Sequence[Example], max_tokens: int, rank: int, world_size: int
) -> tuple[list[Pack], LossDenominators] | None:
    """Return this worker's packs of the held-out examples and the counts of all; None for none."""
    if not examples:
        return None
    packs = packing.assign_to_packs(
        [packing.num_tokens(example) for example in examples], max_tokens, world_size
    )
    own_packs = [packing.pack([examples[i] for i in p]) for p in packs[rank::world_size]]
    return own_packs, packing.loss_denominators(examples)
