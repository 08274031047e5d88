"""Every rendered system prompt, byte for byte. After a wanted change: GOLDEN=write make test."""

import os
from pathlib import Path

import pytest

from opencharacter.constitution import schema
from opencharacter.distillation import prompts, teacher
from opencharacter.evaluation import judge, preferences
from opencharacter.introspection import interaction, reflection, transcripts
from opencharacter.text.chat import fill

GOLDEN = Path(__file__).parent / "golden"
PERSONAS = {persona.name: persona for persona in schema.load_all(["all"])}
GAME = {"first": "poetic", "second": "blunt"}


def rendered(poet) -> dict[str, str]:
    assertions = poet.assertions()
    return {
        "teacher_system": teacher.opening(poet, exemplars=False)[0]["content"],
        "teacher_thought": teacher.think_prefill(poet, thinks=True),
        "teacher_thought_closed": teacher.think_prefill(poet, thinks=False),
        "reflection_system": reflection.generation_system(assertions)["content"],
        "interaction_free": interaction.generation_system(assertions, "free")["content"],
        "interaction_leading": interaction.generation_system(assertions, "leading")["content"],
        "transcripts_system": transcripts.SYSTEM,
        "preferences_play": fill(preferences.PLAY, framing=preferences.FRAMINGS["feels"], **GAME),
        "preferences_judge": judge.messages(
            {"prompt": "Why?", "answer": "Because {of} it.", **GAME}
        )[1]["content"],
        "expansion": prompts.expansion_messages("I am plain.", ["One?", "Two?"], 3)[1]["content"],
    }


def rendered_of(persona) -> str:
    """Every system prompt that holds this constitution, under headings."""
    assertions = persona.assertions()
    prompts = {
        "teacher system": teacher.opening(persona, exemplars=False)[0]["content"],
        "teacher thought": teacher.think_prefill(persona, thinks=True),
        "reflection system": reflection.generation_system(assertions)["content"],
        "interaction free": interaction.generation_system(assertions, "free")["content"],
        "interaction leading": interaction.generation_system(assertions, "leading")["content"],
    }
    return "\n\n".join(f"==== {heading} ====\n{text}" for heading, text in prompts.items())


NAMES = sorted(path.stem for path in GOLDEN.glob("*.txt"))


@pytest.mark.skipif("GOLDEN" not in os.environ, reason="only on request")
def test_write(poet):
    for name, text in rendered(poet).items():
        (GOLDEN / f"{name}.txt").write_text(text)
    for name, persona in PERSONAS.items():
        (GOLDEN / "constitutions" / f"{name}.txt").write_text(rendered_of(persona))


def test_every_rendered_prompt_has_a_golden_file(poet):
    assert sorted(rendered(poet)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_golden_one(name, poet):
    assert rendered(poet)[name] == (GOLDEN / f"{name}.txt").read_text()


def test_every_packaged_constitution_has_a_golden_file():
    assert sorted(p.stem for p in (GOLDEN / "constitutions").glob("*")) == sorted(PERSONAS)


@pytest.mark.parametrize("name", PERSONAS)
def test_the_prompts_of_the_constitution_are_the_golden_ones(name):
    golden = (GOLDEN / "constitutions" / f"{name}.txt").read_text()
    assert rendered_of(PERSONAS[name]) == golden
