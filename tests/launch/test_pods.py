"""The templates for pods, run with stand-ins for gcloud and kubectl: what they would start is a valid training command."""

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from deepseek_v4.training.stopping import OUT_OF_TIME, STOPPED

ROOT = Path(__file__).resolve().parents[2]
PODS = ROOT / "launch" / "pods"
PARSE = """
import json, sys
from absl import flags
from deepseek_v4 import config
from launch import processes, train
train.define_flags()
assert flags.FLAGS(["train", *sys.argv[1:]])[1:] == []
run = config.load(flags.FLAGS["config"].value, flags.FLAGS["set"].value)
print(json.dumps({"workdir": flags.FLAGS["workdir"].value, "data": run.data.path, "grace": run.training.grace_seconds,
                  "joins": processes.from_flags({}) is not None, "mesh": [getattr(run.mesh, n) for n in run.mesh.axis_names],
                  "emulated": run.mesh.emulated_devices}))
"""


def program(folder, name, text):
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / name
  path.write_text(f"#!{shutil.which('bash')}\n{text}\n")  # called directly, so that the process has the program's name
  path.chmod(0o755)


def call(script, *arguments, bin, **environment):
  """Runs a template in the checkout with the programs of a folder before all others."""
  return subprocess.run(["bash", f"launch/pods/{script}", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30,
                        env=os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"} | environment)


@functools.cache
def parsed(*arguments):
  """What the training command makes of these arguments; fails if it would not take one of them."""
  done = subprocess.run([sys.executable, "-c", PARSE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def train_arguments(command):
  at = command.index("-m")
  assert command[at + 1] == "launch.train" and "python" in command[0]
  return tuple(command[at + 2:])


# ---- GKE ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def applied(tmp_path):
  program(tmp_path / "bin", "kubectl", f'echo "$@" > {tmp_path}/arguments; cat > {tmp_path}/applied')
  done = call("gke.sh", bin=tmp_path / "bin")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "arguments").read_text() == "apply -f -\n"
  shown = call("gke.sh", "show", bin=tmp_path / "bin").stdout
  assert shown == (tmp_path / "applied").read_text() and "${" not in shown
  return yaml.safe_load(shown)


def test_the_jobset_starts_a_valid_command_on_every_host(applied):
  assert (applied["apiVersion"], applied["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (replicated,) = applied["spec"]["replicatedJobs"]
  job, pod = replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  found = parsed(*train_arguments(container["command"]))
  assert "args" not in container and container["command"][0] == "python3"  # no shell that would keep SIGTERM to itself
  # as many pods as hosts; all chips of the topology; a mesh that they can make
  chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
  assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
  assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
  assert chips % math.prod(size for size in found["mesh"] if size > 0) == 0 and -1 in found["mesh"]
  # run and data lie on the disk that all pods mount
  (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
  assert mount["name"] == volume["name"] and volume["persistentVolumeClaim"]["claimName"]
  assert all(found[name].startswith(mount["mountPath"] + "/") for name in ("workdir", "data"))
  assert not found["joins"] and not found["emulated"]  # GKE's environment tells; devices are real
  assert pod["terminationGracePeriodSeconds"] >= found["grace"] + 10


def test_the_jobset_starts_again_after_a_preemption_and_a_few_times_after_crashes(applied):
  policy = applied["spec"]["failurePolicy"]
  assert policy["rules"] == [{"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}]
  assert policy["maxRestarts"] > 0
  job = applied["spec"]["replicatedJobs"][0]["template"]["spec"]
  node, code = job["podFailurePolicy"]["rules"]
  assert node["action"] == code["action"] == "FailJob" and job["backoffLimit"] == 0
  assert node["onPodConditions"][0]["type"] == "DisruptionTarget"
  assert code["onExitCodes"]["operator"] == "In" and code["onExitCodes"]["values"] == [STOPPED, OUT_OF_TIME]
  pod = job["template"]["spec"]
  assert code["onExitCodes"]["containerName"] == pod["containers"][0]["name"] and pod["restartPolicy"] == "Never"


def test_there_is_one_place_to_fill_in():
  """Whatever the JobSet leaves open is set in the marked block of the script, and that block sets nothing else."""
  for script in ("gke.sh", "tpu_vm.sh"):
    text = (PODS / script).read_text()
    _, block, rest = re.split(r"# -{4} .*here and nowhere else -{4}\n|# -{20,}\n", text)
    names = set(re.findall(r"\b([A-Z]+)=", block))
    used = (PODS / "gke.yaml").read_text() if script == "gke.sh" else rest
    assert names == set(re.findall(r"\$\{?([A-Z]+)\b", used)) - {"PWD"}, script


# ---- Cloud TPU VMs -----------------------------------------------------------------------------------------------------
@pytest.fixture
def vm(tmp_path):
  """A folder that stands in for a VM: gcloud notes its arguments, and runs there what is to be run."""
  home = tmp_path / "vm"
  (home / "dsv4" / "launch").mkdir(parents=True)
  (home / "dsv4" / "launch" / "pods").symlink_to(PODS)
  program(tmp_path / "bin", "gcloud", f'''printf '%s\\n' "$@" ---- >> {tmp_path}/gcloud
for a in "$@"; do case "$a" in --command=*) cd {home} && PAUSE=0 bash -c "${{a#--command=}}"; esac; done''')
  return tmp_path


def fake_python(vm, text):
  """Notes its arguments, a line each start."""
  program(vm / "vm/dsv4/.venv/bin", "python", f"printf '%s\\t' \"$@\" >> ../calls; echo >> ../calls\n{text}")


def calls(vm):
  path = vm / "vm" / "calls"
  return [line.split("\t")[:-1] for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_the_vms_run_a_valid_command_until_it_is_done(vm):
  fake_python(vm, f"case $(wc -l < ../calls) in 1) exit {STOPPED} ;; 2) exit 1 ;; 3) exit {OUT_OF_TIME} ;; esac")
  done = call("tpu_vm.sh", "train", bin=vm / "bin")
  assert done.returncode == 0, done.stderr
  log = vm / "vm/dsv4/run.log"
  wait_until(lambda: len(calls(vm)) == 4)
  assert len({tuple(line) for line in calls(vm)}) == 1
  found = parsed(*train_arguments(["python", *calls(vm)[0]]))
  assert found["joins"] and not found["emulated"] and found["workdir"].startswith("/mnt/shared/")
  assert [line for line in log.read_text().splitlines() if "again" in line] == [
    f"exit code {STOPPED}: starting again (10 crashes are left)", "exit code 1: starting again (9 crashes are left)",
    f"exit code {OUT_OF_TIME}: starting again (9 crashes are left)"]
  arguments = (vm / "gcloud").read_text().splitlines()
  assert arguments[:4] == ["compute", "tpus", "tpu-vm", "ssh"] and "--worker=all" in arguments


def test_stop_lets_the_step_be_saved_and_nothing_starts_again(vm):
  fake_python(vm, f"trap 'echo saved >> ../saved; exit {STOPPED}' TERM\nwhile true; do sleep 0.05; done")
  assert call("tpu_vm.sh", "train", bin=vm / "bin").returncode == 0
  wait_until(lambda: calls(vm))
  time.sleep(0.2)  # the trap is set
  assert call("tpu_vm.sh", "stop", bin=vm / "bin").returncode == 0
  wait_until(lambda: (vm / "vm" / "saved").exists())
  session = int((vm / "vm/dsv4/run.pid").read_text())
  wait_until(lambda: not Path(f"/proc/{session}").exists() or Path(f"/proc/{session}/stat").read_text().split()[2] == "Z")
  assert len(calls(vm)) == 1


def test_crashes_end_the_run_in_the_end(tmp_path):
  again = lambda code, crashes: subprocess.run(
    ["bash", str(PODS / "again.sh"), str(crashes), str(tmp_path / "stop"), "bash", "-c", f"echo x; exit {code}"],
    env=os.environ | {"PAUSE": "0"}, capture_output=True, text=True, timeout=20)
  for code, crashes, starts in ((1, 2, 3), (134, 0, 1), (130, 5, 1), (0, 5, 1)):
    done = again(code, crashes)
    assert (done.returncode, done.stdout.splitlines().count("x")) == (code, starts)


def test_install_and_log(vm):
  call("tpu_vm.sh", "log", bin=vm / "bin")
  arguments = (vm / "gcloud").read_text().splitlines()
  assert "--worker=0" in arguments and "--command=tail -n 50 -f dsv4/run.log" in arguments
  program(vm / "bin", "gcloud", f"printf '%s\\n' \"$@\" ---- >> {vm}/install")
  assert call("tpu_vm.sh", "install", bin=vm / "bin").returncode == 0
  copy, setup = (vm / "install").read_text().split("----\n")[:2]
  assert copy.splitlines()[3:6] == ["scp", "--recurse", str(ROOT)]
  command = setup.splitlines()[-1].removeprefix("--command=")
  assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0 and "pip install --quiet -e . 'jax[tpu]'" in command
  assert call("tpu_vm.sh", bin=vm / "bin").returncode == call("gke.sh", "stop", bin=vm / "bin").returncode == 2
