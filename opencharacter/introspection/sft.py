"""Stage introspection/sft: fine-tune the distilled model on its own transcripts.

A new adapter is trained on the student's weights with the DPO adapter merged into them. The loss
covers every assistant turn, including its end-of-turn token, and nothing else.

Reads: introspection/transcripts, distillation/dpo. Writes: adapter/, curves, tensorboard/.
Run: opencharacter run RECIPE --constitution NAME --only introspection/sft
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opencharacter.evaluation.report.sections import Section, training_curves
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.templates import encode
from opencharacter.training.packing import Example, LossDenominators, Pack, Tokens

if TYPE_CHECKING:
    import pyarrow as pa
    import torch


def transcript_example(tokenizer: Any, messages: list[dict[str, str]]) -> Example:
    """Tokenize a transcript; the tokens of all assistant turns have a loss."""
    # Paper: its code trains on the last message alone.
    return [Tokens(*encoded) for encoded in encode(tokenizer, messages)]


def make_examples(tokenizer: Any, rows: pa.Table) -> list[Example]:
    """Tokenize transcripts."""
    return [transcript_example(tokenizer, messages) for messages in rows["messages"].to_pylist()]


def sft_loss(
    policy: torch.Tensor, batch: Pack, denominators: LossDenominators
) -> dict[str, torch.Tensor]:
    """Compute the negative log-likelihood in nats, a mean over the step's tokens with a loss.

    Args:
        policy: log-probabilities of the pack's tokens with a loss, shape (s,), in nats.
        batch: the pack.
        denominators: counts of the optimizer step.
    """
    return {"loss": -policy.sum() / denominators.loss_tokens}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.workers(),)]


def estimate(job: Job) -> Estimate:
    parent = job.parent("introspection/transcripts")
    estimates = [p.stage.module.estimate(p) for p in parent.parents]
    tokens = sum(estimate.tokens_out for estimate in estimates)
    tokens = min(tokens, parent.config.trained_tokens or tokens)
    rows = sum(estimate.rows for estimate in estimates)
    share = 1 - job.config.held_out
    return Estimate(int(rows * share), trained=int(tokens * job.config.optimizer.epochs * share))


def build(job: Job) -> StageResult:
    from opencharacter.training.trainer import train

    return train(
        job,
        job.parent("introspection/transcripts"),
        make_examples,
        sft_loss,
        base_adapter=job.parent("distillation/dpo").adapter,
    )


def report(job: Job) -> list[Section]:
    """The training curves."""
    return training_curves(job, "SFT", ("loss", "eval_loss"))
