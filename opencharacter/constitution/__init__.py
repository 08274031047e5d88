"""Constitutions: their schema, advice on them, and other formats."""
