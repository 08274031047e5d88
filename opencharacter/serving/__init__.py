"""Serves the student, its personas and the judge through an OpenAI-compatible API on Ray Serve.

Run: opencharacter serve RECIPE [--constitution NAME ...] [--judge]
     opencharacter serve status | stop | config

The ingress (`ingress.py`) handles HTTP: authentication, limits, model names and errors. A model
replica (`replica.py`) runs the engine and generates. The ingress never imports vLLM, and a replica
never sees an HTTP request.
"""
