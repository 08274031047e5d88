"""Deploys the Serve application of a run's evaluation (see `engines.served`), or checks another."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Any

import ray
from ray import serve
from ray.serve import context

from opencharacter.config.placement import Serving, fits
from opencharacter.engines import allocation
from opencharacter.engines.served import ServedApp
from opencharacter.errors import StageFailed, UserError
from opencharacter.runtime.progress import console
from opencharacter.serving.access import AccessPolicy, hash_key
from opencharacter.serving.application import build_application
from opencharacter.serving.lifecycle import API_KEYS_VARIABLE, LOG_LOCATION, LOGGING_CONFIG
from opencharacter.serving.observability import start_error

HOST = "127.0.0.1"
RUNNING = "RUNNING"
DRAIN_SECONDS = 5
"""Seconds that chats may take to finish when the evaluation has ended."""
ADAPTERS_PER_PERSONA = 2


def start(app: ServedApp) -> None:
    """Deploy the application, or check that the one to join runs.

    An application that an interrupted run left behind is used again.

    Raises:
        UserError: if it does not fit the cluster, or there is none to join.
        StageFailed: if a model does not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # Ray logs what it also raises
    if app.is_own:
        deploy(app)
    elif status(app.name) != RUNNING:
        raise UserError(
            f"Serve application {app.name!r} is {status(app.name)} in this Ray cluster; start it "
            "with `opencharacter serve`, or use --served own"
        )


def deploy(app: ServedApp) -> None:
    """Deploy an application of the run's own, with an ingress for chats beside the evaluation."""
    available = allocation.capacity(app.placement.autoscaling_resources)
    if not fits([app.resources], available):
        need = ", ".join(f"{n:g} {name}" for name, n in app.resources if n)
        have = ", ".join(f"{n:g} {name}" for name, n in available if n)
        raise UserError(
            f"placement {app.placement.name!r}: student and judge together need {need} to be "
            f"served, the cluster has {have}; choose another --placement, or evaluate without "
            "--served"
        )
    # Chats are for this machine, and several nodes of one host could not share the port.
    address = {"host": HOST, "port": free_port(app.placement.evaluation.port)}
    serve.start(proxy_location="HeadOnly", http_options=address)
    before = serve.status().applications
    if app.name in before:
        if before[app.name].status.value == RUNNING:
            return
        serve.delete(app.name)
    taken = any(other != app.name for other in before)
    prefix = f"/{app.name}" if taken else "/"
    try:
        serve.run(build(app), name=app.name, route_prefix=prefix, logging_config=LOGGING_CONFIG)
    except RuntimeError as error:
        raise StageFailed(
            f"the models were not served: {error}{start_error(app.name)}; {LOG_LOCATION}"
        ) from None
    if not taken:
        console.print(
            f"evaluating through Serve application {app.name}; chat at http://{HOST}:{http_port()}",
            soft_wrap=True,
            highlight=False,
        )


def build(app: ServedApp) -> serve.Application:
    """Build the application: the student with the run's personas, the judge, and the ingress."""
    keys = os.environ.get(API_KEYS_VARIABLE, "").replace(",", " ").split()
    serving = app.placement.serving
    adapters = ADAPTERS_PER_PERSONA * len(app.constitutions)
    limits: Serving = serving.model_copy(
        update={
            "max_adapters": max(serving.max_adapters, adapters),  # none is loaded twice
            "drain_seconds": min(serving.drain_seconds, DRAIN_SECONDS),
        }
    )
    return build_application(
        app.recipe,
        app.placement.model_copy(update={"serving": limits}),
        app.store,
        list(app.constitutions),
        AccessPolicy(tuple(map(hash_key, keys)), local=True),
        judge=app.has_judge,
    )


def delete(app: ServedApp) -> None:
    """Delete an application that the run has deployed; its resources are free when this returns."""
    if ray.is_initialized():
        with contextlib.suppress(Exception):
            serve.delete(app.name)


def status(name: str) -> str:
    """Return an application's status in Ray's terms, or `NOT_RUNNING`."""
    application = serve.status().applications.get(name)
    return application.status.value if application else "NOT_RUNNING"


def http_port() -> int:
    """Return the port of Serve's proxy; an instance that was running already keeps its port."""
    client: Any = context._get_global_client()
    return client.http_config.port


def free_port(preferred: int) -> int:
    """Return a port if it is free, else another one that is."""
    for port in (preferred, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return probe.getsockname()[1]
    raise StageFailed(f"no port of {HOST} is free")
