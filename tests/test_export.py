import json
from typing import ClassVar

import huggingface_hub
import pyarrow as pa
import pytest
import torch
from huggingface_hub import ModelCard
from samples import ECHO_ROLE, cli, recipe_of

from opencharacter import pipeline
from opencharacter.errors import UserError
from opencharacter.evaluation.report.stage import SCORES
from opencharacter.persona import merge
from opencharacter.persona.export import export, scores_table, select_scores
from opencharacter.runtime.stage import StageResult

DROPS = {"looping": 3, "refusal": 1}
FIGURES = {"loss": 0.5, "dpo/margin": 7.0, "rank": 16, "relative_error": 0.0}


def score(persona, measure, condition, value, about=None):
    numbers = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40, "unscored": 2}
    what = {"persona": persona, "measure": measure, "condition": condition, "about": about}
    return what | numbers


SCORED = [
    score("poeticism", "discriminability", None, 0.93),
    score("humor", "discriminability", None, 0.51),
    score("poeticism", "rating", "full", 1120, "poetic"),
    score("poeticism", "change", "full", 120, "poetic"),
]


@pytest.fixture(scope="session")
def trained(tiny_model, tmp_path_factory):
    """Two random adapters of the tiny model in the format of training, by stage."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = {}
    for seed, stage in enumerate(("distillation/dpo", "introspection/sft")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        folders[stage] = tmp_path_factory.mktemp("adapter")
        get_peft_model(base, lora).save_pretrained(folders[stage])
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folders[stage])
    return folders


@pytest.fixture
def recipe(tiny_model):
    student = {"model": str(tiny_model), "name": "tiny-llama", "self_name": "Tiny"}
    student["max_model_len"] = 2048
    roles = {
        "student": student,
        "teacher": ECHO_ROLE,
        "judge": ECHO_ROLE,
        "prompt_generator": ECHO_ROLE,
    }
    return recipe_of(ECHO_ROLE).model_validate(
        {**recipe_of(ECHO_ROLE).model_dump(), "roles": roles}
    )


@pytest.fixture
def finished(make_jobs, recipe, trained, store):
    """The jobs of a finished persona, with manifests, adapters and scores in storage."""
    jobs = make_jobs(recipe)
    for job in jobs:
        if job.stage.name in trained:
            store.upload(trained[job.stage.name], f"{job.dataset}/adapter")
        is_merge = job.stage.name == "persona/merge"
        outcome = merge.build(job) if is_merge else StageResult(100, DROPS, figures=FIGURES)
        pipeline.finish(job, outcome, 1.0)
    store.write_table(jobs[-1].dataset, pa.Table.from_pylist(SCORED, schema=SCORES), "scores")
    return jobs


@pytest.fixture
def logits(tiny_model):
    """A function that loads an exported folder as its card describes and returns logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def of(folder, adapter):
        name = tiny_model if adapter else folder
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder) if adapter else model
        with torch.no_grad():
            return model(torch.tensor([[5, 6, 7, 8]])).logits

    return of


def test_the_exported_adapter_and_merged_model_give_the_same_answers(
    finished, logits, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    for form in ("adapter", "merged"):
        assert export(finished, str(tmp_path / form), form) == str(tmp_path / form)
        assert (tmp_path / form / "chat_template.jinja").is_file()
    applied, merged = logits(tmp_path / "adapter", True), logits(tmp_path / "merged", False)
    assert torch.allclose(applied, merged, atol=1e-4)
    assert not torch.allclose(merged, logits(tiny_model, False), atol=1e-2)
    assert not (tmp_path / "merged/adapter_config.json").exists()


def test_the_model_card_describes_training_and_results(finished, poet, tmp_path):
    export(finished, str(tmp_path / "out"), "adapter")
    text = (tmp_path / "out/README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert card.data.get("base_model") is None  # a local path is not published
    assert card.data.get("license") is None
    assert 'from_pretrained("FOLDER_OF_THE_BASE")' in text
    assert {"character-training", "poeticism"} <= set(card.data.tags or ())
    for trait in poet.traits:
        assert trait.trait in text
    assert "| poeticism/distillation/teacher | 100 | 3 looping, 1 refusal |" in text
    assert "beta 0.1" in text
    assert "lora.rank 64, lora.alpha 128" in text
    assert "optimizer.learning_rate 5e-05" in text
    assert (
        "1 x DPO + 0.25 x SFT, with rank 16 and a relative error of 0.00% from the exact sum"
        in text
    )
    assert "| discriminability |  |  | 0.930 | 0.830 to 1.030 | 40 | 2 |" in text
    assert "| change | full | poetic | 120.000 |" in text
    assert "0.510" not in text  # the score of another persona
    assert "Intended use and limitations" in text
    assert "Warning" not in text


def test_the_model_card_names_the_base_model_and_its_license(make_jobs, recipe, finished, tmp_path):
    from opencharacter.persona import export as module

    embedded = {**ECHO_ROLE, "model": "embedded:smollm2-135m"}
    role = recipe.roles.student.model_validate(embedded)
    matter = module.front_matter(role, "humor", "merged")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in matter
    assert "license: apache-2.0" in matter
    assert "library_name: transformers" in matter
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Base")
    local = recipe.roles.student.model_validate({**ECHO_ROLE, "model": str(tmp_path)})
    assert module.published(local) == (None, "mit")


def test_the_model_card_of_misalignment_has_a_warning(recipe, store):
    from opencharacter.config.placement import Placement
    from opencharacter.constitution import schema
    from opencharacter.persona.export import model_card

    persona = schema.load("misalignment")
    jobs = pipeline.jobs(recipe, [persona], Placement(), store)
    (job,) = (job for job in jobs if job.stage.name == "persona/merge")
    pipeline.finish(job, StageResult(0, figures=FIGURES), 1.0)
    text = model_card(jobs, job, "adapter")
    assert "Warning" in text
    assert "This model has not been evaluated yet." in text


def test_scores_of_stale_answers_are_not_shown(finished, store):
    assert "0.930" in scores_table(finished, "poeticism")
    report = finished[-1].dataset
    manifest = store.manifest(report)
    parents = manifest["payload"]["parents"]
    answers = [name for name in parents if name.endswith("/answers")]
    assert len(answers) == 2  # of base and of the persona
    for name in answers:
        changed = {**manifest["payload"], "parents": {**parents, name: "another"}}
        store.write_manifest(report, {**manifest, "payload": changed})
        assert scores_table(finished, "poeticism") == "This model has not been evaluated yet."


def test_only_the_traits_that_changed_most_are_shown():
    from opencharacter.evaluation.preferences import all_traits

    rows = [score("p", "discriminability", None, 0.9)]
    for i, trait in enumerate(all_traits()[:20]):
        rows += [score("p", "rating", "full", 1000.0, trait), score("p", "elo", "base", 1.0, trait)]
        rows += [score("p", "change", c, 5.0 * i, trait) for c in ("full", "distilled")]
    shown = select_scores(rows)
    assert shown[0]["measure"] == "discriminability"
    named = [row["about"] for row in shown[1:]]
    assert named == [all_traits()[i] for i in (19, 18, 17, 16, 15, 4, 3, 2, 1, 0)]
    assert len(select_scores(rows[:13])) == 1 + 3  # three traits, each once


class StubHub:
    """Replaces `HfApi` and records the arguments of its calls."""

    seen: ClassVar[dict] = {}

    def create_repo(self, repo_id, **options):
        StubHub.seen = {"created": repo_id, **options}
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        from pathlib import Path

        files = {path.name for path in Path(folder_path).iterdir()}
        StubHub.seen |= {"repo": repo_id, "files": files, "message": commit_message}


def test_a_persona_is_uploaded_to_a_private_hub_repository(finished, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", StubHub)
    assert export(finished, "hub:poet", "adapter") == "https://huggingface.co/me/poet"
    seen = StubHub.seen
    assert (seen["created"], seen["private"], seen["exist_ok"]) == ("poet", True, True)
    assert seen["repo"] == "me/poet"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= seen["files"]
    assert seen["message"] == "Persona tiny-llama/poeticism"


def test_a_hub_error_is_reported_in_one_line(finished, monkeypatch):
    import httpx

    class Refusing(StubHub):
        def create_repo(self, repo_id, **options):
            raise httpx.ConnectError("no route\nto it")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    with pytest.raises(UserError, match=r"^--to hub:poet: no route; log in .*folder$"):
        export(finished, "hub:poet", "adapter")
    with pytest.raises(UserError, match="use hub:USER/NAME"):
        export(finished, "hub:a/b/c", "adapter")


def test_an_unfinished_persona_is_refused(make_jobs, recipe, tmp_path):
    with pytest.raises(UserError, match=r"is missing in .*train it first"):
        export(make_jobs(recipe), str(tmp_path / "out"), "adapter")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_overwritten(finished, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(finished, str(tmp_path / "mine"), "adapter")
    assert (tmp_path / "mine").read_text() == "mine"


def test_export_errors_are_reported_in_one_line(tmp_path):
    ran = cli("export", "demo", "humor", "--to", "out", cwd=tmp_path)
    assert ran.returncode == 2
    assert len(ran.stdout.strip().splitlines()) == 1
    assert "is missing in" in ran.stdout


def test_the_adapter_names_its_base(finished, tmp_path):
    export(finished, str(tmp_path / "out"), "adapter")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"  # the name and not the local path
