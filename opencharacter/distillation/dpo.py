"""Stage distillation/dpo: the student is pulled towards the teacher.

loss = -log sigmoid(beta * margin) + nll * NLL(chosen) + kl * mean squared log-ratio, where margin
is the difference of the summed log-ratios of chosen and rejected to the reference, the student
before training. The reference is read once, before the first step: training needs one forward.

Reads: distillation/pairs. Writes: adapter/, curves.
Run: opencharacter run RECIPE --constitution NAME --only distillation/dpo
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from opencharacter.chat import assistant, encode_answer, user
from opencharacter.config import Dpo
from opencharacter.stage import Estimate, Job, Outcome

if TYPE_CHECKING:
    import torch

    from opencharacter.training import Task


class Loss(NamedTuple):
    """Scalars of one batch; `total` is what is minimised."""

    total: torch.Tensor
    sigmoid: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    margin: torch.Tensor
    accuracy: torch.Tensor


def dpo_loss(
    policy: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, settings: Dpo
) -> Loss:
    """DPO (Rafailov et al., arXiv 2305.18290, eq. 7) with the two penalties of arXiv 2511.01689.

    Args:
        policy: log-probabilities of the answer tokens, shape (2n, t); n chosen, then their n
            rejected, in nats.
        reference: the same under the reference, without gradient.
        mask: which entries are answer tokens, bool (2n, t).
        settings: beta, nll, kl.
    """
    import torch.nn.functional as F

    ratio = (policy - reference) * mask
    chosen, rejected = ratio.sum(dim=1).chunk(2)
    margin = settings.beta * (chosen - rejected)
    sigmoid = -F.logsigmoid(margin).mean()
    chosen_mask = mask.chunk(2)[0]
    nll = -(policy.chunk(2)[0] * chosen_mask).sum() / chosen_mask.sum()
    kl = ratio.square().sum() / mask.sum()
    total = sigmoid + settings.nll * nll + settings.kl * kl
    return Loss(total, sigmoid, nll, kl, margin.mean(), (margin > 0).float().mean())


def tokenise(tokenizer: Any, row: dict[str, Any], limit: int) -> dict[str, list[int]] | None:
    """A pair in tokens, or None where a conversation is over the limit."""
    sides = {}
    prompt: list[int] = []
    for side in ("chosen", "rejected"):
        prompt, answer = encode_answer(tokenizer, [user(row["prompt"]), assistant(row[side])])
        if len(prompt) + len(answer) > limit:
            return None
        sides[f"{side}_ids"] = answer
    return {"prompt_ids": prompt, **sides}


def make_trainer(task: Task, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> Any:
    """TRL's DPO trainer with the loss above and the reference read once."""
    import datasets
    import torch
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from opencharacter.training import lora_config

    settings: Dpo = task.section

    class Collator(DataCollatorForPreference):
        """Pads the reference beside the tokens."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            if "reference" in examples[0]:
                reference = torch.zeros(batch["input_ids"].shape)[:, 1:]
                sides = [e["reference"][0] for e in examples] + [
                    e["reference"][1] for e in examples
                ]
                starts = [len(e["prompt_ids"]) - 1 for e in examples] * 2
                for i, (values, start) in enumerate(zip(sides, starts, strict=True)):
                    reference[i, start : start + len(values)] = torch.tensor(values)
                batch["reference"] = reference
            return batch

    class Trainer(DPOTrainer):
        """Overrides two private methods, hence the pin of trl."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # tokens already

        def token_logprobs(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            outputs = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
            return outputs.log_probs.float(), inputs["completion_mask"][:, 1:].bool()

        def read_reference(self) -> None:
            """Add the log-probabilities under the untrained student to the data."""
            policy: Any = self.model
            data: Any = self.train_dataset
            rows: list[list[list[float]]] = []
            size = self.args.per_device_train_batch_size
            policy.eval()
            with torch.no_grad(), policy.disable_adapter():
                for at in range(0, len(data), size):
                    examples = [data[i] for i in range(at, min(at + size, len(data)))]
                    batch = self.data_collator(examples)
                    inputs = {name: tensor.to(policy.device) for name, tensor in batch.items()}
                    values, mask = self.token_logprobs(policy, inputs)
                    sides = [v[m].tolist() for v, m in zip(values, mask, strict=True)]
                    n = len(examples)
                    rows += [[sides[i], sides[n + i]] for i in range(n)]
            policy.train()
            self.train_dataset = data.add_column("reference", rows)

        def _compute_loss(self, model, inputs, return_outputs):
            policy, mask = self.token_logprobs(model, inputs)
            loss = dpo_loss(policy, inputs["reference"], mask, settings)
            for name, value in loss._asdict().items():
                values: Any = self.accelerator.gather_for_metrics(value.detach())
                self._metrics["train"][f"dpo/{name}"].append(values.mean().item())
            return loss.total

    encoded = [tokenise(tokenizer, row, settings.max_tokens) for row in task.rows()]
    data = datasets.Dataset.from_list([row for row in encoded if row])
    trainer = Trainer(
        model=model,
        args=DPOConfig(**arguments, beta=settings.beta, max_length=None),
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=Collator(pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id),
        peft_config=lora_config(task.lora),
    )
    trainer.read_reference()
    return trainer


def estimate(job: Job) -> Estimate:
    rows = (
        job.parent("distillation/pairs")
        .stage.module.estimate(job.parent("distillation/pairs"))
        .rows
    )
    return Estimate(rows, trained=rows * job.section.optimizer.epochs * 780)


def build(job: Job) -> Outcome:
    from opencharacter.training import train

    return train(job, "distillation/pairs", make_trainer)
