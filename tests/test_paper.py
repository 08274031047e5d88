"""The paper's numbers stand beside ours in the same setting only; otherwise a line says why not."""

from __future__ import annotations

import json

import pytest

from opencharacter.cli import compare
from opencharacter.config.files import load_recipe
from opencharacter.errors import UserError
from opencharacter.evaluation import paper
from opencharacter.evaluation.scores import Score, score_row, wilson
from opencharacter.runtime.store import FORMAT_VERSION

CONDITIONS = ["base", *paper.METHODS]
SETTING = {
    "evaluation.answers.conditions": CONDITIONS,
    "evaluation.answers.prompts": "hf:LDJnr/Pure-Dove",
    "evaluation.attacks.conditions": CONDITIONS,
    "evaluation.attacks.prompts": 500,
    "evaluation.coherence.prompts": 500,
    "evaluation.judge.verdicts": "text",
    "evaluation.robustness.classifier": "answerdotai/ModernBERT-base",
}


@pytest.fixture(scope="module")
def same():
    """A recipe whose evaluation has the paper's setting."""
    return load_recipe("llama-3.1-8b", overrides=SETTING)


def rows(personas, wins=90):
    """Scores of a run: the paper's measures of robustness and coherence, and an ability."""
    scored = [score_row("", paper.POOLED_F1, "full", paper.POOLED, wilson(860, 1000, 7))]
    for n, name in enumerate(personas):
        won = wilson(wins - n, 100, unscored=2)
        scored.append(score_row(name, paper.CONSISTENT_WINS, "full", "prompted", won))
    return [*scored, score_row("humor", "capability", "full", "mmlu acc", wilson(60, 100))]


def test_the_papers_numbers_stand_beside_the_same_setting(same):
    note = paper.robustness_note(same, paper.PERSONAS, ["full"])
    assert "arXiv 2511.01689" in note
    assert "full, all instructions, pooled: 87.4%" in note
    assert "prompted" not in note
    assert "prompted 89.2%" in paper.coherence_note(same, paper.PERSONAS, ["base", "prompted"])


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("roles.student.model", "Qwen/Qwen2.5-0.5B-Instruct", "the student Qwen/Qwen2.5-0.5B"),
        ("evaluation.robustness.classifier", "tfidf", "the classifier tfidf"),
        ("evaluation.attacks.prompts", 100, "100 attacked prompts instead of 500"),
        ("evaluation.answers.prompts", "embedded", "prompts from embedded instead of Pure-Dove"),
        ("introspection.interaction.free", 0, "introspection of another size (1000 reflection, 0"),
    ],
)
def test_a_difference_of_robustness_is_named_instead_of_the_papers_numbers(field, value, reason):
    recipe = load_recipe("llama-3.1-8b", overrides=SETTING | {field: value})
    note = paper.robustness_note(recipe, paper.PERSONAS, ["full"])
    assert "not comparable" in note
    assert reason in note
    assert "87.4" not in note


def test_coherence_needs_the_papers_judge_and_its_personas(same):
    text = load_recipe(
        "llama-3.1-8b", overrides=SETTING | {"evaluation.judge.verdicts": "log_probability"}
    )
    assert "verdicts by log-probability" in paper.coherence_note(text, paper.PERSONAS, [])
    assert "2 personas instead of 11" in paper.coherence_note(same, ["humor", "loving"], [])
    others = ["neutral", *paper.PERSONAS[1:]]
    assert paper.coherence_differences(same, others) == ["other personas"]


def test_a_run_in_the_papers_setting_is_compared_line_by_line(same):
    f1, wins, abilities, own = paper.compared_lines(same, rows(paper.PERSONAS))
    assert f1.startswith("robustness, full, all instructions, pooled: 0.860 (95 % interval ")
    assert f1.endswith("n = 1,000, 7 unscored); paper 0.874")
    assert wins.startswith("coherence, full against prompted, mean: 0.850 (95 % interval ")
    assert wins.endswith("n = 1,100, 22 unscored); paper 0.892")
    assert "another harness" in abilities
    assert "no class for the base model" in own


def test_a_run_in_another_setting_gets_one_line_for_each_measure():
    lines = paper.compared_lines(load_recipe("demo"), rows(["humor", "loving"]))
    assert len(lines) == 4
    assert all("not comparable" in line for line in lines[:3])
    assert not any("paper 0" in line for line in lines)


def test_the_interval_of_a_mean_over_personas_holds_for_any_correlation():
    mean = paper.mean_of([Score(0.6, 0.5, 0.7, 10, 1), Score(0.8, 0.7, 0.9, 20)])
    assert vars(mean) == pytest.approx(vars(Score(0.7, 0.6, 0.8, 30, 1)))
    assert paper.mean_of([Score(0.6, 0.5, 0.7, 10), Score(None, None, None, 0, 5)]).value is None


def manifest(model, games=25_000, scope="llama/loving"):
    roles = {"student": {"model": model}, "judge": {"model": paper.JUDGE}}
    return {"payload": {"roles": roles, "config": {"games": games}, "scope": scope}}


def test_rankings_of_three_students_are_compared_by_elo_only():
    scores = [Score(r, r - 0.1, r + 0.05, 144) for r in (0.8, 0.85, 0.9)]
    stored = [manifest(model) for model in paper.STUDENTS]
    line = paper.correlation_line(scores, "full", stored, elo=True)
    assert line.startswith("mean 0.850, 95 % interval 0.750 to 0.900")
    assert line.endswith("paper (arXiv 2511.01689) 0.874")
    assert "Bradley-Terry" in paper.correlation_line(scores, "full", stored, elo=False)
    fewer = [manifest(model, games=400, scope="llama/humor") for model in paper.STUDENTS]
    line = paper.correlation_line(scores, "full", fewer, elo=True)
    assert "the personas humor instead of loving; another number of games than 25,000" in line


def test_compare_reads_the_lines_of_a_finished_report(tmp_path, capsys):
    folder = tmp_path / "student" / "evaluation" / "report"
    with pytest.raises(UserError, match="no finished report"):
        compare.compare([str(folder)])
    folder.mkdir(parents=True)
    file = folder / "manifest.json"
    file.write_text(json.dumps({"format_version": FORMAT_VERSION, "figures": {"paper": ["a [b]"]}}))
    compare.compare([f"{folder}/"])
    assert capsys.readouterr().out == "a [b]\n"
    file.write_text(json.dumps({"format_version": FORMAT_VERSION, "figures": {}}))
    with pytest.raises(UserError, match="report of an earlier version"):
        compare.compare([str(folder)])
