"""What changed, with intervals: preferences, robustness, coherence, and one report."""
