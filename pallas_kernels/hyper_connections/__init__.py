"""Manifold-constrained hyper-connections (report 2.2): coefficients with Sinkhorn and collapse, and the mix of the streams."""

from __future__ import annotations

import jax

from pallas_kernels import pick
from pallas_kernels.hyper_connections import blockwise, reference


def collapse(streams: jax.Array, fn: jax.Array, base: jax.Array, scale: jax.Array, *, norm_eps: float, eps: float,
             iterations: int, implementation: str = "auto") -> tuple[jax.Array, jax.Array, jax.Array]:
  """The sublayer's input and the coefficients with which its output returns to the streams.

  Args:
    streams: [B, S, N, D] residual streams.
    fn: [N * D, (2 + N) N] projection, columns pre, post, res (row-major); base [(2 + N) N]; scale [3].
    norm_eps: of the weightless RMS norm over all streams together.
    eps: added to pre, to the first softmax and to every Sinkhorn denominator.
    iterations: Sinkhorn rounds; the last step normalises columns.

  Returns:
    collapsed [B, S, D] = sum_j pre_j X_j in the streams' dtype; post [B, S, N]; comb [B, S, N, N], used transposed. Both
    coefficients are at least float32.
  """
  run = pick("hyper_connections.collapse", implementation, {"reference": reference.collapse, "blockwise": blockwise.collapse})
  return run(streams, fn, base, scale, norm_eps=norm_eps, eps=eps, iterations=iterations)


def expand(streams: jax.Array, update: jax.Array, post: jax.Array, comb: jax.Array, *, implementation: str = "auto") -> jax.Array:
  """New streams X'_k = post_k * update + sum_j comb[j, k] X_j.

  Args:
    streams: [B, S, N, D]; update: [B, S, D], the sublayer's output; post [B, S, N] and comb [B, S, N, N] of `collapse`.

  Returns:
    [B, S, N, D] in the streams' dtype.
  """
  run = pick("hyper_connections.expand", implementation, {"reference": reference.expand, "blockwise": blockwise.expand})
  return run(streams, update, post, comb)
