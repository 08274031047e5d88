"""Introspection: the distilled model writes about itself and is fine-tuned on the transcripts."""
