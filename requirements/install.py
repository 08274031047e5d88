"""Install the lock file and this package into the environment of the Python that runs this script.

The default build of torch for Linux needs CUDA libraries, which the lock leaves out. If pip would
install that build, uv installs the CPU build, because uv knows where PyTorch publishes it. If pip
is configured with a source of the CPU build, pip installs it.

    python requirements/install.py      (in a virtual environment; `make` does this)
"""

import ctypes
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "cpu.txt"
VERSIONS = ((3, 11), (3, 13))
"""The oldest and the newest Python for which every pin of the lock can be installed."""
CONTAINER = "use the container instead: docker/README.md"

Run = Callable[[Sequence[str]], str]


def check_platform(system: str, machine: str, version: tuple[int, int]) -> None:
    """Exit with one line if the lock cannot be installed on this platform.

    Args:
        system: name of the operating system, as `platform.system()` returns it.
        machine: processor architecture, as `platform.machine()` returns it.
        version: major and minor version of Python.
    """
    if system != "Linux" or machine != "x86_64":
        sys.exit(
            f"vLLM's CPU build is for Linux on x86_64, but this is {system} on {machine}; "
            + CONTAINER
        )
    if not VERSIONS[0] <= version <= VERSIONS[1]:
        oldest, newest, present = (".".join(map(str, v)) for v in (*VERSIONS, version))
        sys.exit(
            f"the lock is for Python {oldest} to {newest}, but this is {present}; name another "
            f"one with make PYTHON=python{oldest}, or {CONTAINER}"
        )


def check_libraries(load: Callable[[str], object] = ctypes.CDLL) -> None:
    """Exit with one line if a library of the system that vLLM's CPU build loads is missing.

    Args:
        load: loads a shared library by name and raises OSError if there is none.
    """
    try:
        load("libnuma.so.1")
    except OSError:
        sys.exit("vLLM needs the library libnuma.so.1; install it: apt-get install libnuma1")


def run(command: Sequence[str]) -> str:
    """Run a command and return its standard output; exit with its status if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def split_lock(text: str) -> tuple[str, str]:
    """Split the lock into the pin of torch and all other lines."""
    lines = text.splitlines(keepends=True)
    (torch,) = (line for line in lines if line.startswith("torch=="))
    return torch.strip(), "".join(line for line in lines if line.strip() != torch.strip())


def needs_cuda(report: str) -> bool:
    """Whether the build of torch in pip's installation report depends on CUDA libraries."""
    (torch,) = json.loads(report)["install"]
    required = torch["metadata"].get("requires_dist", [])
    return any(name.startswith(("nvidia-", "cuda-", "triton")) for name in required)


def install(python: str, uv: str, lock: str, work: Path, run: Run = run) -> None:
    """Install all pins of the lock, torch as the build without CUDA, and then this package.

    Args:
        python: path of the environment's interpreter.
        uv: path at which the lock's own pin of uv will be installed.
        lock: text of the lock file.
        work: existing folder for a temporary file.
        run: runs a command and returns its output.
    """
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    torch, others = split_lock(lock)
    (work / "others.txt").write_text(others)
    run([*pip, "--no-deps", "-r", str(work / "others.txt")])
    report = run([*pip, "--no-deps", "--dry-run", "--ignore-installed", "--report", "-", torch])
    if needs_cuda(report):
        run(
            [
                uv,
                "pip",
                "install",
                "--quiet",
                "--python",
                python,
                "--no-deps",
                "--torch-backend=cpu",
                torch,
            ]
        )
    else:
        run([*pip, "--no-deps", torch])
    run([*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    run([python, "-c", "import torch"])


if __name__ == "__main__":
    check_platform(platform.system(), platform.machine(), sys.version_info[:2])
    check_libraries()
    print("installing into .venv: about 3 minutes and 4 GB the first time", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        uv = Path(sys.executable).parent / "uv"
        install(sys.executable, str(uv), LOCK.read_text(), Path(folder))
