"""Who runs when: turns requests into plans and results into deltas. Imports no torch."""
