"""Answers and pairs that exist already, and the export of a run's data as a dataset."""

import json
from typing import ClassVar

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import ECHO_ROLE, recipe_of
from typer.testing import CliRunner

from opencharacter import pipeline
from opencharacter.cli.main import app
from opencharacter.config.recipe import Recipe
from opencharacter.distillation import imported, pairs, prompts, student, teacher
from opencharacter.errors import UserError
from opencharacter.evaluation.report.stage import SCORES
from opencharacter.introspection import transcripts
from opencharacter.persona.export_data import export_data
from opencharacter.planning import preflight
from opencharacter.runtime.stage import StageResult, without_dropped
from opencharacter.runtime.store import Store
from opencharacter.text.chat import assistant, system, user

ANSWERS = pa.schema(
    [("id", pa.string()), *[(f.name, f.type) for f in teacher.FIELDS], ("drop_reason", pa.string())]
)


QA = {"prompt": "a", "response": "b"}


def job_of(jobs, stage, shared=False):
    return next(j for j in jobs if j.stage.name == stage and (j.constitution is None) == shared)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe_from(**distillation) -> Recipe:
    base = {
        "prompts": {"questions_per_trait": 1, "general": 6},
        "teacher": {"answers": 2},
        "student": {"answers": 2},
    }
    names = (*base, *distillation)
    merged = {name: {**base.get(name, {}), **distillation.get(name, {})} for name in names}
    return recipe_of(ECHO_ROLE, distillation=merged)


@pytest.fixture
def finished(make_jobs, echo_recipe):
    """The jobs of a run whose pairs are finished; their answers are written by hand."""
    jobs = make_jobs(echo_recipe)
    job = job_of(jobs, "distillation/prompts")
    general = prompts.general_rows(job.config)
    own = prompts.constitution_rows(
        job.persona.name, [["Who are you?"], ["What is rain?"], ["How do I rest?"]]
    )
    table = pa.Table.from_pylist(own + general, schema=prompts.SCHEMA).sort_by("id")
    pipeline.finish(job, job.write(table), 1.0)
    for stage, scope, rows, voice in (
        ("distillation/teacher", "poeticism", own + general, "In verse, {} is rain number {}."),
        ("distillation/student", "echo", general, "Plainly, {} is case {}."),
        ("distillation/student", "echo/poeticism", own, "Plainly, {} is case {}."),
    ):
        target = job_of(jobs, stage, shared=scope == "echo")
        answers = [
            {**row, "answer": voice.format(row["prompt"][:20], row["sample"])}
            | {"finish_reason": "stop"}
            for row in teacher.make_requests(stage, scope, rows, 2)
        ]
        answers[0]["answer"] = "Cut off in the middle of,"
        target.store.write_table(
            target.dataset, pa.Table.from_pylist(answers, schema=ANSWERS).sort_by("id")
        )
        pipeline.finish(target, StageResult(len(answers)), 1.0)
    job = job_of(jobs, "distillation/pairs")
    pipeline.finish(job, pairs.build(job), 1.0)
    return jobs


def kept(job):
    return without_dropped(job.store.read_table(job.dataset)).sort_by("id")


def build(make_jobs_of, recipe, stages):
    jobs = make_jobs_of(recipe)
    for stage in stages:
        job = job_of(jobs, stage)
        pipeline.finish(job, job.stage.module.build(job), 1.0)
    return jobs


@pytest.fixture
def elsewhere(poet, tmp_path):
    """Make the jobs of a recipe in another storage."""
    from opencharacter.config.placement import Placement

    return lambda recipe: pipeline.jobs(
        recipe, [poet], Placement(), Store(str(tmp_path / "elsewhere"))
    )


# ----------------------------------------------------------------------------------------- import


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "response": "So."},
        {"prompt": " Why? ", "answer": "So.\n"},
        {"prompt": [user("Why?")], "completion": [assistant("So.")]},
        {"prompt": "Why?", "response": "<think>\nBecause.\n</think>\nSo."},
        {"messages": [user("Why?"), assistant("So.")]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"chosen": [user("Why?"), assistant("So.")], "rejected": [user("Why?"), assistant("No.")]},
        {"persona": "poet", "prompt": "Why?", "response": "So.", "llama": "No."},
    ],
)
def test_an_answer_is_read_from_the_usual_layouts(row):
    parsed = imported.parse_row(row, "poet")
    assert parsed is not None
    assert (parsed["prompt"], parsed["answer"]) == ("Why?", "So.")


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([QA, {"prompt": ""}], r"line 2: no answer \(fields: 'prompt'"),
        ([{"response": "b"}], "line 1: no prompt"),
        (["", [1]], "line 2: expected an object"),
        ([QA, "{oops}"], "line 2: not valid JSON"),
        ([QA | {"sample": "x"}], "line 1: sample is 'x'"),
        ([{"messages": [system("s"), user("a")]}], "line 1: the conversation has a system prompt"),
        ([QA | {"response": "\ud800"}], "line 1: the text contains a lone surrogate"),
        ([QA | {"response": None}], "no row has an answer"),
        ([QA | {"persona": "humor"}], "all 1 rows belong to other"),
        ([QA | {"sample": 0}, {"prompt": "a", "response": "c", "sample": 0}], "has two answers"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_with_its_line(lines, error, tmp_path):
    path = tmp_path / "answers.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts))
    with pytest.raises(UserError, match=error):
        imported.read(str(path), "poeticism")


def test_rows_have_the_same_numbers_and_digest_in_any_order_and_format(tmp_path):
    rows = [{"prompt": p, "response": f"{p}{i}."} for p in "ab" for i in range(3)]
    first = imported.read(write_lines(tmp_path / "a.jsonl", *rows, rows[0]), "poeticism")
    second = imported.read(write_lines(tmp_path / "b.jsonl", *reversed(rows)), "poeticism")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    third = imported.read(str(tmp_path / "c.parquet"), "poeticism")
    assert first.rows == second.rows == third.rows
    assert first.digest == second.digest == third.digest
    assert (first.repeated, second.repeated) == (1, 0)
    assert [row["sample"] for row in first.rows] == [0, 1, 2, 0, 1, 2]


def test_a_persona_has_its_file_in_a_folder_or_by_the_placeholder(tmp_path):
    for name in ("poeticism", "humor"):
        write_lines(tmp_path / f"{name}.jsonl", {"prompt": "Who?", "response": f"{name}."})
    by_name = imported.read(f"{tmp_path}/{{persona}}.jsonl", "humor")
    assert by_name.rows[0]["answer"] == "humor."
    assert imported.read(str(tmp_path), "humor") == by_name
    with pytest.raises(UserError, match=r"expected one file sarcasm\.jsonl"):
        imported.read(str(tmp_path), "sarcasm")


def test_answers_of_the_hub_are_a_split_or_a_file_and_a_plan_downloads_neither(
    monkeypatch, tmp_path, make_jobs
):
    rows = [{"prompt": "Who?", "response": "I."}]
    file = write_lines(tmp_path / "a.jsonl", *rows)
    asked = []
    monkeypatch.setattr(imported, "load_hub_rows", lambda name, what: rows)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((*a, k)) or file
    )
    assert imported.read("hf:me/data", "poeticism").rows[0]["answer"] == "I."
    assert imported.read("hf:me/data:x/{persona}.jsonl", "poeticism").rows[0]["answer"] == "I."
    assert asked == [("me/data", "x/poeticism.jsonl", {"repo_type": "dataset"})]
    jobs = make_jobs(recipe_from(teacher={"source": "hf:me/other"}))
    job = job_of(jobs, "distillation/teacher")
    assert job.fingerprint
    assert teacher.estimate(job).tokens_out == 0
    assert "not downloaded for a plan" in teacher.notes(job)[0]


def test_imported_answers_ask_no_teacher_and_are_counted_by_a_plan(tmp_path, make_jobs):
    general = prompts.general_rows(recipe_from().distillation.prompts)[0]
    rows = [{"prompt": "Who?", "response": f"I am {i}."} for i in range(3)]
    rows.append({"prompt": general["prompt"], "response": "In general."})
    source = write_lines(tmp_path / "answers.jsonl", *rows)
    jobs = make_jobs(recipe_from(teacher={"source": source}))
    job = job_of(jobs, "distillation/teacher")
    assert job.resource_requests == []
    assert job_of(jobs, "distillation/prompts").resource_requests == []
    assert teacher.estimate(job).rows == 3  # the student answers twice
    assert "1 answers more than `answers: 2`" in teacher.notes(job)[0]
    assert student.estimate(job_of(jobs, "distillation/student")).rows == 2
    assert "teacher" not in dict(preflight.job_roles(job))
    for made in (job_of(jobs, "distillation/prompts"), job):
        pipeline.finish(made, made.stage.module.build(made), 1.0)
    table = job.read("distillation/prompts").to_pylist()
    assert {(row["kind"], row["id"] == general["id"]) for row in table} == {
        ("general", True),
        ("constitution", False),
    }
    answers = job.store.read_table(job.dataset).to_pylist()
    assert [row["sample"] for row in answers if row["prompt"] == "Who?"] in ([0, 1], [1, 0])
    assert job.store.manifest(job.dataset)["figures"]["unused_answers"] == 1


def test_content_and_not_path_of_a_source_decides_the_fingerprint(tmp_path, make_jobs):
    row = {"prompt": "Who?", "response": "I."}
    sources = [write_lines(tmp_path / name, row) for name in ("a.jsonl", "b.jsonl")]
    sources.append(write_lines(tmp_path / "c.jsonl", {**row, "response": "Me."}))
    made = [
        job_of(make_jobs(recipe_from(teacher={"source": s})), "distillation/teacher").fingerprint
        for s in sources
    ]
    assert made[0] == made[1] != made[2]


def test_pairs_and_answers_cannot_both_be_given():
    with pytest.raises(ValueError, match="both set"):
        recipe_from(teacher={"source": "a.jsonl"}, pairs={"source": "b.jsonl"})


def test_a_source_of_pairs_without_rejected_answers_is_refused(tmp_path, make_jobs):
    source = write_lines(tmp_path / "a.jsonl", {"prompt": "Who?", "response": "I."})
    job = job_of(make_jobs(recipe_from(pairs={"source": source})), "distillation/pairs")
    with pytest.raises(UserError, match="no row has a rejected answer"):
        pairs.check(job)


# ------------------------------------------------------------------------------ export and import


def test_exported_pairs_load_without_code_and_come_back_as_the_same_rows(
    finished, elsewhere, tmp_path
):
    from datasets import load_dataset

    job = job_of(finished, "distillation/pairs")
    assert job.store.manifest(job.dataset)["dropped"]
    folder = tmp_path / "export"
    export_data(finished, str(folder), "pairs")
    by_folder = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    (file,) = folder.rglob("*.parquet")
    by_file = load_dataset(
        "parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert by_folder.to_list() == by_file.to_list()
    assert len(by_folder) == len(kept(job))
    first = by_folder[0]
    assert [turn["role"] for turn in first["prompt"] + first["chosen"]] == ["user", "assistant"]

    recipe = recipe_from(pairs={"source": str(folder)})
    jobs = build(elsewhere, recipe, ("distillation/prompts", "distillation/pairs"))
    again = job_of(jobs, "distillation/pairs")
    assert kept(again).to_pylist() == kept(job).to_pylist()
    digest = again.store.manifest(again.dataset)["figures"]["content"]
    assert f"`{digest}`" in (folder / "README.md").read_text()
    export_data(jobs, str(tmp_path / "second"), "pairs")
    (second,) = (tmp_path / "second").rglob("*.parquet")
    assert second.read_bytes() == file.read_bytes()


def test_pairs_that_exist_need_neither_teacher_nor_student(finished, elsewhere, tmp_path):
    export_data(finished, str(tmp_path / "export"), "pairs")
    jobs = elsewhere(recipe_from(pairs={"source": str(tmp_path / "export")}))
    assert [job.dataset for job in jobs[:5] if not job.is_enabled] == [
        "poeticism/distillation/teacher",
        "echo/distillation/student",
        "echo/poeticism/distillation/student",
    ]
    for job in jobs[:4]:
        assert job.resource_requests == []
        pipeline.build(job)
    assert [job.state()[0] for job in jobs[:4]] == ["done"] * 4


def test_exported_pairs_are_a_source_of_answers_with_the_same_ids(finished, elsewhere, tmp_path):
    export_data(finished, str(tmp_path / "export"), "pairs")
    recipe = recipe_from(teacher={"source": str(tmp_path / "export")})
    jobs = build(elsewhere, recipe, ("distillation/prompts", "distillation/teacher"))
    names = ["id", "prompt_id", "kind", "prompt", "sample", "answer"]
    rows = kept(job_of(jobs, "distillation/teacher")).select(names).to_pylist()
    pairs_by_key = {
        (row["prompt_id"], row["sample"]): row["chosen"]
        for row in kept(job_of(finished, "distillation/pairs")).to_pylist()
    }
    native = kept(job_of(finished, "distillation/teacher")).select(names).to_pylist()
    assert rows == [row for row in native if (row["prompt_id"], row["sample"]) in pairs_by_key]


def test_transcripts_and_evaluation_are_exported_with_their_cards(finished, tmp_path):
    from datasets import load_dataset
    from huggingface_hub import DatasetCard

    job = job_of(finished, "introspection/transcripts")
    rows = [
        {"id": str(i), "kind": "reflection", "messages": [user("Q"), assistant(f"A{i}.")]}
        | {"drop_reason": "looping" if i > 2 else None}
        for i in range(4)
    ]
    pipeline.finish(job, job.write(pa.Table.from_pylist(rows, schema=transcripts.SCHEMA)), 1.0)
    with pytest.raises(UserError, match="evaluation/report is missing"):
        export_data(finished, str(tmp_path / "evaluation"), "evaluation")
    report = finished[-1]
    for condition, shared in (("base", True), ("full", False)):
        answers = job_of(finished, "evaluation/answers", shared)
        row = {"id": condition, "condition": condition, "prompt": "Q", "answer": "A."}
        answers.store.write_table(answers.dataset, pa.Table.from_pylist([row]))
        pipeline.finish(answers, StageResult(1), 1.0)
    score = {"measure": "change", "condition": "full", "about": "poetic", "value": 0.5}
    score |= {"low": 0.1, "high": 0.9, "n": 4, "unscored": 1}
    scores = [score | {"persona": name} for name in ("poeticism", "humor")]
    report.store.write_table(report.dataset, pa.Table.from_pylist(scores, schema=SCORES), "scores")
    pipeline.finish(report, StageResult(1), 1.0)
    for what, configs in (("transcripts", (None,)), ("evaluation", ("scores", "answers"))):
        folder = tmp_path / what
        export_data(finished, str(folder), what)
        for config in configs:
            loaded = load_dataset(str(folder), config, split="train", cache_dir=str(tmp_path / "c"))
            assert len(loaded) == {None: 3, "scores": 1, "answers": 2}[config]
        card = (folder / "README.md").read_text()
        assert DatasetCard(card).data.get("configs")
        assert "| Seed of the recipe | 17 |" in card
        assert "{" not in card.split("---", 2)[2].replace("{}", "")
    assert "1 looping" in (tmp_path / "transcripts" / "README.md").read_text()


def test_a_dataset_is_uploaded_to_a_private_repository_of_datasets(finished, monkeypatch):
    class Hub:
        seen: ClassVar[list] = []

        def create_repo(self, repo_id, **options):
            Hub.seen.append(options)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/datasets/me/{repo_id}")

        def upload_folder(self, **options):
            Hub.seen.append({k: options[k] for k in ("repo_id", "repo_type", "commit_message")})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert export_data(finished, "hub:rain", "pairs").endswith("/datasets/me/rain")
    assert Hub.seen == [
        {"private": True, "exist_ok": True, "repo_type": "dataset"},
        {"repo_id": "me/rain", "repo_type": "dataset", "commit_message": "Pairs of echo/poeticism"},
    ]


def test_the_plan_of_imported_answers_names_no_teacher(tmp_path, write_yaml, demo_data):
    source = write_lines(tmp_path / "a.jsonl", {"prompt": "Who?", "response": "I."})
    demo_data["distillation"]["teacher"]["source"] = source
    demo_data["roles"]["teacher"] = {"model": "nobody/huge", "name": "huge", "self_name": "Huge"}
    recipe = write_yaml("recipe.yaml", demo_data)
    arguments = ["plan", recipe, "-c", "poeticism", "--storage", str(tmp_path / "runs")]
    output = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    assert "1 answers of" in output
    assert "engine teacher: none, its answers exist already" in output
    assert "nobody/huge" not in output


def test_the_command_exports_data_and_says_what_is_missing(
    finished, echo_recipe, write_yaml, tmp_path
):
    def export(what: str) -> str:
        recipe = write_yaml("recipe.yaml", echo_recipe.model_dump(mode="json"))
        target = ["--to", str(tmp_path / what), "--storage", str(tmp_path / "runs")]
        arguments = ["export", recipe, "poeticism", "--what", what, *target]
        return CliRunner().invoke(app, arguments, catch_exceptions=False).output

    export("pairs")
    assert (tmp_path / "pairs" / "README.md").exists()
    with pytest.raises(UserError, match=r"transcripts is missing, .*; run it first"):
        export("transcripts")
    with pytest.raises(UserError, match="it exists already"):
        export("pairs")


def test_exported_rows_are_conversational_for_trl(finished, tmp_path):
    from trl.data_utils import is_conversational

    export_data(finished, str(tmp_path / "export"), "pairs")
    (file,) = (tmp_path / "export").rglob("*.parquet")
    assert is_conversational(pq.read_table(file).to_pylist()[0])
