"""Replies to prompts, sampled by our own decoder, with all that training on them needs; what a sample is (report
5.2.3).

Samples live on the host: token ids and numbers as Python and NumPy hold them, so that they can be written to disk, sorted
and packed. A request draws the same reply in any batch, so a rollout that was cut off can be made again from its requests.

Axis letters: n tokens fed   m tokens of a reply   L layers   k experts per token   V vocabulary
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np

from deepseek_v4 import sharding
from deepseek_v4.config_checks import refuse
from deepseek_v4.generation.decode import RECORDS, Drawn, generate
from deepseek_v4.generation.requests import ThinkingBudget, Thought
from deepseek_v4.model.transformer import DeepseekV4


@dataclasses.dataclass(frozen=True)
class Request:
  """A reply that is asked for.

  Attributes:
    prompt: token ids, at least one.
    seed: whole numbers that its random key is made of: the first is a seed, the others are folded in one after another.
    budget: of a reply that begins inside a thought; None = no limit.
    metadata: goes through to the sample, such as the group or the task it belongs to.
    begun: the first tokens of the reply, where they have been drawn already, and their log-probabilities.
  """

  prompt: tuple[int, ...]
  seed: tuple[int, ...]
  budget: ThinkingBudget | None = None
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  begun: tuple[int, ...] = ()
  begun_logprobs: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sample:
  """A reply that was drawn.

  Attributes:
    prompt: token ids.
    reply: token ids, the stop token included.
    logprobs: of each token of the reply when it was drawn, in nats: under the distribution that it was drawn from, with
      temperature and filters. 0 where nothing was drawn.
    drawn: whether the model drew the token; False where a thinking budget put it there.
    finish: "stop" (a stop token came) or "length".
    seed: that of the request.
    experts: uint16 [L, n, k], the experts of the n tokens that were fed, all but the last of prompt + reply; or None.
    kept: uint8 [m, ceil(V / 8)], the tokens that each one of the reply was drawn from, as bits in the order of
      `numpy.packbits`; or None.
    metadata: that of the request, and what is added later.
  """

  prompt: tuple[int, ...]
  reply: tuple[int, ...]
  logprobs: tuple[float, ...]
  drawn: tuple[bool, ...]
  finish: str
  seed: tuple[int, ...]
  experts: np.ndarray | None = None
  kept: np.ndarray | None = None
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def tokens(self) -> tuple[int, ...]:
    """Prompt and reply."""
    return (*self.prompt, *self.reply)


def check_mesh(mesh: jax.sharding.Mesh, batch_size: int, field: str) -> None:
  """Refuses a mesh on which batches of so many replies, a setting of this name, cannot be decoded.

  Raises:
    ValueError: names the setting.
  """
  if mesh.shape["context"] > 1:
    refuse("mesh.context", mesh.shape["context"], "1, as replies are decoded on the same mesh")
  shards = mesh.size // mesh.shape["tensor"]
  if batch_size % shards:
    refuse(field, batch_size, f"a multiple of {sharding.BATCH_SPLIT} = {shards}")


def sample_replies(model: DeepseekV4, variables: Any, requests: Sequence[Request], *, max_new_tokens: int, batch_size: int,
                   stop_tokens: Sequence[int], temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
                   record: Sequence[str] = (), chunk_size: int = 512, mesh: jax.sharding.Mesh | None = None,
                   on_batch: Callable[[list[Sample]], None] | None = None,
                   on_drawn: Callable[[list[Drawn]], None] | None = None) -> list[Sample]:
  """Draws a reply to each request, in batches.

  Every batch has `batch_size` rows (the last one is filled up with a request that is there already), so that little is
  compiled.

  Args:
    model, variables: as in `DeepseekV4.apply`; `scan_layers=False` decodes faster.
    requests: what is asked for.
    max_new_tokens: of each reply.
    batch_size: requests that are worked on at a time.
    stop_tokens: ids that end a reply.
    temperature, top_p, top_k: see `generation.sample.Sampling`; one value for all.
    record: what samples hold beside the tokens: "experts", "kept".
    chunk_size: tokens of a prompt that are fed at a time.
    mesh: the devices that hold the variables; None = the default one.
    on_batch: called with the samples of each batch once they are there, such as to write them down.
    on_drawn: called with the tokens that came together, by the number of their request, before any are drawn after them.

  Returns:
    The samples in the order of their requests.

  Raises:
    ValueError: what `generate` refuses, a request without a seed, or a batch that the mesh does not divide.
  """
  if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
    refuse("batch_size", batch_size, "a whole number, at least 1")
  if not set(record) <= set(RECORDS):
    refuse("record", tuple(record), f"some of {', '.join(RECORDS)}")
  for i, request in enumerate(requests):
    if not request.seed:
      refuse(f"requests[{i}].seed", request.seed, "at least one whole number")
    if len(request.begun) != len(request.begun_logprobs) or (request.begun and record):
      refuse(f"requests[{i}].begun", f"{len(request.begun)} tokens", "a log-probability for each, and nothing to record")
  samples: list[Sample | None] = [None] * len(requests)
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    if batch_size % sharding.batch_shards():
      refuse("batch_size", batch_size, f"a multiple of {sharding.BATCH_SPLIT} = {sharding.batch_shards()}")
    for start in range(0, len(requests), batch_size):
      places = range(len(requests))[start:start + batch_size]
      chosen = [requests[i] for i in places]
      filled = [*chosen, *chosen[-1:] * (batch_size - len(chosen))]
      tell = None if on_drawn is None else functools.partial(_tell, on_drawn, places)
      found = generate(model, variables, [request.prompt for request in filled], keys=_keys(filled), on_drawn=tell,
                       begun=[request.begun for request in filled],
                       thinking_budget=[request.budget for request in filled], max_new_tokens=max_new_tokens,
                       temperature=temperature, top_p=top_p, top_k=top_k, stop_tokens=stop_tokens, chunk_size=chunk_size,
                       record=record)
      new = [_sample(request, found, row, stop_tokens) for row, request in enumerate(chosen)]
      for i, sample in zip(places, new, strict=True):
        samples[i] = sample
      if on_batch is not None:
        on_batch(new)
  return samples


def _tell(on_drawn: Callable[[list[Drawn]], None], places: Sequence[int], new: list[Drawn]) -> None:
  """Hands tokens of a batch on; those of rows that fill it up are nobody's."""
  on_drawn([dataclasses.replace(drawn, request=places[drawn.request]) for drawn in new if drawn.request < len(places)])


def _keys(requests: Sequence[Request]) -> jax.Array:
  """Typed keys, one per request."""
  def key(seed):
    made = jax.random.key(seed[0])
    for number in seed[1:]:
      made = jax.random.fold_in(made, number)
    return made

  return jax.numpy.stack([key(request.seed) for request in requests])


def _sample(request: Request, found: Any, row: int, stop_tokens: Sequence[int]) -> Sample:
  """The sample of a row of a `Generation`."""
  reply = [*request.begun, *found.tokens[row]]
  return Sample(tuple(request.prompt), tuple(reply), (*request.begun_logprobs, *found.logprobs[row]),
                _drawn(reply, request.budget, stop_tokens),
                found.finish[row], tuple(request.seed), None if found.experts is None else found.experts[row],
                None if found.kept is None else found.kept[row], dict(request.metadata))


def _drawn(reply: Sequence[int], budget: ThinkingBudget | None, stop_tokens: Sequence[int]) -> tuple[bool, ...]:
  """Which tokens of a reply were drawn: the decoder's rule of what a budget puts next, applied again."""
  thought, drawn = Thought(budget, stop_tokens), []
  for token in reply:
    drawn.append(thought.forced < 0)
    thought.add(token)
  return tuple(drawn)
