"""Sequence packing: examples of different lengths in one row of tokens, without padding.

A pack is the input of one forward pass. The attention function receives the boundaries of the
sequences, so every sequence gets the same logits as if it were processed alone.
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
"""Value of `attn_implementation` that selects the attention function of this module."""
IGNORED = -100
"""Label of a token without a loss."""
MAX_HEAD_SIZE = 256
"""Largest head that flash attention supports."""
MAX_SHORT = 256
"""Most tokens of a sequence that is padded on a CPU, which keeps all attention weights."""
MAX_PADDED = 2
"""Most tokens after padding, as a multiple of those before."""
NEUTRAL_KEYWORDS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "dropout",
        "max_length_k",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)
"""Keywords of attention functions that do not change the result of `attention`, as students are
trained without dropout."""


class Tokens(NamedTuple):
    """One tokenized conversation.

    Args:
        ids: token ids, shape (t,).
        loss_positions: indices into `ids` of the tokens with a loss, ascending, each at least 1.
        reference: log-probabilities of those tokens under the reference model, in nats, or None.
    """

    ids: list[int]
    loss_positions: list[int]
    reference: list[float] | None = None


Example = Sequence[Tokens]
"""Sequences that must be in the same pack: one transcript, or the chosen and the rejected
conversation of a preference pair."""


class LossDenominators(NamedTuple):
    """Counts over all examples of an optimizer step, across all packs and workers.

    Args:
        examples: number of examples.
        loss_tokens: tokens with a loss.
        chosen_loss_tokens: tokens with a loss in the first sequence of every example, which is the
            chosen conversation of a preference pair.
        tokens: all tokens.
    """

    examples: int
    loss_tokens: int
    chosen_loss_tokens: int
    tokens: int


@dataclass
class Pack:
    """The tensors of one forward pass over t tokens, of which s have a loss.

    Args:
        input_ids: (1, t).
        position_ids: (1, t), counted from 0 in each sequence.
        shift_labels: (1, t); the next token where that token has a loss, otherwise `IGNORED`.
        cu_seqlens: int32 (n + 1,); start of each of the n sequences, then the total length.
        max_seqlen: number of tokens of the longest sequence.
        scored_positions: (s,); positions whose outputs predict the tokens with a loss.
        sequence_index: (s,); index of the sequence that each token with a loss belongs to.
        reference: (s,); log-probabilities under the reference model in nats, or None.
        num_sequences: n; 0 for an empty pack, which a worker without examples processes so that
            all workers take part in the same collective operations.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    shift_labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    scored_positions: torch.Tensor
    sequence_index: torch.Tensor
    reference: torch.Tensor | None
    num_sequences: int

    def to(self, device: Any) -> Pack:
        """Return a copy on a device."""
        moved = {
            name: value.to(device, non_blocking=True) if hasattr(value, "to") else value
            for name, value in vars(self).items()
        }
        return Pack(**moved)

    def inputs(self) -> dict[str, Any]:
        """Return the arguments for a causal language model that uses the `ATTENTION` function."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "use_cache": False,
        }


def num_tokens(example: Example) -> int:
    """Return the number of tokens of an example."""
    return sum(len(tokens.ids) for tokens in example)


def loss_denominators(examples: Sequence[Example]) -> LossDenominators:
    """Count the examples and tokens of an optimizer step."""
    return LossDenominators(
        examples=len(examples),
        loss_tokens=sum(len(tokens.loss_positions) for example in examples for tokens in example),
        chosen_loss_tokens=sum(len(example[0].loss_positions) for example in examples),
        tokens=sum(map(num_tokens, examples)),
    )


def assign_to_packs(lengths: Sequence[int], max_tokens: int, workers: int = 1) -> list[list[int]]:
    """Distribute examples over as few packs as possible, of about equal size.

    Examples are assigned longest first, each to the smallest pack so far (Graham's LPT rule). A
    pack has more than `max_tokens` only if a single example does.

    Args:
        lengths: number of tokens of each example.
        max_tokens: tokens of a pack.
        workers: number of workers; all get the same number of packs, some of which may be empty.

    Returns:
        The indices of the examples of each pack; the number of packs is a multiple of `workers`.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    total = sum(min(length, max_tokens) for length in lengths)
    packs_per_worker = max(1, math.ceil(total / (max_tokens * workers)))
    limit = max(max_tokens, *lengths)
    while True:
        packs: list[list[int]] = [[] for _ in range(packs_per_worker * workers)]
        sizes = [0] * len(packs)
        for i in longest_first:
            smallest = sizes.index(min(sizes))
            packs[smallest].append(i)
            sizes[smallest] += lengths[i]
        if max(sizes) <= limit:
            return packs
        packs_per_worker += 1


def pack(examples: Sequence[Example]) -> Pack:
    """Concatenate the sequences of examples into one pack."""
    sequences = [tokens for example in examples for tokens in example]
    placeholder = Tokens([0, 0], [])
    ids, positions, labels, cu_seqlens = [], [], [], [0]
    scored_positions, sequence_index, reference = [], [], []
    for number, tokens in enumerate(sequences or [placeholder]):
        start = len(ids)
        ids += tokens.ids
        positions += range(len(tokens.ids))
        cu_seqlens.append(len(ids))
        labels += [IGNORED] * len(tokens.ids)
        for position in tokens.loss_positions:
            labels[start + position - 1] = tokens.ids[position]
        scored_positions += [start + position - 1 for position in tokens.loss_positions]
        sequence_index += [number] * len(tokens.loss_positions)
        reference += tokens.reference or []
    has_reference = len(reference) == len(scored_positions)
    return Pack(
        input_ids=tensor([ids]),
        position_ids=tensor([positions]),
        shift_labels=tensor([labels]),
        cu_seqlens=tensor(cu_seqlens, np.int32),
        max_seqlen=max(end - start for start, end in pairwise(cu_seqlens)),
        scored_positions=tensor(scored_positions),
        sequence_index=tensor(sequence_index),
        reference=tensor(reference, np.float32) if has_reference else None,
        num_sequences=len(sequences),
    )


def tensor(values: Sequence[Any], dtype: Any = np.int64) -> torch.Tensor:
    """Convert a list to a tensor through NumPy, which is five times as fast as `torch.tensor`."""
    import torch

    return torch.from_numpy(np.array(values, dtype))


def log_probs(model: Any, batch: Pack) -> torch.Tensor:
    """Compute the log-probabilities of the tokens with a loss.

    Args:
        model: a model from `adapters.load` that `probe.prepare` has verified. TRL's fused head
            projects only the scored positions onto the vocabulary and keeps no logits.
        batch: a pack on the model's device.

    Returns:
        Log-probabilities in nats, float32 (s,).
    """
    outputs = model(**batch.inputs(), shift_labels=batch.shift_labels, fused_lm_head=True)
    return outputs.log_probs[0].float().index_select(0, batch.scored_positions)


# -------------------------------------------------------------------------------------- attention


def register() -> None:
    """Register the attention function with transformers under the name `ATTENTION`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each sequence of a pack.

    On a GPU with 16-bit values this is PyTorch's variable-length flash attention. On a CPU, short
    sequences are padded and processed together. Otherwise, and for what these do not support (see
    `fits_flash` and `fits_padding`), sequences are processed one by one.

    Args:
        module: the attention layer.
        query: (1, heads, t, d); key and value may have fewer heads.
        key: (1, key heads, t, d).
        value: (1, key heads, t, d).
        attention_mask: must be None, because the sequence boundaries define the mask.
        scaling: factor of the attention scores; None for 1 / sqrt(d).
        sliding_window: tokens that a token attends to, including itself; None for all before it.
        softcap: scores are limited to +-softcap by tanh; None for no limit.
        s_aux: (heads,); logits of the attention sinks, which take part in the softmax and have no
            value; None for no sinks.
        cu_seq_lens_q: `Pack.cu_seqlens`.
        max_length_q: `Pack.max_seqlen`.
        other: further keywords, which must be None or in `NEUTRAL_KEYWORDS`.

    Returns:
        The outputs, (1, t, heads, d), and None in place of attention weights.

    Raises:
        NotImplementedError: if the model uses a feature of attention that packing does not support.
    """
    unsupported = [
        name
        for name, argument in {**other, "attention_mask": attention_mask}.items()
        if argument is not None and name not in NEUTRAL_KEYWORDS
        if not (name == "is_causal" and argument is True)
    ]
    if unsupported:
        raise NotImplementedError(
            f"{type(module).__name__} uses {', '.join(sorted(unsupported))}, which attention over "
            "packs does not support"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        raise NotImplementedError(
            f"{type(module).__name__} received no cu_seq_lens_q and max_length_q, which attention "
            "over packs needs"
        )
    if value.is_cuda and value.dtype.itemsize == 2 and fits_flash(query, value, softcap, s_aux):
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        # A rotary embedding in float32 changes the dtype to one that flash attention rejects.
        q, k = q.to(v.dtype), k.to(v.dtype)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        cu_seqlens = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        output = varlen(q, k, v, *cu_seqlens, scale=scaling, window_size=window)
        return output[None], None
    cu_seqlens = cu_seq_lens_q.tolist()
    plain = sliding_window is None and softcap is None and s_aux is None
    if not value.is_cuda and plain and fits_padding(cu_seqlens):
        output = padded(query, key, value, cu_seqlens, scaling)
    else:
        output = sequence_by_sequence(
            query, key, value, cu_seqlens, scaling, sliding_window, softcap, s_aux
        )
    return output.transpose(1, 2), None


def fits_flash(query: Any, value: Any, softcap: float | None, s_aux: Any) -> bool:
    """Return whether flash attention over packs supports the heads and has no scores to change.

    Args:
        query: (1, heads, t, d).
        value: (1, key heads, t, dv); with multi-head latent attention, dv is smaller than d.
        softcap: as in `attention`.
        s_aux: as in `attention`.
    """
    same_size = query.shape[-1] == value.shape[-1]
    return softcap is None and s_aux is None and same_size and query.shape[-1] <= MAX_HEAD_SIZE


def varlen(*arguments: Any, **options: Any) -> Any:
    """Call PyTorch's variable-length attention; newer versions require `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return varlen_attn(*arguments, **options)


def fits_padding(cu_seqlens: Sequence[int]) -> bool:
    """Return whether all sequences are short, and of lengths that need little padding."""
    sizes = [stop - start for start, stop in pairwise(cu_seqlens)]
    longest = max(sizes)
    return longest <= MAX_SHORT and longest * len(sizes) <= MAX_PADDED * sum(sizes)


def padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: Sequence[int],
    scaling: float | None = None,
) -> torch.Tensor:
    """Compute attention for all sequences at once, padded to the longest.

    On two CPU cores, a training step on sequences of 80 tokens takes a quarter less time than with
    a call of PyTorch's attention for each sequence. A causal mask hides the padding, which follows
    the tokens. Query heads that share a key head are rows of one product.

    Args:
        query: (1, heads, t, d).
        key: (1, key heads, t, d).
        value: (1, key heads, t, dv).
        cu_seqlens: start of each of the n sequences, then the total length.
        scaling: as in `attention`.

    Returns:
        The outputs, (1, heads, t, dv).
    """
    import torch

    sizes = [stop - start for start, stop in pairwise(cu_seqlens)]
    count, longest = len(sizes), max(sizes)
    rows = [torch.arange(size) + number * longest for number, size in enumerate(sizes)]
    places = torch.cat(rows).to(value.device)

    def pad(states: torch.Tensor) -> torch.Tensor:
        """(1, h, t, d) -> (n, h, longest, d)."""
        _, heads, _, size = states.shape
        empty = value.new_zeros(count * longest, heads, size)
        filled = empty.index_copy(0, places, states[0].transpose(0, 1).to(value.dtype))
        return filled.view(count, longest, heads, size).transpose(1, 2)

    q, k, v = pad(query), pad(key), pad(value)
    heads, key_heads = q.shape[1], k.shape[1]
    q = q.reshape(count, key_heads, -1, q.shape[-1])
    scores = (q @ k.transpose(2, 3)).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    mask = torch.ones(longest, longest, dtype=torch.bool, device=q.device).tril()
    hidden = ~mask.repeat(heads // key_heads, 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
    outputs = (weights @ v).reshape(count, heads, longest, -1).transpose(1, 2)
    rows_of_tokens = outputs.reshape(count * longest, heads, -1).index_select(0, places)
    return rows_of_tokens.transpose(0, 1)[None]


def sequence_by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: list[int],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention for one sequence after another.

    Args:
        query: (1, heads, t, d).
        key: (1, key heads, t, d).
        value: (1, key heads, t, d).
        cu_seqlens: start of each sequence, then the total length.
        scaling: factor of the attention scores; None for 1 / sqrt(d).
        sliding_window: tokens that a token attends to, including itself; None for all before it.
        softcap: as in `attention`.
        s_aux: as in `attention`.

    Returns:
        The outputs, (1, heads, t, d).
    """
    import torch

    outputs = []
    for start, stop in pairwise(cu_seqlens):
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        mask = window_mask(stop - start, sliding_window, query.device)
        if softcap is not None or s_aux is not None:
            outputs.append(capped_attention(q, k, v, mask, scaling, softcap, s_aux))
            continue
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2)


def window_mask(length: int, sliding_window: int | None, device: Any) -> torch.Tensor | None:
    """Return the mask (length, length) of a sliding window; None if the window covers everything.

    It is True where a query (row) attends to a key (column).
    """
    import torch

    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


def capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the attention of one sequence with soft-capped scores, attention sinks, or both.

    Args:
        q: (1, heads, t, d).
        k: (1, key heads, t, d).
        v: (1, key heads, t, d).
        mask: as `window_mask` returns it.
        scaling: as in `attention`.
        softcap: as in `attention`.
        s_aux: as in `attention`.

    Returns:
        The outputs, (1, heads, t, d).
    """
    import torch

    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(2, 3)).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return weights.to(v.dtype) @ v
