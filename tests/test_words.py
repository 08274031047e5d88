"""Words and names that were replaced are not used again."""

import ast
import re
from pathlib import Path

import pytest

import opencharacter
from opencharacter.config import base, documents, evaluation, placement, recipe, roles

PACKAGE = Path(opencharacter.__file__).parent
ROOT = PACKAGE.parent
SUFFIXES = {".py", ".yaml", ".md", ".html", ".j2", ".css", ".js", ".toml"}
EXCLUDED = {
    PACKAGE / "config" / "renames.py",  # refuses the old fields with their new names
    ROOT / "CHANGELOG.md",  # says what was renamed
    ROOT / "docs" / "results" / "answers.md",  # a model's answers
}
PHRASES = (
    "be had",
    "begun for the model",
    "by words alone",
    "dpo/kl",
    "empty hands",
    "expander",
    "final_ratio",
    "goes on where it was",
    "leaves? open",
    "max_sequences",
    "memory_fraction",
    "mend the cause",
    "no persona's own",
    "not worth going on",
    "the way back",
    "told apart",
    "told_apart",
    "tokens_per_pass",
    "what is loaded goes on",
)
IDENTIFIERS = {
    *("Host", "Hosted", "Fleet", "Held", "Room", "Talk", "Seat", "Outcome", "Parts", "Folder"),
    *("Objective", "Told", "Entrance", "Door", "Refused"),
}
MODULES = {"advice", "engine", "exchange", "page", "quality", "running", "serve", "wire"}
FIELDS = {
    *("batch", "called", "clip", "context", "expander", "final_ratio", "grows", "max_sequences"),
    *("memory_fraction", "recompute", "thought", "tokens_per_pass", "warmup"),
}


def text_files() -> list[Path]:
    """The files that users and contributors read, without data and constitutions."""
    folders = [PACKAGE, ROOT / "docs", ROOT / "clusters", ROOT / "benchmarks"]
    paths = [path for folder in folders for path in folder.rglob("*")]
    paths += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    built = ROOT / "docs" / "_build"
    return [
        path
        for path in paths
        if path.suffix in SUFFIXES and path not in EXCLUDED and built not in path.parents
    ]


TEXTS = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in text_files()}


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_replaced_phrase_is_not_used(phrase):
    pattern = re.compile(rf"\b{phrase}\b".replace(" ", r"[\s#>]+"), re.IGNORECASE)
    uses = [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}"
        for path, text in TEXTS.items()
        for match in pattern.finditer(text)
    ]
    assert not uses


def identifiers(tree: ast.AST) -> set[str]:
    """All names that a module defines or uses."""
    names = set()
    for node in ast.walk(tree):
        names |= {getattr(node, field, None) for field in ("id", "name", "attr", "arg", "asname")}
    return names


@pytest.mark.parametrize("path", [path for path in TEXTS if path.suffix == ".py"], ids=str)
def test_a_module_uses_no_replaced_identifier(path):
    replaced = identifiers(ast.parse(TEXTS[path])) & IDENTIFIERS
    assert not replaced


def test_no_module_has_a_replaced_name():
    assert not MODULES & {path.stem for path in PACKAGE.glob("*.py")}
    assert not {"advice", "exchange", "running", "wire"} & {p.stem for p in PACKAGE.rglob("*.py")}


def test_no_recipe_or_placement_field_has_a_replaced_name():
    modules = (base, documents, evaluation, placement, recipe, roles)
    sections = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base.Config)
    }
    assert len(sections) > 20
    fields = {
        f"{section.__name__}.{name}"
        for section in sections
        for name in section.model_fields
        if name in FIELDS
    }
    assert not fields
