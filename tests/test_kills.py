"""SIGKILL in the middle of a stage: the same command finishes it, every id exactly once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from samples import ECHO_ROLE, TINY, cli, embedded_recipe

from opencharacter.runtime.store import Store

pytestmark = pytest.mark.slow

PERSONA = "smollm2-135m/poeticism"
POET = ("-c", "poeticism")
SEATS = 4
SLOW = {**ECHO_ROLE, "model": "echo:60"}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with a recipe large enough to be hit while a stage runs."""
    folder = tmp_path_factory.mktemp("kills")
    recipe = embedded_recipe()
    recipe["distillation"]["prompts"] = {"questions_per_trait": 3, "general": 30}
    recipe["distillation"]["dpo"]["optimizer"] |= {"epochs": 2}
    recipe["introspection"]["interaction"] |= {"free": 12, "leading": 12}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    placement = {
        "pools": {role: {"max_num_seqs": SEATS} for role in ("teacher", "student")},
        "training": {"checkpoint_steps": 2},
    }
    (folder / "few.yaml").write_text(yaml.safe_dump(placement))
    return folder


def start(folder: Path, until: str) -> subprocess.Popen[str]:
    options = ["--until", until, "--placement", "few.yaml"]
    command = [sys.executable, "-m", "opencharacter", "run", "tiny.yaml", *POET, *options]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )


def kill_when(folder: Path, until: str, ripe, limit: float = 600) -> None:
    """Start a run, SIGKILL it as soon as `ripe()`, and wait until its processes have ended."""
    process = start(folder, until)
    began = time.monotonic()
    while not ripe():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() - began < limit, "the stage never came so far"
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)


def parts(folder: Path, dataset: str) -> list[Path]:
    return list((folder / "runs/tiny" / dataset / ".shards").glob("*.parquet"))


def finish(folder: Path, until: str) -> None:
    options = ["--until", until, "--placement", "few.yaml"]
    done = cli("run", "tiny.yaml", *POET, *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def attempts(folder: Path, dataset: str) -> list[dict]:
    path = folder / "runs/tiny" / dataset / "manifest.json"
    return json.loads(path.read_text())["attempts"]


def check_ids(folder: Path, dataset: str, count: int) -> None:
    ids = Store(str(folder / "runs/tiny")).read_table(dataset)["id"].to_pylist()
    assert len(ids) == len(set(ids)) == count


def status_line(folder: Path, dataset: str) -> str:
    said = cli("status", "tiny.yaml", *POET, cwd=folder).stdout
    return next(line for line in said.splitlines() if line.startswith(dataset + " "))


def resume_generation(folder: Path, dataset: str, stage: str, count: int) -> None:
    """Kill a generating stage, look, finish it, look again."""
    kill_when(folder, stage, lambda: len(parts(folder, dataset)) >= 2)
    assert " partial " in status_line(folder, dataset)
    finish(folder, stage)
    check_ids(folder, dataset, count)
    first, second = attempts(folder, dataset)
    assert 0 < second["kept"] < count
    redone = max(0, first["reached"] - second["kept"])
    assert redone <= 3 * SEATS  # under way, or waiting to be flushed
    assert status_line(folder, dataset).split()[-1] == str(redone)


def test_the_teacher_resumes_at_the_row(project):
    resume_generation(project, "poeticism/distillation/teacher", "distillation/teacher", 60)


def test_dpo_resumes_at_the_last_checkpoint(project):
    dataset = f"{PERSONA}/distillation/dpo"
    train = project / "runs/tiny" / dataset / ".shards" / "train"
    known = train / "checkpoint_manager_snapshot.json"  # Ray writes it once a checkpoint is whole
    kill_when(
        project,
        "distillation/dpo",
        lambda: known.is_file() and "checkpoint_" in known.read_text(),
    )
    finish(project, "distillation/dpo")
    first, second = attempts(project, dataset)
    assert first["kept"] == 0
    assert second["kept"] >= 2
    curves = Store(str(project / "runs/tiny")).read_table(dataset, "curves").to_pylist()
    steps = sorted(row["step"] for row in curves if row["metric"] == "loss")
    assert steps == list(range(1, len(steps) + 1))
    # The driver notes what was reached once a second: the kill may come before it has.
    again = str(max(0, first["reached"] - second["kept"]))
    assert status_line(project, dataset).split()[-1] == again


def test_the_self_conversations_resume_at_the_row(project):
    dataset = f"{PERSONA}/introspection/interaction"
    resume_generation(project, dataset, "introspection/interaction", 24)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_of_several_jobs_ends_at_once_and_goes_on(sent, tmp_path):
    recipe = {
        **TINY,
        "roles": dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), SLOW),
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    options = ["-c", "humor", "-c", "remorse", "--until", "distillation/teacher"]
    command = [sys.executable, "-m", "opencharacter", "run", "tiny.yaml", *options]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background job, as the tests may be, ignores Ctrl-C, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout
    said = ""
    while "distillation/teacher 0/" not in said:
        said = process.stdout.readline()
        assert said, "the run ended before it could be interrupted"
    process.send_signal(sent)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "interrupted; the same command goes on from here"
    again = cli("status", "tiny.yaml", *options[:4], cwd=tmp_path)
    assert "humor/distillation/teacher" in again.stdout
    assert " partial " in again.stdout
