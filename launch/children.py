"""Other programs that a command starts: for a limited time, and ended with it, whatever ends it.

Each is in a group of its own, with what it starts, unless that is started in the same way: then the middle one has to end
its own, as a signal that can be heard makes it do (`ending_on_sigterm`), or they see that it is gone (`end_with_parent`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator, Sequence

PARENT = "DEEPSEEK_V4_PARENT"  # in the environment of what is started here: the number of who started it
GRACE = 20.0  # seconds that a program has to end by itself when its time is over


def ended(process: subprocess.Popen, seconds: float, stop: Callable[[], bool] = lambda: False) -> bool:
  """Whether a process ends within so many seconds, and before something says stop. Nobody asks for its exit code here:
  until then its number, which is its group's, is given to no other."""
  end = time.monotonic() + seconds
  while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
    if stop() or time.monotonic() > end:
      return False
    time.sleep(0.05)
  return True


@contextlib.contextmanager
def started(command: Sequence[str], grace: float = GRACE, **options: Any) -> Iterator[subprocess.Popen]:
  """A program in a group of its own. Where the block ends, also by an error or a signal, what still runs of it is told to
  end (SIGTERM), and after `grace` seconds ended with all that it started.

  Args:
    options: of `subprocess.Popen`.
  """
  environment = {**(options.pop("env", None) or os.environ), PARENT: str(os.getpid())}
  process = subprocess.Popen(command, start_new_session=True, env=environment, **options)
  try:
    yield process
  finally:
    try:
      if not ended(process, 0):
        os.killpg(process.pid, signal.SIGTERM)
        ended(process, grace)
    finally:  # also where a signal ends the wait
      os.killpg(process.pid, signal.SIGKILL)  # with those of the group that outlive their parent
      process.wait()


def run_for(command: Sequence[str], seconds: float, grace: float = GRACE, stop: Callable[[], bool] = lambda: False,
            **options: Any) -> int | None:
  """The exit code of a command; None if it had to be ended, after so many seconds or because something said stop.

  Args:
    options: of `subprocess.Popen`.
  """
  with started(command, grace, **options) as process:
    in_time = ended(process, seconds, stop)
  return process.returncode if in_time else None


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
  """SIGTERM ends the block as an error would, with exit code 143, so that what it started is ended, too."""
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
  """Lets this process end soon after the one that `started` it does, however that ends; does nothing if none did."""
  parent = os.environ.pop(PARENT, None)
  if parent is None:
    return

  def watch():
    while os.getppid() == int(parent):
      time.sleep(1)
    os._exit(1)
  threading.Thread(target=watch, daemon=True).start()
