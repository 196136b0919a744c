"""How a run is told to stop, and that it stops in time: signals, a watchdog, agreement between processes.

A signal (SIGTERM, which is also how a preemption of TPUs announces itself, or Ctrl-C) asks for an orderly end: the loop
finishes the step that the devices are computing, saves it and leaves. The loop asks between steps, between batches of an
evaluation and while it waits for data. What cannot be interrupted (compiling, restoring, reading the corpus) happens while
nothing is unsaved; a thread of its own, which Python's C-level signal handler wakes even then, ends the process at once.

The exit codes of `launch.train`:
  75    SIGTERM; every finished step is saved, and the same command goes on from it (EX_TEMPFAIL: try again later)
  130   Ctrl-C; saved all the same
  143   SIGTERM, but the grace time was over before the finished step was saved: the next start goes on from the checkpoint
        before it
  1     anything else, with the reason
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

STOPPED, INTERRUPTED, OUT_OF_TIME = 75, 130, 143
SIGNALS: dict[int, int] = {signal.SIGTERM: STOPPED, signal.SIGINT: INTERRUPTED}
_ORDERLY = 5.0  # seconds that a process with nothing left to save may take to leave by itself


class Stopped(Exception):
  """A run that was told to stop and has; the message says what is saved."""


class Stopping:
  """Whether a run has been told to stop. As a context in the main thread it listens to signals; else nothing ever asks.

  Args:
    grace: seconds between a signal and the end of the process at the latest.

  Attributes:
    unsaved: whether steps were finished that are not on disk yet; the loop says so.
  """

  def __init__(self, grace: float = 25.0) -> None:
    self._grace = grace
    self._signal: int | None = None  # the first that came
    self._interrupts = 0
    self.unsaved = False

  @property
  def asked(self) -> bool:
    """Whether this process has been told to stop."""
    return self._signal is not None

  def agreed(self) -> bool:
    """Whether any process has been told to stop; all of them call this at the same place of the program.

    JAX's own `reached_preemption_sync_point` would let the processes run on to a step that they agree on. Here they agree
    before each step instead, so that one that waits for data in vain can still be heard, at the cost of one number each.
    """
    if jax.process_count() == 1:
      return self.asked
    return bool(np.any(multihost_utils.process_allgather(np.array(self.asked))))

  @property
  def exit_code(self) -> int:
    """That of a process which leaves with everything saved; where another process was told to stop, as if this one were."""
    return STOPPED if self._signal is None else SIGNALS.get(self._signal, STOPPED)

  def ask(self, number: int = signal.SIGTERM) -> None:
    """Tells the run to stop, as this signal would."""
    self._signal = self._signal or number

  # ---- signals -------------------------------------------------------------------------------------------------------
  def __enter__(self) -> "Stopping":
    # JAX's preemption service would put its own handler of SIGTERM in place of this one.
    jax.config.update("jax_enable_preemption_service", False)
    self._pipe = os.pipe()
    os.set_blocking(self._pipe[1], False)
    self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
    self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
    self._ended = threading.Event()
    threading.Thread(target=self._watch, name="stopping", daemon=True).start()
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._wakeup)
    if not self.asked:  # else the watchdog stays, until the process has ended or must
      self._ended.set()

  def _note(self, number: int, frame: Any) -> None:
    """Python's handler, run by the main thread when it next runs Python."""
    self.ask(number)
    self._interrupts += number == signal.SIGINT
    if self._interrupts > 1:
      raise KeyboardInterrupt  # a second Ctrl-C: at once

  def _watch(self) -> None:
    """The watchdog: waits for a signal, then for the process to end, then ends it."""
    while self._signal is None and not self._ended.is_set():
      # The pipe wakes it at once, also while the main thread is busy in C; the time limit is for pipes that others use.
      if select.select([self._pipe[0]], [], [], 0.2)[0]:
        for number in os.read(self._pipe[0], 64):
          if number in SIGNALS:
            self.ask(number)
    if self._signal is None:
      return
    deadline = time.monotonic() + self._grace
    name = signal.Signals(self._signal).name
    doing = "finishing and saving the step in hand" if self.unsaved else "nothing is unsaved"
    print(f"{name}: {doing}; the process ends in {self._grace:g} s at the latest", file=sys.stderr, flush=True)
    idle_since = None
    while (now := time.monotonic()) < deadline:
      idle_since = None if self.unsaved else idle_since or now
      if idle_since is not None and now > idle_since + _ORDERLY:
        self._leave(self.exit_code)
      time.sleep(0.05)
    if self.unsaved:
      print(f"{name}: {self._grace:g} s were not enough to save the last step", file=sys.stderr, flush=True)
    self._leave(OUT_OF_TIME if self.unsaved else self.exit_code)

  def _leave(self, code: int) -> None:
    """Ends the process whatever its threads do."""
    for stream in (sys.stdout, sys.stderr):
      try:
        stream.flush()
      except (OSError, ValueError):  # nobody listens any more
        pass
    os._exit(code)
