"""Stage introspection/sft: the distilled model is fine-tuned on its own transcripts.

A new adapter on top of the distilled weights (DPO folded in). The loss covers every assistant
turn, to the token that ends it, and nothing else.

Reads: introspection/transcripts, distillation/dpo. Writes: adapter/, curves, tensorboard/.
Run: opencharacter run RECIPE --constitution NAME --only introspection/sft
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import encode
from opencharacter.training.packing import Example, LossDenominators, Pack, Tokens

if TYPE_CHECKING:
    import pyarrow as pa
    import torch


def example(tokenizer: Any, messages: list[dict[str, str]]) -> Example:
    """A transcript in tokens, of which those of every assistant turn are learned."""
    ids, loss = encode(tokenizer, messages)
    # Paper: its code learned the last message alone.
    return [Tokens(ids, [i for i, loss_positions in enumerate(loss) if loss_positions])]


def examples(tokenizer: Any, rows: pa.Table) -> list[Example]:
    """Transcripts in tokens."""
    return [example(tokenizer, messages) for messages in rows["messages"].to_pylist()]


def sft_loss(
    policy: torch.Tensor, batch: Pack, denominators: LossDenominators
) -> dict[str, torch.Tensor]:
    """Negative log-likelihood, mean over the learned tokens of the step, in nats.

    Args:
        policy: log-probabilities of the pack's learned tokens, shape (s,).
        batch: the pack.
        denominators: of the step.
    """
    return {"loss": -policy.sum() / denominators.loss_positions}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.workers(),)]


def estimate(job: Job) -> Estimate:
    parent = job.parent("introspection/transcripts")
    made = [p.stage.module.estimate(p) for p in parent.parents]
    tokens = sum(e.tokens_out for e in made)
    return Estimate(sum(e.rows for e in made), trained=tokens * job.config.optimizer.epochs)


def build(job: Job) -> StageResult:
    from opencharacter.training.trainer import train

    return train(
        job,
        job.parent("introspection/transcripts"),
        examples,
        sft_loss,
        base_adapter=job.parent("distillation/dpo").adapter,
    )
