"""Constitutions: their schema, a linter for them, and the formats of the original project."""
