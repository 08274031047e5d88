"""Messages, filters and statistics of texts."""
