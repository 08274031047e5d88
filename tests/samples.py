"""Recipes for tests: the whole pipeline at its smallest."""

from opencharacter.config import Recipe

ECHO_ROLE = {"model": "echo:", "name": "echo", "called": "Echo", "context": 2048}

TINY = {
    "name": "tiny",
    "distillation": {
        "prompts": {"questions_per_trait": 1, "general": 6},
        "teacher": {"answers": 2, "exemplars": True, "prefill": False},
        "student": {"answers": 2},
    },
    "introspection": {
        "reflection": {"transcripts_per_prompt": 1},
        "interaction": {"free": 2, "leading": 2, "turns": 4},
    },
    "evaluation": {"answers": {"count": 6}, "preferences": {"games": 6}},
}


def recipe_of(role: dict, **changes: dict) -> Recipe:
    roles = dict.fromkeys(("teacher", "student", "judge", "expander"), role)
    return Recipe.model_validate({**TINY, "roles": roles, **changes})
