"""The package's cache on this machine: folders that are created once, and hashes of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

SETTLED_NS = 2_000_000_000
"""Age from which a file's modification time identifies its content. A younger file could change
once more within the resolution of the filesystem's clock."""
IN_USE_SECONDS = 1800
"""For how long after its last use a folder may still be read, for instance by a starting engine."""
HUB_BLOB = re.compile(r".*/blobs/([0-9a-f]{64})")
"""A large file in the cache of the Hugging Face Hub, which is named after its SHA-256."""


def cache_dir() -> Path:
    """`$OPENCHARACTER_CACHE`, else `opencharacter` in the user's cache folder."""
    own = os.environ.get("OPENCHARACTER_CACHE")
    user = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(own) if own else Path(user) / "opencharacter"


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` when the block ends without an error.

    `target` appears complete or not at all. Its permissions follow the umask.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".tmp-{uuid.uuid4().hex}"
    scratch.mkdir()
    mode = scratch.stat().st_mode
    try:
        yield scratch
        for path in (scratch, *scratch.rglob("*")):  # safetensors makes files private
            if not path.is_symlink():
                path.chmod(mode if path.is_dir() else mode & 0o666)
        try:
            scratch.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process was faster, and its result is used
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def create_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Create a folder of the cache, once among all processes of this node.

    Args:
        target: the folder, named after what identifies its content.
        make: fills a scratch folder, which then becomes `target`.

    Returns:
        The folder.
    """
    from filelock import FileLock

    if target.is_dir():
        return target
    # The lock saves work and disk space, but correctness does not depend on it. It is kept on the
    # node's own disk, because the cache may be on NFS.
    lock = Path(tempfile.gettempdir(), f"opencharacter-{os.getuid()}-{target.name}.lock")
    with FileLock(lock):
        if not target.is_dir():
            with atomic_directory(target) as scratch:
                make(scratch)
    return target


def make_space(parent: Path, needed: int) -> None:
    """Delete folders of the cache, the least recently used first, until there is enough space.

    A folder was last used at its modification time. One that may be in use stays.

    Args:
        parent: the folder that contains them; each can be created again.
        needed: bytes that must be free.
    """
    parent.mkdir(parents=True, exist_ok=True)
    unused_since = time.time() - IN_USE_SECONDS
    used: dict[Path, float] = {}
    for folder in parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            used[folder] = folder.stat().st_mtime
    for folder in sorted(used, key=used.__getitem__):
        if shutil.disk_usage(parent).free >= needed or used[folder] > unused_since:
            return
        shutil.rmtree(folder, ignore_errors=True)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cached_file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, which is read once for each path, size and modification time.

    A file that was modified in the last two seconds is always read.
    """
    path = path.resolve()
    if blob := HUB_BLOB.fullmatch(path.as_posix()):
        return blob[1]
    status = path.stat()
    key = [str(path), status.st_size, status.st_mtime_ns]
    name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
    record = cache_dir() / "hashes" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads(record.read_text())
        if stored["key"] == key:
            return stored["sha256"]
    digest = file_hash(path)
    if time.time_ns() - status.st_mtime_ns > SETTLED_NS:
        with contextlib.suppress(OSError):  # without a writable cache, the file is read every time
            record.parent.mkdir(parents=True, exist_ok=True)
            scratch = record.with_name(f".tmp-{uuid.uuid4().hex}")
            scratch.write_text(json.dumps({"key": key, "sha256": digest}))
            scratch.replace(record)
    return digest
