"""Shared code of the benchmarks: isolated processes, a model without weights, figures, results.

A benchmark does the same work in several *ways*. Each way runs in a process of its own, which the
script starts by calling itself, so that no engine, Ray cluster or device memory of one way remains
when the next one starts. A way is a generator that takes settings and yields one *run* per repeat:
a mapping with at least `series` (the group of repeats that it belongs to), `seconds` and `tokens`.

The runs of a way are stored in `<out>/<name>-parts/`, even if the way did not finish. `--ways A B`
runs only these ways and takes the others from there if they were measured with the same settings.
So a benchmark can be run piece by piece, and pieces can run concurrently on different devices
(CUDA_VISIBLE_DEVICES).

Run: python benchmarks/harness.py FILE   measures this machine: device and memory bandwidth
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from opencharacter.config.placement import Placement

FOLDER = Path(__file__).resolve().parent
# A script's own folder is on its path, the repository's root is not.
sys.path.insert(0, str(FOLDER.parent))

Settings = dict[str, Any]
Run = dict[str, Any]
Series = dict[str, list[Run]]
"""Runs by series."""
Machine = dict[str, Any]
"""`device` and `bytes_per_s`, the memory bandwidth."""
Figure = dict[str, float]
Figures = dict[str, Figure]

SUBJECT = "opencharacter"
"""The way that is compared with all others, and the name of its first series."""

SPREAD = 0.6
"""Standard deviation of the logarithm of drawn lengths."""
LOG_TAIL = 3000
"""Characters at the end of a failed process's log that its error quotes."""


# ------------------------------------------------------------------------------------ a benchmark


@dataclass(frozen=True)
class Benchmark:
    """A benchmark script.

    Args:
        name: name of the result file.
        script: path of the script.
        settings: settings on a GPU. Every top-level integer is also a command-line option, and
            `environment` holds variables that are set in the ways' processes.
        tiny: changes to the settings for a functional test on a CPU.
        cpu: changes to the settings for a measurement on a CPU; none if there is no such.
        ways: functions from settings to runs.
        figures: function from runs, settings and machine to figures.
        extra: ways that run only if `--ways` names them.
        variants: changes to the settings for `--sweep`, which runs the first way with each.
    """

    name: str
    script: Path
    settings: Settings
    tiny: Settings
    ways: dict[str, Callable[[Settings], Iterator[Run]]]
    figures: Callable[[Series, Settings, Machine], Figures]
    extra: tuple[str, ...] = ()
    variants: dict[str, Settings] = field(default_factory=dict)
    cpu: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A way with its settings, to be run in a process of its own."""

    label: str
    way: str
    settings: Settings


def main(benchmark: Benchmark, description: str) -> None:
    """Run the command line of a benchmark, or a task in a process that it started."""
    if sys.argv[1:2] == ["--task"]:
        return do_task(benchmark, Path(sys.argv[2]))
    options = parse(benchmark, description)
    settings = chosen_settings(benchmark, options)
    if options.sweep is None:
        errors = measure(benchmark, options, settings)
    else:
        errors = sweep(benchmark, options, settings)
    sys.exit("\n".join(f"{label}: {error}" for label, error in errors.items()) or None)


def parse(benchmark: Benchmark, description: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU")
    if benchmark.cpu:
        parser.add_argument("--cpu", action="store_true", help="measure a CPU: NAME-cpu.json")
    parser.set_defaults(cpu=False)
    default_ways = [way for way in benchmark.ways if way not in benchmark.extra]
    parser.add_argument("--ways", nargs="+", choices=[*benchmark.ways], default=default_ways)
    parser.add_argument("--sweep", nargs="*", choices=[*benchmark.variants], metavar="VARIANT")
    parser.add_argument("--limit", type=float, default=600, help="time limit of a way in seconds")
    for name, value in benchmark.settings.items():
        if type(value) is int:
            parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    return parser.parse_args()


def chosen_settings(benchmark: Benchmark, options: argparse.Namespace) -> Settings:
    """Return the settings of a command line, in the types that JSON has."""
    changes = benchmark.tiny if options.tiny else benchmark.cpu if options.cpu else {}
    settings = benchmark.settings | changes
    given = {k: v for k, v in vars(options).items() if k in settings and v is not None}
    return json.loads(json.dumps(settings | given))


def measure(
    benchmark: Benchmark, options: argparse.Namespace, settings: Settings
) -> dict[str, str]:
    """Run the requested ways and write `<out>/<name>.json`; return errors by way."""
    tasks = [Task(way, way, settings) for way in benchmark.ways]

    def figures(done: dict[str, list[Run]], machine: Machine) -> Figures:
        return benchmark.figures(by_series(done.values()), settings, machine)

    name = f"{benchmark.name}-cpu" if options.cpu else benchmark.name
    return run_tasks(benchmark, name, tasks, options.ways, options, settings, figures)


def sweep(benchmark: Benchmark, options: argparse.Namespace, settings: Settings) -> dict[str, str]:
    """Run one repeat of each requested variant and write `<out>/<name>-sweep.json`."""
    tasks = variant_tasks(benchmark, settings)

    def figures(done: dict[str, list[Run]], machine: Machine) -> Figures:
        return {
            f"{label}_{name}": value
            for label, runs in done.items()
            for name, value in benchmark.figures(
                by_series([runs]), tasks[label].settings, machine
            ).items()
        }

    name, requested = f"{benchmark.name}-sweep", options.sweep or list(tasks)
    return run_tasks(benchmark, name, [*tasks.values()], requested, options, settings, figures)


def variant_tasks(benchmark: Benchmark, settings: Settings) -> dict[str, Task]:
    """Return the tasks of a sweep by label."""
    way, plain = next(iter(benchmark.ways)), {SUBJECT: {}}
    once = settings | {"repeats": 1, "series": plain}
    return {
        name: Task(name, way, merged(once, variant)) for name, variant in benchmark.variants.items()
    }


def merged(settings: Settings, changes: Settings) -> Settings:
    """Return settings with changes; nested mappings are merged."""
    return settings | {
        name: merged(settings.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }


def placement(name: str, changes: Settings) -> Placement:
    """Return a packaged placement with changes."""
    from opencharacter.config.files import load_placement
    from opencharacter.config.placement import Placement

    packaged = load_placement(name).model_dump(exclude_unset=True)
    return Placement.model_validate(merged(packaged, changes))


def run_tasks(
    benchmark: Benchmark,
    name: str,
    tasks: list[Task],
    requested: list[str],
    options: argparse.Namespace,
    settings: Settings,
    figures: Callable[[dict[str, list[Run]], Machine], Figures],
) -> dict[str, str]:
    """Run the requested tasks one after another and update the result file after each.

    Returns:
        The errors of the failed tasks, by label.
    """
    folder = options.out / f"{name}-parts"
    folder.mkdir(parents=True, exist_ok=True)
    machine = measure_machine(folder, options.limit)
    errors: dict[str, str] = {}
    for task in (t for t in tasks if t.label in requested):
        try:
            start_task(benchmark, task, folder, options.limit)
        except (ProcessFailed, TimeoutError) as error:
            errors[task.label] = str(error)
        done = {t.label: runs for t in tasks if (runs := kept_runs(folder, t))}
        write_result(options.out, name, machine, settings, figures(done, machine), errors)
    return errors


def start_task(benchmark: Benchmark, task: Task, folder: Path, seconds: float) -> None:
    """Run a task in a process of its own, which writes its runs to `folder`."""
    file = folder / f"{task.label}.json"
    file.write_text(json.dumps({"way": task.way, "settings": task.settings}))
    command = [sys.executable, str(benchmark.script), "--task", str(file)]
    began = time.monotonic()
    wait_for_device()
    run(command, file.with_suffix(".log"), seconds, task.settings.get("environment", {}))
    print(f"{task.label}: {time.monotonic() - began:.0f} s in total", flush=True)


def do_task(benchmark: Benchmark, file: Path) -> None:
    """Run a task in this process."""
    task, runs = json.loads(file.read_text()), []
    for each in benchmark.ways[task["way"]](task["settings"]):
        runs.append(each)
        file.write_text(json.dumps({**task, "runs": runs}, indent=1))


def kept_runs(folder: Path, task: Task) -> list[Run] | None:
    """Return the stored runs of a task, or None if there are none with the same settings."""
    file = folder / f"{task.label}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    return kept.get("runs") if kept.get("settings") == task.settings else None


def by_series(tasks: Any) -> Series:
    """Group the runs of all tasks by series."""
    series: Series = {}
    for runs in tasks:
        for each in runs:
            series.setdefault(each["series"], []).append(each)
    return series


def write_result(
    out: Path,
    name: str,
    machine: Machine,
    settings: Settings,
    figures: Figures,
    errors: dict[str, str],
) -> None:
    """Write `<out>/<name>.json`."""
    result = {
        "name": name,
        "device": machine["device"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "settings": settings | {"memory_bytes_per_s": machine["bytes_per_s"]},
        "figures": figures,
        **({"errors": errors} if errors else {}),
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages."""
    from opencharacter.runtime.manifests import package_versions

    return {"python": platform.python_version(), **package_versions()}


# ---------------------------------------------------------------------------------------- figures


def figure(values: list[float]) -> Figure:
    """Return the median, minimum and maximum over repeats."""
    return summary(statistics.median(values), min(values), max(values), len(values))


def ratio(values: list[float], others: list[float]) -> Figure:
    """Return the ratio of the medians, and the minimum and maximum over all pairs of repeats."""
    return summary(
        statistics.median(values) / statistics.median(others),
        min(values) / max(others),
        max(values) / min(others),
        min(len(values), len(others)),
    )


def summary(median: float, least: float, greatest: float, repeats: int) -> Figure:
    """Return a figure, rounded to five significant digits."""
    spread = {"median": median, "min": least, "max": greatest}
    return {**{name: float(f"{value:.5g}") for name, value in spread.items()}, "repeats": repeats}


def speeds(runs: list[Run]) -> list[float]:
    """Return the tokens per second of each repeat."""
    return [each["tokens"] / each["seconds"] for each in runs]


def cpu_ms_per_token(runs: list[Run]) -> list[float]:
    """Return the CPU time of each repeat per generated token, in milliseconds."""
    measured = [each for each in runs if "cpu_seconds" in each]
    return [1000 * sum(each["cpu_seconds"].values()) / each["tokens"] for each in measured]


def ratios(series: Series, pairs: dict[str, tuple[str, str]]) -> Figures:
    """Return the ratio of speeds for each pair of series that was measured, by name."""
    return {
        name: ratio(speeds(series[first]), speeds(series[second]))
        for name, (first, second) in pairs.items()
        if first in series and second in series
    }


# -------------------------------------------------------------------------------------- processes


class ProcessFailed(Exception):
    """A process failed or exceeded its time limit; the message ends with its log."""


def run(
    command: list[str], log: Path, seconds: float, environment: dict[str, str] | None = None
) -> None:
    """Run a command in a new session and kill all processes of that session at the end.

    Killing the process group would not be enough: Ray gives its processes groups of their own, but
    they stay in the session. A Ray cluster that the command starts has its own temporary folder,
    so it does not connect to other clusters on this machine.

    Args:
        command: the command and its arguments.
        log: file for its output.
        seconds: time limit.
        environment: more variables for the command.

    Raises:
        ProcessFailed: if the command failed or exceeded the time limit.
    """
    with (
        log.open("wb") as output,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as ray_folder,
    ):
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                **child_environment(),
                **(environment or {}),
                "RAY_TMPDIR": ray_folder,
            },
        )
        try:
            ended = f"exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"not finished after {seconds:g} s"
        finally:
            end_session(process.pid)
            process.wait()
    if ended != "exit code 0":
        raise ProcessFailed(f"{ended}\n{log.read_text(errors='replace')[-LOG_TAIL:]}")


def child_environment() -> dict[str, str]:
    """Return variables for all processes, including Ray's workers: import paths, and no network.

    Ray lowers the priority of its workers, so that other processes of the machine precede them. The
    bare ways have no such workers, so the comparison is fair only without that.
    """
    paths = [str(FOLDER.parent), str(FOLDER), os.environ.get("PYTHONPATH")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }


def end_session(session: int, seconds: float = 30) -> None:
    """Kill every process of a session by its id and wait until all have ended."""
    deadline = time.monotonic() + seconds
    while (processes := members(session)) and time.monotonic() < deadline:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=1)


def apart(work: Callable[[], None]) -> None:
    """Call a function in a forked process, so that its memory does not count for this one."""
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise ProcessFailed(f"exit code {process.exitcode}")


def members(session: int) -> list[psutil.Process]:
    """Return the processes of a session, without zombies."""
    processes = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


class CpuTime:
    """The CPU time that the processes of this session use while the block runs, by their title.

    Processes that end before the block are not counted.
    """

    def __enter__(self) -> CpuTime:
        self.began = {pid: seconds for pid, (_, seconds) in cpu_seconds().items()}
        return self

    def __exit__(self, *_: object) -> None:
        used: Counter[str] = Counter()
        for pid, (title, seconds) in cpu_seconds().items():
            used[title] += seconds - self.began.get(pid, 0)  # type: ignore
        self.by_process = {title: round(used[title], 2) for title in sorted(used) if used[title]}


def cpu_seconds() -> dict[int, tuple[str, float]]:
    """Return the title and the used CPU time of each process of this session, by its id."""
    times: dict[int, tuple[str, float]] = {}
    for process in members(os.getsid(0)):
        with suppress(psutil.NoSuchProcess):
            title = re.match(r"[\w:]+", Path((process.cmdline() or ["?"])[0]).name)
            each = process.cpu_times()
            times[process.pid] = (title[0] if title else "?", each.user + each.system)
    return times


def wait_for_device(seconds: float = 60) -> None:
    """Wait until the GPU's memory is free, which takes a moment after its last process ended.

    Raises:
        TimeoutError: if another process holds it for longer.
    """
    deadline = time.monotonic() + seconds
    while (used := device_memory_used()) > 2048:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{used} MiB of the GPU's memory are used by another process")
        time.sleep(0.5)


def device_memory_used() -> int:
    """Return the used memory of the fullest visible GPU in MiB, or 0 without a GPU.

    Asks nvidia-smi, because torch would allocate memory itself.
    """
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        return 0
    return max(map(int, output.stdout.split()))


# ---------------------------------------------------------------------------------------- machine


def measure_machine(folder: Path, seconds: float) -> Machine:
    """Measure the device and its bandwidth in a process that frees the device when it ends."""
    file = folder / "machine.json"
    command = [sys.executable, str(FOLDER / "harness.py"), str(file)]
    wait_for_device()
    run(command, file.with_suffix(".log"), seconds)
    return json.loads(file.read_text())


def machine() -> Machine:
    """Return the device of this machine and its measured memory bandwidth."""
    import torch

    if torch.cuda.is_available():
        name, speed = torch.cuda.get_device_name(0), copy_speed("cuda", 2**32)
    else:
        name, speed = f"{processor()}, {os.cpu_count()} cores", copy_speed("cpu", 2**28)
    return {"device": name, "bytes_per_s": float(f"{speed:.4g}")}


def processor() -> str:
    """Return the CPU's model name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def copy_speed(device: str, size: int) -> float:
    """Return the bytes read and written per second in the fastest of ten copies.

    Args:
        device: torch device.
        size: bytes per copy.
    """
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest = math.inf
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size / fastest


# ------------------------------------------------------------------------------------------ model


LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
}
"""Shape of Llama 3.1 8B."""

TINY_LLAMA = LLAMA_8B | {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}

SMOLLM_135M = LLAMA_8B | {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
}
"""Shape of SmolLM2 135M, the embedded model."""

OPEN, CLOSE, END = "<|open|>", "<|close|>", "<|end|>"
UNKNOWN = "<|unknown|>"
RESERVED = (UNKNOWN, OPEN, CLOSE, END, "system", "user", "assistant")
"""First entries of the vocabulary; the rest are the words w0, w1, ..."""

TEMPLATE = (
    "{% for message in messages %}"
    f"{OPEN} {{{{ message['role'] }}}} {CLOSE}\n{{{{ message['content'] }}}} {END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{OPEN} assistant {CLOSE}\n{{% endif %}}"
)
OVERHEAD = 4
"""Tokens of a message in addition to its content."""


def draw_length(draw: random.Random, mean: float, low: int, high: int) -> int:
    """Draw a length in tokens from a log-normal distribution and clip it.

    Args:
        draw: source of randomness.
        mean: of the distribution, before clipping.
        low: smallest length.
        high: greatest length.
    """
    drawn = draw.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD)
    return min(max(round(drawn), low), high)


def model_folder(shape: dict[str, Any]) -> Path:
    """Return a folder with a Llama configuration and a tokenizer, but no weights.

    It is created in the user's cache once per shape, so that vLLM's compilation cache applies. It
    declares no end-of-sequence token, so every answer has exactly the requested length.
    """
    from transformers import LlamaConfig

    from opencharacter.cache import atomic_directory, cache_dir
    from opencharacter.runtime.store import fingerprint

    kind = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    rest = {name: value for name, value in shape.items() if name != "rope_theta"}
    target = cache_dir() / "benchmarks" / fingerprint({"shape": shape, "template": TEMPLATE})
    if not target.is_dir():
        with atomic_directory(target) as scratch:
            LlamaConfig(
                **rest,
                rope_parameters=kind,
                architectures=["LlamaForCausalLM"],
                dtype="bfloat16",
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            ).save_pretrained(scratch)
            make_tokenizer(shape["vocab_size"]).save_pretrained(scratch)
    return target


def make_tokenizer(size: int) -> Any:
    """Return a fast tokenizer with a chat template, in which each word is one token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = [*RESERVED, *(f"w{n}" for n in range(size - len(RESERVED)))]
    tokenizer = Tokenizer(WordLevel({n: i for i, n in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([UNKNOWN, OPEN, CLOSE, END])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN)
    fast.chat_template = TEMPLATE
    return fast


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(machine()))
