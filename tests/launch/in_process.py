"""The mains in this process: their flags for as long as they are asked about."""

import contextlib
import importlib
import os
import signal
from typing import Any, Iterator

import pytest
from absl import flags


@contextlib.contextmanager
def program(name: str) -> Iterator[Any]:
  """The module launch.NAME with its flags defined; afterwards flags and environment are those of before.

  `flags.FLAGS([name, *arguments])` reads a command line; `main` of the module then neither starts a new process nor listens
  to signals.
  """
  module = importlib.import_module(f"launch.{name}")
  define = getattr(module, "define_flags", None) or importlib.import_module("launch.train").define_flags
  before, environment = set(flags.FLAGS), dict(os.environ)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(signal, "signal", lambda *_: None)
    for meant_for_a_new_process in ("use_huge_pages", "emulate_devices"):
      patch.setattr(module, meant_for_a_new_process, lambda *_: None, raising=False)
    try:
      define()
      yield module
    finally:
      for flag in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, flag)
      flags.FLAGS.unparse_flags()
      os.environ.clear()
      os.environ.update(environment)
