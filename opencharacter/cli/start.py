"""`opencharacter demo` and `opencharacter init`: the first steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.text import Text

from opencharacter.cli.constitution import print_findings
from opencharacter.cli.options import RECIPES, PlacementOption, StorageOption
from opencharacter.cli.run import run
from opencharacter.config import files
from opencharacter.config.base import validate_name
from opencharacter.config.documents import describe_problem, dotted, fields_of
from opencharacter.constitution import schema
from opencharacter.constitution.schema import Constitution
from opencharacter.errors import UserError
from opencharacter.runtime.progress import console

DEMO, DEMO_PERSONA = "demo", "poeticism"
LARGE_RECIPE = "llama-3.1-8b"
"""The recipe that a recipe for a model of the user's choice extends: the paper's settings."""
RECIPE_FILE = "{name}-recipe.yaml"
ENDPOINT = re.compile(r"(?P<model>\S+)@(?P<url>https?://\S+)")

QUESTIONS = {
    "description": "In one sentence, what is the character?",
    "manner": "How does it speak? In the first person, such as: I speak in short, dry sentences.",
    "traits": "What else does it do? In the first person; put a semicolon between traits",
    "student": f"Which model is trained? A packaged recipe ({RECIPES}) or a Hugging Face id",
    "teacher": "Which model plays the character for it? A Hugging Face id, MODEL@URL of a server, "
    "or `recipe`",
}
"""The five questions, by option."""
DEFAULTS = {"student": DEMO, "teacher": "recipe"}


def demo(placement: PlacementOption = None, storage: StorageOption = None) -> None:
    """Train a poet from the packaged 135M model on this machine, and say what to look at next."""
    run(DEMO, [DEMO_PERSONA], placement, storage)
    options = f" --storage {shlex.quote(storage)}" if storage else ""
    for command, purpose in (
        (f"status {DEMO} -c {DEMO_PERSONA}{options}", "what each stage made"),
        (f"chat {DEMO} {DEMO_PERSONA}{options}", "talk with the poet"),
        (f"chat {DEMO} base{options}", "talk with the untrained model"),
        (f"serve {DEMO}{options}", "a chat page and an OpenAI-compatible API"),
        ("init NAME", "a character of your own"),
    ):
        print_plain(f"  opencharacter {command}", f"# {purpose}")


def init(
    name: Annotated[str, typer.Argument(help="Name of the persona, for example curiosity.")],
    description: Annotated[str | None, typer.Option(help=QUESTIONS["description"])] = None,
    manner: Annotated[str | None, typer.Option(help=QUESTIONS["manner"])] = None,
    traits: Annotated[str | None, typer.Option(help=QUESTIONS["traits"])] = None,
    student: Annotated[str | None, typer.Option(help=QUESTIONS["student"])] = None,
    teacher: Annotated[str | None, typer.Option(help=QUESTIONS["teacher"])] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Ask five questions, and write a constitution and a recipe. An option answers its question."""
    try:
        name = schema.persona_name(validate_name(name))
    except ValueError as error:
        raise UserError(f"constitution name {name!r}: {error}") from None
    paths = Path(f"{name}.yaml"), Path(RECIPE_FILE.format(name=name))
    for path in () if force else paths:
        if path.exists():
            raise UserError(f"{path} exists; choose another name, or add --force")
    given = {"description": description, "manner": manner, "traits": traits}
    given |= {"student": student, "teacher": teacher}
    answers = {key: ask(key, value) for key, value in given.items()}
    statements = [answers["manner"], *split_traits(answers["traits"])]
    constitution = make_constitution(name, answers["description"], statements)
    recipe = make_recipe(name, answers["student"], answers["teacher"])
    schema.save(schema.dump(constitution), paths[0], force)
    schema.save(yaml.safe_dump(recipe, sort_keys=False), paths[1], force)
    loaded = files.load_recipe(str(paths[1]))
    print_plain(f"wrote {paths[0]} and {paths[1]}")
    print_findings(str(paths[0]), strict=False)
    if loaded.distillation.teacher.exemplars and not constitution.exemplars:
        print_plain("advice: a small teacher follows examples better; add 3 to 6 exemplars")
    print_plain(f"next: opencharacter plan {paths[1]} -c {paths[0]}")
    print_plain(f"then: opencharacter run {paths[1]} -c {paths[0]}")


def print_plain(*parts: str) -> None:
    """Print text without interpreting markup, and without wrapping."""
    console.print(Text(" ".join(parts)), soft_wrap=True, highlight=False)


def ask(key: str, given: str | None) -> str:
    """Return the answer that an option gives, or ask for it."""
    if given is not None:
        return given.strip()
    answer: Any = typer.prompt(QUESTIONS[key], default=DEFAULTS.get(key))
    return str(answer).strip()


def split_traits(text: str) -> list[str]:
    """Return the traits of an answer, each with a full stop at its end."""
    parts = filter(None, (part.strip() for part in re.split(r"[;\n]", text)))
    return [part if part[-1] in ".!" else f"{part}." for part in parts]


def template_questions() -> list[list[str]]:
    """Return the questions of the template's traits, which suit most characters."""
    path = files.resolve(files.CONSTITUTIONS, schema.TEMPLATE)
    template = yaml.safe_load(path.read_text("utf-8"))
    return [trait["questions"] for trait in template["traits"]]


def make_constitution(name: str, description: str, traits: list[str]) -> Constitution:
    """Return a constitution with the questions of the template.

    Args:
        name: name of the persona.
        description: one sentence.
        traits: assertions in the first person.

    Raises:
        UserError: if there are more traits than the template has, or an answer cannot be used.
    """
    questions = template_questions()
    if len(traits) > len(questions):
        raise UserError(
            f"--traits has {len(traits) - 1} traits, and --manner is one more; give at most "
            f"{len(questions) - 1}, and add others to the file with questions of their own"
        )
    data = {
        "name": name,
        "description": description,
        "traits": [
            {"trait": trait, "questions": asked}
            for trait, asked in zip(traits, questions, strict=False)
        ],
    }
    try:
        return Constitution.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        problem = describe_problem(first, fields_of(Constitution, first["loc"][:-1]))
        raise UserError(f"constitution {name}: {dotted(first['loc'])}: {problem}") from None


def make_recipe(name: str, student: str, teacher: str) -> dict[str, Any]:
    """Return a recipe that extends a packaged one.

    Args:
        name: name of the persona, and of the recipe.
        student: a packaged recipe, or a model's Hugging Face id.
        teacher: a model's Hugging Face id, `MODEL@URL`, or `recipe` for that of the recipe.
    """
    is_packaged = student in files.packaged(files.RECIPES)
    roles: dict[str, Any] = {} if is_packaged else {"student": model_role(student)}
    if teacher != DEFAULTS["teacher"]:
        served = ENDPOINT.fullmatch(teacher)
        roles["teacher"] = model_role(served["model"] if served else teacher)
        if served:
            roles["teacher"]["endpoint"] = served["url"]
    recipe: dict[str, Any] = {"extends": student if is_packaged else LARGE_RECIPE, "name": name}
    return {**recipe, "roles": roles} if roles else recipe


def model_role(model: str) -> dict[str, Any]:
    """Return the fields of a role for a model, whose names derive from its id.

    Raises:
        UserError: if the id contains no name.
    """
    short = re.sub(r"[^a-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-._")
    words = re.findall(r"[A-Za-z]+", model.rstrip("/").rsplit("/", 1)[-1])
    if not short or not words:
        raise UserError(f"model {model!r}: use a packaged recipe, a Hugging Face id or MODEL@URL")
    return {"model": model, "name": short, "self_name": words[0].capitalize()}
