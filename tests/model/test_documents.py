"""Who sees whom: the future is invisible, an entry appears when its window closes, documents are alone in a row."""

import functools

import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.model.losses import mtp_targets, next_token_targets
from tests.model.small import ROW, T0, logits, pack, packed_model, plain_model, random_tokens, traced_model, variables

LENGTHS = (14, 16, 1, 3, 5, 7, 9, 7)  # with two places of padding behind them
STARTS = np.cumsum((0, *LENGTHS))
DOCUMENTS = [random_tokens(n, seed=10 + i) for i, n in enumerate(LENGTHS)]

interpreted = pytest.param("interpret", marks=pytest.mark.long)  # the TPU kernels' own code; a minute to compile
both_kernels = pytest.mark.parametrize("kernels", ["blockwise", "reference", interpreted])


def other(token):
  """Another id than this one, never 0."""
  return token % (T0.vocab_size - 1) + 1


def whole_row(kernels, tokens):
  """Hidden states of a row that is one document, through the path for packed rows and through the plain one."""
  ones = np.ones_like(tokens)
  return packed_model(kernels)(tokens, ones).hidden[0]


# ---- the future -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", [
  functools.partial(whole_row, "reference"), functools.partial(whole_row, "blockwise"),
  lambda tokens: plain_model("blockwise")(tokens).hidden[0],
  pytest.param(functools.partial(whole_row, "interpret"), marks=pytest.mark.long)],
  ids=["reference", "blockwise", "blockwise, plain rows", "interpret"])
def test_a_token_moves_nothing_before_itself(row):
  tokens = random_tokens(1, ROW)
  base = row(tokens)
  for j in (0, 3, 4, 7, 8, 20, 63):
    changed = tokens.copy()
    changed[0, j] = other(tokens[0, j])
    moved = row(changed)
    np.testing.assert_array_equal(moved[:j], base[:j])
    assert np.abs(logits(moved[j]) - logits(base[j])).max() > 1e-3
    if j == 20:  # three raw windows of 8 reach to 20 + 3 * 7 = 41: further on only compressed entries carry the change
      assert np.abs(logits(moved[42:]) - logits(base[42:])).max() > 1e-3


def test_plain_rows_equal_packed_rows_of_one_document():
  """Same numbers where windows are a reshape and where they are gathered; trace changes no number; causal there too."""
  tokens = random_tokens(1, ROW)
  found = traced_model("reference")(tokens)
  np.testing.assert_allclose(found["logits"][0], logits(whole_row("blockwise", tokens)), atol=1e-4)
  np.testing.assert_allclose(found["logits"][0], logits(whole_row("reference", tokens)), atol=1e-4)
  changed = tokens.copy()
  changed[0, 20] = other(tokens[0, 20])
  np.testing.assert_array_equal(traced_model("reference")(changed)["logits"][0, :20], found["logits"][0, :20])


def test_entries_appear_when_their_window_closes():
  """Attention weight on entry w is zero before token (w + 1) m - 1 has come and positive from then on where it is picked."""
  found = traced_model("reference")(random_tokens(1, ROW))
  for layer, rate in ((1, T0.csa_compress_rate), (2, T0.hca_compress_rate)):
    weight = found[f"layers/{layer:02d}/attention/entry_weight"][0].sum(1)  # [S, T]
    closed = (np.arange(ROW)[:, None] + 1) // rate > np.arange(ROW // rate)
    assert (weight[~closed] == 0).all()
    if layer == 2:
      assert (weight[closed] > 0).all()
    np.testing.assert_array_equal(found[f"layers/{layer:02d}/attention/entry_position"][0], np.arange(0, ROW, rate))
    np.testing.assert_array_equal(found[f"layers/{layer:02d}/attention/entry_segment"][0], 1)
  weight = found["layers/01/attention/entry_weight"][0].sum(1)
  assert (weight[2] == 0).all()
  assert weight[3, 0] > 0 and (weight[3, 1:] == 0).all()
  assert (weight[7, :2] > 0).all() and (weight[7, 2:] == 0).all()
  picked = found["layers/01/indexer/selected"][0]
  assert ((picked >= 0).sum(1) == np.minimum(T0.index_topk, (np.arange(ROW) + 1) // 4)).all()
  for i in range(ROW):
    assert set(np.flatnonzero(weight[i])) == set(picked[i][picked[i] >= 0])


def test_attention_weights_with_the_sink_sum_to_one():
  found = traced_model("reference")(random_tokens(1, ROW))
  for layer in range(3):
    window = found[f"layers/{layer:02d}/attention/window_weight"][0]
    place = np.arange(ROW)
    near = (place[:, None] - place >= 0) & (place[:, None] - place < T0.sliding_window)
    assert ((window > 0) == near[:, None]).all()
    total = window.sum(-1) + (found[f"layers/{layer:02d}/attention/entry_weight"][0].sum(-1) if layer else 0)
    assert (total < 1).all() and (total > 0).all()  # the sink has the rest


# ---- documents --------------------------------------------------------------------------------------------------------
@both_kernels
def test_a_packed_row_equals_its_documents_alone(kernels):
  run = packed_model(kernels)
  tokens, segments = pack(*DOCUMENTS)
  together = run(tokens, segments)
  assert np.isfinite(together.hidden).all() and np.isfinite(together.mtp_hidden).all()
  sums, load = {name: np.zeros(2) for name in together.losses}, 0
  for document, start in zip(DOCUMENTS, STARTS):
    alone = run(*pack(document))
    place = slice(start, start + len(document))
    np.testing.assert_allclose(logits(together.hidden[0, place]), logits(alone.hidden[0, :len(document)]), atol=1e-4)
    np.testing.assert_allclose(together.mtp_hidden[0, place], alone.mtp_hidden[0, :len(document)], atol=1e-4)
    np.testing.assert_array_equal(together.routing["experts"][:, 0, place], alone.routing["experts"][:, 0, :len(document)])
    load += alone.routing["load"]
    for name, pair in alone.losses.items():
      sums[name] += pair
  for name, pair in together.losses.items():
    np.testing.assert_allclose(pair, sums[name], rtol=2e-5, atol=1e-4, err_msg=name)
  np.testing.assert_array_equal(together.routing["load"], load)
  # tokens of padding count nowhere
  assert (together.routing["load"].sum(1) == sum(LENGTHS) * T0.num_experts_per_tok).all()
  assert together.routing["mtp_load"].sum() == sum(LENGTHS) * T0.num_experts_per_tok
  counts = {name: pair[1] for name, pair in together.losses.items()}
  assert counts == {"next_token": sum(n - 1 for n in LENGTHS), "mtp": sum(max(n - 2, 0) for n in LENGTHS),
                    "balance": sum(LENGTHS), "indexer": sum(max(n - 3, 0) for n in LENGTHS)}


def test_a_document_in_a_packed_row_equals_a_plain_run():
  document = DOCUMENTS[0]
  plain, row = plain_model("reference")(document[None]), packed_model("blockwise")(*pack(document))
  np.testing.assert_allclose(logits(row.hidden[0, :len(document)]), logits(plain.hidden[0]), atol=1e-4)
  np.testing.assert_allclose(row.mtp_hidden[0, :len(document)], plain.mtp_hidden[0], atol=1e-4)
  for name, pair in plain.losses.items():
    np.testing.assert_allclose(row.losses[name], pair, rtol=2e-5, atol=1e-5, err_msg=name)


@both_kernels
def test_changing_one_document_moves_no_other(kernels):
  run = packed_model(kernels)
  base = run(*pack(*DOCUMENTS))
  for number in (0, 1, 4):
    documents = list(DOCUMENTS)
    documents[number] = other(documents[number])
    moved = run(*pack(*documents))
    own = slice(STARTS[number], STARTS[number + 1])
    for name in ("hidden", "mtp_hidden"):
      before, after = getattr(base, name)[0, :sum(LENGTHS)], getattr(moved, name)[0, :sum(LENGTHS)]
      np.testing.assert_array_equal(np.delete(after, np.r_[own], 0), np.delete(before, np.r_[own], 0))
      assert (np.abs(after[own] - before[own]).max(-1) > 1e-4).all()


# ---- multi-token prediction -------------------------------------------------------------------------------------------
FIVE, FOUR = random_tokens(5, seed=1), random_tokens(4, seed=2)


def cross_entropy(hidden, targets):
  """Terms [S] of the loss, 0 where there is no target."""
  z = logits(hidden).astype(np.float64)
  log_p = z - z.max(-1, keepdims=True)
  log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  return -np.where(targets >= 0, np.take_along_axis(log_p, np.maximum(targets, 0)[:, None], 1)[:, 0], 0)


def targets_by_hand(*documents):
  """Next tokens, and tokens after next, of packed documents; -1 = none."""
  nexts, afters = np.full((2, ROW), -1)
  place = 0
  for document in documents:
    for i in range(len(document)):
      nexts[place + i] = document[i + 1] if i + 1 < len(document) else -1
      afters[place + i] = document[i + 2] if i + 2 < len(document) else -1
    place += len(document)
  return nexts, afters


@pytest.mark.parametrize("first", [1, 7])
def test_losses_are_the_cross_entropies_of_next_and_after_next(first):
  """Whatever the documents' numbers; 4 + 3 terms of the main loss and 3 + 2 of the prediction block's."""
  tokens, segments = pack(FIVE, FOUR, first_segment=first)
  nexts, afters = targets_by_hand(FIVE, FOUR)
  made = next_token_targets(tokens, segments, np.ones_like(tokens))
  np.testing.assert_array_equal(made[0], nexts)
  np.testing.assert_array_equal(mtp_targets(made, segments)[0], afters)
  out = packed_model("blockwise")(tokens, segments)
  for name, hidden, targets, count in (("next_token", out.hidden, nexts, 7), ("mtp", out.mtp_hidden, afters, 5)):
    assert out.losses[name][1] == count == (targets >= 0).sum()
    np.testing.assert_allclose(out.losses[name][0], cross_entropy(hidden[0], targets).sum(), rtol=1e-5)
    assert out.losses[name][0] > 0


def test_masked_tokens_are_no_targets():
  tokens, segments = pack(FIVE, FOUR)
  mask = np.ones_like(tokens)
  mask[0, [2, 8]] = 0  # the third token of the first document, the last of the second
  targets = next_token_targets(tokens, segments, mask)[0]
  nexts, afters = targets_by_hand(FIVE, FOUR)
  nexts[[1, 7]] = -1
  np.testing.assert_array_equal(targets, nexts)
  afters[[0, 6]] = -1
  np.testing.assert_array_equal(mtp_targets(targets[None], segments)[0], afters)


def test_a_zero_head_knows_nothing():
  params = {**variables()["params"], "lm_head": {"kernel": np.zeros_like(variables()["params"]["lm_head"]["kernel"])}}
  for first in (1, 50):
    out = packed_model("blockwise")(*pack(FIVE, FOUR, first_segment=first), changed={**variables(), "params": params})
    for name in ("next_token", "mtp"):
      np.testing.assert_allclose(out.losses[name][0] / out.losses[name][1], 4.574711, rtol=1e-6)  # ln 97


def test_the_prediction_block_reads_the_next_token_and_predicts_the_one_after():
  run = packed_model("blockwise")
  tokens, segments = pack(random_tokens(ROW, seed=3))
  base, t = run(tokens, segments), 30
  changed = tokens.copy()
  changed[0, t + 1] = other(changed[0, t + 1])
  moved = run(changed, segments)
  np.testing.assert_array_equal(moved.hidden[0, :t + 1], base.hidden[0, :t + 1])
  np.testing.assert_array_equal(moved.mtp_hidden[0, :t], base.mtp_hidden[0, :t])
  assert np.abs(moved.mtp_hidden[0, t] - base.mtp_hidden[0, t]).max() > 1e-3
  changed = tokens.copy()
  changed[0, t + 2] = other(changed[0, t + 2])  # the target at t
  moved = run(changed, segments)
  np.testing.assert_array_equal(moved.mtp_hidden[0, :t + 1], base.mtp_hidden[0, :t + 1])
  before, after = (cross_entropy(out.mtp_hidden[0], targets_by_hand(ids[0])[1])[t]
                   for out, ids in ((base, tokens), (moved, changed)))
  assert abs(before - after) > 1e-3


# ---- without jit ------------------------------------------------------------------------------------------------------
@pytest.mark.long  # every operation is compiled by itself
def test_the_same_without_jit():
  """Op by op: causality, packing and the losses are not a gift of the compiler, and NumPy weights are welcome."""
  tokens, segments = pack(random_tokens(9, seed=1), random_tokens(5, seed=2), length=16)
  want = packed_model("blockwise")(tokens, segments)
  targets = next_token_targets(tokens, segments, np.ones_like(tokens))
  out = dsv4.DeepseekV4(T0, "blockwise").apply(variables(), tokens, None, segments, targets=targets)
  np.testing.assert_allclose(out.hidden[0, :14], want.hidden[0, :14], atol=1e-4)
  for name, (total, count) in want.losses.items():
    np.testing.assert_allclose(out.losses[name], (total, count), rtol=1e-4, atol=1e-5, err_msg=name)
