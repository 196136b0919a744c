"""Operations of V4 that deserve a kernel, each with several implementations behind one signature.

    reference   the formula in plain jnp, quadratic memory, to be read beside the paper
    blockwise   plain JAX for any backend, linear memory, written gradients
    pallas      the form for a TPU: a kernel, or plain XLA at the shapes where `forms.py` of an op says that it wins
    interpret   the kernels' own code on any backend

Dtypes: unless said, floating arrays are float32, bfloat16 or float64 (the TPU kernels: the first two) and sums are at least
float32; positions, documents and numbers of entries and experts are int32.
Sources, as docstrings name them: "report" is DeepSeek-V4's (arXiv 2606.19348), "V3.2" its predecessor's (2512.02556), "mHC"
the paper on hyper-connections (2512.24880).

What lives here: arrays and integers in, arrays out. What may not: configs, parameters, flax, anything of `deepseek_v4`.
"""

from __future__ import annotations

from typing import Any, Callable

import jax

IMPLEMENTATIONS = ("reference", "blockwise", "pallas", "interpret")


def default_implementation() -> str:
  """What "auto" means on the default backend at the time of the call: the kernels on TPU, plain JAX elsewhere.

  The backend decides and not the chip: on a TPU for which the kernels have no tile sizes they say so.
  """
  return "pallas" if jax.default_backend() == "tpu" else "blockwise"


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


def pick(op: str, implementation: str, available: dict) -> Callable[..., Any]:
  """The implementation that insists or raises with the reason.

  Raises:
    ValueError: an unknown name.
    NotImplementedError: a known one that this op does not have.
  """
  implementation = resolve(implementation)
  if implementation not in available:
    raise NotImplementedError(f"{op}: there is no {implementation!r} implementation; it has {', '.join(available)}")
  return available[implementation]
