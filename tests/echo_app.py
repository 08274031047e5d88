"""The HTTP application with the echo model in this process, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx

from opencharacter.config.placement import Serving
from opencharacter.config.roles import Sampling
from opencharacter.runtime.store import Store
from opencharacter.serving import ingress
from opencharacter.serving.access import AccessPolicy, hash_key
from opencharacter.serving.catalogue import Catalogue
from opencharacter.serving.echo import EchoModel
from opencharacter.serving.protocol import BaseModelEntry

KEY = "a-key-for-the-tests-0123"


class EchoHandle:
    """Stands for the Serve handle of an echo model."""

    def __init__(self) -> None:
        self.model: Any = EchoModel.func_or_class(0.0)  # type: ignore
        self.answer = self
        self.payloads: list[dict[str, Any]] = []

    def options(self, **_: Any) -> EchoHandle:
        return self

    def remote(self, kind: str, payload: dict[str, Any]) -> Stream:
        self.payloads.append(payload)
        return Stream(self.model.answer(kind, payload))


class Stream:
    """Stands for the response that a Serve handle streams."""

    def __init__(self, parts: Any):
        self.parts = parts

    def __aiter__(self) -> Any:
        return self.parts

    def cancel(self) -> None:
        pass


def client(monkeypatch: Any, storage: str, handle: EchoHandle) -> httpx.AsyncClient:
    """Return a client of the application, which serves the model `echo`."""
    store = Store.at(storage)
    app = ingress.Ingress(
        {"echo": handle},  # type: ignore
        {"echo": BaseModelEntry("echo", Sampling(max_tokens=9))},
        Catalogue(store, "echo", "echo:"),
        {},
        Serving(),
        AccessPolicy((hash_key(KEY),)),
    )
    context = SimpleNamespace(servable_object=app)
    monkeypatch.setattr(ingress.serve, "get_replica_context", lambda: context)
    transport = httpx.ASGITransport(ingress.build_http_app())
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)
