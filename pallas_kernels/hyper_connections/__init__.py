"""Manifold-constrained hyper-connections (report 2.2, eqs. 1-8): coefficients with Sinkhorn, collapse, and the mix of the
streams.

What may not live here: the sublayers between a collapse and an expansion, and what the streams begin with.
"""

from __future__ import annotations

import functools

import jax

from pallas_kernels import arguments, pick
from pallas_kernels.hyper_connections import blockwise, kernel, reference


def _pick(name: str, implementation: str):
  run = getattr(kernel, name)
  available = {"reference": getattr(reference, name), "blockwise": getattr(blockwise, name),
               **{form: functools.partial(run, interpret=form == "interpret") for form in ("pallas", "interpret")}}
  return pick(f"hyper_connections.{name}", implementation, available)


def _check_streams(op: str, streams: jax.Array, update: jax.Array, post: jax.Array, comb: jax.Array) -> None:
  arguments.check(op, streams=(streams, "B S N D"), update=(update, "B S D"), post=(post, "B S N"), comb=(comb, "B S N N"))


def _check_coefficients(op: str, streams: jax.Array, fn: jax.Array, base: jax.Array, scale: jax.Array,
                        iterations: int) -> None:
  arguments.check(op, streams=(streams, "B S N D"))
  n, d = streams.shape[2:]
  arguments.check(op, fn=(fn, f"{n * d} {(2 + n) * n}"), base=(base, f"{(2 + n) * n}"), scale=(scale, "3"))
  arguments.check_number(op, "iterations", iterations, 1)


def collapse(streams: jax.Array, fn: jax.Array, base: jax.Array, scale: jax.Array, *, norm_eps: float, eps: float,
             iterations: int, implementation: str = "auto") -> tuple[jax.Array, jax.Array, jax.Array]:
  """The sublayer's input and the coefficients with which its output returns to the streams.

  Args:
    streams: [B, S, N, D] residual streams, floating.
    fn: [N * D, (2 + N) N] projection, columns pre, post, res (row-major); base [(2 + N) N]; scale [3]; floating.
    norm_eps: of the weightless RMS norm over all streams together.
    eps: added to pre, to the first softmax and to every Sinkhorn denominator.
    iterations: Sinkhorn rounds; the last step normalises columns.

  Returns:
    collapsed [B, S, D] = sum_j pre_j X_j in the streams' dtype; post [B, S, N]; comb [B, S, N, N], used transposed. Both
    coefficients are at least float32.

  Raises:
    NotImplementedError: a kernel on a chip without tile sizes, or with more than five streams.
    ValueError: arrays that do not fit together.
  """
  _check_coefficients("collapse", streams, fn, base, scale, iterations)
  run = _pick("collapse", implementation)
  return run(streams, fn, base, scale, norm_eps=norm_eps, eps=eps, iterations=iterations)


def expand(streams: jax.Array, update: jax.Array, post: jax.Array, comb: jax.Array, *,
           implementation: str = "auto") -> jax.Array:
  """New streams X'_k = post_k * update + sum_j comb[j, k] X_j.

  Args:
    streams: [B, S, N, D]; update: [B, S, D], the sublayer's output; both floating. post [B, S, N] and comb [B, S, N, N]: of
      `collapse`.

  Returns:
    [B, S, N, D] in the streams' dtype.

  Raises:
    NotImplementedError: a kernel on a chip without tile sizes, or with more than five streams.
    ValueError: arrays that do not fit together.
  """
  _check_streams("expand", streams, update, post, comb)
  return _pick("expand", implementation)(streams, update, post, comb)


def expand_collapse(streams: jax.Array, update: jax.Array, post: jax.Array, comb: jax.Array, fn: jax.Array, base: jax.Array,
                    scale: jax.Array, *, norm_eps: float, eps: float, iterations: int,
                    implementation: str = "auto") -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """`expand`, then the next sublayer's `collapse` of what it returns; as a kernel both read the streams once.

  Args:
    streams, update, post, comb: see `expand`.
    fn, base, scale, norm_eps, eps, iterations: the next sublayer's, see `collapse`.

  Returns:
    new streams [B, S, N, D]; of them collapsed [B, S, D], post [B, S, N], comb [B, S, N, N]; dtypes as of both.

  Raises:
    NotImplementedError: a kernel on a chip without tile sizes, or with more than five streams.
    ValueError: arrays that do not fit together.
  """
  _check_streams("expand_collapse", streams, update, post, comb)
  _check_coefficients("expand_collapse", streams, fn, base, scale, iterations)
  run = _pick("expand_collapse", implementation)
  return run(streams, update, post, comb, fn, base, scale, norm_eps=norm_eps, eps=eps, iterations=iterations)
