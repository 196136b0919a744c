"""Talks to a checkpoint: one prompt, a file of prompts, or a conversation.

python -m launch.generate --checkpoint runs/tiny --prompt "def main("
python -m launch.generate --checkpoint DIR --prompts FILE [--temperature 0] [--max_new_tokens 256]
python -m launch.generate --checkpoint DIR --chat [--reasoning_effort none|high|max] [--speculative [--drafts 2]]

DIR is the folder of a training run or of a converted release. Without --chat a prompt is plain text that is gone on with;
with --reasoning_effort it is a user's message. `--speculative` needs a model with a multi-token-prediction block.
`--mesh tensor=2,expert=4` spreads the model over devices, each of which reads its own part (axes as in launch.train's
mesh.*; data fills what is left), `--compute_dtype bfloat16` computes as the released models do.
`--cache_storage mixed` keeps the published tenth of V3.2's cache (FP8 keys, FP4 index keys), `--inference_rounding` rounds
whatever DeepSeek's own inference does, `--drift` tells what the mixed cache does to the logits of the generated texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

from absl import app, flags, logging

from deepseek_v4.generation.stream import Stream, text_of
from deepseek_v4.model.formats import STORAGES
from launch import emulate_devices, processes, use_huge_pages


def define_flags() -> None:
  flags.DEFINE_string("checkpoint", None, "Folder of a run or of a converted release.", required=True)
  flags.DEFINE_string("prompt", None, "Text to go on with.")
  flags.DEFINE_string("prompts", None, "File with a prompt on each line; all are one batch.")
  flags.DEFINE_bool("chat", False, "Conversation on the terminal; an empty line or end of input ends it.")
  flags.DEFINE_string("reasoning_effort", None, "none, high, max, or another level of the release; default its own.")
  flags.DEFINE_integer("max_new_tokens", 256, "Of each reply. A thought is closed in time to leave a quarter of them, "
                       "or where the effort's own budget ends, if that is less.", lower_bound=1)
  flags.DEFINE_float("temperature", 1.0, "0 = greedy.")
  flags.DEFINE_float("top_p", 1.0, "Keep the most probable tokens up to this probability.")
  flags.DEFINE_integer("top_k", 0, "Keep so many of the most probable tokens; 0 = all.")
  flags.DEFINE_float("min_p", 0.0, "Keep tokens of at least this share of the largest probability.")
  flags.DEFINE_integer("seed", 0, "Of the drawn tokens.")
  flags.DEFINE_integer("chunk_size", 512, "Tokens of a prompt that are fed at a time.", lower_bound=1)
  flags.DEFINE_bool("speculative", False, "Let the prediction block guess tokens that one step verifies.")
  flags.DEFINE_integer("drafts", None, "With --speculative: tokens guessed at a time, one if not given.", lower_bound=1)
  flags.DEFINE_enum("cache_storage", "compute", STORAGES,
                    "What the cache keeps: compute, or mixed (FP8, BF16 and FP4).")
  flags.DEFINE_string("mesh", None, "AXIS=DEVICES,...: dcn_data, data, fsdp, expert, tensor, as mesh.* of a run; also "
                      "emulated_devices=N. Default: one device.")
  flags.DEFINE_enum("compute_dtype", None, ["float32", "bfloat16"], "Of activations; default as the checkpoint's config.")
  flags.DEFINE_bool("inference_rounding", False, "Round what DeepSeek's own inference rounds.")
  flags.DEFINE_bool("drift", False, "Compare the logits of both storages on prompt and reply.")


@dataclasses.dataclass(frozen=True)
class Speaker:
  """A loaded checkpoint.

  Attributes:
    model, variables: the network.
    tokenizer: see `text.tokenize`.
    template: wording of its chat format; None = not read, since only plain text is gone on with.
    options: of `generate` (sampling, lengths, speculation).
    seed: of the first reply.
    drift: whether a reply comes with the drift of the mixed cache.
    mesh: the devices that hold the variables; None = the default one.
  """

  model: Any
  variables: Any
  tokenizer: Any
  template: Any
  options: dict[str, Any]
  seed: int
  drift: bool = False
  mesh: Any = None

  def thinking_budget(self, effort: str | None):
    """The `ThinkingBudget` of replies with this effort, None without a thought: the effort's own, but no more than leaves
    room for the closing and for an answer of a quarter of `max_new_tokens`.

    Raises:
      ValueError: no such effort, or `max_new_tokens` has no room for a closing and an answer.
    """
    from deepseek_v4.generation.requests import ThinkingBudget
    from deepseek_v4.text.chat_template import NONE, THINK_END
    if effort is None or self.template.check_effort(effort) == NONE:
      return None
    close, most = tuple(self.tokenizer.encode(THINK_END)), self.options["max_new_tokens"]
    room = most - len(close) - max(1, most // 4)
    if room < 0:
      least = next(n for n in itertools.count(most) if n - len(close) - max(1, n // 4) >= 0)
      raise ValueError(f"--max_new_tokens = {most}: expected at least {least} with --reasoning_effort = {effort}, whose "
                       f"thought takes {len(close)} tokens to close; or --reasoning_effort = {NONE}")
    own = self.template.budget(effort)
    return ThinkingBudget(room if own is None else min(own, room), close)

  def ids(self, text: str, effort: str | None) -> list[int]:
    """The tokens of a text that `reply` goes on from. A conversation (an effort) has ends of turns in it, which are what its
    replies are stopped at, whatever the tokenizer makes of their spelling."""
    from deepseek_v4.text import chat
    return self.tokenizer.encode(text) if effort is None else chat.to_ids(text, self.tokenizer)

  def check_texts(self, texts: list[str], effort: str | None) -> None:
    """Refuses texts that the model cannot reply to. Ids beyond its vocabulary no tokenizer has that `load_tokenizer` gives.

    Raises:
      ValueError: an empty or too long text.
    """
    config, new = self.model.config, self.options["max_new_tokens"]
    for i, text in enumerate(texts):
      tokens = len(self.ids(text, effort))
      if not 1 <= tokens <= config.max_position_embeddings - new:
        raise ValueError(f"prompt {i + 1} of {len(texts)}: {tokens} tokens; expected from 1 to max_position_embeddings - "
                         f"max_new_tokens = {config.max_position_embeddings} - {new}")

  def reply(self, texts: list[str], number: int, effort: str | None, on_text: Callable[[str], None] | None = None):
    """Replies to encoded texts in one batch, `number` being how many came before.

    Args:
      effort: the texts end where a reply with this effort begins; None = plain text.
      on_text: of a single text: called with each piece of the reply.

    Returns:
      (texts of the replies, Generation).
    """
    import jax

    from deepseek_v4 import sharding
    from deepseek_v4.generation.decode import generate
    budget = self.thinking_budget(effort)
    stream = None if on_text is None else Stream(self.tokenizer, on_text)
    prompts = [self.ids(text, effort) for text in texts]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), number), len(texts))
    with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
      spare = -len(prompts) % sharding.batch_shards()  # rows that the mesh's devices would not have
      on_token = None if stream is None else lambda row, token: stream(row, token) if row == 0 else None
      found = generate(self.model, self.variables, [*prompts, *prompts[-1:] * spare], on_token=on_token,
                       keys=jax.numpy.concatenate([keys, jax.numpy.repeat(keys[-1:], spare)]),
                       stop_tokens=(self.tokenizer.document_end,), thinking_budget=budget, **self.options)
    if stream is not None:
      stream.finish()
    count = len(prompts)
    found = dataclasses.replace(found, tokens=found.tokens[:count], logprobs=found.logprobs[:count],
                                finish=found.finish[:count])
    return [text_of(self.tokenizer, tokens) for tokens in found.tokens], found


def check_options(model_config: Any, leaves: Iterable[str], options: dict[str, Any], drift: bool) -> None:
  """Refuses options of `generate` that cannot work, from the model's configuration and the names of its weights alone.

  Args:
    leaves: names of the checkpoint's arrays.
    options, drift: see `Speaker`.

  Raises:
    ValueError: names the option, its value and what was expected.
  """
  from deepseek_v4.generation import speculative
  from deepseek_v4.generation.sample import Sampling
  Sampling(*(options[name] for name in ("temperature", "top_p", "top_k", "min_p")))
  block = {"mtp": None} if any(name.startswith("params/mtp/") for name in leaves) else {}
  speculative.check(model_config, {"params": block}, options.get("speculative", False))
  if drift or options["cache_storage"] == "mixed":
    model_config.check_hadamard("--drift" if drift else "--cache_storage = mixed")
  if not 1 <= options["max_new_tokens"] < model_config.max_position_embeddings:
    raise ValueError(f"--max_new_tokens = {options['max_new_tokens']}: expected at least 1 and less than "
                     f"max_position_embeddings = {model_config.max_position_embeddings}")


def load(checkpoint: str, options: dict[str, Any], seed: int, *, prompts: Sequence[str] = (), effort: str | None = None,
         chat: bool = False, inference_rounding: bool = False, drift: bool = False, mesh: Any = None,
         compute_dtype: str | None = None) -> Speaker:
  """Reads chat wording, tokenizer and weights, the weights last: of a release they take minutes.

  Args:
    checkpoint: folder of a run or of a converted release.
    options, seed, drift: see `Speaker`.
    prompts: that `answer` will be asked for, to be checked.
    effort: that replies will be asked for.
    chat: whether `converse` will be called, for which the effort None is the release's default. With neither a chat nor an
      effort no wording is read, and plain text needs none.
    inference_rounding: the field of `ModelConfig`.
    mesh: see `Speaker`; every device reads its own part of the weights.
    compute_dtype: the field of `ModelConfig`; None = as stored.

  Raises:
    FileNotFoundError, ValueError: no usable checkpoint or tokenizer there, or options or prompts that do not fit it; see
      `check_options`, `Speaker.thinking_budget` and `Speaker.check_texts`.
  """
  from deepseek_v4 import config, sharding
  from deepseek_v4.checkpoint.convert import CHECKPOINTS, RELEASE
  from deepseek_v4.checkpoint.store import newest_manifest, restore_variables
  from deepseek_v4.model.transformer import DeepseekV4
  from deepseek_v4.text import chat_template
  from deepseek_v4.text.tokenize import load_tokenizer
  from deepseek_v4.training import conversations
  _, manifest = newest_manifest(Path(checkpoint) / CHECKPOINTS)
  stored = manifest["config"]
  model_config = dataclasses.replace(config.from_dict(config.ModelConfig, stored["model"]), scan_layers=False,
                                     expert_exchange="auto", inference_rounding=inference_rounding)
  if compute_dtype is not None:
    model_config = dataclasses.replace(model_config, compute_dtype=compute_dtype)
  check_options(model_config, manifest["leaves"], options, drift)
  if mesh is not None:
    if mesh.shape["context"] > 1:
      raise ValueError(f"--mesh: context = {mesh.shape['context']}: expected 1, as replies come token by token")
    sharding.check_model_divides(model_config, mesh)
  release = Path(checkpoint) / RELEASE
  source = release if (release / "tokenizer.json").is_file() else stored.get("data", {}).get("tokenizer")
  template = None
  if chat or effort is not None:
    template = chat_template.DEFAULT
    if (release / "encoding").is_dir():
      template = chat_template.ChatTemplate.from_checkpoint(release)
    elif stored.get("data", {}).get("chat_template") is not None:
      template = conversations.template_of(config.from_dict(config.DataConfig, stored["data"]))
    effort = template.check_effort(effort)
  tokenizer = load_tokenizer(source, model_config.vocab_size)
  speaker = Speaker(DeepseekV4(model_config), None, tokenizer, template, options, seed, drift, mesh)
  speaker.thinking_budget(effort)
  speaker.check_texts(encoded(speaker, prompts, effort), effort)
  # Layers that are not scanned update their caches in place.
  variables, _, _ = restore_variables(Path(checkpoint) / CHECKPOINTS, scan_layers=False, mesh=mesh)
  return dataclasses.replace(speaker, variables=variables)


def encoded(speaker: Speaker, prompts: Sequence[str], effort: str | None) -> list[str]:
  """The texts that replies to prompts go on from: the prompts themselves, or with an effort a user's messages.

  Raises:
    ValueError: no such effort.
  """
  from deepseek_v4.text import chat
  if effort is None:
    return list(prompts)
  return [chat.encode([{"role": "user", "content": prompt}], reasoning_effort=effort, template=speaker.template)
          for prompt in prompts]


def summary(speaker: Speaker, texts: list[str], found, effort: str | None = None) -> str:
  """Speeds, sizes and the budget of a thought in a line; times include compilation. With `speaker.drift` a second line on
  the mixed cache."""
  prompts = [speaker.ids(text, effort) for text in texts]
  prompt_tokens, replies = sum(map(len, prompts)), sum(map(len, found.tokens))
  accepted = "" if found.acceptance is None else f"{found.acceptance:.1%} of the drafts accepted; "
  budget = speaker.thinking_budget(effort)
  thought = "" if budget is None else f"thought of at most {budget.tokens:,} tokens; "
  line = (f"prompt {prompt_tokens:,} tokens, {prompt_tokens / found.prefill_seconds:,.1f} tokens/s; "
          f"reply {replies:,} tokens, {replies / max(found.decode_seconds, 1e-9):,.1f} tokens/s; "
          f"{thought}{accepted}cache {found.cache_bytes / 2**20:,.2f} MiB ({speaker.options['cache_storage']}); "
          f"ended by {', '.join(sorted(set(found.finish)))}")
  if not speaker.drift:
    return line
  from deepseek_v4.generation.drift import storage_drift
  drift = storage_drift(speaker.model, speaker.variables, [p + reply for p, reply in zip(prompts, found.tokens)],
                        chunk_size=speaker.options["chunk_size"])
  return (f"{line}\nmixed against compute cache, {drift.tokens:,} tokens: logits {drift.mean:.2g} apart, at most "
          f"{drift.largest:.2g}, of a spread of {drift.spread:.2g}; {100 * drift.same_choice:.1f}% the same first choice; "
          f"KL {drift.divergence:.2g} nats")


def answer(speaker: Speaker, prompts: list[str], effort: str | None, show: Callable[[str], None]) -> None:
  """Shows the replies to prompts: a single one as it comes, several when all are there."""
  texts = encoded(speaker, prompts, effort)
  replies, found = speaker.reply(texts, 0, effort, show if len(texts) == 1 else None)
  if len(texts) > 1:
    show("\n".join(f"[{i + 1}] {reply}" for i, reply in enumerate(replies)))
  show(f"\n{summary(speaker, texts, found, effort)}\n")


def converse(speaker: Speaker, effort: str | None, ask: Callable[[], str], show: Callable[[str], None]) -> None:
  """A conversation until `ask` returns nothing. A message that the context has no room for is left out, which is said."""
  from deepseek_v4.text import chat
  effort = speaker.template.check_effort(effort)
  messages: list[dict[str, Any]] = []
  while line := ask():
    messages.append({"role": "user", "content": line})
    text = chat.encode(messages, reasoning_effort=effort, template=speaker.template)
    try:
      speaker.check_texts([text], effort)
    except ValueError as error:
      messages.pop()
      show(f"the conversation with this message is too long ({error}): left out; a shorter one may fit\n")
      continue
    (reply,), found = speaker.reply([text], len(messages), effort, show)
    show(f"\n{summary(speaker, [text], found, effort)}\n")
    messages.append(message(reply, effort, speaker.template))


def message(reply: str, effort: str, template: Any) -> dict[str, Any]:
  """The assistant's message of a reply, also of one that was cut off or has no such format: what comes before the end of a
  thought, or without an end all of it, stays reasoning, and the rest is kept as it came."""
  from deepseek_v4.text import chat
  from deepseek_v4.text.chat_template import NONE, THINK_END
  try:
    return chat.parse(reply, reasoning_effort=effort, template=template)
  except ValueError:
    reasoning, _, content = ("", "", reply) if effort == NONE else reply.partition(THINK_END)
    return {"role": "assistant", "content": content, "reasoning_content": reasoning}


def _ask() -> str:
  try:
    return input("> ").strip()
  except EOFError:
    return ""


def mesh_settings(text: str):
  """The `MeshConfig` of AXIS=DEVICES,...

  Raises:
    ValueError: no such axis, or no such number.
  """
  from deepseek_v4 import config
  try:
    return config.override(config.MeshConfig(), text.split(","))
  except ValueError as error:
    raise ValueError(f"--mesh = {text!r}: {error}") from error


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells at INFO level how it reads
  value = lambda name: flags.FLAGS[name].value
  if sum((value("prompt") is not None, value("prompts") is not None, value("chat"))) != 1:
    sys.exit("error: expected one of --prompt, --prompts and --chat")
  show = lambda text: print(text, end="", flush=True)
  try:
    processes.refuse_several("launch.generate", os.environ)
    prompts = [value("prompt")]
    if value("prompts") is not None:
      if not Path(value("prompts")).is_file():
        raise FileNotFoundError(f"--prompts = {value('prompts')!r}: expected a file with a prompt on each line")
      lines = Path(value("prompts")).read_text(encoding="utf-8").splitlines()
      prompts = [line for line in lines if line.strip()]
      if not prompts:
        raise ValueError(f"--prompts = {value('prompts')}: expected at least one line with text")
    options = {name: value(name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "chunk_size",
                                              "cache_storage")}
    if value("drafts") and not value("speculative"):
      raise ValueError(f"--drafts = {value('drafts')}: expected --speculative with it")
    if value("drift") and value("inference_rounding"):
      raise ValueError("--drift with --inference_rounding: expected one of them, since both storages round the same then")
    if value("drift") and value("mesh") is not None:
      raise ValueError(f"--mesh = {value('mesh')!r} with --drift: expected one of them, since the drift is one device's")
    options["speculative"] = (value("drafts") or 1) if value("speculative") else False
    mesh = None
    if value("mesh") is not None:
      settings = mesh_settings(value("mesh"))
      emulate_devices(settings.emulated_devices)
      from deepseek_v4.sharding import make_mesh  # wakes JAX
      mesh = make_mesh(settings)
    speaker = load(value("checkpoint"), options, value("seed"), effort=value("reasoning_effort"),
                   prompts=() if value("chat") else prompts, chat=value("chat"),
                   inference_rounding=value("inference_rounding"), drift=value("drift"), mesh=mesh,
                   compute_dtype=value("compute_dtype"))
    if value("chat"):
      converse(speaker, value("reasoning_effort"), _ask, show)
    else:
      answer(speaker, prompts, value("reasoning_effort"), show)
  except (ValueError, FileNotFoundError) as error:
    if logging.get_verbosity() >= logging.DEBUG:
      raise
    sys.exit(f"error: {error}\n(--verbosity=1 shows where)")


if __name__ == "__main__":
  use_huge_pages()
  define_flags()
  app.run(main)
