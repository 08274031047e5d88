"""The HTTP API: authenticates and validates requests, and passes them on to the models."""

from __future__ import annotations

import asyncio
import datetime
import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from opencharacter.config.placement import Serving
from opencharacter.constitution.schema import Constitution
from opencharacter.errors import OpenCharacterError
from opencharacter.serving import chat_page, generation, presence
from opencharacter.serving.access import AccessPolicy, Client, ConcurrencyLimiter
from opencharacter.serving.catalogue import Catalogue, CatalogueCache, ServedAdapter
from opencharacter.serving.metrics import MetricsReporter
from opencharacter.serving.observability import (
    RequestRecord,
    RequestRecordMiddleware,
    describe_deployment,
    is_ready,
    log,
)
from opencharacter.serving.protocol import APP, ApiError, BaseModelEntry, ErrorBody
from opencharacter.serving.validation import parse_json_object, validate_request


class Ingress:
    """Handles HTTP requests in one ingress replica.

    Args:
        handles: the models' deployments, by name.
        base_models: served names that do not stand for an adapter.
        catalogue: the adapters in storage.
        constitutions: constitutions for the chat page, by persona.
        serving: the server's limits.
        access_policy: which requests are accepted.
        judge: the judge, if it is served.
        aggregator: adds up the metrics of all ingress replicas; None if this is the only one.
    """

    def __init__(
        self,
        handles: dict[str, DeploymentHandle],
        base_models: dict[str, BaseModelEntry],
        catalogue: Catalogue,
        constitutions: dict[str, Constitution],
        serving: Serving,
        access_policy: AccessPolicy,
        judge: presence.ServedJudge | None = None,
        aggregator: DeploymentHandle | None = None,
    ):
        self.handles, self.base_models = handles, base_models
        self.catalogue = CatalogueCache(catalogue, serving.refresh_seconds)
        self.store, self.student = catalogue.store, catalogue.student
        self.constitutions, self.serving, self.access_policy = constitutions, serving, access_policy
        self.judge = judge
        self.limiter = ConcurrencyLimiter(serving.max_requests_per_key)
        self.metrics_reporter = MetricsReporter(aggregator)
        self.started = int(time.time())

    def authenticate(self, request: Request) -> Client:
        """Check a request's Host header and API key.

        Raises:
            ApiError: 401 or 403.
        """
        return self.access_policy.authenticate(request)

    async def read_body(self, request: Request) -> dict[str, Any]:
        """Read the JSON object in a request's body.

        Raises:
            ApiError: 400, 413 or 415.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(415, f"Content-Type is {media_type!r}; send application/json")
        limit, body = self.serving.max_body_bytes, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise ApiError(413, f"the body exceeds {limit:,} bytes")
        return parse_json_object(bytes(body))

    async def resolve_model(self, name: Any) -> tuple[BaseModelEntry, str]:
        """Resolve a model name to the entry that serves it and the name the engine knows it by.

        Raises:
            ApiError: 400 if the name is missing, 404 if it is unknown.
        """
        if not isinstance(name, str):
            raise ApiError(400, "model is missing; GET /v1/models lists the models", param="model")
        if name in self.base_models:
            entry = self.base_models[name]
            return entry, entry.deployment
        adapter = (await self.catalogue.adapters()).get(name.partition("@")[0])
        if adapter is None or name not in (adapter.model, adapter.id):
            raise ApiError(
                404,
                f"model {name[:100]!r} does not exist; GET /v1/models lists the models",
                code="model_not_found",
                param="model",
            )
        return self.base_models[self.student], adapter.id

    async def resolve_newer_revision(self, name: str, stale: str) -> str:
        """Resolve a persona again after storage no longer holds the revision that was listed.

        Raises:
            ApiError: 404 if the persona is gone, 503 if storage does not show a new revision yet.
        """
        await self.catalogue.refresh()
        _, model = await self.resolve_model(name)
        if model == stale:
            raise ApiError(503, f"model {name!r} is being replaced by a new revision; retry")
        return model

    async def generate(self, kind: str, request: Request) -> Response:
        """Handle a generation request from its body to the response."""
        record: RequestRecord = request.state.record
        client = self.authenticate(request)
        payload = await self.read_body(request)
        name: Any = payload.get("model")
        entry, model = await self.resolve_model(name)
        record.fields["model"], _, record.fields["revision"] = model.partition("@")
        record.fields["key"] = client.id
        payload = validate_request(kind, payload, self.serving, entry.sampling, entry.tools)
        if client.cache_salt:
            payload["cache_salt"] = client.cache_salt
        include_usage = payload.pop("stream_options", {}).get("include_usage", False)
        if payload.get("stream") and kind != "responses":
            payload["stream_options"] = {"include_usage": True}
        record.cleanup.enter_context(self.limiter.acquire(client.id))

        async def respond(model: str) -> Response:
            handle = self.handles[entry.deployment].options(
                stream=True, multiplexed_model_id=model if model != entry.deployment else ""
            )
            parts = generation.generate(handle, kind, payload | {"model": model}, record)
            return await generation.to_response(parts, record, include_usage)

        try:
            return await respond(model)
        except ApiError as error:
            if error.body.status != 404 or name == model:
                raise
        model = await self.resolve_newer_revision(name, model)
        record.fields["revision"] = model.partition("@")[2]
        return await respond(model)

    # ----------------------------------------------------------------------------- OpenAI's API

    async def chat_completions(self, request: Request) -> Response:
        """Generate the next message of a conversation."""
        return await self.generate("chat", request)

    async def completions(self, request: Request) -> Response:
        """Continue a text."""
        return await self.generate("completions", request)

    async def responses(self, request: Request) -> Response:
        """Generate the next message of a conversation, in the format of the Responses API."""
        return await self.generate("responses", request)

    async def list_models(self, request: Request) -> Response:
        """List the base models and the adapters."""
        self.authenticate(request)
        base_models = [self.describe_base_model(name) for name in self.base_models]
        adapters = [describe_adapter(a) for a in (await self.catalogue.adapters()).values()]
        return JSONResponse({"object": "list", "data": base_models + adapters})

    async def get_model(self, request: Request) -> Response:
        """Describe one model."""
        self.authenticate(request)
        name = request.path_params["model"]
        await self.resolve_model(name)
        if name in self.base_models:
            return JSONResponse(self.describe_base_model(name))
        adapters = await self.catalogue.adapters()
        return JSONResponse(describe_adapter(adapters[name.partition("@")[0]]))

    def describe_base_model(self, name: str) -> dict[str, Any]:
        """Return a base model's entry in the list of models."""
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": APP,
            "root": self.base_models[name].deployment,
        }

    # -------------------------------------------------------------------------------- operation

    async def health(self, _: Request) -> Response:
        """Report that this process is alive, and whether it requires an API key."""
        return JSONResponse({"status": "ok", "needs_key": bool(self.access_policy.keys)})

    async def ready(self, _: Request) -> Response:
        """Report whether each model responds; the status is 503 unless all do."""
        states = {name: await is_ready(handle) for name, handle in self.handles.items()}
        status = 200 if all(states.values()) else 503
        return JSONResponse({"status": "ok" if status == 200 else "starting", **states}, status)

    async def status(self, request: Request) -> Response:
        """Report the status and replicas of each deployment."""
        self.authenticate(request)
        app = serve.get_replica_context().app_name
        deployments = (await asyncio.to_thread(serve.status)).applications[app].deployments
        return JSONResponse({name: describe_deployment(d) for name, d in deployments.items()})

    async def metrics(self, request: Request) -> Response:
        """Return Prometheus metrics, summed over all ingress replicas (see `metrics.py`)."""
        self.authenticate(request)
        totals = await self.metrics_reporter.render_totals()
        return Response(totals, media_type=CONTENT_TYPE_LATEST)

    # -------------------------------------------------------------------------------- chat page

    async def page(self, _: Request) -> Response:
        """Return the chat page. It needs no key; its requests for data do."""
        return Response(chat_page.page(), media_type="text/html", headers=chat_page.headers())

    async def personas(self, request: Request) -> Response:
        """Describe each persona: its constitution, as a list and as a system prompt."""
        self.authenticate(request)
        adapters = {a.persona: a for a in (await self.catalogue.adapters()).values()}
        return JSONResponse(
            {
                name: chat_page.describe_persona(adapter, self.constitutions.get(name))
                for name, adapter in adapters.items()
            }
        )

    async def presence(self, request: Request) -> Response:
        """Ask the judge how much an answer sounds like a persona."""
        client = self.authenticate(request)
        asked = presence.parse_request(await self.read_body(request))
        if self.judge is None:
            raise ApiError(400, "this server has no judge; start it with --judge")
        constitution = self.constitutions.get(asked.persona)
        constitution = constitution or chat_page.packaged_constitution(asked.persona)
        if constitution is None:
            raise ApiError(400, f"persona: this server has no constitution of {asked.persona!r}")
        request.state.record.fields["key"] = client.id
        with self.limiter.acquire(client.id):
            handle = self.handles[self.judge.deployment]
            return JSONResponse(await presence.measure(self.judge, handle, constitution, asked))

    async def rate(self, request: Request) -> Response:
        """Save a user's rating of two conversations."""
        client = self.authenticate(request)
        row = chat_page.rating_row(await self.read_body(request), client.id)
        await asyncio.to_thread(chat_page.save_rating, self.store, self.student, row)
        return JSONResponse({"id": row["id"]}, 201)


ROUTES = (
    ("POST", "/v1/chat/completions", "chat_completions"),
    ("POST", "/v1/completions", "completions"),
    ("POST", "/v1/responses", "responses"),
    ("GET", "/v1/models", "list_models"),
    ("GET", "/v1/models/{model:path}", "get_model"),
    ("GET", "/health", "health"),
    ("GET", "/ready", "ready"),
    ("GET", "/status", "status"),
    ("GET", "/metrics", "metrics"),
    ("GET", "/", "page"),
    ("GET", "/personas", "personas"),
    ("POST", "/presence", "presence"),
    ("POST", "/ratings", "rate"),
)
"""HTTP method, path, and the method of `Ingress` that handles the request."""


def build_http_app() -> Starlette:
    """Build the ASGI app; Serve calls this in each ingress replica."""
    return Starlette(
        routes=[_route(*route) for route in ROUTES],
        middleware=[Middleware(RequestRecordMiddleware)],
        exception_handlers={ApiError: api_error_response, HTTPException: http_error_response},
    )


def _route(method: str, path: str, handler: str) -> Route:
    async def endpoint(request: Request) -> Response:
        request.state.record.fields["route"] = path
        ingress: Any = serve.get_replica_context().servable_object
        try:
            return await getattr(ingress, handler)(request)
        except (ApiError, ClientDisconnect):
            raise
        except Exception as error:
            log.exception("a request failed")
            raise to_api_error(error) from None

    return Route(path, endpoint, methods=[method])


def to_api_error(error: Exception) -> ApiError:
    """Turn an unexpected exception into an error that reveals nothing but its type."""
    if isinstance(error, (OSError, OpenCharacterError)):  # what `Store` raises
        return ApiError(503, "storage is unavailable; retry later")
    return ApiError(500, f"internal server error ({type(error).__name__}); see the server's log")


async def api_error_response(_: Request, error: Exception) -> Response:
    """Return an `ApiError` in OpenAI's format."""
    assert isinstance(error, ApiError)
    retry = {"Retry-After": "1"}
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: retry, 503: retry}
    return JSONResponse(error.body.to_json(), error.body.status, headers.get(error.body.status))


async def http_error_response(_: Request, error: Exception) -> Response:
    """Return an unknown path or method as an error in OpenAI's format."""
    assert isinstance(error, HTTPException)
    body = ErrorBody(error.status_code, str(error.detail))
    return JSONResponse(body.to_json(), body.status)


def describe_adapter(adapter: ServedAdapter) -> dict[str, Any]:
    """Return an adapter's entry in the list of models."""
    finished = datetime.datetime.fromisoformat(adapter.manifest["finished"])
    return {
        "id": adapter.model,
        "object": "model",
        "created": int(finished.timestamp()),
        "owned_by": APP,
        "root": adapter.id,
        "parent": adapter.model.partition(":")[0],
        "fingerprint": adapter.manifest["fingerprint"],
    }
