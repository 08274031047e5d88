"""LoRA at run time on a CPU: adapters are applied to their own requests only, and fast.

VLLM keeps the adapters of a batch in numbered slots, and -1 is the slot of requests without one.
Its implementation for CPUs copies an adapter's matrices once per token, which takes most of the
time of a step. It also reads slot -1 as the last one, so that requests without an adapter get the
adapter in the last slot, if all slots are filled. Here each adapter's matrices are multiplied once,
by the activations of all its tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Groups = list[tuple[int, torch.Tensor | None]]
"""The slots of a batch with the rows of their tokens; None for all rows."""


def group_by_slot(slots: torch.Tensor) -> Groups:
    """Group rows by their slot; rows without an adapter (-1) are in no group."""
    distinct = slots.unique().tolist()
    if len(distinct) == 1:
        return [(slot, None) for slot in distinct if slot >= 0]
    return [(slot, (slots == slot).nonzero().squeeze(1)) for slot in distinct if slot >= 0]


def add_products(
    out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, groups: Groups, scale: float = 1.0
) -> None:
    """Add `scale * x @ weights[slot].T` to the rows of each slot, in the data type of `out`.

    Args:
        out: (tokens, features out); changed in place.
        x: (tokens, features in).
        weights: (slots, 1, features out, features in), a matrix for each slot. Features beyond
            those of `out` are padding.
        groups: the rows of each slot.
        scale: factor of the products.
    """
    width = min(weights.shape[-2], out.shape[1])
    for slot, rows in groups:
        matrix = weights[slot].flatten(0, -2)[:width].to(out.dtype)
        if rows is None:
            out[:, :width] += scale * (x.to(out.dtype) @ matrix.T)
        else:
            out[rows, :width] += scale * (x[rows].to(out.dtype) @ matrix.T)


class GroupedLora(PunicaWrapperCPU):
    """Applies adapters group by group, in the place of vLLM's implementation for CPUs."""

    tokens: Groups
    samples: Groups

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Group the tokens of a batch, and the rows that are sampled."""
        super().update_metadata(*args, **kwargs)
        self.tokens = group_by_slot(self.token_lora_indices)
        self.samples = group_by_slot(self.sampler_indices)

    def _apply_shrink(
        self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float
    ) -> None:
        add_products(y.view(-1, y.shape[-1]).zero_(), x, w_t_all, self.tokens, scale)

    def _apply_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w_t_all: torch.Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        out = y[:, y_offset : y_offset + y_slice_size]
        add_products(out if add_inputs else out.zero_(), x, w_t_all, self.tokens)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add the adapters of an embedding, whose first factor vLLM has looked up."""
        add_products(y if add_inputs else y.zero_(), x, lora_b_stacked, self.tokens)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapters of the output layer to the logits."""
        x = x.view(-1, x.shape[-1])
        reduced = torch.zeros(len(x), lora_b_stacked.shape[-1], dtype=torch.float32)
        add_products(reduced, x, lora_a_stacked, self.samples, scale)
        add_products(y.view(-1, y.shape[-1]), reduced, lora_b_stacked, self.samples)
