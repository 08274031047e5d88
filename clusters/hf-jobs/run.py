# /// script
# requires-python = ">=3.11,<3.14"
# ///
"""Run `opencharacter` with the given arguments as a job on Hugging Face: see README.md."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("HF_HOME", "/runs/models")

from opencharacter.cli.main import main

main()
