"""Verifies that a model computes right log-probabilities for packs, before anything is trained.

A few short sequences are processed as a pack and, with the model's own attention, one by one. If
the log-probabilities differ, because the model passes information between the sequences of a pack
(as convolutions and state-space layers do) or uses attention in a way that `packing.attention` does
not know, the model processes the sequences of a pack one by one in training, too.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch

from opencharacter.errors import UserError
from opencharacter.training import architectures, packing
from opencharacter.training.packing import Pack, Tokens

Value = TypeVar("Value")
LENGTHS = (23, 9, 31)
"""Tokens of the sequences of the probe."""
LONGEST_WINDOW = 4096
"""Largest sliding window that the probe covers with a sequence that is longer."""
TOKEN_IDS = range(100, 10_000)
"""Token ids of the sequences: high ones are often special, or stand for images."""
MAX_DIFFERENCE = 1e-3
"""Largest difference of a log-probability in float32, in nats."""
MAX_MEAN_DIFFERENCE = 0.1
"""Mean absolute difference in 16 bits, in nats, up to which the model's own rounding is not
measured; it is 0.18 for the random tokens of the probe and Qwen2.5-1.5B."""
ROUNDING_FACTOR = 2
"""Largest mean difference in 16 bits above that, as a multiple of the mean difference between two
kinds of attention of the model's own."""
MAX_MEAN_LEAK = 0.02
"""Largest mean absolute effect of one sequence on the others, in nats. Experts that process other
numbers of tokens round differently."""


def prepare(model: Any) -> bool:
    """Choose how a model processes packs, so that `packing.log_probs` is right.

    Args:
        model: a model from `adapters.load` on the device on which it will run.

    Returns:
        True if packs are processed in one forward pass, False if one sequence at a time.

    Raises:
        UserError: if the log-probabilities are wrong either way.
    """
    training = model.training
    batch = packing.pack([[tokens] for tokens in sequences(model.config)]).to(model.device)
    name = model.config.get_text_config().model_type
    packed = (
        name not in architectures.SEQUENTIAL
        and model.config._attn_implementation == packing.ATTENTION
    )
    expected = with_attention(model.eval(), "eager", lambda: own_log_probs(model, batch))
    model.train()  # some models compute something else, or need other inputs, in training
    problems = []
    for attention, change in candidates(packed):
        forward = model.forward
        change(model)
        try:
            values = with_attention(model, attention, lambda: packing.log_probs(model, batch))
            problem = difference(values, expected, model.dtype)
            is_rounding = bool(problem) and differs_by_rounding(model, batch, values, expected)
            if is_rounding or (problem is None and name not in architectures.KNOWN):
                problem = with_attention(model, attention, lambda: leak(model, batch))
        except torch.OutOfMemoryError:  # says nothing about the attention
            raise
        except Exception as error:  # whatever the model raises, this way does not work
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem is None:
            set_attention(model.train(training), attention)
            return attention == packing.ATTENTION
        problems.append(problem)
        model.forward = forward
    raise UserError(
        f"{model.config.model_type}: training would be wrong: {problems[-1]}; choose a student of "
        "another architecture"
    )


def candidates(packed: bool) -> list[tuple[str, Callable[[Any], None]]]:
    """Return the ways to process packs, fastest first: an attention and a change to the model."""
    fused = functools.partial(process_one_by_one, fused_head=True)
    own_head = functools.partial(process_one_by_one, fused_head=False)
    one_by_one = [("sdpa", fused), ("eager", fused), ("sdpa", own_head), ("eager", own_head)]
    return [(packing.ATTENTION, lambda _: None)] * packed + one_by_one


def sequences(config: Any) -> list[Tokens]:
    """Return the sequences of the probe, all of whose tokens but the first have a loss.

    Args:
        config: the model's configuration.
    """
    text = config.get_text_config()
    generator = random.Random(0)
    stop = min(text.vocab_size, TOKEN_IDS.stop)
    ids = range(min(TOKEN_IDS.start, stop // 2), stop)
    window = getattr(text, "sliding_window", None) or 0
    lengths = [*LENGTHS, window + 8] if 0 < window <= LONGEST_WINDOW else LENGTHS
    return [Tokens(generator.choices(ids, k=size), list(range(1, size))) for size in lengths]


def difference(values: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Describe by how much log-probabilities are wrong; None if they are right for a dtype."""
    gaps = (values - expected).abs()
    if dtype == torch.float32:
        size, limit, name = gaps.max().item(), MAX_DIFFERENCE, "up to"
    else:
        size, limit, name = gaps.mean().item(), MAX_MEAN_DIFFERENCE, "on average"
    if size <= limit:  # not if it is not a number
        return None
    return f"log-probabilities differ from the model's own by {name} {size:.2g} nats"


def differs_by_rounding(
    model: Any, batch: Pack, values: torch.Tensor, expected: torch.Tensor
) -> bool:
    """Return whether log-probabilities in 16 bits differ as two of the model's own attentions do.

    Large models round much more on random tokens than small ones, so no fixed limit fits all.

    Args:
        model: the model, in its own form.
        batch: the pack of the probe.
        values: log-probabilities of the pack.
        expected: the same from the model's eager attention, one sequence at a time.
    """
    if model.dtype == torch.float32 or not torch.isfinite(values).all():
        return False
    try:
        other = with_attention(model, "sdpa", lambda: own_log_probs(model, batch))
    except ValueError:  # transformers' error for a model without this attention
        return False
    rounding = (other - expected).abs().mean()
    return bool((values - expected).abs().mean() <= ROUNDING_FACTOR * rounding)


def leak(model: Any, batch: Pack) -> str | None:
    """Describe how log-probabilities depend on an earlier sequence of the pack; None if not.

    Rounding is the same with other tokens in the first sequence, so that this finds in 16 bits what
    a comparison with another attention does not.
    """
    changed = replace(batch, input_ids=batch.input_ids.clone())
    changed.input_ids[:, : LENGTHS[0]] = batch.input_ids[:, : LENGTHS[0]].flip(1)
    others = (batch.sequence_index > 0) & (batch.sequence_index < len(LENGTHS))
    gaps = (packing.log_probs(model, batch) - packing.log_probs(model, changed))[others].abs()
    size = gaps.mean().item()
    if size <= MAX_MEAN_LEAK:
        return None
    return f"log-probabilities depend on other sequences of the pack by {size:.2g} nats on average"


def own_log_probs(model: Any, batch: Pack) -> torch.Tensor:
    """Compute the log-probabilities of a pack one sequence at a time, from the model's logits."""
    values = []
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        ids, labels = batch.input_ids[:, start:stop], batch.shift_labels[:, start:stop]
        values.append(label_log_probs(model(input_ids=ids, use_cache=False).logits, labels))
    return torch.cat(values, dim=1)[0].index_select(0, batch.scored_positions)


def label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (1, t) of labels; 0 where the label is `IGNORED`."""
    return -torch.nn.functional.cross_entropy(
        logits[0].float(),
        labels[0].to(logits.device),
        ignore_index=packing.IGNORED,
        reduction="none",
    )[None]


def process_one_by_one(model: Any, fused_head: bool) -> None:
    """Change a model, in place, so that it processes the sequences of a pack one by one.

    The loop is in the model's forward pass, where DDP and activation checkpointing see one call.

    Args:
        model: a model with TRL's fused head.
        fused_head: whether to use that head; otherwise the model computes all logits itself.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    forward = model.forward

    def sequence_log_probs(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if fused_head:
            return forward(
                input_ids=input_ids, shift_labels=labels, fused_lm_head=True, use_cache=False
            ).log_probs
        return label_log_probs(forward(input_ids=input_ids, use_cache=False).logits, labels)

    @functools.wraps(forward)
    def forward_pack(*arguments: Any, cu_seq_lens_q: Any = None, **options: Any) -> Any:
        if cu_seq_lens_q is None:
            return forward(*arguments, **options)
        sizes = cu_seq_lens_q.diff().tolist()
        parts = zip(
            options["input_ids"].split(sizes, dim=1),
            options["shift_labels"].split(sizes, dim=1),
            strict=True,
        )
        log_probs = [sequence_log_probs(ids, labels) for ids, labels in parts]
        return FusedCausalLMOutput(log_probs=torch.cat(log_probs, dim=1))

    model.forward = forward_pack


def with_attention(model: Any, name: str, compute: Callable[[], Value]) -> Value:
    """Compute something with another attention, without gradients.

    Weights in 16 bits use the autocast of training, float32 weights do not, so that the comparison
    is exact.
    """
    from opencharacter.training.adapters import autocast

    before = model.config._attn_implementation
    set_attention(model, name)
    try:
        precision = autocast(model.device) if model.device.type == "cuda" else nullcontext()
        with torch.no_grad(), precision:
            return compute()
    finally:
        set_attention(model, before)


def set_attention(model: Any, name: str) -> None:
    """Select the attention of a model, unless the model has only one."""
    replaceable = model._can_set_attn_implementation()
    if replaceable and model.config._attn_implementation != name:
        model.set_attn_implementation(name)
