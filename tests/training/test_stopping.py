"""Being told to stop: signals while the main thread runs Python, waits or is busy in C; what the loop saves first."""

import ctypes
import os
import pickle
import signal
import threading
import time

import pytest

from deepseek_v4.training import loop, stopping, workdir
from deepseek_v4.training.ahead import Ahead
from deepseek_v4.training.stopping import Stopped, Stopping
from tests.training.fakes import RUN, World, lines, saved, without_times


@pytest.fixture
def world(monkeypatch):
  return World(monkeypatch)


class End(BaseException):
  """In place of the end of the process."""


@pytest.fixture
def leaving(monkeypatch):
  """[(exit code, when)] of the processes that the watchdog would have ended; only its thread ends."""
  found = []

  def leave(self, code):
    found.append((code, time.monotonic()))
    raise End

  monkeypatch.setattr(stopping, "_ORDERLY", 0.3)
  monkeypatch.setattr(Stopping, "_leave", leave)
  monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
  yield found
  for thread in threading.enumerate():
    if thread.name == "stopping":
      thread.join(60)


def wait_for(condition, seconds=20):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


# ---- signals -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_heard_while_the_main_thread_is_in_c(leaving, capfd, number, code):
  """As it is while XLA compiles; Python's own handlers wait for the main thread to come back."""
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with Stopping(grace=30) as stop:
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])  # another thread gets it; it would interrupt the sleep
    ctypes.CDLL(None).usleep(2_000_000)
    back = time.monotonic()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    assert [code for code, _ in leaving] == [code] and leaving[0][1] < back - 0.5
    assert stop.asked and stop.agreed() and stop.exit_code == code
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
  assert f"{signal.Signals(number).name}: nothing is unsaved" in capfd.readouterr().err


def test_what_is_unsaved_has_the_grace_time_and_no_more(leaving, capfd):
  with Stopping(grace=1.0) as stop:
    stop.unsaved = True
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(lambda: leaving)
  code, when = leaving[0]
  assert code == 143 and 0.9 < when - sent < 5
  assert "1 s were not enough to save the last step" in capfd.readouterr().err


def test_what_gets_saved_in_time_ends_with_the_code_for_it(leaving):
  with Stopping(grace=30) as stop:
    stop.unsaved = True
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    assert not leaving  # however long it takes, within the grace time
    stop.unsaved = False
    wait_for(lambda: leaving)
  assert leaving[0][0] == 75


def test_a_second_interrupt_does_not_wait(leaving):
  with Stopping(grace=30) as stop:
    stop.unsaved = True
    os.kill(os.getpid(), signal.SIGINT)
    wait_for(lambda: stop.asked)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)
    stop.unsaved = False
    wait_for(lambda: leaving)


def test_without_a_signal_nothing_happens(leaving):
  with Stopping(grace=0.1) as stop:
    time.sleep(0.5)
    assert not stop.asked and not stop.agreed()
  assert not leaving


# ---- getting things ahead ----------------------------------------------------------------------------------------------
def test_ahead_gets_one_at_a_time_and_in_order():
  taken = []
  ahead = Ahead(lambda: taken.append(len(taken)) or taken[-1])
  assert ahead.get() == 0
  ahead.start()
  ahead.start()
  wait_for(lambda: len(taken) == 2)
  assert [ahead.get(), ahead.get()] == [1, 2]
  ahead.start()
  ahead.forget()
  assert ahead.get() == 4


def test_ahead_tells_what_was_raised_and_gives_up_when_told():
  def fail():
    raise OSError("the disk is gone")
  with pytest.raises(OSError, match="the disk is gone"):
    Ahead(fail).get()
  held = threading.Event()
  ahead = Ahead(held.wait)
  assert ahead.get(lambda: True) is None
  held.set()
  assert ahead.get() is True


# ---- the loop ----------------------------------------------------------------------------------------------------------
def goes_on(world, tmp_path, steps):
  """Whether a second start finishes as if nobody had disturbed the first; `steps` are the ones that it had to do."""
  world.reading, world.scoring = lambda place: None, lambda: None
  world.diary.clear()
  loop.train(RUN, tmp_path / "run")
  assert [int(x.split()[1]) for x in world.diary if x.startswith("step")] == steps
  loop.train(RUN, tmp_path / "whole")
  files = [pickle.loads((tmp_path / name / loop.CHECKPOINTS / "0010").read_bytes()) for name in ("run", "whole")]
  return files[0] == files[1] and without_times(lines(tmp_path / "run")) == without_times(lines(tmp_path / "whole"))


def test_a_run_that_is_told_to_stop_saves_the_step_in_hand(world, tmp_path):
  stop = Stopping()
  step = world.step
  world.step = lambda state, batch: (stop.ask() if state.step == 4 else None, step(state, batch))[1]
  with pytest.raises(Stopped, match="stopped after step 5, which is saved; the same command goes on from there"):
    loop.train(RUN, tmp_path / "run", stop=stop)
  assert saved(tmp_path / "run") == [3, 5] and not stop.unsaved
  world.step = step
  assert goes_on(world, tmp_path, [6, 7, 8, 9, 10])


def test_a_run_that_waits_for_data_is_heard(world, tmp_path):
  stop, held = Stopping(), threading.Event()

  def hang(place):
    if place == 6:
      stop.ask()
      held.wait(30)

  world.reading = hang
  started = time.monotonic()
  with pytest.raises(Stopped, match="stopped after step 5"):
    loop.train(RUN, tmp_path / "run", stop=stop)
  assert time.monotonic() - started < 20 and saved(tmp_path / "run") == [3, 5]
  held.set()
  assert goes_on(world, tmp_path, [6, 7, 8, 9, 10])


def test_a_run_that_is_stopped_while_it_evaluates_does_so_at_its_next_start(world, tmp_path):
  stop = Stopping()
  world.scoring = stop.ask
  with pytest.raises(Stopped, match="stopped after step 4, which is saved"):
    loop.train(RUN, tmp_path / "run", stop=stop)
  assert world.diary.count("evaluate after 4") == 1 < RUN.training.eval_batches
  assert [x["split"] for x in lines(tmp_path / "run")] == ["train"] * 4
  assert goes_on(world, tmp_path, [5, 6, 7, 8, 9, 10])


def test_a_run_that_is_stopped_in_its_last_evaluation_has_all_its_steps(world, tmp_path):
  stop = Stopping()
  world.scoring = lambda: stop.ask() if world.diary[-1] == "evaluate after 10" else None
  with pytest.raises(Stopped, match="stopped after step 10, which is saved"):
    loop.train(RUN, tmp_path / "run", stop=stop)
  assert saved(tmp_path / "run") == [3, 6, 9, 10]
  assert goes_on(world, tmp_path, [])


def test_before_the_first_step_there_is_nothing_to_save(world, tmp_path):
  stop = Stopping()
  stop.ask()
  with pytest.raises(Stopped, match="stopped after step 0; nothing was there to save"):
    loop.train(RUN, tmp_path / "run", stop=stop)
  assert saved(tmp_path / "run") == []
  assert goes_on(world, tmp_path, list(range(1, 11)))


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(world, tmp_path):
  loop.train(RUN, tmp_path / "run")
  before = lines(tmp_path / "run")
  for path in (tmp_path / "run" / loop.CHECKPOINTS).iterdir():
    path.unlink()
  with pytest.raises(FileNotFoundError, match="a run of 10 steps, and a checkpoint was due every 3, but there is none"):
    loop.train(RUN, tmp_path / "run")
  assert lines(tmp_path / "run") == before


def test_settings_that_cannot_be_read_are_no_reason_to_stop(world, tmp_path):
  loop.train(RUN, tmp_path / "run")
  (tmp_path / "run" / workdir.CONFIG).write_text('{"training": {"ste')
  with pytest.warns(UserWarning, match="config.json: unreadable, written anew .*every checkpoint has its own copy"):
    loop.train(RUN, tmp_path / "run")


def test_a_run_that_saved_nothing_says_that_it_starts_over(tmp_path):
  """Behind the second due checkpoint the first must have been whole: then it is refused."""
  stored = {"training": {"checkpoint_every": 2}}
  workdir.refuse_lost_checkpoints(tmp_path, stored)  # nothing has been done
  (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
  with pytest.warns(UserWarning, match=r"holds a run of 4 steps, but no checkpoint \(one was due every 2\): it starts over"):
    workdir.refuse_lost_checkpoints(tmp_path, stored)
  (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
  with pytest.raises(FileNotFoundError, match="holds a run of 5 steps, and a checkpoint was due every 2, but there is none"):
    workdir.refuse_lost_checkpoints(tmp_path, stored)
