"""Chat messages, answer filters and text statistics."""
