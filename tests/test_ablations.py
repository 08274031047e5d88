"""Every documented ablation is a valid recipe line and reruns only the stages it affects."""

import re
from pathlib import Path

import pytest
import yaml
from samples import ECHO_ROLE, TINY
from test_pipeline import finish_all, stale

from opencharacter.config.recipe import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "ablations.md"
FIRST_STALE = {
    "persona.merge": "persona/merge",
    "introspection.interaction": "introspection/interaction",
    "introspection.reflection": "introspection/reflection",
    "introspection.author": "introspection/reflection",
    "persona.blend": "persona/blend",
    "evaluation.answers": "persona/tune",
}


def lines() -> list[str]:
    table = PAGE.read_text(encoding="utf-8").partition("\n\nFor example")[0]
    return re.findall(r"\| `([a-z.]+_?[a-z_]*: [^`]+)`", table)


def recipe(line: str = "") -> Recipe:
    """Return the tiny recipe with one line, `section.field: value`, changed."""
    dotted, _, value = line.partition(": ")
    data = yaml.safe_load(yaml.safe_dump(TINY))
    data["roles"] = dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), ECHO_ROLE)
    *folders, name = dotted.split(".")
    section = data
    for folder in folders:
        section = section.setdefault(folder, {})
    if line:
        new = yaml.safe_load(value)
        section[name] = section.get(name, {}) | new if isinstance(new, dict) else new
    return Recipe.model_validate(data)


def test_every_ablation_is_documented():
    fields = [".".join(line.split(":")[0].split(".")[:2]) for line in lines()]
    assert set(fields) == set(FIRST_STALE)


@pytest.mark.parametrize("line", lines())
def test_an_ablation_reruns_no_stage_before_the_one_that_it_changes(line, make_jobs):
    finish_all(make_jobs(recipe()))
    field = ".".join(line.split(":")[0].split(".")[:2])
    jobs = make_jobs(recipe(line))
    stages = stale(jobs)
    ordered = [job.stage.name for job in jobs if job.stage.name in stages]
    assert ordered[0] == FIRST_STALE[field]
    assert not {"distillation/dpo", "distillation/teacher", "evaluation/judge"} & set(ordered)
    assert "evaluation/report" in ordered
