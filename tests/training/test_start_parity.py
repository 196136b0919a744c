"""A release that is continued: converted, trained on, talked to, handed back, and read by transformers."""

import dataclasses

import jax
import numpy as np
import pytest
import tokenizers
import torch
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

import deepseek_v4 as dsv4
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, ModelConfig, load
from deepseek_v4.model.losses import next_token_targets
from deepseek_v4.training import feed, loop, metrics
from launch import convert, generate
from tests.checkpoint.releases import stored_bytes
from tests.model.small import random_variables

MODEL = ModelConfig(
  vocab_size=320, hidden_size=32, num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(HASH, LEARNED),
  csa_compress_rate=4, hca_compress_rate=8, num_attention_heads=4, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16,
  o_groups=2, o_lora_rank=8, sliding_window=8, index_n_heads=8, index_head_dim=8,
  index_topk=3, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, rope_scaling=None,
  max_position_embeddings=512, num_nextn_predict_layers=0)
RUN_FILE = '''
import dataclasses
from deepseek_v4.config import *

def get_config():
  return RunConfig(
    model=dataclasses.replace(ModelConfig.from_hf("ours/release"), quantization=None),
    optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-3),
    data=DataConfig(source="text", path="text", tokenizer="ours/release/tokenizer.json", sequence_length=32, batch_size=2,
                    held_out_percent=50),
    training=TrainingConfig(steps=2, log_every=1, eval_batches=1, init_from="ours"))
'''


def tokenizer_file(folder):
  """A tokenizer.json with an id per byte and one that ends documents."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator([], tokenizers.trainers.BpeTrainer(
    special_tokens=["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
  """A folder with release (FP8, FP4), ours (converted), run (continued by two steps) and back (a release again); the run's
  config."""
  folder = tmp_path_factory.mktemp("continued")
  (folder / "files").mkdir()
  tokenizer_file(folder / "files")
  dsv4.save_hf(random_variables(MODEL), MODEL, folder / "release", "fp8+fp4", folder / "files")
  (folder / "text").mkdir()
  for i in range(8):
    (folder / "text" / f"{i}.txt").write_text(f"document {i} says: " + "abc " * (10 + i))
  (folder / "run.py").write_text(RUN_FILE)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    convert.convert("release", "ours", "orbax", None, None, False)
    run = load("run.py")
    loop.train(run, folder / "run")
    convert.convert("run", "back", "hf", "none", "float32", False)
    yield folder, run


def test_the_first_loss_is_that_of_the_release(continued):
  """Step 1 reports the loss before its update: of the release's own values on the run's first batch."""
  folder, run = continued
  batch = {name: x[0] for name, x in next(iter(feed.dataset(run, "train"))).items()}
  targets = next_token_targets(batch["tokens"], batch["segment_ids"], batch["loss_mask"])
  variables = dsv4.load_hf(folder / "release", ModelConfig.from_hf(folder / "release"))
  places = (batch["positions"], batch["segment_ids"])
  out = jax.jit(lambda v: dsv4.DeepseekV4(run.model).apply(v, batch["tokens"], *places))(variables)
  losses = -np.take_along_axis(jax.nn.log_softmax(out.logits), np.maximum(targets, 0)[..., None], -1)[..., 0]
  lines = [line for line in metrics.read_lines(folder / "run" / metrics.LINES) if line["split"] == "train"]
  np.testing.assert_allclose(lines[0]["next_token"], losses[targets >= 0].mean(), rtol=1e-5)
  assert lines[1]["step"] == 2 and np.isfinite(lines[1]["loss"])


def test_what_is_handed_back_is_what_was_trained(continued):
  """transformers computes our logits of the run's last checkpoint, which are not those of the release."""
  folder, run = continued
  tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 41))
  theirs, report = DeepseekV4ForCausalLM.from_pretrained(folder / "back", dtype=torch.float32, output_loading_info=True,
                                                         attn_implementation="eager")
  assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
  with torch.no_grad():
    want = theirs.eval()(torch.tensor(tokens), use_cache=False).logits.numpy()
  variables, _, step = restore_variables(folder / "run" / "checkpoints")
  apply = jax.jit(dsv4.DeepseekV4(run.model).apply)
  np.testing.assert_allclose(apply(variables, tokens).logits, want, atol=2e-4)
  before = apply(dsv4.load_hf(folder / "release", run.model), tokens).logits
  assert step == 2 and np.abs(before - want).max() > 1e-2
  for file in ("tokenizer.json", "config.json"):
    assert (folder / "back" / file).is_file()
  assert (folder / "back" / "tokenizer.json").read_bytes() == (folder / "release" / "tokenizer.json").read_bytes()
  assert ModelConfig.from_hf(folder / "back") == dataclasses.replace(run.model, quantization=None)


def test_a_converted_release_and_a_continued_one_talk(continued):
  """With the release's own tokenizer; what they say is what the model says without a cache."""
  folder, _ = continued
  full = jax.jit(lambda model, variables, tokens: model.apply(variables, tokens).logits[0], static_argnums=0)
  options = dict(max_new_tokens=3, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, chunk_size=16,
                 cache_storage="compute")
  for name in ("ours", "run"):
    shown = []
    speaker = generate.load(str(folder / name), options, 0)
    generate.answer(speaker, ["document 3 "], None, shown.append)
    ids = speaker.tokenizer.encode("document 3 ")
    for _ in range(3):
      padded = np.pad(np.array([ids], np.int32), ((0, 0), (0, 16 - len(ids))))
      ids.append(int(full(speaker.model, speaker.variables, padded)[len(ids) - 1].argmax()))
    reply, figures = "".join(shown).split("\nprompt ")
    assert reply == speaker.tokenizer.decode(ids[11:]) and speaker.tokenizer.name != "bytes"
    assert figures.startswith("11 tokens") and "reply 3 tokens" in figures


def test_the_run_goes_back_into_the_formats_of_its_release(continued):
  """Whatever the run's own config says: FP8 and FP4 again under the same config.json; what training left alone is the same
  bytes, and what it moved is within a code's distance."""
  folder, run = continued
  assert run.model.quantization is None
  convert.convert(str(folder / "run"), str(folder / "again"), "hf", None, None, False)
  assert (folder / "again" / "config.json").read_bytes() == (folder / "release" / "config.json").read_bytes()
  before, after = stored_bytes(folder / "release"), stored_bytes(folder / "again")
  assert {n: x[:2] for n, x in before.items()} == {n: x[:2] for n, x in after.items()}
  moved, _, _ = restore_variables(folder / "run" / "checkpoints")
  old, new = (dsv4.to_hf_names(v, MODEL, "release") for v in (dsv4.load_hf(folder / "release", MODEL), moved))
  left_alone = [n for n in old if np.array_equal(old[n], new[n])]
  assert "layers.0.ffn.gate.tid2eid" in left_alone and len(left_alone) < len(old) / 2
  assert all(before[n] == after[n] for n in left_alone)
  written = dsv4.to_hf_names(dsv4.load_hf(folder / "again", ModelConfig.from_hf(folder / "again")), MODEL, "release")
  for name in set(old) - set(left_alone):
    # FP4's codes are 2 apart at most, where the largest is at least 4: an error of 1/5 of it; FP8 and BF16 are finer.
    assert np.abs(written[name] - new[name]).max() <= np.abs(new[name]).max() / 4, name
