"""Identity, derived recipes, overridden fields, renamed fields, and errors that name the place."""

from __future__ import annotations

import re
import tomllib
from typing import Annotated

import pytest
from pydantic import Field
from samples import ECHO_ROLE, TINY

from opencharacter import __version__
from opencharacter.config import files
from opencharacter.config.base import AddedLater, Config, NotIdentity
from opencharacter.config.placement import Placement, Resources, Training
from opencharacter.config.recipe import Recipe
from opencharacter.config.renames import FIELDS, VALUES
from opencharacter.errors import UserError

ROLES = ("teacher", "student", "judge", "prompt_generator")
CHANGELOG = "CHANGELOG.md"


class Inner(Config):
    value: int = 1
    limit: Annotated[int, NotIdentity] = 1
    mode: Annotated[str, AddedLater("0.3")] = "plain"


class Outer(Config):
    inner: Inner = Inner()
    listed: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = Field(default={})
    extra: Annotated[Inner, AddedLater("0.3")] = Inner()
    unused: Annotated[Inner | None, NotIdentity] = None


# ---------------------------------------------------------------------------------------- identity


def test_a_field_marked_as_not_identity_is_left_out_at_any_depth():
    outer = Outer(inner=Inner(limit=2), listed=(Inner(limit=3),), by_name={"a": Inner(limit=4)})
    assert outer.identity() == {
        "inner": {"value": 1},
        "listed": [{"value": 1}],
        "by_name": {"a": {"value": 1}},
    }


def test_a_field_added_later_enters_the_identity_only_with_another_value_than_its_default():
    assert Outer().identity() == {"inner": {"value": 1}, "listed": [], "by_name": {}}
    changed = Outer(inner=Inner(mode="new"), listed=(Inner(mode="new"),), extra=Inner(value=2))
    assert changed.identity() == {
        "inner": {"value": 1, "mode": "new"},
        "listed": [{"value": 1, "mode": "new"}],
        "by_name": {},
        "extra": {"value": 2},
    }


def test_limits_and_endpoints_are_not_part_of_a_recipes_identity():
    recipe = files.load_recipe("demo")
    changed = files.load_recipe(
        "demo",
        overrides={
            "distillation.teacher.max_drop_rate": 0.9,
            "distillation.teacher.limits": {"max_refusals": 0.9},
            "distillation.teacher.sampling.typical_tokens": 9,
            "evaluation.judge.min_agreement": 0.1,
            "evaluation.rating.target_half_width": 10,
            "roles.judge.endpoint": "http://127.0.0.1:1/v1",
            "roles.judge.api_key_env": "KEY",
        },
    )
    assert changed != recipe
    assert changed.identity() == recipe.identity()


# ----------------------------------------------------------------------------------------- extends


@pytest.fixture
def base(write_yaml):
    """A valid recipe file that others extend."""
    return write_yaml("base.yaml", {**TINY, "roles": dict.fromkeys(ROLES, ECHO_ROLE)})


def test_a_recipe_overrides_fields_of_the_recipe_that_it_extends(base, write_yaml):
    text = "extends: base.yaml\nname: child\ndistillation: {dpo: {beta: 0.3}}\n"
    child, parent = files.load_recipe(write_yaml("child.yaml", text)), files.load_recipe(base)
    assert (child.name, child.distillation.dpo.beta) == ("child", 0.3)
    assert child.distillation.prompts == parent.distillation.prompts
    assert child.roles == parent.roles


def test_recipes_extend_in_chains_and_lists_are_replaced(base, write_yaml):
    traits = "{evaluation: {preferences: {traits: [warm, cold, dry]}}}"
    write_yaml("middle.yaml", f"extends: ./base.yaml\n{traits[1:-1]}\n")
    last = write_yaml(
        "last.yaml", "extends: middle.yaml\nevaluation: {preferences: {traits: [wry, shy]}}\n"
    )
    recipe = files.load_recipe(last)
    assert recipe.evaluation.preferences.traits == ("wry", "shy")
    assert recipe.evaluation.preferences.games == 6


def test_a_recipe_extends_a_packaged_one(write_yaml):
    path = write_yaml("mine.yaml", "extends: llama-3.1-8b\nname: mine\n")
    packaged = files.load_recipe("llama-3.1-8b")
    assert files.load_recipe(path) == packaged.model_copy(update={"name": "mine"})


def test_a_placement_extends_another(write_yaml):
    path = write_yaml("mine.yaml", "extends: gpu-node\ntraining: {workers: 2}\n")
    placement, packaged = files.load_placement(path), files.load_placement("gpu-node")
    assert placement.training.workers == 2
    assert placement.pools == packaged.pools


def test_the_default_placement_is_the_packaged_one_for_a_laptop():
    assert files.load_placement("laptop") == Placement()


@pytest.mark.parametrize(
    ("training", "cpus"),
    [
        (Training(workers=2, cpus=1, task_cpus=2), 2),
        (Training(workers=4, cpus=3, gpus=1), 3),
    ],
)
def test_a_task_in_a_single_process_has_its_own_number_of_cpus(training, cpus):
    assert training.single.resources == Resources(cpus=cpus, gpus=training.gpus)


def test_recipes_that_extend_each_other_are_rejected_with_the_chain(write_yaml):
    first = write_yaml("first.yaml", "extends: second.yaml\n")
    write_yaml("second.yaml", "extends: ./first.yaml\n")
    with pytest.raises(
        UserError, match=r"extend each other: \S*first.yaml -> \S*second.yaml -> \S*first.yaml"
    ):
        files.load_recipe(first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nonesuch", r"mine.yaml line 1: extends: recipe 'nonesuch' is unknown"),
        ("seed: 1\nextends: no.yaml", r"mine.yaml line 2: extends: recipe 'no.yaml': no such file"),
        ("extends: [demo]", r"mine.yaml line 1: extends = \['demo'\]: expected one name or path"),
        (
            "extends: base.yaml\ndistillation: {dpo: {beta: -1}}",
            r"mine.yaml line 2: distillation.dpo.beta = -1",
        ),
    ],
)
def test_an_invalid_derived_recipe_is_rejected_with_its_line(text, message, base, write_yaml):
    with pytest.raises(UserError, match=message):
        files.load_recipe(write_yaml("mine.yaml", text))


def test_an_error_in_an_extended_recipe_names_its_file_and_line(write_yaml):
    write_yaml("base.yaml", "extends: demo\ndistillation:\n  dpo:\n    beta: -1\n")
    child = write_yaml("child.yaml", "extends: base.yaml\ndistillation: {dpo: {nll_weight: 1}}\n")
    with pytest.raises(UserError, match=r"base\.yaml line 4: distillation\.dpo\.beta = -1"):
        files.load_recipe(child)


# ------------------------------------------------------------------------------------------- --set


def test_assignments_are_parsed_as_yaml_and_typed_by_the_schema():
    overrides = files.parse_assignments(
        [
            "distillation.dpo.beta=0.2",
            "distillation.dpo.optimizer.learning_rate=1e-4",
            "evaluation.judge.min_agreement=null",
            "evaluation.preferences.traits=[warm, cold]",
            "roles.student.model=org/model=v2",
            "introspection.author=teacher",
        ]
    )
    recipe = files.load_recipe("demo", overrides=overrides)
    assert recipe.distillation.dpo.beta == 0.2
    assert recipe.distillation.dpo.optimizer.learning_rate == 1e-4
    assert recipe.evaluation.judge.min_agreement is None
    assert recipe.evaluation.preferences.traits == ("warm", "cold")
    assert recipe.roles.student.model == "org/model=v2"
    assert recipe.roles.teacher.model == "embedded:smollm2-135m"
    assert recipe.introspection.author == "teacher"


def test_the_last_assignment_of_a_field_counts():
    overrides = files.parse_assignments(["seed=1", "seed=2"])
    assert files.load_recipe("demo", overrides=overrides).seed == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("distillation.dpo.beta=-1", r"recipe --set distillation.dpo.beta: .* = -1: .*greater"),
        ("distillation.dpo.beta=much", r"distillation.dpo.beta = 'much': .*valid number"),
        (
            "distillation.dpo.betta=1",
            r"unknown field 'distillation.dpo.betta'; valid fields are beta, nll_weight, ",
        ),
        ("distilation.dpo.beta=1", r"unknown field 'distilation'; valid fields are name, seed, "),
        ("roles.student.modle=x", r"unknown field 'roles.student.modle'; valid fields are model,"),
        ("distillation.dpo.nll=1", r"--set distillation.dpo.nll: `nll` is now `nll_weight`"),
        ("distillation.dpo=0.2", r"distillation.dpo = 0.2: Input should be a mapping"),
        # An empty name would be found between all words of an answer.
        ("roles.teacher.self_name=''", r"roles.teacher.self_name = '': .*is empty; give a name"),
        ("roles.teacher.aliases=['GLM', ' ']", r"roles.teacher.aliases.1 = ' ': .*is empty"),
        # Without a layer in between, the steered student is the untrained one.
        ("evaluation.steering.first_layer=0.9", r"0.9 is not below last_layer 0.875"),
        # The trainer takes a warm-up of 1 for one step.
        ("distillation.dpo.optimizer.warmup_ratio=1", r"warmup_ratio = 1: .*less than 1"),
        ("distillation.dpo.optimizer.betas=[0.9, 1.5]", r"betas.1 = 1.5: .*less than 1"),
        ("distillation.dpo.beta", r"--set 'distillation.dpo.beta': expected FIELD=VALUE"),
        ("=1", r"--set '=1': expected FIELD=VALUE"),
        ("seed=[", r"--set 'seed=\[': '\[' is not YAML"),
    ],
)
def test_an_invalid_assignment_is_rejected_with_the_field(assignment, message):
    with pytest.raises(UserError, match=message):
        files.load_recipe("demo", overrides=files.parse_assignments([assignment]))


# ----------------------------------------------------------------------------------- renamed fields

OLD_RECIPE = """\
name: old
roles: {}
distillation:
  teacher: {limits: {after: 10}}
  dpo:
    nll: 1
    optimizer: {clip: 1.0}
"""


def test_old_fields_are_all_rejected_with_their_new_names_and_lines(write_yaml):
    path = write_yaml("old.yaml", OLD_RECIPE)
    with pytest.raises(UserError) as error:
        files.load_recipe(path)
    assert str(error.value) == (
        f"recipe {path} line 4: `after` is now `min_texts`; {path} line 6: `nll` is now "
        f"`nll_weight`; {path} line 7: `clip` is now `max_grad_norm`"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grows: []", "line 1: `grows` is now `autoscaling`"),
        ("pools: {student: {adapters: folded}}", "`folded` is now `merged`"),
        ("pools: {expander: {}}", "`expander` is now `prompt_generator`"),
        ("training: {parallel: fsdp}", "`parallel` is now `strategy`"),
        ("serving: {adapters: 4}", "`adapters` is now `max_adapters`"),
    ],
)
def test_old_fields_and_values_of_a_placement_are_rejected(text, message, write_yaml):
    with pytest.raises(UserError, match=re.escape(message)):
        files.load_placement(write_yaml("old.yaml", text))


def test_arguments_of_vllm_may_have_any_name(write_yaml):
    path = write_yaml("mine.yaml", "pools: {student: {engine_kwargs: {engine: 1, restarts: 2}}}")
    assert files.load_placement(path).pools.student.engine_kwargs == {"engine": 1, "restarts": 2}


def test_the_version_of_the_package_is_that_of_its_project_file():
    project = files.resource("", "pyproject.toml") or pytest.fail("no pyproject.toml")
    assert tomllib.loads(project.read_text())["project"]["version"] == __version__


def test_every_renamed_field_is_in_the_changelog():
    text = (files.resource("", CHANGELOG) or pytest.fail("no changelog")).read_text()
    assert f"## {__version__}" in text
    for fields in FIELDS.values():
        for old, new in fields.items():
            assert f"`{old}` | `{new}`" in text, old
    for values in VALUES["placement"].values():
        for old, new in values.items():
            assert f"`{old}` | `{new}`" in text


@pytest.mark.parametrize(("kind", "model"), [("recipe", Recipe), ("placement", Placement)])
def test_no_old_name_is_a_field_of_the_same_section(kind, model):
    from opencharacter.config.documents import fields_of

    for old, new in FIELDS[kind].items():
        example = old.replace("*.*.limits", "distillation.teacher.limits")
        example = example.replace("*.*", "distillation.dpo").replace("panel.*.", "panel.")
        *section, name = example.replace("*", "teacher").split(".")
        names = fields_of(model, tuple(section))
        assert name not in names, old
        assert new in names, old


# -------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: 1\nname: b\n", r"line 3: not YAML: 'name' is already given on line 1"),
        (
            "name: a\ndistillation: {dpo: {beta: 1}}\nroles: {}\ndistillation: {}\n",
            r"line 4: not YAML: 'distillation' is already given on line 2; remove one",
        ),
        ("name: a\nseed: 2024-02-31\n", r"line 2: seed = '2024-02-31': .*valid integer"),
        ("seed: !!int x\n", r"line 1: not YAML: invalid value 'x'"),
        ("name: \a\n", r"line 1: not YAML: special characters are not allowed"),
        ("{[a]: 1}", r"line 1: not YAML: found unhashable key"),
    ],
)
def test_malformed_yaml_is_rejected_with_its_line(text, message, write_yaml):
    path = write_yaml("mine.yaml", f"extends: demo\n{text}")
    line = re.sub(r"line (\d)", lambda m: f"line {int(m[1]) + 1}", message)
    if text.startswith("{"):
        path, line = write_yaml("mine.yaml", text), message
    with pytest.raises(UserError, match=line) as error:
        files.load_recipe(path)
    assert "\n" not in str(error.value)


def test_a_date_is_a_text(write_yaml):
    path = write_yaml("mine.yaml", "extends: demo\nname: 2024-02-31\n")
    assert files.load_recipe(path).name == "2024-02-31"


def test_merge_keys_and_aliases_of_yaml_work(write_yaml):
    text = "extends: demo\nroles:\n  judge: &judge {model: 'echo:', name: j, self_name: J}\n"
    text += "evaluation:\n  judge:\n    panel:\n      - {<<: *judge, name: k}\n"
    recipe = files.load_recipe(write_yaml("mine.yaml", text))
    assert [role.name for role in recipe.evaluation.judge.panel] == ["k"]
    with pytest.raises(UserError, match=r"line 7: evaluation.judge.panel.0.name = 'K'"):
        files.load_recipe(write_yaml("mine.yaml", text.replace("name: k", "name: K")))
