"""How modules get their parameters: one initial distribution (V3 4.2), the compute dtype, and the layout that a matmul
wants."""

from __future__ import annotations

from typing import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.config import ModelConfig


def matrix(module: nn.Module, config: ModelConfig, name: str, shape: tuple[int, ...],
           prepared: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
  """A float32 parameter of this shape, normal with `config.init_std`, cast to `config.compute_dtype` and gathered for use.

  `prepared` stands for the cast: what becomes of the parameter, part by part, before it is gathered.
  """
  weight = module.param(name, nn.initializers.normal(config.init_std), shape, jnp.float32)
  weight = jnp.asarray(weight, config.compute_dtype) if prepared is None else prepared(weight)
  return sharding.gathered(weight, (*module.path, name))


def exact(module: nn.Module, config: ModelConfig, name: str, shape: tuple[int, ...],
          init: Callable | None = None) -> jax.Array:
  """A parameter of this shape that is used in float32 (or wider): norms, sinks, biases, the router's gate, mHC
  coefficients."""
  init = nn.initializers.normal(config.init_std) if init is None else init
  weight = module.param(name, init, shape, jnp.float32)
  return sharding.gathered(jnp.asarray(weight, exact_dtype(config)), (*module.path, name))


def exact_dtype(config: ModelConfig) -> jnp.dtype:
  """At least float32: the precision of norms, scores, statistics and losses."""
  return jnp.promote_types(config.compute_dtype, jnp.float32)


def check_dtype(config: ModelConfig) -> None:
  """Refuses a compute dtype that JAX would silently narrow.

  Raises:
    ValueError: float64 without `jax_enable_x64`.
  """
  if jax.dtypes.canonicalize_dtype(config.compute_dtype) != jnp.dtype(config.compute_dtype):
    raise ValueError(f"compute_dtype = {config.compute_dtype!r}: expected jax_enable_x64 = True beside it, or float32")
