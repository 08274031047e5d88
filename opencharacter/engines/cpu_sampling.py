"""Sampling on a CPU, where vLLM's implementation takes as long as the model itself.

For every sampled token, vLLM draws a random number for each token of the vocabulary, and to
penalize repetition it fills tables of that size. Here one number is drawn, and only the tokens that
a sequence contains are penalized. The distribution of the sampled tokens is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.utils.torch_utils import make_tensor_with_pad
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler


def sample(
    logits: torch.Tensor,
    generators: Mapping[int, torch.Generator],
    k: torch.Tensor | None,
    p: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """Sample a token for each row, with the arguments of vLLM's `TopKTopPSampler.forward`.

    Args:
        logits: (rows, vocabulary); may be changed in place.
        generators: random generators of the rows that have a seed.
        k: (rows,); number of tokens to sample from, or None.
        p: (rows,); probability mass to sample from, or None.

    Returns:
        Token ids (rows,), and None in place of processed log-probabilities.
    """
    probabilities = apply_top_k_top_p(logits, k, p).softmax(-1, dtype=torch.float32)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64)
    for row, generator in generators.items():
        uniform[row] = torch.rand(1, generator=generator, dtype=torch.float64)
    return inverse_transform(probabilities, uniform), None


def inverse_transform(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the first token of each row at which the cumulative probability exceeds a number.

    Args:
        probabilities: (rows, vocabulary); need not add up to exactly 1. Of a row of nan, which
            infinite logits cause, the last token is returned.
        uniform: (rows, 1); float64 numbers in [0, 1).
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    return tokens.clamp_(max=probabilities.shape[1] - 1)


def apply_penalties(logits: torch.Tensor, metadata: Any, outputs: list[list[int]]) -> torch.Tensor:
    """Penalize tokens in place, with the arguments of vLLM's `Sampler.apply_penalties`.

    Args:
        logits: (rows, vocabulary).
        metadata: vLLM's `SamplingMetadata` of the batch.
        outputs: the tokens that were generated so far, for each row.
    """
    others = (metadata.frequency_penalties, metadata.presence_penalties)
    if metadata.no_penalties or any(penalties.any() for penalties in others):
        return Sampler.apply_penalties(logits, metadata, outputs)
    generated = make_tensor_with_pad(outputs, pad=-1, dtype=torch.int64, device="cpu")
    tokens = torch.cat([metadata.prompt_token_ids, generated], 1)
    return penalize_repetition(logits, tokens, metadata.repetition_penalties)


def penalize_repetition(
    logits: torch.Tensor, tokens: torch.Tensor, penalties: torch.Tensor
) -> torch.Tensor:
    """Divide positive logits of tokens by a penalty and multiply negative ones by it, in place.

    Keskar et al., "CTRL", arXiv 1909.05858, section 4.1, as vLLM applies it to the whole sequence.

    Args:
        logits: (rows, vocabulary).
        tokens: (rows, length); the tokens of each sequence, of which the first is a token and each
            other one may be padding: any number that is not a token's.
        penalties: (rows,).
    """
    is_token = (tokens >= 0) & (tokens < logits.shape[1])
    tokens = torch.where(is_token, tokens, tokens[:, :1])
    scores, factors = logits.gather(1, tokens), penalties[:, None]
    return logits.scatter_(1, tokens, torch.where(scores > 0, scores / factors, scores * factors))
