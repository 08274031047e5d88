"""Do judges decide better by log-probabilities than by text? Gold texts, real models, one engine.

Each gold text is judged in both orders, by text and by log-probability, through the row function of
evaluation/judge.

Run: python benchmarks/judge_verdicts.py MODEL [MODEL ...]     writes results/judge_verdicts.json
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from opencharacter.config.evaluation import Judge
from opencharacter.config.placement import Pool
from opencharacter.config.roles import Role
from opencharacter.engines.backends import VllmEngine
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import EngineSpec
from opencharacter.evaluation import judge

RESULTS = Path(__file__).parent / "results" / "judge_verdicts.json"
CONCURRENT = 8
ITEMS = 104


async def judged(engine: VllmEngine, model: str, settings: Judge) -> tuple[list[Any], float]:
    """The rows of evaluation/judge for one way of reading verdicts, and the seconds they took."""
    slots = asyncio.Semaphore(CONCURRENT)

    async def one(row: dict[str, Any]) -> dict[str, Any]:
        async with slots:
            conversation = Conversation(engine, 1)
            verdict = await judge.name_trait(row, conversation, settings.sampling, settings)
            tokens = {
                name: getattr(conversation, name)
                for name in ("tokens_in", "tokens_out", "cached_tokens")
            }
            return row | verdict | tokens

    requests = judge.requests(model, judge.spread(judge.gold(), ITEMS))
    await engine.engine.reset_prefix_cache()
    start = time.perf_counter()
    rows = await asyncio.gather(*map(one, requests))
    return rows, time.perf_counter() - start


async def measure(model: str) -> dict[str, Any]:
    """Judge the gold texts with one model in both ways."""
    role = Role(model=model, name="judge", self_name="Judge", max_model_len=2048, dtype="bfloat16")
    engine = VllmEngine(EngineSpec(role, Pool(max_num_seqs=CONCURRENT, kv_cache_gib=1.0)))
    results: dict[str, Any] = {}
    await judged(engine, model, Judge(gold_items=1))  # warm up
    for way in ("text", "log_probability"):
        settings = Judge.model_validate({"verdicts": way, "thinking_budget": 0})
        rows, seconds = await judged(engine, model, settings)
        results[way] = {
            **judge.figures(rows),
            "seconds_per_question": seconds / len(rows),
            "questions": len(rows),
        }
    engine.close()
    return results


def main() -> None:
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in sys.argv[1:]:
        name = Path(model).stem
        machine = f"{os.cpu_count()} cores, {platform.machine()}, shared with other work"
        stored[name] = asyncio.run(measure(model)) | {"machine": machine}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        for way in ("text", "log_probability"):
            agreement = stored[name][way]["agreement"]
            print(name, way, agreement, stored[name][way]["seconds_per_question"])


if __name__ == "__main__":
    main()
