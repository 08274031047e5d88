"""Storage: Parquet files with a declared schema, a manifest written last, and payload diffs.

A dataset is a folder `<scope>/<stage>/` that holds Parquet files, an adapter if the stage trains
one, and `manifest.json`. A dataset without a manifest is not finished. While a stage runs, its
rows are in `.shards/`, and `.shards/attempts.json` records how far each attempt has come. A folder
in `.rebuilds/`, beside the scopes, marks a rebuild that has deleted old datasets and has not
finished.

A file appears complete or not at all: by a rename on a local filesystem or NFS, at the end of the
upload on s3:// and gs://. There are no locks.
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

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from safetensors import SafetensorError

from opencharacter import cache
from opencharacter.errors import StageFailed, UserError

FORMAT_VERSION = 2
"""Version of the manifest's keys. Format 1 is that of opencharacter 0.1."""
MANIFEST = "manifest.json"
SHARDS = ".shards"
ATTEMPTS = "attempts.json"
REBUILDS = ".rebuilds"
READERS = 8
"""Row files that are read at once and are in memory together."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error codes of a full disk or an exhausted quota."""
URL_OPTIONS = {
    "s3": {"endpoint_override", "scheme", "region"},
    "gs": {"endpoint_override", "scheme"},
}
"""Allowed query options of a storage URL. They are stored in manifests, so no credentials."""


def fingerprint(payload: dict[str, Any]) -> str:
    """Hash JSON values.

    Raises:
        TypeError: for a value that is not JSON.
        ValueError: for a number that JSON cannot represent.
    """
    text = json.dumps(payload, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def diff(old: Any, new: Any, at: str = "") -> list[str]:
    """List the fields in which two payloads differ, each as `field: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in diff(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
        ]
    return [] if old == new else [f"{at}: {_abbreviate(old)} -> {_abbreviate(new)}"]


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


class RetryingS3(pafs.S3FileSystem):
    """An S3 filesystem whose retry settings survive pickling, which pyarrow's do not.

    Args:
        retry_seconds: seconds for which a failed request is retried.
        options: as for pyarrow's S3FileSystem.
    """

    def __init__(self, retry_seconds: float, **options: Any):
        strategy = pafs.AwsDefaultS3RetryStrategy(max_attempts=attempts_within(retry_seconds))
        super().__init__(retry_strategy=strategy, **options)
        self.arguments = (retry_seconds, options)

    def __reduce__(self) -> Any:
        return _unpickle_s3, self.arguments


def _unpickle_s3(retry_seconds: float, options: dict[str, Any]) -> RetryingS3:
    return RetryingS3(retry_seconds, **options)


def attempts_within(retry_seconds: float) -> int:
    """Number of attempts that the S3 client makes within a time.

    It waits 50 ms after the first attempt and doubles the wait after each further one.

    Args:
        retry_seconds: seconds in total.
    """
    return 1 + math.ceil(math.log2(1 + max(retry_seconds, 0) / 0.05))


@lru_cache
def open_filesystem(url: str, retry_seconds: float) -> tuple[pafs.FileSystem, str]:
    """Open the filesystem of a storage URL.

    Args:
        url: a local path, s3:// or gs:// URL. Credentials come from the environment only.
        retry_seconds: seconds for which a failed request is retried.

    Returns:
        The filesystem and the path of the storage root on it.

    Raises:
        UserError: if the URL is not supported or contains credentials.
    """
    if "://" not in url:
        return pafs.LocalFileSystem(), str(Path(url).expanduser().resolve())
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise UserError(
            f"storage {parts.scheme}:// URL contains credentials, which would be written into "
            "manifests; set them in the environment and remove everything before the @"
        )
    options: dict[str, Any] = dict(parse_qsl(parts.query))
    allowed = URL_OPTIONS.get(parts.scheme, set())
    if not parts.netloc or not allowed or not options.keys() <= allowed:
        raise UserError(
            f"storage {parts.scheme}://{parts.netloc}{parts.path}: give a path, s3://BUCKET/PREFIX "
            "or gs://BUCKET/PREFIX, with no options other than endpoint_override, scheme, region"
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
    """Turn errors of writing to `address` within the block into one line with a remedy.

    Raises:
        StageFailed: if the disk is full or the write fails for another reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        reason = os.strerror(code) if code in NO_SPACE else str(error)
        problem = "no space left for" if code in NO_SPACE else "cannot write"
        raise StageFailed(
            f"{problem} {address} ({reason}); fix this and run the same command again: stored rows "
            "are kept"
        ) from None


@dataclass(frozen=True)
class Store:
    """A storage root on a local disk, S3 or Google Cloud Storage. Picklable.

    Args:
        url: a local path, `s3://bucket/prefix` or `gs://bucket/prefix`.
        retry_seconds: seconds for which a failed request to s3:// or gs:// is retried.
    """

    url: str
    retry_seconds: float = 0

    @classmethod
    def at(cls, url: str, retry_seconds: float = 0) -> Store:
        """Create a store; a relative local path is made absolute, so that workers can use it."""
        return cls(url if "://" in url else str(Path(url).expanduser().resolve()), retry_seconds)

    def resolve(self) -> tuple[pafs.FileSystem, str]:
        """Return the filesystem and the root's path on it; see `open_filesystem`."""
        return open_filesystem(self.url, self.retry_seconds)

    def address(self, *parts: str) -> str:
        """Return the URL of a stored item without the URL's options, for messages."""
        return "/".join((self.url.partition("?")[0].rstrip("/"), *parts))

    @property
    def fs(self) -> pafs.FileSystem:
        return self.resolve()[0]

    def path(self, *parts: str) -> str:
        """Return the path of a stored item on `fs`."""
        return "/".join((self.resolve()[1], *parts))

    def check_writable(self) -> None:
        """Raise UserError if no file can be written below the root."""
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
        """Whether a file or folder exists; raises UserError if storage cannot be read."""
        try:
            return self.fs.get_file_info(self.path(*parts)).type != pafs.FileType.NotFound
        except OSError as error:
            raise UserError(
                f"storage {self.address()!r} cannot be read ({error}); check that it exists, and "
                "the credentials in the environment"
            ) from None

    @contextmanager
    def output(self, relative: str) -> Iterator[pa.NativeFile]:
        """Open a file for writing, which appears complete or not at all.

        Raises:
            StageFailed: if it cannot be written.
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
        """Parse a JSON file; None if it does not exist."""
        if not self.exists(relative):
            return None
        with self.fs.open_input_stream(self.path(relative)) as stream:
            return json.loads(stream.read())

    def write_json(self, relative: str, value: Any) -> None:
        """Write a JSON file."""
        self.write_bytes(relative, json.dumps(value, indent=1, ensure_ascii=False).encode())

    def delete(self, relative: str) -> None:
        """Delete a folder with its contents, if it exists."""
        if self.exists(relative):
            self.fs.delete_dir(self.path(relative))

    def folders(self, relative: str) -> list[str]:
        """List the names of the folders below a path, sorted."""
        if not self.exists(relative):
            return []
        infos = self.fs.get_file_info(pafs.FileSelector(self.path(relative)))
        return sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)

    # -------------------------------------------------------------------------------- manifests

    def manifest(self, dataset: str, any_format: bool = False) -> dict[str, Any] | None:
        """Read the manifest of a finished dataset; None if it is not finished.

        Args:
            dataset: its path below the root.
            any_format: whether to return a manifest of an older format, too.

        Raises:
            UserError: if another version of this package wrote it.
        """
        manifest = self.read_json(f"{dataset}/{MANIFEST}")
        written = manifest["format_version"] if manifest else FORMAT_VERSION
        if written > FORMAT_VERSION:
            raise UserError(
                f"{dataset}/{MANIFEST} has format version {written}, this version of opencharacter "
                f"reads {FORMAT_VERSION}; upgrade opencharacter"
            )
        if written < FORMAT_VERSION and not any_format:
            raise UserError(
                f"{dataset} was written by opencharacter 0.1 (manifest format {written}; this "
                f"version reads format {FORMAT_VERSION}); use another --storage, or replace it "
                "with --rebuild"
            )
        return manifest

    def write_manifest(self, dataset: str, manifest: dict[str, Any]) -> None:
        """Write a manifest, which marks its dataset as finished."""
        self.write_json(f"{dataset}/{MANIFEST}", {"format_version": FORMAT_VERSION, **manifest})

    def attempts(self, dataset: str) -> list[dict[str, Any]]:
        """Read the attempts at an unfinished dataset; see `attempts.AttemptLog`."""
        log = self.read_json(f"{dataset}/{SHARDS}/{ATTEMPTS}")
        return log["attempts"] if log else []

    # ------------------------------------------------------------------------------------ tables

    def write_table(self, dataset: str, table: pa.Table, name: str = "rows") -> None:
        """Write a table as `<dataset>/<name>.parquet` (zstd)."""
        self.write_tables(dataset, [table], table.schema, name)

    def write_tables(
        self, dataset: str, tables: Iterable[pa.Table], schema: pa.Schema, name: str = "rows"
    ) -> None:
        """Write tables into one file, holding one of them in memory at a time."""
        with (
            self.output(f"{dataset}/{name}.parquet") as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            for table in tables:
                writer.write_table(table)

    def read_table(
        self, dataset: str, name: str = "rows", columns: list[str] | None = None
    ) -> pa.Table:
        """Read a table, or some columns of it."""
        path = self.path(dataset, f"{name}.parquet")
        return pq.read_table(path, filesystem=self.fs, columns=columns)

    def scan(self, dataset: str, rows: int, name: str = "rows") -> Iterator[pa.Table]:
        """Read a table in batches of at most `rows` rows."""
        with self.fs.open_input_file(self.path(dataset, f"{name}.parquet")) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=rows):
                yield pa.Table.from_batches([batch])

    # ------------------------------------------------------------------------- adapters, folders

    def upload(self, folder: Path, relative: str) -> None:
        """Copy a local folder into storage, replacing the folder that was there.

        File modes are not copied, because scratch folders are readable by their owner only.

        Raises:
            StageFailed: if it cannot be written.
        """
        target = self.path(relative)
        with explain_write_errors(self.address(relative)):
            self.delete(relative)
            self.fs.create_dir(target, recursive=True)
            pafs.copy_files(str(folder), target, pafs.LocalFileSystem(), self.fs)


@dataclass(frozen=True)
class RemoteDir:
    """A folder in storage that processes on any node can read as local files.

    Args:
        store: the storage root.
        relative: path below it.
    """

    store: Store
    relative: str

    def local(self) -> Path:
        """Return the folder itself if storage is local, otherwise this node's copy."""
        if isinstance(self.store.fs, pafs.LocalFileSystem):
            return Path(self.store.path(self.relative))
        return self.copy()

    def copy(self) -> Path:
        """Copy the folder's current contents to this node's cache, once per content.

        Raises:
            LookupError: if the folder was replaced while it was copied.
        """
        files = self._files()
        key = fingerprint({"url": self.store.url, "folder": self.relative, "files": files})

        def download(target: Path) -> None:
            source = self.store.path(self.relative)
            pafs.copy_files(source, str(target), self.store.fs, pafs.LocalFileSystem())
            if self._files() != files:
                address = self.store.address(self.relative)
                raise LookupError(f"{address} was replaced while it was copied; try again")

        return cache.create_once(cache.cache_dir() / "copies" / key, download)

    def _files(self) -> list[list[Any]]:
        """Path, size and modification time of each file, which identify the contents."""
        selector = pafs.FileSelector(self.store.path(self.relative), recursive=True)
        files = (i for i in self.store.fs.get_file_info(selector) if i.type == pafs.FileType.File)
        return sorted([i.path, i.size, i.mtime_ns] for i in files)


@dataclass(frozen=True)
class Shards:
    """Rows in the order in which they were finished, in many Parquet files of one folder.

    A row is stored twice if its task was lost after writing it; each id is read only once.
    Iterating yields one table per few files, so that a reader never holds more than these.

    Args:
        folder: where the files are.
        schema: of the rows.
    """

    folder: RemoteDir
    schema: pa.Schema

    def write(self, table: pa.Table, name: str) -> None:
        """Add a file of rows.

        Args:
            table: rows of the schema.
            name: prefix of the file's name, by which `files` finds it; need not be unique.
        """
        file = f"{name}-{uuid.uuid4().hex}"
        self.folder.store.write_table(self.folder.relative, table, file)

    def files(self, name: str = "") -> list[str]:
        """Paths of all files, or of those written under a name."""
        fs, path = self.folder.store.fs, self.folder.store.path(self.folder.relative)
        infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        named = (i for i in infos if i.base_name.startswith(name))
        return sorted(i.path for i in named if i.extension == "parquet")

    def read(self, columns: list[str] | None = None, name: str = "") -> Iterator[pa.Table]:
        """Yield the files' tables, several concatenated, read concurrently to hide latency."""
        read = partial(
            pq.read_table,
            filesystem=self.folder.store.fs,
            columns=columns,
            schema=None if columns else self.schema,
        )
        files = self.files(name)
        with ThreadPoolExecutor(READERS) as readers:
            for first in range(0, len(files), READERS):
                yield pa.concat_tables(readers.map(read, files[first : first + READERS]))

    def ids(self, name: str = "") -> set[str]:
        """The ids of all rows, or of those written under a name."""
        return {row_id for table in self.read(["id"], name) for row_id in table["id"].to_pylist()}

    def delete_dropped(self, reason: str) -> None:
        """Delete the rows that were dropped for a reason, so that they are requested again."""
        store, dropped = self.folder.store, pc.field("drop_reason")
        for path in self.files():
            read = partial(pq.read_table, path, filesystem=store.fs)
            if read(columns=["drop_reason"]).filter(dropped == reason).num_rows:
                rest = read(schema=self.schema).filter(dropped.is_null() | (dropped != reason))
                store.write_table(self.folder.relative, rest, Path(path).stem)

    def __iter__(self) -> Iterator[pa.Table]:
        seen: set[str] = set()
        for table in self.read():
            first_seen = []
            for row_id in table["id"].to_pylist():
                first_seen.append(row_id not in seen)
                seen.add(row_id)
            yield table if all(first_seen) else table.filter(pa.array(first_seen))

    def table(self) -> pa.Table:
        """All rows, sorted by id."""
        return pa.concat_tables([self.schema.empty_table(), *self]).sort_by("id")
