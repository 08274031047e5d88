"""Every rendered system prompt equals its golden file, byte for byte.

After an intended change of a prompt: python tests/golden/write.py
"""

import pytest
from golden.write import CONSTITUTIONS, GOLDEN, render_constitution, render_prompts

from opencharacter.constitution import schema

PERSONAS = {persona.name: persona for persona in schema.load_all(["all"])}
NAMES = sorted(path.stem for path in GOLDEN.glob("*.txt"))


def test_every_rendered_prompt_has_a_golden_file(poet):
    assert sorted(render_prompts(poet)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_rendered_prompt_equals_its_golden_file(name, poet):
    assert render_prompts(poet)[name] == (GOLDEN / f"{name}.txt").read_text()


def test_every_packaged_constitution_has_a_golden_file():
    assert sorted(path.stem for path in CONSTITUTIONS.glob("*.txt")) == sorted(PERSONAS)


@pytest.mark.parametrize("name", PERSONAS)
def test_the_prompts_of_a_constitution_equal_their_golden_file(name):
    golden = (CONSTITUTIONS / f"{name}.txt").read_text()
    assert render_constitution(PERSONAS[name]) == golden
