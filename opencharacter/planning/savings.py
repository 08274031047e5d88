"""Smaller versions of a recipe, for `plan` to show what they save and what they cost in quality."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from opencharacter.config.recipe import Recipe


class Saving(NamedTuple):
    """A smaller recipe.

    Args:
        change: what is reduced, such as `K 5 -> 3 answers`.
        recipe: the smaller recipe.
        effect: what this does to the results.
    """

    change: str
    recipe: Recipe
    effect: str


def savings(recipe: Recipe) -> Iterator[Saving]:
    """Yield the recipe with fewer answers, with fewer transcripts, and with fewer games."""
    from opencharacter.evaluation.preferences import all_traits
    from opencharacter.evaluation.rating import half_width

    distillation, introspection = recipe.distillation, recipe.introspection
    k = distillation.teacher.answers
    if k > 1:
        fewer = {"answers": math.ceil(k / 2)}
        reduced = replace_fields(distillation, teacher=fewer, student=fewer)
        share = 1 - fewer["answers"] / k
        yield Saving(
            f"K {k} -> {fewer['answers']} answers",
            recipe.model_copy(update={"distillation": reduced}),
            f"{share:.0%} fewer preference pairs",
        )
    reflection, interaction = introspection.reflection, introspection.interaction
    half = replace_fields(
        introspection,
        reflection={"transcripts_per_prompt": math.ceil(reflection.transcripts_per_prompt / 2)},
        interaction={
            "free": math.ceil(interaction.free / 2),
            "leading": math.ceil(interaction.leading / 2),
        },
    )
    yield Saving(
        "half the transcripts",
        recipe.model_copy(update={"introspection": half}),
        "half the training data of SFT",
    )
    evaluation = recipe.evaluation
    preferences, scale = evaluation.preferences, evaluation.rating.scale
    games, traits = math.ceil(preferences.games / 2), len(preferences.traits or all_traits())
    before, after = (half_width(count, traits, scale) for count in (preferences.games, games))
    fewer_games = replace_fields(evaluation, preferences={"games": games})
    yield Saving(
        f"{preferences.games:,} -> {games:,} games",
        recipe.model_copy(update={"evaluation": fewer_games}),
        f"ratings +-{before:.0f} -> +-{after:.0f} points",
    )


def replace_fields(group: Any, **sections: dict[str, Any]) -> Any:
    """Return a group of sections with some fields of some sections replaced."""
    return group.model_copy(
        update={
            name: getattr(group, name).model_copy(update=fields)
            for name, fields in sections.items()
        }
    )
