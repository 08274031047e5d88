"""The vLLM worker of engines on a CPU, with this package's LoRA and sampling."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

from opencharacter.engines import cpu_lora, cpu_sampling


class Worker(CPUWorker):
    """A vLLM worker that applies adapters and samples with `cpu_lora` and `cpu_sampling`."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model; vLLM asks the platform for the class that applies adapters."""
        lora = f"{cpu_lora.__name__}.{cpu_lora.GroupedLora.__name__}"
        current_platform.get_punica_wrapper = lambda: lora
        super().load_model(*args, **kwargs)
        sampler = self.model_runner.sampler
        sampler.topk_topp_sampler.forward = cpu_sampling.sample
        sampler.apply_penalties = cpu_sampling.apply_penalties
