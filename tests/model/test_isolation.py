"""The indexer and the rest of the model have losses of their own: neither trains the other, exactly (report 2.3.1)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, LEARNED
from deepseek_v4.model.losses import next_token_targets
from tests.model.small import T0, random_tokens, random_variables
from tests.training.small import leaves

# One layer is enough: what its indexer reads comes from the embedding, the mixing before it and the query's matrix.
SHALLOW = dataclasses.replace(T0, num_hidden_layers=1, layer_types=(CSA,), mlp_layer_types=(LEARNED,), hc_mult=2)


@pytest.mark.parametrize("attention_mode", ["dense", "sparse"])
def test_no_loss_trains_what_is_not_its_own(attention_mode):
  """Not small: zero. What the losses do train is not zero, so that the gradients say something. The prediction block, which
  has no indexer, takes part in one of the modes."""
  config = dataclasses.replace(SHALLOW, num_nextn_predict_layers=int(attention_mode == "sparse"))
  variables, tokens = random_variables(config), jnp.asarray(random_tokens(1, 24))

  def total(params, of_indexer, of_others):
    ones = jnp.ones_like(tokens)
    found = dsv4.DeepseekV4(config, "blockwise").apply(
      {**variables, "params": params}, tokens, targets=next_token_targets(tokens, ones, ones),
      attention_mode=attention_mode).losses
    assert len(found) == 3 + config.num_nextn_predict_layers
    return of_indexer * found.pop("indexer")[0] + of_others * sum(pair[0] for pair in found.values())

  gradient = jax.jit(jax.grad(total))  # one program, in which a loss counts or does not
  of_indexer, of_others = (leaves(jax.device_get(gradient(variables["params"], *weights)))
                           for weights in ((1.0, 0.0), (0.0, 1.0)))
  belongs = {name: "indexer" in name.split("/") for name in of_indexer}
  assert sum(belongs.values()) >= 5 and sum(not x for x in belongs.values()) > 20
  wrong = [name for name, own in belongs.items() if np.any((of_others if own else of_indexer)[name])]
  assert not wrong
  silent = [name for name, own in belongs.items() if not np.any((of_indexer if own else of_others)[name])]
  assert not [name for name in silent if belongs[name]] and len(silent) < 4, silent
