"""Runs that are disturbed on purpose: what `launch.faults` does.

Every run is the real command in a process of its own; nothing of the library is called or patched here.
"""
