"""Before JAX wakes: eight emulated CPU devices, a compilation cache that outlives the run, and no search for TPUs."""

import importlib.util
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # threads of XLA: with fewer, collectives of emulated devices can wait for ever
# Tests compile much and compute little.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax  # noqa: E402  (the platform must be chosen first)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir",
                  os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "deepseek_v4_jax_cache")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Comparisons with transformers need torch, which not every Python has; what is left out is said in the report's header.
_WITHOUT_TORCH = importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None
# The TPU compiler comes as wheels for Linux on x86-64 only.
_WITHOUT_LIBTPU = importlib.util.find_spec("libtpu") is None
collect_ignore_glob = ["*_parity.py"] * _WITHOUT_TORCH + ["*/test_aot.py"] * _WITHOUT_LIBTPU

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


def pytest_report_header(config):
  """Says which versions run and which files are left out."""
  parity = "left out: torch or transformers is not installed" if _WITHOUT_TORCH else "included"
  compiler = "left out: libtpu is not installed" if _WITHOUT_LIBTPU else "included"
  return (f"jax {jax.__version__}, {jax.device_count()} emulated devices; parity with transformers {parity}; "
          f"compilations for TPUs {compiler}")
