"""Lets `python -m opencharacter` run the command line."""

from opencharacter.cli.main import main

main()
