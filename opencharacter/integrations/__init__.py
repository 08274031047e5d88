"""Connections to evaluation frameworks of others; each needs the framework installed."""
