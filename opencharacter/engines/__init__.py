"""Engines that generate text, and the conversations that run on them."""
