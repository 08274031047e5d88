"""What the harness measures, what of it is form, and that changes are honest pairs."""

import importlib.util
import json
import random

import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter.config.evaluation import Capabilities, Capability
from opencharacter.config.roles import Role
from opencharacter.errors import UserError
from opencharacter.evaluation import capabilities, harness
from opencharacter.evaluation.capabilities import paired_change
from opencharacter.evaluation.harness import FORMAT_LOST, IN_CHAT, LETTERS, READABLE, read_letter
from opencharacter.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from opencharacter.pipeline import finish

OWN = {"task": harness.OWN}


# ------------------------------------------------------------------------------------ pure parts


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b", None),
        ("B.", "B"),
        ("(C) Paris", "C"),
        ("**D**", "D"),
        ("A. Rome\n", "A"),
        ("C\nbecause it barks", "C"),
        ("The answer is B, dear friend.", "B"),
        ("answer: D", "D"),
        ("<think>A or B?</think>\n\nB", "B"),
        ("A cat, soft as the night", None),
        ("Paris.", None),
        ("O moon, the answer is all of them", None),
        ("The answer is A. No, the answer is B.", None),
        ("", None),
    ],
)
def test_an_answer_letter_is_parsed_only_in_the_requested_format(text, letter):
    assert read_letter(text) == letter


def sample(n, **fields):
    return {"doc_id": n, "doc_hash": f"h{n}", **fields}


def test_format_errors_are_distinguished_from_wrong_answers():
    known = harness.documents(
        "commonplace", {"commonplace": [sample(n, acc=float(n < 3)) for n in range(4)]}
    )
    replies = ["A", "Ah, the first of stars!", "B.", "Alas, none"]
    doc = {"options": ["Rome", "Oslo", "Bern", "Cairo"]}
    answers = [sample(n, target="A", resps=[[text]], doc=doc) for n, text in enumerate(replies)]
    rows = harness.chat_rows(known, answers)
    results = {m: [r["value"] for r in rows if r["metric"] == m] for m in (IN_CHAT, READABLE)}
    assert results == {IN_CHAT: [1, 0, 0, 0], READABLE: [1, 0, 1, 0]}
    assert [r["value"] for r in rows if r["metric"] == FORMAT_LOST] == [0, 1, 0, 0]
    assert rows[0]["answer"] == "A"


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("B", harness.IN_CHAT),
        ("C. Rome", harness.WRONG),
        ("Oh, the answer is New York, dear friend!", harness.OTHER_FORM),
        ("Rome, of course.", harness.WRONG),
        ("Rome or New York?", harness.NO_ANSWER),
        ("The stars alone know.", harness.NO_ANSWER),
        ("<think>Rome?</think> new york", harness.OTHER_FORM),
    ],
)
def test_a_reply_is_right_right_in_another_form_wrong_or_no_answer(text, reached):
    assert harness.outcome(text, ["Rome", "New York", "Bern", "York"][:3], 1) == reached


def test_each_metric_of_a_document_is_a_row_and_subtasks_of_a_group_are_one_task():
    parts = {"mmlu_a": [sample(0, acc=1.0, acc_norm=0.0)], "mmlu_b": [sample(0, acc=1.0)]}
    rows = harness.documents("mmlu", parts)
    assert [(r["task"], r["metric"], r["value"]) for r in rows] == [
        ("mmlu", "acc", 1),
        ("mmlu", "acc_norm", 0),
        ("mmlu", "acc", 1),
    ]
    assert len({r["document"] for r in rows}) == 2
    assert len({r["id"] for r in rows}) == 3


def test_the_interval_of_a_paired_change_covers_the_truth_and_never_has_zero_width():
    draw = random.Random(7)
    true, covered, trials = -0.1, 0, 1000
    for _ in range(trials):
        before, after = [], []
        for _ in range(80):
            kind = draw.random()  # 15 % lost, 5 % gained, the rest unchanged
            before.append(float(kind < 0.15 or kind > 0.5))
            after.append(float(0.15 <= kind < 0.2 or kind > 0.5))
        change = paired_change(before, after)
        covered += change.low <= true <= change.high
    assert 0.93 < covered / trials < 0.98
    same = paired_change([1.0] * 20, [1.0] * 20)
    assert same.value == 0
    assert same.low < -0.05 < 0.05 < same.high
    assert paired_change([], []).value is None


def test_a_paired_interval_is_narrower_than_two_separate_intervals():
    before = [float(n % 2) for n in range(200)]
    after = [0.0, 0.0, *before[2:]]
    change = paired_change(before, after)
    assert change.high - change.low < 0.05 < 0.13


def test_documents_without_a_counterpart_are_counted_and_not_compared():
    base = [harness.row("t", "acc", str(n), 1) for n in range(4)]
    full = [harness.row("t", "acc", str(n), 0) for n in range(1, 6)]
    by_measure = {
        (r["measure"], r["condition"]): r for r in capabilities.compare_scores("poet", base, full)
    }
    change = by_measure["capability_change", "full"]
    assert (change["value"], change["n"], change["unscored"]) == (-1, 3, 3)
    assert by_measure["capability", "base"]["n"] == 3
    assert change["about"] == "t acc"


def test_packaged_questions_are_balanced_and_have_one_correct_option():
    lines = harness.questions().read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) == capabilities.SIZES[harness.OWN]
    assert len({item["question"] for item in items}) == len(items)
    places = [item["right"] for item in items]
    assert {places.count(place) for place in range(4)} == {len(items) // 4}
    assert all(len(set(item["options"])) == len(LETTERS) for item in items)


# ------------------------------------------------------------------------------- before the run


def job_of(make_jobs, scope="student", **settings):
    recipe = recipe_of(ECHO_ROLE, evaluation={"capabilities": settings})
    jobs = [j for j in make_jobs(recipe) if j.stage.name == "evaluation/capabilities"]
    return next(j for j in jobs if j.stage.scope == scope)


def test_without_tasks_the_stage_does_nothing_and_says_why(make_jobs):
    job = job_of(make_jobs)
    capabilities.check(job)
    outcome = capabilities.build(job)
    assert (outcome.rows, outcome.figures["skipped"]) == (0, "the recipe names no tasks")
    assert not job.is_enabled


def test_a_missing_lm_eval_is_refused_with_the_install_command(make_jobs, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install '\.\[capabilities\]'"):
        capabilities.check(job_of(make_jobs, tasks=[OWN]))


def test_an_unknown_task_and_a_missing_folder_are_refused(make_jobs, tmp_path):
    tasks = [{"task": "no-such-task"}]
    with pytest.raises(UserError, match=r"'no-such-task' is neither in .*skips the stage"):
        capabilities.check(job_of(make_jobs, tasks=tasks, include=str(tmp_path)))
    with pytest.raises(UserError, match="no such folder"):
        capabilities.check(job_of(make_jobs, tasks=tasks, include="/no/such"))


def test_duplicate_task_names_are_refused():
    with pytest.raises(ValueError, match="twice"):
        Capabilities(tasks=(Capability(task="mmlu"), Capability(task="mmlu")))


@pytest.fixture
def task_folder(tmp_path):
    """A task of the harness's own form, on files of this test: sums with worked examples."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for split, ns in (("train", range(10, 16)), ("test", range(1, 9))):
        rows = [{"sum": f"{n} + 1 =", "options": [str(n + 1), str(n)], "right": 0} for n in ns]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "tiny_sums.yaml").write_text(f"""
task: tiny_sums
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/train.jsonl
    test: {folder}/test.jsonl
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{sum}}}}"
doc_to_choice: options
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""")
    return folder


def test_data_that_cannot_be_loaded_is_refused(make_jobs, task_folder):
    (task_folder / "test.jsonl").unlink()
    settings = {"tasks": [{"task": "tiny_sums"}], "include": str(task_folder)}
    with pytest.raises(UserError, match=r"data of task 'tiny_sums' cannot be loaded.*HF_HOME"):
        capabilities.check(job_of(make_jobs, **settings))


def test_changed_data_in_a_task_folder_changes_the_fingerprint(make_jobs, task_folder):
    settings = {"tasks": [{"task": "tiny_sums"}], "include": str(task_folder)}
    before = job_of(make_jobs, **settings).fingerprint
    (task_folder / "test.jsonl").write_text("{}")
    assert job_of(make_jobs, **settings).fingerprint != before


# ----------------------------------------------------------------------------- the harness itself


def adapter(path, model):
    """A LoRA that changes the model's first down projection."""
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    name = "base_model.model.model.layers.0.mlp.down_proj"
    torch.manual_seed(2)
    a, b = torch.randn(2, 1536), torch.randn(576, 2)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, path / ADAPTER_WEIGHTS)
    (path / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))


@pytest.mark.timeout(300)  # about a minute of lm_eval, more on a busy machine
def test_base_and_persona_are_evaluated_on_the_same_documents(
    cpu_ray, make_jobs, task_folder, embedded_model, monkeypatch
):
    role = {**ECHO_ROLE, "model": "embedded:smollm2-135m"}
    tasks = [{"task": "tiny_sums", "shots": 3}, OWN]
    settings = {"tasks": tasks, "include": str(task_folder), "documents": 6}
    recipe = recipe_of(role, evaluation={"capabilities": settings})
    jobs = {(j.stage.name, j.stage.scope): j for j in make_jobs(recipe)}
    student, persona = (jobs["evaluation/capabilities", scope] for scope in ("student", "persona"))
    merged = jobs["persona/merge", "persona"]
    adapter(merged.adapter.local(), embedded_model)
    capabilities.check(student)
    base = capabilities.build(student)
    finish(student, base, 1)
    outcome = capabilities.build(persona)
    metrics = {"tiny_sums": ["acc", "acc_norm"]}
    outcomes = [IN_CHAT, harness.OTHER_FORM, harness.WRONG, harness.NO_ANSWER]
    metrics[harness.OWN] = ["acc", *outcomes, READABLE, FORMAT_LOST]
    expected = 6 * sum(map(len, metrics.values()))
    assert base.rows == outcome.rows == expected
    results = persona.store.read_table(persona.dataset, "scores").to_pylist()
    changes = {r["about"]: r for r in results if r["measure"] == "capability_change"}
    assert sorted(changes) == sorted(f"{task} {m}" for task, ms in metrics.items() for m in ms)
    assert all((r["n"], r["unscored"]) == (6, 0) for r in changes.values())
    means = {(r["condition"], r["about"]): r["value"] for r in results}
    assert means["base", "tiny_sums acc"] > means["full", "tiny_sums acc"]  # it was broken
    # A second attempt finds what the first one finished.
    monkeypatch.setattr(capabilities, "measure", lambda *_: pytest.fail("asked again"))
    assert capabilities.build(persona).rows == expected


def test_the_harness_renders_the_adapted_chat_template(monkeypatch, tiny_model, tmp_path):
    """The template states a date and thinks by default; a role fixes both."""
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ date_string }}"
        "{% if enable_thinking is not defined or enable_thinking %}THINKS{% endif %}"
    )
    fields = {"model": str(tiny_model), "chat_template": template, "date_string": "01 Mar 2025"}
    seen = []
    monkeypatch.setattr(harness, "samples", lambda model, *_, **__: seen.append(model) or {})
    task, settings = Capability(task="winogrande"), Capabilities()
    harness.measure(Role.model_validate(ECHO_ROLE | fields), None, task, settings, 0, 1)
    (model,) = seen
    question = [{"role": "user", "content": "Why?"}]
    assert model.apply_chat_template(question) == "Why?01 Mar 2025"
