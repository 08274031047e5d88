"""Replacing the weights of a running vLLM engine, and verifying that they were replaced.

VLLM loads another checkpoint into the tensors of a running engine, whose compiled graphs stay
valid. It does not notice all mistakes: parameters that only one of two checkpoints has are ignored,
and the engine then generates nonsense. Two checks exclude that. `check_compatible` compares the
files before anything is replaced. Afterwards `check_sums` compares the sum and the sum of squares
of all weights in the engine with those of the files, layer by layer. Sums do not depend on how vLLM
fuses, permutes or pads weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opencharacter.errors import OpenCharacterError

Sums = dict[str, tuple[float, float]]
"""Sum and sum of squares of tensors, by the name of a tensor or of a group of them."""

EXTENSION = f"{__name__}.WeightSwapping"
"""The class that vLLM adds to its workers."""
RELATIVE_TOLERANCE = 1e-9
"""Relative difference of sums in float64 that only the order of the summands causes."""
PART = 1 << 22
"""Elements of a tensor that are summed at a time, as 32 MB of float64."""
IGNORED_CONFIG = ("_name_or_path", "transformers_version")
LAYER_NUMBER = re.compile(r"\.(\d+)\.")


class WeightsDiffer(OpenCharacterError):
    """The weights of an engine cannot be replaced, or are not those of the checkpoint."""


# ----------------------------------------------------------------------------------- before a swap


def check_compatible(current: Path, new: Path) -> None:
    """Check that two checkpoints have the same architecture, parameter names, shapes and dtypes.

    Args:
        current: directory of the checkpoint that an engine was started with.
        new: directory of the checkpoint to load.

    Raises:
        WeightsDiffer: if they differ in any of these.
    """
    configs = [json.loads((folder / "config.json").read_text()) for folder in (current, new)]
    current_config, new_config = configs
    for name in sorted(current_config.keys() | new_config.keys()):
        if name not in IGNORED_CONFIG and current_config.get(name) != new_config.get(name):
            raise WeightsDiffer(f"{new} has another {name} than {current}")
    current_headers, new_headers = headers(current), headers(new)
    if not new_headers or current_headers != new_headers:
        differing = sorted(set(current_headers.items()) ^ set(new_headers.items()))
        name = differing[0][0] if differing else "safetensors"
        raise WeightsDiffer(f"{new} and {current} differ in {name}")


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each parameter of a checkpoint, from its files' headers."""
    from safetensors import safe_open

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_slice(name)
                found[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


# -------------------------------------------------------------------------------------- in a worker


class WeightSwapping:
    """Methods that vLLM adds to each of its workers, for `collective_rpc`."""

    model_runner: Any
    model_config: Any
    device: Any

    def swap_weights(self, folder: str) -> tuple[Sums, Sums]:
        """Replace the weights by those of a checkpoint.

        Args:
            folder: directory of the checkpoint, compatible with the present one.

        Returns:
            Sums of the worker's weights, by parameter, and of the checkpoint's, by group. With
            tensor parallelism, a worker has a part of each parameter.
        """
        worker: Any = self
        model, config = self.model_runner.get_model(), self.model_config
        with record_sums(model) as before_packing:
            worker.reload_weights(weights_path=folder)
        tied = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))
        stored = checkpoint_sums(Path(folder), config.dtype, self.device, tied)
        return parameter_sums(model, before_packing), stored


def tensor_sums(tensor: Any, dtype: Any = None, device: Any = None) -> tuple[float, float]:
    """Return the sum and the sum of squares of a tensor, computed in float64.

    Works on one part at a time, so that little memory is needed beside the weights.

    Args:
        tensor: the tensor.
        dtype: data type to round it to before; its own if None.
        device: device to compute on; its own if None.
    """
    total, squares = 0.0, 0.0
    for part in tensor.detach().reshape(-1).split(PART):
        doubled = part.to(device=device, dtype=dtype or part.dtype).double()
        total += doubled.sum().item()
        squares += doubled.square().sum().item()
    return total, squares


@contextmanager
def record_sums(model: Any) -> Iterator[Sums]:
    """Record the sums of weights that vLLM converts after loading them.

    On a CPU, vLLM packs the weights of linear layers for its kernels and deletes the originals.
    """
    recorded: Sums = {}
    replaced = []
    for name, layer in model.named_modules():
        method: Any = getattr(layer, "quant_method", None)
        process = getattr(method, "process_weights_after_loading", None)
        if process is None or "process_weights_after_loading" in vars(method):
            continue

        def record(layer: Any, *, prefix: str = name, process: Any = process) -> None:
            for name, parameter in layer.named_parameters(recurse=False):
                recorded[f"{prefix}.{name}"] = tensor_sums(parameter)
            process(layer)

        method.process_weights_after_loading = record
        replaced.append(method)
    try:
        yield recorded
    finally:
        for method in replaced:
            del method.process_weights_after_loading


def parameter_sums(model: Any, before_packing: Sums) -> Sums:
    """Return the sums of a model's parameters, by name.

    Args:
        model: the model of a worker.
        before_packing: sums of the parameters that vLLM has packed, which are empty in the model.
    """
    sums = {}
    for name, parameter in model.named_parameters():
        packed = parameter.numel() == 0 and name in before_packing
        sums[name] = before_packing[name] if packed else tensor_sums(parameter)
    return sums


def checkpoint_sums(folder: Path, dtype: Any, device: Any, tied: bool) -> Sums:
    """Return the sums of a checkpoint's tensors, by group.

    Args:
        folder: directory of the checkpoint.
        dtype: data type of the engine, to which the tensors are rounded.
        device: device to compute on.
        tied: whether the head shares the weights of the embeddings, so that its own are ignored.
    """
    from safetensors import safe_open

    sums: Sums = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if not (tied and name.endswith("lm_head.weight")):
                    add_to_group(sums, name, tensor_sums(file.get_tensor(name), dtype, device))
    return sums


# ------------------------------------------------------------------------------------ after a swap


def add_to_group(sums: Sums, name: str, values: tuple[float, float]) -> None:
    """Add the sums of a parameter to those of its layer, or of all parameters outside of layers."""
    number = LAYER_NUMBER.search(name)
    group = number[1] if number else ""
    total, squares = sums.get(group, (0.0, 0.0))
    sums[group] = (total + values[0], squares + values[1])


def check_sums(workers: Sequence[tuple[Sums, Sums]]) -> None:
    """Check that the workers of an engine have the weights of the checkpoint.

    A parameter that all workers have in full, such as a norm, has equal sums in all of them and
    counts once. The parts of the others are added.

    Args:
        workers: the results of `WeightSwapping.swap_weights`.

    Raises:
        WeightsDiffer: if any sum differs.
    """
    loaded: Sums = {}
    for name in workers[0][0]:
        parts = [tuple(by_name[name]) for by_name, _ in workers]
        copies = 1 if len(set(parts)) == 1 else len(parts)
        total, squares = (copies / len(parts) * sum(v) for v in zip(*parts, strict=True))
        add_to_group(loaded, name, (total, squares))
    stored = workers[0][1]
    if loaded.keys() != stored.keys():
        raise WeightsDiffer("the engine and the checkpoint have different layers")
    for group, expected in stored.items():
        for value, other in zip(loaded[group], expected, strict=True):
            # Positive and negative weights cancel in the sum, whose error grows with their size.
            scale = max(abs(value), abs(other), math.sqrt(expected[1]))
            if not abs(value - other) <= RELATIVE_TOLERANCE * scale:
                raise WeightsDiffer(
                    f"weights of the engine {describe_group(group)} have the sums "
                    f"{tuple(loaded[group])}, those of the checkpoint have {tuple(expected)}"
                )


def describe_group(group: str) -> str:
    """Describe a group of parameters for an error message."""
    return f"in layer {group}" if group else "outside of its layers"
