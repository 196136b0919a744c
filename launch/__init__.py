"""Thin mains. What a process must settle before JAX wakes is here, because every main needs it.

What may not live here: anything that the libraries would import, or that somebody would want to call from Python.
"""

from __future__ import annotations

import os
import platform
import sys

HUGE_PAGES = "glibc.malloc.hugetlb"
# Threads that XLA gets for each emulated device. A device waits in a thread for the others in every collective, several of
# which run at a time; with one thread per device (XLA's choice where there are few cores) all may end up waiting for ever.
THREADS_PER_DEVICE = 8


def use_huge_pages() -> None:
  """Starts this program again with huge pages for malloc, unless they are settled already; Linux with glibc only.

  XLA's CPU temporaries are fresh memory in every step, and mapping them in 4 KiB pages costs a tenth to a fifth of the step.
  glibc reads GLIBC_TUNABLES once, before Python runs, so the process replaces itself once, with the same arguments. A value
  that is there (GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns this off) and all other tunables are kept. Call it first in a
  main.
  """
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or f"{HUGE_PAGES}=" in tunables:
    return
  environment = os.environ | {"GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{HUGE_PAGES}=1")))}
  sys.stdout.flush()
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def emulate_devices(count: int) -> None:
  """Runs on the CPU as `count` devices; 0 leaves the machine's devices as they are. Call it before JAX is used."""
  if count:
    os.environ.setdefault("NPROC", str(THREADS_PER_DEVICE * count))  # XLA reads it when its CPU client starts
    import jax  # huge pages come first: the process that replaces itself need not load JAX
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
