"""The files that a public repository needs agree with the project."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(path):
    return (ROOT / path).read_text()


def pinned(lock):
    """Versions by package of a lock file."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", read(f"requirements/{lock}"), re.MULTILINE))


def test_the_workflow_runs_the_projects_own_script_on_the_oldest_and_newest_python():
    jobs = yaml.safe_load(read(".github/workflows/ci.yaml"))["jobs"]
    assert {"run": ".ci/run"} in jobs["all"]["steps"]
    assert jobs["all"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


def test_the_lock_of_gpu_hosts_has_a_hash_for_every_package_and_the_tested_versions():
    text = read("requirements/gpu.txt")
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 150
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    gpu, cpu, together = pinned("gpu.txt"), pinned("cpu.txt"), pinned("gpu.in")
    assert {name: gpu[name] for name in together} == together
    for name in ("ray", "transformers", "peft"):
        assert cpu[name] == gpu[name]


def test_images_run_as_a_user_and_hold_no_secrets():
    for name in ("cpu", "cuda"):
        text = read(f"docker/{name}.Dockerfile")
        assert re.search(r"^USER 10001$", text, re.MULTILINE)
        assert "HEALTHCHECK" in text
        assert text.count("\nFROM ") + text.startswith("FROM") == 2
        assert not re.search(r"(?i)(token|key|password)=(?!token)", text)
        assert re.findall(r"^FROM \S+:(\S+)", text, re.MULTILINE)[0] != "latest"


def test_compose_publishes_ports_on_this_machine_only_and_reads_secrets_from_files():
    compose = yaml.safe_load(read("docker/compose.yaml"))
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())
    for service in compose["services"].values():
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert "healthcheck" in service


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert "arXiv:2511.01689" in citation["preferred-citation"]["journal"]


def test_the_package_is_marked_as_typed():
    assert (ROOT / "opencharacter" / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]
