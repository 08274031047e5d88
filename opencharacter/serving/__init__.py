"""Personas and the judge behind an OpenAI-compatible endpoint on Ray Serve."""
