"""Personas and the judge on Ray Serve: one application, OpenAI's interface, and a page to talk.

The entrance takes HTTP in: keys, limits, names, errors. A model's replica (`llm.py`) answers. The
entrance knows nothing of vLLM and a replica nothing of HTTP.

Run: opencharacter serve RECIPE [--constitution NAME ...] [--judge]
     opencharacter serve status | stop
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
import ipaddress
import json
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from opencharacter.config.placement import Serving
from opencharacter.constitution.schema import Constitution
from opencharacter.errors import OpenCharacterError
from opencharacter.serving import chat_page
from opencharacter.serving.catalogue import Catalogue, Listing, ServedAdapter
from opencharacter.serving.observability import (
    ADAPTER_LOADS,
    FIRST_TOKEN,
    REGISTRY,
    REQUESTS_WAITING,
    Record,
    answers,
    count_tokens,
    log,
    told,
)
from opencharacter.serving.protocol import (
    APP,
    ApiError,
    ErrorBody,
    ResponsePart,
    Served,
    checked,
    event,
    events,
    is_usage,
    parse,
)

TRIES = 3
"""Times that a request is passed on whose replicas are lost before they answer."""
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True)
class AccessPolicy:
    """Who may come in.

    Args:
        keys: SHA-256 of each key; nobody is asked for one if empty.
        local: whether the server listens on this machine alone, and so only names of this machine
            may stand in a Host header: a page elsewhere cannot reach it under a name of its own.
    """

    keys: tuple[bytes, ...] = ()
    local: bool = True


def hashed(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).digest()


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


async def refused(_: Request, error: Exception) -> Response:
    """A refusal as OpenAI has it."""
    assert isinstance(error, ApiError)
    refusal = error.refusal
    later = {"Retry-After": "1"}
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: later, 503: later}.get(refusal.status)
    return JSONResponse(refusal.body(), refusal.status, headers)


async def not_routed(_: Request, error: Exception) -> Response:
    """No such path or method, in the same shape."""
    assert isinstance(error, HTTPException)
    return JSONResponse(ErrorBody(error.status_code, str(error.detail)).body(), error.status_code)


def unforeseen(error: Exception) -> ApiError:
    """What a client is told of a fault that nobody looked for: whose it is, and no more."""
    if isinstance(error, (OSError, OpenCharacterError)):  # what `Store` raises
        return ApiError(503, "storage refuses; ask again later")
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says how")


async def asked(
    handle: Any, kind: str, payload: dict[str, Any], held: ExitStack
) -> AsyncIterator[ResponsePart]:
    """What a replica answers; asked again if it was lost before it had said anything."""
    for left in reversed(range(TRIES)):
        said = False
        stream = handle.answer.remote(kind, payload)
        held.callback(stream.cancel)
        try:
            async for part in stream:
                said = said or not (isinstance(part, dict) and "loaded" in part)
                yield part
            return
        except RayActorError:
            if said or not left:
                raise
            log.warning("a replica was lost; its request is asked again")


class Ingress:
    """Takes requests in, refuses what it should, and passes the rest to a model."""

    def __init__(
        self,
        handles: dict[str, DeploymentHandle],
        names: dict[str, Served],
        catalogue: Catalogue,
        constitutions: dict[str, Constitution],
        serving: Serving,
        access_policy: AccessPolicy,
    ):
        self.handles, self.names = handles, names
        self.listing = Listing(catalogue, serving.refresh_seconds)
        self.store, self.student = catalogue.store, catalogue.student
        self.constitutions, self.serving, self.access_policy = constitutions, serving, access_policy
        self.seats: Tally[str] = Tally()
        self.began = int(time.time())

    # ------------------------------------------------------------------------------- who comes in

    def admit(self, request: Request) -> str:
        """Check where a request comes from and its key; returns a name for the key.

        Raises:
            Refused: 401 or 403.
        """
        host = request.headers.get("host", "").rpartition(":")
        name = host[0] if host[2].isdigit() else "".join(host)
        if self.access_policy.local and name.lower() not in LOOPBACK_NAMES:
            raise ApiError(403, f"this server is not called {name!r}")
        if not self.access_policy.keys:
            return ""
        given = request.headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        digest = hashed(key.strip())
        fits = [hmac.compare_digest(digest, known) for known in self.access_policy.keys]
        if scheme.lower() != "bearer" or not any(fits):
            said = "is wrong" if given else "is missing: send Authorization: Bearer KEY"
            raise ApiError(401, f"the API key {said}", code="invalid_api_key")
        return digest.hex()[:8]

    @contextmanager
    def seat(self, key: str) -> Iterator[None]:
        """Count a request of a key until it ends.

        Raises:
            Refused: 429 if the key has too many under way.
        """
        most = self.serving.max_requests_per_key
        if self.seats[key] >= most:
            raise ApiError(429, f"{most} requests are under way, as many as one key may have")
        self.seats[key] += 1
        try:
            yield
        finally:
            self.seats[key] -= 1

    async def body(self, request: Request) -> dict[str, Any]:
        """The JSON of a request.

        Raises:
            Refused: 400, 413 or 415.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type is {kind!r}; send application/json")
        most, found = self.serving.max_body_bytes, bytearray()
        async for chunk in request.stream():
            found += chunk
            if len(found) > most:
                raise ApiError(413, f"the body is over {most:,} bytes")
        return parse(bytes(found))

    # ---------------------------------------------------------------------------------- what for

    async def find(self, model: Any) -> tuple[Served, str]:
        """Whoever answers for a model's name, and the name by which the engine knows it.

        Raises:
            Refused: 400 for no name, 404 for an unknown one.
        """
        if not isinstance(model, str):
            raise ApiError(400, "model is missing: name one of /v1/models", param="model")
        if model in self.names:
            served = self.names[model]
            return served, served.deployment
        adapter = (await self.listing.adapters()).get(model.partition("@")[0])
        if adapter is None or model not in (adapter.model, adapter.id):
            raise ApiError(
                404,
                f"model {model[:100]!r} is not served; /v1/models lists what is",
                code="model_not_found",
                param="model",
            )
        return self.names[self.student], adapter.id

    async def process(self, kind: str, request: Request) -> Response:
        """One request to a model, from its body to its answer."""
        key = self.admit(request)
        fields, held = request.state.fields, request.state.held
        payload = await self.body(request)
        name: Any = payload.get("model")
        served, model = await self.find(name)
        fields["model"], _, fields["revision"] = model.partition("@")
        fields["key"] = key
        payload = checked(kind, payload, self.serving, served.sampling)
        wants_usage = payload.pop("stream_options", {}).get("include_usage", False)
        if payload.get("stream"):
            payload["stream_options"] = {"include_usage": True}
        held.enter_context(self.seat(key))
        try:
            first, parts = await self.begun(served, model, kind, payload, fields, held)
        except ApiError as error:
            if error.refusal.status != 404 or name == model:
                raise
            model = await self.renewed(name, model)
            fields["revision"] = model.partition("@")[2]
            first, parts = await self.begun(served, model, kind, payload, fields, held)
        if isinstance(first, dict):
            return JSONResponse(first["body"])
        pieces = self.pieces(first, parts, fields, wants_usage)
        return StreamingResponse(
            pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def renewed(self, name: str, model: str) -> str:
        """The revision that a name stands for now that storage holds the listed one no longer.

        Raises:
            Refused: 404 if there is none, 503 if it is not there yet.
        """
        await self.listing.look()
        _, newer = await self.find(name)
        if newer == model:
            raise ApiError(503, f"{name} has just been trained again; ask once more")
        return newer

    async def begun(
        self,
        served: Served,
        model: str,
        kind: str,
        payload: dict[str, Any],
        fields: dict[str, Any],
        held: ExitStack,
    ) -> tuple[Any, AsyncIterator[Any]]:
        """The first part of an answer, and the rest."""
        handle = self.handles[served.deployment].options(
            stream=True, multiplexed_model_id=model if model != served.deployment else ""
        )
        parts = self.answered(handle, kind, payload | {"model": model}, fields, held)
        return await anext(parts), parts

    async def answered(
        self,
        handle: Any,
        kind: str,
        payload: dict[str, Any],
        fields: dict[str, Any],
        held: ExitStack,
    ) -> AsyncIterator[Any]:
        """The parts of an answer, counted; a refusal or a lost replica is raised as Refused."""
        began, waiting = time.monotonic(), held.enter_context(ExitStack())
        REQUESTS_WAITING.inc()
        waiting.callback(REQUESTS_WAITING.dec)
        try:
            async for part in asked(handle, kind, payload, held):
                if isinstance(part, dict) and "loaded" in part:
                    ADAPTER_LOADS.labels(fields["model"]).inc()
                    continue
                waiting.close()
                if isinstance(part, ErrorBody):
                    raise ApiError(*part)
                if "first_token" not in fields:
                    fields["first_token"] = round(time.monotonic() - began, 3)
                    FIRST_TOKEN.labels(fields["model"]).observe(fields["first_token"])
                if isinstance(part, dict):
                    count_tokens(part["body"].get("usage"), fields)
                yield part
        except BackPressureError:
            raise ApiError(503, "as many requests wait as may; ask again later") from None
        except (ApiError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # whatever became of the replica, the client gets an answer
            log.exception("a request failed")
            raise ApiError(503, f"the model could not answer ({type(error).__name__})") from None

    async def pieces(
        self, first: str, rest: AsyncIterator[Any], fields: dict[str, Any], wants_usage: bool
    ) -> AsyncIterator[str]:
        """The events of a stream; a fault on the way is an event too, and no `[DONE]` follows."""
        part: Any = first
        try:
            while True:
                for usage in filter(is_usage, events(part) if is_usage(part) else ()):
                    count_tokens(json.loads(usage.removeprefix("data: "))["usage"], fields)
                    part = part if wants_usage else part.replace(usage, "")
                if part:
                    yield part
                part = await anext(rest)
        except StopAsyncIteration:
            return
        except ApiError as error:
            fields["status"] = error.refusal.status
            yield event(error.refusal.body())

    # ---------------------------------------------------------------------------------- the paths

    async def chat(self, request: Request) -> Response:
        return await self.process("chat", request)

    async def completions(self, request: Request) -> Response:
        return await self.process("completions", request)

    async def models(self, request: Request) -> Response:
        """All that can be asked for now."""
        self.admit(request)
        plain = [self.card(name, served) for name, served in self.names.items()]
        adapters = [adapter_card(a) for a in (await self.listing.adapters()).values()]
        return JSONResponse({"object": "list", "data": plain + adapters})

    async def model(self, request: Request) -> Response:
        """One of them."""
        self.admit(request)
        model = request.path_params["model"]
        await self.find(model)
        if model in self.names:
            return JSONResponse(self.card(model, self.names[model]))
        return JSONResponse(adapter_card((await self.listing.adapters())[model.partition("@")[0]]))

    def card(self, name: str, served: Served) -> dict[str, Any]:
        """What the list says of a model without an adapter."""
        return {
            "id": name,
            "object": "model",
            "created": self.began,
            "owned_by": APP,
            "root": served.deployment,
        }

    async def health(self, _: Request) -> Response:
        """That this process lives, and whether it asks for a key."""
        return JSONResponse({"status": "ok", "needs_key": bool(self.access_policy.keys)})

    async def ready(self, _: Request) -> Response:
        """That every model answers, or 503 with those that do not."""
        states = {name: await answers(handle) for name, handle in self.handles.items()}
        status = 200 if all(states.values()) else 503
        return JSONResponse({"status": "ok" if status == 200 else "starting", **states}, status)

    async def status(self, request: Request) -> Response:
        """The replicas of each model, in Ray's words."""
        self.admit(request)
        found = (await asyncio.to_thread(serve.status)).applications[APP].deployments
        return JSONResponse({name: told(deployment) for name, deployment in found.items()})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus: figures of this entrance."""
        self.admit(request)
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    # ----------------------------------------------------------------------------------- the page

    async def page(self, _: Request) -> Response:
        """The page, which holds no secret; what it shows it asks for with the key."""
        return Response(chat_page.page(), media_type="text/html", headers=chat_page.headers())

    async def personas(self, request: Request) -> Response:
        """What the page says of each persona: its constitution, and that as a system prompt."""
        self.admit(request)
        trained = {a.persona: a for a in (await self.listing.adapters()).values()}
        return JSONResponse(
            {
                name: chat_page.persona(a, self.constitutions.get(name))
                for name, a in trained.items()
            }
        )

    async def rate(self, request: Request) -> Response:
        """Keep what a person thinks of two answers."""
        key = self.admit(request)
        row = chat_page.rating(await self.body(request), key)
        await asyncio.to_thread(chat_page.keep, self.store, self.student, row)
        return JSONResponse({"id": row["id"]}, 201)


ROUTES = (
    ("POST", "/v1/chat/completions", "chat"),
    ("POST", "/v1/completions", "completions"),
    ("GET", "/v1/models", "models"),
    ("GET", "/v1/models/{model:path}", "model"),
    ("GET", "/health", "health"),
    ("GET", "/ready", "ready"),
    ("GET", "/status", "status"),
    ("GET", "/metrics", "metrics"),
    ("GET", "/", "page"),
    ("GET", "/personas", "personas"),
    ("POST", "/ratings", "rate"),
)
"""Method, path, and the method of `Entrance` that answers."""


def http() -> Starlette:
    """The paths, as each replica of the entrance builds them."""

    def route(method: str, path: str, name: str) -> Route:
        async def endpoint(request: Request) -> Response:
            request.state.fields["route"] = path
            entrance: Any = serve.get_replica_context().servable_object
            try:
                return await getattr(entrance, name)(request)
            except (ApiError, ClientDisconnect):
                raise
            except Exception as error:
                log.exception("a request failed")
                raise unforeseen(error) from None

        return Route(path, endpoint, methods=[method])

    return Starlette(
        routes=[route(*line) for line in ROUTES],
        middleware=[Middleware(Record)],
        exception_handlers={ApiError: refused, HTTPException: not_routed},
    )


def adapter_card(adapter: ServedAdapter) -> dict[str, Any]:
    """What the list says of an adapter."""
    made = datetime.datetime.fromisoformat(adapter.manifest["finished"])
    return {
        "id": adapter.model,
        "object": "model",
        "created": int(made.timestamp()),
        "owned_by": APP,
        "root": adapter.id,
        "parent": adapter.model.partition(":")[0],
        "fingerprint": adapter.manifest["fingerprint"],
    }
