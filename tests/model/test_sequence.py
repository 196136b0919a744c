"""A sequence in parts on several devices gives the numbers of the sequence in one piece, wherever its documents are cut."""

import contextlib
import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.config import CSA, HCA
from deepseek_v4.model import router, sequence
from deepseek_v4.model.attention import Attention
from deepseek_v4.model.compression import entry_layout, sees_an_entry
from deepseek_v4.model.context import make_context
from deepseek_v4.model.losses import mtp_targets, next_token_targets
from deepseek_v4.model.mtp import next_embeddings
from tests.model.small import T0, abstract_variables, pack, random_tokens, random_variables

# The rates and the window of the released models, in parts that are as short as they may be; everything else is tiny.
REAL = dataclasses.replace(
    T0, hidden_size=8, csa_compress_rate=4, hca_compress_rate=128, num_attention_heads=2, head_dim=8, qk_rope_head_dim=4,
    q_lora_rank=8, o_groups=1, o_lora_rank=8, sliding_window=128, index_n_heads=2, index_head_dim=8, index_topk=12,
    compute_dtype="float64")
PART, PARTS = 128, 4


def mesh_of(**sizes):
  sizes = {"data": 1} | sizes
  return sharding.make_mesh(c.MeshConfig(**sizes), jax.devices()[:np.prod(list(sizes.values()))])


def on_mesh(fn, sizes, *arguments):
  """fn(*arguments) jitted on a mesh of these sizes (None: without one), as NumPy."""
  if sizes is None:
    return jax.device_get(jax.jit(fn)(*arguments))
  with jax.set_mesh(mesh_of(**sizes)):
    return jax.device_get(jax.jit(fn)(*arguments))


def random_documents(rows, length, seed=0):
  """(positions, segment_ids) int32 [rows, length]: random documents, some from their middle, padding anywhere between."""
  rng = np.random.default_rng(seed)
  positions, segments = np.zeros((2, rows, length), np.int32)
  for row in range(rows):
    place, number = int(rng.integers(0, 3)), 0
    while place < length:
      count = min(int(rng.integers(1, 40)), length - place)
      number += 1
      segments[row, place:place + count] = number
      positions[row, place:place + count] = (int(rng.integers(0, 12)) if row % 2 else 0) + np.arange(count)
      place += count + int(rng.integers(0, 3)) * (row % 3 == 0)
  return positions, segments


def cut_documents(offsets):
  """(positions, segment_ids): a row's second document lies over two or three borders, at these offsets modulo 128."""
  positions, segments = np.zeros((2, len(offsets), PART * PARTS), np.int32)
  for row, offset in enumerate(offsets):
    first = -offset % PART
    for number, (start, end) in enumerate([(0, first), (first, first + 300), (first + 300, 505)], 1):
      segments[row, start:end] = number
      positions[row, start:end] = np.arange(end - start)
  return positions, segments


# ---- what parts tell each other ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [dict(context=2), pytest.param(dict(context=4), marks=pytest.mark.long), dict(context=8)],
                         ids=str)
def test_integers_are_the_same(sizes):
  """Targets, documents' sums, who sees an entry: bit for bit, for random rows, parts of 8, 16 and 32 places."""
  positions, segments = random_documents(64, 64)
  rng = np.random.default_rng(1)
  tokens, mask, picks = rng.integers(0, 90, (64, 64), np.int32), rng.integers(0, 3, (64, 64), np.int32), rng.integers(
      0, 4, (64, 64, 5)).astype(np.float32)

  def run(positions, segments, tokens, mask, picks):
    targets = next_token_targets(tokens, segments, mask)
    summed, count = sequence.by_part(router._document_sums)(picks, segments)
    real = (segments > 0)[..., None]
    return {"targets": targets, "mtp": mtp_targets(targets, segments), "next": next_embeddings(picks, segments),
            "picks": jnp.where(real, summed, 0), "tokens": jnp.where(real[..., 0], count, 0),
            **{f"sees {m}": sees_an_entry(positions, segments, m) for m in (2, 3, 4, 7, 8)}}

  found, expected = (on_mesh(run, s, positions, segments, tokens, mask, picks) for s in (sizes, None))
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)
    assert np.unique(x).size > 1


@pytest.mark.parametrize("kind, context, length", [
  pytest.param(kind, context, length, marks=[pytest.mark.long] * ((kind, context) not in ((HCA, 2), (CSA, 4), (HCA, 8))))
  for kind in (CSA, HCA) for context, length in ((2, 64), (4, 72), (8, 64))])
def test_parts_find_the_entries_of_the_row(kind, context, length):
  """The same entries in the same order, with unused ones between them; each lies with the part of its last token."""
  positions, segments = random_documents(48, length)
  find = lambda p, s: entry_layout(T0, kind, p, s, contiguous=False)
  found, whole = (on_mesh(find, s, positions, segments) for s in (dict(context=context), None))
  rate, part = T0.compress_rate(kind), length // context
  slots = -(-part // rate)
  assert found.closing.shape == (48, slots * context)
  place = found.closing - T0.lookback(kind) + np.arange(slots * context) // slots * part
  for row in range(48):
    used, wanted = found.segment[row] > 0, whole.segment[row] > 0
    np.testing.assert_array_equal(place[row, used], whole.closing[row, wanted])
    for name in ("last", "segment", "cos", *(("has_previous",) if kind == CSA else ())):
      np.testing.assert_array_equal(getattr(found, name)[row, used], getattr(whole, name)[row, wanted], err_msg=name)
  assert (found.segment > 0).sum() > 48


# ---- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape, arguments, message", [
  ((1, 30), {}, "length of tokens = 30: expected a multiple of mesh.context = 4"),
  ((1, 24), {}, "length of tokens / mesh.context = 6: expected at least 7, the tokens before a part"),
  ((1, 32), {"cache": True}, "cache: expected a mesh with context = 1, not 4"),
], ids=["not equal", "too short", "with a cache"])
def test_what_cannot_be_split_is_refused(shape, arguments, message):
  """While the program is traced; nothing is compiled."""
  shapes = abstract_variables(T0)
  if arguments:
    arguments = {"cache": dsv4.init_cache(T0, 1, 64)}
  with jax.set_mesh(mesh_of(context=4)), pytest.raises(ValueError, match=re.escape(message)):
    jax.eval_shape(lambda v: dsv4.DeepseekV4(T0, "reference").apply(v, np.ones(shape, np.int32), **arguments), shapes)


# ---- attention ---------------------------------------------------------------------------------------------------------
class Layer(nn.Module):
  """Attention under the name that the table of logical axes knows."""

  config: c.ModelConfig
  kind: str
  kernels: str

  @nn.compact
  def __call__(self, x, context):
    return Attention(self.config, self.kind, self.kernels, name="attention")(x, context)


@functools.cache
def attention_inputs(rows, config):
  """(variables of the kinds, x [B, S, D], cotangent of the outputs [kinds, B, S, D])."""
  rng = np.random.default_rng(2)
  shapes = jax.eval_shape(lambda: dsv4.DeepseekV4(config, "reference").init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
  layers = {kind: shapes["params"]["layers"][f"layer_{i:02d}"]["attention"] for i, kind in enumerate(config.layer_types)}
  variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) * 0.5, layers)
  shape = rows, PART * PARTS, 8
  inputs = variables, rng.normal(size=shape), rng.normal(size=(len(layers), *shape))
  return jax.tree.map(lambda x: x.astype(config.compute_dtype), inputs)


def attention(config, kernels):
  """(variables, x, cotangents, positions, segment_ids) -> outputs with the indexer's loss, gradients by variables and x."""
  def objective(variables, x, cotangents, positions, segment_ids):
    context = make_context(config, jnp.zeros_like(positions), positions, segment_ids, "sparse", with_losses=True)
    outputs, total = {}, 0.0
    for kind, cotangent in zip(config.layer_types, cotangents):
      layer = Layer(config, kind, kernels)
      outputs[kind], loss, *_ = layer.apply({"params": {"attention": variables[kind]}}, x, context)
      real = (segment_ids > 0)[..., None]
      total += jnp.where(real, outputs[kind] * cotangent, 0).sum()
      if loss is not None:
        outputs["loss"] = loss
        total += loss[0]
    return total, outputs

  def run(*arguments):
    (_, outputs), gradients = jax.value_and_grad(objective, (0, 1), has_aux=True)(*arguments)
    return outputs, gradients
  return run


# The TPU kernels' own code, in float32, which is all that they know; their rows of bits name holes between entries, too.
INTERPRETED = dataclasses.replace(REAL, compute_dtype="float32")


@pytest.mark.long
@pytest.mark.parametrize("sizes", [dict(context=4), dict(context=2, tensor=2)], ids=str)
def test_attention_by_the_kernels(sizes):
  """Interpreted kernels on parts of a sequence against blockwise on all of it: float32 sums of up to 500 numbers."""
  documents = cut_documents((5, 127))
  arguments = (*attention_inputs(2, INTERPRETED), *documents)
  (outputs, gradients), (expected, wanted) = (on_mesh(attention(INTERPRETED, kernels), s, *arguments)
                                              for kernels, s in (("interpret", sizes), ("blockwise", None)))
  assert outputs["loss"][1] == expected["loss"][1] > 0
  real = (documents[1] > 0)[..., None]
  for kind in INTERPRETED.layer_types:
    np.testing.assert_allclose(outputs[kind] * real, expected[kind] * real, atol=2e-4, err_msg=kind)
  np.testing.assert_allclose(outputs["loss"][0], expected["loss"][0], rtol=1e-4)
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
    assert np.linalg.norm(a - b) <= 3e-5 * np.linalg.norm(b)


EVERY = pytest.param(tuple(range(128)), dict(context=4, data=2), marks=pytest.mark.long, id="every offset")


@pytest.mark.parametrize("offsets, sizes", [((0, 1, 3, 63, 64, 101, 126, 127), dict(context=4)), EVERY])
def test_attention_of_every_kind_wherever_documents_are_cut(offsets, sizes):
  """In float64, where no rounding hides anything: another order of sums is all that differs."""
  documents = cut_documents(offsets)
  borders = documents[0][:, PART:PART * PARTS:PART] % PART
  assert set(borders[:, 0]) == set(offsets)
  with jax.enable_x64(True):
    arguments = (*attention_inputs(len(offsets), REAL), *documents)
    run = attention(REAL, "blockwise")
    (outputs, gradients), (expected, wanted) = (on_mesh(run, s, *arguments) for s in (sizes, None))
  assert outputs["loss"][1] == expected["loss"][1] > 0
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), (outputs, gradients),
               (expected, wanted))
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(wanted))


# ---- the whole model ---------------------------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.parametrize("changes, given", [
  (dict(sliding_window=1), True), (dict(csa_compress_rate=3, hca_compress_rate=7), False)],
  ids=["a window of one, packed rows", "rates that divide no part, plain rows"])
def test_logits(changes, given):
  """The head's logits of all places, with documents or as one document per row, whose windows are then no reshape."""
  config = dataclasses.replace(T0, **changes)
  tokens, (positions, segments) = random_tokens(2, 64), random_documents(2, 64)
  shapes = abstract_variables(config)
  rng = np.random.default_rng(3)
  table = rng.permuted(np.tile(np.arange(4, dtype=np.int32), (97, 1)), axis=1)[:, :2]
  variables = jax.tree.map(lambda leaf: table if leaf.dtype == np.int32 else (
      rng.normal(size=leaf.shape) * 0.3).astype(leaf.dtype), shapes)
  documents = (positions, segments) if given else ()
  run = lambda *arguments: dsv4.DeepseekV4(config, "blockwise").apply(*arguments).logits
  found, expected = (on_mesh(run, s, variables, tokens, *documents) for s in (dict(context=4), None))
  real = (segments > 0)[..., None] if given else True
  np.testing.assert_allclose(found * real, expected * real, atol=2e-4)
  assert np.abs(expected).max() > 1


def test_the_prediction_blocks_loss_of_a_short_row_in_two_parts():
  """Documents of 5 and 4 tokens and 3 places of padding, in two parts of 6: the border cuts the second document behind its
  first token, so the targets of the first part's last places come from the other part."""
  config = dataclasses.replace(T0, csa_compress_rate=2, hca_compress_rate=3, sliding_window=4)
  given = random_variables(config, seed=5)

  def run(variables, tokens, segments):
    targets = next_token_targets(tokens, segments, jnp.ones_like(tokens))
    out = dsv4.DeepseekV4(config, "blockwise").apply(variables, tokens, None, segments, targets=targets)
    return out.losses, out.mtp_hidden, mtp_targets(targets, segments)
  jitted = jax.jit(run)

  def on(sizes, tokens, variables=given):
    with jax.set_mesh(mesh_of(**sizes)) if sizes else contextlib.nullcontext():
      return jax.device_get(jitted(variables, tokens, segments))

  def terms(hidden, targets):
    log_p = jax.nn.log_softmax(hidden[0] @ given["params"]["lm_head"]["kernel"])
    return np.where(targets[0] >= 0, -np.take_along_axis(log_p, np.maximum(targets[0], 0)[:, None], 1)[:, 0], 0)
  tokens, segments = pack(random_tokens(5, seed=1), random_tokens(4, seed=2), length=12)
  parts = dict(context=2)
  losses, hidden, targets = on(parts, tokens)
  assert losses["next_token"][1] == 7 and losses["mtp"][1] == 5 == (targets >= 0).sum()
  for name, (total, count) in on(None, tokens)[0].items():
    np.testing.assert_allclose(losses[name], (total, count), rtol=2e-6)
  np.testing.assert_allclose(losses["mtp"][0], terms(hidden, targets).sum(), rtol=1e-5)
  # Another second document changes no term of the first one, and the reverse.
  for changed, kept in ((slice(5, 9), slice(0, 5)), (slice(0, 5), slice(5, 9))):
    others = tokens.copy()
    others[0, changed] = tokens[0, changed] % 96 + 1
    _, moved, same = on(parts, others)
    # Bit for bit on most CPUs; an expert's matmul may round a row otherwise in another place.
    np.testing.assert_allclose(moved[0, kept], hidden[0, kept], rtol=0, atol=1e-6 * np.abs(hidden).max())
    np.testing.assert_allclose(terms(moved, same)[kept], terms(hidden, targets)[kept], rtol=1e-5)
    assert np.abs(terms(moved, same)[changed] - terms(hidden, targets)[changed]).max() > 1e-3
  # The block at place 5 reads token 6, of the other part, and predicts token 7.
  for place, reads in ((6, True), (7, False)):
    others = tokens.copy()
    others[0, place] = tokens[0, place] % 96 + 1
    _, moved, same = on(parts, others)
    assert (np.abs(moved[0, 5] - hidden[0, 5]).max() > 1e-3) == reads
    assert abs(terms(moved, same)[5] - terms(hidden, targets)[5]) > 1e-3
  nothing = {**given["params"], "lm_head": {"kernel": np.zeros_like(given["params"]["lm_head"]["kernel"])}}
  losses, *_ = on(parts, tokens, {**given, "params": nothing})
  for name in ("next_token", "mtp"):
    np.testing.assert_allclose(losses[name][0] / losses[name][1], np.log(97), rtol=1e-6)
