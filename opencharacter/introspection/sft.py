"""Stage introspection/sft: the distilled model is fine-tuned on its own transcripts.

A new adapter on top of the distilled weights (DPO folded in). The loss covers every assistant
turn, to the token that ends it, and nothing else.

Reads: introspection/transcripts, distillation/dpo. Writes: adapter/, curves, tensorboard/.
Run: opencharacter run RECIPE --constitution NAME --only introspection/sft
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opencharacter.chat import encode
from opencharacter.engine import Need
from opencharacter.packing import Example, Pack, Tokens, Totals
from opencharacter.stage import Estimate, Job, Outcome

if TYPE_CHECKING:
    import pyarrow as pa
    import torch


def example(tokenizer: Any, messages: list[dict[str, str]]) -> Example:
    """A transcript in tokens, of which those of every assistant turn are learned."""
    ids, loss = encode(tokenizer, messages)
    # Paper: its code learned the last message alone.
    return [Tokens(ids, [i for i, learned in enumerate(loss) if learned])]


def examples(tokenizer: Any, rows: pa.Table) -> list[Example]:
    """Transcripts in tokens."""
    return [example(tokenizer, messages) for messages in rows["messages"].to_pylist()]


def sft_loss(policy: torch.Tensor, batch: Pack, totals: Totals) -> dict[str, torch.Tensor]:
    """Negative log-likelihood, mean over the learned tokens of the step, in nats.

    Args:
        policy: log-probabilities of the pack's learned tokens, shape (s,).
        batch: the pack.
        totals: of the step.
    """
    return {"loss": -policy.sum() / totals.learned}


def needs(job: Job) -> list[tuple[Need, ...]]:
    return [(job.workers(),)]


def estimate(job: Job) -> Estimate:
    parent = job.parent("introspection/transcripts")
    made = [p.stage.module.estimate(p) for p in parent.parents]
    tokens = sum(e.tokens_out for e in made)
    return Estimate(sum(e.rows for e in made), trained=tokens * job.section.optimizer.epochs)


def build(job: Job) -> Outcome:
    from opencharacter.training import train

    return train(
        job,
        job.parent("introspection/transcripts"),
        examples,
        sft_loss,
        folded=job.parent("distillation/dpo").adapter,
    )
