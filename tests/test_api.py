"""The Python API on the echo model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from samples import ECHO_ROLE, TINY

import opencharacter as oc
from opencharacter.errors import UserError

ROLES = ("teacher", "student", "judge", "prompt_generator")
UNTIL = "distillation/pairs"


@pytest.fixture
def recipe(write_yaml):
    path = write_yaml("tiny.yaml", {**TINY, "roles": dict.fromkeys(ROLES, ECHO_ROLE)})
    return oc.load_recipe(path, set={"distillation.pairs.max_drop_rate": 1.0})


def test_importing_the_package_imports_no_heavy_library():
    heavy = "{'ray', 'torch', 'vllm', 'polars', 'transformers'}"
    code = f"import sys, opencharacter; sys.exit(bool({heavy} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_attribute_of_the_package_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = oc.nonesuch


def test_a_recipe_is_loaded_with_overridden_fields():
    recipe = oc.load_recipe("demo", set={"distillation.dpo.beta": 0.2}, smoke=True)
    assert (recipe.name, recipe.distillation.dpo.beta) == ("demo-smoke", 0.2)
    with pytest.raises(UserError, match=r"unknown field 'distillation\.dpo\.betta'"):
        oc.load_recipe("demo", set={"distillation.dpo.betta": 0.2})


def test_a_plan_has_a_row_per_dataset(recipe, tmp_path):
    frame = oc.plan(recipe, ["poeticism"], storage=str(tmp_path / "runs"))
    row = frame.row(by_predicate=pl.col("dataset") == "poeticism/distillation/prompts", named=True)
    assert row["state"] == "missing"
    assert row["rows"] == 16
    assert not (tmp_path / "runs").exists()


def test_a_run_makes_datasets_that_open_as_frames(recipe, tmp_path, poet, cpu_ray):
    storage = str(tmp_path / "runs")
    manifests = oc.run(recipe, ["poeticism"], storage=storage, until="distillation/student")
    prompts = manifests["poeticism/distillation/prompts"]
    assert prompts["recipe"] == recipe.model_dump(mode="json")
    frame = oc.dataset(recipe, "distillation/prompts", poet, storage=storage)
    assert len(frame) == prompts["rows"] == 16
    shared = oc.dataset(recipe, "distillation/student", storage=storage)
    assert set(shared["prompt"]) == set(frame.filter(kind="general")["prompt"])
    assert oc.run(recipe, [poet], storage=storage, until="distillation/student") == {}
    states = oc.plan(recipe, [poet], storage=storage)
    assert states.filter(state="done").height == len(manifests)


def test_a_dataset_that_is_not_there_is_an_error_with_the_command_that_makes_it(recipe, tmp_path):
    storage = str(tmp_path / "runs")
    with pytest.raises(UserError, match=r"prompts is missing in .*; run: opencharacter run tiny"):
        oc.dataset(recipe, "distillation/prompts", "poeticism", storage=storage)
    with pytest.raises(UserError, match=r"persona 'echo/poeticism' is missing in"):
        oc.adapter(recipe, "poeticism", storage=storage)
    with pytest.raises(UserError, match="has no dataset of persona None"):
        oc.dataset(recipe, "distillation/pairs", storage=storage)
    with pytest.raises(UserError, match="stage 'distil' is unknown"):
        oc.dataset(recipe, "distil", "poeticism", storage=storage)


def test_a_single_persona_must_be_in_a_list(recipe):
    with pytest.raises(UserError, match=r"expected a list, for example \['poeticism'\]"):
        oc.plan(recipe, "poeticism")


def test_a_persona_can_be_given_only_once(recipe, poet):
    with pytest.raises(UserError, match="contain a name twice: poeticism, poeticism"):
        oc.plan(recipe, ["poeticism", poet])


def test_a_report_needs_data_in_storage(recipe, tmp_path):
    with pytest.raises(UserError, match="is empty, so there is nothing to report"):
        oc.report(recipe, ["poeticism"], storage=str(tmp_path / "runs"))


def test_the_adapter_is_a_local_folder(recipe, tmp_path, poet):
    from opencharacter.api import Run

    storage = str(tmp_path / "runs")
    job = Run(recipe, [poet], storage=storage).job("persona/merge", "poeticism")
    job.store.write_manifest(job.dataset, {"fingerprint": job.fingerprint, "payload": job.payload})
    folder = oc.adapter(recipe, "poeticism", storage=storage)
    assert folder == Path(storage, job.dataset, "adapter")
