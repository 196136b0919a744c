"""Training steps against FP4: they learn, with float32 masters beneath, and are not those of a run without."""

import dataclasses

import jax
import numpy as np
import pytest

from deepseek_v4.config import CSA, LEARNED
from tests.model import numpy_model
from tests.training.small import MODEL, RUN, Step, leaves, random_batch, random_state

SHALLOW = dataclasses.replace(MODEL, num_hidden_layers=1, layer_types=(CSA,), mlp_layer_types=(LEARNED,),
                              num_nextn_predict_layers=0)


@pytest.mark.long
def test_steps_descend_on_float32_masters():
  found = {}
  for qat in (None, "fp4"):
    run = dataclasses.replace(RUN, model=dataclasses.replace(SHALLOW, qat=qat))
    step, state, batch, losses = Step(run), random_state(run), random_batch(), []
    for _ in range(5):
      state, metrics = step(jax.device_get(state), batch)
      losses.append({name: float(metrics[name]) for name in ("next_token", "indexer")})
    found[qat] = losses
    for losses_of in zip(*(loss.values() for loss in losses)):
      assert losses_of[-1] < losses_of[0], qat
  assert abs(found["fp4"][0]["next_token"] - found[None][0]["next_token"]) > 1e-4
  assert found["fp4"][0]["indexer"] != found[None][0]["indexer"]
  masters = np.asarray(next(x for name, x in leaves(state.params).items() if name.endswith("experts/gate")))
  assert masters.dtype == np.float32
  tiles = np.swapaxes(masters, -1, -2)
  assert (numpy_model.rounded(tiles, "index") != tiles).mean() > 0.5  # the masters themselves are not rounded
