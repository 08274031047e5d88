import tempfile
from pathlib import Path

import pyarrow as pa
import pytest

from opencharacter.errors import StageFailed, UserError
from opencharacter.runtime.store import RemoteDir, Shards, Store, diff, fingerprint

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("n", pa.int64())])


def table(*rows: tuple[str, int]) -> pa.Table:
    return pa.Table.from_pylist([{"id": id, "n": n} for id, n in rows], schema=SCHEMA)


def test_a_table_is_read_as_it_was_written(store):
    store.write_table("a/b", table(("x", 1), ("y", 2)))
    assert store.read_table("a/b").to_pylist() == [{"id": "x", "n": 1}, {"id": "y", "n": 2}]


def test_shards_yield_each_id_once_and_in_order(store):
    store.write_table("a/.shards", table(("b", 1), ("c", 1)), "part-1")
    store.write_table("a/.shards", table(("c", 2), ("a", 2)), "part-2")
    rows = Shards(RemoteDir(store, "a/.shards"), SCHEMA).table().to_pylist()
    assert [row["id"] for row in rows] == ["a", "b", "c"]


def test_shards_of_a_missing_folder_are_an_empty_table(store):
    assert Shards(RemoteDir(store, "nowhere"), SCHEMA).table().num_rows == 0


def test_rows_with_a_given_drop_reason_can_be_removed(store):
    schema = pa.schema([("id", pa.string()), ("drop_reason", pa.string())])
    parts = Shards(RemoteDir(store, "a/.shards"), schema)
    ids, reasons = ["x", "y", "z"], [None, "engine_error", "too_long"]
    for n in (3, 1):
        parts.write(pa.table([ids[:n], reasons[:n]], schema=schema), "part")
    parts.delete_dropped("engine_error")
    assert parts.table()["id"].to_pylist() == ["x", "z"]
    assert len(parts.files()) == 2


def test_an_incomplete_file_is_not_a_shard(store):
    store.write_table("a/.shards", table(("a", 1)), "part-1")
    with open(store.path("a/.shards/part-2.parquet.tmp"), "wb") as half:
        half.write(b"PAR1 half")
    assert Shards(RemoteDir(store, "a/.shards"), SCHEMA).table().num_rows == 1


def test_an_upload_replaces_the_folder(store, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x").write_text("new")
    store.write_bytes("adapter/old", b"old")
    store.upload(tmp_path / "one", "adapter")
    local = RemoteDir(store, "adapter").local()
    assert [path.name for path in local.iterdir()] == ["x"]


def test_uploaded_files_have_the_permissions_of_the_umask(store, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/file").write_text("x")
    with (
        tempfile.TemporaryDirectory() as scratch
    ):  # private to its owner, as safetensors' files are
        (Path(scratch) / "weights").touch(mode=0o600)
        store.upload(Path(scratch), "adapter")
    stored = Path(store.path("adapter"))
    assert stored.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (stored / "weights").stat().st_mode == (tmp_path / "plain/file").stat().st_mode


def test_an_upload_to_a_full_disk_names_its_target(tmp_path, small_disk):
    (tmp_path / "big").mkdir()
    (tmp_path / "big/weights").write_bytes(b"1" * 3_000_000)
    with pytest.raises(
        StageFailed, match=f"no space left for {small_disk}/adapter .*No space left"
    ):
        Store(str(small_disk)).upload(tmp_path / "big", "adapter")


def test_a_folder_is_copied_once_for_each_content(store, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    store.write_bytes("adapter/weights", b"old")
    folder = RemoteDir(store, "adapter")
    first = folder.copy()
    assert folder.copy() == first
    store.write_bytes("adapter/weights", b"newer")
    second = folder.copy()
    assert (first / "weights").read_bytes() == b"old"
    assert (second / "weights").read_bytes() == b"newer"
    assert sorted((tmp_path / "cache/copies").iterdir()) == sorted([first, second])


def test_diff_names_the_fields_that_differ():
    old = {"a": {"beta": 0.1, "same": 1}, "gone": 1}
    new = {"a": {"beta": 0.2, "same": 1}, "come": None, "list": [1]}
    assert diff(old, new) == ["a.beta: 0.1 -> 0.2", "gone: 1 -> null", "list: null -> [1]"]


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}])
def test_a_fingerprint_refuses_what_it_cannot_hash(value):
    with pytest.raises((TypeError, ValueError)):
        fingerprint({"x": value})


def test_a_manifest_from_a_newer_version_is_refused(store):
    store.write_json("a/manifest.json", {"format_version": 99})
    with pytest.raises(UserError, match="99"):
        store.manifest("a")


def test_a_manifest_of_the_first_version_is_refused_with_the_remedy(store):
    store.write_json("a/manifest.json", {"format_version": 1, "rows": 3})
    with pytest.raises(UserError, match=r"written by opencharacter 0\.1 .*--storage.*--rebuild"):
        store.manifest("a")
    assert (store.manifest("a", any_format=True) or {})["rows"] == 3


def test_an_unknown_filesystem_is_refused():
    with pytest.raises(UserError, match="ftp://"):
        Store("ftp://host/x").resolve()
