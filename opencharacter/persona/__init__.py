"""The trained persona: merging, blending, further tuning and export of its adapter."""
