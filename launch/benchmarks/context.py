"""A long context for real: one document is fed in chunks, twice with different chunk sizes, and gone on with token by token.

The model is small, so that two processor cores read a million tokens, but has every kind of layer and the released sizes of
window, compression and selection. Its weights are random, the text is Python's standard library, byte by byte.

What a token costs should grow with what it reads and with nothing else: the index keys it scores, the entries it selects of
them, and all heavily compressed entries. So its cost should be a line over the number of these entries; the line through two
places in the first quarter predicts the end. Cost is here the time of the processor, summed over its cores, which does not
depend on who else uses the machine; what a clock on the wall says stands beside it.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, DataConfig, ModelConfig
from deepseek_v4.generation import decode
from deepseek_v4.model.cache import init_cache
from deepseek_v4.text.tokenize import BYTE_VOCABULARY, ByteTokenizer
from deepseek_v4.training.sources import read_texts
from launch.benchmarks import ours
from launch.benchmarks.report import Row
from launch.benchmarks.worker import memory, settle

CONFIG = ModelConfig(
    vocab_size=BYTE_VOCABULARY, hidden_size=64, num_hidden_layers=3, layer_types=(SLIDING, CSA, HCA),
    mlp_layer_types=(HASH, LEARNED, LEARNED), num_attention_heads=4, head_dim=32, qk_rope_head_dim=8, q_lora_rank=32,
    o_groups=2, o_lora_rank=32, sliding_window=128, csa_compress_rate=4, hca_compress_rate=128, index_n_heads=2,
    index_head_dim=16, index_topk=512, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
    num_nextn_predict_layers=0, max_position_embeddings=1_048_576, init_std=0.125, mhc_init="zero", scan_layers=False)
CHUNKS = (4096, 3000)
DECODED = 32  # tokens that follow the prompt one by one
SHORTEST = 8192
PLACES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of all tokens, where rows are made
FITTED = (1 / 16, 1 / 4)  # places whose cost predicts the others
_WINDOW = 8  # chunks before a place, of which the fastest counts: others use the machine, too
_PAUSE = 10.0  # seconds between two lines of progress
LOGITS_APART, GROWTH, MINUTES = 1e-3, 1.3, 60.0


def check_tokens(tokens: int, chunks: Sequence[int]) -> None:
  """Refuses lengths that make no measurement.

  Raises:
    ValueError: one of them.
  """
  if not SHORTEST <= tokens <= CONFIG.max_position_embeddings:
    raise ValueError(f"--tokens = {tokens}: expected {SHORTEST} to {CONFIG.max_position_embeddings}")
  if len(chunks) != 2 or chunks[0] == chunks[1] or not all(1 <= size <= tokens for size in chunks):
    raise ValueError(f"--chunks = {','.join(map(str, chunks))}: expected two different numbers of tokens")


# ---- what goes in -----------------------------------------------------------------------------------------------------
def text(tokens: int) -> np.ndarray:
  """The first ids int32 [tokens] of the standard library's sources, file after file."""
  tokenizer = ByteTokenizer(fim=None)
  files = tokenizer.encode_documents(read_texts(DataConfig(), "train").texts)
  ids = np.concatenate([part for file in files for part in (file, [tokenizer.document_end])])
  return np.resize(ids.astype(np.int32), tokens)


def entries_read(config: ModelConfig, position: float) -> float:
  """Index keys that a token at this position scores, entries it selects of them, and heavily compressed entries it reads,
  over all layers."""
  read = {SLIDING: 0.0, CSA: position / config.csa_compress_rate, HCA: position / config.hca_compress_rate}
  read[CSA] += min(read[CSA], config.index_topk)
  return sum(read[kind] for kind in config.layer_types)


# ---- one run ----------------------------------------------------------------------------------------------------------
class Chunk(NamedTuple):
  """Tokens before and after a chunk, what it took by the clock, and of the processor's time."""

  start: int
  end: int
  seconds: float
  processor_seconds: float

  @property
  def cost(self) -> float:
    """Seconds of the processor per token."""
    return self.processor_seconds / (self.end - self.start)


@dataclasses.dataclass
class Clock:
  """Seconds of the chunks of one prefill, and what is said meanwhile.

  Attributes:
    tokens: of the prompt.
    name: of the run, for its lines.
    runs_after: runs of about the same length that come after this one, for the time left.
    say: prints a line.
    chunks: all that are computed.
    steady: those that did not wait for a compilation: not the first one of its width and reach.
    resident: bytes of the process in the middle of the prefill.
    temporary: bytes beside them that chunks took after that.
  """

  tokens: int
  name: str
  runs_after: int
  say: Callable[[str], None]
  chunks: list[Chunk] = dataclasses.field(default_factory=list)
  steady: list[Chunk] = dataclasses.field(default_factory=list)
  resident: int | None = None
  temporary: int | None = None

  def __post_init__(self):
    self._programs: set[tuple[int, int]] = set()
    self._started = self._last = self._said = time.perf_counter()
    self._processor = time.process_time()

  def __call__(self, fed: int) -> None:
    """A chunk is computed."""
    now = time.perf_counter()
    before = self.chunks[-1].end if self.chunks else 0
    chunk = Chunk(before, fed, now - self._last, time.process_time() - self._processor)
    program = (fed - before, decode.reach_of(fed, CONFIG.max_position_embeddings))
    self.chunks.append(chunk)
    if program in self._programs:
      self.steady.append(chunk)
    self._programs.add(program)
    if self.steady[-1:] == [chunk] and fed >= self.tokens / 2:
      self._look_at_memory()
    if now - self._said >= _PAUSE or fed == self.tokens:
      self._said = now
      left = self.seconds_left()
      left += self.runs_after * (now - self._started + left)
      self.say(f"{self.name}: {fed:,}/{self.tokens:,} tokens  {(fed - before) / chunk.seconds:,.0f} tokens/s  "
               f"{int(left) // 60:02d}:{int(left) % 60:02d} left")
    self._last, self._processor = time.perf_counter(), time.process_time()

  def _look_at_memory(self) -> None:
    if self.resident is None:
      self.resident = settle()
    elif (peak := memory("VmHWM")) is not None:
      self.temporary = peak - self.resident

  def seconds_left(self) -> float:
    """Of this prefill, if the cost of a token goes on growing as it did."""
    chunks = self.steady or self.chunks
    cost = lambda chunks: sorted(chunk.seconds / (chunk.end - chunk.start) for chunk in chunks)[len(chunks) // 2]
    early, late = chunks[:_WINDOW], chunks[-_WINDOW:]
    slope = max(cost(late) - cost(early), 0) / max(late[-1].end - early[-1].end, 1)
    left = self.tokens - self.chunks[-1].end
    return left * (cost(late) + slope * left / 2)


def run(model: dsv4.DeepseekV4, variables: Any, ids: np.ndarray, chunk_size: int, follow: np.ndarray | None, clock: Clock):
  """Prefill of all ids but the last `DECODED`, then token by token.

  Args:
    follow: int32 [DECODED] ids that are fed after the prompt; None = the likeliest, one after another.

  Returns:
    (logits [2, V] after the prompt and at the end, ids that were fed, seconds of each token, cache).
  """
  cache = init_cache(model.config, 1, len(ids))
  prompt = ids[:len(ids) - DECODED].tolist()
  cache, logits = decode.prefill(model, variables, cache, [prompt], chunk_size=chunk_size, on_chunk=clock)
  found, fed, seconds = [np.asarray(logits[0])], [], []
  for number in range(DECODED):
    token = int(found[-1].argmax() if follow is None else follow[number])
    start = time.perf_counter()
    cache, logits = decode.advance(model, variables, cache, np.array([[token]], np.int32), np.ones((1, 1), np.int32), logits,
                                   reach=decode.reach_of(len(prompt) + number + 1, cache.max_length))
    last = np.asarray(logits[0])
    seconds.append(time.perf_counter() - start)
    fed.append(token)
    found = [found[0], last]
  return np.stack(found), np.array(fed, np.int32), seconds, cache


# ---- rows -------------------------------------------------------------------------------------------------------------
def place_rows(config: ModelConfig, clock: Clock, tokens: int, chunk_size: int) -> list[Row]:
  """A row per place: the cheapest of the chunks before it, what it reads, and what the line through two places predicts."""
  rows = []
  for share in PLACES:
    before = [chunk for chunk in clock.steady if chunk.end <= share * tokens][-_WINDOW:]
    chunk = min(before, key=lambda chunk: chunk.cost, default=None)
    if chunk is None or (rows and rows[-1]["position"] == chunk.end):
      continue
    rows.append({"case": f"prefill at {share:.4g}", "side": "ours", "chunk_size": chunk_size, "share": share,
                 "position": chunk.end, "entries_read": entries_read(config, (chunk.start + chunk.end) / 2),
                 "seconds_per_token": chunk.seconds / (chunk.end - chunk.start), "processor_seconds_per_token": chunk.cost})
  fitted = [row for row in rows if row["share"] in FITTED]
  if len(fitted) == len(FITTED):
    (x0, y0), (x1, y1) = ((row["entries_read"], row["processor_seconds_per_token"]) for row in fitted)
    slope = max((y1 - y0) / (x1 - x0), 0.0)
    for row in rows:
      row["predicted_processor_seconds_per_token"] = y0 + slope * (row["entries_read"] - x0)
      row["over_prediction"] = row["processor_seconds_per_token"] / row["predicted_processor_seconds_per_token"]
  return rows


def measure(tokens: int, chunks: Sequence[int], say: Callable[[str], None]) -> list[Row]:
  """Rows of the places of each run, and a last one for the whole.

  Raises:
    ValueError: see `check_tokens`.
  """
  check_tokens(tokens, chunks)
  started = time.perf_counter()
  model, variables, ids = dsv4.DeepseekV4(CONFIG), ours.random_variables(CONFIG), text(tokens)
  predicted = dsv4.count(CONFIG, tokens).cache_bytes["compute"]
  say(f"{dsv4.count(CONFIG, tokens).parameters.total:,} parameters, {tokens:,} tokens, "
      f"cache {sum(predicted.values()) / 2**20:,.1f} MiB by the formula")
  rows, logits, follow, decoded, temporary = [], [], None, [], []
  for number, chunk_size in enumerate(chunks):
    clock = Clock(tokens - DECODED, f"chunks of {chunk_size:,}", len(chunks) - 1 - number, say)
    found, follow, seconds, cache = run(model, variables, ids, chunk_size, follow, clock)
    rows += place_rows(CONFIG, clock, tokens, chunk_size)
    logits.append(found)
    decoded += seconds[1:]  # the first one compiles
    held = cache.bytes_by_kind
    del cache
    temporary += [] if clock.temporary is None else [clock.temporary]
  apart = np.abs(logits[0] - logits[1]).max(-1)
  whole = {"case": "whole", "side": "ours", "tokens": tokens, "chunk_sizes": list(chunks),
           "seconds": time.perf_counter() - started, "decode_seconds_per_token": float(np.median(decoded)),
           "logits_apart": float(apart[0]), "logits_apart_after_decoding": float(apart[1]),
           "logits_standard_deviation": float(logits[0].std()), "cache_bytes": sum(held.values()),
           "cache_bytes_predicted": sum(predicted.values()), "cache_bytes_by_kind": held,
           "cache_bytes_by_kind_predicted": dict(predicted), "resident_bytes": clock.resident,
           "temporary_bytes": max(temporary, default=None)}
  return [*rows, whole]


def targets(rows: Sequence[Row]) -> list[Row]:
  """What should be reached, with the values of these rows."""
  whole = rows[-1]
  ends = [row for row in rows if row.get("share") == 1]
  growth = max((row["over_prediction"] for row in ends if "over_prediction" in row), default=None)
  apart = max(whole["logits_apart"], whole["logits_apart_after_decoding"])
  found = [("processor time of a token at the end over what the entries read predict", GROWTH, growth),
           ("minutes in all", MINUTES, whole["seconds"] / 60),
           (f"logits of two chunk sizes apart (standard deviation {whole['logits_standard_deviation']:.2f})", LOGITS_APART,
            apart),
           ("bytes of the cache apart from dsv4.count's", 0, abs(whole["cache_bytes"] - whole["cache_bytes_predicted"]))]
  return [{"target": f"context: {text}, at most {bound:g}", "bound": bound, "value": value,
           "reached": None if value is None else value <= bound} for text, bound, value in found]


def table(rows: Sequence[Row]) -> str:
  """The rows as text."""
  titles = ("chunks of", "tokens", "entries read", "us/token", "processor", "predicted", "over it")
  lines = ["".join(title.rjust(14) for title in titles)]
  for row in rows[:-1]:
    micro = [None if row.get(name) is None else row[name] * 1e6 for name in (
      "seconds_per_token", "processor_seconds_per_token", "predicted_processor_seconds_per_token")]
    numbers = (row["chunk_size"], row["position"], row["entries_read"], *micro)
    cells = ["-" if number is None else f"{number:,.0f}" for number in numbers]
    cells.append(f"{row['over_prediction']:.2f}" if "over_prediction" in row else "-")
    lines.append("".join(cell.rjust(14) for cell in cells))
  whole, mib = rows[-1], 2**20
  temporary = whole["temporary_bytes"]
  lines += [f"decoding: {whole['decode_seconds_per_token'] * 1e3:,.1f} ms a token",
            f"cache: {whole['cache_bytes'] / mib:,.1f} MiB" + (
                "" if temporary is None else f"; a chunk takes {temporary / mib:,.0f} MiB beside it"),
            f"both runs: {whole['seconds'] / 60:.1f} minutes; logits at most "
            f"{max(whole['logits_apart'], whole['logits_apart_after_decoding']):.1e} apart"]
  return "\n".join(lines)


EXPLANATION = f"""\
entries read: index keys scored, entries selected of them and heavily compressed entries, of the token in the chunk's middle.
us/token: of the cheapest of the {_WINDOW} chunks up to there, none that waited for a compilation; processor: its time, all
cores; predicted: a fixed cost and a cost per entry read, from the rows at {FITTED[0]:.4g} and {FITTED[1]:.4g} of the
tokens."""
