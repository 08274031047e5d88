"""Callbacks of the Hugging Face trainer: progress for the driver, and held-out examples."""

from __future__ import annotations

import time
from typing import Any

import ray.train
import transformers

HELD_OUT_MEASUREMENTS = 10
"""How often held-out examples are measured during training."""


class HeldOutCallback(transformers.TrainerCallback):
    """Measures the held-out examples before training, a few times during it, and after it.

    Args:
        trainer: a `trainer.PackedTrainer` that has held-out examples.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.trainer.measure_held_out()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and is_measured_after(state.global_step, state.max_steps):
            self.trainer.measure_held_out()


def is_measured_after(step: int, steps: int) -> bool:
    """Return whether held-out examples are measured after a step: the last, about ten in all."""
    return step == steps or step % max(1, round(steps / HELD_OUT_MEASUREMENTS)) == 0


class ProgressCallback(transformers.TrainerCallback):
    """Reports the progress of training to the driver.

    Args:
        counters: handle of a `ProgressCounters` actor.
        packed: whether packs are processed in one forward pass.
    """

    def __init__(self, counters: Any, packed: bool):
        self.counters, self.packed = counters, packed
        self.start = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()
        step = state.global_step
        self._set(kept=step, step=step, steps=state.max_steps, seconds=0)

    def on_step_end(self, args, state, control, **kwargs):
        self._set(step=state.global_step, seconds=time.monotonic() - self.start)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self._set(loss=logs["loss"])

    def _set(self, **numbers: float) -> None:
        if ray.train.get_context().get_world_rank() == 0:
            self.counters.set.remote(packed=self.packed, **numbers)
