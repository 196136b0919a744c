"""Two processes agree on when to stop, whichever of them got the signal."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, sys
import jax
from deepseek_v4.training.stopping import Stopping
port, rank, first = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "listen first"
start = lambda: jax.distributed.initialize(f"localhost:{port}", 2, rank)
if not first:
  start()  # JAX's preemption service has a handler of SIGTERM by then
with Stopping(60) as stop:
  if first:
    start()
  n, stop.unsaved = 0, True
  while not stop.agreed():
    n += 1
    if n == 5 and rank == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    assert n < 50
  stop.unsaved = False
print("stopped after", n)
jax.distributed.shutdown()
sys.exit(stop.exit_code)
"""


@pytest.mark.long
@pytest.mark.parametrize("order", ["listen first", "start first"])
def test_both_stop_at_the_same_step(order):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  processes = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(port), str(rank), order], cwd=ROOT, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
  said = [process.communicate(timeout=200) for process in processes]
  assert [process.returncode for process in processes] == [75, 75], said
  assert [out.splitlines()[-1] for out, _ in said] == ["stopped after 5"] * 2
