"""Programs that a command starts end in time, with all that they started, whatever ends the command."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import children

# Does not listen to SIGTERM, and leaves a child behind that does not either; both say who they are.
DEAF = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[1], "w") as file:
  file.write(f"{os.getpid()} {os.fork() or os.getpid()}")
time.sleep(60)
"""


def alive(process: int) -> bool:
  """Whether it runs; one that ended and was not waited for by its parent does not."""
  try:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


def test_a_program_ends_at_its_limit_with_all_that_it_started(tmp_path):
  begin = time.monotonic()
  assert children.run_for([sys.executable, "-c", DEAF, str(tmp_path / "pids")], 2.0, grace=0.5) is None
  assert time.monotonic() - begin < 20  # not the minute that it wanted
  for process in map(int, (tmp_path / "pids").read_text().split()):
    for _ in range(100):  # what is killed needs a moment
      if not alive(process):
        break
      time.sleep(0.05)
    assert not alive(process)


def test_a_second_signal_does_not_spare_a_program(tmp_path):
  """One ends the wait; one more, while it has its time to end by itself, ends that."""
  class Signal(Exception):
    pass

  def raised(*_):
    raise Signal

  def send():
    while not (pids.is_file() and len(pids.read_text().split()) >= 2):
      time.sleep(0.05)
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGUSR1)
      time.sleep(0.5)
  pids, begin = tmp_path / "pids", time.monotonic()
  before, sender = signal.signal(signal.SIGUSR1, raised), threading.Thread(target=send, daemon=True)
  try:
    sender.start()
    with pytest.raises(Signal):
      children.run_for([sys.executable, "-c", DEAF, str(pids)], 60, grace=60)
    sender.join()
  finally:
    signal.signal(signal.SIGUSR1, before)
  assert time.monotonic() - begin < 40
  for _ in range(100):
    if not any(alive(int(process)) for process in pids.read_text().split()):
      break
    time.sleep(0.05)
  assert not any(alive(int(process)) for process in pids.read_text().split())


def test_a_program_that_ends_says_how():
  assert children.run_for([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3
  assert children.run_for([sys.executable, "-c", ""], 60) == 0


def test_a_program_is_ended_when_it_is_told_to_stop():
  begin, told = time.monotonic(), iter([False, False, True])
  assert children.run_for([sys.executable, "-c", "import time; time.sleep(60)"], 60, stop=lambda: next(told)) is None
  assert time.monotonic() - begin < 20


# Starts what sleeps and says its number, and waits for it.
WAITING = """
import sys
from launch import children
with children.ending_on_sigterm():
  with children.started([sys.executable, "-c", {sleeper!r}]) as process:
    print(process.pid, flush=True)
    children.ended(process, 60)
"""


@pytest.mark.parametrize("number, sleeper", [
  (signal.SIGTERM, "import time; time.sleep(60)"),
  (signal.SIGKILL, "import time\nfrom launch import children\ntime.sleep(1)\nchildren.end_with_parent()\ntime.sleep(60)")],
  ids=["told to end", "killed"])
def test_what_a_command_started_does_not_outlive_it(number, sleeper):
  """Where it is told to end, by its own care; where it is killed, perhaps before the program has begun to watch, it sees."""
  with subprocess.Popen([sys.executable, "-c", WAITING.format(sleeper=sleeper)], stdout=subprocess.PIPE, text=True,
                        cwd=Path(__file__).resolve().parents[2]) as process:
    started = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(30) == (128 + signal.SIGTERM if number == signal.SIGTERM else -signal.SIGKILL)
  for _ in range(200):
    if not alive(started):
      break
    time.sleep(0.05)
  assert not alive(started)
