"""Print the log-probabilities that vLLM on the CPU gives to the tokens of sequences, as JSON.

Run: python tests/log_probs.py MODEL SEQUENCES.json RESULT.json [ADAPTER]
The sequences are lists of token ids; the first token of each has no log-probability.
"""

import json
import os
import sys
from pathlib import Path


def main(model: str, sequences: str, result: str, adapter: str | None = None) -> None:
    from opencharacter import lora
    from opencharacter.engines.backends import CPU_ENVIRONMENT

    os.environ.update(CPU_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    arguments = {}
    if adapter:
        arguments = {"enable_lora": True, "max_lora_rank": lora.engine_rank(Path(adapter))}
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=512,
        max_num_batched_tokens=4096,
        block_size=32,
        enforce_eager=True,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        **arguments,
    )
    ids = json.loads(Path(sequences).read_text())
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=sequence) for sequence in ids],
        SamplingParams(max_tokens=1, prompt_logprobs=0),
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
    )
    log_probs = []
    for sequence, output in zip(ids, outputs, strict=True):
        positions = zip(sequence[1:], output.prompt_logprobs[1:], strict=True)
        log_probs.append([position[token].logprob for token, position in positions])
    Path(result).write_text(json.dumps(log_probs))


if __name__ == "__main__":
    main(*sys.argv[1:])
