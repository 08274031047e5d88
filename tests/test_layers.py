"""The package is layered: a module imports from its own layer or from the layers below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import opencharacter

PACKAGE = Path(opencharacter.__file__).parent
LAYERS = (
    ("errors",),
    ("config",),
    ("text", "constitution", "models", "lora", "cache"),
    ("runtime",),
    ("engines",),
    ("training",),
    ("distillation", "introspection", "persona", "evaluation", "pipeline"),
    ("planning",),
    ("serving",),
    ("api",),
    ("cli", "integrations"),
)
"""From the bottom up."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ROOTS = {"__init__", "__main__"}


def imported(tree: ast.AST) -> set[str]:
    """Top-level modules and packages of opencharacter that a module imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            root, _, rest = node.module.partition(".")
            if root == "opencharacter":
                names |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
            names |= {path[1] for path in paths if path[0] == "opencharacter" and path[1:]}
    return names


MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_nothing_from_a_higher_layer(module):
    owner = module.parts[0].removesuffix(".py")
    if owner in ROOTS:
        return
    assert owner in LEVEL, f"{owner} has no layer; add it to LAYERS"
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    above = {name for name in imported(tree) if LEVEL.get(name, 0) > LEVEL[owner]}
    assert not above, f"{module} imports from a higher layer: {sorted(above)}"
