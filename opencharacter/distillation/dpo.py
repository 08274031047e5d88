"""Stage distillation/dpo: the student is pulled towards the teacher.

loss = -log sigmoid(beta * margin) + nll * NLL(chosen) + kl * mean squared log-ratio, where margin
is the difference of the summed log-ratios of chosen and rejected to the reference, the student
before training.

Reads: distillation/reference. Writes: adapter/, curves, tensorboard/.
Run: opencharacter run RECIPE --constitution NAME --only distillation/dpo
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from opencharacter.config import Dpo
from opencharacter.distillation.reference import example
from opencharacter.engine import Need
from opencharacter.stage import Estimate, Job, Outcome

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from opencharacter.packing import Example, Pack, Totals


def dpo_loss(
    policy: torch.Tensor, batch: Pack, totals: Totals, settings: Dpo
) -> dict[str, torch.Tensor]:
    """DPO (Rafailov et al., arXiv 2305.18290, eq. 7) with the two penalties of arXiv 2511.01689.

    Args:
        policy: log-probabilities of the answer tokens of n pairs, shape (s,), in nats.
        batch: the pack, with `reference`; a pair's sequences are 2i, chosen, and 2i + 1, rejected.
        totals: of the step, which are what means are over.
        settings: beta, nll, kl.

    Returns:
        This pack's share of the loss, of its three parts, of the mean margin and of the accuracy.
    """
    import torch.nn.functional as F

    assert batch.reference is not None
    ratio = policy - batch.reference
    sums = ratio.new_zeros(batch.sequences).index_add(0, batch.segment, ratio)
    margin = settings.beta * (sums[0::2] - sums[1::2])
    sigmoid = -F.logsigmoid(margin).sum() / totals.examples
    nll = -(policy * (batch.segment % 2 == 0)).sum() / totals.first
    kl = ratio.square().sum() / totals.learned
    return {
        "loss": sigmoid + settings.nll * nll + settings.kl * kl,
        "dpo/sigmoid": sigmoid,
        "dpo/nll": nll,
        "dpo/kl": kl,
        "dpo/margin": margin.sum() / totals.examples,
        "dpo/accuracy": (margin > 0).float().sum() / totals.examples,
    }


def examples(tokenizer: Any, rows: pa.Table) -> list[Example]:
    """Pairs as they were tokenised for the reference."""
    return [example(row) for row in rows.to_pylist()]


def needs(job: Job) -> list[tuple[Need, ...]]:
    return [(job.workers(),)]


def estimate(job: Job) -> Estimate:
    parent = job.parent("distillation/reference")
    found = parent.stage.module.estimate(parent)
    return Estimate(found.rows, trained=found.read * job.section.optimizer.epochs)


def build(job: Job) -> Outcome:
    from opencharacter.training import train

    pairs = job.parent("distillation/reference")
    return train(job, pairs, examples, partial(dpo_loss, settings=job.section))
