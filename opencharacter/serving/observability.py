"""Log lines, metrics and health of the server."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack, suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("ray.serve")
REGISTRY = CollectorRegistry()
REQUEST_COUNT = Counter(
    "opencharacter_requests", "Requests answered.", ["route", "model", "status"], registry=REGISTRY
)
REQUEST_SECONDS = Histogram(
    "opencharacter_request_seconds", "From request to last byte.", ["route"], registry=REGISTRY
)
FIRST_TOKEN = Histogram(
    "opencharacter_first_token_seconds", "To the first piece.", ["model"], registry=REGISTRY
)
TOKEN_COUNT = Counter(
    "opencharacter_tokens", "Read and written.", ["model", "kind"], registry=REGISTRY
)
ADAPTER_LOADS = Counter(
    "opencharacter_adapter_loads", "Into an engine.", ["model"], registry=REGISTRY
)
REQUESTS_IN_FLIGHT = Gauge("opencharacter_requests_under_way", "Not yet ended.", registry=REGISTRY)
REQUESTS_WAITING = Gauge(
    "opencharacter_requests_waiting", "Without a first token yet.", registry=REGISTRY
)


class Record:
    """Around every request: its log line, its figures, and what it holds until it ends.

    Ray gives each request its id, which is in every line of the log and in the answer's
    `x-request-id`.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        fields: dict[str, Any] = {"route": "other", "model": "", "status": 0}
        began = time.monotonic()

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields["status"] = message["status"]
                nosniff = (b"x-content-type-options", b"nosniff")
                message["headers"] = [*message.get("headers", []), nosniff]
            await send(message)

        REQUESTS_IN_FLIGHT.inc()
        with ExitStack() as held:
            held.callback(REQUESTS_IN_FLIGHT.dec)
            scope["state"] = {"fields": fields, "held": held}
            try:
                await self.app(scope, receive, sent)
            finally:
                note(scope, fields, time.monotonic() - began)


def note(scope: Scope, fields: dict[str, Any], seconds: float) -> None:
    """One line of the log, and the counters."""
    REQUEST_COUNT.labels(fields["route"], fields["model"], fields["status"]).inc()
    REQUEST_SECONDS.labels(fields["route"]).observe(seconds)
    line = {**fields, "seconds": round(seconds, 3)}
    log.info("%s %s", scope["method"], fields["route"], extra={"ray_serve_extra_fields": line})


def count_tokens(usage: dict[str, Any] | None, fields: dict[str, Any]) -> None:
    """Into the counters and the log line."""
    for kind in ("prompt", "completion"):
        fields[f"{kind}_tokens"] = (usage or {}).get(f"{kind}_tokens", 0)
        TOKEN_COUNT.labels(fields["model"], kind).inc(fields[f"{kind}_tokens"])


def told(deployment: Any) -> str:
    """A deployment's state in one line."""
    replicas = ", ".join(f"{n} {state}" for state, n in deployment.replica_states.items())
    said = f" ({deployment.message})" if deployment.message else ""
    return f"{deployment.status.value}, replicas: {replicas}{said}"


async def answers(handle: DeploymentHandle) -> bool:
    """Whether a replica of a model answers within two seconds."""
    with suppress(Exception):
        return bool(await asyncio.wait_for(handle.ready.remote(), 2))
    return False
