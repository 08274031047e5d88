"""Configuration of Sphinx, which builds the documentation: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import opencharacter

project = "opencharacter"
author = "The opencharacter authors"
release = version = opencharacter.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "reference",  # docs/_ext/reference.py
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
# Types of other packages are named without a link, since a build needs no network.
nitpick_ignore_regex = [("py:.*", r"(?!opencharacter\.api\.).*")]

html_theme = "furo"
html_title = f"opencharacter {release}"
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
