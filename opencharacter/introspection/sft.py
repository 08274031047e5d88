"""Stage introspection/sft: the distilled model is fine-tuned on its own transcripts.

A new adapter on top of the distilled weights (DPO folded in). The loss covers every assistant
turn, to the token that ends it, and nothing else.

Reads: introspection/transcripts, distillation/dpo. Writes: adapter/, curves.
Run: opencharacter run RECIPE --constitution NAME --only introspection/sft
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opencharacter.chat import encode
from opencharacter.config import Sft
from opencharacter.stage import Estimate, Job, Outcome

if TYPE_CHECKING:
    from opencharacter.training import Task

IGNORED = -100
"""Label of tokens that are not learned."""


def tokenise(
    tokenizer: Any, messages: list[dict[str, str]], limit: int
) -> dict[str, list[int]] | None:
    """A transcript as input_ids and labels, or None where it is over the limit."""
    ids, loss = encode(tokenizer, messages)
    if len(ids) > limit:
        return None
    labels = [id if learned else IGNORED for id, learned in zip(ids, loss, strict=True)]
    return {"input_ids": ids, "labels": labels}


def make_trainer(task: Task, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    """TRL's SFT trainer on tokens and labels made here."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    from opencharacter.training import lora_config

    settings: Sft = task.section
    # Paper: its code learned the last message alone.
    encoded = [tokenise(tokenizer, row["messages"], settings.max_tokens) for row in task.rows()]
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments, max_length=None),
        train_dataset=datasets.Dataset.from_list([row for row in encoded if row]),
        processing_class=tokenizer,
        peft_config=lora_config(task.lora),
    )


def estimate(job: Job) -> Estimate:
    parent = job.parent("introspection/transcripts")
    made = [p.stage.module.estimate(p) for p in parent.parents]
    tokens = sum(e.tokens_out for e in made)
    return Estimate(sum(e.rows for e in made), trained=tokens * job.section.optimizer.epochs)


def build(job: Job) -> Outcome:
    from opencharacter.training import train

    return train(
        job,
        "introspection/transcripts",
        make_trainer,
        folded=job.parent("distillation/dpo").adapter,
    )
