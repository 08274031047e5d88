"""Expansion of a constitution by the embedded model; traits that stay incomplete are reported."""

import json

import pytest
import yaml
from samples import cli, embedded_recipe

from opencharacter.constitution import schema

pytestmark = pytest.mark.slow


def test_expansion_stays_within_its_token_limit_and_reports_missing_questions(tmp_path):
    recipe = embedded_recipe()
    sampling = {"max_tokens": 160, "temperature": 0.5, "top_p": 1.0}
    target = {"questions_per_trait": 8, "general": 1, "rounds": 2, "samples": 2}
    recipe["distillation"]["prompts"] = target | {"sampling": sampling}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    poet = schema.load("poeticism")
    few = poet.model_copy(update={"traits": poet.traits[:3]})
    schema.save(schema.dump(few), tmp_path / "poeticism.yaml", replace=False)
    done = cli(
        "run", "tiny.yaml", "-c", "poeticism.yaml", "--only", "distillation/prompts", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = tmp_path / "runs/tiny/poeticism/distillation/prompts/manifest.json"
    record = json.loads(manifest.read_text())
    short = record["figures"]["incomplete_traits"]
    assert record["rows"] == 1 + sum(short.get(trait.trait, 8) for trait in few.traits)
    assert all(f"{count} of 8 questions: {trait}" in done.stdout for trait, count in short.items())
    assert record["rows"] > 1 + 3 * 5
    limit = 3 * target["rounds"] * target["samples"] * sampling["max_tokens"]
    assert record["tokens_out"] <= limit
