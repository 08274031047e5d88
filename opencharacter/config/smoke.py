"""A recipe at about 1 % of its size, for a quick test of the whole pipeline."""

from __future__ import annotations

from typing import Any

from opencharacter.config.recipe import Recipe


def shrink(recipe: Recipe) -> Recipe:
    """Return the recipe at about 1 % of its size, to test every stage before a real run."""
    distillation, introspection, evaluation = (
        recipe.distillation,
        recipe.introspection,
        recipe.evaluation,
    )

    def percent(count: int, minimum: int) -> int:
        return min(count, max(minimum, count // 100))

    def updated(section: Any, **changes: Any) -> Any:
        return section.model_copy(update=changes)

    return updated(
        recipe,
        name=f"{recipe.name}-smoke",
        distillation=updated(
            distillation,
            prompts=updated(
                distillation.prompts,
                questions_per_trait=min(distillation.prompts.questions_per_trait, 5),
                general=percent(distillation.prompts.general, 10),
            ),
            teacher=updated(distillation.teacher, answers=1),
            student=updated(distillation.student, answers=1),
        ),
        introspection=updated(
            introspection,
            reflection=updated(
                introspection.reflection,
                transcripts_per_prompt=percent(introspection.reflection.transcripts_per_prompt, 2),
            ),
            interaction=updated(
                introspection.interaction,
                free=percent(introspection.interaction.free, 4),
                leading=percent(introspection.interaction.leading, 4),
            ),
        ),
        evaluation=updated(
            evaluation,
            answers=updated(evaluation.answers, count=percent(evaluation.answers.count, 20)),
            preferences=updated(
                evaluation.preferences, games=percent(evaluation.preferences.games, 20)
            ),
            attacks=updated(evaluation.attacks, prompts=percent(evaluation.attacks.prompts, 4)),
            coherence=updated(
                evaluation.coherence, prompts=percent(evaluation.coherence.prompts, 10)
            ),
            scenarios=updated(
                evaluation.scenarios,
                occasions=min(evaluation.scenarios.occasions, 2),
                pressures=min(evaluation.scenarios.pressures, 2),
                lists=min(evaluation.scenarios.lists, 2),
            ),
            drift=updated(
                evaluation.drift,
                conversations=min(evaluation.drift.conversations, 4),
                turns=min(evaluation.drift.turns, 8),
            ),
            direction=updated(
                evaluation.direction,
                texts=min(evaluation.direction.texts, 8),
                prompts=min(evaluation.direction.prompts, 8),
            ),
            projection=updated(evaluation.projection, texts=min(evaluation.projection.texts, 8)),
            side_effects=updated(
                evaluation.side_effects, items=min(evaluation.side_effects.items, 2)
            ),
            capabilities=updated(
                evaluation.capabilities, documents=min(evaluation.capabilities.documents or 4, 4)
            ),
        ),
    )
