"""After SIGKILL during a stage the same command finishes it, with every id exactly once."""

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
NUM_SLOTS = 4
SLOW = {**ECHO_ROLE, "model": "echo:60"}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with a recipe whose stages run long enough to be killed."""
    folder = tmp_path_factory.mktemp("kills")
    recipe = embedded_recipe()
    recipe["distillation"]["prompts"] = {"questions_per_trait": 3, "general": 30}
    recipe["distillation"]["dpo"]["optimizer"] |= {"epochs": 2}
    recipe["introspection"]["interaction"] |= {"free": 12, "leading": 12}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    placement = {
        "pools": {role: {"max_num_seqs": NUM_SLOTS} for role in ("teacher", "student")},
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


def kill_when(folder: Path, until: str, condition, timeout: float = 600) -> None:
    """Start a run, SIGKILL it once `condition()` holds, and wait for the end of its processes."""
    process = start(folder, until)
    start_time = time.monotonic()
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() - start_time < timeout, "timed out"
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)


def shard_files(folder: Path, dataset: str) -> list[Path]:
    return list((folder / "runs/tiny" / dataset / ".shards").glob("*.parquet"))


def finish(folder: Path, until: str) -> None:
    options = ["--until", until, "--placement", "few.yaml"]
    result = cli("run", "tiny.yaml", *POET, *options, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr


def attempts(folder: Path, dataset: str) -> list[dict]:
    path = folder / "runs/tiny" / dataset / "manifest.json"
    return json.loads(path.read_text())["attempts"]


def check_ids(folder: Path, dataset: str, count: int) -> None:
    ids = Store(str(folder / "runs/tiny")).read_table(dataset)["id"].to_pylist()
    assert len(ids) == len(set(ids)) == count


def status_line(folder: Path, dataset: str) -> str:
    output = cli("status", "tiny.yaml", *POET, cwd=folder).stdout
    return next(line for line in output.splitlines() if line.startswith(dataset + " "))


def resume_generation(folder: Path, dataset: str, stage: str, count: int) -> None:
    """Kill a generating stage, finish it, and check what was repeated."""
    kill_when(folder, stage, lambda: len(shard_files(folder, dataset)) >= 2)
    assert " partial " in status_line(folder, dataset)
    finish(folder, stage)
    check_ids(folder, dataset, count)
    first, second = attempts(folder, dataset)
    assert 0 < second["kept"] < count
    redone = max(0, first["reached"] - second["kept"])
    assert redone <= 3 * NUM_SLOTS  # in flight, or not yet flushed
    assert status_line(folder, dataset).split()[-1] == str(redone)


def test_the_teacher_stage_resumes_at_the_row(project):
    resume_generation(project, "poeticism/distillation/teacher", "distillation/teacher", 60)


def test_dpo_resumes_from_the_last_checkpoint(project):
    dataset = f"{PERSONA}/distillation/dpo"
    train = project / "runs/tiny" / dataset / ".shards" / "train"
    snapshot = train / "checkpoint_manager_snapshot.json"  # written after each whole checkpoint
    kill_when(
        project,
        "distillation/dpo",
        lambda: snapshot.is_file() and "checkpoint_" in snapshot.read_text(),
    )
    finish(project, "distillation/dpo")
    first, second = attempts(project, dataset)
    assert first["kept"] == 0
    assert second["kept"] >= 2
    curves = Store(str(project / "runs/tiny")).read_table(dataset, "curves").to_pylist()
    steps = sorted(row["step"] for row in curves if row["metric"] == "loss")
    assert steps == list(range(1, len(steps) + 1))
    # The driver records its progress once a second, so the kill may precede the record.
    repeated = str(max(0, first["reached"] - second["kept"]))
    assert status_line(project, dataset).split()[-1] == repeated


def test_the_interaction_stage_resumes_at_the_row(project):
    dataset = f"{PERSONA}/introspection/interaction"
    resume_generation(project, dataset, "introspection/interaction", 24)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_of_several_jobs_ends_at_once_and_can_resume(signal_number, tmp_path):
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
        # Background jobs of a shell ignore SIGINT, and their child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout
    line = ""
    while "distillation/teacher 0/" not in line:
        line = process.stdout.readline()
        assert line, "the run ended before it could be interrupted"
    process.send_signal(signal_number)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "interrupted; run the same command again to resume"
    status = cli("status", "tiny.yaml", *options[:4], cwd=tmp_path)
    assert "humor/distillation/teacher" in status.stdout
    assert " partial " in status.stdout
