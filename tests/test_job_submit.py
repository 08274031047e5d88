"""`ray job submit`, as documented, on a Ray cluster of its own."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from process_tree import kill_tree
from samples import ECHO_ROLE, TINY, cli, embedded_recipe

from opencharacter.runtime.store import Store

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
PORT, DASHBOARD, AGENT = "6399", "8299", "8298"


def start_head(environment: dict[str, str]) -> subprocess.Popen:
    """Start a Ray head node on its own ports and wait until it accepts jobs."""
    ports = ["--port", PORT, "--dashboard-port", DASHBOARD]
    ports += ["--dashboard-agent-listen-port", AGENT]  # another Ray may use the default port
    sizes = ["--num-cpus", "2", "--object-store-memory", "200000000"]
    command = [str(BIN / "ray"), "start", "--head", "--block", *ports, *sizes]
    node = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    wait_until_up()
    return node


@pytest.fixture
def environment():
    """The environment of a Ray cluster that only this module uses."""
    yield {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_TMPDIR": "/tmp/ray-submit",
        "RAY_AUTH_MODE": "disabled",
    }
    shutil.rmtree("/tmp/ray-submit", ignore_errors=True)


@pytest.fixture
def head(environment):
    node = start_head(environment)
    yield environment
    kill_tree(node)


def wait_until_up() -> None:
    """Wait until a job is accepted. The agent that runs jobs starts after the dashboard."""
    url, body = f"http://127.0.0.1:{DASHBOARD}/api/jobs/", json.dumps({"entrypoint": "true"})
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
    for _ in range(60):
        try:
            urllib.request.urlopen(request, timeout=15)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("the job server did not come up")


def test_a_submitted_job_writes_to_shared_storage(head, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "tiny.yaml").write_text(yaml.safe_dump(embedded_recipe()))
    storage = tmp_path / "shared"
    run = ["opencharacter", "run", "./tiny.yaml", "--constitution", "poeticism"]
    options = ["--storage", str(storage), "--until", "distillation/teacher"]
    submit = [str(BIN / "ray"), "job", "submit", "--address", f"http://127.0.0.1:{DASHBOARD}"]
    done = subprocess.run(
        [*submit, "--working-dir", str(project), "--", *run, *options],
        env=head,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "done poeticism/distillation/teacher" in done.stdout
    assert (storage / "poeticism/distillation/teacher/manifest.json").is_file()


def test_a_submitted_job_evaluates_through_an_application_that_it_deletes(head, tmp_path):
    (project := tmp_path / "project").mkdir()
    roles = dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), ECHO_ROLE)
    judge = {"gold_items": 4, "min_agreement": None}
    recipe = {**TINY, "roles": roles, "evaluation": {"judge": judge}}
    (project / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    run = ["opencharacter", "run", "./tiny.yaml", "-c", "poeticism", "--served", "own"]
    options = ["--storage", str(tmp_path / "shared"), "--only", "evaluation/judge"]
    submit = [str(BIN / "ray"), "job", "submit", "--address", f"http://127.0.0.1:{DASHBOARD}"]
    command = [*submit, "--working-dir", str(project), "--", *run, *options]
    done = subprocess.run(command, env=head, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "evaluating through Serve application opencharacter-evaluation-" in done.stdout
    assert "done echo/evaluation/judge" in done.stdout
    url = f"http://127.0.0.1:{DASHBOARD}/api/serve/applications/"
    with urllib.request.urlopen(url, timeout=15) as response:
        assert not json.load(response)["applications"]


def submission(project: Path, storage: Path) -> list[str]:
    """Return the command that submits a run of about half a minute."""
    slow = {**ECHO_ROLE, "model": "echo:0.2"}
    recipe = {
        **TINY,
        "roles": dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), slow),
    }
    many = {"answers": 70, "limits": {"min_texts": 10**6}}
    recipe["distillation"] = {**TINY["distillation"], "teacher": many, "student": many}
    (project / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    few = {"max_num_seqs": 4, "cpus": 0.1}
    (project / "few.yaml").write_text(yaml.safe_dump({"pools": {"student": few}}))
    run = ["opencharacter", "run", "./tiny.yaml", "-c", "poeticism", "--placement", "./few.yaml"]
    options = ["--storage", str(storage), "--only", "distillation/student"]
    submit = [str(BIN / "ray"), "job", "submit", "--address", f"http://127.0.0.1:{DASHBOARD}"]
    prompts = ["--storage", str(storage), "--only", "distillation/prompts"]
    assert cli(*run[1:], *prompts, cwd=project).returncode == 0
    return [*submit, "--working-dir", str(project), "--", *run, *options]


def num_shards(dataset: Path) -> int:
    return len(list(dataset.glob(".shards/*.parquet")))


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.2)


def test_stored_rows_survive_the_loss_of_the_client_and_of_the_head_node(environment, tmp_path):
    (project := tmp_path / "project").mkdir()
    command = submission(project, tmp_path / "shared")
    dataset = tmp_path / "shared/echo/distillation/student"
    node = start_head(environment)
    client = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: num_shards(dataset))
    client.kill()
    before = num_shards(dataset)
    wait_for(lambda: num_shards(dataset) > before)  # the job continues without the client
    kill_tree(node)
    assert not (dataset / "manifest.json").exists()
    node = start_head(environment)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    kill_tree(node)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, second = json.loads((dataset / "manifest.json").read_text())["attempts"]
    assert first["kept"] == 0
    assert second["kept"] > 0
    ids = Store(str(tmp_path / "shared")).read_table("echo/distillation/student")["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 420
