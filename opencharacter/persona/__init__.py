"""The persona as an artifact: the merged adapter."""
