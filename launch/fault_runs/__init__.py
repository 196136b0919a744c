"""Runs that are disturbed on purpose: what `launch.faults` does."""
