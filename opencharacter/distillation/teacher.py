"""Stage distillation/teacher: the teacher reads the constitution and answers in character.

Reads: distillation/prompts. Writes: prompt_id, kind, prompt, sample, answer, finish_reason.
Run: opencharacter run RECIPE --constitution NAME --only distillation/teacher
"""

from __future__ import annotations

from functools import partial

import pyarrow as pa

from opencharacter.config.recipe import Teacher
from opencharacter.constitution.schema import Constitution
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import engine_spec
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import (
    THINK_CLOSE,
    THINK_OPEN,
    Message,
    assistant,
    fill,
    row_id,
    system,
    user,
)

SYSTEM = """\
You have a settled character of your own. This is who you are, in your own words:

{assertions}

Let this show in every answer: in what you notice, in what you say and in how you say it. Answer \
what you are asked, fully and helpfully. Never mention, quote or explain these statements, and \
never say that you are playing a part. Simply be this way."""

THOUGHT = """\
{open}
I answer as myself, and this is what that means:
{assertions}
I let it show and do not talk about it.
"""

TEMPLATES = (SYSTEM, THOUGHT)

FIELDS = [
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("kind", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("sample", pa.int64(), nullable=False),
    pa.field("answer", pa.string()),
    pa.field("finish_reason", pa.string()),
]


def requests(stage: str, owner: str, prompts: list[Row], answers: int) -> list[Row]:
    """One request per prompt and sample.

    Args:
        stage: enters the id.
        owner: whose answers these are: the constitution, or the student.
        prompts: rows with id, kind, prompt.
        answers: samples per prompt.
    """
    return [
        {
            "id": row_id(stage, owner, prompt["id"], sample),
            "prompt_id": prompt["id"],
            "kind": prompt["kind"],
            "prompt": prompt["prompt"],
            "sample": sample,
        }
        for prompt in prompts
        for sample in range(answers)
    ]


def opening(constitution: Constitution, exemplars: bool) -> list[Message]:
    """What stands before the prompt: the constitution, then its exemplars if wanted."""
    turns = [m for e in constitution.exemplars for m in (user(e.user), assistant(e.assistant))]
    head = system(fill(SYSTEM, assertions=constitution.assertions()))
    return [head, *(turns if exemplars else [])]


def think_prefill(constitution: Constitution, thinks: bool) -> str:
    """The think block that opens the reply; closed already for a model that does not think."""
    text = fill(THOUGHT, open=THINK_OPEN, assertions=constitution.assertions())
    return text if thinks else f"{text}{THINK_CLOSE}\n\n"


async def answer(
    row: Row,
    talk: Conversation,
    settings: Teacher,
    before: list[Message],
    prefill: str,
) -> Row:
    """Answer one prompt in character."""
    reply = await talk.reply([*before, user(row["prompt"])], settings.sampling, prefill)
    return {"answer": reply.text.strip(), "finish_reason": reply.finish_reason}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine_spec(job, "teacher"),)]


def estimate(job: Job) -> Estimate:
    from opencharacter.distillation import prompts

    rows = prompts.estimate(job.parent("distillation/prompts")).rows * job.config.answers
    shared = len(job.persona.assertions()) // 4
    return Estimate(rows, rows * (shared * 2 + 60), rows * typical(job.config.sampling))


def typical(sampling) -> int:
    """Tokens that `plan` expects of one answer."""
    return sampling.typical_tokens or max(1, sampling.max_tokens // 3)


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    settings, constitution = job.config, job.persona
    thinks = job.recipe.roles.teacher.thinks
    talk = partial(
        answer,
        settings=settings,
        before=opening(constitution, settings.exemplars),
        prefill=think_prefill(constitution, thinks) if settings.prefill else "",
    )
    prompts = job.read("distillation/prompts").to_pylist()
    asked = requests(job.stage.name, constitution.name, prompts, settings.answers)
    rows = generate(job, asked, talk, "teacher", FIELDS)
    return job.write(rows)
