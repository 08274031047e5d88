"""Before a run starts: its predicted time and cost, and the checks that refuse it."""
