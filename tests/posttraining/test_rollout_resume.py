"""A rollout that is interrupted goes on behind the tokens that exist: the same replies, no token sampled twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.generation.decode import generate
from deepseek_v4.posttraining.journal import Journal, draw_missing, file_of
from deepseek_v4.posttraining.rollout import Request, sample_replies
from tests.posttraining.small import SHALLOW, random_state, run_config

ROOT = Path(__file__).resolve().parents[2]
LENGTH, STOP = 24, 7
# Kills itself when tokens were written for the third time: at most 1 + 1 + 16 of the 24 of each reply of the first batch.
KILLED = """
import os, signal, sys
from tests.posttraining import test_rollout_resume as test
times = []
def die():
  times.append(1)
  if len(times) == 3:
    os.kill(os.getpid(), signal.SIGKILL)
test.draw(sys.argv[1], die)
"""


def draw(folder, on_saved=lambda: None):
  """(replies, log-probabilities, tokens drawn now) of six requests in batches of four."""
  state = random_state(run_config([("t", "a", "b", 1.0)], model=SHALLOW))
  rng = np.random.default_rng(0)
  prompts = [tuple(rng.integers(8, SHALLOW.vocab_size, n).tolist()) for n in (3, 6, 1, 5, 2, 6)]

  def sample(requests, **given):
    # What was drawn is fed in chunks as wide as a prompt is filled up to: one width to compile.
    return sample_replies(dsv4.DeepseekV4(SHALLOW), {"params": state.params, "router": state.router}, requests,
                          batch_size=4, temperature=1.5, chunk_size=8, **given)

  with Journal(folder, 0, {"prompts": prompts}, len(prompts)) as journal:
    before = journal.count
    requests = [Request(prompt, (5, i)) for i, prompt in enumerate(prompts)]
    replies = draw_missing(journal, requests, sample, max_new_tokens=LENGTH, stop_tokens=(STOP,), on_saved=on_saved)
    return replies, journal.logprobs, journal.count - before


class Interrupted(Exception):
  pass


def interrupt(folder):
  """Draws in this process, until tokens were written for the third time."""
  times = []

  def on_saved():
    times.append(1)
    if len(times) == 3:
      raise Interrupted

  with pytest.raises(Interrupted):
    draw(folder, on_saved)


def kill(folder):
  """Draws in another process, which is killed by SIGKILL at the same place."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
                              "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                              "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
  killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, env=environment, timeout=300,
                          capture_output=True, text=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.parametrize("end", [interrupt, pytest.param(kill, marks=pytest.mark.long)])
def test_a_rollout_that_ends_in_the_middle_goes_on(tmp_path, end):
  whole, logprobs, count = draw(tmp_path / "whole")
  assert sum(map(len, whole)) == count and all(len(reply) == LENGTH or reply[-1] == STOP for reply in whole)
  end(tmp_path / "killed")
  assert len(file_of(tmp_path / "killed", 0).read_bytes().splitlines()) == 1 + 3
  replies, again, drawn = draw(tmp_path / "killed")
  assert replies == whole
  assert 0 < drawn < count
  # Tokens behind the interruption were computed with others beside them and with their past fed at once: float32's rounding.
  for a, b in zip(again, logprobs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  assert draw(tmp_path / "killed") == (whole, again, 0)  # nothing is missing now, so nothing is drawn


def generated(prompts, **settings):
  state = random_state(run_config([("t", "a", "b", 1.0)], model=SHALLOW))
  keys = jax.random.split(jax.random.key(1), 4)[:len(prompts)]
  return generate(dsv4.DeepseekV4(SHALLOW), {"params": state.params, "router": state.router}, prompts, keys=keys,
                  max_new_tokens=24, temperature=1.5, **settings)


@pytest.mark.long
def test_replies_of_different_beginnings_go_on_in_one_batch():
  prompts, seen = [[9, 10, 11], [12], [13, 14], [15]], []
  whole = generated(prompts).tokens
  begun = [reply[:n] for reply, n in zip(whole, (0, 5, 23, 17))]
  found = generated(prompts, begun=begun, on_drawn=seen.append)
  assert [first + rest for first, rest in zip(begun, found.tokens, strict=True)] == whole
  assert [len(x) for x in found.logprobs] == [24, 19, 1, 7] and found.finish == ["length"] * 4
  told = [[token for new in seen for drawn in new if drawn.request == i for token in drawn.tokens] for i in range(4)]
  assert told == found.tokens
  assert [x for new in seen for drawn in new if drawn.request == 1 for x in drawn.logprobs] == found.logprobs[1]


@pytest.mark.parametrize("begun, said", [
  ([[1], [2]], "begun = '2 replies': expected one for each of the 1 requests"),
  ([[1] * 24], r"begun\[0\] = '24 tokens': expected fewer than max_new_tokens = 24, and no stop token"),
  ([[5, 7]], "and no stop token"),
  ([[264]], r"begun\[0\] = 'ids from 264 to 264': expected ids below vocab_size = 264"),
])
def test_beginnings_that_are_none(begun, said):
  with pytest.raises(ValueError, match=said):
    generated([[9]], begun=begun, stop_tokens=(7,))


def test_speculation_begins_anew():
  with pytest.raises(ValueError, match="speculative = True: expected False with begun or on_drawn"):
    generated([[9]], begun=[[1]], speculative=True)
