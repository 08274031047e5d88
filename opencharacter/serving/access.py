"""Who may use the server: API keys, Host headers, and the number of concurrent requests per key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from starlette.requests import Request

from opencharacter.serving.protocol import ApiError

LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}


class Client(NamedTuple):
    """Who sent a request.

    Args:
        id: the start of the API key's digest, which is logged; "" if no key is required.
        cache_salt: separates the prefix cache of this key from those of others, so that no client
            can tell from response times what others have sent; "" if no key is required.
    """

    id: str = ""
    cache_salt: str = ""


@dataclass(frozen=True)
class AccessPolicy:
    """Which requests are accepted.

    Args:
        keys: SHA-256 digest of each API key; without any, no key is required.
        local: whether the server listens on a loopback address only. The Host header must then name
            this machine, so that a web page cannot reach the server through DNS rebinding.
    """

    keys: tuple[bytes, ...] = ()
    local: bool = True

    def authenticate(self, request: Request) -> Client:
        """Check the Host header and the API key of a request.

        Raises:
            ApiError: 403 for a foreign Host header, 401 for a missing or invalid key.
        """
        self._check_host(request)
        if not self.keys:
            return Client()
        values = request.headers.getlist("authorization")
        scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        digest = hash_key(key.strip())
        matches = [hmac.compare_digest(digest, accepted) for accepted in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            problem = "is invalid" if values else "is missing: send Authorization: Bearer KEY"
            raise ApiError(401, f"the API key {problem}", code="invalid_api_key")
        return Client(digest.hex()[:8], hashlib.sha256(b"cache salt" + digest).hexdigest())

    def _check_host(self, request: Request) -> None:
        host = request.headers.get("host", "")
        name, _, port = host.rpartition(":")
        if not port.isdigit():
            name = host
        if self.local and name.lower() not in LOOPBACK_NAMES:
            raise ApiError(403, f"Host {name!r} does not name this server; use localhost")


class ConcurrencyLimiter:
    """Limits the requests that each API key has in flight in this ingress replica.

    Args:
        limit: concurrent requests per key.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_flight: Counter[str] = Counter()

    @contextmanager
    def acquire(self, key: str) -> Iterator[None]:
        """Count a request of a key while the block runs.

        Raises:
            ApiError: 429 if the key is at its limit.
        """
        if self.in_flight[key] >= self.limit:
            raise ApiError(
                429, f"this API key has {self.limit} requests in flight, its limit; retry later"
            )
        self.in_flight[key] += 1
        try:
            yield
        finally:
            self.in_flight[key] -= 1


def hash_key(key: str) -> bytes:
    """Return the SHA-256 digest of an API key, the only form in which a server stores it."""
    return hashlib.sha256(key.encode()).digest()


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
