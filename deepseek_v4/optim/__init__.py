"""Muon for matrices, AdamW for the rest, by one table.

Gradients in, updates out: neither losses nor data nor a model are known here, and which leaf belongs to whom is said in
`assign.py` alone.
"""

from deepseek_v4.optim.assign import MatrixAxes, assign, decay_mask, matrix_axes
from deepseek_v4.optim.build import build_optimizer
from deepseek_v4.optim.in_place import block_of, stays_finite, update_in_place
from deepseek_v4.optim.muon import muon, orthogonalize, scale_by_adam, scale_by_muon, scale_by_shape
from deepseek_v4.optim.newton_schulz import newton_schulz
from deepseek_v4.optim.schedule import decay_start, make_schedule

__all__ = [
    "MatrixAxes",
    "assign",
    "block_of",
    "build_optimizer",
    "decay_mask",
    "decay_start",
    "make_schedule",
    "matrix_axes",
    "muon",
    "newton_schulz",
    "orthogonalize",
    "scale_by_adam",
    "scale_by_muon",
    "scale_by_shape",
    "stays_finite",
    "update_in_place",
]
