"""Engines that generate text, and conversations run over them."""
