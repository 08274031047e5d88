"""What version 0.2.0 renamed in recipes and placements; CHANGELOG.md lists the same names.

Old names are rejected with the new name, never accepted silently. A pattern is matched against the
dotted path of version 0.1; `*` matches one part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

FIELDS = {
    "recipe": {
        "roles.expander": "prompt_generator",
        "roles.*.called": "self_name",
        "roles.*.context": "max_model_len",
        "evaluation.judge.panel.*.called": "self_name",
        "evaluation.judge.panel.*.context": "max_model_len",
        "*.*.limits.after": "min_texts",
        "*.*.optimizer.batch": "global_batch_size",
        "*.*.optimizer.clip": "max_grad_norm",
        "*.*.optimizer.warmup": "warmup_ratio",
        "*.*.optimizer.final_ratio": "min_lr_ratio",
        "distillation.dpo.nll": "nll_weight",
        "distillation.dpo.kl": "sq_log_ratio_weight",
        "evaluation.judge.items": "gold_items",
        "evaluation.judge.thought": "thinking_budget",
        "evaluation.rating.wanted": "target_half_width",
        "evaluation.robustness.encoder.warmup": "warmup_ratio",
        "evaluation.robustness.encoder.batch": "batch_size",
    },
    "placement": {
        "pools.expander": "prompt_generator",
        "pools.*.max_sequences": "max_num_seqs",
        "pools.*.memory_fraction": "gpu_memory_utilization",
        "pools.*.restarts": "max_restarts",
        "pools.*.engine": "engine_kwargs",
        "training.parallel": "strategy",
        "training.tokens_per_pass": "max_tokens_per_microbatch",
        "training.recompute": "activation_checkpointing",
        "training.retries": "max_failures",
        "serving.requests_per_key": "max_requests_per_key",
        "serving.queue": "max_queued_requests",
        "serving.adapters": "max_adapters",
        "serving.adapters_at_once": "max_loras",
        "serving.messages_per_second": "max_chunks_per_second",
        "serving.entrances": "ingress_replicas",
        "grows": "autoscaling",
        "jobs_at_once": "max_concurrent_jobs",
        "storage_patience": "storage_retry_seconds",
    },
    "speeds": {"expander": "prompt_generator"},
}
"""For each kind of file: the old path of a field, and its new name at the same place."""

VALUES = {"placement": {"pools.*.adapters": {"folded": "merged"}}}
"""For each kind of file: the path of a field, and its old and new values."""


def renamed(kind: str, path: str, value: Any) -> Iterator[str]:
    """Yield what must be renamed at a field: its name, its value, or nothing.

    Args:
        kind: the kind of the file.
        path: the field's dotted path.
        value: the field's value.
    """
    for pattern, name in FIELDS.get(kind, {}).items():
        if _matches(path, pattern):
            yield f"`{path.rpartition('.')[2]}` is now `{name}`"
    for pattern, values in VALUES.get(kind, {}).items():
        if _matches(path, pattern) and isinstance(value, str) and value in values:
            yield f"{path}: `{value}` is now `{values[value]}`"


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
