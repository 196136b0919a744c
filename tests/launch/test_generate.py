"""The generating main on a run folder: plain text, several prompts, a conversation, what a person sees who mistypes."""

import dataclasses
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers

import deepseek_v4 as dsv4
from deepseek_v4 import config as config_lib
from deepseek_v4 import sharding
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.config import CSA, HASH, HCA, LEARNED
from deepseek_v4.generation import decode, drift
from deepseek_v4.generation.requests import ThinkingBudget
from deepseek_v4.generation.stream import Stream, text_of
from deepseek_v4.text import chat
from deepseek_v4.text.chat_template import DSML
from deepseek_v4.text.tokenize import load_tokenizer
from launch import generate as launch_generate
from tests.model.small import T0, random_variables

# The kinds of layers that keep entries: each layer more is a third more to compile.
BYTES = dataclasses.replace(T0, vocab_size=262, num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(HASH, LEARNED))
# Fed token by token, a prompt of any length needs one program; chunks have tests of their own (tests/generation).
ROOM = 256
OPTIONS = dict(max_new_tokens=6, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, chunk_size=1, cache_storage="compute")


@pytest.fixture(scope="module", autouse=True)
def one_size_of_caches():
  """Of prompts and conversations of any length here: each size would need programs of its own."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decode, "room_for", lambda length, most, room_for=decode.room_for: max(ROOM, room_for(length, most)))
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder as a run leaves it."""
  run = tmp_path_factory.mktemp("run")
  stored = config_lib.to_dict(dataclasses.replace(config_lib.RunConfig(), model=BYTES))
  with CheckpointStore(run / "checkpoints", keep=1, config_dict=stored) as store:
    store.save(3, jax.tree.map(jax.numpy.asarray, random_variables(BYTES)), {})
  return str(run)


@pytest.fixture(scope="module")
def speaker(folder):
  return launch_generate.load(folder, OPTIONS, 0, effort="none")


def reply_to(speaker, text):
  """The text that `generate` itself gives."""
  found = dsv4.generate(speaker.model, random_variables(dataclasses.replace(BYTES, scan_layers=False)),
                        [chat.to_ids(text, speaker.tokenizer)], keys=jax.random.split(jax.random.key(9), 1),
                        max_new_tokens=6, temperature=0.0, chunk_size=1, stop_tokens=(1,))
  return speaker.tokenizer.decode(found.tokens[0])


def test_a_prompt_and_a_file_of_prompts(speaker):
  shown = []
  launch_generate.answer(speaker, ["hello"], None, shown.append)
  text = "".join(shown)
  assert text.startswith(reply_to(speaker, "hello") + "\nprompt 5 tokens, ")
  assert "reply 6 tokens, " in text and "MiB (compute); ended by" in text and text.endswith("ended by length\n")
  shown = []
  launch_generate.answer(speaker, ["hello", "a b"], None, shown.append)
  want = f"[1] {reply_to(speaker, 'hello')}\n[2] {reply_to(speaker, 'a b')}\nprompt 8 tokens, "
  assert "".join(shown).startswith(want)


def test_a_conversation_remembers(speaker):
  asked, shown = iter(["hi", "you?", ""]), []
  launch_generate.converse(speaker, "none", lambda: next(asked), shown.append)
  encoded = lambda *messages: chat.encode(
    [{"role": role, "content": text} for role, text in messages], reasoning_effort="none")
  first = reply_to(speaker, encoded(("user", "hi")))
  second = reply_to(speaker, encoded(("user", "hi"), ("assistant", first), ("user", "you?")))
  text = "".join(shown)
  assert text.startswith(f"{first}\nprompt ") and f"ended by length\n{second}\nprompt " in text
  # What is counted and checked is what is fed: the end of a turn is one token, however many bytes its spelling has.
  whole = encoded(("user", "hi"), ("assistant", first), ("user", "you?"))
  fed = speaker.ids(whole, "none")
  assert fed == chat.to_ids(whole, speaker.tokenizer) and fed.count(speaker.tokenizer.document_end) == 1
  assert len(fed) < len(speaker.ids(whole, None)) and f"\n{second}\nprompt {len(fed)} tokens, " in text


def test_a_message_that_the_context_has_no_room_for_is_left_out(speaker):
  """It is said, and the conversation goes on without it."""
  asked, shown = iter(["hi", "x" * 4096, "you?", ""]), []
  launch_generate.converse(speaker, "none", lambda: next(asked), shown.append)
  encoded = lambda *messages: chat.encode(
    [{"role": role, "content": text} for role, text in messages], reasoning_effort="none")
  first = reply_to(speaker, encoded(("user", "hi")))
  second = reply_to(speaker, encoded(("user", "hi"), ("assistant", first), ("user", "you?")))
  text = "".join(shown)
  assert "ended by length\nthe conversation with this message is too long (prompt 1 of 1: 4" in text
  assert f"): left out; a shorter one may fit\n{second}\nprompt " in text


def test_on_a_mesh_and_in_another_dtype(folder, speaker):
  """Four devices, each with its part of the weights, say what one does; rows that only fill the mesh up are nobody's."""
  settings = launch_generate.mesh_settings("tensor=2,expert=2")
  assert settings == config_lib.MeshConfig(tensor=2, expert=2)
  mesh = sharding.make_mesh(settings, jax.devices()[:4])
  spread = launch_generate.load(folder, {**OPTIONS, "max_new_tokens": 3}, 0, mesh=mesh)
  experts = spread.variables["params"]["layers"]["layer_01"]["moe"]["experts"]["gate"]
  assert {shard.data.shape for shard in experts.addressable_shards} == {(2, 32, 8)}
  alone = dataclasses.replace(speaker, options=spread.options)
  assert spread.reply(["hello", "a b"], 0, None)[0] == alone.reply(["hello", "a b"], 0, None)[0]
  pieces = []
  (reply,), found = spread.reply(["hello"], 0, None, pieces.append)
  assert "".join(pieces) == reply == alone.reply(["hello"], 0, None)[0][0]
  assert len(found.tokens) == len(found.finish) == len(found.logprobs) == 1
  assert launch_generate.load(folder, OPTIONS, 0, compute_dtype="bfloat16").model.config.compute_dtype == "bfloat16"


@pytest.mark.parametrize("text, expected", [
  ("rows=2", "--mesh = 'rows=2': MeshConfig has no field 'rows'; it has dcn_data, data, fsdp, expert"),
  ("tensor", "--mesh = 'tensor': .* expected KEY=VALUE"), ("tensor=two", "--mesh = 'tensor=two': tensor = 'two': expected")])
def test_meshes_that_cannot_be(text, expected):
  with pytest.raises(ValueError, match=expected):
    launch_generate.mesh_settings(text)


def test_meshes_that_do_not_fit(folder, monkeypatch):
  monkeypatch.setattr("deepseek_v4.checkpoint.store.restore_variables", lambda *_, **__: pytest.fail("weights were read"))
  for text, expected in (("expert=8", "model.n_routed_experts = 4: expected a multiple of mesh.expert = 8"),
                         ("context=2", "--mesh: context = 2: expected 1")):
    with pytest.raises(ValueError, match=expected):
      launch_generate.load(folder, OPTIONS, 0, mesh=sharding.make_mesh(launch_generate.mesh_settings(text)))


def test_a_thought_is_closed_when_its_budget_is_spent(speaker):
  template = dataclasses.replace(speaker.template, thinking_budget={"high": 2})
  thinking = dataclasses.replace(speaker, template=template, options={**OPTIONS, "max_new_tokens": 16})
  text = chat.encode([{"role": "user", "content": "hi"}], reasoning_effort="high")
  (reply,), found = thinking.reply([text], 0, "high")
  assert speaker.tokenizer.decode(found.tokens[0][2:10]) == "</think>"
  with pytest.raises(ValueError, match="reasoning_effort = 'huge': expected one of none, high"):
    launch_generate.answer(speaker, ["hi"], "huge", print)


def test_a_thought_leaves_room_for_an_answer(speaker):
  """The closing takes 8 bytes, and a quarter of the tokens are the answer's, whatever the effort allows."""
  budget_of = lambda most, effort="max", **changes: dataclasses.replace(
    speaker, template=dataclasses.replace(speaker.template, **changes), options={**OPTIONS, "max_new_tokens": most}
  ).thinking_budget(effort)
  close = tuple(speaker.tokenizer.encode("</think>"))
  assert budget_of(256) == ThinkingBudget(256 - 64 - 8, close) == budget_of(256, thinking_budget={})
  assert budget_of(1 << 20).tokens == 393_216 and budget_of(10).tokens == 0
  assert budget_of(256, None) is None and budget_of(256, "none") is None
  with pytest.raises(ValueError, match="--max_new_tokens = 9: expected at least 10 with --reasoning_effort = max, w"):
    budget_of(9)
  # 16 of them: at most four of thought, and four of an answer
  asked, shown = iter(["hi", ""]), []
  thinking = dataclasses.replace(speaker, options={**OPTIONS, "max_new_tokens": 16})
  launch_generate.converse(thinking, "max", lambda: next(asked), shown.append)
  text = "".join(shown)
  assert "</think>" in text and "thought of at most 4 tokens; cache" in text


def test_a_thought_that_is_cut_stays_a_thought(speaker):
  of = lambda reply, effort="high": launch_generate.message(reply, effort, speaker.template)
  assert of("I wonder") == {"role": "assistant", "content": "", "reasoning_content": "I wonder"}
  assert of("so</think>yes") == {"role": "assistant", "content": "yes", "reasoning_content": "so"}
  broken = f"so</think>\n\n<{DSML}tool_calls>\n<{DSML}inv"
  assert of(broken) == {"role": "assistant", "content": broken.removeprefix("so</think>"), "reasoning_content": "so"}
  assert of(broken, "none") == {"role": "assistant", "content": broken, "reasoning_content": ""}


def test_a_thought_is_closed_by_a_token_that_is_special(speaker, tmp_path):
  """With a tokenizer.json the closing is one token; it stays in the text, and the one that ends the reply does not."""
  tokenizer = byte_pairs(tmp_path, BYTES.vocab_size, [chat.EOS, "</think>"])
  template = dataclasses.replace(speaker.template, thinking_budget={"high": 2})
  thinking = dataclasses.replace(speaker, template=template, tokenizer=tokenizer,
                                 options={**OPTIONS, "max_new_tokens": 12})
  pieces = []
  (reply,), found = thinking.reply(["hi"], 0, "high", pieces.append)
  assert tokenizer.encode("</think>") == [found.tokens[0][2]]
  parsed = chat.parse(reply, reasoning_effort="high")
  assert parsed["reasoning_content"] == tokenizer.decode(found.tokens[0][:2])
  assert "".join(pieces) == reply == parsed["reasoning_content"] + "</think>" + parsed["content"]
  ended = [*found.tokens[0], tokenizer.document_end]
  assert text_of(tokenizer, ended) == reply
  assert tokenizer.decode(ended, keep_special=True) == reply + chat.EOS


def test_speculation_tells_how_many_drafts_were_accepted(speaker):
  guessing = dataclasses.replace(speaker, options={**OPTIONS, "speculative": 1})
  shown, plain = [], []
  launch_generate.answer(guessing, ["hello"], None, shown.append)
  launch_generate.answer(speaker, ["hello"], None, plain.append)
  text, without = "".join(shown), "".join(plain)
  assert text.partition("\nprompt")[0] == without.partition("\nprompt")[0]  # greedy: the same reply
  assert re.search(r"tokens/s; \d+\.\d% of the drafts accepted; cache 0\.", text) and "drafts" not in without


def test_a_checkpoint_without_the_block_cannot_speculate(speaker):
  config = dataclasses.replace(BYTES, num_nextn_predict_layers=0)
  lacking = dataclasses.replace(speaker, model=dsv4.DeepseekV4(config), options={**OPTIONS, "speculative": 2})
  with pytest.raises(ValueError, match=r"speculative = 2: expected a model with a prediction block"):
    launch_generate.answer(lacking, ["hello"], None, print)


def test_pieces_of_text_are_whole_characters(speaker):
  pieces = []
  stream = Stream(speaker.tokenizer, pieces.append)
  for token in speaker.tokenizer.encode("aé€b"):
    stream(0, token)
  stream(0, 3 + 0xC3)  # half a character at the end
  assert pieces == ["a", "é", "€", "b"]
  stream.finish()
  assert "".join(pieces) == "aé€b\ufffd"


class Counted:
  """A tokenizer that counts the tokens it decodes."""

  def __init__(self, tokenizer):
    self._tokenizer, self.document_end, self.count = tokenizer, tokenizer.document_end, 0

  def decode(self, tokens, **options):
    self.count += len(tokens)
    return self._tokenizer.decode(tokens, **options)


def byte_pairs(folder, vocab_size, special):
  """A tokenizer.json of bytes and of pairs of bytes, among them parts of characters."""
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                           initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  bpe.train_from_iterator(["a b 日本語本日 é日 €uro 🙂🙃 本🙂"] * 3, trainer)
  folder.mkdir(exist_ok=True)
  bpe.save(str(folder / "tokenizer.json"))
  return load_tokenizer(folder, vocab_size)


@pytest.mark.parametrize("source", ["bytes", "pairs"])
def test_a_reply_is_decoded_once(source, tmp_path):
  """The pieces are the text of all tokens, of real text as of any tokens; each token is decoded a few times at most."""
  tokenizer = load_tokenizer(None, 262) if source == "bytes" else byte_pairs(tmp_path, 290, [chat.EOS, "</think>"])
  rng = np.random.default_rng(0)
  texts = [tokenizer.encode("日本 🙂🙃é€ a</think>b" * 40)]
  texts += [rng.integers(0, tokenizer.vocab_size, 2000).tolist() for _ in range(3)]
  texts.append(rng.choice(tokenizer.encode("日🙂é€") + [0, 1], 2000).tolist())
  texts.append([tokenizer.encode("日")[0]] + [tokenizer.document_end] * 2000)
  for tokens in texts:
    pieces, counted = [], Counted(tokenizer)
    stream = Stream(counted, pieces.append)
    for token in tokens:
      stream(0, token)
    stream.finish()
    assert "".join(pieces) == text_of(tokenizer, tokens)
    assert counted.count <= 6 * len(tokens) and all(pieces)


def test_a_mixed_cache_and_its_drift(folder, speaker, monkeypatch):
  """The cache is as small as `count` says; the drift is asked for on prompt and reply."""
  mixed = dataclasses.replace(speaker, options={**OPTIONS, "cache_storage": "mixed", "max_new_tokens": 1}, drift=True)
  asked, shown = [], []
  monkeypatch.setattr(drift, "storage_drift", lambda *args, **options: asked.append((args, options)) or drift.Drift(
    6, 0.0123, 0.5, 1.5, 0.9, 0.001))
  launch_generate.answer(mixed, ["hello"], None, shown.append)
  text, size = "".join(shown), sum(dsv4.count(BYTES, ROOM).cache_bytes["mixed"].values()) / 2**20
  (((model, _, (ids,)), options),) = asked
  assert model is mixed.model and options == {"chunk_size": OPTIONS["chunk_size"]}
  assert ids[:5] == mixed.tokenizer.encode("hello")
  assert text.startswith(mixed.tokenizer.decode(ids[5:]) + "\n") and len(ids) == 6
  assert text.endswith(f"cache {size:,.2f} MiB (mixed); ended by length\nmixed against compute cache, 6 tokens: logits "
                       "0.012 apart, at most 0.5, of a spread of 1.5; 90.0% the same first choice; KL 0.001 nats\n")
  rounded = launch_generate.load(folder, OPTIONS, 0, inference_rounding=True)
  assert rounded.model.config == dataclasses.replace(speaker.model.config, inference_rounding=True)
  with pytest.raises(ValueError, match="cache_storage = 'fp8': expected one of compute, mixed"):
    dataclasses.replace(mixed, options={**OPTIONS, "cache_storage": "fp8"}).reply(["hello"], 0, None)


def test_a_folder_without_a_checkpoint(tmp_path):
  with pytest.raises(FileNotFoundError, match="no checkpoint"):
    launch_generate.load(str(tmp_path), OPTIONS, 0)


def test_the_same_seed_gives_the_same_text(speaker):
  hot = dataclasses.replace(speaker, options={**OPTIONS, "temperature": 2.0})
  texts = [hot.reply(["hello"], number, None)[0][0] for number in (0, 0, 1)]
  assert texts[0] == texts[1] != texts[2]
  assert np.unique(texts).size == 2


@pytest.mark.parametrize("options, more, expected", [
  (dict(temperature=-1.0), {}, r"temperature = -1.0: expected at least 0"),
  (dict(top_p=1.5), {}, r"top_p = 1.5: expected a number above 0, at most 1"),
  (dict(min_p=2.0), {}, r"min_p = 2.0: expected a number from 0 to 1"),
  (dict(max_new_tokens=10**7), {}, r"--max_new_tokens = 10000000: expected at least 1 and less than max_position_embed"),
  ({}, dict(effort="huge"), r"reasoning_effort = 'huge': expected one of none, high"),
  ({}, dict(effort="max"), r"--max_new_tokens = 6: expected at least 10 with --reasoning_effort = max"),
  ({}, dict(chat=True), r"--max_new_tokens = 6: expected at least 10 with --reasoning_effort = high"),
  ({}, dict(prompts=[""]), r"prompt 1 of 1: 0 tokens; expected from 1 to max_position_embeddings - max_new_t"),
  ({}, dict(prompts=["a", "b" * 4091]), r"prompt 2 of 2: 4091 tokens; expected from 1 to max_position_embeddings"),
  ({}, dict(prompts=["b" * 4090], effort="none"), r"prompt 1 of 1: \d+ tokens; expected from 1 to"),  # with its message
])
def test_options_are_refused_before_the_weights_are_read(folder, monkeypatch, options, more, expected):
  monkeypatch.setattr("deepseek_v4.checkpoint.store.restore_variables", lambda *_, **__: pytest.fail("weights were read"))
  with pytest.raises(ValueError, match=expected):
    launch_generate.load(folder, {**OPTIONS, **options}, 0, **more)


def test_options_that_the_model_lacks_something_for():
  """From the configuration and the names of the checkpoint's arrays."""
  check = lambda config, leaves=("params/mtp/x",), drift=False, **more: launch_generate.check_options(
    config, leaves, {**OPTIONS, **more}, drift)
  with pytest.raises(ValueError, match=r"speculative = 2: expected a model with a prediction block"):
    check(dataclasses.replace(BYTES, num_nextn_predict_layers=0), speculative=2)
  with pytest.raises(ValueError, match=r"speculative = 2: expected variables with the prediction block's \(params/mtp\)"):
    check(BYTES, ("params/embed/embedding",), speculative=2)
  odd = dataclasses.replace(BYTES, index_head_dim=12)
  with pytest.raises(ValueError, match="index_head_dim = 12: expected a power of two with --cache_storage = mixed"):
    check(odd, cache_storage="mixed")
  with pytest.raises(ValueError, match="index_head_dim = 12: expected a power of two with --drift"):
    check(odd, drift=True)
  check(odd)
  check(BYTES, speculative=2, cache_storage="mixed")


def test_a_tokenizer_that_the_embedding_is_too_small_for(tmp_path, monkeypatch):
  """Ids beyond the table: refused before the weights are read."""
  stored = config_lib.to_dict(dataclasses.replace(config_lib.RunConfig(), model=dataclasses.replace(BYTES, vocab_size=200)))
  with CheckpointStore(tmp_path / "checkpoints", keep=1, config_dict=stored) as store:
    store.save(1, {"params": {"x": np.ones(2, np.float32)}}, {})
  monkeypatch.setattr("deepseek_v4.checkpoint.store.restore_variables", lambda *_, **__: pytest.fail("weights were read"))
  with pytest.raises(ValueError, match="model.vocab_size = 200: expected at least 259 for bytes"):
    launch_generate.load(str(tmp_path), OPTIONS, 0)


@pytest.mark.parametrize("more, expected", [
    (["--temperature", "warm"], "temperature"), (["--max_new_tokens", "0"], "max_new_tokens"),
    (["--drafts", "2"], "--drafts = 2: expected --speculative with it"),
    (["--drift", "--inference_rounding"], "--drift with --inference_rounding: expected one of them"),
    (["--drift", "--mesh", "tensor=2"], "--mesh = 'tensor=2' with --drift: expected one of them"),
    (["--cache_storage", "fp8"], "fp8")])
def test_options_that_do_not_go_together(more, expected):
  """Before anything is read: the checkpoint need not be there."""
  command = [sys.executable, "-m", "launch.generate", "--checkpoint", "nowhere", "--prompt", "x", *more]
  result = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert result.returncode and expected in result.stderr and "Traceback" not in result.stderr
