"""Which adapters storage holds now, by the name under which they are served.

A persona is `<student>:<persona>`, after DPO alone `<student>:<persona>:dpo`. The name stands for
the latest revision; `@<revision>` after it says which one that is. A revision is the fingerprint of
what the adapter was made from and a hash of its manifest, which is written anew by each training:
two adapters never share one. A replica loads a revision from a copy that nothing overwrites, so
that retraining never changes what an identity means.
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
from opencharacter.runtime.store import RemoteDir, Store
from opencharacter.text.chat import row_id

STAGES = {"": "persona/merge", ":dpo": "distillation/dpo"}
"""Where the adapter is, by what follows the persona's name."""

log = logging.getLogger("ray.serve")
warn_once = lru_cache(log.warning)
"""Of what every look into storage finds again."""


@dataclass(frozen=True)
class ServedAdapter:
    """A trained adapter.

    Args:
        model: `<student>:<persona>` or `<student>:<persona>:dpo`.
        persona: the constitution's name.
        revision: names this training of it, and no other.
        dataset: its folder in storage.
        manifest: what the training left beside it.
    """

    model: str
    persona: str
    revision: str
    dataset: str
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        """The name that means this revision and no other."""
        return f"{self.model}@{self.revision}"


@dataclass(frozen=True)
class Catalogue:
    """Adapters of one student in one storage; picklable.

    Args:
        store: the storage.
        student: name of the student's role.
        base: the student's model; an adapter of another one is not served.
        personas: names of those to serve; all that storage holds if empty.
    """

    store: Store
    student: str
    base: str
    personas: tuple[str, ...] = ()

    def adapters(self, seen: Mapping[str, ServedAdapter] | None = None) -> dict[str, ServedAdapter]:
        """What can be served now, by model name. Reads storage.

        Args:
            seen: what was found before; it stands for an adapter whose manifest cannot be read.
        """
        names = [n for n in self.store.folders(self.student) if NAME.fullmatch(n)]
        wanted = [n for n in names if not self.personas or n in self.personas]
        found = [self._found(name, suffix, seen or {}) for name in wanted for suffix in STAGES]
        return {adapter.model: adapter for adapter in found if adapter}

    def _found(
        self, persona: str, suffix: str, seen: Mapping[str, ServedAdapter]
    ) -> ServedAdapter | None:
        try:
            return self._find(persona, suffix)
        except Exception as error:  # whatever is wrong with one manifest, the others are served
            model = f"{self.student}:{persona}{suffix}"
            warn_once(f"{model}: its manifest cannot be read ({type(error).__name__}: {error})")
            return seen.get(model)

    def _find(self, persona: str, suffix: str) -> ServedAdapter | None:
        dataset = f"{self.student}/{persona}/{STAGES[suffix]}"
        try:
            manifest = self.store.manifest(dataset)
        except FileNotFoundError:  # deleted as it was read: it is being trained again
            return None
        if manifest is None or not self._is_inside(f"{dataset}/adapter"):
            return None
        if manifest["payload"]["roles"]["student"]["model"] != self.base:
            return None
        revision = f"{manifest['fingerprint']}.{row_id(manifest)[:8]}"
        return ServedAdapter(
            f"{self.student}:{persona}{suffix}", persona, revision, dataset, manifest
        )

    def _is_inside(self, relative: str) -> bool:
        """Whether a folder is within the storage root after all links are followed."""
        if not isinstance(self.store.fs, pafs.LocalFileSystem):
            return True  # object stores have no links
        root = Path(self.store.path()).resolve()
        return Path(self.store.path(relative)).resolve().is_relative_to(root)

    async def snapshot(self, id: str) -> Path:
        """The files of one revision on this node, copied at the first call.

        Raises:
            LookupError: if storage does not hold that revision.
        """
        return await asyncio.to_thread(self._snapshot, id)

    def _snapshot(self, id: str) -> Path:
        adapter = self.adapters().get(id.partition("@")[0])
        if adapter is None or adapter.id != id:
            raise LookupError(f"model {id!r} is not in storage, or no longer")
        copy = RemoteDir(self.store, f"{adapter.dataset}/adapter").copy()
        if self.adapters().get(adapter.model) != adapter:  # replaced before it was copied
            raise LookupError(f"model {id!r} has just been trained again; ask once more")
        return copy


class Listing:
    """A catalogue as it was last seen: looked at all the while, so that no request waits for that.

    Args:
        catalogue: of the student.
        seconds: from one look into storage to the next.
    """

    def __init__(self, catalogue: Catalogue, seconds: float):
        self.catalogue, self.seconds = catalogue, seconds
        self.seen: dict[str, ServedAdapter] | None = None
        self.looking: asyncio.Task[dict[str, ServedAdapter]] | None = None
        self.looks: asyncio.Task[None] | None = None

    async def adapters(self) -> dict[str, ServedAdapter]:
        """The adapters by model name; waits, and raises what storage does, until a first look."""
        if self.looks is None:
            self.looks = asyncio.create_task(self._keep_looking())
        return await self.look() if self.seen is None else self.seen

    async def look(self) -> dict[str, ServedAdapter]:
        """The adapters as storage has them now; those who ask at once share one look."""
        if self.looking is None or self.looking.done():
            look = asyncio.to_thread(self.catalogue.adapters, self.seen)
            self.looking = asyncio.create_task(look)
        found = await asyncio.shield(self.looking)
        self.seen = found
        return found

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self.seconds)
            try:
                await self.look()
            except Exception as error:  # what was seen last is served while storage is out
                log.warning(f"storage cannot be looked at ({type(error).__name__}: {error})")
