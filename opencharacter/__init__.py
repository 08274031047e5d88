"""Character training for chat models, on Ray.

To understand the package, read `pipeline.py` first (the method on one screen), then
`config/recipe.py`, then any stage by itself. The functions of `opencharacter.api` are available
here too: `opencharacter.run("demo", ["poeticism"])`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opencharacter.api import adapter, dataset, load_recipe, plan, report, run

__version__ = "0.3.0"
__all__ = ["adapter", "dataset", "load_recipe", "plan", "report", "run"]


def __getattr__(name: str) -> Any:
    """Import the API on first use, so that importing the package stays fast."""
    if name in __all__:
        return getattr(importlib.import_module("opencharacter.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
