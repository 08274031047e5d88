"""Data at rest: Parquet with a declared schema, a manifest written last, and the drift between two.

A dataset is a folder `<scope>/<stage>/` of Parquet files (and, for training stages, an adapter)
beside `manifest.json`. No manifest: not done. While a stage runs its rows are in `.parts/`, and
`.parts/attempts.json` says what each attempt had started when it was last heard of.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from opencharacter.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTS = ".parts"
ATTEMPTS = "attempts.json"
READERS = 8
"""Files of rows that are read at once, and so are in memory together."""


def fingerprint(payload: dict[str, Any]) -> str:
    """Hash of a payload of JSON values; refuses (TypeError) whatever JSON cannot say exactly."""
    text = json.dumps(payload, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def drift(old: Any, new: Any, at: str = "") -> list[str]:
    """The fields in which two payloads differ, as lines `field: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in drift(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
        ]
    return [] if old == new else [f"{at}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Store:
    """A storage root on any filesystem that pyarrow knows; picklable, so workers can use it.

    Args:
        url: a local path, or `s3://bucket/prefix`, `gs://bucket/prefix`.
    """

    url: str

    @classmethod
    def at(cls, url: str) -> Store:
        """A store that means the same place in every process: local paths are made absolute."""
        return cls(url if "://" in url else str(Path(url).expanduser().resolve()))

    def resolve(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem and the root's path on it.

        Raises:
            UserError: if the URL is not one that pyarrow can open.
        """
        if "://" not in self.url:
            return pafs.LocalFileSystem(), str(Path(self.url).expanduser().resolve())
        try:
            filesystem, root = pafs.FileSystem.from_uri(self.url)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise UserError(f"storage {self.url!r}: {error}; give a path, s3:// or gs://") from None
        return filesystem, root.rstrip("/")

    @property
    def fs(self) -> pafs.FileSystem:
        return self.resolve()[0]

    def path(self, *parts: str) -> str:
        """Path on the filesystem, for use with `fs`."""
        return "/".join((self.resolve()[1], *parts))

    def check_writable(self) -> None:
        """Raise a UserError unless a file can be written under the root."""
        probe = self.path(".writable")
        try:
            self.write_bytes(".writable", b"")
            self.fs.delete_file(probe)
        except OSError as error:
            raise UserError(
                f"storage {self.url!r} cannot be written ({error}); choose another --storage"
            ) from None

    # ------------------------------------------------------------------------------ small files

    def exists(self, *parts: str) -> bool:
        return self.fs.get_file_info(self.path(*parts)).type != pafs.FileType.NotFound

    @contextmanager
    def output(self, relative: str) -> Iterator[pa.NativeFile]:
        """A stream into a file; on a local filesystem it appears whole or not at all."""
        path = self.path(relative)
        self.fs.create_dir(path.rpartition("/")[0], recursive=True)
        local = isinstance(self.fs, pafs.LocalFileSystem)
        target = path + ".tmp" if local else path
        with self.fs.open_output_stream(target) as stream:
            yield stream
        if local:
            Path(target).replace(path)

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write a small file."""
        with self.output(relative) as stream:
            stream.write(data)

    def read_json(self, relative: str) -> Any | None:
        """The parsed file, or None if there is none."""
        if not self.exists(relative):
            return None
        with self.fs.open_input_stream(self.path(relative)) as stream:
            return json.loads(stream.read())

    def write_json(self, relative: str, value: Any) -> None:
        self.write_bytes(relative, json.dumps(value, indent=1, ensure_ascii=False).encode())

    def delete(self, relative: str) -> None:
        """Delete a folder and what is in it; nothing if it is not there."""
        if self.exists(relative):
            self.fs.delete_dir(self.path(relative))

    def folders(self, relative: str) -> list[str]:
        """Names of the folders under a path, sorted."""
        if not self.exists(relative):
            return []
        infos = self.fs.get_file_info(pafs.FileSelector(self.path(relative)))
        return sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)

    # -------------------------------------------------------------------------------- manifests

    def manifest(self, dataset: str) -> dict[str, Any] | None:
        """The manifest of a finished dataset, or None.

        Raises:
            UserError: if a newer version of this package wrote it.
        """
        manifest = self.read_json(f"{dataset}/{MANIFEST}")
        if manifest and manifest["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{dataset}/{MANIFEST} has format version {manifest['format_version']}, this "
                f"package reads {FORMAT_VERSION}; upgrade opencharacter"
            )
        return manifest

    def write_manifest(self, dataset: str, manifest: dict[str, Any]) -> None:
        self.write_json(f"{dataset}/{MANIFEST}", {"format_version": FORMAT_VERSION, **manifest})

    def attempts(self, dataset: str) -> list[dict[str, Any]]:
        """What each attempt at an unfinished stage had started when last heard of."""
        found = self.read_json(f"{dataset}/{PARTS}/{ATTEMPTS}")
        return found["attempts"] if found else []

    # ------------------------------------------------------------------------------------ tables

    def write_table(self, dataset: str, table: pa.Table, name: str = "rows") -> None:
        """Write a table as `<dataset>/<name>.parquet` (zstd)."""
        self.write_tables(dataset, [table], table.schema, name)

    def write_tables(
        self, dataset: str, tables: Iterable[pa.Table], schema: pa.Schema, name: str = "rows"
    ) -> None:
        """Write tables one after the other into one file, of which no more than one is held."""
        with (
            self.output(f"{dataset}/{name}.parquet") as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            for table in tables:
                writer.write_table(table)

    def read_table(
        self, dataset: str, name: str = "rows", columns: list[str] | None = None
    ) -> pa.Table:
        """Read what `write_table` wrote, or some columns of it."""
        path = self.path(dataset, f"{name}.parquet")
        return pq.read_table(path, filesystem=self.fs, columns=columns)

    def scan(self, dataset: str, rows: int, name: str = "rows") -> Iterator[pa.Table]:
        """The same a few rows at a time."""
        with self.fs.open_input_file(self.path(dataset, f"{name}.parquet")) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=rows):
                yield pa.Table.from_batches([batch])

    # ------------------------------------------------------------------------- adapters, folders

    def upload(self, folder: Path, relative: str) -> None:
        """Copy a local folder into storage, replacing what was there."""
        self.delete(relative)
        target = self.path(relative)
        self.fs.create_dir(target, recursive=True)
        if isinstance(self.fs, pafs.LocalFileSystem):
            shutil.copytree(folder, target, dirs_exist_ok=True)
        else:
            pafs.copy_files(str(folder), target, pafs.LocalFileSystem(), self.fs)


@dataclass(frozen=True)
class Folder:
    """A folder in storage that a process on any node can have as local files."""

    store: Store
    relative: str

    def local(self) -> Path:
        """The folder itself where storage is local, else a copy that lives as long as /tmp."""
        path = self.store.path(self.relative)
        if isinstance(self.store.fs, pafs.LocalFileSystem):
            return Path(path)
        target = Path(tempfile.mkdtemp(prefix="opencharacter-"))
        pafs.copy_files(path, str(target), self.store.fs, pafs.LocalFileSystem())
        return target


def digests(ids: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A 64-bit number for each id: the same in every process, and a tenth of the id's memory."""
    return pd.util.hash_array(ids.to_numpy(zero_copy_only=False), categorize=False)


def among(numbers: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which of some digests are among others that are in order."""
    return np.searchsorted(ordered, numbers, "right") > np.searchsorted(ordered, numbers)


@dataclass(frozen=True)
class Parts:
    """Rows in the order in which they were finished, in many files of a folder of their own.

    A row whose writer died before it could say so may be there twice; each id is read once.
    Iterating gives a few files at a time, so that whoever reads holds no more than that.
    """

    folder: Folder
    schema: pa.Schema

    def write(self, table: pa.Table, name: str) -> None:
        """Add a file of rows.

        Args:
            table: of the schema.
            name: of those who may look for them alone; several files may have it.
        """
        file = f"{name}-{uuid.uuid4().hex}"
        self.folder.store.write_table(self.folder.relative, table, file)

    def files(self, name: str = "") -> list[str]:
        """Paths of the files, or of those of a name."""
        fs, path = self.folder.store.fs, self.folder.store.path(self.folder.relative)
        found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        named = (i for i in found if i.base_name.startswith(name))
        return sorted(i.path for i in named if i.extension == "parquet")

    def read(self, columns: list[str] | None = None, name: str = "") -> Iterator[pa.Table]:
        """The files' tables, some together and read at once: storage may be far away."""
        read = partial(
            pq.read_table,
            filesystem=self.folder.store.fs,
            columns=columns,
            schema=None if columns else self.schema,
        )
        with ThreadPoolExecutor(READERS) as readers:
            found = self.files(name)
            for at in range(0, len(found), READERS):
                yield pa.concat_tables(readers.map(read, found[at : at + READERS]))

    def stored(self, name: str = "") -> np.ndarray:
        """The digests of all ids, or of those in the files of a name, in order."""
        found = [digests(table["id"]) for table in self.read(["id"], name)]
        return np.sort(np.concatenate([np.empty(0, np.uint64), *found]))

    def __iter__(self) -> Iterator[pa.Table]:
        stored, seen = self.stored(), set[int]()
        twice = set(stored[1:][stored[1:] == stored[:-1]].tolist())
        for table in self.read():
            new = []
            for number in digests(table["id"]).tolist():
                new.append(number not in seen)
                if number in twice:
                    seen.add(number)
            yield table if all(new) else table.filter(pa.array(new))

    def table(self) -> pa.Table:
        """All rows, sorted by id."""
        return pa.concat_tables([self.schema.empty_table(), *self]).sort_by("id")
