"""`opencharacter demo`, `opencharacter init`, and the dashboard of `status --watch`."""

import datetime
import io

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from opencharacter import pipeline
from opencharacter.api import Run
from opencharacter.cli import start, watch
from opencharacter.cli.main import app
from opencharacter.cli.status import usage_line
from opencharacter.config import files
from opencharacter.constitution import schema
from opencharacter.errors import UserError
from opencharacter.runtime.attempts import AttemptLog
from opencharacter.runtime.manifests import held_time
from opencharacter.runtime.stage import StageResult

ANSWERS = {
    "--description": "A gardener who sees everything as something that grows.",
    "--manner": "I speak in calm, short sentences.",
    "--traits": "I compare what people do with plants; I am patient with every beginner.",
    "--student": "demo",
    "--teacher": "recipe",
}


def invoke(*arguments, typed=""):
    return CliRunner().invoke(app, list(arguments), input=typed, catch_exceptions=False)


def options(**changes):
    answers = ANSWERS | {f"--{name}": value for name, value in changes.items()}
    return [part for pair in answers.items() for part in pair]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start.console, "width", 200)
    return tmp_path


# ------------------------------------------------------------------------------------------- init


def test_init_asks_five_questions_and_writes_files_that_plan_accepts(empty_folder, capsys):
    typed = "".join(f"{answer}\n" for answer in ANSWERS.values())
    assert invoke("init", "gardener", typed=typed).exit_code == 0
    constitution = schema.load("gardener.yaml")
    assert [trait.trait for trait in constitution.traits] == [
        "I speak in calm, short sentences.",
        "I compare what people do with plants.",
        "I am patient with every beginner.",
    ]
    assert invoke("constitution", "validate", "gardener.yaml").exit_code == 0
    assert invoke("plan", "gardener-recipe.yaml", "-c", "gardener.yaml").exit_code == 0
    assert files.load_recipe("gardener-recipe.yaml").name == "gardener"


def test_options_answer_the_questions_of_init():
    result = invoke(
        "init", "gardener", *options(student="llama-3.1-8b", teacher="big/Sage@http://h/v1")
    )
    assert result.exit_code == 0
    recipe = files.load_recipe("gardener-recipe.yaml")
    teacher = recipe.roles.teacher
    assert (teacher.model, teacher.name, teacher.endpoint) == ("big/Sage", "sage", "http://h/v1")
    assert recipe.roles.student == files.load_recipe("llama-3.1-8b").roles.student


def test_init_names_a_student_by_its_model():
    assert invoke("init", "gardener", *options(student="me/SmolLM2-360M-Instruct")).exit_code == 0
    student = files.load_recipe("gardener-recipe.yaml").roles.student
    assert (student.name, student.self_name) == ("smollm2-360m-instruct", "Smollm")


def test_init_says_the_next_command_and_that_a_small_teacher_needs_exemplars(capsys):
    start.init("gardener", **{name[2:]: answer for name, answer in ANSWERS.items()}, force=False)
    printed = capsys.readouterr().out
    assert "add 3 to 6 exemplars" in printed
    assert "opencharacter run gardener-recipe.yaml -c gardener.yaml" in printed


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("Gardener!", {}, "not a valid name"),
        ("base", {}, "reserved"),
        ("gardener", {"manner": "Do I speak?"}, "traits.0.trait.*is a question"),
        ("gardener", {"description": " "}, "description.*is empty"),
        ("gardener", {"traits": ";".join(f"I do {i}" for i in range(8))}, "give at most 7"),
        ("gardener", {"student": "///"}, "use a packaged recipe"),
    ],
)
def test_an_unusable_answer_is_refused_and_nothing_is_written(name, changes, error, empty_folder):
    with pytest.raises(UserError, match=error):
        invoke("init", name, *options(**changes))
    assert not list(empty_folder.iterdir())


def test_init_replaces_files_only_when_told(empty_folder):
    (empty_folder / "gardener-recipe.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"gardener-recipe\.yaml exists"):
        invoke("init", "gardener", *options())
    assert invoke("init", "gardener", *options(), "--force").exit_code == 0
    assert yaml.safe_load((empty_folder / "gardener-recipe.yaml").read_text()) == {
        "extends": "demo",
        "name": "gardener",
    }


def test_demo_runs_the_demo_recipe_and_says_what_to_look_at(monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(start, "run", lambda *arguments: runs.append(arguments))
    start.demo(storage="a b")
    assert runs == [("demo", ["poeticism"], None, "a b")]
    assert "opencharacter chat demo poeticism --storage 'a b'" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ watch


@pytest.fixture
def run(echo_recipe, tmp_path):
    return Run(echo_recipe, ["poeticism"], storage=str(tmp_path / "runs"))


def drawn(renderable, width):
    screen = io.StringIO()
    Console(file=screen, width=width, force_terminal=False).print(renderable)
    return screen.getvalue()


def test_a_frame_shows_bars_times_and_idle_shares_in_the_width_of_the_terminal():
    stages = [
        watch.StageProgress("a/prompts", "done", 50, 50, 1.0),
        watch.StageProgress("a/teacher", "running", 25, 100, 60.0, 180.0),
        watch.StageProgress("s/a/dpo", "done", 40, 40, 75.0, idle=0.25),
        watch.StageProgress("s/a/sft", "waiting"),
    ]
    text = drawn(watch.frame(stages, ["GPU time: 2m00s (25% idle)"], 90), 90)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 90
    assert lines[0] == "2 of 4 stages done"
    assert lines[1] == "GPU time: 2m00s (25% idle)"
    rows = {line.split()[0]: line for line in lines[4:]}
    assert rows["a/teacher"].split()[2:] == ["running", "25/100", "1m00s", "3m00s"]
    assert rows["s/a/dpo"].split()[2:] == ["done", "40", "1m15s", "25%"]
    assert rows["s/a/sft"].split() == ["s/a/sft", "waiting"]
    assert rows["a/teacher"].count("━") == rows["s/a/dpo"].count("━") // 4 > 0


def test_the_dashboard_reads_the_progress_of_an_attempt_and_notices_when_it_stops(run):
    job = next(job for job in run.jobs if job.stage.name == "distillation/teacher")
    log = AttemptLog(job, kept=10)
    log.note(40, done=30, total=50)
    (last,) = job.store.attempts(job.dataset)
    now = datetime.datetime.fromisoformat(last["updated"])
    last["at"] = (now - datetime.timedelta(seconds=20)).isoformat()
    shown = watch.partial_progress(job.dataset, [last], now)
    assert (shown.state, shown.done, shown.total, shown.remaining) == ("running", 30, 50, 20.0)
    later = now + datetime.timedelta(seconds=watch.SILENT_SECONDS + 1)
    assert watch.partial_progress(job.dataset, [last], later).state == "interrupted"
    assert watch.progress(job, {}, now).done == 30
    other = last | {"part": "full", "done": 10, "total": 50, "kept": 0}
    both = watch.partial_progress(job.dataset, [last, other], now)
    assert (both.state, both.done, both.total) == ("running", 40, 100)
    ended = other | {"updated": (now - datetime.timedelta(days=1)).isoformat()}
    assert watch.partial_progress(job.dataset, [ended, last], now) == shown


def test_the_idle_share_is_that_of_gpus_if_any_job_held_one():
    engine = {"held_seconds": 80.0, "busy_seconds": 60.0}
    card = {"gpu_seconds": 40.0, "gpu_busy_seconds": 10.0, **engine}
    assert held_time([engine, engine]).idle_share == pytest.approx(0.25)
    assert held_time([engine, card]) == (True, 40.0, 10.0)
    assert held_time([engine, card]).idle_share == pytest.approx(0.75)
    assert held_time([{}]).idle_share is None
    assert usage_line([engine, card]).startswith("GPU time: 40s (75% idle)")


def test_the_time_left_is_unknown_without_speeds_and_a_sum_with_them(run):
    from test_cost import SPEEDS

    stages = [watch.StageProgress(job.dataset, "waiting") for job in run.jobs if job.is_enabled]
    assert "unknown" in watch.remaining_line(run, stages, None)
    assert watch.remaining_line(run, stages, SPEEDS).startswith("time left: at most about ")
    done = [watch.StageProgress(stage.dataset, "done") for stage in stages]
    assert watch.remaining_line(run, done, None) == "done"


def test_watching_ends_when_every_stage_is_done(run, capsys):
    for job in run.jobs:
        pipeline.finish(job, StageResult(3), 2.0)
    screen = io.StringIO()
    watch.watch(run, Console(file=screen, width=100), usage_line)
    count = sum(job.is_enabled for job in run.jobs)
    assert f"{count} of {count} stages done" in screen.getvalue()
    assert "idle" in screen.getvalue()
