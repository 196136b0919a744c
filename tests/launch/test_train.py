"""The training main: what it settles before JAX wakes, and what a person sees who mistypes."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import launch
from deepseek_v4.training.metrics import read_lines

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


# ---- being told to stop ------------------------------------------------------------------------------------------------
def start(workdir, log, *settings):
  """The training command on a few files of this repository, without a compilation cache; its output goes to `log`."""
  overrides = ("data.source=text", f"data.path={ROOT / 'launch'}", "data.held_out_percent=20", *settings)
  environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
  arguments = ["--config", "configs/debug.py", "--workdir", str(workdir)]
  arguments += [part for setting in overrides for part in ("--set", setting)]
  with log.open("wb") as output:
    return subprocess.Popen([sys.executable, "-u", "-m", "launch.train", *arguments], cwd=ROOT, env=environment,
                            stdout=output, stderr=subprocess.STDOUT)


def wait_for_text(process, log, text):
  deadline = time.monotonic() + 300
  while text not in log.read_text():
    assert process.poll() is None and time.monotonic() < deadline, log.read_text()
    time.sleep(0.02)


def test_sigterm_while_it_compiles(tmp_path):
  """XLA does not return to Python before it is done; the signal is heard all the same, and nothing is left half done."""
  log = tmp_path / "log"
  process = start(tmp_path / "run", log, "training.grace_seconds=60", "model.scan_layers=False")
  wait_for_text(process, log, "held-out data:")
  time.sleep(1)  # into the compilation, which takes several seconds
  process.terminate()
  sent = time.monotonic()
  assert process.wait(60) == 75
  assert time.monotonic() - sent < 20  # 5 s, on a machine with something to spare
  text = log.read_text()
  heard, _, after = text.partition("SIGTERM: nothing is unsaved; the process ends in 60 s at the latest")
  assert after and "compiled" not in heard  # it was heard in time; in the 5 s that are left a fast machine goes on compiling
  assert "step 1/" not in after
  assert "Traceback" not in text and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.long
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_it_trains(tmp_path, number, code):
  log = tmp_path / "log"
  process = start(tmp_path / "run", log, "training.steps=100000", "optimizer.decay_steps=10")
  wait_for_text(process, log, "step 7/")
  process.send_signal(number)
  assert process.wait(60) == code
  lines = read_lines(tmp_path / "run" / "metrics.jsonl")
  done = max(line["step"] for line in lines)
  assert f"stopped after step {done}, which is saved; the same command goes on from there" in log.read_text()
  assert (tmp_path / "run" / "checkpoints" / str(done) / "manifest" / "manifest.json").is_file()
  assert "Traceback" not in log.read_text()


def test_rewards_have_a_loop_of_their_own(monkeypatch):
  from deepseek_v4 import config
  from deepseek_v4.posttraining import reinforcement
  from deepseek_v4.training import loop
  from launch import train
  called = []
  monkeypatch.setattr(loop, "train", lambda *arguments: called.append(("train", *arguments[1:])))
  monkeypatch.setattr(reinforcement, "reinforce", lambda *arguments: called.append(("reinforce", *arguments[1:])))
  for name in ("tiny_chat", "tiny_rewards"):
    train.train(config.load(ROOT / f"configs/{name}.py"), "runs/x", None, None)
  assert called == [("train", "runs/x", None, None), ("reinforce", "runs/x", None, None)]
  with pytest.raises(ValueError, match="the command python -m launch.distill"):
    train.train(config.load(ROOT / "configs/tiny_distill.py"), "runs/x", None, None)
