"""The commands `opencharacter constitution ...`: list, import, export, new, validate, show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.text import Text

from opencharacter.config.base import check_name
from opencharacter.config.files import find
from opencharacter.constitution import original_formats, schema
from opencharacter.constitution.lint import advise
from opencharacter.constitution.schema import Constitution
from opencharacter.distillation.teacher import opening
from opencharacter.errors import UserError
from opencharacter.runtime.progress import console

app = typer.Typer(
    no_args_is_help=True, help="List, write, check, convert and show constitutions; runs no model."
)

PersonaName = Annotated[
    str, typer.Argument(metavar="NAME_OR_FILE", help="A packaged constitution or a .yaml file.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


def say(*parts: str | tuple[str, str]) -> None:
    """Print users' text as it is: no markup, no emoji codes, no wrapping."""
    console.print(Text.assemble(*parts), soft_wrap=True, highlight=False)


def yaml_file(name: str, to: Path | None) -> Path:
    """Where the constitution `name` is written; its file must have its name, or it cannot load."""
    path = to or Path(f"{name}.yaml")
    if path.name not in (f"{name}.yaml", f"{name}.yml"):
        raise UserError(f"constitution {name!r} cannot be {path}; call the file {name}.yaml")
    return path


def size(persona: Constitution) -> str:
    questions = sum(len(trait.questions) for trait in persona.traits)
    return f"{len(persona.traits)} traits, {questions} questions"


@app.command("list")
def list_() -> None:
    """The packaged constitutions, each with its description."""
    personas = [schema.load(name) for name in schema.packaged()]
    width = max(len(persona.name) for persona in personas)
    for persona in personas:
        say((f"{persona.name:<{width}}", "bold"), f"  {persona.description}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON list or JSON lines of the original project.")],
    name: Annotated[str | None, typer.Option(help="The persona's; else the file's.")] = None,
    description: Annotated[str | None, typer.Option(help="One sentence, third person.")] = None,
    to: Annotated[Path | None, typer.Option(help="NAME.yaml here if absent.")] = None,
    force: Force = False,
) -> None:
    """Turn a file of the original project into a constitution."""
    persona, notes = original_formats.read(file, name, description)
    path = yaml_file(persona.name, to)
    schema.save(schema.dump(persona), path, force)
    for note in notes:
        say(f"note: {file} {note}")
    say(f"wrote {path} ({size(persona)})")


@app.command()
def export(
    name: PersonaName,
    to: Annotated[Path, typer.Option(help="A .json list, or .jsonl for further questions.")],
    force: Force = False,
) -> None:
    """Write a constitution in a format of the original project."""
    persona = schema.load(name)
    original_formats.write(persona, to, force)
    if persona.exemplars:
        say(f"note: {len(persona.exemplars)} exemplars have no place in that format and stay here")
    say(f"wrote {to} ({size(persona)})")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the persona, for instance curiosity.")],
    to: Annotated[Path | None, typer.Option(help="NAME.yaml here if absent.")] = None,
    force: Force = False,
) -> None:
    """Begin a constitution: a copy of the template, to fill in."""
    try:
        path = yaml_file(check_name(name), to)
    except ValueError as error:
        raise UserError(f"constitution {error}") from None
    template = find("constitution", "template", "constitutions", "template.yaml", "*.yaml")
    line = yaml.safe_dump({"name": name}).strip()
    text = re.sub(r"^name: .*$", line, template.read_text("utf-8"), count=1, flags=re.MULTILINE)
    schema.save(text, path, force)
    say(f"wrote {path}; fill it in, then: opencharacter constitution validate {path}")


@app.command()
def validate(
    names: Annotated[list[str], typer.Argument(metavar="NAME_OR_FILE...")],
    strict: Annotated[bool, typer.Option("--strict", help="Advice is exit code 1.")] = False,
) -> None:
    """Check constitutions and advise on their style; an error is exit code 2."""
    codes = [check(name, strict) for name in names]
    raise typer.Exit(max(codes))


def check(name: str, strict: bool) -> int:
    """Tell what is wrong with one constitution; the exit code that it deserves."""
    try:
        persona = schema.load(name)
    except UserError as error:
        say(("error: ", "red"), str(error))
        return 2
    findings = advise(persona)
    for finding in findings:
        say(("advice: ", "yellow"), f"{name} {finding.where}: {finding.said}")
    if not findings:
        say(("ok: ", "green"), f"{name} ({size(persona)})")
    return int(strict and bool(findings))


@app.command()
def show(
    name: PersonaName,
    prompt: Annotated[
        bool, typer.Option("--prompt", help="The teacher's system prompt too.")
    ] = False,
) -> None:
    """Print a constitution."""
    persona = schema.load(name)
    say((persona.name, "bold"), f": {persona.description}")
    for i, trait in enumerate(persona.traits, 1):
        say(f"{i:>2}. {trait.trait} ({len(trait.questions)} questions)")
        if trait.clarification:
            say(f"    {trait.clarification}")
    for exemplar in persona.exemplars:
        say(("\nuser: ", "bold"), exemplar.user)
        say(("assistant: ", "bold"), exemplar.assistant)
    say(f"\n{size(persona)}, {len(persona.exemplars)} exemplars")
    if prompt:
        # Not through the console, which would expand tabs: this is the exact text.
        typer.echo(f"\n{opening(persona, exemplars=False)[0]['content']}")
