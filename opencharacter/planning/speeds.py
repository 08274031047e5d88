"""The speeds of engines and training workers: loaded from a file, or measured by finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveFloat

from opencharacter.config.base import Config
from opencharacter.config.documents import read_document, validate
from opencharacter.errors import UserError
from opencharacter.runtime.store import MANIFEST, Store

ROLES = ("teacher", "student", "judge", "prompt_generator")


class Speeds(Config):
    """Speeds on the hardware of the placement, with the recipe's models."""

    teacher: PositiveFloat
    """Generated tokens per second of one replica."""
    student: PositiveFloat
    """Generated tokens per second of one replica."""
    judge: PositiveFloat
    """Generated tokens per second of one replica."""
    prompt_generator: PositiveFloat
    """Generated tokens per second of one replica."""
    training: PositiveFloat
    """Trained tokens per second of one worker."""
    reading: PositiveFloat
    """Tokens per second for which one worker computes log-probabilities."""
    stages: dict[str, PositiveFloat] = Field(default={})
    """Generated tokens per second of one replica, for stages that differ from their role."""
    engine_start: NonNegativeFloat
    """Seconds until an engine answers."""
    weight_swap: NonNegativeFloat = 10
    """Seconds that it takes to replace the weights of a running engine, with merging an adapter."""
    pass_start: NonNegativeFloat
    """Seconds that each phase of generation takes in addition to its tokens."""
    training_start: NonNegativeFloat
    """Seconds that training, or reading the reference, takes in addition to its tokens."""
    other: NonNegativeFloat
    """Seconds of a job that runs no model."""


def load_speeds(source: str) -> Speeds:
    """Load speeds from a YAML file, a result of benchmarks/personas.py, or a storage with runs.

    Args:
        source: path of the file, or path or URL of the storage.

    Raises:
        UserError: if a field is missing or invalid, or the storage holds too little to measure.
    """
    path = Path(source)
    if not path.is_file():
        return measure_speeds(source)
    document = read_document("speeds", path)
    if figures := document.data.get("figures"):
        medians = {k: v["median"] for k, v in figures.items() if k in Speeds.model_fields}
        document = replace(document, data=medians)
    return validate(Speeds, document)


def measure_speeds(storage: str) -> Speeds:
    """Compute speeds from the manifests in a storage.

    A role that has generated nothing is assumed to be as fast as the student.

    Raises:
        UserError: if no student has generated, or none has been trained.
    """
    store = Store.at(storage)
    manifests = [store.manifest(dataset) or {} for dataset in finished_datasets(store)]
    generated = [m for m in manifests if m["tokens_out"] and m["busy_seconds"]]
    by_role = group_by(generated, "writer")
    trained = [m for m in manifests if "tokens_per_s" in m["figures"]]
    read = [m for m in manifests if "tokens_read" in m["figures"] and m["busy_seconds"]]
    if "student" not in by_role or not trained or not read:
        raise UserError(
            f"--speed {storage}: neither a file nor a storage in which a student has generated and "
            "been trained; run the recipe once, or with --smoke, or write the file"
        )
    speeds = {role: generation_speed(group, role) for role, group in by_role.items()}
    started = [m for m in manifests if m["engines_started"]]
    swapped = [m for m in manifests if m.get("engines_swapped")]
    weight_swap = sum(m["swap_seconds"] for m in swapped) / max(
        1, sum(len(m["engines_swapped"]) for m in swapped)
    )
    return Speeds(
        **{role: speeds.get(role, speeds["student"]) for role in ROLES},
        training=median(m["figures"]["tokens_per_s"] / worker_count(m) for m in trained),
        reading=sum(m["figures"]["tokens_read"] for m in read)
        / sum(m["work_seconds"] * worker_count(m) for m in read),
        stages={
            stage: generation_speed(group, group[0]["writer"])
            for stage, group in group_by(generated, "stage").items()
        },
        engine_start=sum(m.get("engine_start_seconds", m["starting_seconds"]) for m in started)
        / max(1, sum(len(m["engines_started"]) for m in started)),
        **({"weight_swap": weight_swap} if swapped else {}),
        pass_start=median(map(overhead_seconds, generated)),
        training_start=median(map(overhead_seconds, [*trained, *read])),
        other=mean([m["seconds"] for m in manifests if not m["held_seconds"]] or [0.0]),
    )


def finished_datasets(store: Store, folder: str = "") -> Iterator[str]:
    """Yield the paths of all finished datasets below a folder."""
    for name in store.folders(folder):
        path = f"{folder}/{name}".lstrip("/")
        if store.exists(path, MANIFEST):
            yield path
        else:
            yield from finished_datasets(store, path)


def group_by(manifests: Iterable[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """Group manifests by the value of a key."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for manifest in manifests:
        groups.setdefault(manifest[key], []).append(manifest)
    return groups


def generation_speed(manifests: Sequence[dict[str, Any]], role: str) -> float:
    """Return the generated tokens per second of one replica that serves a single job."""
    replica_seconds = sum(
        m["work_seconds"] * m["engine_share"] * m["placement"]["pools"][role]["replicas"]
        for m in manifests
    )
    return sum(m["tokens_out"] for m in manifests) / replica_seconds


def worker_count(manifest: dict[str, Any]) -> int:
    """Return the number of training workers that the placement of a manifest has."""
    return manifest["placement"]["training"]["workers"]


def overhead_seconds(manifest: dict[str, Any]) -> float:
    """Return the seconds per phase that were neither work nor the start or swap of engines."""
    seconds = manifest["seconds"] - manifest["starting_seconds"] - manifest["work_seconds"]
    seconds -= manifest.get("swap_seconds", 0)
    return max(0.0, seconds) / max(1, manifest["phases"])
