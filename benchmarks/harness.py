"""What the benchmarks share: processes that end, a model without weights, figures, the result file.

A benchmark does the same work in several *ways*. Each way runs in a process of its own, which the
script starts by calling itself, so that nothing of one way (engine, Ray, device memory) is left
when the next one starts. A way yields *runs*, from settings: one mapping a repeat, with at least
`series` (what it is a repeat of), `seconds` and `tokens`.

What a way yielded is kept in `<out>/<name>-parts/`, also when it did not finish. `--ways A B` runs
these anew and takes the others from there, if they were made with the same settings: so a benchmark
can be run in pieces, and pieces can run at once on devices of their own (CUDA_VISIBLE_DEVICES).

Run: python benchmarks/harness.py FILE   writes this machine's device and its memory's bandwidth
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

FOLDER = Path(__file__).resolve().parent
# A script's own folder is on its path, the repository's root is not.
sys.path.insert(0, str(FOLDER.parent))

Settings = dict[str, Any]
Run = dict[str, Any]
Series = dict[str, list[Run]]
"""Runs by what they are repeats of."""
Machine = dict[str, Any]
"""`device` and `bytes_per_s`, the memory's bandwidth."""
Figure = dict[str, float]
Figures = dict[str, Figure]

SUBJECT = "opencharacter"
"""The way that the others are compared with, and its first series."""

LOG_TAIL = 3000
"""Characters of a failed process's log that are told."""


# ------------------------------------------------------------------------------------ a benchmark


@dataclass(frozen=True)
class Benchmark:
    """A script.

    Args:
        name: of its result file.
        script: its path.
        settings: on a GPU; every whole number at the top of them is also an option, and what is
            under `environment` is set in the ways' processes.
        tiny: what differs on a CPU, where only that it works is of interest.
        ways: from settings to runs.
        figures: from runs, settings and machine to figures.
        extra: ways that run only when `--ways` names them.
        variants: settings that differ in a line of the sweep, which runs the first way.
    """

    name: str
    script: Path
    settings: Settings
    tiny: Settings
    ways: dict[str, Callable[[Settings], Iterator[Run]]]
    figures: Callable[[Series, Settings, Machine], Figures]
    extra: tuple[str, ...] = ()
    variants: dict[str, Settings] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A process to run: a way under settings."""

    label: str
    way: str
    settings: Settings


def main(benchmark: Benchmark, description: str) -> None:
    """The command line of a benchmark, and of the processes that it starts."""
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
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU")
    usual = [way for way in benchmark.ways if way not in benchmark.extra]
    parser.add_argument("--ways", nargs="+", choices=[*benchmark.ways], default=usual)
    parser.add_argument("--sweep", nargs="*", choices=[*benchmark.variants], metavar="VARIANT")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a way may take")
    for name, value in benchmark.settings.items():
        if type(value) is int:
            parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    return parser.parse_args()


def chosen_settings(benchmark: Benchmark, options: argparse.Namespace) -> Settings:
    """The settings of a command line, as JSON gives them back."""
    settings = benchmark.settings | (benchmark.tiny if options.tiny else {})
    given = {k: v for k, v in vars(options).items() if k in settings and v is not None}
    return json.loads(json.dumps(settings | given))


def measure(
    benchmark: Benchmark, options: argparse.Namespace, settings: Settings
) -> dict[str, str]:
    """Run the ways that are wanted and write `<out>/<name>.json`; returns errors by way."""
    tasks = [Task(way, way, settings) for way in benchmark.ways]

    def figures(done: dict[str, list[Run]], machine: Machine) -> Figures:
        return benchmark.figures(by_series(done.values()), settings, machine)

    return run_tasks(benchmark, benchmark.name, tasks, options.ways, options, settings, figures)


def sweep(benchmark: Benchmark, options: argparse.Namespace, settings: Settings) -> dict[str, str]:
    """Run the variants that are wanted, one repeat each; write `<out>/<name>-sweep.json`."""
    tasks = variant_tasks(benchmark, settings)

    def figures(done: dict[str, list[Run]], machine: Machine) -> Figures:
        return {
            f"{label}_{name}": value
            for label, runs in done.items()
            for name, value in benchmark.figures(
                by_series([runs]), tasks[label].settings, machine
            ).items()
        }

    name, wanted = f"{benchmark.name}-sweep", options.sweep or list(tasks)
    return run_tasks(benchmark, name, [*tasks.values()], wanted, options, settings, figures)


def variant_tasks(benchmark: Benchmark, settings: Settings) -> dict[str, Task]:
    """The sweep's tasks by label."""
    way, plain = next(iter(benchmark.ways)), {SUBJECT: {}}
    once = settings | {"repeats": 1, "series": plain}
    return {
        name: Task(name, way, merged(once, variant)) for name, variant in benchmark.variants.items()
    }


def merged(settings: Settings, changes: Settings) -> Settings:
    """Settings with changes; a mapping's entries are changed one by one."""
    return settings | {
        name: merged(settings.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }


def run_tasks(
    benchmark: Benchmark,
    name: str,
    tasks: list[Task],
    wanted: list[str],
    options: argparse.Namespace,
    settings: Settings,
    figures: Callable[[dict[str, list[Run]], Machine], Figures],
) -> dict[str, str]:
    """Run the wanted tasks one after another; after each write what is known so far.

    Returns:
        The errors of those that failed, by label.
    """
    folder = options.out / f"{name}-parts"
    folder.mkdir(parents=True, exist_ok=True)
    machine = measure_machine(folder, options.limit)
    errors: dict[str, str] = {}
    for task in (t for t in tasks if t.label in wanted):
        try:
            start_task(benchmark, task, folder, options.limit)
        except (ProcessFailed, TimeoutError) as error:
            errors[task.label] = str(error)
        done = {t.label: runs for t in tasks if (runs := kept_runs(folder, t))}
        write_result(options.out, name, machine, settings, figures(done, machine), errors)
    return errors


def start_task(benchmark: Benchmark, task: Task, folder: Path, seconds: float) -> None:
    """Run a task in a process of its own; its runs are in `folder` afterwards."""
    file = folder / f"{task.label}.json"
    file.write_text(json.dumps({"way": task.way, "settings": task.settings}))
    command = [sys.executable, str(benchmark.script), "--task", str(file)]
    began = time.monotonic()
    wait_for_device()
    run(command, file.with_suffix(".log"), seconds)
    print(f"{task.label}: {time.monotonic() - began:.0f} s in all", flush=True)


def do_task(benchmark: Benchmark, file: Path) -> None:
    """Do a task in this process."""
    task = json.loads(file.read_text())
    os.environ.update(task["settings"].get("environment", {}))
    runs = []
    for each in benchmark.ways[task["way"]](task["settings"]):
        runs.append(each)
        file.write_text(json.dumps({**task, "runs": runs}, indent=1))


def kept_runs(folder: Path, task: Task) -> list[Run] | None:
    """Runs of a task that were made with the same settings, or None."""
    file = folder / f"{task.label}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    return kept.get("runs") if kept.get("settings") == task.settings else None


def by_series(found: Any) -> Series:
    """Group runs by what they are repeats of."""
    series: Series = {}
    for runs in found:
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
    """Of Python and of the packages that matter."""
    from opencharacter.runtime.manifests import package_versions

    return {"python": platform.python_version(), **package_versions()}


# ---------------------------------------------------------------------------------------- figures


def figure(values: list[float]) -> Figure:
    """Median, least and greatest of the repeats."""
    return summary(statistics.median(values), min(values), max(values), len(values))


def ratio(values: list[float], others: list[float]) -> Figure:
    """Ratio of the medians; its least and greatest are those of any two repeats."""
    return summary(
        statistics.median(values) / statistics.median(others),
        min(values) / max(others),
        max(values) / min(others),
        min(len(values), len(others)),
    )


def summary(median: float, least: float, greatest: float, repeats: int) -> Figure:
    """A figure, to five significant digits."""
    spread = {"median": median, "min": least, "max": greatest}
    return {**{name: float(f"{value:.5g}") for name, value in spread.items()}, "repeats": repeats}


def speeds(runs: list[Run]) -> list[float]:
    """Tokens per second of each repeat."""
    return [each["tokens"] / each["seconds"] for each in runs]


def ratios(series: Series, wanted: dict[str, tuple[str, str]]) -> Figures:
    """Ratios of speed, by their names: of the first series to the second, where both are there."""
    return {
        name: ratio(speeds(series[one]), speeds(series[other]))
        for name, (one, other) in wanted.items()
        if one in series and other in series
    }


# -------------------------------------------------------------------------------------- processes


class ProcessFailed(Exception):
    """A process failed or took too long; says so with the end of its log."""


def run(command: list[str], log: Path, seconds: float) -> None:
    """Run a command in a session of its own, and leave nothing of that session behind.

    Ray gives its processes groups of their own, so ending the command's group would not be
    enough; but they stay in its session. A Ray that the command starts has a folder of its own,
    and so neither joins nor is joined by another one of this machine.

    Args:
        command: what to run.
        log: file for its output.
        seconds: time after which it is ended.

    Raises:
        ProcessFailed: if it failed or took longer.
    """
    with (
        log.open("wb") as output,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own,
    ):
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **child_environment(), "RAY_TMPDIR": own},
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
    """What every process finds, Ray's workers too: folders to import from, and no network."""
    paths = [str(FOLDER.parent), str(FOLDER), os.environ.get("PYTHONPATH")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }


def end_session(session: int, seconds: float = 30) -> None:
    """End every process of a session, by its id, and wait until they are gone."""
    until = time.monotonic() + seconds
    while (left := members(session)) and time.monotonic() < until:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def apart(work: Callable[[], None]) -> None:
    """Do some work in a process of its own, so that its memory is not this process's."""
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise ProcessFailed(f"exit code {process.exitcode}")


def members(session: int) -> list[psutil.Process]:
    """The processes of a session, less those that only wait to be forgotten."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for_device(seconds: float = 60) -> None:
    """Return when the GPU's memory is free, a moment after its last process ended.

    Raises:
        TimeoutError: if something holds it.
    """
    until = time.monotonic() + seconds
    while (used := device_memory_used()) > 2048:
        if time.monotonic() > until:
            raise TimeoutError(f"{used} MiB of the GPU's memory are in use by something else")
        time.sleep(0.5)


def device_memory_used() -> int:
    """MiB in use on the fullest visible GPU, 0 without one. Torch itself would use some."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        return 0
    return max(map(int, found.stdout.split()))


# ---------------------------------------------------------------------------------------- machine


def measure_machine(folder: Path, seconds: float) -> Machine:
    """The device and its bandwidth, measured in a process that ends and so frees the device."""
    file = folder / "machine.json"
    command = [sys.executable, str(FOLDER / "harness.py"), str(file)]
    wait_for_device()
    run(command, file.with_suffix(".log"), seconds)
    return json.loads(file.read_text())


def machine() -> Machine:
    """This machine."""
    import torch

    if torch.cuda.is_available():
        name, speed = torch.cuda.get_device_name(0), copy_speed("cuda", 2**32)
    else:
        name, speed = f"{processor()}, {os.cpu_count()} cores", copy_speed("cpu", 2**28)
    return {"device": name, "bytes_per_s": float(f"{speed:.4g}")}


def processor() -> str:
    """What the CPU calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def copy_speed(device: str, size: int) -> float:
    """Bytes read and written per second by the fastest of ten copies of `size` bytes."""
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

OPEN, CLOSE, END = "<|open|>", "<|close|>", "<|end|>"
UNKNOWN = "<|unknown|>"
RESERVED = (UNKNOWN, OPEN, CLOSE, END, "system", "user", "assistant")
"""First entries of the vocabulary; the others are the words w0, w1, ..."""

TEMPLATE = (
    "{% for message in messages %}"
    f"{OPEN} {{{{ message['role'] }}}} {CLOSE}\n{{{{ message['content'] }}}} {END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{OPEN} assistant {CLOSE}\n{{% endif %}}"
)
OVERHEAD = 4
"""Tokens of a message beside its content."""


def model_folder(shape: dict[str, Any]) -> Path:
    """A folder with a Llama's configuration and a tokenizer, but no weights.

    It is in the user's cache, made once per shape, so that vLLM finds what it compiled for it.
    No end token is declared: an answer of random weights then has exactly the length asked for.
    """
    from transformers import LlamaConfig

    from opencharacter.models import atomic_directory, cache_dir
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
    """A fast tokenizer with a chat template: each word between spaces is a token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = [*RESERVED, *(f"w{n}" for n in range(size - len(RESERVED)))]
    tokenizer = Tokenizer(WordLevel({n: i for i, n in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([UNKNOWN, OPEN, CLOSE, END])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN)
    made.chat_template = TEMPLATE
    return made


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(machine()))
