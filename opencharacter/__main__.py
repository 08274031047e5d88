"""`python -m opencharacter`."""

from opencharacter.cli.main import main

main()
