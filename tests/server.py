"""Runs `opencharacter serve` in a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml
from openai import OpenAI
from process_tree import descendants
from samples import ECHO_ROLE

KEY = "a-key-for-the-tests-0123"
ECHO_RECIPE = {
    "name": "echoes",
    "roles": dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), ECHO_ROLE),
}


@dataclass(frozen=True)
class RunningServer:
    """A server that is ready."""

    process: subprocess.Popen
    url: str
    key: str
    log: Path

    def ray_logs(self) -> Path:
        """The log folder of the Ray session that the server started."""
        prefix = "--log_dir="
        children = descendants([self.process.pid], prefix)
        arguments = (argument for child in children for argument in child.cmdline())
        return Path(next(a for a in arguments if a.startswith(prefix)).removeprefix(prefix))

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def client(self, **options) -> OpenAI:
        options = {"api_key": self.key or "none", "max_retries": 0, **options}
        return OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path: str = "/v1/chat/completions", **options) -> httpx.Response:
        return httpx.post(self.url + path, headers=self.headers, timeout=300, **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(
    folder: Path, recipe: dict | str, *options: str, key: str = ""
) -> Iterator[RunningServer]:
    """Run `opencharacter serve` while the block runs."""
    if isinstance(recipe, dict):
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        recipe = str(path)
    port = free_port()
    command = [sys.executable, "-m", "opencharacter", "serve", recipe, *options]
    environment = {**os.environ, "OPENCHARACTER_API_KEYS": key}
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = RunningServer(process, f"http://127.0.0.1:{port}", key, log)
    try:
        wait_until_ready(server, log)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def wait_until_ready(server: RunningServer, log: Path, seconds: float = 240) -> None:
    """Return when every model is ready; fail with the log if the process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.HTTPError):
            if server.get("/ready").status_code == 200:
                return
        time.sleep(0.3)
    raise TimeoutError(log.read_text())
