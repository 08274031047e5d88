"""Starts, inspects and stops a server.

While a server runs, a record in the user's cache, `serving/<port>.json`, says which process of this
machine serves at a port. Stopping removes only the Serve application, because others may use the
same cluster; a Ray instance that the command started itself ends with it.
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
from pydantic import Field
from ray import serve

from opencharacter import cache, models
from opencharacter.config.base import Config
from opencharacter.config.files import load_placement, load_recipe
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution.schema import Constitution, load_all
from opencharacter.errors import StageFailed, UserError
from opencharacter.runtime import cluster
from opencharacter.runtime.progress import console
from opencharacter.runtime.store import Store
from opencharacter.serving.access import AccessPolicy, hash_key, is_loopback
from opencharacter.serving.application import build_application
from opencharacter.serving.observability import start_error
from opencharacter.serving.protocol import APP

LOGGING_CONFIG = {"encoding": "JSON", "enable_access_log": False}
"""For the ingress and the models. The ingress logs each request itself."""
LOG_LOCATION = f"logs are in {cluster.ray_logs()}/serve"
API_KEYS_VARIABLE = "OPENCHARACTER_API_KEYS"
MIN_KEY_LENGTH = 16
"""Characters; a shorter key can be guessed."""
NOT_RUNNING = "NOT_RUNNING"
HTTP_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Address:
    """The address at which a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class ServeOptions(Config):
    """What to serve: the `args` of the application in a Serve config file."""

    recipe: str
    """A packaged recipe's name, or a file on the cluster's nodes."""
    storage: str
    """Storage that all nodes can reach: a shared path, s3:// or gs://."""
    constitutions: tuple[str, ...] = ()
    """The personas to serve; every persona in storage if empty."""
    placement: str | None = None
    judge: bool = False
    smoke: bool = False
    insecure: bool = False
    """Serve without API keys."""
    overrides: dict[str, Any] = Field(default={})
    """Values of fields of the recipe by their dotted path, as with `--set`."""


def build(arguments: dict[str, Any]) -> serve.Application:
    """Build the application of a Serve config file, with API keys from the environment.

    Args:
        arguments: the fields of `ServeOptions`.

    Raises:
        UserError: if there is no API key and `insecure` is not set.
    """
    options = ServeOptions.model_validate(arguments)
    keys = read_keys(None)
    if not keys and not options.insecure:
        raise UserError(
            f"no API key; set {API_KEYS_VARIABLE} in the cluster's environment, or insecure: true"
        )
    recipe = load_recipe(options.recipe, options.smoke, options.overrides)
    placement = load_placement(options.placement)
    return build_application(
        recipe,
        placement,
        Store.at(options.storage, placement.storage_retry_seconds),
        load_all(list(options.constitutions)),
        AccessPolicy(tuple(map(hash_key, keys)), local=False),
        options.judge,
    )


def serve_config(options: ServeOptions) -> dict[str, Any]:
    """Return the Serve config of an application, for `serve deploy` or a RayService."""
    app = {
        "name": APP,
        "route_prefix": "/",
        "import_path": f"{__name__}:{build.__name__}",
        "args": options.model_dump(mode="json", exclude_defaults=True),
    }
    http = {"host": "0.0.0.0", "port": 8000}
    return {"http_options": http, "logging_config": LOGGING_CONFIG, "applications": [app]}


def read_keys(file: Path | None) -> list[str]:
    """Read the accepted API keys from a file, or from the environment if no file is given.

    Raises:
        UserError: if the file cannot be read or holds no key, or a key is too short.
    """
    try:
        text = file.read_text() if file else os.environ.get(API_KEYS_VARIABLE, "").replace(",", " ")
    except OSError as error:
        raise UserError(f"cannot read --keys {file}: {error.strerror}") from None
    keys = text.split()
    if file and not keys:
        raise UserError(f"--keys {file} contains no key; write one key per line")
    if any(len(key) < MIN_KEY_LENGTH for key in keys):
        raise UserError(f"an API key is shorter than {MIN_KEY_LENGTH} characters; use a longer one")
    return keys


def check_address(address: Address, keys: list[str], insecure: bool) -> None:
    """Check that an address is free and not open to other machines without an API key.

    Raises:
        UserError: if it is, with the remedy.
    """
    if not is_loopback(address.host) and not keys and not insecure:
        raise UserError(
            f"--host {address.host} is reachable from other machines, but there is no API key; "
            f"set {API_KEYS_VARIABLE}, pass --keys FILE, or add --insecure"
        )
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise UserError(f"cannot listen at {address.url}: {error.strerror}") from None


def require_models(recipe: Recipe, judge: bool) -> None:
    """Check that local models exist; models from the hub are downloaded when needed.

    Raises:
        UserError: if one is missing.
    """
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
    """Serve until Ctrl-C, SIGTERM or `serve stop`; return when all responses are complete.

    Raises:
        UserError: if the Ray cluster already runs this application.
        StageFailed: if a model does not start.
    """
    stop_requested = threading.Event()
    console.print(f"starting {recipe.roles.student.name} ...")
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    cluster.connect(placement, recipe)
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has installed its own handlers
        signal.signal(number, lambda *_: stop_requested.set())
    access_policy = AccessPolicy(tuple(map(hash_key, keys)), is_loopback(address.host))
    app = build_application(recipe, placement, store, constitutions, access_policy, judge)
    try:
        with deployed(app, address):
            console.print(
                f"serving at {address.url} (chat page) and {address.url}/v1 (API); "
                "press Ctrl-C to stop"
            )
            while not stop_requested.wait(1) and application_status() != NOT_RUNNING:
                pass
            console.print("stopping; waiting for responses in progress")
    finally:
        ray.shutdown()


@contextlib.contextmanager
def deployed(app: serve.Application, address: Address) -> Iterator[None]:
    """Run the application, with its record in the cache, while the block runs.

    Raises:
        UserError: if the Ray cluster already runs this application.
        StageFailed: if the application does not start.
    """
    serve.start(http_options={"host": address.host, "port": address.port})
    if application_status() != NOT_RUNNING:
        raise UserError(f"this Ray cluster already serves {APP}; stop that server first")
    path = record_path(address.port)
    path.parent.mkdir(parents=True, exist_ok=True)
    process = psutil.Process()
    record = {"url": address.url, "pid": process.pid, "started": process.create_time()}
    path.write_text(json.dumps(record))
    try:
        serve.run(app, name=APP, route_prefix="/", logging_config=LOGGING_CONFIG)
        yield
    except RuntimeError as error:
        raise StageFailed(
            f"the server did not start: {error}{start_error(APP)}; {LOG_LOCATION}"
        ) from None
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(Exception):
            serve.delete(APP)


def record_path(port: int) -> Path:
    """Return the path of the record of the server at a port."""
    return cache.cache_dir() / "serving" / f"{port}.json"


def application_status() -> str:
    """Return the application's status in Ray's terms, or `NOT_RUNNING`."""
    application = serve.status().applications.get(APP)
    return application.status.value if application else NOT_RUNNING


def find_server(port: int) -> tuple[psutil.Process, str]:
    """Return the process that serves at a port of this machine, and its URL.

    Raises:
        UserError: if there is none.
    """
    with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
        record = json.loads(record_path(port).read_text())
        process = psutil.Process(record["pid"])
        if process.create_time() == record["started"]:
            return process, record["url"]
    raise UserError(f"no server at port {port}; pass another port with --port")


def status(port: int, key: str | None) -> list[str]:
    """Describe a server in a few lines: address, replicas of each deployment, logs.

    Raises:
        UserError: if there is no server at the port.
        StageFailed: if the server does not respond.
    """
    process, url = find_server(port)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.get(f"{url}/status", headers=headers, timeout=HTTP_TIMEOUT_SECONDS)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise StageFailed(f"{url} (process {process.pid}) does not respond: {error}") from None
    deployments = [f"{name}: {state}" for name, state in response.json().items()]
    return [f"{url}, process {process.pid}", *deployments, LOG_LOCATION]


def stop(port: int) -> None:
    """Stop the server at a port; return when its responses are complete and it has exited.

    Raises:
        UserError: if there is no server at the port.
    """
    process, _ = find_server(port)
    process.terminate()
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
