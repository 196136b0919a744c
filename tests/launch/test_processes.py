"""Several processes of one run: what their flags refuse, and real ones that compute what one process computes."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from launch import processes
from launch.processes import Join, plan
from tests.launch import several
from tests.launch.several import CONFIG, ROOT, Processes, lines

HERE = ("localhost:1234", 4, 3, False, 300)
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}


# ---- flags and environment ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changed, said", [
  ({1: 0}, "--num_processes = 0: expected at least 1"),
  ({2: 4}, "--process_id = 4: expected 0 to --num_processes - 1 = 3"),
  ({2: -1}, "--process_id = -1: expected 0 to"),
  ({0: "localhost"}, "--coordinator = 'localhost': expected HOST:PORT with a port from 1 to 65535"),
  ({0: "localhost:"}, "expected HOST:PORT"), ({0: ":80"}, "expected HOST:PORT"), ({0: "a:65536"}, "expected HOST:PORT"),
  ({0: None}, "--coordinator: expected, since of"), ({1: None}, "--num_processes: expected"),
  ({0: None, 1: None}, "--coordinator, --num_processes: expected"),
  ({3: True}, "--distributed: JAX finds the processes; expected none of"),
])
def test_flags_that_do_not_fit_are_refused(changed, said):
  with pytest.raises(ValueError, match=said):
    plan(*(changed.get(i, x) for i, x in enumerate(HERE)), environment={})


def test_who_joins_whom():
  nothing = (None, None, None, False, 300)
  assert plan(*HERE, environment={}) == Join(*HERE[:3], 300)
  assert plan("[::1]:80", 2, 0, False, 9, {}) == Join("[::1]:80", 2, 0, 9)
  assert plan(*nothing, environment={}) is None
  assert plan(None, None, None, True, 300, {}) == Join()
  several_hosts = ({"TPU_WORKER_HOSTNAMES": "a,b"}, 2), ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, 6)
  for environment, count in ((SLURM, 4), *several_hosts):
    assert plan(*nothing, environment=environment) == Join(num_processes=count)
    assert plan(None, 1, None, False, 300, environment) is None  # told to stay alone
    with pytest.raises(ValueError, match=f"launch.generate is one process, but here are {count}"):
      processes.refuse_several("launch.generate", environment)
  for environment in (SLURM | {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "4"}, {"TPU_WORKER_HOSTNAMES": "localhost"}):
    assert plan(*nothing, environment=environment) is None
    processes.refuse_several("launch.generate", environment)


JOINED = """
import os, sys
import jax._src.clusters.cloud_tpu_cluster as cluster
cluster.running_in_cloud_tpu_vm = sys.argv[1] == "GKE"  # which JAX knows from the chips, before anything else
from launch import processes
processes.start(processes.plan(None, None, None, False, 60, os.environ), os.environ)
import jax
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


@pytest.mark.parametrize("cluster", ["Slurm", "GKE"])
def test_two_processes_join_by_what_a_cluster_tells_each(cluster):
  """Started by nothing but the environment that srun or a JobSet gives; GKE's chips are not there, CPU devices are."""
  told = {"Slurm": lambda i: {"SLURM_JOB_ID": "917", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
                              "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
          "GKE": lambda i: {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(i),
                            "MEGASCALE_SLICE_ID": "0", "MEGASCALE_NUM_SLICES": "1", "TPU_SKIP_MDS_QUERY": "1",
                            "MEGASCALE_COORDINATOR_ADDRESS": "localhost"}}[cluster]
  environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
  environment["JAX_COORDINATOR_PORT"] = str(several.free_port())  # else one that this machine may have given away
  both = [subprocess.Popen([sys.executable, "-c", JOINED, cluster], cwd=ROOT, env=environment | told(i), text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
  try:
    said = [process.communicate(timeout=100) for process in both]
  finally:
    for process in both:
      process.kill()
  assert [out for out, _ in said] == ["0 2 2\n", "1 2 2\n"], said


def test_emulated_devices_are_shared_out():
  assert [processes.emulated_share(8, join) for join in (None, Join(None, 2), Join(None, 8))] == [8, 4, 1]
  assert processes.emulated_share(0, Join()) == 0
  with pytest.raises(ValueError, match="mesh.emulated_devices = 8: expected a multiple of 3 processes"):
    processes.emulated_share(8, Join(None, 3))
  with pytest.raises(ValueError, match="mesh.emulated_devices = 8: expected 0 with --distributed"):
    processes.emulated_share(8, Join())


def test_a_cluster_that_jax_does_not_detect_is_explained(tmp_path):
  """Four tasks, but started by hand instead of by srun: the other variables are missing."""
  done = subprocess.run([sys.executable, "-m", "launch.train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}"],
                        cwd=ROOT, env=os.environ | SLURM, capture_output=True, text=True, timeout=100)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "error: JAX did not find the other processes (ValueError: coordinator_address should be defined.); " in done.stderr
  assert "Slurm: found SLURM_JOB_ID=7, SLURM_NTASKS=4; needed: SLURM_JOB_ID, SLURM_NTASKS, SLURM_STEP_NOD" in done.stderr
  assert not (tmp_path / "run").exists()


def test_rows_follow_the_devices(monkeypatch):
  """The rows of this process's devices, whatever their order in the mesh; here all devices are of one process."""
  mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=2, expert=2), jax.devices()[:8])
  assert sharding.local_rows(mesh, 16) == list(range(16))
  monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", lambda place, shape: {
    d: index for d, index in place.devices_indices_map(shape).items() if d.id in (1, 4, 5)})
  assert sharding.local_rows(mesh, 16) == [2, 3, 8, 9, 10, 11]
  mesh = sharding.make_mesh(c.MeshConfig(data=4, tensor=2), jax.devices()[:8])  # devices 4 and 5 hold the same rows
  assert sharding.local_rows(mesh, 8) == [0, 1, 4, 5]


# ---- real processes ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return several.corpus(tmp_path_factory.mktemp("several") / "text")


def settings(text, **mesh):
  return [f"data.path={text}", *(f"mesh.{axis}={size}" for axis, size in mesh.items())]


def assert_same_curve(workdir, other):
  """Losses and gradient norms agree to what another order of summation changes: both are float32 sums over hundreds of
  tokens, and a few small steps let them grow no further. Another batch would change a loss by percents."""
  assert lines(workdir).keys() == lines(other).keys()
  for step, numbers in lines(other).items():
    for name in ("loss", "next_token", "grad_norm"):
      np.testing.assert_allclose(lines(workdir)[step][name], numbers[name], rtol=5e-5)
    assert lines(workdir)[step]["tokens"] == numbers["tokens"]
  (held_out,), (same,) = (list(lines(folder, "held_out").values()) for folder in (workdir, other))
  assert held_out["tokens"] == same["tokens"]
  np.testing.assert_allclose(held_out["next_token"], same["next_token"], rtol=5e-5)


def test_two_processes_equal_one(text, tmp_path):
  """The same command, alone and as two: a curve, one voice, and the same files."""
  alone, run = (Processes(count, tmp_path / name, [*settings(text), "training.steps=4"], 2, tmp_path / f"{name}.log")
                for count, name in ((1, "one"), (2, "two")))
  assert run.wait() == [0, 0], run.texts()
  assert alone.wait() == [0], alone.texts()
  assert_same_curve(tmp_path / "two", tmp_path / "one")
  first, second = run.texts()
  assert "step 4/4" in first and "held-out text" in first
  assert not [line for line in second.splitlines() if line and "Gloo" not in line]  # nobody else talks
  assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
  """Folders of whole runs: of one process with four devices, and of two with two each."""
  folder = tmp_path_factory.mktemp("finished")
  for count in (1, 2):
    run = Processes(count, folder / str(count), settings(text, data=2, fsdp=2), 4, folder / f"log{count}")
    assert run.wait() == [0] * count, run.texts()
  return {count: folder / str(count) for count in (1, 2)}


@pytest.mark.long
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2}, {"data": 2, "tensor": 2}, {"data": 1, "expert": 4},
                                  {"dcn_data": 2, "data": 1, "fsdp": 2}])
def test_four_processes_equal_one(finished, text, tmp_path, mesh):
  """With a tensor axis of two, pairs of processes hold the same rows."""
  run = Processes(4, tmp_path / "four", settings(text, **mesh), 4, tmp_path / "log")
  assert run.wait(300) == [0] * 4, run.texts()
  assert_same_curve(tmp_path / "four", finished[1])


@pytest.mark.long
@pytest.mark.parametrize("before, after, devices", [(2, 1, 4), (1, 2, 4), (2, 4, 4), (2, 1, 1), (1, 2, 2)])
def test_a_run_goes_on_with_another_number_of_processes(finished, text, tmp_path, before, after, devices):
  """From step 3, the checkpoint of step 6 being gone; also on another number of devices."""
  workdir = shutil.copytree(finished[before], tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / "6")
  run = Processes(after, workdir, settings(text), devices, tmp_path / "log")
  assert run.wait(300) == [0] * after, run.texts()
  assert "resumed at step 3\n" in run.texts()[0]
  assert_same_curve(workdir, finished[1])


@pytest.mark.long
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(finished, text, tmp_path):
  workdir = shutil.copytree(finished[2], tmp_path / "run")
  files = [p for p in (workdir / "checkpoints" / "6" / "state" / "ocdbt.process_1").rglob("*") if p.is_file()]
  file = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  run = Processes(2, workdir, settings(text, data=2, fsdp=2), 4, tmp_path / "log")
  assert run.wait(300) == [0, 0], run.texts()
  first, second = run.texts()
  assert "resumed at step 3\n" in first and "checkpoint passed over" in first and "passed over" not in second
  assert_same_curve(workdir, finished[1])


@pytest.mark.long
def test_a_signal_to_one_stops_all_with_the_step_saved(text, tmp_path):
  more = ["training.steps=100000", "training.checkpoint_every=100000"]
  run = Processes(2, tmp_path / "run", [*settings(text), *more], 2, tmp_path / "log")
  run.wait_for("step 5/")
  run.processes[1].send_signal(signal.SIGTERM)
  assert run.wait() == [75, 75], run.texts()
  done = max(lines(tmp_path / "run"))
  assert f"stopped after step {done}, which is saved" in run.texts()[0]
  assert (tmp_path / "run" / "checkpoints" / str(done) / "manifest" / "manifest.json").is_file()


@pytest.mark.long
def test_one_that_is_killed_takes_the_others_along(text, tmp_path):
  run = Processes(2, tmp_path / "run", [*settings(text), "training.steps=100000"], 2, tmp_path / "log")
  run.wait_for("step 5/")
  run.processes[1].kill()
  assert 0 not in run.wait(200)  # no hang; JAX's heartbeat takes 100 s at most


@pytest.mark.long
@pytest.mark.parametrize("odd, said", [
  ("data", "process 1 has other settings than process 0; process 1 has other training documents than process 0"),
  ("workdir", "of 2 processes 1 do not see what process 0 writes there; expected a folder that all hosts share"),
])
def test_hosts_that_differ_are_refused(text, tmp_path, odd, said):
  other = several.corpus(tmp_path / "text")
  (other / "one more.txt").write_text("of my own")
  for i in (0, 1):  # a run's folder that is on each host's own disk
    (tmp_path / str(i)).mkdir()
  folder = (lambda i: tmp_path / str(i)) if odd == "workdir" else tmp_path / "run"
  run = Processes(2, folder, lambda i: settings(other if i and odd == "data" else text), 2, tmp_path / "log")
  assert run.wait() == [1, 1], run.texts()
  assert all(said in text for text in run.texts()), run.texts()


@pytest.mark.long
def test_processes_that_do_not_find_each_other_say_so(text, tmp_path):
  command = [sys.executable, "-m", "launch.train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}",
             f"--coordinator=localhost:{several.free_port()}", "--num_processes=2", "--process_id=1",
             "--initialization_timeout=3"]
  done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=100)
  assert done.returncode != 0
  assert "waiting for the other processes, 3 s at most; process 1 of 2 at localhost:" in done.stderr
