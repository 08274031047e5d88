"""`opencharacter evaluate`: any model or adapter in the place of a trained persona."""

import json

import answering as servers
import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter import pipeline
from opencharacter.config.evaluation import Subject
from opencharacter.config.placement import Placement
from opencharacter.config.roles import Role
from opencharacter.engines.spec import engine_spec
from opencharacter.errors import UserError
from opencharacter.evaluation import subject as subjects
from opencharacter.evaluation.conditions import condition_adapter
from opencharacter.persona import merge
from opencharacter.runtime.attempts import AttemptLog
from opencharacter.runtime.stage import StageResult

STUDENT = Role(model="echo:", name="echo", self_name="Echo", chat_template="{{ messages }}")


@pytest.mark.parametrize(
    "given, name",
    [("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b-instruct"), ("embedded:smollm2-135m",
     "smollm2-135m"), ("./My Model/", "my-model"), ("/", "model")],
)  # fmt: skip
def test_a_subject_is_named_after_the_last_part_of_its_name(given, name):
    assert subjects.short_name(given) == name


def test_a_folder_with_an_adapter_is_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    given = subjects.parse_subject(str(tmp_path), STUDENT)
    assert given.adapter == str(tmp_path)
    assert given.model is None


@pytest.mark.parametrize(
    "named, student, expected",
    [
        ("org/Model-7B", "org/Model-7B", None),
        ("/home/me/model-7b/", "org/Model-7B", None),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "embedded:smollm2-135m", None),
        (None, "org/Model-7B", None),
        ("org/Model-7B", "org/Model-Coder-7B", "org/Model-7B"),
    ],
)
def test_an_adapter_that_names_another_base_than_the_student_is_noticed(
    tmp_path, named, student, expected
):
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": named}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    role = STUDENT.model_copy(update={"model": student, "chat_template": None})
    assert subjects.other_base(Subject(adapter=str(tmp_path)), role) == expected
    assert subjects.other_base(Subject(model=role), role) is None


def test_a_folder_with_weights_is_a_model_with_the_limits_of_the_student(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    given = subjects.parse_subject(str(tmp_path), STUDENT)
    assert given.model is not None
    assert given.model.model == str(tmp_path)
    assert given.model.max_model_len == STUDENT.max_model_len
    assert given.model.chat_template is None


def test_a_folder_with_neither_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"neither adapter_config.json nor config.json"):
        subjects.parse_subject(str(tmp_path), STUDENT)


def test_a_hub_name_is_a_model():
    given = subjects.parse_subject("org/Some-Model", STUDENT)
    assert given.model is not None
    assert (given.model.model, given.model.endpoint) == ("org/Some-Model", None)


def test_a_model_at_a_url_is_named_or_the_only_one(monkeypatch):
    url = "http://localhost:1/v1"
    given = subjects.parse_subject(url, STUDENT, "poeticism")
    assert given.model is not None
    assert (given.model.model, given.model.endpoint) == ("poeticism", url)
    monkeypatch.setattr(subjects, "served_models", lambda *_: ["only"])
    assert subjects.model_at(url, None, "KEY") == "only"
    monkeypatch.setattr(subjects, "served_models", lambda *_: ["a", "b"])
    with pytest.raises(UserError, match=r"serves 2 models \(a, b\); choose one with --model"):
        subjects.model_at(url, None, "KEY")


def test_the_models_of_a_server_are_listed_and_a_silent_server_is_an_error():
    server = servers.serve(lambda body: {"data": [{"id": "poet"}]})
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        with pytest.raises(UserError, match="no list of models"):
            subjects.served_models(f"{url}/nowhere", "NO_KEY")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match="no list of models"):
        subjects.served_models(url, "NO_KEY")


def test_model_needs_a_url():
    with pytest.raises(UserError, match="names a model at a URL"):
        subjects.parse_subject("org/model", STUDENT, "poet")


# ----------------------------------------------------------------------------------------- recipe


def subject_recipe(subject, base=None):
    return subjects.evaluation_recipe(recipe_of(ECHO_ROLE), subject, base)


def test_only_conditions_that_need_no_training_are_compared():
    recipe = subject_recipe(Subject(adapter="/somewhere"))
    evaluation = recipe.evaluation
    for name in subjects.COMPARING:
        assert set(getattr(evaluation, name).conditions) <= set(subjects.CONDITIONS)
    assert evaluation.direction.texts == 0


def test_base_replaces_the_student():
    recipe = subject_recipe(Subject(adapter="/somewhere"), "org/Other-Base")
    assert recipe.roles.student.model == "org/Other-Base"
    assert recipe.roles.student.name == "other-base"


def merge_job(recipe, poet, store):
    jobs = pipeline.jobs(recipe, [poet], Placement(), store)
    return next(j for j in jobs if j.stage.name == "persona/merge")


def test_without_a_subject_the_fingerprint_of_the_persona_is_unchanged(poet, store):
    assert merge.identity(merge_job(recipe_of(ECHO_ROLE), poet, store)) == {}


def test_the_content_of_a_given_adapter_decides_the_fingerprint(poet, store, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    config = folder / "adapter_config.json"
    config.write_text("{}")
    before = merge_job(subject_recipe(Subject(adapter=str(folder))), poet, store).fingerprint
    config.write_text(json.dumps({"r": 8}))
    after = merge_job(subject_recipe(Subject(adapter=str(folder))), poet, store).fingerprint
    assert before != after


def test_a_given_model_answers_as_full_and_the_student_as_base(poet, store):
    other = Role(model="echo:0", name="other", self_name="Other")
    recipe = subject_recipe(Subject(model=other))
    jobs = pipeline.jobs(recipe, [poet], Placement(), store)
    job = next(j for j in jobs if j.dataset == "echo/poeticism/evaluation/side_effects")
    assert condition_adapter(job, "full") == other
    assert engine_spec(job, "student", condition_adapter(job, "full")).role == other
    assert engine_spec(job, "student", condition_adapter(job, "base")).role.model == "echo:"


def test_an_evaluation_in_the_storage_of_a_training_run_is_refused_and_deletes_nothing(poet, store):
    recipe = recipe_of(ECHO_ROLE).model_copy(update={"seed": 3})
    trained = pipeline.jobs(recipe, [poet], Placement(), store)
    finished = next(job for job in trained if job.stage.name == "distillation/teacher")
    begun = next(job for job in trained if job.stage.name == "distillation/dpo")
    pipeline.finish(finished, StageResult(9), 1.0)
    AttemptLog(begun, kept=0)
    other = Role(model="echo:0", name="other", self_name="Other")
    jobs = pipeline.jobs(subject_recipe(Subject(model=other)), [poet], Placement(), store)
    with pytest.raises(UserError, match="distillation/teacher holds data of a training run"):
        subjects.leave_out_training(jobs)
    assert finished.state()[0] == "done"
    store.delete(finished.dataset)
    with pytest.raises(UserError, match="distillation/dpo holds data of a training run"):
        subjects.leave_out_training(jobs)
    assert begun.state()[0] == "partial"


def test_the_marks_of_an_earlier_evaluation_are_replaced(poet, store):
    for model in ("echo:0", "echo:1"):
        other = Role(model=model, name="other", self_name="Other")
        recipe = subject_recipe(Subject(model=other))
        recipe = recipe.model_copy(update={"seed": recipe.seed + int(model[-1])})
        jobs = pipeline.jobs(recipe, [poet], Placement(), store)
        subjects.leave_out_training(jobs)
        assert all(j.state()[0] == "done" for j in jobs if j.stage.name in subjects.LEFT_OUT)


@pytest.mark.slow
def test_a_given_model_is_evaluated_without_any_training(cpu_ray, poet, store, monkeypatch):
    """The echo engine has no weights; what is tested is that every stage of the evaluation runs."""
    monkeypatch.setattr("opencharacter.evaluation.preferences.check_scored", lambda *_: None)
    other = Role(model="echo:", name="other", self_name="Other", max_model_len=2048)
    recipe = subject_recipe(Subject(model=other))
    small = recipe.evaluation.model_copy(
        update={
            "side_effects": recipe.evaluation.side_effects.model_copy(update={"items": 1}),
            "judge": recipe.evaluation.judge.model_copy(
                update={"min_agreement": None, "gold_items": 4}
            ),
        }
    )
    jobs = pipeline.jobs(
        recipe.model_copy(update={"evaluation": small}), [poet], Placement(), store
    )
    subjects.leave_out_training(jobs)
    made = {job.stage.name: manifest for job, manifest in pipeline.run(jobs)}
    assert made["evaluation/side_effects"]["rows"] == 7 * 3
    assert not set(made) & set(subjects.LEFT_OUT)
    page = store.path("echo/evaluation/report/report.html")
    assert b"Which side effects came with the character?" in store.fs.open_input_file(page).read()
