"""What a run will take, and what would stop it, before it starts."""
