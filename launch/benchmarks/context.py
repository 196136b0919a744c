"""A long context for real: one document is fed in chunks, twice with different chunk sizes, and gone on with token by token.

The model is small, so that two processor cores read a million tokens, but has every kind of layer and the released sizes of
window, compression and selection. Its weights are random, the text is Python's standard library, byte by byte.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Callable, NamedTuple, Sequence

import jax
import numpy as np

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, DataConfig, ModelConfig
from deepseek_v4.generation import decode
from deepseek_v4.model.cache import init_cache
from deepseek_v4.text.tokenize import BYTE_VOCABULARY, ByteTokenizer
from deepseek_v4.training.sources import read_texts
from launch.benchmarks import ours
from launch.benchmarks.context_rows import NEIGHBOURS, Chunk, place_rows
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
_PAUSE = 10.0  # seconds between two lines of progress


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


# ---- one run ----------------------------------------------------------------------------------------------------------
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
    peak: bytes of the process at most.
  """

  tokens: int
  name: str
  runs_after: int
  say: Callable[[str], None]
  chunks: list[Chunk] = dataclasses.field(default_factory=list)
  steady: list[Chunk] = dataclasses.field(default_factory=list)
  resident: int | None = None
  temporary: int | None = None
  peak: int | None = None

  def __post_init__(self):
    self._programs: set[tuple[int, int]] = set()
    self.begin()

  def begin(self, compiled: tuple[int, int] | None = None) -> None:
    """Now the first chunk starts; a program (width, reach) that exists already need not be waited for."""
    self._programs |= set() if compiled is None else {compiled}
    self._started = self._last = self._said = time.perf_counter()
    self._processor = time.process_time()

  def __call__(self, fed: int) -> None:
    """A chunk is computed."""
    now = time.perf_counter()
    before = self.chunks[-1].end if self.chunks else 0
    chunk = Chunk(before, fed, now - self._last, time.process_time() - self._processor)
    program = (fed - before, decode.reach_of(fed, self.tokens + DECODED))
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
    peak = memory("VmHWM")
    if peak is None:  # no such system
      return
    self.peak = max(self.peak or 0, peak)
    if self.resident is None:
      self.resident = settle()
    else:
      self.temporary = peak - self.resident

  def seconds_left(self) -> float:
    """Of this prefill, if the cost of a token goes on growing as it did."""
    chunks = self.steady or self.chunks
    cost = lambda chunks: sorted(chunk.seconds / (chunk.end - chunk.start) for chunk in chunks)[len(chunks) // 2]
    early, late = chunks[:NEIGHBOURS], chunks[-NEIGHBOURS:]
    slope = max(cost(late) - cost(early), 0) / max(late[-1].end - early[-1].end, 1)
    left = self.tokens - self.chunks[-1].end
    return left * (cost(late) + slope * left / 2)


class Found(NamedTuple):
  """What one run gave.

  Attributes:
    logits: [2, V], after the prompt and at the end.
    fed: int32 [DECODED], ids that came after the prompt.
    decode_seconds: of each of them.
    cache_bytes: of the arrays, by kind.
    grown: bytes that the process took for them; None where the system does not say.
    temporary: bytes that the compiler plans for a chunk's intermediate results.
  """

  logits: np.ndarray
  fed: np.ndarray
  decode_seconds: list[float]
  cache_bytes: dict[str, int]
  grown: int | None
  temporary: int


def run(model: dsv4.DeepseekV4, variables: Any, ids: np.ndarray, chunk_size: int, follow: np.ndarray | None,
        clock: Clock) -> Found:
  """Prefill of all ids but the last `DECODED`, then token by token.

  The first chunk is fed twice, to another cache before, so that its time is not that of a compilation.

  Args:
    follow: int32 [DECODED] ids that are fed after the prompt; None = the likeliest, one after another.
  """
  prompt, room = ids[:len(ids) - DECODED].tolist(), len(ids)
  jax.block_until_ready(decode.prefill(model, variables, init_cache(model.config, 1, room), [prompt[:chunk_size]],
                                       chunk_size=chunk_size))
  before = settle()
  cache = jax.block_until_ready(init_cache(model.config, 1, room))
  grown = None if before is None else memory("VmRSS") - before
  held = cache.bytes_by_kind
  clock.begin((chunk_size, decode.reach_of(chunk_size, room)))
  cache, logits = decode.prefill(model, variables, cache, [prompt], chunk_size=chunk_size, on_chunk=clock)
  temporary = _planned(model, variables, cache, logits, chunk_size)
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
  return Found(np.stack(found), np.array(fed, np.int32), seconds, held, grown, temporary)


def _planned(model, variables, cache, logits, chunk_size: int) -> int:
  """Bytes that the program of the last whole chunk takes beside its arguments; it was compiled before."""
  part = np.zeros((1, chunk_size), np.int32)
  lowered = decode.advance.lower(model, variables, cache, part, part, logits,
                                 reach=decode.reach_of(cache.max_length, cache.max_length))
  return lowered.compile().memory_analysis().temp_size_in_bytes


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
  rows, runs, clocks = [], [], []
  for number, chunk_size in enumerate(chunks):
    clock = Clock(tokens - DECODED, f"chunks of {chunk_size:,}", len(chunks) - 1 - number, say)
    runs.append(run(model, variables, ids, chunk_size, runs[0].fed if runs else None, clock))
    clocks.append(clock)
    rows += place_rows(CONFIG, clock.steady, tokens, chunk_size)
  apart = np.abs(runs[0].logits - runs[1].logits).max(-1)
  most = lambda values: max((value for value in values if value is not None), default=None)
  whole = {"case": "whole", "side": "ours", "tokens": tokens, "chunk_sizes": list(chunks),
           "seconds": time.perf_counter() - started,
           "decode_seconds_per_token": float(np.median([s for found in runs for s in found.decode_seconds[1:]])),
           "logits_apart": float(apart[0]), "logits_apart_after_decoding": float(apart[1]),
           "logits_standard_deviation": float(runs[0].logits.std()), "cache_bytes": sum(runs[-1].cache_bytes.values()),
           "cache_bytes_predicted": sum(predicted.values()), "cache_bytes_by_kind": runs[-1].cache_bytes,
           "cache_bytes_by_kind_predicted": dict(predicted), "cache_resident_bytes": most(found.grown for found in runs),
           "temporary_bytes": most(clock.temporary for clock in clocks),
           "temporary_bytes_predicted": max(found.temporary for found in runs),
           "peak_bytes": most([memory("VmHWM"), *(clock.peak for clock in clocks)])}
  return [*rows, whole]
