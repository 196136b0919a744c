"""The first state of a run that begins with finished weights: whose they are, where they lie, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4 import config as c
from deepseek_v4.checkpoint import convert
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.sharding import make_mesh
from deepseek_v4.training import loop, start
from deepseek_v4.training.state import abstract_state, state_of
from tests.checkpoint.releases import make_release
from tests.training.small import RUN, differing, leaves, random_state

# Sizes that two devices along every weight axis divide.
MODEL = dataclasses.replace(RUN.model, quantization="fp8+fp4")


def run_of(folder, model=MODEL, **changes):
  return dataclasses.replace(RUN, model=model, training=dataclasses.replace(RUN.training, init_from=str(folder)), **changes)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """(released folder, the same converted)."""
  folder = tmp_path_factory.mktemp("release")
  make_release(folder / "release", MODEL)
  convert.to_checkpoint(folder / "release", folder / "ours")
  return folder / "release", folder / "ours"


def test_weights_are_the_release_s_and_all_else_is_fresh(converted):
  release, ours = converted
  said = []
  state = start.state_from(run_of(ours), jax.random.key(3), None, said.append)
  assert not differing({"params": state.params, "router": state.router}, dsv4.load_hf(release, MODEL))
  assert not differing({"key": state.key}, {"key": jax.random.split(jax.random.key(3))[1]})  # as that of a run from scratch
  assert not differing({"step": state.step, "opt_state": state.opt_state},
                       {"step": np.int32(0), "opt_state": random_state().opt_state})
  assert "MiB of weights from" in said[0] and "starting from the weights of step 0 in" in said[1]
  expected = f"another vocabulary: expected --set data.tokenizer={ours / 'release' / 'tokenizer.json'}"
  assert len(said) == 3 and said[2].startswith("warning: data.tokenizer = None") and said[2].endswith(expected)


def test_bfloat16_weights_and_a_mesh(converted, tmp_path):
  """Every device gets its part, in float32."""
  release, _ = converted
  convert.to_checkpoint(release, tmp_path / "ours", dtype="bfloat16")
  mesh = make_mesh(c.MeshConfig(data=-1, fsdp=2, expert=2))
  run = run_of(tmp_path / "ours")
  with jax.set_mesh(mesh):
    state = start.state_from(run, jax.random.key(3), mesh, print)
  assert not differing({"params": state.params, "router": state.router}, dsv4.load_hf(release, MODEL))
  wanted = leaves(abstract_state(run, mesh))
  assert all(x.sharding == wanted[name].sharding for name, x in leaves(state).items())


def test_another_run_s_weights(tmp_path):
  """Of its newest step; scanned or not, whatever its optimizer."""
  other = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, scan_layers=False))
  state = random_state(other)
  with CheckpointStore(tmp_path / "checkpoints", keep=2, config_dict=c.to_dict(other)) as store:
    store.save(7, {"params": state.params, "router": state.router, "momentum": np.ones(3)}, {})
  said = []
  found = start.state_from(run_of(tmp_path, RUN.model), jax.random.key(3), None, said.append)
  want = dsv4.restack({"params": state.params, "router": state.router}, RUN.model, True)
  assert not differing({"params": found.params, "router": found.router}, want)
  assert int(found.step) == 0 and "weights of step 7" in said[1]


def test_what_is_refused(converted, tmp_path):
  release, ours = converted
  with pytest.raises(FileNotFoundError, match="training.init_from = '.*nowhere': expected the folder of a run or of a conv"):
    start.state_from(run_of(tmp_path / "nowhere"), jax.random.key(0), None, print)
  with pytest.raises(FileNotFoundError, match="a release is converted first: python -m launch.convert --source .*release"):
    start.state_from(run_of(release), jax.random.key(0), None, print)
  wider = dataclasses.replace(MODEL, moe_intermediate_size=24, index_topk=3)
  with pytest.raises(ValueError, match=r"ours \(training.init_from\) is of another model: model.index_topk = 3, there 2; "
                                       "model.moe_intermediate_size = 24, there 16"):
    start.state_from(run_of(ours, wider), jax.random.key(0), None, print)
  with pytest.raises(ValueError, match="init_from = 3: expected str or None"):
    c.TrainingConfig(init_from=3)
  assert c.override(RUN, ["training.init_from=some/folder"]).training.init_from == "some/folder"
  assert c.override(run_of(ours), ["training.init_from=none"]).training.init_from is None


def test_a_wrong_leaf_is_named(tmp_path):
  """By its name, the shape that is there and the expected one; all of them, from the manifest alone."""
  other = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, scan_layers=False))
  state = random_state(other)
  params = jax.tree.map(np.asarray, state.params)
  params["embed"]["embedding"] = params["embed"]["embedding"][:-1]
  params["layers"]["layer_01"]["attention"].pop("sink")
  params["more"] = np.ones(3, np.float32)
  with CheckpointStore(tmp_path / "checkpoints", keep=2, config_dict=c.to_dict(other)) as store:
    store.save(7, {"params": params, "router": state.router}, {})
  size, width, heads = RUN.model.vocab_size, RUN.model.hidden_size, RUN.model.num_attention_heads
  message = (rf"checkpoints/7 \(training.init_from\): expected the leaves of the run's model, by name and shape:\n"
             rf"  params/layers/01/attention/sink: not there, expected shape \({heads},\)\n"
             rf"  params/more: of shape \(3,\), expected no such leaf\n"
             rf"  params/embed/embedding: of shape \({size - 1}, {width}\), expected \({size}, {width}\)$")
  with pytest.raises(ValueError, match=message):
    start.check_source(run_of(tmp_path, RUN.model))
  with pytest.raises(ValueError, match=r"variables: expected .*\n  params/more: of shape \(3,\), expected no such leaf$"):
    variables = {"params": {**random_state().params, "more": np.ones(3)}, "router": random_state().router}
    state_of(RUN, variables, jax.random.key(0))


def test_the_source_is_refused_before_the_data_is_built(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "read_texts", lambda *_: pytest.fail("data was built"))
  with pytest.raises(FileNotFoundError, match="training.init_from = '.*nowhere'"):
    loop.train(run_of(tmp_path / "nowhere"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_release_s_companions_go_with_the_run(converted, tmp_path):
  release, ours = converted
  start.copy_release(run_of(ours), tmp_path)
  for file in ("config.json", "tokenizer.json", "encoding/encoding_dsv4.py"):
    assert (tmp_path / "release" / file).read_bytes() == (release / file).read_bytes()
  start.copy_release(run_of(tmp_path), tmp_path)  # a run that begins with its own weights
  start.copy_release(run_of(release), tmp_path / "plain")  # no release beside the weights
  assert not (tmp_path / "plain").exists()


def test_an_empty_name_is_no_folder():
  with pytest.raises(ValueError, match="init_from = '': expected a folder, or None"):
    run_of("")
