"""Positions of texts along a constitution's direction in the student's residual stream.

A layer's direction is that of evaluation/steering: the one along which the states where an answer
begins differ most between prompts with and without the constitution. The position of a text is the
projection of the layer's mean state over the text's answer tokens, read by the untrained student
without the constitution. The method follows persona vectors (Chen et al., arXiv 2507.21509).

Positions have no unit of their own. They are stated in standard deviations (SD) of the untrained
student's answers, as in Glass's delta: 0 is the mean of these answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opencharacter.errors import StageFailed
from opencharacter.evaluation.intervals import student_quantile
from opencharacter.evaluation.report.sections import Distance
from opencharacter.evaluation.steering import direction, last_states, mean_states, steered_layers
from opencharacter.text.chat import Message, user
from opencharacter.text.templates import encode

if TYPE_CHECKING:
    import torch

Vector = NDArray[np.float64]
"""Positions of one text, shape (layers,)."""
Positions = Mapping[str, Vector]
"""Positions by what is independent: the prompt of a text."""

MIDDLE = (0.2, 0.8)
"""The middle layers, as fractions of the depth, which are summarized by one number."""


# --------------------------------------------------------------------------------------- the model


def find_directions(
    model: Any, tokenizer: Any, prompts: list[str], context: list[Message]
) -> torch.Tensor:
    """The unit vectors of all layers, shape (layers, hidden)."""
    import torch

    plain = last_states(model, tokenizer, [[user(text)] for text in prompts])
    informed = last_states(model, tokenizer, [[*context, user(text)] for text in prompts])
    return torch.stack(
        [direction(informed[:, layer], plain[:, layer]) for layer in range(plain.shape[1])]
    )


def answer_tokens(
    tokenizer: Any, conversation: list[Message], max_tokens: int
) -> tuple[list[int], list[int]] | None:
    """The tokens of a conversation that are read, and the positions of its assistant turns.

    Args:
        tokenizer: the student's.
        conversation: messages with at least one assistant turn.
        max_tokens: tokens that are read at most, from the beginning.

    Returns:
        Token ids and positions, or None if no answer token is among those that are read.
    """
    sequences = encode(tokenizer, conversation)
    if not sequences:
        return None
    positions = [n for n in sequences[0].loss_positions if n < max_tokens]
    return (sequences[0].ids[:max_tokens], positions) if positions else None


def project(
    model: Any,
    tokenizer: Any,
    directions: torch.Tensor,
    conversations: list[list[Message]],
    max_tokens: int,
) -> list[list[float] | None]:
    """The positions of texts along the layers' directions; None for a text that was not read.

    A text is read up to `max_tokens`; its state is the mean over its answer tokens.
    """
    encoded = [answer_tokens(tokenizer, c, max_tokens) for c in conversations]
    read = [tokens for tokens in encoded if tokens]
    if not read:
        return [None] * len(conversations)
    states = mean_states(model, [ids for ids, _ in read], [positions for _, positions in read])
    found = iter((states * directions).sum(-1).tolist())
    return [next(found) if tokens else None for tokens in encoded]


# ------------------------------------------------------------------------------------- statistics


def by_prompt(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Vector], int]:
    """The mean positions of each prompt's texts, and the number of texts that were not read."""
    texts: dict[str, list[Vector]] = {}
    for row in rows:
        if row["positions"] is not None:
            texts.setdefault(row["prompt"], []).append(np.asarray(row["positions"], float))
    unread = sum(row["positions"] is None for row in rows)
    return {prompt: np.mean(vectors, 0) for prompt, vectors in texts.items()}, unread


@dataclass(frozen=True)
class Scale:
    """The unit of positions: the untrained student's answers.

    Args:
        mean: mean of their positions in each layer, shape (layers,).
        spread: standard deviation of their positions in each layer, shape (layers,).
        n: number of their prompts.
    """

    mean: Vector
    spread: Vector
    n: int

    @classmethod
    def of(cls, positions: Positions) -> Scale:
        """The scale of some answers.

        Raises:
            StageFailed: if there are fewer than two, or all are equal in a layer.
        """
        if len(positions) < 2:
            raise StageFailed(
                f"{len(positions)} answers of the untrained student were read, and at least 2 are "
                "needed for a scale; raise evaluation.direction.texts"
            )
        stacked = np.stack(list(positions.values()))
        spread = stacked.std(0, ddof=1)
        if not spread.all():
            raise StageFailed(
                "the untrained student's answers are all at one position of a layer, so there is "
                "no scale; use prompts with different answers"
            )
        return cls(stacked.mean(0), spread, len(positions))

    def standardize(self, positions: Positions) -> dict[str, Vector]:
        """Positions in SD about the mean, with the mean of the middle layers added at the end.

        The added column has the unit of a mean of SDs, which `summarize` brings to its own SD.
        """
        scaled = {prompt: (v - self.mean) / self.spread for prompt, v in positions.items()}
        middle = steered_layers(len(self.mean), *MIDDLE)
        return {
            prompt: np.append(v, v[middle.start : middle.stop].mean())
            for prompt, v in scaled.items()
        }


def summarize(
    after: Positions, before: Positions, unread: int = 0, paired: bool = True
) -> list[Distance]:
    """How far texts lie from the untrained student's answers, in SD of these, for each column.

    The variance adds that of the unit itself: for a distance d in SD of m answers it is
    d**2 / (2 (m - 1)), as for Glass's delta (Hedges, 1981). The degrees of freedom are those of
    Welch and Satterthwaite.

    Args:
        after: positions by prompt.
        before: the positions of the untrained student's answers.
        unread: number of texts that were not read.
        paired: whether the same prompts were answered; then the differences are paired by prompt.
    """
    reference = np.stack(list(before.values()))
    m, spread = len(reference), reference.std(0, ddof=1)
    shared = [prompt for prompt in after if prompt in before]
    if paired:
        moved = [after[prompt] - before[prompt] for prompt in shared]
        unread += len(after) + len(before) - 2 * len(shared)
    else:
        moved = [vector - reference.mean(0) for vector in after.values()]
    n, columns = len(moved), reference.shape[1]
    if not n:
        return [Distance(None, None, None, 0, unread)] * columns
    distances = np.stack(moved) / spread
    values = distances.mean(0)
    if n < 2:
        return [Distance(float(value), None, None, n, unread) for value in values]
    error = distances.var(0, ddof=1) / n
    freedom = np.full(columns, n - 1.0)
    if not paired:
        parts = error**2 / (n - 1) + (1 / m) ** 2 / (m - 1)
        error = error + 1 / m
        freedom = error**2 / parts
    quantiles = np.array([student_quantile(int(f)) for f in freedom])
    half = quantiles * np.sqrt(error + values**2 / (2 * (m - 1)))
    return [
        Distance(float(value), float(value - h), float(value + h), n, unread)
        for value, h in zip(values, half, strict=True)
    ]


def shown_layers(layers: int) -> dict[str, int]:
    """Columns of the report: the middle layers together, and layers at three depths."""
    depths = {math.ceil(layers * share): None for share in (0.25, 0.5, 0.75)}
    return {"Middle layers": layers} | {f"Layer {layer}": layer - 1 for layer in depths}


def about(name: str, column: int, layers: int) -> str:
    """The subject of a score: the texts, and the layer from 1."""
    return f"{name}, {'middle layers' if column == layers else f'layer {column + 1}'}"
