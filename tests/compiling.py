"""How tests compile what they jit themselves: much is compiled and little computed."""

import functools

import jax


@functools.cache
def fast_options():
  """Compiler options: XLA's older CPU emitter, where there is one (jax 0.10), makes the same program in 50 to 85% of the
  time. It knows no FP8, so that it cannot be the choice for all tests."""
  options = {"xla_cpu_use_fusion_emitters": False}
  try:
    jax.jit(lambda: 0).lower().compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if "No such compile option" not in str(error):
      raise
    return {}
  return options


def jit(function):
  """`jax.jit`, compiled so."""
  return jax.jit(function, compiler_options=fast_options())
