"""Sequences of different lengths as one row of tokens: no padding, and none sees another.

A pack is what one forward pass reads. Attention is told where each sequence begins and ends, so a
sequence's logits are those that it has alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

ATTENTION = "packed"
"""Name of the attention function below, for `attn_implementation`."""
IGNORED = -100
"""Label of a token that is not scored."""


class Tokens(NamedTuple):
    """One conversation.

    Args:
        ids: its tokens, shape (t,).
        learned: indices into `ids` of the tokens that are scored, each at least 1, rising.
        reference: their log-probabilities under the reference model, in nats, or None.
    """

    ids: list[int]
    loss_positions: list[int]
    reference: list[float] | None = None


Example = Sequence[Tokens]
"""What must be in one pack: a transcript, or the chosen and the rejected side of a pair."""


class LossDenominators(NamedTuple):
    """Of a whole optimiser step, whatever passes and workers it is split over."""

    examples: int
    loss_positions: int
    """Scored tokens."""
    first: int
    """Scored tokens of each example's first sequence: of a pair, the chosen one."""
    tokens: int
    """All tokens."""


@dataclass
class Pack:
    """Tensors of one forward pass over t tokens, of which s are scored.

    Args:
        input_ids: (1, t).
        position_ids: (1, t), from 0 in each sequence.
        shift_labels: (1, t): the next token where it is scored, else `IGNORED`.
        bounds: int32 (n + 1,): where each of the n sequences begins, and the end.
        longest: tokens of the longest sequence.
        scored: (s,): positions that predict the scored tokens.
        segment: (s,): the sequence of each scored token.
        reference: (s,) in nats, or None.
        sequences: n; 0 for a pack that only keeps step with other workers.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    shift_labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    scored: torch.Tensor
    segment: torch.Tensor
    reference: torch.Tensor | None
    sequences: int

    def to(self, device: Any) -> Pack:
        """The same on a device."""
        moved = {
            name: value.to(device, non_blocking=True) if hasattr(value, "to") else value
            for name, value in vars(self).items()
        }
        return Pack(**moved)

    def inputs(self) -> dict[str, Any]:
        """Arguments of a causal language model whose attention is `ATTENTION`."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "use_cache": False,
        }


def length(example: Example) -> int:
    """Tokens of an example."""
    return sum(len(tokens.ids) for tokens in example)


def loss_denominators(examples: Sequence[Example]) -> LossDenominators:
    """Counts of a batch, the denominators of its loss."""
    return LossDenominators(
        examples=len(examples),
        loss_positions=sum(
            len(tokens.loss_positions) for example in examples for tokens in example
        ),
        first=sum(len(example[0].loss_positions) for example in examples),
        tokens=sum(map(length, examples)),
    )


def share_out(lengths: Sequence[int], budget: int, workers: int = 1) -> list[list[int]]:
    """Indices of examples by pack: a multiple of `workers` packs, as even as can be.

    Longest first, each to the pack that has the least (Graham's LPT rule), with as few packs as
    keep to the budget. A pack is over the budget only if one example is.

    Args:
        lengths: tokens of each example.
        budget: tokens of a pack.
        workers: each gets as many packs as the others; some may be empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rounds = max(1, math.ceil(sum(min(n, budget) for n in lengths) / (budget * workers)))
    limit = max(budget, *lengths)
    while True:
        packs: list[list[int]] = [[] for _ in range(rounds * workers)]
        loads = [0] * len(packs)
        for i in order:
            least = loads.index(min(loads))
            packs[least].append(i)
            loads[least] += lengths[i]
        if max(loads) <= limit:
            return packs
        rounds += 1


def pack(examples: Sequence[Example]) -> Pack:
    """Lay examples end to end."""
    sequences = [tokens for example in examples for tokens in example]
    spacer = Tokens([0, 0], [])
    ids, positions, labels, cu_seqlens = [], [], [], [0]
    scored, segment, reference = [], [], []
    for number, tokens in enumerate(sequences or [spacer]):
        start = len(ids)
        ids += tokens.ids
        positions += range(len(tokens.ids))
        cu_seqlens.append(len(ids))
        labels += [IGNORED] * len(tokens.ids)
        for at in tokens.loss_positions:
            labels[start + at - 1] = tokens.ids[at]
        scored += [start + at - 1 for at in tokens.loss_positions]
        segment += [number] * len(tokens.loss_positions)
        reference += tokens.reference or []
    return Pack(
        input_ids=tensor([ids]),
        position_ids=tensor([positions]),
        shift_labels=tensor([labels]),
        cu_seqlens=tensor(cu_seqlens, np.int32),
        max_seqlen=max(b - a for a, b in pairwise(cu_seqlens)),
        scored=tensor(scored),
        segment=tensor(segment),
        reference=tensor(reference, np.float32) if len(reference) == len(scored) else None,
        sequences=len(sequences),
    )


def tensor(values: Sequence[Any], dtype: Any = np.int64) -> torch.Tensor:
    """Numbers as a tensor, by way of NumPy, which reads a list five times as fast as torch."""
    import torch

    return torch.from_numpy(np.array(values, dtype))


def log_probs(model: Any, batch: Pack) -> torch.Tensor:
    """Log-probabilities of the scored tokens, float32 (s,), in nats.

    Args:
        model: loaded with `attn_implementation=ATTENTION`, with TRL's fused head (see
            `training.load`), so that only scored positions meet the vocabulary and no logits
            are kept.
        batch: on the model's device.
    """
    outputs = model(**batch.inputs(), shift_labels=batch.shift_labels, fused_lm_head=True)
    return outputs.log_probs[0].float().index_select(0, batch.scored)


# -------------------------------------------------------------------------------------- attention


def register() -> None:
    """Make the attention function known to transformers, by the name `ATTENTION`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a pack.

    torch's variable-length flash attention on a GPU; elsewhere, and in float32, which that does
    not know, sequence by sequence.

    Args:
        module: the attention layer (unused).
        query: (1, heads, t, d); key and value may have fewer heads.
        key: (1, key heads, t, d).
        value: as key.
        attention_mask: None: the bounds say it all.
        scaling: of the scores; 1 / sqrt(d) where None.
        sliding_window: tokens that a token sees, itself among them; all before it where None.
        cu_seq_lens_q: the pack's bounds.
        max_length_q: its longest sequence.

    Returns:
        (1, t, heads, d), and no weights.
    """
    assert cu_seq_lens_q is not None
    assert max_length_q is not None
    if value.is_cuda and value.dtype.itemsize == 2:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        # A dtype that flash attention knows, which a rotary embedding in float32 may have left.
        q, k = q.to(v.dtype), k.to(v.dtype)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        cu_seqlens = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        mixed = varlen(q, k, v, *cu_seqlens, scale=scaling, window_size=window)
        return mixed[None], None
    mixed = sequence_by_sequence(query, key, value, cu_seq_lens_q.tolist(), scaling, sliding_window)
    return mixed.transpose(1, 2), None


def varlen(*arguments: Any, **options: Any) -> Any:
    """Variable-length attention of torch; later versions want to be told of grouped queries."""
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return varlen_attn(*arguments, **options)


def sequence_by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: list[int],
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """(1, heads, t, d): torch's attention on each sequence alone."""
    import torch

    mixed = []
    for start, stop in pairwise(cu_seqlens):
        size = stop - start
        mask = None
        if sliding_window is not None and size > sliding_window:
            at = torch.arange(size, device=query.device)
            back = at[:, None] - at[None, :]
            mask = (back >= 0) & (back < sliding_window)
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        mixed.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(mixed, dim=2)
