"""The table of names: complete, bit-exact both ways, the right element in the right place, all errors at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_v4.checkpoint import hf_names
from deepseek_v4.checkpoint.hf_trees import from_hf_names, to_hf_names
from deepseek_v4.checkpoint.trees import flatten, restack
from deepseek_v4.config import ModelConfig
from pallas_kernels.grouped_matmul import expert_mlp


def without_mtp(config):
  return dataclasses.replace(config, num_nextn_predict_layers=0)


def test_the_table_has_every_leaf_once_with_its_shape(tiny):
  by_hand = {path: tuple(shape) for path, shape in flatten(tiny.variable_shapes(tiny.config)).items()}
  table = [(leaf.path, leaf.shape) for leaf in hf_names.leaves(tiny.config)]
  assert len(table) == len(dict(table))
  assert dict(table) == by_hand


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("form", ["hf", "release"])
def test_there_and_back_is_bit_exact(tiny, equal, form, scan):
  config = tiny.config if form == "release" else without_mtp(tiny.config)
  config = dataclasses.replace(config, scan_layers=scan)
  variables = tiny.variables(config)
  named = to_hf_names(restack(variables, config, scan), config, form)
  back = from_hf_names(named, config)
  assert equal(back, restack(variables, config, scan))
  again = to_hf_names(back, config, form)
  assert list(again) == list(named)
  assert all(np.array_equal(x, again[n]) and x.dtype == again[n].dtype for n, x in named.items())


def test_flash_has_as_many_tensors_as_its_release():
  names = [leaf.release for leaf in hf_names.leaves(ModelConfig())]  # the defaults are V4-Flash
  experts = {n for n in names if "{e}" in n}
  assert len(experts) * 256 == 33792  # I8 tensors
  assert len(set(names) - experts) == 433 + 417 + 375 + 3  # BF16, F32, F8_E4M3, I64; scales not counted


def test_where_single_elements_go(tiny):
  c = tiny.config
  variables = tiny.variables(c)
  hf, release = to_hf_names(variables, c, "hf"), to_hf_names(variables, c, "release")
  layer = variables["params"]["layers"]["layer_01"]  # CSA
  att, d = layer["attention"], c.head_dim
  assert hf["model.layers.1.self_attn.q_b_proj.weight"][2 * d + 5, 3] == att["q_b"][3, 2, 5]
  assert release["layers.1.attn.wo_a.weight"][1 * c.o_lora_rank, 7] == att["o_a"][1, 7, 0]
  # series 0 (of the previous window) is the first half of the output channels
  assert hf["model.layers.1.self_attn.compressor.kv_proj.weight"][4, 6] == att["compressor"]["kv"][0, 6, 4]
  assert release["layers.1.attn.compressor.wgate.weight"][d + 4, 6] == att["compressor"]["gate"][1, 6, 4]
  assert release["layers.1.attn.compressor.ape"][1, d + 3] == att["compressor"]["position_bias"][1, 1, 3]
  assert release["layers.1.attn.indexer.compressor.ape"][0, 3] == att["indexer"]["compressor"]["position_bias"][0, 0, 3]
  fn, n = hf["model.layers.1.attn_hc.fn"], c.hc_mult
  assert fn.shape == ((2 + n) * n, n * c.hidden_size)
  assert fn[1, 9] == layer["attn_hc"]["fn_pre"][9, 1] and fn[n, 9] == layer["attn_hc"]["fn_post"][9, 0]
  assert fn[2 * n + 3, 9] == layer["attn_hc"]["fn_res"][9, 3]
  experts, f = layer["moe"]["experts"], c.moe_intermediate_size
  packed = hf["model.layers.1.mlp.experts.gate_up_proj"]
  assert packed[2, 5, 1] == experts["gate"][2, 1, 5] and packed[2, f + 5, 1] == experts["up"][2, 1, 5]
  assert release["layers.1.ffn.experts.2.w1.weight"][5, 1] == experts["gate"][2, 1, 5]
  assert release["layers.1.ffn.experts.2.w3.weight"][5, 1] == experts["up"][2, 1, 5]
  assert release["layers.1.ffn.experts.2.w2.weight"][1, 5] == experts["down"][2, 5, 1]
  assert release["head.weight"][20, 3] == variables["params"]["lm_head"]["kernel"][3, 20]
  assert release["mtp.0.e_proj.weight"][1, 2] == variables["params"]["mtp"]["embed_proj"][2, 1]
  assert release["mtp.0.hc_head_fn"][1, 4] == variables["params"]["mtp"]["hc_head"]["fn"][4, 1]
  assert release["mtp.0.attn.wq_a.weight"][1, 2] == variables["params"]["mtp"]["block"]["attention"]["q_a"][2, 1]
  assert hf["model.layers.0.mlp.gate.tid2eid"].dtype == np.int64
  assert not any(name.startswith("mtp") for name in hf)


def test_gate_and_up_are_not_exchanged(tiny):
  """CHECKS A10.6: w1 = 1, w3 = 2 and x = 1 make silu(1) * 2 = 1.462117 before the down projection; exchanged, 1.761594."""
  config = tiny.config
  named = dict(to_hf_names(restack(tiny.variables(config), config, True), config, "release"))
  for name, x in named.items():
    for part, number in (("w1", 1), ("w3", 2), ("w2", 1)):
      if f".{part}." in name:  # one channel in, one between, one out
        named[name] = np.zeros_like(x)
        named[name][0, 0] = number
  experts = from_hf_names(named, config)["params"]["layers"]["layer_00"]["moe"]["experts"]
  one = np.zeros((config.n_routed_experts, config.hidden_size), np.float32)
  one[:, 0] = 1  # a row for each expert
  for implementation in ("reference", "blockwise"):
    out = expert_mlp(jnp.asarray(one), *(experts[name] for name in ("gate", "up", "down")), jnp.ones(len(one), jnp.int32),
                     tile=1, limit=10.0, implementation=implementation)
    np.testing.assert_allclose(out[:, 0], 1.462117, atol=1e-6)


def test_gradients_and_moments(tiny):
  c = tiny.config
  params = jax.tree.map(jnp.asarray, restack(tiny.variables(c)["params"], c, True))
  named = to_hf_names(params, c)
  assert "model.layers.1.mlp.gate.weight" in named and not any("bias" in n.split(".")[-1][:6] for n in named)
  moments = jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(jnp.bfloat16) if "attention" in jax.tree_util.keystr(path) else optax.MaskedNode(), params)
  assert set(to_hf_names(moments, c)) == {n for n in named if "self_attn" in n}
  assert to_hf_names(moments, c)["model.layers.0.self_attn.sinks"].dtype == jnp.bfloat16
  params["layers"]["layer_00"]["attn_hc"]["fn_pre"] = optax.MaskedNode()
  with pytest.raises(ValueError, match="model.layers.0.attn_hc.fn: expected all or none of .*fn_pre"):
    to_hf_names(params, c)


def test_a_tree_that_does_not_fit_is_refused_whole(tiny):
  variables = tiny.variables(tiny.config)
  layer = variables["params"]["layers"]["layer_02"]
  layer["attention"]["extra"] = layer["attention"].pop("q_a")
  layer["attn_norm"]["scale"] = np.zeros(3, np.float32)
  with pytest.raises(ValueError) as error:
    to_hf_names(variables, tiny.config)
  assert all(text in str(error.value) for text in (
    "missing (1): params/layers/layer_02/attention/q_a", "unexpected (1): params/layers/layer_02/attention/extra",
    "wrong shape (1): params/layers/layer_02/attn_norm/scale (3,), expected (8,)"))
  with pytest.raises(ValueError, match="form = 'torch': expected one of 'hf', 'release'"):
    to_hf_names(variables, tiny.config, "torch")


def test_all_problems_of_a_mapping_in_one_error(tiny):
  c = tiny.config
  named = to_hf_names(tiny.variables(c), c, "release")
  del named["layers.3.attn.wq_a.weight"], named["layers.3.ffn.experts.1.w2.weight"]
  named["layers.9.attn.wq_a.weight"] = np.zeros((5, 8), np.float32)
  named["norm.weight"] = np.zeros(9, np.float32)
  named["layers.0.ffn.gate.tid2eid"] = np.zeros((29, 2), np.int64)
  with pytest.raises(ValueError) as error:
    from_hf_names(named, c)
  text = str(error.value)
  assert "missing (2): layers.3.attn.wq_a.weight, layers.3.ffn.experts.1.w2.weight" in text
  assert "unexpected (1): layers.9.attn.wq_a.weight" in text
  assert "wrong shape (1): norm.weight (9,), expected (8,)" in text
  assert "hash table (1): layers.0.ffn.gate.tid2eid is all zeros" in text


@pytest.mark.parametrize("change, message", [
  (lambda t: t.fill(3), "ids from 3 to 3, expected 0 to n_routed_experts - 1 = 2"),
  (lambda t: t.fill(-1), "ids from -1 to -1"),
])
def test_hash_tables_out_of_range(tiny, change, message):
  named = to_hf_names(tiny.variables(tiny.config), tiny.config, "release")
  change(named["layers.0.ffn.gate.tid2eid"])
  with pytest.raises(ValueError, match=message):
    from_hf_names(named, tiny.config)


def test_without_the_mtp_block(tiny, equal):
  c = tiny.config
  variables = tiny.variables(c)
  hf, release = to_hf_names(variables, c, "hf"), to_hf_names(variables, c, "release")
  with pytest.raises(ValueError, match=r"dataclasses.replace\(config, num_nextn_predict_layers=0\)"):
    from_hf_names(hf, c)
  # transformers' names beside released ones for the block that transformers does not know
  both = {**hf, **{n: x for n, x in release.items() if n.startswith("mtp.")}}
  assert equal(from_hf_names(both, c), restack(variables, c, True))
  main = from_hf_names(release, without_mtp(c))
  del variables["params"]["mtp"], variables["router"]["mtp"]
  assert equal(main, restack(variables, c, True))


def test_names_that_only_look_right(tiny):
  named = to_hf_names(tiny.variables(tiny.config), tiny.config, "release")
  scaled = {**named, "layers.1.attn.wq_a.scale": np.ones((1, 1), np.uint8), "norm.scale": np.ones((1, 1), np.uint8)}
  with pytest.raises(ValueError, match=r"extra scale \(2\): layers.1.attn.wq_a.scale, norm.scale"):
    from_hf_names(scaled, tiny.config)
  mixed = {n.replace("layers.", "model.layers."): x for n, x in named.items()}
  with pytest.raises(ValueError, match="save_original_format=False"):
    from_hf_names(mixed, tiny.config)


def test_restack_both_ways(tiny, equal):
  c = tiny.config
  variables = tiny.variables(c)
  scanned = restack(variables, c, True)
  assert set(scanned["params"]["layers"]) == {"layer_00", "unit_0", "unit_1", "layer_05"}
  unit = scanned["params"]["layers"]["unit_0"]["attention"]["q_a"]
  assert np.array_equal(unit[1], variables["params"]["layers"]["layer_03"]["attention"]["q_a"])
  assert equal(restack(scanned, c, False), variables) and equal(restack(scanned, c, True), scanned)
  assert equal(restack(variables["params"], c), scanned["params"])
  del scanned["params"]["layers"]["unit_1"]
  with pytest.raises(ValueError, match="unit_1"):
    restack(scanned, c, False)
