"""Starting the server, looking at it, and stopping it.

A note in the user's cache, `serving/<port>.json`, says which process of this machine serves at a
port. At the end the application alone is removed, for others may use the same cluster; a Ray that
this command started ends with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from ray import serve

from opencharacter import models
from opencharacter.config.base import Config
from opencharacter.config.files import load_placement, load_recipe
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution.schema import Constitution, load_all
from opencharacter.errors import StageFailed, UserError
from opencharacter.runtime import cluster
from opencharacter.runtime.progress import console
from opencharacter.runtime.store import Store
from opencharacter.serving import application, ingress, protocol

LOGGING = {"encoding": "JSON", "enable_access_log": False}
"""Of the entrance and the models; the entrance writes a line for each request itself."""
KEYS = "OPENCHARACTER_API_KEYS"
SHORTEST_KEY = 16
"""Characters; a shorter one can be guessed."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class Deployed(Config):
    """What `serve` was asked for, as a Serve config file says it."""

    recipe: str
    """As on the command line; files must be on the cluster's nodes."""
    storage: str
    """That the nodes see: a shared path, s3:// or gs://."""
    constitutions: tuple[str, ...] = ()
    """All that storage holds where empty."""
    placement: str | None = None
    judge: bool = False
    smoke: bool = False
    insecure: bool = False
    """Serve without any key."""


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application from a Serve config file; keys are in the environment of the cluster.

    Raises:
        UserError: if there is no key and `insecure` is not set.
    """
    asked = Deployed.model_validate(arguments)
    keys = read_keys(None)
    if not keys and not asked.insecure:
        raise UserError(f"set {KEYS} in the environment of the cluster, or insecure: true")
    recipe, placement = load_recipe(asked.recipe, asked.smoke), load_placement(asked.placement)
    constitutions = load_all(list(asked.constitutions))
    access_policy = ingress.AccessPolicy(tuple(map(ingress.hashed, keys)), local=False)
    store = Store.at(asked.storage, placement.storage_retry_seconds)
    return application.application(
        recipe, placement, store, constitutions, access_policy, asked.judge
    )


def serve_config(asked: Deployed) -> dict[str, Any]:
    """What `serve deploy` and a RayService take, for the same application."""
    app = {
        "name": protocol.APP,
        "route_prefix": "/",
        "import_path": f"{__name__}:{build.__name__}",
        "args": asked.model_dump(mode="json", exclude_defaults=True),
    }
    http = {"host": "0.0.0.0", "port": 8000}
    return {"http_options": http, "logging_config": LOGGING, "applications": [app]}


def read_keys(file: Path | None) -> list[str]:
    """The keys that open the server: from a file, else from the environment; none is allowed.

    Raises:
        UserError: if the file cannot be read, or a key is short.
    """
    try:
        text = file.read_text() if file else os.environ.get(KEYS, "").replace(",", " ")
    except OSError as error:
        raise UserError(f"--keys {file}: {error.strerror}") from None
    keys = text.split()
    if file and not keys:
        raise UserError(f"--keys {file}: no key in it; write one a line")
    if any(len(key) < SHORTEST_KEY for key in keys):
        raise UserError(f"an API key is shorter than {SHORTEST_KEY} characters; make a longer one")
    return keys


def check_open(address: Address, keys: list[str], insecure: bool) -> None:
    """Refuse an address that others can reach without a key, and one that is taken.

    Raises:
        UserError: naming the remedy.
    """
    if not ingress.is_loopback(address.host) and not keys and not insecure:
        raise UserError(
            f"--host {address.host} can be reached from elsewhere and there is no API key; set "
            f"{KEYS}, name a file with --keys, or add --insecure"
        )
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise UserError(f"cannot listen at {address.url}: {error.strerror}") from None


def require_models(recipe: Recipe, judge: bool) -> None:
    """Refuse local models that are not there; hub models are downloaded when needed."""
    for role in (recipe.roles.student, *([recipe.roles.judge] if judge else [])):
        missing = models.missing_requirement(role)
        if missing and not models.is_hub(role.model):
            raise UserError(f"cannot serve {role.name}: missing {missing}")


def serve_until_stopped(
    recipe: Recipe,
    placement: Placement,
    store: Store,
    constitutions: list[Constitution],
    address: Address,
    keys: list[str],
    judge: bool,
) -> None:
    """Start, say where, and return after Ctrl-C, SIGTERM or `serve stop`, with all streams ended.

    Raises:
        UserError: if something is served there already.
        StageFailed: if a model does not start.
    """
    ended = threading.Event()
    console.print(f"starting {recipe.roles.student.name} ...")
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    cluster.connect(placement, recipe)
    for name in (signal.SIGINT, signal.SIGTERM):  # now, for Ray has set its own
        signal.signal(name, lambda *_: ended.set())
    access_policy = ingress.AccessPolicy(
        tuple(map(ingress.hashed, keys)), ingress.is_loopback(address.host)
    )
    app = application.application(recipe, placement, store, constitutions, access_policy, judge)
    try:
        with running(app, address):
            console.print(f"serving at {address.url} (page) and {address.url}/v1; Ctrl-C stops")
            while not ended.wait(1) and state() != "GONE":
                pass
            console.print("stopping; answers under way are finished first")
    finally:
        ray.shutdown()


@contextlib.contextmanager
def running(app: serve.Application, address: Address) -> Iterator[None]:
    """The application, up and noted while the block runs.

    Raises:
        UserError: if the Ray that it would run on serves one already.
        StageFailed: if it does not come up.
    """
    serve.start(http_options={"host": address.host, "port": address.port})
    if state() != "GONE":
        raise UserError(f"this Ray cluster serves {protocol.APP} already; stop that first")
    noted = note(address.port)
    noted.parent.mkdir(parents=True, exist_ok=True)
    me = psutil.Process()
    told = {"url": address.url, "pid": me.pid, "began": me.create_time()}
    noted.write_text(json.dumps(told))
    try:
        serve.run(app, name=protocol.APP, route_prefix="/", logging_config=LOGGING)
        yield
    except RuntimeError as error:
        raise StageFailed(f"the server did not start: {error}; {logs()}") from None
    finally:
        noted.unlink(missing_ok=True)
        with contextlib.suppress(Exception):
            serve.delete(protocol.APP)


def logs() -> str:
    """Where the logs are."""
    return "logs are in /tmp/ray/session_latest/logs/serve"


def note(port: int) -> Path:
    """Where it is said what runs at a port."""
    return models.cache_dir() / "serving" / f"{port}.json"


def state() -> str:
    """The application's state in Ray's words; GONE if there is none."""
    found = serve.status().applications.get(protocol.APP)
    return found.status.value if found else "GONE"


def server(port: int) -> tuple[psutil.Process, str]:
    """The process that serves at a port of this machine, and its URL.

    Raises:
        UserError: if none does.
    """
    with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
        told = json.loads(note(port).read_text())
        process = psutil.Process(told["pid"])
        if process.create_time() == told["began"]:
            return process, told["url"]
    raise UserError(f"nothing is served at port {port}; name another with --port")


def status(port: int, key: str | None) -> list[str]:
    """Lines about a server: address, replicas of each model, logs.

    Raises:
        StageFailed: if it does not answer.
    """
    process, url = server(port)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url}/status", headers=headers, timeout=10)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise StageFailed(f"{url} (process {process.pid}) does not answer: {error}") from None
    models = [f"{name}: {said}" for name, said in answer.json().items()]
    return [f"{url}, process {process.pid}", *models, logs()]


def stop(port: int) -> None:
    """End the server at a port; returns when its streams have ended and it is gone."""
    process, _ = server(port)
    process.terminate()
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
