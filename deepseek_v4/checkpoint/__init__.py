"""Weights and training states on disk, and the names that other people give to the same tensors.

No step and no loop: those are in `training/`, which hands over trees and gets them back. Only here is a tensor called as in
a release or in transformers, and only in `hf_names.py`.
"""
