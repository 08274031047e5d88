"""Continue prompts greedily with vLLM on the CPU; write the tokens and their log-probabilities.

Run: python tests/log_probs.py MODEL PROMPTS.json RESULT.json [ADAPTER]
The prompts are lists of token ids. The result is a list of pairs: tokens and log-probabilities.
"""

import json
import os
import sys
from pathlib import Path

MAX_TOKENS = 24


def main(model: str, prompts: str, result: str, adapter: str | None = None) -> None:
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
        **arguments,
    )
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(Path(prompts).read_text())],
        SamplingParams(max_tokens=MAX_TOKENS, temperature=0, logprobs=0),
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
    )
    replies = []
    for output in outputs:
        tokens, log_probs = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        positions = zip(tokens, log_probs, strict=True)
        replies.append([tokens, [position[token].logprob for token, position in positions]])
    Path(result).write_text(json.dumps(replies))


if __name__ == "__main__":
    main(*sys.argv[1:])
