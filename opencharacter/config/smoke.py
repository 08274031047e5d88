"""A recipe at about 1 % of its size."""

from __future__ import annotations

from typing import Any

from opencharacter.config.recipe import Recipe


def shrink(recipe: Recipe) -> Recipe:
    """The same recipe at about 1 % of its size, to see every stage work before a real run."""
    distillation, introspection, evaluation = (
        recipe.distillation,
        recipe.introspection,
        recipe.evaluation,
    )

    def percent(count: int, least: int) -> int:
        return min(count, max(least, count // 100))

    def less(section: Any, **changes: Any) -> Any:
        return section.model_copy(update=changes)

    return less(
        recipe,
        name=f"{recipe.name}-smoke",
        distillation=less(
            distillation,
            prompts=less(
                distillation.prompts,
                questions_per_trait=min(distillation.prompts.questions_per_trait, 5),
                general=percent(distillation.prompts.general, 10),
            ),
            teacher=less(distillation.teacher, answers=1),
            student=less(distillation.student, answers=1),
        ),
        introspection=less(
            introspection,
            reflection=less(
                introspection.reflection,
                transcripts_per_prompt=percent(introspection.reflection.transcripts_per_prompt, 2),
            ),
            interaction=less(
                introspection.interaction,
                free=percent(introspection.interaction.free, 4),
                leading=percent(introspection.interaction.leading, 4),
            ),
        ),
        evaluation=less(
            evaluation,
            answers=less(evaluation.answers, count=percent(evaluation.answers.count, 20)),
            preferences=less(
                evaluation.preferences, games=percent(evaluation.preferences.games, 20)
            ),
            attacks=less(evaluation.attacks, prompts=percent(evaluation.attacks.prompts, 4)),
            coherence=less(evaluation.coherence, prompts=percent(evaluation.coherence.prompts, 10)),
            capabilities=less(
                evaluation.capabilities, documents=min(evaluation.capabilities.documents or 4, 4)
            ),
        ),
    )
