"""FP4 quantisation-aware training: the numbers against NumPy, the gradient, the whole model, meshes, export and decoding."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.config import CSA, LEARNED, SLIDING
from deepseek_v4.model import quantize
from deepseek_v4.model.experts import Experts
from deepseek_v4.model.losses import next_token_targets
from tests.model import numpy_model
from tests.model.small import T0, abstract_variables, equations, random_tokens, random_variables

QAT = dataclasses.replace(T0, qat="fp4")
# One whole block of 32 and a part of one along every input axis; two blocks of index channels.
WIDE = dataclasses.replace(
  QAT, num_hidden_layers=1, layer_types=(CSA,), mlp_layer_types=(LEARNED,), hidden_size=48, moe_intermediate_size=40,
  csa_compress_rate=2, index_head_dim=64, num_nextn_predict_layers=0)
IDS = random_tokens(2, 19, seed=4)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def fp4(x):
  """What FP4 makes of weights [..., in, out], from the bit fields of its codes."""
  return np.swapaxes(numpy_model.rounded(np.swapaxes(np.asarray(x), -1, -2), "index"), -1, -2)


def round_experts(tree, make=fp4):
  """A tree with `make` of every routed expert's weights."""
  return jax.tree_util.tree_map_with_path(lambda path, x: make(x).astype(x.dtype) if any(
    getattr(p, "key", "") == "experts" for p in path) else x, tree)


def same(found, want, dtype=np.float32):
  """Equal to the last bit, signs of zeros included."""
  found = np.asarray(found)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found.astype(np.float64), want)
  np.testing.assert_array_equal(np.signbit(found.astype(np.float32)), np.signbit(want))


AS_USED = {dtype: jax.jit(functools.partial(quantize.expert_weights, dataclasses.replace(QAT, compute_dtype=dtype)))
           for dtype in ("float32", "bfloat16")}


# ---- numbers ----------------------------------------------------------------------------------------------------------
def test_all_codes_ties_and_borders_along_the_input_axis():
  """By hand: tiles of 32 rows; a column for every code, tie (to the even code), and number just beside a tie."""
  ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}  # halfway -> the code that ends in 0
  cases = [(v, v) for v in E2M1] + list(ties.items())
  for low, high, tie in zip(E2M1, E2M1[1:], ties):
    cases += [(np.nextafter(np.float32(tie), np.float32(0)), low), (np.nextafter(np.float32(tie), np.float32(9)), high)]
  x, want = (np.array(side, np.float32) for side in zip(*[(s * a, s * b) for a, b in cases for s in (1, -1)]))
  for exponent in (-100, -3, 0, 7):
    tile = np.zeros((64, len(x)), np.float32)
    tile[3], tile[17], tile[40] = 6, x, 2.0**-20  # 6 decides the scale; the next tile of 32 has its own
    found = np.asarray(AS_USED["float32"](tile * np.float32(2.0**exponent)))
    same(found[17], want * 2.0**exponent)
    same(found[40], np.full(len(x), 2.0 ** (exponent - 20)))
    assert not found[[0, 31, 32, 63]].any()


@pytest.mark.parametrize("largest, scale", [
  (6.0, 0), (np.nextafter(np.float32(6), np.float32(9)), 1), (3.0, -1), (np.nextafter(np.float32(3), np.float32(9)), 0),
  (4.0, 0), (6 * 2.0**-126, -126), (2.0**-126, -126), (6 * 2.0**100, 100)])
def test_borders_of_scales(largest, scale):
  """amax / 6 exactly a power of two is the scale, one bit more doubles it; it never falls below 2^-126. Told by a number
  that becomes another one with any other scale: 1.25 scales is a tie of this scale and none of the neighbours'."""
  tile = np.zeros((32, 1), np.float32)
  tile[0], tile[1] = largest, 1.25 * 2.0**scale if 1.25 * 2.0**scale <= largest else 0
  found = np.asarray(AS_USED["float32"](tile))
  assert found[0, 0] == fp4(tile)[0, 0] and abs(found[0, 0]) <= 6 * 2.0**scale
  if tile[1]:
    assert found[1, 0] == 2.0**scale


@pytest.mark.parametrize("shape", [(1, 3), (31, 2), (32, 2), (3, 48, 5), (2, 2, 200, 3)])
def test_shapes_dtypes_zeros_and_rounding_again(shape):
  rng = np.random.default_rng(len(shape))
  x = (rng.normal(size=shape) * np.exp(4 * rng.normal(size=shape))).astype(np.float32)
  x[..., 0] = 0
  x[..., 1:2] *= -1
  for dtype, exact in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
    found = AS_USED[dtype](x)
    same(found, fp4(x), exact)  # the same numbers in bfloat16: rounded once, from float32
  same(AS_USED["float32"](found.astype(np.float32)), np.asarray(found, np.float64))


def test_the_gradient_goes_straight_through():
  """Identity, whatever becomes of the number: at ties, at zero, in a tile of zeros, at the largest."""
  x = np.array([[0.0], [0.25], [6.0], [-5.0], [1e-6], [7.0]], np.float32) * np.ones((6, 5), np.float32)
  g = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
  _, pull = jax.vjp(AS_USED["float32"], x)
  same(pull(g)[0], g)
  half = g.astype(ml_dtypes.bfloat16)
  same(jax.vjp(AS_USED["bfloat16"], x)[1](half)[0], half)
  same(jax.vjp(quantize.round_index, x)[1](g)[0], g)
  second = jax.grad(lambda x: (AS_USED["float32"](x) ** 2).sum())(x)
  same(second, 2 * fp4(x))
  plain = functools.partial(quantize.expert_weights, T0)
  np.testing.assert_array_equal(plain(x), x)  # without the setting nothing is rounded


# ---- experts ----------------------------------------------------------------------------------------------------------
def experts_of(config, kernels):
  """(weights, x, picks, weights of picks) -> output, of routed experts alone."""
  return lambda matrices, *args: Experts(config, kernels).apply({"params": matrices}, *args)


def expert_inputs(config, rows, seed=0):
  rng = np.random.default_rng(seed)
  e, d, f, k = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  matrices = {"gate": normal(e, d, f), "up": normal(e, d, f), "down": normal(e, f, d)}
  picks = rng.random((rows, 4, e)).argsort(-1)[..., :k].astype(np.int32)
  return matrices, normal(rows, 4, d), picks, np.abs(normal(rows, 4, k))


@pytest.mark.parametrize("kernels", ["reference", "blockwise", "interpret"])
def test_every_implementation_uses_the_rounded_weights(kernels):
  """To the last bit what the op makes of weights rounded by NumPy; the masters get the rounded weights' gradient."""
  matrices, *rest = expert_inputs(WIDE, 2)
  rounded = {name: fp4(x).astype(np.float32) for name, x in matrices.items()}

  def run(config, matrices):
    out, pull = jax.vjp(lambda m: experts_of(config, kernels)(m, *rest), matrices)
    return out, *pull(jnp.cos(out))

  found, want = (jax.jit(functools.partial(run, config))(m) for config, m in (
    (WIDE, matrices), (dataclasses.replace(WIDE, qat=None), rounded)))
  jax.tree.map(np.testing.assert_array_equal, found, want)


def test_a_token_alone_rounds_only_its_experts():
  """Picks fewer than experts: the numbers are the same, and no [E, D, F] is rounded."""
  config = dataclasses.replace(WIDE, n_routed_experts=16)
  matrices, x, picks, scale = expert_inputs(config, 1)
  x, picks, scale = x[:, :1], picks[:, :1], scale[:, :1]
  rounded = {name: fp4(w).astype(np.float32) for name, w in matrices.items()}
  run, plain = (jax.jit(experts_of(c, "blockwise")) for c in (config, dataclasses.replace(config, qat=None)))
  np.testing.assert_array_equal(run(matrices, x, picks, scale), plain(rounded, x, picks, scale))
  program = jax.make_jaxpr(experts_of(config, "blockwise"))(matrices, x, picks, scale)
  largest = max(math.prod(v.aval.shape) for e in equations(program.jaxpr) for v in e.outvars)
  assert largest < 16 * 48 * 40


@pytest.mark.parametrize("sizes", [dict(tensor=4, fsdp=2), dict(expert=2, context=4), dict(fsdp=8)],
                         ids=lambda sizes: ",".join(sizes))
def test_meshes_that_cut_tiles(sizes):
  """48 input channels over 8 devices, 40 over 4: a tile of 32 lies on several; the numbers are those of one device."""
  mesh = sharding.make_mesh(c.MeshConfig(**({"data": 1} | sizes)), jax.devices())
  matrices, *_ = expert_inputs(WIDE, 2)
  shapes = {"moe": {"experts": matrices}}
  places = sharding.parameter_shardings({"layers": {"layer_00": shapes}}, mesh)["layers"]["layer_00"]["moe"]["experts"]
  run = jax.jit(lambda tree: jax.tree.map(AS_USED["float32"], tree), in_shardings=(places,), out_shardings=places)
  for name, found in run(jax.device_put(matrices, places)).items():
    same(found, fp4(matrices[name]))


# ---- the whole model --------------------------------------------------------------------------------------------------
@pytest.mark.long
def test_the_model_rounds_experts_and_the_indexer_and_nothing_else():
  """Equal to NumPy's network with rounded experts, index queries and keys; in float64, where no last bit decides."""
  config = dataclasses.replace(WIDE, num_nextn_predict_layers=1)
  variables = random_variables(config)
  want, _ = numpy_model.Network(config, round_experts(variables), ("index_keys", "index_queries"))(IDS)
  for name, other in (("experts", variables), ("index_keys", round_experts(variables))):
    places = [p for p in ("index_keys", "index_queries") if p != name]
    assert np.abs(numpy_model.Network(config, other, places)(IDS)[0] - want).max() > 1e-3, name
  with jax.enable_x64(True):
    model = dsv4.DeepseekV4(dataclasses.replace(config, compute_dtype="float64"), "blockwise")
    run = jax.jit(lambda v, ids: model.apply(v, ids).logits)
    np.testing.assert_allclose(run(variables, IDS), want, atol=1e-9)


@functools.cache
def with_losses(config, **options):
  """The training forward: (variables, tokens) -> (hidden states, losses)."""
  def run(variables, tokens):
    ones = jnp.ones_like(tokens)
    targets = next_token_targets(tokens, ones, ones)
    out = dsv4.DeepseekV4(config, "blockwise").apply(variables, tokens, targets=targets, **options)
    return out.hidden, out.losses
  return jax.jit(run)


def exported(config, folder):
  """(masters, what is read of their export): alike but for the experts, which the first has as float numbers.

  What else a release holds in FP8 is rounded by the export, in training not; here both have it as it is read.
  """
  masters = random_variables(dataclasses.replace(config, compute_dtype="float32"))
  dsv4.save_hf(masters, config, folder, "fp8+fp4", dtype="float32")
  read = jax.tree.map(np.asarray, dsv4.load_hf(folder, config))
  trained = jax.tree_util.tree_map_with_path(
    lambda path, old, new: old if any(getattr(p, "key", "") == "experts" for p in path) else new, masters, read)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained["params"], read["params"])
  assert max(jax.tree.leaves(moved)) > 0.01
  return trained, read


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_exported_weights_give_the_bits_of_the_training_forward(dtype, tmp_path):
  """Hidden states and all losses; float32 shows every bit."""
  config = dataclasses.replace(WIDE, compute_dtype=dtype)
  trained, read = exported(config, tmp_path / "release")
  run = with_losses(config)
  for found, want in zip(jax.tree.leaves(run(read, IDS)), jax.tree.leaves(run(trained, IDS)), strict=True):
    np.testing.assert_array_equal(found, want)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_exported_experts_need_no_rounding(dtype, tmp_path):
  """With every entry attended to, so that no indexer has a say, a model without the setting computes the same bits."""
  config = dataclasses.replace(WIDE, compute_dtype=dtype)
  trained, read = exported(config, tmp_path / "release")
  plain, qat = (with_losses(c, attention_mode="dense") for c in (dataclasses.replace(config, qat=None), config))
  np.testing.assert_array_equal(plain(read, IDS)[0], qat(trained, IDS)[0])


def test_a_release_with_the_setting_computes_what_training_computed(tmp_path):
  """From float32 masters to a folder and back, attention sparse: hidden states and losses to the last bit. A folder does not
  say that queries and keys of the indexer are rounded: `qat` has to be set again, or another loss comes out."""
  masters = random_variables(WIDE)
  dsv4.save_hf(masters, WIDE, tmp_path / "release", dtype="float32")
  found = c.ModelConfig.from_hf(tmp_path / "release")
  assert found.qat is None
  read = dsv4.load_hf(tmp_path / "release", dataclasses.replace(found, qat="fp4"))
  chunk = dict(loss_chunk_size=WIDE.loss_chunk_size)  # the order of sums, which is no part of a release
  (hidden, losses), want, (_, plain) = (with_losses(config)(variables, IDS) for config, variables in (
    (dataclasses.replace(found, qat="fp4", **chunk), read), (WIDE, masters), (dataclasses.replace(found, **chunk), read)))
  for x, y in zip(jax.tree.leaves((hidden, losses)), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(x, y)
  assert plain["indexer"][0] != losses["indexer"][0]


# Float64 leaves sums in another order no say; two rows' picks are fewer than eight experts.
DECODED = dataclasses.replace(WIDE, n_routed_experts=8, compute_dtype="float64")


@functools.cache
def decoder():
  """(storage, pieces of `IDS` along the sequence) -> logits of the pieces, one after another through a cache."""
  step = jax.jit(lambda v, cache, ids: (lambda out: (out.logits, out.cache))(
    dsv4.DeepseekV4(DECODED, "blockwise").apply(v, ids, cache=cache)))

  def run(storage, pieces):
    found, cache = [], dsv4.init_cache(DECODED, 2, 20, storage=storage)
    for ids in pieces:
      logits, cache = step(decoded_variables(), cache, ids)
      found.append(logits)
    return np.concatenate(found, 1)

  return run


@functools.cache
def decoded_variables():
  return random_variables(dataclasses.replace(DECODED, compute_dtype="float32"))


def test_decoding_is_the_training_forward():
  with jax.enable_x64(True):
    full = jax.jit(lambda v: dsv4.DeepseekV4(DECODED, "blockwise").apply(v, IDS).logits)(decoded_variables())
    np.testing.assert_allclose(decoder()("compute", np.split(IDS, IDS.shape[1], 1)), full, atol=1e-9)


@pytest.mark.long
def test_prefill_and_the_packed_cache():
  """Eleven tokens at once and the rest one by one; a mixed cache rounds keys too, and holds the same index keys."""
  pieces = np.split(IDS, [11, *range(12, IDS.shape[1])], 1)
  with jax.enable_x64(True):
    full = jax.jit(lambda v: dsv4.DeepseekV4(DECODED, "blockwise").apply(v, IDS).logits)(decoded_variables())
    np.testing.assert_allclose(decoder()("compute", pieces), full, atol=1e-9)
    np.testing.assert_allclose(decoder()("mixed", pieces), decoder()("mixed", [IDS]), atol=1e-9)


@pytest.mark.long
def test_layers_are_rounded_one_at_a_time():
  """With remat, scanned layers: nothing of the size of all layers' experts exists that is not there without rounding."""
  config = dataclasses.replace(
    WIDE, num_hidden_layers=6, layer_types=(CSA,) * 6, mlp_layer_types=(LEARNED,) * 6, n_routed_experts=5, remat="block")
  size = 6 * 5 * 48 * 40

  def large(config):
    def loss(params, variables):
      return with_losses(config)({**variables, "params": params}, IDS)[1]["next_token"][0]
    variables = abstract_variables(config)
    program = jax.make_jaxpr(jax.grad(loss))(variables["params"], variables)
    return sorted(str(v.aval) for e in equations(program.jaxpr) for v in e.outvars if math.prod(v.aval.shape) >= size)

  assert large(config) == large(dataclasses.replace(config, qat=None)) != []


# ---- settings ---------------------------------------------------------------------------------------------------------
def test_settings_that_do_not_go_together():
  with pytest.raises(ValueError, match="qat = 'fp8': expected one of None, 'fp4'"):
    dataclasses.replace(T0, qat="fp8")
  narrow = dataclasses.replace(T0, index_head_dim=12)
  with pytest.raises(ValueError, match="index_head_dim = 12: expected a power of two with qat = 'fp4'"):
    dataclasses.replace(narrow, qat="fp4")
  dataclasses.replace(narrow, num_hidden_layers=1, layer_types=(SLIDING,), mlp_layer_types=(LEARNED,), qat="fp4")
  assert c.RunConfig(model=QAT).model.qat == "fp4" and "qat" not in QAT.to_hf()
