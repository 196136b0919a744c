"""Weights and training states on disk, and the names that other people give to the same tensors."""
