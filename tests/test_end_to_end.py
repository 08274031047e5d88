"""The whole pipeline once, at its smallest, with the embedded model on vLLM and Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from samples import cli, embedded_recipe

from opencharacter import pipeline
from opencharacter.runtime.store import Store

pytestmark = pytest.mark.timeout(600)  # the first test waits for the whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str, str]:
    """A finished run: its folder, its recipe file and its output."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(embedded_recipe()))
    done = cli("run", str(recipe), "-c", "poeticism", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, str(recipe), done.stdout


def manifests(folder: Path) -> dict[str, dict]:
    root = folder / "runs" / "tiny"
    store = Store(str(root))
    names = sorted(p.parent.relative_to(root).as_posix() for p in root.rglob("manifest.json"))
    return {name: store.manifest(name) or {} for name in names}


def unused_datasets(datasets: dict) -> list[str]:
    """The datasets of the stages that the recipe does not use, which are not printed."""
    unused = ("persona/blend", "persona/tune", "evaluation/steering", "evaluation/capabilities")
    return [name for name in datasets if name.endswith(unused)]


def test_every_stage_runs_on_generated_text(finished):
    folder, _, output = finished
    datasets = manifests(folder)
    persona = "smollm2-135m/poeticism"
    assert len(datasets) == len(pipeline.STAGES)
    assert datasets["poeticism/distillation/teacher"]["tokens_out"] > 100
    # Not the margin, which is 0 until the second step ends: the first has a learning rate of 0.
    assert datasets[f"{persona}/distillation/dpo"]["figures"]["grad_norm"] > 0
    assert datasets[f"{persona}/introspection/interaction"]["cached_tokens"] > 0
    assert datasets[f"{persona}/persona/merge"]["figures"]["rank"] == 16
    assert output.count("done ") == len(datasets) - len(unused_datasets(datasets))
    assert "report.html" in output


def test_the_report_is_self_contained_and_shows_answers_side_by_side(finished):
    folder, _, _ = finished
    page = (folder / "runs/tiny/smollm2-135m/evaluation/report/report.html").read_text()
    assert "src=" not in page
    assert "Base and persona side by side" in page
    assert page.count("<svg") >= 4


def test_the_report_shows_each_assertion_and_the_turns_of_long_conversations(finished):
    folder, _, _ = finished
    persona = "smollm2-135m/poeticism"
    datasets = manifests(folder)
    assert datasets["poeticism/evaluation/scenarios"]["rows"] == 6
    assert datasets[f"{persona}/evaluation/adherence"]["rows"] == 12 + 4
    verdicts = Store(str(folder / "runs/tiny")).read_table(f"{persona}/evaluation/adherence")
    assert None not in verdicts["mass"].to_pylist()  # read from log-probabilities
    drift = datasets[f"{persona}/evaluation/drift"]
    assert drift["rows"] == 4
    conversations = Store(str(folder / "runs/tiny")).read_table(f"{persona}/evaluation/drift")
    assert all(map(len, conversations["recognized"].to_pylist()))
    assert drift["figures"]["conditions"]["full"]["drift_classifier"]["n"] > 0
    page = (folder / "runs/tiny/smollm2-135m/evaluation/report/report.html").read_text()
    assert "Does the persona show its assertions?" in page
    assert "Strength of the character by turn (classifier)" in page


def test_the_report_shows_side_effects(finished):
    folder, _, _ = finished
    datasets = manifests(folder)
    assert datasets["smollm2-135m/poeticism/evaluation/side_effects"]["rows"] == 14
    page = (folder / "runs/tiny/smollm2-135m/evaluation/report/report.html").read_text()
    assert "Share of answers with an unwanted property" in page


def test_a_second_run_does_nothing(finished):
    folder, recipe, _ = finished
    again = cli("run", recipe, "-c", "poeticism", cwd=folder)
    assert again.returncode == 0
    assert again.stdout.strip() == "nothing to do: every stage is done"


def test_status_and_plan_describe_the_finished_run(finished):
    folder, recipe, _ = finished
    status = cli("status", recipe, "-c", "poeticism", cwd=folder).stdout
    datasets = manifests(folder)
    assert status.count(" done ") == len(datasets) - len(unused_datasets(datasets))
    plan = cli("plan", recipe, "-c", "poeticism", cwd=folder).stdout
    assert "total" in plan
    assert "missing on this machine" not in plan
    roles = "teacher, student, judge, prompt_generator"
    assert f"engine {roles}: embedded:smollm2-135m, 1 x 0 GPU" in plan
    assert "weights 0.25 GiB" in plan


def test_the_persona_answers_in_a_terminal(finished):
    folder, recipe, _ = finished
    chat = cli("chat", recipe, "poeticism", cwd=folder, typed="What is rain?\n/reset\n/quit\n")
    assert chat.returncode == 0, chat.stderr
    _, _, answers = chat.stdout.partition("/quit ends")
    assert len(answers.replace(">", "").strip()) > 10


def test_a_wheel_contains_all_package_data(tmp_path):
    root = Path(__file__).parent.parent
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path), str(root)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(target), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, "-m", "opencharacter", "plan", "demo", "-c", "humor"]
    options = ["--placement", "gpu-cluster"]
    plan = subprocess.run(
        [*command, *options], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert plan.returncode == 0, plan.stdout + plan.stderr
    assert "humor/distillation/teacher" in plan.stdout
