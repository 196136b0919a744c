"""Operations of V4 that deserve a kernel, each with three implementations behind one signature.

    reference   the formula in plain jnp, quadratic memory, to be read beside the paper
    blockwise   plain JAX for any backend, linear memory, written gradients
    pallas      TPU kernels (also "interpret": the kernel's own code on any backend)

What lives here: arrays and integers in, arrays out. What may not: configs, parameters, flax, anything of `deepseek_v4`.
"""

IMPLEMENTATIONS = ("reference", "blockwise", "pallas", "interpret")


def default_implementation() -> str:
  """What "auto" means when a model is built: the fastest implementation that exists for every op on every backend."""
  return "blockwise"


def resolve(implementation: str) -> str:
  """"auto" -> the default; a known name -> itself.

  Raises:
    ValueError: a name that is none of `IMPLEMENTATIONS`.
  """
  if implementation == "auto":
    return default_implementation()
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"kernels = {implementation!r}: expected auto, {', '.join(IMPLEMENTATIONS)}")
  return implementation


def pick(op: str, implementation: str, available: dict):
  """The implementation that insists or raises with the reason.

  Raises:
    ValueError: an unknown name.
    NotImplementedError: a known one that this op does not have.
  """
  implementation = resolve(implementation)
  if implementation not in available:
    raise NotImplementedError(f"{op}: there is no {implementation!r} implementation yet; it has {', '.join(available)}")
  return available[implementation]
