"""How the processes of one run find each other: by flags, or by what Cloud TPU, GKE or Slurm tell each of them.

A single process is the plain case, and nothing is started for it. Several run the same command, one on each host, with a
workdir that all of them see. They find each other
  on GKE and under Slurm (srun)        by themselves: the environment says that there are several, and JAX reads the rest
  on the VMs of a Cloud TPU            with --distributed: JAX asks the machine's metadata
  anywhere                             with --coordinator HOST:PORT --num_processes N --process_id 0 ... N - 1
--num_processes 1 is a single process whatever the environment says.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from typing import Callable, Mapping

from absl import flags

# A process that has failed waits so long at its end for the others; so those that fail alike all say why.
_SHUTDOWN_SECONDS = 30
_QUIET_SECONDS = 20  # so long nothing is said while the others have not come
_PORTS = range(1, 1 << 16)


def define_flags() -> None:
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, the same for all; the port has to be free there.")
  flags.DEFINE_integer("num_processes", None, "Of the run; 1 = this one alone, whatever the environment says.")
  flags.DEFINE_integer("process_id", None, "Of this process: 0 to num_processes - 1.")
  flags.DEFINE_bool("distributed", False, "Join the other processes, which JAX finds (Cloud TPU, GKE, Slurm).")
  flags.DEFINE_integer("initialization_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Cluster:
  """One that JAX detects, and how its environment tells of several processes before JAX looks.

  Attributes:
    name: in messages.
    count: environment -> number of processes; 0 = not this cluster.
    variables: what its environment holds of them.
    needed: what JAX needs to find the others, in words.
  """

  name: str
  count: Callable[[Mapping[str, str]], int]
  variables: tuple[str, ...]
  needed: str


def _number(text: str | None) -> int:
  return int(text) if text is not None and text.isdigit() else 0


def _gke_hosts(environment: Mapping[str, str]) -> int:
  names = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
  slices = _number(environment.get("MEGASCALE_NUM_SLICES")) or 1
  return len([name for name in names.split(",") if name]) * slices


CLUSTERS = (
  Cluster("Slurm", lambda environment: _number(environment.get("SLURM_NTASKS")) if "SLURM_JOB_ID" in environment else 0,
          ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
          "SLURM_JOB_ID, SLURM_NTASKS, SLURM_STEP_NODELIST, SLURM_PROCID and SLURM_LOCALID, which srun sets in each task"),
  Cluster("GKE with TPUs", _gke_hosts,
          ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID",
           "MEGASCALE_COORDINATOR_ADDRESS"),
          "TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, the chips themselves and libtpu (pip install 'jax[tpu]')"),
)
CLOUD_TPU = "Cloud TPU: the chips, libtpu (pip install 'jax[tpu]') and the VM's metadata"


@dataclasses.dataclass(frozen=True)
class Join:
  """How this process joins the others.

  Attributes:
    coordinator, process_id: as by the flags; None = JAX finds them.
    num_processes: as by the flag or the environment; None = JAX finds it.
    timeout: seconds to wait for the others.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  timeout: int = 300


def from_flags(environment: Mapping[str, str]) -> Join | None:
  """`plan` of the flags of this program."""
  value = lambda name: flags.FLAGS[name].value
  return plan(value("coordinator"), value("num_processes"), value("process_id"), value("distributed"),
              value("initialization_timeout"), environment)


def plan(coordinator: str | None, num_processes: int | None, process_id: int | None, distributed: bool, timeout: int,
         environment: Mapping[str, str]) -> Join | None:
  """How to join the others; None for a single process. Nothing is started and JAX is not asked.

  Args:
    coordinator, num_processes, process_id, distributed, timeout: the flags.
    environment: os.environ.

  Raises:
    ValueError: flags that are out of range, contradict each other or are not all there.
  """
  given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  missing = [f"--{name}" for name, x in given.items() if x is None]
  if distributed and len(missing) < len(given):
    raise ValueError("--distributed: JAX finds the processes; expected none of --coordinator, --num_processes, --process_id "
                     "beside it")
  if num_processes is not None and num_processes < 1:
    raise ValueError(f"--num_processes = {num_processes}: expected at least 1")
  if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
    raise ValueError(f"--process_id = {process_id}: expected 0 to --num_processes - 1 = {num_processes - 1}")
  if coordinator is not None:
    host, _, port = coordinator.rpartition(":")
    if not host or _number(port) not in _PORTS:
      raise ValueError(f"--coordinator = {coordinator!r}: expected HOST:PORT with a port from 1 to {_PORTS[-1]}")
  if num_processes == 1:
    return None
  if len(missing) == len(given):
    count = max(cluster.count(environment) for cluster in CLUSTERS)
    return Join(None, count if count > 1 else None, None, timeout) if distributed or count > 1 else None
  if missing:
    raise ValueError(f"{', '.join(missing)}: expected, since of --coordinator, --num_processes and --process_id all or none "
                     f"are given")
  return Join(coordinator, num_processes, process_id, timeout)


def describe(environment: Mapping[str, str]) -> str:
  """What the environment holds of processes, and what JAX needs of it; for messages."""
  lines = []
  for cluster in CLUSTERS:
    held = [f"{name}={environment[name]}" for name in cluster.variables if name in environment]
    lines.append(f"{cluster.name}: found {', '.join(held) or 'nothing'}; needed: {cluster.needed}")
  return "\n  ".join(["here", *lines, CLOUD_TPU, "or the flags --coordinator, --num_processes and --process_id"])


def start(join: Join | None, environment: Mapping[str, str]) -> None:
  """Joins the others; to be called before JAX computes anything.

  Raises:
    ValueError: JAX could not begin; the message holds what the environment says and what is needed. If it has begun and
      the others do not come in time, JAX ends the process.
  """
  if join is None:
    return
  import jax
  jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `training.stopping`
  by_flags = join.coordinator is not None
  where = (f"process {join.process_id} of {join.num_processes} at {join.coordinator}: expected as many processes with the "
           f"same --coordinator and --num_processes, each with another --process_id" if by_flags else
           describe(environment))
  # Where nobody comes, JAX ends the process in C++ and says little; so this says it before.
  patience = threading.Timer(min(_QUIET_SECONDS, join.timeout / 2), lambda: print(
    f"waiting for the other processes, {join.timeout} s at most; {where}", file=sys.stderr, flush=True))
  patience.start()
  try:
    jax.distributed.initialize(
      join.coordinator, join.num_processes if by_flags else None, join.process_id,
      cluster_detection_method="deactivate" if by_flags else None, initialization_timeout=join.timeout,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
  except (ValueError, KeyError, RuntimeError, OSError) as error:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise ValueError(f"JAX did not find the other processes ({reason}); {where}") from error
  finally:
    patience.cancel()


def refuse_unjoined() -> None:
  """Raises ValueError if the devices belong to several processes that have not joined each other."""
  import jax
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise ValueError(f"found {jax.process_count()} processes, which share the devices but have not joined each other: "
                     f"expected --distributed")


def refuse_several(program: str, environment: Mapping[str, str]) -> None:
  """Raises ValueError if this is one of several processes; for programs that are one process."""
  for cluster in CLUSTERS:
    count = cluster.count(environment)
    if count > 1:
      held = ", ".join(f"{name}={environment[name]}" for name in cluster.variables if name in environment)
      raise ValueError(f"{program} is one process, but here are {count} ({cluster.name}: {held}): expected one start of it "
                       f"with an environment of its own (env -u {cluster.variables[0]} ...) and devices of its own")
  import jax
  if jax.process_count() > 1:
    raise ValueError(f"{program} is one process, but the devices here belong to {jax.process_count()}: expected a machine "
                     f"with devices of its own, or JAX_PLATFORMS=cpu")


def emulated_share(count: int, join: Join | None) -> int:
  """Of `mesh.emulated_devices`, those of this process.

  Raises:
    ValueError: they cannot be shared out evenly.
  """
  processes = 1 if join is None else join.num_processes
  if count and processes is None:
    raise ValueError(f"mesh.emulated_devices = {count}: expected 0 with --distributed, which is for devices that are there")
  if count and count % processes:
    raise ValueError(f"mesh.emulated_devices = {count}: expected a multiple of {processes} processes, which share them")
  return count // processes if count else 0


def finish(join: Join | None) -> None:
  """Waits for the others at the end of the work: whoever leaves first takes the connection along."""
  if join is not None:
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("the end")
