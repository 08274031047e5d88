"""Request logs, and the health of deployments."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opencharacter.serving.metrics import (
    REQUEST_COUNT,
    REQUEST_SECONDS,
    REQUESTS_IN_FLIGHT,
    TOKEN_COUNT,
)

READY_TIMEOUT_SECONDS = 2

log = logging.getLogger("ray.serve")


def _default_fields() -> dict[str, Any]:
    return {"route": "other", "model": "", "status": 0}


@dataclass(frozen=True)
class RequestRecord:
    """The state of one HTTP request.

    Args:
        fields: what its log line reports.
        cleanup: callbacks that run when the request ends, however it ends.
    """

    fields: dict[str, Any] = field(default_factory=_default_fields)
    cleanup: ExitStack = field(default_factory=ExitStack)

    def count_tokens(self, usage: dict[str, Any] | None) -> None:
        """Add a response's token usage to the log line and the metrics.

        Args:
            usage: as in chat completions or, with other names, in the Responses API.
        """
        usage = usage or {}
        for kind, other in (("prompt", "input"), ("completion", "output")):
            tokens = usage.get(f"{kind}_tokens", usage.get(f"{other}_tokens", 0))
            self.fields[f"{kind}_tokens"] = tokens
            TOKEN_COUNT.labels(self.fields["model"], kind).inc(tokens)


class RequestRecordMiddleware:
    """Gives each request a `RequestRecord`; counts and logs the request when it ends.

    Ray assigns the request id, which is part of every log line and is returned as `x-request-id`.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord()
        started = time.monotonic()

        async def send_and_record(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.fields["status"] = message["status"]
                nosniff = (b"x-content-type-options", b"nosniff")
                message["headers"] = [*message.get("headers", []), nosniff]
            await send(message)

        REQUESTS_IN_FLIGHT.inc()
        with record.cleanup as cleanup:
            cleanup.callback(REQUESTS_IN_FLIGHT.dec)
            scope["state"] = {"record": record}
            try:
                await self.app(scope, receive, send_and_record)
            finally:
                log_request(scope["method"], record.fields, time.monotonic() - started)


def log_request(method: str, fields: dict[str, Any], seconds: float) -> None:
    """Count a completed request and write its log line."""
    REQUEST_COUNT.labels(fields["route"], fields["model"], fields["status"]).inc()
    REQUEST_SECONDS.labels(fields["route"]).observe(seconds)
    extra = {**fields, "seconds": round(seconds, 3)}
    log.info("%s %s", method, fields["route"], extra={"ray_serve_extra_fields": extra})


def describe_deployment(deployment: Any) -> str:
    """Describe a deployment's status and replicas in one line, in Ray's terms."""
    replicas = ", ".join(f"{n} {state}" for state, n in deployment.replica_states.items())
    message = f" ({deployment.message})" if deployment.message else ""
    return f"{deployment.status.value}, replicas: {replicas}{message}"


def start_error(application: str) -> str:
    """Return the last line of the error with which a deployment failed to start, in parentheses.

    Ray's own exception only names the deployment. Empty if there is no error.
    """
    status = serve.status().applications.get(application)
    messages = [d.message.strip() for d in status.deployments.values()] if status else []
    errors = [message.splitlines()[-1] for message in messages if message]
    return f" ({errors[-1]})" if errors else ""


async def is_ready(handle: DeploymentHandle) -> bool:
    """Return whether a replica of a model responds within `READY_TIMEOUT_SECONDS`."""
    with suppress(Exception):
        return bool(await asyncio.wait_for(handle.ready.remote(), READY_TIMEOUT_SECONDS))
    return False
