"""LoRA training on Ray Train."""
