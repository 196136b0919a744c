"""What every room of bad input shares: a count of the programs that JAX compiles."""

import jax
import pytest

_COMPILED = []


@pytest.fixture(scope="session")
def compiled():
  """A list that grows by one with every program that is compiled, or read from the compilation cache, from now on."""
  if not _COMPILED:  # a listener cannot be taken away again
    _COMPILED.append("listening")
    jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: _COMPILED.append(event) if event.endswith("backend_compile_duration") else None)
  return _COMPILED
