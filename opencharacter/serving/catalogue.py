"""The adapters in storage, by the name under which they are served.

A persona is served as `<student>:<persona>`, and the adapter after DPO alone as
`<student>:<persona>:dpo`. These names stand for the latest revision; `<name>@<revision>` identifies
one revision. A revision is the fingerprint of what the adapter was trained from and a hash of its
manifest, which every training writes anew, so no two adapters share a revision. A replica loads a
revision from a local copy that is never overwritten, so retraining does not change what a full name
means.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from opencharacter.config.base import NAME
from opencharacter.engines.served import ADAPTER_STAGES
from opencharacter.runtime.manifests import adapter_revision
from opencharacter.runtime.store import RemoteDir, Store

log = logging.getLogger("ray.serve")
warn_once = lru_cache(log.warning)
"""Logs a warning the first time only, for problems that every refresh encounters again."""


@dataclass(frozen=True)
class ServedAdapter:
    """One revision of a trained adapter.

    Args:
        model: `<student>:<persona>` or `<student>:<persona>:dpo`.
        persona: name of the constitution.
        revision: identifies this training of the adapter.
        dataset: the adapter's folder in storage.
        manifest: the manifest in that folder.
    """

    model: str
    persona: str
    revision: str
    dataset: str
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        """The full name, which identifies this revision."""
        return f"{self.model}@{self.revision}"


@dataclass(frozen=True)
class Catalogue:
    """The adapters of one student in storage; picklable.

    Args:
        store: the storage.
        student: name of the student's role.
        base: the student's model; adapters of other models are not served.
        personas: the personas to serve; every persona in storage if empty.
        identity: `models.identity` of the student. Adapters that were trained on another revision
            or on other files are not served; None to compare the model's name alone.
    """

    store: Store
    student: str
    base: str
    personas: tuple[str, ...] = ()
    identity: dict[str, Any] | None = None

    def adapters(
        self, previous: Mapping[str, ServedAdapter] | None = None
    ) -> dict[str, ServedAdapter]:
        """Read from storage which adapters can be served, by model name.

        Args:
            previous: an earlier result; an adapter whose manifest cannot be read is taken from it.
        """
        names = [n for n in self.store.folders(self.student) if NAME.fullmatch(n)]
        personas = [n for n in names if not self.personas or n in self.personas]
        adapters = [
            self._read_or_previous(persona, suffix, previous or {})
            for persona in personas
            for suffix in ADAPTER_STAGES
        ]
        return {adapter.model: adapter for adapter in adapters if adapter}

    def _read_or_previous(
        self, persona: str, suffix: str, previous: Mapping[str, ServedAdapter]
    ) -> ServedAdapter | None:
        try:
            return self._read(persona, suffix)
        except Exception as error:  # a broken manifest must not affect the other adapters
            model = f"{self.student}:{persona}{suffix}"
            warn_once(f"cannot read the manifest of {model} ({type(error).__name__}: {error})")
            return previous.get(model)

    def _read(self, persona: str, suffix: str) -> ServedAdapter | None:
        dataset = f"{self.student}/{persona}/{ADAPTER_STAGES[suffix]}"
        try:
            manifest = self.store.manifest(dataset)
        except FileNotFoundError:  # deleted meanwhile, because the adapter is being retrained
            return None
        if manifest is None or not self._is_inside_storage(f"{dataset}/adapter"):
            return None
        trained_on = manifest["payload"]["roles"]["student"]
        if trained_on["model"] != self.base:
            return None
        if self.identity is not None and not weights_agree(self.identity, trained_on):
            warn_once(f"{dataset} was trained on other weights of {self.base} and is not served")
            return None
        model, revision = f"{self.student}:{persona}{suffix}", adapter_revision(manifest)
        return ServedAdapter(model, persona, revision, dataset, manifest)

    def _is_inside_storage(self, relative: str) -> bool:
        """Return whether a folder is below the storage root once symbolic links are resolved."""
        if not isinstance(self.store.fs, pafs.LocalFileSystem):
            return True  # object stores have no links
        root = Path(self.store.path()).resolve()
        return Path(self.store.path(relative)).resolve().is_relative_to(root)

    async def snapshot(self, id: str) -> Path:
        """Return a local copy of one revision's files, made by the first call on this node.

        Args:
            id: the adapter's full name.

        Raises:
            LookupError: if storage does not hold that revision.
        """
        return await asyncio.to_thread(self._snapshot, id)

    def _snapshot(self, id: str) -> Path:
        adapter = self.adapters().get(id.partition("@")[0])
        if adapter is None or adapter.id != id:
            raise LookupError(f"model {id!r} is not in storage, or has been replaced")
        copy = RemoteDir(self.store, f"{adapter.dataset}/adapter").copy()
        if self.adapters().get(adapter.model) != adapter:  # replaced while it was copied
            raise LookupError(f"model {id!r} has just been replaced by a new revision; retry")
        return copy


def weights_agree(served: dict[str, Any], trained_on: dict[str, Any]) -> bool:
    """Return whether two identities of a model mean the same weights, as far as both are known."""
    if served.get("revision") != trained_on.get("revision"):
        return False
    files = [identity["weights"] for identity in (served, trained_on) if "weights" in identity]
    return len(files) < 2 or files[0] == files[1]


class CatalogueCache:
    """The latest contents of a catalogue, refreshed in the background.

    Requests do not wait for storage once the first refresh has succeeded. If storage is
    unavailable later, the adapters known so far keep serving.

    Args:
        catalogue: the adapters in storage.
        refresh_seconds: time between two refreshes.
    """

    def __init__(self, catalogue: Catalogue, refresh_seconds: float):
        self.catalogue, self.refresh_seconds = catalogue, refresh_seconds
        self._latest: dict[str, ServedAdapter] | None = None
        self._refresh: asyncio.Task[dict[str, ServedAdapter]] | None = None
        self._refresher: asyncio.Task[None] | None = None

    async def adapters(self) -> dict[str, ServedAdapter]:
        """Return the adapters by model name.

        Until a refresh has succeeded, this reads storage and raises its errors.
        """
        if self._refresher is None:
            self._refresher = asyncio.create_task(self._refresh_periodically())
        return await self.refresh() if self._latest is None else self._latest

    async def refresh(self) -> dict[str, ServedAdapter]:
        """Read the adapters from storage; concurrent calls share one read."""
        if self._refresh is None or self._refresh.done():
            read = asyncio.to_thread(self.catalogue.adapters, self._latest)
            self._refresh = asyncio.create_task(read)
        self._latest = adapters = await asyncio.shield(self._refresh)
        return adapters

    async def _refresh_periodically(self) -> None:
        while True:
            await asyncio.sleep(self.refresh_seconds)
            try:
                await self.refresh()
            except Exception as error:  # the adapters known so far keep serving
                log.warning(f"cannot list adapters in storage ({type(error).__name__}: {error})")
