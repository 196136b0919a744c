"""Every kind of damage that `launch.faults` does, and bits flipped anywhere, on a small checkpoint: noticed, or harmless."""

import random
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_v4.checkpoint.store import CheckpointStore
from launch.fault_runs import damage

# TensorStore complains so when a read that failed is let go of.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(params=["one device", "mesh"])  # Orbax reads them by different code, which raises different errors
def tree(request):
  rng = np.random.default_rng(0)
  tree = {"params": {"a": rng.normal(size=(64, 64)).astype(np.float32), "b": np.arange(5)}, "step": np.int32(7)}
  if request.param == "one device":
    return jax.tree.map(jnp.asarray, tree)
  mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
  cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
  return jax.device_put(tree, {"params": {"a": cut, "b": whole}, "step": whole})


@pytest.fixture
def checkpoints(tree, tmp_path):
  """A directory with the steps 3 and 6."""
  with store_of(tmp_path / "checkpoints") as store:
    for step in (3, 6):
      store.save(step, tree, {"at": step})
  return tmp_path / "checkpoints"


def store_of(directory):
  return CheckpointStore(directory, keep=3, config_dict={})


def abstract(tree):
  """Shapes, with the shardings of a mesh."""
  where = lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else None
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), tree)


def equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("kind", damage.KINDS)
def test_every_kind_is_named_and_passed_over(checkpoints, tree, kind):
  path = damage.KINDS[kind](checkpoints, 6, random.Random(0))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    step, restored, extra = store_of(checkpoints).restore_latest(abstract(tree))
  assert equal(restored, tree) and extra == {"at": step}
  named = any(f"checkpoint passed over: {path}: " in str(w.message) for w in caught)
  if kind in damage.NOT_IN_THE_NEWEST:
    assert (step, named) == (6, True)
  elif kind in damage.PERHAPS_HARMLESS:
    assert (step, named) in ((3, True), (6, False))
  else:
    assert (step, named) == (3, True)


def flipped_bits(checkpoints, tree, rng, count):
  """What a restore does after one bit was flipped in a random file of the newest step, `count` times."""
  files = sorted(path for path in (checkpoints / "6").rglob("*") if path.is_file() and path.stat().st_size)
  found = []
  for _ in range(count):
    file = rng.choice(files)
    before = file.read_bytes()
    damage.flip(file, rng)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      try:
        step, restored, extra = store_of(checkpoints).restore_latest(abstract(tree))
      except Exception as error:
        found.append((file, f"{type(error).__name__}: {error}"))
      else:
        found.append((file, "wrong" if not equal(restored, tree) or extra != {"at": step} else step))
    file.write_bytes(before)
  return found


def test_a_flipped_bit_is_noticed_or_harmless(checkpoints, tree):
  found = flipped_bits(checkpoints, tree, random.Random(1), 15)
  assert [x for x in found if x[1] not in (3, 6)] == [] and any(x[1] == 3 for x in found)


@pytest.mark.long
def test_no_flipped_bit_gets_through(checkpoints, tree):
  found = flipped_bits(checkpoints, tree, random.Random(2), 400)
  assert [x for x in found if x[1] not in (3, 6)] == []


# ---- the very first checkpoint -----------------------------------------------------------------------------------------
def test_a_first_checkpoint_that_was_never_finished_loses_nothing(checkpoints, tree, tmp_path):
  wanted = abstract(tree)
  first = tmp_path / "first"
  store = store_of(first)
  store.save(3, tree, {})
  assert (first / ".first").exists()  # until it is known to be whole
  store.wait()
  assert not (first / ".first").exists() and store.restore_latest(wanted)[0] == 3
  store.close()

  first.rename(tmp_path / "moved")
  first.mkdir()
  (first / ".first").touch()
  (first / "3.orbax-checkpoint-tmp").mkdir()
  with store_of(first) as store:
    with pytest.warns(UserWarning, match="3.orbax-checkpoint-tmp: never finished; it was the first, nothing was saved"):
      assert store.restore_latest(wanted) is None
    store.save(5, tree, {})
  assert sorted(path.name for path in first.iterdir()) == ["5"]

  # a folder that did hold a checkpoint is never empty, whatever is left of it
  (first / "5" / "manifest" / "manifest.json").unlink()
  (first / ".first").touch()
  with pytest.raises(FileNotFoundError, match="holds no usable checkpoint.*\n.*5: never finished, or not a checkpoint"):
    store_of(first).restore_latest(wanted)
  (first / ".first").unlink()
  (first / "5").rename(first / "5.orbax-checkpoint-tmp")
  with pytest.raises(FileNotFoundError, match="holds no usable checkpoint.*\n.*5.orbax-checkpoint-tmp: never finished"):
    store_of(first).restore_latest(wanted)
