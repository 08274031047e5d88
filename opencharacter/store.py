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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from opencharacter.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTS = ".parts"
ATTEMPTS = "attempts.json"


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

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write a small file; on a local filesystem it appears whole or not at all."""
        path = self.path(relative)
        self.fs.create_dir(path.rpartition("/")[0], recursive=True)
        local = isinstance(self.fs, pafs.LocalFileSystem)
        target = path + ".tmp" if local else path
        with self.fs.open_output_stream(target) as stream:
            stream.write(data)
        if local:
            Path(target).replace(path)

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
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        self.write_bytes(f"{dataset}/{name}.parquet", buffer.getvalue().to_pybytes())

    def read_table(self, dataset: str, name: str = "rows") -> pa.Table:
        """Read what `write_table` wrote."""
        return pq.read_table(self.path(dataset, f"{name}.parquet"), filesystem=self.fs)

    def parts(self, folder: str, schema: pa.Schema) -> pa.Table:
        """All rows of the Parquet files in a folder, each id once, sorted by id."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        files = [i.path for i in self.fs.get_file_info(selector) if i.extension == "parquet"]
        if not files:
            return schema.empty_table()
        table = pds.dataset(files, schema=schema, filesystem=self.fs, format="parquet").to_table()
        at = pa.table({"id": table["id"], "at": pa.array(range(len(table)))})
        once = at.group_by("id").aggregate([("at", "min")])["at_min"]
        return table.take(once).sort_by("id")

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
