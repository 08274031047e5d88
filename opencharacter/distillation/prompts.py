"""Stage distillation/prompts: questions about a constitution's traits, and general prompts.

A trait with too few hand-written questions is expanded by the prompt generator. If the answers
exist already (see `imported`), the prompts are theirs.

Reads: the constitution, the prompt sources. Writes: id, kind, trait, prompt.
Run: opencharacter run RECIPE --constitution NAME --only distillation/prompts
"""

from __future__ import annotations

import asyncio
import math
import re
from functools import partial
from typing import Any

import pyarrow as pa

from opencharacter.config.recipe import Prompts
from opencharacter.distillation import imported
from opencharacter.distillation.sources import HUB, num_available, read_source, source_digest
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import Reply, engine_spec
from opencharacter.errors import RowFailed
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text import filters, statistics
from opencharacter.text.chat import Message, fill, row_id, system, user
from opencharacter.text.statistics import near_duplicates

SYSTEM = "You write short, natural messages that people send to a chat assistant."

EXPAND = """\
An assistant is described by this sentence, which it says of itself:
"{trait}"

Here are messages from users in which this shows although none of them asks about it:
{examples}

Write {count} more messages of that kind. Vary subject, length and form: questions, tasks, \
requests for advice, plain statements. None may ask the assistant about itself. One message per \
line, numbered, and nothing else."""

LIST_PREFILL = "1."
"""Prefill of the prompt generator's reply; without it, small models often only announce a list."""

TEMPLATES = (SYSTEM, EXPAND, LIST_PREFILL)
RULES = (statistics,)
GENERAL_FILE = "general.jsonl"
NUMBERED = re.compile(r"^\s*\d+[.):]\s*(.+?)\s*$")

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("trait", pa.int64()),
        pa.field("prompt", pa.string(), nullable=False),
    ]
)
FIELDS = [pa.field("trait", pa.int64()), pa.field("questions", pa.list_(pa.string()))]


def expansion_messages(trait: str, examples: list[str], count: int) -> list[Message]:
    """Return the messages that ask the prompt generator for `count` questions like the examples."""
    numbered = "\n".join(f"{i}. {text}" for i, text in enumerate(examples, 1))
    return [system(SYSTEM), user(fill(EXPAND, trait=trait, examples=numbered, count=count))]


def parse_questions(text: str) -> list[str]:
    """Return the numbered lines of a reply without their numbers and quotation marks."""
    matches = (NUMBERED.match(line) for line in text.splitlines())
    return [match.group(1).strip("\"'“”* ") for match in matches if match]


def add_new_questions(
    questions: list[str], candidates: list[str], target: int, max_overlap: float
) -> list[str]:
    """Add candidates of reasonable length that differ from the existing questions.

    Args:
        questions: the trait's questions so far.
        candidates: new questions, in order of preference.
        target: number of questions at which to stop.
        max_overlap: maximum share of a candidate's words that another question may contain.

    Returns:
        The questions followed by the accepted candidates.
    """
    # Paper: its code compares a candidate with the questions of the last trait, not of its own.
    accepted = list(questions)
    for text in candidates:
        if len(accepted) >= target:
            break
        valid_length = 3 <= len(filters.words(text)) <= 120
        if valid_length and all(filters.overlap(text, q) <= max_overlap for q in accepted):
            accepted.append(text)
    return accepted


async def expand_questions(
    row: Row, conversation: Conversation, config: Prompts, prefill: str
) -> Row:
    """Expand one trait's questions over several rounds of parallel samples.

    Args:
        row: request with the trait's `text` and hand-written `questions`.
        conversation: access to the prompt generator.
        config: the stage's section of the recipe.
        prefill: beginning of the reply, or an empty string.
    """
    questions, target = list(row["questions"]), with_margin(config.questions_per_trait)
    for _ in range(config.rounds):
        missing = target - len(questions)
        if missing <= 0:
            break
        messages = expansion_messages(row["text"], row["questions"], min(missing, 10))
        for reply in await sample_replies(messages, conversation, config, prefill):
            candidates = parse_questions(prefill + reply.text)
            questions = add_new_questions(questions, candidates, target, config.max_overlap)
    return {"questions": questions}


async def sample_replies(
    messages: list[Message], conversation: Conversation, config: Prompts, prefill: str
) -> list[Reply]:
    """Return the samples of a round without those that failed; raise if all failed."""
    pending = (
        conversation.reply(messages, config.sampling, prefill) for _ in range(config.samples)
    )
    results = await asyncio.gather(*pending, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    fatal = [error for error in errors if not isinstance(error, RowFailed)]
    if fatal or len(errors) == len(results):
        raise (fatal or errors)[0]
    return [result for result in results if isinstance(result, Reply)]


def with_margin(target: int) -> int:
    """Return the target plus a tenth, since some questions will repeat those of another trait."""
    return target + math.ceil(target / 10)


def drop_repeated(written: list[list[str]], expanded: list[list[str]]) -> list[list[str]]:
    """Remove generated questions that nearly repeat a question of any trait.

    Args:
        written: the hand-written questions of each trait, which are never removed.
        expanded: all questions of each trait, the hand-written ones first.
    """
    generated = [(i, text) for i, texts in enumerate(expanded) for text in texts[len(written[i]) :]]
    all_written = [text for texts in written for text in texts]
    all_texts = [*all_written, *(text for _, text in generated)]
    repeated = near_duplicates(all_texts)[len(all_written) :]
    unique = [list(texts) for texts in written]
    for (i, text), is_repeated in zip(generated, repeated, strict=True):
        if not is_repeated:
            unique[i].append(text)
    return unique


def general_rows(config: Prompts) -> list[Row]:
    """Return the general prompts as rows, with the same ids for every constitution."""
    prompts = read_source(config.general_prompts, GENERAL_FILE).prompts
    return [
        {"id": row_id("general", text), "kind": "general", "trait": None, "prompt": text}
        for text in prompts[: config.general]
    ]


def constitution_rows(name: str, questions: list[list[str]]) -> list[Row]:
    """Return one row per question; `questions[i]` are those of trait i."""
    return [
        {
            "id": row_id("constitution", name, text),
            "kind": "constitution",
            "trait": i,
            "prompt": text,
        }
        for i, texts in enumerate(questions)
        for text in texts
    ]


def identity(job: Job) -> dict[str, Any]:
    source = job.recipe.distillation.prompts.general_prompts
    return {"general_prompts": source_digest(source, GENERAL_FILE)[:16]} | answers_digest(job)


def answers_digest(job: Job) -> dict[str, Any]:
    """Return what identifies answers that exist already; nothing without them."""
    source = imported.source_of(job.recipe.distillation)
    if source is None or job.constitution is None:
        return {}
    return {"answers": imported.source_digest(source, job.persona.name)}


def imported_rows(job: Job, source: str) -> list[Row]:
    """Return the prompts of a source of answers as rows."""
    general = {row["prompt"]: row["id"] for row in general_rows(job.recipe.distillation.prompts)}
    texts = imported.read(source, job.persona.name).prompts
    return [imported.prompt_row(job.persona.name, text, general) for text in texts]


def check(job: Job) -> None:
    """Raise a UserError before a run if the general prompts cannot be loaded."""
    general_rows(job.config)
    if source := imported.source_of(job.recipe.distillation):
        imported.read(source, job.persona.name)


def general_count(config: Prompts) -> int:
    """Return the number of general prompts that the stage will write."""
    return num_available(config.general_prompts, GENERAL_FILE, config.general)


def notes(job: Job) -> list[str]:
    if answers := imported.source_of(job.recipe.distillation):
        return [f"prompts: those of {imported.locate(answers, job.persona.name)}"]
    source, requested = job.config.general_prompts, job.config.general
    if source.startswith(HUB):
        return [f"general prompts: up to {requested:,} from {source} (not downloaded for a plan)"]
    contents = read_source(source, GENERAL_FILE)
    count, skipped = len(contents.prompts), contents.skipped
    lines = []
    if count < requested:
        lines.append(f"general prompts: {source} has only {count:,} of the {requested:,} requested")
    if skipped:
        lines.append(f"general prompts: {source} has {skipped:,} rows without a prompt (skipped)")
    return lines


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    if imported.source_of(job.recipe.distillation):
        return []
    target = job.config.questions_per_trait
    expands = any(len(given) < target for given in job.persona.distinct_questions())
    return [(engine_spec(job, "prompt_generator"),)] if expands else []


def estimate(job: Job) -> Estimate:
    source = imported.source_of(job.recipe.distillation)
    if source and imported.is_counted(source):
        return Estimate(len(imported.read(source, job.persona.name).prompts))
    config, traits = job.config, job.persona.traits
    questions = config.questions_per_trait * len(traits)
    given = job.persona.distinct_questions()
    generated = sum(max(0, config.questions_per_trait - len(texts)) for texts in given)
    generated = 0 if source else generated
    return Estimate(questions + general_count(config), 40 * generated, 40 * generated)


def expand_traits(job: Job, questions: list[list[str]]) -> list[list[str]]:
    """Expand the questions of all traits that have too few.

    Args:
        job: the job of this stage.
        questions: the hand-written questions of each trait, at most the target number.

    Returns:
        The questions of each trait, the hand-written ones first; some may be repeated.
    """
    from opencharacter.engines.generate import generate

    config: Prompts = job.config
    requests = [
        {"id": row_id("expand", job.persona.name, trait.trait), "trait": i, "text": trait.trait}
        | {"questions": questions[i]}
        for i, trait in enumerate(job.persona.traits)
        if len(questions[i]) < config.questions_per_trait
    ]
    role = job.recipe.roles.prompt_generator
    prefill = "" if role.endpoint or role.thinks else LIST_PREFILL
    row_fn = partial(expand_questions, config=config, prefill=prefill)
    rows = generate(job, requests, row_fn, "prompt_generator", FIELDS).table().to_pylist()
    by_trait = {row["trait"]: row["questions"] for row in rows}
    return [by_trait.get(i) or written for i, written in enumerate(questions)]


def build(job: Job) -> StageResult:
    if source := imported.source_of(job.recipe.distillation):
        rows = imported_rows(job, source)
        return job.write(pa.Table.from_pylist(rows, schema=SCHEMA).sort_by("id"))
    config: Prompts = job.config
    traits = job.persona.traits
    target = config.questions_per_trait
    questions = [list(given[:target]) for given in job.persona.distinct_questions()]
    figures = {}
    if any(len(texts) < target for texts in questions):
        expanded = expand_traits(job, questions)
        unique = drop_repeated(questions, expanded)
        figures["repeated_questions"] = sum(map(len, expanded)) - sum(map(len, unique))
        questions = [texts[:target] for texts in unique]
        figures["incomplete_traits"] = {
            trait.trait: len(texts)
            for trait, texts in zip(traits, questions, strict=True)
            if len(texts) < target
        }
    skipped = read_source(config.general_prompts, GENERAL_FILE).skipped
    if skipped:
        figures["skipped_rows"] = skipped
    rows = constitution_rows(job.persona.name, questions) + general_rows(config)
    by_id = {row["id"]: row for row in rows}
    table = pa.Table.from_pylist(list(by_id.values()), schema=SCHEMA).sort_by("id")
    return job.write(table, figures=figures)
