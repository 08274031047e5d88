"""What changed, with intervals: answers, preferences, report."""
