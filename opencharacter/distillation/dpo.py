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

from opencharacter.config.recipe import Dpo
from opencharacter.distillation.reference import example
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from opencharacter.training.packing import Example, LossDenominators, Pack


def dpo_loss(
    policy: torch.Tensor, batch: Pack, denominators: LossDenominators, settings: Dpo
) -> dict[str, torch.Tensor]:
    """DPO (Rafailov et al., arXiv 2305.18290, eq. 7) with the two penalties of arXiv 2511.01689.

    Args:
        policy: log-probabilities of the answer tokens of n pairs, shape (s,), in nats.
        batch: the pack, with `reference`; a pair's sequences are 2i, chosen, and 2i + 1, rejected.
        denominators: of the step, which are what means are over.
        settings: beta and the weights of both penalties.

    Returns:
        This pack's share of the loss, of its three parts, of the mean margin and of the accuracy.
    """
    import torch.nn.functional as F

    assert batch.reference is not None
    ratio = policy - batch.reference
    sums = ratio.new_zeros(batch.sequences).index_add(0, batch.segment, ratio)
    margin = settings.beta * (sums[0::2] - sums[1::2])
    sigmoid = -F.logsigmoid(margin).sum() / denominators.examples
    nll = -(policy * (batch.segment % 2 == 0)).sum() / denominators.first
    sq_log_ratio = ratio.square().sum() / denominators.loss_positions
    return {
        "loss": sigmoid + settings.nll_weight * nll + settings.sq_log_ratio_weight * sq_log_ratio,
        "dpo/sigmoid": sigmoid,
        "dpo/nll": nll,
        "dpo/sq_log_ratio": sq_log_ratio,
        "dpo/margin": margin.sum() / denominators.examples,
        "dpo/accuracy": (margin > 0).float().sum() / denominators.examples,
    }


def examples(tokenizer: Any, rows: pa.Table) -> list[Example]:
    """Pairs as they were tokenised for the reference."""
    return [example(row) for row in rows.to_pylist()]


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.workers(),)]


def estimate(job: Job) -> Estimate:
    parent = job.parent("distillation/reference")
    found = parent.stage.module.estimate(parent)
    return Estimate(found.rows, trained=found.read * job.config.optimizer.epochs)


def build(job: Job) -> StageResult:
    from opencharacter.training.trainer import train

    pairs = job.parent("distillation/reference")
    return train(job, pairs, examples, partial(dpo_loss, settings=job.config))
