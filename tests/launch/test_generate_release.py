"""The generating main on what the converting one makes of a released folder: its weights, tokenizer and chat wording."""

import dataclasses

import jax
import numpy as np
import pytest
import tokenizers

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED
from deepseek_v4.generation import decode
from deepseek_v4.generation.stream import text_of
from deepseek_v4.model.cache import init_cache
from deepseek_v4.text import chat
from launch import convert
from launch import generate as launch_generate
from tests.checkpoint import releases
from tests.model.small import random_variables

NEW = 24
# Fed token by token, a prompt of any length needs one program.
OPTIONS = dict(max_new_tokens=NEW, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, chunk_size=1, cache_storage="compute")
CONFIG = dataclasses.replace(
  releases.CONFIG, vocab_size=270, num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(HASH, LEARNED),
  max_position_embeddings=256)
ENCODER = '''REASONING_EFFORT_PROMPTS = {"low": "", "high": "Think.", "max": "Think on."}
DEFAULT_REASONING_EFFORT = "low"
TOOLS_TEMPLATE = "T {tool_schemas}"
response_format_template = "F {schema}"
'''


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """(released folder, what launch.convert makes of it)."""
  release, target = tmp_path_factory.mktemp("release") / "release", tmp_path_factory.mktemp("target") / "ours"
  # Weights as a network has them, so that logits are finite: those of `releases.make_release` may be anything.
  dsv4.save_hf(random_variables(CONFIG), CONFIG, release, quantization="fp8+fp4")
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  bpe.train_from_iterator([], tokenizers.trainers.BpeTrainer(
    special_tokens=[chat.EOS, chat.BOS, "<think>", "</think>"], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  bpe.save(str(release / "tokenizer.json"))
  (release / "encoding").mkdir()
  (release / "encoding" / "encoding_dsv4.py").write_text(ENCODER)
  convert.convert(str(release), str(target), "orbax", None, None, False)
  return release, target


def test_replies_of_a_converted_release(folders):
  """A user's message in the release's own wording; the reply is that of the released weights, its thought closed in time."""
  release, target = folders
  speaker = launch_generate.load(str(target), OPTIONS, 0, prompts=["hi"], effort="max")
  assert speaker.template.efforts == ("none", "low", "high", "max") and speaker.tokenizer.vocab_size == 260
  shown = []
  launch_generate.answer(speaker, ["hi"], "max", shown.append)
  config = dataclasses.replace(dsv4.ModelConfig.from_hf(release), scan_layers=False)
  variables, model = dsv4.load_hf(release, config), dsv4.DeepseekV4(config)
  prompt = speaker.tokenizer.encode(f"{chat.BOS}Think on.{chat.USER}hi{chat.ASSISTANT}<think>")
  close = speaker.tokenizer.encode("</think>")
  budget = speaker.thinking_budget("max")
  assert (budget.tokens, budget.close) == (NEW - NEW // 4 - 1, tuple(close)) and len(close) == 1
  found = dsv4.generate(model, variables, [prompt], keys=jax.random.split(jax.random.key(0), 1), max_new_tokens=NEW,
                        temperature=0.0, chunk_size=1, stop_tokens=(speaker.tokenizer.document_end,),
                        thinking_budget=budget)
  cache = init_cache(config, 1, decode.room_for(len(prompt) + NEW, config.max_position_embeddings))
  assert np.isfinite(decode.prefill(model, variables, cache, [prompt], chunk_size=1)[1]).all()
  reply = text_of(speaker.tokenizer, found.tokens[0])
  assert "".join(shown).startswith(f"{reply}\nprompt {len(prompt)} tokens, ") and "</think>" in reply


def test_plain_text_needs_no_wording(folders):
  """An encoder without the literals is no obstacle to plain text, and to a message before the weights are read."""
  _, target = folders
  file = target / "release" / "encoding" / "encoding_dsv4.py"
  try:
    file.write_text("A = 1\n")
    assert launch_generate.load(str(target), OPTIONS, 0, prompts=["hi"]).template is None
    for more in (dict(effort="low"), dict(chat=True)):
      with pytest.raises(ValueError, match="expected the wording as literals in one file, but encoding_dsv4.py lacks"):
        launch_generate.load(str(target), OPTIONS, 0, **more)
  finally:
    file.write_text(ENCODER)
