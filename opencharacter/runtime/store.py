"""Data at rest: Parquet with a declared schema, a manifest written last, and the drift between two.

A dataset is a folder `<scope>/<stage>/` of Parquet files (and, for training stages, an adapter)
beside `manifest.json`. No manifest: not done. While a stage runs its rows are in `.shards/`, and
`.shards/attempts.json` says what each attempt had started when it was last heard of. A folder in
`.rebuilds/`, beside the scopes, notes that an unfinished rebuild has deleted what it replaces.

A file appears whole or not at all: by rename where the filesystem is local or NFS, by the end of
its upload on s3:// and gs://. Nothing is ever locked.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from safetensors import SafetensorError

from opencharacter import models
from opencharacter.errors import StageFailed, UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARDS = ".shards"
ATTEMPTS = "attempts.json"
REBUILDS = ".rebuilds"
READERS = 8
"""Files of rows that are read at once, and so are in memory together."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the operating system says where there is no room for a file."""
URL_OPTIONS = {
    "s3": {"endpoint_override", "scheme", "region"},
    "gs": {"endpoint_override", "scheme"},
}
"""What may follow the `?` of a storage URL. It gets into manifests, so no credentials."""


def fingerprint(payload: dict[str, Any]) -> str:
    """Hash of a payload of JSON values; refuses (TypeError) whatever JSON cannot say exactly."""
    text = json.dumps(payload, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def diff(old: Any, new: Any, at: str = "") -> list[str]:
    """The fields in which two payloads differ, as lines `field: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in diff(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
        ]
    return [] if old == new else [f"{at}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


class RetryingS3(pafs.S3FileSystem):
    """S3 that asks again, also in the process that it is sent to: pyarrow's forgets that."""

    def __init__(self, retry_seconds: float, **options: Any):
        attempts = pafs.AwsDefaultS3RetryStrategy(max_attempts=attempts_within(retry_seconds))
        super().__init__(retry_strategy=attempts, **options)
        self.made_of = (retry_seconds, options)

    def __reduce__(self) -> Any:
        return remade, self.made_of


def remade(retry_seconds: float, options: dict[str, Any]) -> RetryingS3:
    """A pickled `PatientS3` once more."""
    return RetryingS3(retry_seconds, **options)


def attempts_within(retry_seconds: float) -> int:
    """Attempts of S3's client, which waits 50 ms after the first and then twice as long each time.

    Args:
        retry_seconds: seconds in all.
    """
    return 1 + math.ceil(math.log2(1 + max(retry_seconds, 0) / 0.05))


@lru_cache
def open_filesystem(url: str, retry_seconds: float) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a storage URL, and the root's path on it.

    Args:
        url: a local path, s3:// or gs://; credentials come from the environment alone.
        retry_seconds: seconds for which a request that storage refuses is tried again.

    Raises:
        UserError: if the URL holds credentials, or is not one that can be opened.
    """
    if "://" not in url:
        return pafs.LocalFileSystem(), str(Path(url).expanduser().resolve())
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise UserError(
            f"storage {parts.scheme}:// URL holds credentials, which would be written into "
            "manifests; put them into the environment and leave out what is before the @"
        )
    options: dict[str, Any] = dict(parse_qsl(parts.query))
    known = URL_OPTIONS.get(parts.scheme, set())
    if not parts.netloc or not known or not options.keys() <= known:
        raise UserError(
            f"storage {parts.scheme}://{parts.netloc}{parts.path}: give a path, s3://BUCKET/PREFIX "
            "or gs://BUCKET/PREFIX, with no other options than endpoint_override, scheme, region"
        )
    root = f"{parts.netloc}{parts.path}".rstrip("/")
    if parts.scheme == "gs":
        limit = datetime.timedelta(seconds=max(retry_seconds, 1))
        return pafs.GcsFileSystem(retry_time_limit=limit, **options), root
    if not {"region", "endpoint_override"} & options.keys():
        try:
            options["region"] = pafs.resolve_s3_region(parts.netloc)
        except OSError as error:
            raise UserError(f"storage {url!r}: {error}; check the bucket's name") from None
    return RetryingS3(retry_seconds, **options), root


@contextmanager
def explain_write_errors(address: str) -> Iterator[None]:
    """Within this, a place to write to that has no room, or refuses, is named in one line.

    Raises:
        StageFailed: with the remedy.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        reason = os.strerror(code) if code in FULL else str(error)
        what = "no room for" if code in FULL else "cannot write"
        raise StageFailed(
            f"{what} {address} ({reason}); mend that and run the same command "
            "again: what is stored stays"
        ) from None


@dataclass(frozen=True)
class Store:
    """A storage root on any filesystem that pyarrow knows; picklable, so workers can use it.

    Args:
        url: a local path, or `s3://bucket/prefix`, `gs://bucket/prefix`.
        retry_seconds: seconds for which a request that s3:// or gs:// refuses is tried again.
    """

    url: str
    retry_seconds: float = 0

    @classmethod
    def at(cls, url: str, retry_seconds: float = 0) -> Store:
        """A store that means the same place in every process: local paths are made absolute."""
        return cls(url if "://" in url else str(Path(url).expanduser().resolve()), retry_seconds)

    def resolve(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem and the root's path on it; errors as `open_filesystem`."""
        return open_filesystem(self.url, self.retry_seconds)

    def address(self, *parts: str) -> str:
        """Where something is, for people: the URL without its options."""
        return "/".join((self.url.partition("?")[0].rstrip("/"), *parts))

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
        except (OSError, StageFailed) as error:
            raise UserError(
                f"storage {self.address()!r} cannot be written ({error}); choose another --storage"
            ) from None

    # ------------------------------------------------------------------------------ small files

    def exists(self, *parts: str) -> bool:
        """Whether there is a file or a folder; a UserError if storage refuses to say."""
        try:
            return self.fs.get_file_info(self.path(*parts)).type != pafs.FileType.NotFound
        except OSError as error:
            raise UserError(
                f"storage {self.address()!r} cannot be read ({error}); check that it is there, and "
                "the credentials in the environment"
            ) from None

    @contextmanager
    def output(self, relative: str) -> Iterator[pa.NativeFile]:
        """A stream into a file, which appears whole or not at all.

        Raises:
            StageFailed: if there is no room for it, or storage refuses it.
        """
        path = self.path(relative)
        local = isinstance(self.fs, pafs.LocalFileSystem)
        target = path + ".tmp" if local else path
        try:
            with explain_write_errors(self.address(relative)):
                self.fs.create_dir(path.rpartition("/")[0], recursive=True)
                with self.fs.open_output_stream(target) as stream:
                    yield stream
                if local:
                    Path(target).replace(path)
        except StageFailed:
            if local:
                Path(target).unlink(missing_ok=True)
            raise

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
        found = self.read_json(f"{dataset}/{SHARDS}/{ATTEMPTS}")
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
        """Copy a local folder into storage, replacing what was there.

        Its files' modes are not copied: scratch folders are their owner's alone.

        Raises:
            StageFailed: as `output`.
        """
        target = self.path(relative)
        with explain_write_errors(self.address(relative)):
            self.delete(relative)
            self.fs.create_dir(target, recursive=True)
            pafs.copy_files(str(folder), target, pafs.LocalFileSystem(), self.fs)


@dataclass(frozen=True)
class RemoteDir:
    """A folder in storage that a process on any node can have as local files."""

    store: Store
    relative: str

    def local(self) -> Path:
        """The folder itself where storage is local, else this node's copy."""
        if isinstance(self.store.fs, pafs.LocalFileSystem):
            return Path(self.store.path(self.relative))
        return self.copy()

    def copy(self) -> Path:
        """This node's copy of what is stored now: made once, and never overwritten.

        Raises:
            LookupError: if it was replaced while it was copied.
        """
        files = self._files()
        key = fingerprint({"url": self.store.url, "folder": self.relative, "files": files})

        def make(target: Path) -> None:
            source = self.store.path(self.relative)
            pafs.copy_files(source, str(target), self.store.fs, pafs.LocalFileSystem())
            if self._files() != files:
                address = self.store.address(self.relative)
                raise LookupError(f"{address} was replaced while it was copied; ask once more")

        return models.create_once(models.cache_dir() / "copies" / key, make)

    def _files(self) -> list[list[Any]]:
        """Path, size and time of each file: what tells one content from the next."""
        where = pafs.FileSelector(self.store.path(self.relative), recursive=True)
        found = (i for i in self.store.fs.get_file_info(where) if i.type == pafs.FileType.File)
        return sorted([i.path, i.size, i.mtime_ns] for i in found)


def digests(ids: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A 64-bit number for each id: the same in every process, and a tenth of the id's memory."""
    return pd.util.hash_array(ids.to_numpy(zero_copy_only=False), categorize=False)


def among(numbers: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which of some digests are among others that are in order."""
    return np.searchsorted(ordered, numbers, "right") > np.searchsorted(ordered, numbers)


@dataclass(frozen=True)
class Shards:
    """Rows in the order in which they were finished, in many files of a folder of their own.

    A row whose writer died before it could say so may be there twice; each id is read once.
    Iterating gives a few files at a time, so that whoever reads holds no more than that.
    """

    folder: RemoteDir
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

    def forget(self, reason: str) -> None:
        """Remove the rows that were dropped for a reason: they are to be asked for again."""
        store, dropped = self.folder.store, pc.field("drop_reason")
        for path in self.files():
            read = partial(pq.read_table, path, filesystem=store.fs)
            if read(columns=["drop_reason"]).filter(dropped == reason).num_rows:
                left = read(schema=self.schema).filter(dropped.is_null() | (dropped != reason))
                store.write_table(self.folder.relative, left, Path(path).stem)

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
