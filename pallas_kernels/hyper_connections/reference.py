"""mHC as the formulas stand (report 2.2, eqs. 1-8; the release's order: softmax + eps, column, then (row, column) x
(iterations - 1)).

Axis letters: B batch   S sequence   N streams   D hidden size
Dtypes: streams and updates any floating one, which collapsed streams and new ones keep; fn, base and scale floating;
        post, comb and all sums float32 or wider.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sinkhorn(logits_NN: jax.Array, *, iterations: int, eps: float) -> jax.Array:
  """[..., N, N] logits -> positive matrices whose columns sum to 1 (within eps) and whose rows nearly do."""
  comb = jax.nn.softmax(logits_NN, -1) + eps
  comb = comb / (comb.sum(-2, keepdims=True) + eps)

  def round_(_, comb):
    comb = comb / (comb.sum(-1, keepdims=True) + eps)
    return comb / (comb.sum(-2, keepdims=True) + eps)

  return jax.lax.fori_loop(0, iterations - 1, round_, comb)


def collapse(streams_BSND: jax.Array, fn: jax.Array, base: jax.Array, scale: jax.Array, *, norm_eps: float, eps: float,
             iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `pallas_kernels.hyper_connections.collapse`."""
  exact = jnp.promote_types(streams_BSND.dtype, jnp.float32)
  x_BSND = streams_BSND.astype(exact)
  n = x_BSND.shape[2]
  flat = x_BSND.reshape(*x_BSND.shape[:2], -1)
  flat = flat * jax.lax.rsqrt((flat * flat).mean(-1, keepdims=True) + norm_eps)
  u = jnp.matmul(flat, fn.astype(exact), precision="highest")
  pre_BSN = jax.nn.sigmoid(u[..., :n] * scale[0] + base[:n]) + eps
  post_BSN = 2 * jax.nn.sigmoid(u[..., n:2 * n] * scale[1] + base[n:2 * n])
  logits = (u[..., 2 * n:] * scale[2] + base[2 * n:]).reshape(*u.shape[:-1], n, n)
  comb_BSNN = sinkhorn(logits, iterations=iterations, eps=eps)
  return jnp.einsum("BSN,BSND->BSD", pre_BSN, x_BSND, precision="highest").astype(streams_BSND.dtype), post_BSN, comb_BSNN


def expand(streams_BSND: jax.Array, update_BSD: jax.Array, post_BSN: jax.Array, comb_BSNN: jax.Array) -> jax.Array:
  """See `pallas_kernels.hyper_connections.expand`."""
  exact = comb_BSNN.dtype
  mixed = jnp.einsum("BSjk,BSjD->BSkD", comb_BSNN, streams_BSND.astype(exact), precision="highest")
  return (post_BSN[..., None] * update_BSD[:, :, None].astype(exact) + mixed).astype(streams_BSND.dtype)


def expand_collapse(streams_BSND: jax.Array, update_BSD: jax.Array, post_BSN: jax.Array, comb_BSNN: jax.Array,
                    fn: jax.Array, base: jax.Array, scale: jax.Array, *, norm_eps: float, eps: float, iterations: int
                    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """See `pallas_kernels.hyper_connections.expand_collapse`."""
  new_BSND = expand(streams_BSND, update_BSD, post_BSN, comb_BSNN)
  return new_BSND, *collapse(new_BSND, fn, base, scale, norm_eps=norm_eps, eps=eps, iterations=iterations)
