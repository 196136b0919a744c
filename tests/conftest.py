"""Before JAX wakes: eight emulated CPU devices, a compilation cache that outlives the run, and no search for TPUs."""

import gc
import importlib.metadata
import importlib.util
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # threads of XLA: with fewer, collectives of emulated devices can wait for ever
# Tests compile much and compute little: two fifths less processor time with these, and with the older emitter for CPUs
# (jax 0.10 has it yet; it converts to FP4 wrongly, which is why the code does that by arithmetic).
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
          "--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_enable_concurrency_optimized_scheduler=false"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # newer ones refuse it
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])

import jax  # noqa: E402  (the platform must be chosen first)
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir",
                  os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "deepseek_v4_jax_cache")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(100_000, 50, 100)  # tracing makes millions of small objects that live

# Comparisons with transformers need torch, which not every Python has; what is left out is said in the report's header.
_WITHOUT_TORCH = importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None
# The TPU compiler comes as wheels for Linux on x86-64 only.
_WITHOUT_LIBTPU = importlib.util.find_spec("libtpu") is None
collect_ignore_glob = ["*_parity.py"] * _WITHOUT_TORCH + ["*/test_aot.py"] * _WITHOUT_LIBTPU

# Files that take more than half a minute on one core come first: no process should be left alone with one at the end.
LONGEST = (
  "training/test_mesh.py", "kernels/test_aot.py", "launch/test_processes.py", "training/test_resume.py",
  "training/test_step.py", "checkpoint/test_convert.py", "kernels/test_sparse_checks.py", "model/test_cache.py",
  "launch/test_generate.py", "kernels/test_cases.py", "model/test_transformers_parity.py", "launch/test_depth.py",
  "kernels/test_sparse_form.py", "training/test_start_parity.py", "launch/test_bench_context.py", "model/test_replay.py")


def pytest_collection_modifyitems(items):
  """The longest files first, all others in their order. Within a file that names a parameter as SHARED, tests with one value
  of it come together, so that the program they share need not be kept until the file ends."""
  place = {os.path.join(os.path.dirname(__file__), *name.split("/")): number for number, name in enumerate(LONGEST)}
  seen = {}

  def order(item):
    values = item.callspec.params if hasattr(item, "callspec") else {}
    value = values.get(getattr(getattr(item, "module", None), "SHARED", None))
    return place.get(str(item.path), len(place)), seen.setdefault((item.path, value), len(seen))
  items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Of `pytest -n 2`: the tests of a file go to one process, which traces and compiles what they share once."""
  from xdist.scheduler import LoadFileScheduling
  if config.getvalue("dist") != "load":  # told otherwise
    return None
  config.option.loadscopereorder = False
  return LoadFileScheduling(config, log)


_MEMORY_MAPS = 40_000  # Linux allows 65,530; each compiled program holds some, and XLA crashes where it gets no more


def pytest_runtest_teardown():
  """Forgets compiled programs before a long run has too many."""
  try:
    with open("/proc/self/maps", "rb") as maps:
      full = sum(1 for _ in maps) > _MEMORY_MAPS
  except OSError:  # another system, without that limit
    return
  if full:
    jax.clear_caches()
    gc.collect()  # what closures and tracebacks hold in cycles


def pytest_report_header(config):
  """Says which versions run and which files are left out."""
  parity = "left out: torch or transformers is not installed" if _WITHOUT_TORCH else "included"
  compiler = "left out: libtpu is not installed" if _WITHOUT_LIBTPU else "included"
  return (f"jax {jax.__version__}, {jax.device_count()} emulated devices; parity with transformers {parity}; "
          f"compilations for TPUs {compiler}")
