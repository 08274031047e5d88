"""Evaluation of any model or adapter in the place of a trained persona.

The subject takes the part of the condition `full`. Stages that need no training data measure it
against the untrained student, `base`, and the student with the constitution as its system prompt,
`prompted`; training stages are marked as left out. See `opencharacter evaluate`.
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from pathlib import Path
from typing import Any

from opencharacter import lora, models
from opencharacter.config.base import ECHO, EMBEDDED, Config
from opencharacter.config.evaluation import Condition, Subject
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Role
from opencharacter.errors import UserError
from opencharacter.persona.export import published
from opencharacter.runtime import manifests
from opencharacter.runtime.stage import Job, StageResult

CONDITIONS: tuple[Condition, ...] = ("base", "prompted", "full")
"""The conditions that need no training."""
LEFT_OUT = (
    "distillation/teacher",
    "distillation/student",
    "distillation/pairs",
    "distillation/reference",
    "distillation/dpo",
    "introspection/reflection",
    "introspection/interaction",
    "introspection/transcripts",
    "introspection/sft",
)
"""The stages whose data an evaluation of another model does not need."""
COMPARING = ("answers", "preferences", "attacks", "adherence", "drift", "side_effects")
"""The sections of the evaluation that list conditions."""
SKIPPED = "skipped"
"""Name of the figure that marks a stage as left out."""
URLS = ("http://", "https://")
TIMEOUT_SECONDS = 20


def short_name(subject: str) -> str:
    """A name for a subject that can be used in a path: its last part in lower case."""
    last = re.split(r"[/:]", subject.rstrip("/").removeprefix(EMBEDDED))[-1] or "model"
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._") or "model"


def served_models(url: str, key_variable: str) -> list[str]:
    """The names of the models that an OpenAI-compatible server lists.

    Raises:
        UserError: if it does not answer.
    """
    key = os.environ.get(key_variable, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            return [model["id"] for model in json.load(response)["data"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{url}: no list of models ({error}); check the URL, which usually ends in /v1, and "
            f"the key in {key_variable}, or name the model with --model"
        ) from None


def model_at(url: str, model: str | None, key_variable: str) -> str:
    """The model to ask at an endpoint: the one that is named, or the only one it serves.

    Raises:
        UserError: if the name is left out and the server has several models.
    """
    if model:
        return model
    names = served_models(url, key_variable)
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise UserError(f"{url} serves {len(names)} models ({listed}); choose one with --model")
    return names[0]


def parse_subject(subject: str, student: Role, model: str | None = None) -> Subject:
    """Say what a name stands for: an endpoint, an adapter's folder, or a model.

    Args:
        subject: an http(s) URL, a folder in PEFT's layout, or a model as in a recipe.
        student: the recipe's student, whose limits the subject gets.
        model: name of the model at an endpoint.

    Raises:
        UserError: if there is no such folder, or the endpoint's model is not known.
    """
    if subject.startswith(URLS):
        name = model_at(subject, model, student.api_key_env)
        fields: dict[str, Any] = {"model": name, "endpoint": subject, "name": short_name(name)}
        return Subject(model=model_like(student, fields))
    if model:
        raise UserError(f"--model {model!r} names a model at a URL, and {subject!r} is none")
    folder = Path(subject).expanduser()
    if (folder / lora.ADAPTER_CONFIG).is_file():
        return Subject(adapter=str(folder.resolve()))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{subject}: neither {lora.ADAPTER_CONFIG} nor config.json; give an adapter's folder, "
            "a model's folder or name, or a URL"
        )
    local = folder.exists() and not subject.startswith((EMBEDDED, ECHO))
    path = str(folder.resolve()) if local else subject
    return Subject(model=model_like(student, {"model": path, "name": short_name(subject)}))


def other_base(subject: Subject, student: Role) -> str | None:
    """The model that an adapter says it was trained on, if that is not the student.

    Only the last parts of the names are compared, since one model may be named in several ways.
    """
    if subject.adapter is None:
        return None
    config = lora.read_config(Path(subject.adapter))
    own = config.get("base_model_name_or_path")
    names = [student.model, published(student)[0]]
    same = not own or any(name and last_part(name) == last_part(own) for name in names)
    return None if same else own


def last_part(name: str) -> str:
    """The last part of a path or a Hugging Face id, in lower case."""
    return name.rstrip("/").rpartition("/")[2].removeprefix(EMBEDDED).lower()


def require_available(subject: Subject) -> None:
    """Raise UserError if a given model is missing and cannot be downloaded, or a key is."""
    role = subject.model
    missing = role and models.missing_requirement(role)
    if role and missing and (role.endpoint or not models.is_hub(role.model)):
        raise UserError(f"{role.name}: missing {missing}")


def model_like(student: Role, fields: dict[str, Any]) -> Role:
    """A role with the limits and the tokenizer settings of the student and other weights."""
    cleared = {"revision": None, "chat_template": None, "endpoint": None}
    return Role.model_validate(student.model_dump() | cleared | fields)


def evaluation_recipe(recipe: Recipe, subject: Subject, base: str | None = None) -> Recipe:
    """The recipe that measures a subject: its evaluation without what needs training data.

    Args:
        recipe: the recipe whose student is the base and whose judge judges.
        subject: the model or adapter.
        base: the untrained model to compare with; the recipe's student if None.
    """

    def updated(section: Config, **changes: Any) -> Any:
        return section.model_copy(update=changes)

    evaluation = recipe.evaluation
    sections: dict[str, Any] = {}
    for name in COMPARING:
        section = getattr(evaluation, name)
        kept = tuple(c for c in CONDITIONS if c in section.conditions)
        sections[name] = updated(section, conditions=kept)
    if subject.model:  # the harness measures the student's weights with an adapter
        sections["capabilities"] = updated(evaluation.capabilities, tasks=())
    sections["direction"] = updated(evaluation.direction, texts=0)
    sections["subject"] = subject
    roles = recipe.roles
    if base:
        student = model_like(roles.student, {"model": base, "name": short_name(base)})
        roles = updated(roles, student=student)
    prompts = updated(recipe.distillation.prompts, questions_per_trait=1)
    return updated(
        recipe,
        roles=roles,
        distillation=updated(recipe.distillation, prompts=prompts),
        evaluation=updated(evaluation, **sections),
    )


def leave_out_training(jobs: list[Job]) -> None:
    """Mark the training stages as done without data, so that the evaluation can follow.

    Raises:
        UserError: if the storage has training data, which would be lost.
    """
    unmarked = [job for job in jobs if job.stage.name in LEFT_OUT and job.state()[0] != "done"]
    for job in unmarked:
        if has_training_data(job):
            raise UserError(
                f"{job.store.address(job.dataset)} holds data of a training run, which an "
                "evaluation of another model would replace; use another --storage"
            )
    for job in unmarked:
        job.store.delete(job.dataset)
        result = StageResult(0, figures={SKIPPED: "a given model is evaluated"})
        manifests.finish(job, result, 0.0, {})


def has_training_data(job: Job) -> bool:
    """Whether a training stage's dataset has more than the mark of an earlier evaluation."""
    manifest = job.store.manifest(job.dataset, any_format=True)
    if manifest is None:
        return job.store.exists(job.dataset)
    return SKIPPED not in manifest.get("figures", {})
