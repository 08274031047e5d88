"""`make` installs the build of torch that works, and says what it cannot install on."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
assert spec and spec.loader
installer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(installer)

CUDA_BUILD = ["filelock", 'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"', "jinja2"]
CPU_BUILD = ["filelock", "jinja2"]
LOCK = "filelock==3.20\ntorch==2.13.0\ntransformers==5.23.0\n"


class FakePip:
    """Records the commands, and reports a build of torch with these requirements."""

    def __init__(self, requires_dist):
        report = {"install": [{"metadata": {"name": "torch", "requires_dist": requires_dist}}]}
        self.report = json.dumps(report)
        self.commands = []

    def __call__(self, command):
        self.commands.append(list(command))
        return self.report if "--report" in command else ""

    def installs_of_torch(self):
        return [
            Path(command[0]).name
            for command in self.commands
            if command[-1] == "torch==2.13.0" and "--dry-run" not in command
        ]


@pytest.mark.parametrize(
    ("requires_dist", "tool"), [(CUDA_BUILD, "uv"), (CPU_BUILD, "python")], ids=["cuda", "cpu"]
)
def test_uv_installs_torch_only_if_pip_would_install_the_cuda_build(tmp_path, requires_dist, tool):
    pip = FakePip(requires_dist)
    installer.install("/venv/bin/python", "/venv/bin/uv", LOCK, tmp_path, pip)
    assert pip.installs_of_torch() == [tool]
    assert (tmp_path / "others.txt").read_text() == "filelock==3.20\ntransformers==5.23.0\n"
    uses_uv = [command for command in pip.commands if command[0].endswith("uv")]
    assert all("--torch-backend=cpu" in command for command in uses_uv)
    assert pip.commands[-1] == ["/venv/bin/python", "-c", "import torch"]


def test_the_lock_pins_torch_and_uv_once():
    torch, others = installer.split_lock(installer.LOCK.read_text())
    assert torch == "torch==2.13.0"
    assert sum(line.startswith("uv==") for line in others.splitlines()) == 1
    assert "\ntorch==" not in others


def test_a_command_that_fails_ends_the_installation_with_its_status():
    with pytest.raises(SystemExit) as stopped:
        installer.run([sys.executable, "-c", "raise SystemExit(7)"])
    assert stopped.value.code == 7


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_supported_platforms_are_accepted(version):
    installer.check_platform("Linux", "x86_64", version)


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        (("Darwin", "arm64", (3, 12)), "this is Darwin on arm64; use the container instead"),
        (("Windows", "AMD64", (3, 12)), "this is Windows on AMD64; use the container instead"),
        (("Linux", "x86_64", (3, 10)), "the lock is for Python 3.11 to 3.13, but this is 3.10"),
        (("Linux", "x86_64", (3, 14)), "make PYTHON=python3.11"),
    ],
)
def test_other_platforms_are_refused_with_a_remedy(platform, expected):
    with pytest.raises(SystemExit, match=expected):
        installer.check_platform(*platform)


def test_a_missing_library_of_the_system_is_named_with_its_package():
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(SystemExit, match="apt-get install libnuma1"):
        installer.check_libraries(load)
    installer.check_libraries(lambda name: None)
