"""The learning rate in closed form."""

import math

import jax
import numpy as np
import pytest

from deepseek_v4.config import OptimizerConfig
from deepseek_v4.optim import decay_start, make_schedule


def closed_form(count, peak, warmup, decay, final, steps):
  if count + 1 < warmup:
    return peak * (count + 1) / warmup
  if count < steps - decay:
    return peak
  progress = min((count + 1 - (steps - decay)) / decay, 1)
  return peak * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)


@pytest.mark.parametrize("warmup, decay, steps", [(4, 6, 20), (0, 5, 9), (3, 0, 7), (5, 5, 10)])
def test_warm_up_constant_cosine(warmup, decay, steps):
  config = OptimizerConfig(learning_rate=2e-3, warmup_steps=warmup, decay_steps=decay, final_fraction=0.1)
  counts = np.arange(steps + 3)
  got = jax.jit(jax.vmap(make_schedule(config, steps)))(counts)
  assert got.dtype == np.float32
  if decay == 0:
    counts = counts[:steps]  # nothing ends
  want = [closed_form(count, 2e-3, warmup, decay, 0.1, steps) for count in counts]
  np.testing.assert_allclose(got[:len(want)], want, rtol=2e-6)


def test_ends_and_corners():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay_steps=6, final_fraction=0.1)
  schedule = make_schedule(config, 20)
  assert [float(schedule(i)) for i in (0, 3, 13)] == [0.25, 1.0, 1.0]
  assert float(schedule(14)) < 1
  np.testing.assert_allclose([schedule(19), schedule(1000)], 0.1, rtol=1e-6)


def test_decay_start_is_the_first_update_below_the_peak():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay_steps=6)
  assert decay_start(config, 20) == 14
  assert decay_start(OptimizerConfig(warmup_steps=4, decay_steps=0), 20) == 20


def test_refusals():
  with pytest.raises(ValueError, match=r"warmup_steps \+ optimizer.decay_steps = 11.*steps = 10"):
    make_schedule(OptimizerConfig(warmup_steps=5, decay_steps=6), 10)
  with pytest.raises(ValueError, match="steps = None.*decay_steps = 6"):
    make_schedule(OptimizerConfig(decay_steps=6))
  assert float(make_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=0))(10**6)) == 0.5
