"""The store: bit-exact states on any mesh and layer grouping, damage noticed and named, failures that surface."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_v4 import config as config_lib
from deepseek_v4.checkpoint.store import CheckpointStore, read_config, restore_variables
from deepseek_v4.checkpoint.trees import named_leaves, restack

# TensorStore complains so when a read or write that failed is let go of.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def states(tiny):
  """state(seed, scan): parameters, router, an optax state with masks and counters, a step and a typed key."""
  c = tiny.config

  def state(seed=0, scan=True):
    variables = restack(tiny.variables(c, seed), c, scan)

    def matrices(p):
      return jax.tree_util.tree_map_with_path(lambda path, x: path[-1].key not in ("scale", "base", "sink"), p)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.trace(0.9, jnp.bfloat16), matrices),
                            optax.scale_by_adam(), optax.scale(-1.0))
    moments = restack(tiny.variables(c, seed + 1), c, scan)["params"]
    opt_state = jax.tree_util.tree_map_with_path(
      lambda path, x: (leaf_at(moments, path) if x.ndim else np.full((), seed)).astype(x.dtype),
      jax.eval_shape(optimizer.init, variables["params"]))
    state = {**variables, "opt_state": opt_state, "step": np.int32(seed)}
    return {**jax.tree.map(jnp.asarray, state), "key": jax.random.key(seed)}

  return state


def leaf_at(params, path):
  """The leaf of `params` where a path inside an optimizer state ends."""
  keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
  for key in keys:
    params = params[key]
  return params


@pytest.fixture
def open_store(tiny, tmp_path):
  def open_store(keep=3, **changes):
    run = config_lib.RunConfig(model=dataclasses.replace(tiny.config, **changes),
                               data=config_lib.DataConfig(sequence_length=32),
                               optimizer=config_lib.OptimizerConfig(warmup_steps=1))
    return CheckpointStore(tmp_path / "checkpoints", keep=keep, config_dict=config_lib.to_dict(run))
  return open_store


@pytest.fixture
def simple():
  rng = np.random.default_rng(0)
  return {"params": {"a": jnp.asarray(rng.normal(size=(256, 256)), jnp.float32), "b": jnp.arange(4)}}


def bits(x):
  return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def same(a, b):
  """Names of leaves whose dtype or bits differ (NaN equals NaN)."""
  (xs, tree_a), (ys, tree_b) = named_leaves(a), named_leaves(b)
  assert tree_a == tree_b
  return [n for (n, x), (_, y) in zip(xs, ys) if x.dtype != y.dtype or bits(x).tobytes() != bits(y).tobytes()]


def abstract(state):
  return jax.eval_shape(lambda: state)


def test_a_state_comes_back_bit_for_bit(states, open_store, tmp_path):
  state = states(3)
  sink = state["params"]["layers"]["layer_00"]["attention"]["sink"]
  state["params"]["layers"]["layer_00"]["attention"]["sink"] = jnp.array([np.nan, -0.0, np.inf, 1e-42]).astype(sink.dtype)
  expected = states(3)
  expected["params"]["layers"]["layer_00"]["attention"]["sink"] = state["params"]["layers"]["layer_00"]["attention"]["sink"]
  with open_store() as store:
    assert store.restore_latest(abstract(state)) is None
    assert store.save(3, state, {"data": {"position": [3, "file"], "fill": 0.1}})
  for _ in range(2):  # restoring changes nothing
    step, restored, extra = open_store().restore_latest(abstract(expected))
    assert step == 3 and extra == {"data": {"position": [3, "file"], "fill": 0.1}} and not same(restored, expected)
  assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(expected["key"])
  # every leaf of the live state lies on disk, one layer at a time, and the hash table is not all zeros
  manifest = json.loads((tmp_path / "checkpoints/3/manifest/manifest.json").read_text())
  unscanned = jax.eval_shape(lambda: states(3, scan=False))
  names = {n.replace("layers/layer_", "layers/") for n, _ in named_leaves(unscanned)[0]}
  assert set(manifest["leaves"]) == names
  assert int(manifest["leaves"]["router/layers/00/moe/router/hash_table"]["sum"], 16)
  assert set(manifest["versions"]) == {"python", "jax", "flax", "optax", "orbax-checkpoint"}


def test_the_next_step_may_donate_what_is_being_written(simple, open_store):
  expected = jax.tree.map(np.array, simple)
  x = simple["params"]["a"] * 1  # a buffer of its own
  place = x.unsafe_buffer_pointer()
  with open_store() as store:
    store.save(1, {"params": {**simple["params"], "a": x}}, {})
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(x)
    assert x.is_deleted() and doubled.unsafe_buffer_pointer() == place  # nothing holds on to it
  assert not same(open_store().restore_latest(abstract(simple))[1], expected)


@pytest.mark.parametrize("saved", [True, False])
def test_any_grouping_of_layers_reads_any_checkpoint(states, open_store, saved):
  with open_store(scan_layers=saved) as store:
    store.save(1, states(1, scan=saved), {})
  other = states(1, scan=not saved)
  _, restored, _ = open_store(scan_layers=not saved).restore_latest(abstract(other))
  assert not same(restored, other)


def test_any_mesh_reads_any_checkpoint(open_store):
  values = np.random.default_rng(0).normal(size=(6, 8, 16)).astype(np.float32)

  def state(mesh, spec, scan):
    """Six layers of one weight each, 1 + 2 x 2 + 1 if scanned; the axis of repeats is not cut."""
    if scan:
      layers = {"layer_00": values[0], "unit_0": values[1:5:2], "unit_1": values[2:5:2], "layer_05": values[5]}
    else:
      layers = {f"layer_{i:02d}": x for i, x in enumerate(values)}

    def put(x, *spec):
      return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    layers = {k: {"w": put(x, *(None,) * (x.ndim - 2), *spec)} for k, x in layers.items()}
    params = {"layers": layers, "scale": put(values[0, 0])}
    return {"params": params, "opt_state": optax.TraceState(trace=params), "key": put(jax.random.key(1, impl="rbg"))}

  with open_store() as store:
    store.save(1, state(jax.make_mesh((8,), ("fsdp",)), ("fsdp",), True), {})
  for shape, spec, scan in (((2, 4), ("a", "b"), True), ((4, 2), (("a", "b"), None), False), ((1, 8), (None, "b"), True)):
    wanted = state(jax.make_mesh(shape, ("a", "b")), spec, scan)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
    _, restored, _ = open_store(scan_layers=scan).restore_latest(target)
    assert not same(restored, wanted)
    assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted)))


def test_kept_by_count(simple, open_store, tmp_path):
  state = simple
  with open_store(keep=2) as store:
    for step in (1, 2, 5, 7):
      assert store.save(step, state, {})
    assert not store.save(7, state, {})  # whole already
  assert store.steps() == [5, 7] == sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  store = open_store(keep=1)
  assert store.restore_latest(abstract(state))[0] == 7
  assert not store.save(7, state, {})
  store.save(8, state, {})
  store.close()
  assert store.steps() == [8]
  with pytest.raises(ValueError, match="keep = 0: expected at least 1"):
    open_store(keep=0)
  with pytest.raises(ValueError, match="extra = .*expected what JSON can hold"):
    store.save(9, state, {"data": {1, 2}})


@pytest.mark.parametrize("lost", ["router/layers/layer_00/moe/router/hash_table",
                                  "opt_state/2/mu/layers/unit_1/attention/kv"])
def test_what_the_state_wants_and_the_checkpoint_lacks_is_named(states, open_store, lost):
  state = states(0)
  whole = abstract(state)
  node = state
  *parents, last = lost.split("/")
  for key in parents:
    node = getattr(node, key) if key == "mu" else node[int(key) if key.isdigit() else key]
  removed = node.pop(last)
  with open_store() as store:
    store.save(4, state, {})
    on_disk = lost.replace("layer_", "").replace("unit_1", "02")
    with pytest.raises(ValueError, match=f"{on_disk} is wanted but not in the checkpoint"):
      store.restore_latest(whole)
    node[last] = jax.ShapeDtypeStruct((2, *removed.shape), removed.dtype)
    node["other"] = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    state["step"] = jax.ShapeDtypeStruct((), jnp.float32)
    state["params"]["final_norm"]["scale"] = jax.ShapeDtypeStruct((9,), jnp.float32)
    state["key"] = jax.ShapeDtypeStruct((), jax.random.key(0, impl="rbg").dtype)
    del state["params"]["lm_head"]
    with pytest.raises(ValueError) as error:
      store.restore_latest(state)
  text = str(error.value)
  assert "/other is wanted but not in the checkpoint" in text
  assert "params/lm_head/kernel is in the checkpoint but not wanted" in text
  assert "params/final_norm/scale is (8,) float32 None in the checkpoint, wanted (9,) float32 None" in text
  assert "step is () int32" in text and "key is (2,) uint32 key<fry> in the checkpoint, wanted (4,) uint32 key<rbg>" in text


def test_another_model_is_refused(simple, open_store):
  state = simple
  with open_store() as store:
    store.save(4, state, {})
  assert open_store(remat="block", compute_dtype="bfloat16").restore_latest(abstract(state))[0] == 4
  with pytest.raises(ValueError, match=r"model.index_topk = 3, there 2; model.swiglu_limit = 7.0, there 10.0"):
    open_store(index_topk=3, swiglu_limit=7.0).restore_latest(abstract(state))


def test_weights_without_the_optimizer(tiny, states, open_store, tmp_path, equal):
  with open_store() as store:
    store.save(6, states(2), {})
  assert read_config(tmp_path / "checkpoints") == restore_variables(tmp_path / "checkpoints")[1]
  for scan in (None, True, False):
    variables, config_dict, step = restore_variables(tmp_path / "checkpoints", scan_layers=scan)
    model = config_lib.from_dict(config_lib.RunConfig, config_dict).model
    assert step == 6 and model == dataclasses.replace(tiny.config, scan_layers=scan is not False)
    assert equal(variables, restack(tiny.variables(tiny.config, 2), tiny.config, model.scan_layers))
  with pytest.raises(FileNotFoundError, match="no checkpoint"):
    restore_variables(tmp_path / "nothing")


def test_weights_of_a_certain_step(tiny, states, open_store, tmp_path, equal):
  with open_store() as store:
    for step in (2, 6):
      store.save(step, states(step), {})
  for step in (2, 6):
    variables, _, found = restore_variables(tmp_path / "checkpoints", step=step)
    expected = restack(tiny.variables(tiny.config, step), tiny.config, True)
    assert found == step and equal(variables, expected)
  with pytest.raises(FileNotFoundError, match="no checkpoint of step 4"):
    restore_variables(tmp_path / "checkpoints", step=4)


def flip_high_bit(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 0x80
  file.write_bytes(bytes(content))


# ---- damage ----------------------------------------------------------------------------------------------------------
def flip_in_values(path):
  file = max(path.rglob("d/*"), key=lambda f: f.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def cut(file):
  file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def forget_leaf(path):
  file = path / "state/_METADATA"
  tree = json.loads(file.read_text())
  del tree["tree_metadata"]["('params', 'b')"]
  file.write_text(json.dumps(tree))


@pytest.mark.parametrize("damage, reason", [
  (lambda p: cut(p / "state/_METADATA"), "JSONDecodeError"),
  (lambda p: cut(max(p.rglob("d/*"), key=lambda f: f.stat().st_size)), "byte range|Truncated"),
  (lambda p: flip_in_values(p), "checksum of params/a does not fit|corrupt"),
  (lambda p: (p / "state/manifest.ocdbt").unlink(), "does not exist|NOT_FOUND"),
  (lambda p: (p / "manifest/manifest.json").unlink(), "no manifest"),
  (lambda p: cut(p / "manifest/manifest.json"), "manifest unreadable"),
  (lambda p: flip_high_bit(p / "manifest/manifest.json"), "manifest unreadable"),
  (lambda p: (p / "manifest/manifest.json").write_text("[1, 2]"), "manifest unreadable"),
  (forget_leaf, "params/b is missing"),
])
def test_a_damaged_step_is_named_and_passed_over(simple, open_store, tmp_path, damage, reason):
  with open_store() as store:
    store.save(3, simple, {"at": 3})
    store.save(10, simple, {"at": 10})
  damage(tmp_path / "checkpoints/10")
  store = open_store(keep=1)
  with pytest.warns(UserWarning, match=f"checkpoints/10: .*({reason}).*using step 3"):
    step, restored, extra = store.restore_latest(abstract(simple))
  assert step == 3 and extra == {"at": 3} and not same(restored, simple)
  assert store.save(10, simple, {"at": 10})  # the damaged one is replaced
  store.wait()
  assert store.steps() == [10]  # and counts again: no more are kept than asked for
  store.close()
  with open_store() as other:
    assert not other.save(10, simple, {"at": 11})  # a whole one is never overwritten, whoever wrote it
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert open_store().restore_latest(abstract(simple))[0] == 10


def test_unfinished_steps_and_nothing_usable(simple, open_store, tmp_path):
  root = tmp_path / "checkpoints"
  with open_store() as store:
    store.save(3, simple, {})
  (root / "11").mkdir()
  (root / "12.orbax-checkpoint-tmp").mkdir()
  store = open_store(keep=2)
  with pytest.warns(UserWarning) as caught:
    assert store.restore_latest(abstract(simple))[0] == 3
  text = "\n".join(str(w.message) for w in caught)
  assert "11: never finished" in text and "12.orbax-checkpoint-tmp: never finished" in text
  store.save(4, simple, {})
  store.wait()
  assert store.steps() == [3, 4, 11]
  store.save(12, simple, {})
  store.close()
  assert sorted(p.name for p in root.iterdir()) == ["11", "12", "4"]  # the damaged one does not push out a whole one
  cut(root / "4/state/_METADATA")
  cut(root / "12/state/_METADATA")
  (root / "13").mkdir()
  with pytest.raises(FileNotFoundError) as error:
    open_store().restore_latest(abstract(simple))
  text = str(error.value)
  assert "no usable checkpoint" in text and "checkpoints/12: JSONDecodeError" in text and "checkpoints/13: never" in text


def test_a_write_that_fails_in_the_background_surfaces(simple, open_store, tmp_path):
  store = open_store()
  for step in (1, 2, 3):
    store.save(step, simple, {})
  store.wait()
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
  try:
    store.save(9, simple, {})
    with pytest.raises(RuntimeError, match=r"(?s)step 9: .*/checkpoints/9 could not be written: .*File too large"):
      for _ in range(200):
        store.check_errors()
        time.sleep(0.05)
    store.save(8, simple, {})
    with pytest.raises(RuntimeError, match="step 8: .*File too large"):
      store.save(9, simple, {})  # at the latest here
    store.save(8, simple, {})
    with pytest.raises(RuntimeError, match="step 8: .*File too large"):
      store.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)
  store = open_store()
  with pytest.warns(UserWarning, match="never finished; using step 3"):
    assert store.restore_latest(abstract(simple))[0] == 3
  assert store.save(10, simple, {})
  store.close()
  assert store.steps() == [2, 3, 10] and open_store().restore_latest(abstract(simple))[0] == 10


def test_killed_while_saving(simple, open_store, tmp_path):
  program = textwrap.dedent(f"""
    import os, signal
    import jax.numpy as jnp
    from deepseek_v4.checkpoint.store import CheckpointStore
    store = CheckpointStore({str(tmp_path / "checkpoints")!r}, keep=3, config_dict={{}})
    store.save(1, {{"x": jnp.ones(10)}}, {{}})
    store.wait()
    store.save(2, {{"x": jnp.ones((4000, 4000))}}, {{}})
    os.kill(os.getpid(), signal.SIGKILL)
  """)
  root = Path(__file__).resolve().parents[2]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
  killed = subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, check=False, capture_output=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
  store = CheckpointStore(tmp_path / "checkpoints", keep=3, config_dict={})
  with pytest.warns(UserWarning, match="2.orbax-checkpoint-tmp: never finished; using step 1"):
    assert store.restore_latest({"x": jax.ShapeDtypeStruct((10,), jnp.float32)})[0] == 1
