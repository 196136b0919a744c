"""The training main: what it settles before JAX wakes, and what a person sees who mistypes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import launch

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, **environment):
  return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
                        timeout=60)


def test_the_program_starts_again_once_with_the_same_arguments():
  code = "import launch, os, sys; launch.use_huge_pages(); print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])"
  here = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
  added = "glibc.malloc.check=0:glibc.malloc.hugetlb=1" if here else "glibc.malloc.check=0"
  done = run("-c", code, "--set", "a = 'b c'", GLIBC_TUNABLES="glibc.malloc.check=0")
  assert (done.returncode, done.stdout) == (0, f"{added} ['--set', \"a = 'b c'\"]\n"), done.stderr


@pytest.mark.parametrize("before, after", [
  (None, "glibc.malloc.hugetlb=1"),
  ("", "glibc.malloc.hugetlb=1"),
  ("glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
  ("glibc.malloc.hugetlb=0", None),
  ("glibc.malloc.check=3:glibc.malloc.hugetlb=2", None),
])
def test_tunables_that_are_there_stay(monkeypatch, before, after):
  started = []
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
  monkeypatch.setattr(os, "execve", lambda program, arguments, environment: started.append(environment["GLIBC_TUNABLES"]))
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  if before is not None:
    monkeypatch.setenv("GLIBC_TUNABLES", before)
  launch.use_huge_pages()
  assert started == ([] if after is None else [after])


@pytest.mark.parametrize("system, libc", [("darwin", ""), ("win32", ""), ("linux", "")])
def test_elsewhere_nothing_starts_again(monkeypatch, system, libc):
  monkeypatch.setattr(sys, "platform", system)
  monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
  monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("started again"))
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  launch.use_huge_pages()


def test_emulated_devices_are_cpu_devices(monkeypatch):
  settings = {}
  monkeypatch.setattr(jax.config, "update", settings.__setitem__)
  launch.emulate_devices(0)
  assert settings == {}
  launch.emulate_devices(8)
  assert settings == {"jax_platforms": "cpu", "jax_num_cpu_devices": 8}


@pytest.mark.parametrize("arguments, said", [
  (["--config", "configs/none.py", "--workdir", "x"], "error: --config = 'configs/none.py': expected a Python file"),
  (["--config", "configs/debug.py", "--workdir", "x", "--set", "training.step=5"], "it has steps, seed, init_from, kernels"),
  (["--config", "configs/debug.py"], "--workdir"),
  (["--config", "configs/debug.py", "--workdir", "x", "training.steps=5"], "unknown arguments: training.steps=5"),
])
def test_mistakes_are_told_without_a_traceback(arguments, said):
  done = run("-m", "launch.train", *arguments)
  assert done.returncode != 0
  assert said in done.stdout + done.stderr and "Traceback" not in done.stderr
  assert not (ROOT / "x").exists()
