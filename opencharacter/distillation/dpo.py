"""Stage distillation/dpo: train the student to prefer the teacher's answers.

    loss = -log sigmoid(margin) + nll_weight * NLL(chosen)
           + sq_log_ratio_weight * mean squared log-ratio
    margin = reward(chosen) - reward(rejected)
    reward(answer) = beta * sum of the answer's log-ratios

A log-ratio is the log-probability of a token under the student minus that under the reference
model, which is the student before training.

Reads: distillation/reference. Writes: adapter/, curves, tensorboard/.
Run: opencharacter run RECIPE --constitution NAME --only distillation/dpo
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from opencharacter.config.recipe import Dpo
from opencharacter.distillation.reference import pair_example
from opencharacter.evaluation.report.sections import Section, training_curves
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from opencharacter.training.packing import Example, LossDenominators, Pack

CURVES = (
    "loss",
    "dpo/sigmoid",
    "dpo/nll",
    "dpo/sq_log_ratio",
    "rewards/chosen",
    "rewards/rejected",
    "dpo/margin",
    "dpo/accuracy",
)
"""Metrics of the loss that the report shows."""
HELD_OUT_CURVES = ("eval_loss", "eval_dpo/margin", "eval_dpo/accuracy")
"""Those of the held-out pairs."""


def dpo_loss(
    policy: torch.Tensor, batch: Pack, denominators: LossDenominators, config: Dpo
) -> dict[str, torch.Tensor]:
    """Compute DPO (Rafailov et al., arXiv 2305.18290, eq. 7) with two additional terms.

    The additional terms are those of arXiv 2511.01689. The metrics `rewards/chosen` and
    `rewards/rejected` are defined as in TRL: the mean reward over all pairs.

    Args:
        policy: log-probabilities of the answer tokens of n pairs, shape (s,), in nats.
        batch: the pack, with `reference`. Sequence 2i is the chosen and sequence 2i + 1 the
            rejected conversation of pair i.
        denominators: counts of the optimizer step, over which means are taken.
        config: beta and the weights of the additional terms.

    Returns:
        This pack's share of the loss, its three terms, the mean rewards, the mean margin and the
        accuracy (share of pairs with a positive margin).
    """
    import torch.nn.functional as F

    assert batch.reference is not None
    log_ratio = policy - batch.reference
    zeros = log_ratio.new_zeros(batch.num_sequences)
    log_ratio_sums = zeros.index_add(0, batch.sequence_index, log_ratio)
    chosen, rejected = log_ratio_sums[0::2], log_ratio_sums[1::2]
    margin = config.beta * (chosen - rejected)
    sigmoid = -F.logsigmoid(margin).sum() / denominators.examples
    nll = -(policy * (batch.sequence_index % 2 == 0)).sum() / denominators.chosen_loss_tokens
    sq_log_ratio = log_ratio.square().sum() / denominators.loss_tokens
    return {
        "loss": sigmoid + config.nll_weight * nll + config.sq_log_ratio_weight * sq_log_ratio,
        "dpo/sigmoid": sigmoid,
        "dpo/nll": nll,
        "dpo/sq_log_ratio": sq_log_ratio,
        "rewards/chosen": config.beta * chosen.detach().sum() / denominators.examples,
        "rewards/rejected": config.beta * rejected.detach().sum() / denominators.examples,
        "dpo/margin": margin.sum() / denominators.examples,
        "dpo/accuracy": (margin > 0).float().sum() / denominators.examples,
    }


def make_examples(tokenizer: Any, rows: pa.Table) -> list[Example]:
    """Return the pairs as the reference stage tokenized them; the tokenizer is not used."""
    return [pair_example(row) for row in rows.to_pylist()]


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.workers(),)]


def estimate(job: Job) -> Estimate:
    parent = job.parent("distillation/reference")
    reference = parent.stage.module.estimate(parent)
    share = 1 - job.config.held_out
    trained = int(reference.read * job.config.optimizer.epochs * share)
    return Estimate(int(reference.rows * share), trained=trained)


def build(job: Job) -> StageResult:
    from opencharacter.training.trainer import train

    pairs = job.parent("distillation/reference")
    return train(job, pairs, make_examples, partial(dpo_loss, config=job.config))


def report(job: Job) -> list[Section]:
    """The training curves."""
    return training_curves(job, "DPO", (*CURVES, *HELD_OUT_CURVES))
