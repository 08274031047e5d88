"""Every ablation in the README is a line that a recipe takes, and remakes only what it is about."""

import re
from pathlib import Path

import pytest
import yaml
from samples import ECHO_ROLE, TINY
from test_pipeline import finish_all, stale

from opencharacter.config.recipe import Recipe

README = Path(__file__).parent.parent / "README.md"
FIRST_REMADE = {
    "persona.merge": "persona/merge",
    "introspection.interaction": "introspection/interaction",
    "introspection.reflection": "introspection/reflection",
    "introspection.author": "introspection/reflection",
    "persona.blend": "persona/blend",
    "evaluation.answers": "persona/tune",
}


def lines() -> list[str]:
    table = README.read_text().partition("#### Ablations")[2].partition("\n\nThe last two")[0]
    return re.findall(r"\| `([a-z.]+_?[a-z_]*: [^`]+)`", table)


def recipe(line: str = "") -> Recipe:
    """The tiny recipe with a dotted line of the README."""
    dotted, _, value = line.partition(": ")
    data = yaml.safe_load(yaml.safe_dump(TINY))
    data["roles"] = dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), ECHO_ROLE)
    *folders, name = dotted.split(".")
    within = data
    for folder in folders:
        within = within.setdefault(folder, {})
    if line:
        new = yaml.safe_load(value)
        within[name] = within.get(name, {}) | new if isinstance(new, dict) else new
    return Recipe.model_validate(data)


def test_every_ablation_is_in_the_readme():
    fields = [".".join(line.split(":")[0].split(".")[:2]) for line in lines()]
    assert set(fields) == set(FIRST_REMADE)


@pytest.mark.parametrize("line", lines())
def test_an_ablation_reruns_no_stage_before_the_one_that_it_changes(line, make_jobs):
    finish_all(make_jobs(recipe()))
    field = ".".join(line.split(":")[0].split(".")[:2])
    changed = recipe(line)
    made = make_jobs(changed)
    remade = [job.stage.name for job in made if job.stage.name in stale(made)]
    assert remade[0] == FIRST_REMADE[field]
    assert not {"distillation/dpo", "distillation/teacher", "evaluation/judge"} & set(remade)
    assert "evaluation/report" in remade
