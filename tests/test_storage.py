"""Object storage: a local S3 server that may be stopped, storage URLs, and a full disk."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import yaml
from samples import ECHO_ROLE, FAKE_KEYS, TINY, cli, embedded_recipe

from opencharacter import pipeline
from opencharacter.errors import StageFailed, UserError
from opencharacter.runtime.store import RemoteDir, Shards, Store, attempts_within

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False)])


@pytest.fixture
def remote(bucket) -> Store:
    return Store.at(bucket.url, retry_seconds=20)


def test_s3_stores_tables_manifests_and_adapters(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    remote.check_writable()
    table = pa.table({"id": ["a", "b"]}, schema=SCHEMA)
    remote.write_table("humor/distillation/prompts", table)
    remote.write_table("humor/distillation/prompts/.shards", table, "part-1")
    remote.write_manifest("humor/distillation/prompts", {"rows": 2})
    assert remote.read_table("humor/distillation/prompts") == table
    assert sum(len(t) for t in remote.scan("humor/distillation/prompts", rows=1)) == 2
    assert (remote.manifest("humor/distillation/prompts") or {})["rows"] == 2
    parts = Shards(RemoteDir(remote, "humor/distillation/prompts/.shards"), SCHEMA)
    assert parts.ids() == {"a", "b"}
    assert remote.folders("humor") == ["distillation"]
    remote.delete("humor/distillation/prompts/.shards")
    assert parts.files() == []
    assert not remote.exists(".writable")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/weights").write_bytes(b"w")
    remote.upload(tmp_path / "adapter", "humor/adapter")
    folder = RemoteDir(remote, "humor/adapter")
    assert [p.name for p in folder.local().iterdir()] == ["weights"]
    assert folder.local() == folder.local()  # one copy per node


def test_an_address_does_not_contain_the_options_of_the_url(remote):
    assert "?" not in remote.address("humor", "report.html")
    assert remote.address("humor", "report.html").endswith("/runs/humor/report.html")
    assert "?" not in remote.path("humor")


@pytest.mark.parametrize("url", ["s3://KEY:hidden@bucket/runs", "gs://hidden@bucket/runs"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="environment") as refused:
        Store(url).resolve()
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["s3:///runs", "ftp://bucket/runs", "s3://bucket/runs?secret_key=hidden", "gs://b?x=1"]
)
def test_a_url_that_cannot_be_opened_is_refused(url):
    with pytest.raises(UserError, match="give a path") as refused:
        Store(url).resolve()
    assert "hidden" not in str(refused.value)


def test_google_storage_is_opened_without_a_request():
    filesystem, root = Store("gs://bucket/runs/", retry_seconds=5).resolve()
    assert isinstance(filesystem, pafs.GcsFileSystem)
    assert root == "bucket/runs"


def test_requests_to_unavailable_storage_are_retried(remote, bucket):
    remote.write_bytes("a", b"before")
    bucket.stop()
    threading.Timer(3, bucket.start).start()
    began = time.monotonic()
    elsewhere = pickle.loads(pickle.dumps(remote.fs))  # as Ray Train sends it to its workers
    with elsewhere.open_output_stream(remote.path("a")) as stream:
        stream.write(b"after")
    assert time.monotonic() - began > 2
    assert bucket.read(f"{bucket.name}/runs/a") == b"after"


def test_requests_to_lost_storage_fail_with_a_remedy(bucket):
    impatient = Store.at(bucket.url, retry_seconds=0.5)
    impatient.resolve()
    bucket.stop()
    with pytest.raises(StageFailed, match=r"cannot write s3://.*connect.*the same command again"):
        impatient.write_bytes("a", b"1")
    with pytest.raises(UserError, match="cannot be written"):
        impatient.check_writable()
    with pytest.raises(UserError, match="cannot be read"):
        impatient.manifest("humor/distillation/prompts")
    bucket.start()


def test_retry_seconds_become_a_number_of_attempts():
    assert attempts_within(0) == 1
    assert 10 < attempts_within(180) < 14


def test_a_full_disk_is_named_and_no_incomplete_file_remains(tmp_path, small_disk):
    store = Store(str(small_disk))
    store.write_bytes("kept", b"1" * 1000)
    with pytest.raises(StageFailed, match=f"no space left for {small_disk}/a/big.*No space left"):
        store.write_bytes("a/big", b"1" * 3_000_000)
    assert [p.name for p in Path(small_disk).rglob("*") if p.is_file()] == ["kept"]


@pytest.mark.slow
def test_a_run_that_filled_its_disk_resumes_when_there_is_space(tmp_path, small_disk):
    recipe = {
        **TINY,
        "roles": dict.fromkeys(("teacher", "student", "judge", "prompt_generator"), ECHO_ROLE),
    }
    recipe["distillation"] = {
        **TINY["distillation"],
        "teacher": {"answers": 40, "limits": {"min_texts": 10**6}},
        "student": {"answers": 40, "limits": {"min_texts": 10**6}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    run = ["run", "tiny.yaml", "-c", "poeticism", "--storage", str(small_disk)]
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(b"1" * (free.f_bavail * free.f_bsize - 60_000))  # enough to begin with
    full = cli(*run, "--until", "distillation/student", cwd=tmp_path)
    assert full.returncode == 1, full.stdout + full.stderr
    assert full.stdout.splitlines()[-1].startswith(f"failed: no space left for {small_disk}/")
    assert "Traceback" not in full.stdout + full.stderr
    filler.unlink()
    again = cli(*run, "--until", "distillation/student", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    ids = Store(str(small_disk)).read_table("echo/distillation/student")["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 240


# The recipe below neither blends nor trains a persona further, steers nothing and has no tasks.
UNUSED_STAGES = {
    "persona/blend",
    "persona/tune",
    "evaluation/steering",
    "evaluation/capabilities",
}


@pytest.fixture
def project(tmp_path, tiny_model, answering) -> Path:
    """A recipe with models that answer instantly and are really trained."""
    recipe = embedded_recipe()
    role = {"model": str(tiny_model), "name": "two-layers", "self_name": "Two"}
    role["max_model_len"] = 2048
    recipe["roles"] = dict.fromkeys(
        ("teacher", "student", "judge", "prompt_generator"), role | answering
    )
    recipe["distillation"]["prompts"]["general"] = 20
    recipe["distillation"]["dpo"]["optimizer"] |= {"epochs": 4}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    placement = {"training": {"cpus": 1, "checkpoint_steps": 2}, "storage_retry_seconds": 60}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(placement))
    return tmp_path


@pytest.mark.slow
def test_a_whole_run_is_stored_in_a_bucket_and_resumes_after_a_kill(project, bucket):
    run = ["tiny.yaml", "-c", "poeticism", "--placement", "two.yaml", "--storage", bucket.url]
    killed = subprocess.Popen(
        [sys.executable, "-m", "opencharacter", "run", *run],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    train = f"{bucket.name}/runs/two-layers/poeticism/distillation/dpo/.shards/train"
    snapshot = f"{train}/checkpoint_manager_snapshot.json"
    while b"checkpoint_" not in bucket.read(snapshot):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.5)
    killed.kill()
    output = killed.communicate()[0]
    done = cli("run", *run, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        f"report: s3://{bucket.name}/runs/two-layers/evaluation/report/report.html" in done.stdout
    )
    (elsewhere := project / "elsewhere").mkdir()
    status = cli("status", f"{project}/{run[0]}", *run[1:3], *run[5:], cwd=elsewhere)
    used = [stage for stage in pipeline.STAGES if stage.name not in UNUSED_STAGES]
    assert status.stdout.count(" done ") == len(used) == 29

    stored = {path: bucket.read(path) for path in bucket.paths()}
    manifest = json.loads(stored[train.replace(".shards/train", "manifest.json")])
    first, second = manifest["attempts"]
    assert second["kept"] >= 2
    assert first["kept"] == 0
    everything = [output, done.stdout, done.stderr, status.stdout, status.stderr]
    everything += [text.decode(errors="ignore") for text in stored.values()]
    secrets = [value for name, value in FAKE_KEYS.items() if "KEY" in name]
    assert not [secret for secret in secrets for text in everything if secret in text]
    assert not [path for path in stored if "/.shards/" in path or path.endswith(".tmp")]
