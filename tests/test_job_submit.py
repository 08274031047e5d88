"""`ray job submit`, as the README says it, on a Ray of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from samples import embedded_recipe

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
PORT, DASHBOARD = "6399", "8299"


@pytest.fixture
def head(tmp_path):
    """A Ray head node on ports of its own; its processes end with the test."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_TMPDIR": "/tmp/ray-submit",
        "RAY_AUTH_MODE": "disabled",
    }
    ports = ["--port", PORT, "--dashboard-port", DASHBOARD]
    sizes = ["--num-cpus", "2", "--object-store-memory", "200000000"]
    command = [str(BIN / "ray"), "start", "--head", "--block", *ports, *sizes]
    node = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    yield environment
    node.terminate()
    node.wait(timeout=60)
    shutil.rmtree("/tmp/ray-submit", ignore_errors=True)


def wait_until_up(environment: dict[str, str]) -> None:
    """Until the job server answers."""
    import time
    import urllib.request

    for _ in range(60):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{DASHBOARD}/api/version", timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("the dashboard did not come up")


def test_a_submitted_job_writes_to_shared_storage(head, tmp_path):
    wait_until_up(head)
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
