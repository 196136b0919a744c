"""What takes long to get is got ahead of time, in a thread; who waits for it can give up waiting."""

from __future__ import annotations

import queue
import threading
from typing import Any, Callable

_LOOK_UP = 0.1  # seconds between two looks at whether to give up


class Ahead:
  """Calls `take` in a thread, one call at a time and only when told to.

  The thread is a daemon: one that hangs in `take` does not keep the process alive.
  """

  def __init__(self, take: Callable[[], Any]) -> None:
    self._take = take
    self._box: queue.SimpleQueue | None = None  # of the call that runs or has not been asked for

  def start(self) -> None:
    """Begins the next call, unless one is begun already."""
    self._begun()

  def _begun(self) -> queue.SimpleQueue:
    if self._box is None:
      self._box = queue.SimpleQueue()
      threading.Thread(target=self._call, args=(self._box,), daemon=True).start()
    return self._box

  def _call(self, box: queue.SimpleQueue) -> None:
    try:
      box.put((self._take(), None))
    except BaseException as error:
      box.put((None, error))

  def get(self, give_up: Callable[[], bool] = lambda: False) -> Any:
    """What `take` returned, or None if `give_up()` became true before; what it raised is raised here.

    Raises:
      Whatever `take` raised.
    """
    box = self._begun()
    while True:
      try:
        value, error = box.get(timeout=_LOOK_UP)
        break
      except queue.Empty:
        if give_up():
          return None
    self._box = None
    if error is not None:
      raise error
    return value

  def forget(self) -> None:
    """Waits for the call that runs, if any, and drops what it brings."""
    if self._box is not None:
      self._box.get()
      self._box = None
