"""Released folders to checkpoints and back: the same bytes, every problem before anything is written, interruptions."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.checkpoint import convert, hf_write
from deepseek_v4.checkpoint.hf_write import release_plan
from deepseek_v4.checkpoint.safetensors_files import INDEX_NAME, Planned, read_folder, write_folder
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.checkpoint.trees import flatten
from deepseek_v4.config import MeshConfig, ModelConfig
from deepseek_v4.sharding import make_mesh, parameter_shardings
from launch.convert import convert as launch_convert
from tests.checkpoint.releases import CONFIG, decoded, make_release, stored_bytes


def same(a, b):
  xs, ys = flatten(a), flatten(b)
  return set(xs) == set(ys) and all(
    xs[n].dtype == ys[n].dtype and np.asarray(xs[n]).tobytes() == np.asarray(ys[n]).tobytes() for n in xs)


@pytest.mark.parametrize("quantization, dtype", [("fp8+fp4", "float32"), ("fp8+fp4", "bfloat16"), ("fp8", "float32"),
                                                 (None, "float32")])
def test_there_and_back_gives_the_same_bytes(tmp_path, quantization, dtype):
  config = make_release(tmp_path / "release", quantization=quantization)
  seen = []
  found = convert.to_checkpoint(tmp_path / "release", tmp_path / "ours", dtype=dtype, part_bytes=400_000,
                                progress=lambda done, total: seen.append((done, total)))
  assert found == config and len(seen) > 3 and seen[-1][0] == seen[-1][1]
  convert.to_release(tmp_path / "ours", tmp_path / "back", quantization=quantization, max_file_bytes=150_000)
  assert stored_bytes(tmp_path / "back") == stored_bytes(tmp_path / "release")
  for file in ("config.json", "tokenizer.json", "encoding/encoding_dsv4.py"):
    assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "release" / file).read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "ours", "release"]
  variables, stored_config, step = restore_variables(tmp_path / "ours" / "checkpoints")
  assert step == 0 and ModelConfig(**stored_config["model"]) == config
  mixing = variables["params"]["layers"]["unit_0"]["attn_hc"]["fn_res"]
  assert (variables["params"]["embed"]["embedding"].dtype, mixing.dtype) == (jnp.dtype(dtype), jnp.float32)
  if dtype == "float32":
    assert same(variables, dsv4.load_hf(tmp_path / "release", config))


def test_values_are_those_of_another_decoding(tmp_path):
  """Every tensor from the bytes by hand; where single elements go in our layouts is tested in test_hf_names."""
  config = make_release(tmp_path / "release")
  tensors, _ = read_folder(tmp_path / "release")
  variables = dsv4.load_hf(tmp_path / "release", config, keep_scales=True)
  named = dsv4.to_hf_names(variables, config, "release")
  quantised = [n for n in tensors if n.removesuffix("weight") + "scale" in tensors]
  assert len(quantised) == len([n for n in tensors if n.endswith(".scale")]) > 70
  for name in named:
    assert np.array_equal(named[name].astype(np.float32).view(np.uint32), decoded(tensors, name).view(np.uint32)), name


@pytest.mark.parametrize("quantization", ["fp8+fp4", "fp8"])
def test_in_memory_with_scales(tmp_path, quantization):
  """load_hf(keep_scales) and save_hf, layers scanned; a changed block changes no other, dropped scales change no value."""
  config = make_release(tmp_path / "release", quantization=quantization)
  variables = dsv4.load_hf(tmp_path / "release", config, keep_scales=True)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables["scales"])} == {jnp.dtype("uint8")}
  dsv4.save_hf(variables, config, tmp_path / "same", quantization, tmp_path / "release")
  before = stored_bytes(tmp_path / "release")
  assert stored_bytes(tmp_path / "same") == before
  del variables["scales"]
  dsv4.save_hf(variables, config, tmp_path / "rescaled", quantization)
  assert same(dsv4.load_hf(tmp_path / "rescaled", ModelConfig.from_hf(tmp_path / "rescaled")), variables)
  assert stored_bytes(tmp_path / "rescaled") != before


def test_scales_of_some_matrices_only(tmp_path):
  config = make_release(tmp_path / "release")
  mapping, _ = read_folder(tmp_path / "release")
  plain = np.ones(mapping["layers.0.attn.wkv.weight"].shape, np.float32)
  mixed = {n: x for n, x in mapping.items() if n != "layers.0.attn.wkv.scale"} | {"layers.0.attn.wkv.weight": plain}
  assert (dsv4.load_hf(mixed, config)["params"]["layers"]["layer_00"]["attention"]["kv"] == 1).all()
  with pytest.raises(ValueError, match=r"not quantised \(1\): params/layers/layer_00/attention/kv"):
    dsv4.load_hf(mixed, config, keep_scales=True)


def test_nothing_is_left_at_its_initial_value(tmp_path):
  """CHECKS A10.7: no leaf of two releases is the same; and 6: gate and up are not exchanged."""
  config = make_release(tmp_path / "release")
  make_release(tmp_path / "other", seed=1)
  loaded, other = (flatten(dsv4.load_hf(tmp_path / name, config)) for name in ("release", "other"))
  wanted = flatten(jax.eval_shape(dsv4.DeepseekV4(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
  assert {name: x.shape for name, x in loaded.items()} == {name: x.shape for name, x in wanted.items()}
  assert not [name for name, x in loaded.items() if x.tobytes() == other[name].tobytes()]  # zeros have signs
  gate, up = (loaded[f"params/mtp/block/moe/shared/{name}"] for name in ("gate", "up"))
  tensors, _ = read_folder(tmp_path / "release")
  for leaf, number in ((gate, 1), (up, 3)):
    assert np.array_equal(leaf, decoded(tensors, f"mtp.0.ffn.shared_experts.w{number}.weight").T)


def test_only_the_changed_block_is_scaled_anew(tmp_path):
  config = make_release(tmp_path / "release")
  flat = dsv4.restack(dsv4.load_hf(tmp_path / "release", config, keep_scales=True), config, scan_layers=False)
  experts = flat["params"]["layers"]["layer_02"]["moe"]["experts"]
  experts["gate"] = experts["gate"].at[1, 135, 7].set(0.3)  # row 7, column 135 of theirs: block (7, 4)
  dsv4.save_hf(flat, config, tmp_path / "changed", "fp8+fp4")
  before, after = stored_bytes(tmp_path / "release"), stored_bytes(tmp_path / "changed")
  name = "layers.2.ffn.experts.1.w1"
  assert {n for n in before if before[n] != after[n]} <= {f"{name}.weight", f"{name}.scale"}
  old, new = (np.frombuffer(x[f"{name}.scale"][2], np.uint8).reshape(48, 5) for x in (before, after))
  assert set(zip(*np.nonzero(old != new))) <= {(7, 4)} and before[f"{name}.weight"] != after[f"{name}.weight"]


def test_other_storages_and_transformers_names(tmp_path):
  """A quantised import leaves as BF16 or float32 and comes back equal; an unquantised one as FP8."""
  config = make_release(tmp_path / "release")
  variables = dsv4.load_hf(tmp_path / "release", config)
  for dtype in ("bfloat16", "float32"):
    dsv4.save_hf(variables, config, tmp_path / dtype, None, tmp_path / "release", dtype=dtype)
    written = ModelConfig.from_hf(tmp_path / dtype)
    assert written == dataclasses.replace(config, quantization=None)
    assert json.loads((tmp_path / dtype / "config.json").read_text())["torch_dtype"] == dtype
    assert same(dsv4.load_hf(tmp_path / dtype, written), variables)
  convert.to_checkpoint(tmp_path / "float32", tmp_path / "ours")
  convert.to_release(tmp_path / "ours", tmp_path / "fp8", quantization="fp8")
  raw = json.loads((tmp_path / "fp8" / "config.json").read_text())
  assert raw["expert_dtype"] == "fp8" and raw["quantization_config"]["weight_block_size"] == [128, 128]
  fp8 = dsv4.load_hf(tmp_path / "fp8", ModelConfig.from_hf(tmp_path / "fp8"))
  scale = np.abs(np.asarray(variables["params"]["mtp"]["embed_proj"])).max() / 448
  assert np.abs(fp8["params"]["mtp"]["embed_proj"] - variables["params"]["mtp"]["embed_proj"]).max() <= 2 * 16 * scale
  assert same(fp8["router"], variables["router"])


def damage(folder):
  """One problem of every kind; returns what the error must say."""
  index = json.loads((folder / INDEX_NAME).read_text())
  files = index["weight_map"]
  gone = files["layers.3.ffn.experts.2.w2.weight"]
  (folder / gone).unlink()
  tensors, _ = read_folder(folder)
  listed = "layers.1.attn.wq_a.weight"
  del files[listed]
  files["layers.9.attn.wq_a.weight"] = files["embed.weight"]
  (folder / INDEX_NAME).write_text(json.dumps(index))

  def rename(old, new):
    file = tensors[old].file
    data = file.read_bytes()
    assert data.count(f'"{old}"'.encode()) == 1 and len(old) == len(new)
    file.write_bytes(data.replace(f'"{old}"'.encode(), f'"{new}"'.encode()))
    files[new] = files.pop(old)
    (folder / INDEX_NAME).write_text(json.dumps(index))

  rename("layers.0.attn.wkv.scale", "layers.0.attn.wkv.sxale")
  rename("layers.1.attn.compressor.wkv.weight", "layers.1.attn.compressor.wxv.weight")
  rename("layers.2.attn.wo_b.weight", "layers.2.attn.wo_x.weight")
  file = tensors["norm.weight"].file
  file.write_bytes(file.read_bytes().replace(b'"norm.weight": {"dtype": "BF16", "shape": [136]',
                                             b'"norm.weight": {"dtype": "I16", "shape": [136] '))
  file = tensors["head.weight"].file
  file.write_bytes(file.read_bytes().replace(b'"head.weight": {"dtype": "BF16", "shape": [29, 136]',
                                             b'"head.weight": {"dtype": "BF16", "shape": [58, 68] '))
  (folder / "more.safetensors").write_bytes(b"")
  return {"shard listed but absent (1)": gone,
          "file that the index does not list (1)": "more.safetensors",
          "in a shard but not in the index (1)": listed,
          "in the index but not in its shard (1)": "layers.9.attn.wq_a.weight",
          "missing (": "layers.3.ffn.experts.2.w2.weight",
          "unexpected (3)": "layers.1.attn.compressor.wxv.weight",
          "wrong shape (1)": "head.weight (58, 68), expected (29, 136)",
          "wrong dtype (1)": "norm.weight int16, expected float32 or bfloat16",
          "missing scale (1)": "layers.0.attn.wkv.scale",
          "extra scale (": "layers.2.attn.wo_b.scale"}


def test_everything_that_does_not_fit_in_one_error_before_anything_is_written(tmp_path):
  """CHECKS A10.5."""
  make_release(tmp_path / "release", max_file_bytes=60_000)
  expected = damage(tmp_path / "release")
  with pytest.raises(ValueError) as error:
    convert.to_checkpoint(tmp_path / "release", tmp_path / "ours")
  lines = str(error.value).splitlines()
  for kind, name in expected.items():
    assert [line for line in lines if kind in line and name in line], (kind, name, lines)
  assert [p.name for p in tmp_path.iterdir()] == ["release"]


@pytest.mark.parametrize("stored, config, expected", [
  ("fp8", {"expert_dtype": "fp4"}, "ffn.experts.1.w2.weight float8_e4m3fn, expected int8 or uint8 (FP4) as the"),
  ("fp8+fp4", {"expert_dtype": "fp8"}, "ffn.experts.1.w2.weight int8, expected float8_e4m3fn as the config says"),
  ("fp8", None, "attn.wkv.weight float8_e4m3fn, expected float32 or bfloat16 as the config says (quantization None"),
  (None, "quantised", "attn.wkv.weight bfloat16, expected float8_e4m3fn as the config says (quantization 'fp8+fp4'")])
def test_a_folder_that_is_not_stored_as_its_config_says(tmp_path, stored, config, expected):
  """In the one error; how many such tensors a model of five layers and a prediction block has, from its list of tensors."""
  make_release(tmp_path / "release", quantization=stored)
  file = tmp_path / "release" / "config.json"
  raw = json.loads(file.read_text())
  if config == "quantised":
    make_release(tmp_path / "other")
    other = json.loads((tmp_path / "other" / "config.json").read_text())
    raw |= {name: other[name] for name in ("quantization_config", "expert_dtype")}
  else:
    raw = raw | config if config else {n: x for n, x in raw.items() if n not in ("quantization_config", "expert_dtype")}
  file.write_text(json.dumps(raw))
  experts = 6 * 3 * 3
  # Five of attention, three of the shared expert; of two indexers; two projections of the prediction block.
  others = 6 * (5 + 3) + 2 + 2
  with pytest.raises(ValueError) as error:
    convert.to_checkpoint(tmp_path / "release", tmp_path / "ours")
  (line,) = [line for line in str(error.value).splitlines() if "wrong dtype" in line]
  assert f"wrong dtype ({experts if config and config != 'quantised' else experts + others})" in line and expected in line
  assert not (tmp_path / "ours").exists() and not (tmp_path / "ours.unfinished").exists()
  mapping, _ = read_folder(tmp_path / "release")
  if config and config != "quantised":  # one of the two formats where the other is meant is wrong in memory too
    with pytest.raises(ValueError, match=rf"wrong dtype \({experts}\)"):
      dsv4.load_hf(mapping, ModelConfig.from_hf(raw))
  else:
    dsv4.load_hf(mapping, ModelConfig.from_hf(raw))


def test_what_is_stored_in_float32_stays_that(tmp_path):
  """`--dtype bfloat16` of a folder in float32 rounds nothing; of a folder with one such matrix it is that matrix's leaf."""
  config = make_release(tmp_path / "release", quantization=None)
  variables = dsv4.load_hf(tmp_path / "release", config)
  finer = variables["params"]["lm_head"]["kernel"] = variables["params"]["lm_head"]["kernel"] * (1 + 2.0**-12)
  dsv4.save_hf(variables, config, tmp_path / "float32", dtype="float32")
  convert.to_checkpoint(tmp_path / "float32", tmp_path / "ours", dtype="bfloat16")
  found, _, _ = restore_variables(tmp_path / "ours" / "checkpoints")
  assert same(found, variables) and np.any(np.asarray(finer) != np.asarray(finer).astype(ml_dtypes.bfloat16))
  mapping, _ = read_folder(tmp_path / "release")
  (tmp_path / "mixed").mkdir()
  arrays = {n: t.numpy() for n, t in mapping.items()} | {"head.weight": np.asarray(finer).T}
  plan = release_plan(config, None) | {"head.weight": Planned("F32", (29, 136))}
  write_folder(tmp_path / "mixed", plan, ((n, arrays[n]) for n in plan))
  (tmp_path / "mixed" / "config.json").write_bytes((tmp_path / "release" / "config.json").read_bytes())
  convert.to_checkpoint(tmp_path / "mixed", tmp_path / "both", dtype="bfloat16")
  found, _, _ = restore_variables(tmp_path / "both" / "checkpoints")
  dtypes = {name: leaf.dtype for name, leaf in flatten(found["params"]).items()}
  assert (dtypes["lm_head/kernel"], dtypes["embed/embedding"]) == (jnp.float32, jnp.bfloat16)
  assert np.array_equal(found["params"]["lm_head"]["kernel"], finer)


def test_codes_that_are_no_number_are_named(tmp_path):
  make_release(tmp_path / "release")
  tensors, _ = read_folder(tmp_path / "release")
  name = "layers.2.attn.wo_a.weight"
  with tensors[name].file.open("r+b") as file:
    file.seek(tensors[name].offset + 5)
    file.write(b"\xff")
  with pytest.raises(ValueError, match=f"{name}: 1 codes 0x7F or 0xFF"):
    dsv4.load_hf(tmp_path / "release", CONFIG)
  with pytest.raises(ValueError, match=f"{name}: 1 codes 0x7F or 0xFF"):
    convert.to_checkpoint(tmp_path / "release", tmp_path / "ours")
  assert not (tmp_path / "ours").exists()


def test_values_that_bfloat16_cannot_hold(tmp_path):
  """The smallest code times the smallest scale is 2^-136, and bfloat16 ends at 2^-133: no silent zero."""
  config = make_release(tmp_path / "release")
  tensors, _ = read_folder(tmp_path / "release")
  for name, byte in (("layers.0.attn.wkv.weight", b"\x01"), ("layers.0.attn.wkv.scale", b"\x00")):
    with tensors[name].file.open("r+b") as file:
      file.seek(tensors[name].offset)
      file.write(byte)
  assert dsv4.load_hf(tmp_path / "release", config)["params"]["layers"]["layer_00"]["attention"]["kv"][0, 0] == 2.0**-136
  with pytest.raises(ValueError, match="layers.0.attn.wkv.weight: values that bfloat16 cannot hold; expected float32"):
    convert.to_checkpoint(tmp_path / "release", tmp_path / "ours", dtype="bfloat16")


@pytest.mark.parametrize("scan", [True, False])
def test_variables_are_read_onto_a_mesh(tmp_path, scan):
  """Every device gets its part, as in training; the scales stay on disk."""
  make_release(tmp_path / "release")
  convert.to_checkpoint(tmp_path / "release", tmp_path / "ours", part_bytes=400_000)
  mesh = make_mesh(MeshConfig(data=4, fsdp=2))
  whole, _, _ = restore_variables(tmp_path / "ours" / "checkpoints", scan_layers=scan)
  parts, config, _ = restore_variables(tmp_path / "ours" / "checkpoints", scan_layers=scan, mesh=mesh)
  assert config["model"]["scan_layers"] == scan and same(parts, whole)
  assert ("unit_0" in parts["params"]["layers"]) == scan
  places = parameter_shardings(whole["params"], mesh)
  assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding == place, parts["params"], places))
  assert parts["params"]["lm_head"]["kernel"].addressable_shards[0].data.shape == (68, 29)
  with pytest.raises(ValueError, match="expected no mesh beside it"):
    restore_variables(tmp_path / "ours" / "checkpoints", keep_scales=True, mesh=mesh)
  with pytest.raises(ValueError, match="model.n_routed_experts = 3: expected a multiple of mesh.expert = 8"):
    restore_variables(tmp_path / "ours" / "checkpoints", mesh=make_mesh(MeshConfig(data=1, expert=8)))


# ---- drafts ----------------------------------------------------------------------------------------------------------
def test_draft_stages_need_leave_to_be_dropped(tmp_path):
  """A later release: three draft stages where the prediction block was; the backbone is converted without them."""
  config = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
  ratios = [0, 2, 3, 2, 3] + [0, 0, 0]
  make_release(tmp_path / "release", config, compress_ratios=ratios, dspark_block_size=5, num_nextn_predict_layers=1)
  index = json.loads((tmp_path / "release" / INDEX_NAME).read_text())
  draft = {f"mtp.{i}.main_proj.weight": np.zeros((3, 4), ml_dtypes.bfloat16) for i in range(3)}
  (tmp_path / "extra").mkdir()
  write_folder(tmp_path / "extra", {n: Planned("BF16", (3, 4)) for n in draft}, draft.items())
  (tmp_path / "extra" / "model.safetensors").rename(tmp_path / "release" / "draft.safetensors")
  index["weight_map"] |= dict.fromkeys(draft, "draft.safetensors")
  (tmp_path / "release" / INDEX_NAME).write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r"draft tensors.*drop_draft.* \(3\): mtp.0.main_proj.weight, mtp.1.main_proj.weight"):
    convert.to_checkpoint(tmp_path / "release", tmp_path / "ours")
  found = convert.to_checkpoint(tmp_path / "release", tmp_path / "ours", drop_draft=True)
  assert found == dataclasses.replace(config, quantization="fp8+fp4")
  convert.to_release(tmp_path / "ours", tmp_path / "back", quantization="fp8+fp4")
  before = stored_bytes(tmp_path / "release")
  assert stored_bytes(tmp_path / "back") == {n: x for n, x in before.items() if n not in draft}
  raw = json.loads((tmp_path / "back" / "config.json").read_text())
  assert "dspark_block_size" not in raw and raw["compress_ratios"] == ratios[:5]
  assert ModelConfig.from_hf(tmp_path / "back") == found


def test_the_prediction_block_can_be_dropped(tmp_path):
  make_release(tmp_path / "release")
  found = convert.to_checkpoint(tmp_path / "release", tmp_path / "ours", drop_draft=True)
  assert found.num_nextn_predict_layers == 0
  variables, _, _ = restore_variables(tmp_path / "ours" / "checkpoints")
  assert same(variables, dsv4.load_hf(tmp_path / "release", found))


# ---- interruptions ---------------------------------------------------------------------------------------------------
def interrupt_after(monkeypatch, parts):
  """The process dies while it writes the part after so many; returns the parts begun."""
  begun, write = [], convert.write_part

  def dying(folder, leaves):
    begun.append(folder.name)
    if len(begun) > parts:
      raise KeyboardInterrupt
    write(folder, leaves)

  monkeypatch.setattr(convert, "write_part", dying)
  return begun


def test_an_interrupted_conversion_goes_on_or_starts_clean(tmp_path, monkeypatch):
  config = make_release(tmp_path / "release")
  run = dict(source=tmp_path / "release", target=tmp_path / "ours", part_bytes=300_000)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    interrupt_after(patch, 2)
    convert.to_checkpoint(**run)
  assert not (tmp_path / "ours").exists() and (tmp_path / "ours.unfinished").exists()
  with pytest.raises(FileNotFoundError):
    convert.to_release(tmp_path / "ours", tmp_path / "back")
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # other options: from the beginning
    assert interrupt_after(patch, 1) == []
    convert.to_checkpoint(**run, dtype="bfloat16")
  with monkeypatch.context() as patch:
    begun = interrupt_after(patch, 10**6)
    convert.to_checkpoint(**run)
    assert begun[0] == "part_0000"  # the parts of the other dtype were not taken over
  variables, _, _ = restore_variables(tmp_path / "ours" / "checkpoints", keep_scales=True)
  assert same(variables, dsv4.load_hf(tmp_path / "release", config, keep_scales=True))


def test_finished_parts_are_not_written_again(tmp_path, monkeypatch):
  config = make_release(tmp_path / "release")
  run = dict(source=tmp_path / "release", target=tmp_path / "ours", part_bytes=300_000)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    interrupt_after(patch, 2)
    convert.to_checkpoint(**run)
  begun = interrupt_after(monkeypatch, 10**6)
  convert.to_checkpoint(**run)
  assert begun[0] == "part_0002" and len(begun) > 1
  assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["checkpoints", "release"]
  variables, _, _ = restore_variables(tmp_path / "ours" / "checkpoints", keep_scales=True)
  assert same(variables, dsv4.load_hf(tmp_path / "release", config, keep_scales=True))


def dies(at, before=True):
  """A function that stands for `at` and dies before or behind it."""
  def dying(*arguments, **options):
    found = None if before else at(*arguments, **options)
    raise KeyboardInterrupt(found)
  return dying


@pytest.mark.parametrize("module, name, before", [
  (convert, "write_part", True), (convert, "write_part", False), (convert.manifest_lib, "entries", False),
  (convert.manifest_lib, "of_entries", True), (convert, "_write_whole", True), (convert, "_copy_release", True),
  (convert, "copy_companions", True), (convert, "copy_companions", False), (convert, "_tidy", True),
  (convert.shutil, "rmtree", True), (convert.shutil, "rmtree", False)])
def test_a_conversion_that_dies_at_any_step_is_finished_by_the_same_command(tmp_path, monkeypatch, module, name, before):
  """And until the target is complete it does not have its name."""
  config = make_release(tmp_path / "release")
  run = dict(source=tmp_path / "release", target=tmp_path / "ours", part_bytes=10**6)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(module, name, dies(getattr(module, name), before))
    convert.to_checkpoint(**run)
  begun = (tmp_path / "ours").exists()
  assert begun == (name in ("_tidy", "rmtree"))  # these come behind the renaming
  assert begun != (tmp_path / "ours.unfinished").exists()
  if begun:  # complete already, and other options are not taken for the same conversion
    assert same(restore_variables(tmp_path / "ours" / "checkpoints")[0], dsv4.load_hf(tmp_path / "release", config))
    with pytest.raises(ValueError, match="target = .*ours': expected a folder that is empty"):
      convert.to_checkpoint(**run, dtype="bfloat16")
  assert convert.to_checkpoint(**run) == config
  files = [str(p.relative_to(tmp_path / "ours")) for p in sorted((tmp_path / "ours").rglob("*")) if "part_" not in str(p)]
  assert files == ["checkpoints", "checkpoints/0", "checkpoints/0/manifest", "checkpoints/0/manifest/manifest.json",
                   "release", "release/config.json", "release/encoding", "release/encoding/encoding_dsv4.py",
                   "release/tokenizer.json"]
  variables, _, _ = restore_variables(tmp_path / "ours" / "checkpoints", keep_scales=True)
  assert same(variables, dsv4.load_hf(tmp_path / "release", config, keep_scales=True))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "release"]


KILLED = """
import os, signal, sys
from deepseek_v4.checkpoint import convert, hf_write
write, count = convert.write_part, []
def dying(folder, leaves):
  count.append(folder)
  if len(count) == 3:
    os.kill(os.getpid(), signal.SIGKILL)
  write(folder, leaves)
convert.write_part = dying
convert.to_checkpoint(sys.argv[1], sys.argv[2], part_bytes=300_000)
"""


@pytest.mark.long
def test_a_conversion_that_is_killed_goes_on(tmp_path, monkeypatch):
  config = make_release(tmp_path / "release")
  root = Path(__file__).resolve().parents[2]
  killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "release"), str(tmp_path / "ours")], cwd=root,
                          env=os.environ | {"PYTHONPATH": str(root)}, timeout=300, capture_output=True, text=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert not (tmp_path / "ours").exists()
  begun = interrupt_after(monkeypatch, 10**6)
  convert.to_checkpoint(tmp_path / "release", tmp_path / "ours", part_bytes=300_000)
  assert begun[0] == "part_0002"
  variables, _, _ = restore_variables(tmp_path / "ours" / "checkpoints", keep_scales=True)
  assert same(variables, dsv4.load_hf(tmp_path / "release", config, keep_scales=True))


@pytest.mark.parametrize("name", ["write_config", "copy_companions", "write_folder"])
def test_an_export_that_dies_at_any_step_leaves_no_target(tmp_path, monkeypatch, name):
  make_release(tmp_path / "release")
  convert.to_checkpoint(tmp_path / "release", tmp_path / "ours")
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(hf_write, name, dies(getattr(hf_write, name), before=False))
    convert.to_release(tmp_path / "ours", tmp_path / "back")
  assert not (tmp_path / "back").exists()
  convert.to_release(tmp_path / "ours", tmp_path / "back")
  assert stored_bytes(tmp_path / "back") == stored_bytes(tmp_path / "release")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "ours", "release"]


def test_an_interrupted_export_leaves_nothing(tmp_path):
  config = make_release(tmp_path / "release")
  variables = dsv4.load_hf(tmp_path / "release", config)
  (tmp_path / "back.unfinished").mkdir()
  (tmp_path / "back.unfinished" / "model.safetensors").write_text("of a process that was killed")
  broken = jax.tree.map(lambda x: x, variables)
  broken["params"]["lm_head"]["kernel"] = broken["params"]["lm_head"]["kernel"][:, :-1]
  broken["params"]["layers"]["layer_00"]["attention"]["sink"] = None
  with pytest.raises(ValueError, match=r"wrong shape \(1\): params/lm_head/kernel"):
    dsv4.save_hf(broken, config, tmp_path / "back", "fp8")
  endless = jax.tree.map(lambda x: x, variables)
  endless["params"]["mtp"]["embed_proj"] = endless["params"]["mtp"]["embed_proj"].at[0, 0].set(jnp.inf)
  with pytest.raises(ValueError, match="mtp.0.e_proj.weight: values that are not finite"):
    dsv4.save_hf(endless, config, tmp_path / "back", "fp8")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["release"]
  dsv4.save_hf(variables, config, tmp_path / "back", "fp8+fp4")
  with pytest.raises(ValueError, match="target = .*back': expected a folder that is empty"):
    dsv4.save_hf(variables, config, tmp_path / "back", "fp8")
  with pytest.raises(ValueError, match="target = .*back': expected a folder that is empty"):
    convert.to_checkpoint(tmp_path / "release", tmp_path / "back")


def test_options_that_do_not_exist(tmp_path):
  config = make_release(tmp_path / "release")
  variables = dsv4.load_hf(tmp_path / "release", config)
  with pytest.raises(ValueError, match="quantization = 'int4': expected one of None, 'fp8', 'fp8\\+fp4'"):
    dsv4.save_hf(variables, config, tmp_path / "back", "int4")
  with pytest.raises(ValueError, match="dtype = 'float16': expected one of bfloat16, float32"):
    convert.to_checkpoint(tmp_path / "release", tmp_path / "ours", dtype="float16")
  with pytest.raises(ValueError, match=r"variables = \['params'\]: expected a dictionary with router"):
    dsv4.save_hf({"params": variables["params"]}, config, tmp_path / "back")
  with pytest.raises(FileNotFoundError, match="copy_files_from"):
    dsv4.save_hf(variables, config, tmp_path / "back", None, tmp_path / "nowhere")
  odd = dataclasses.replace(CONFIG, moe_intermediate_size=47)
  with pytest.raises(ValueError, match="moe_intermediate_size = 47: expected an even number"):
    make_release(tmp_path / "odd", odd)


def test_memory_is_bounded_by_a_part(tmp_path, monkeypatch):
  """NumPy's allocations while 50 MB of float32 are converted, in parts of 4 MB and with leaves of up to 3 MB.

  Beside these, the checksums' threads hold some MB, whatever the model's size.
  """
  monkeypatch.setattr(convert, "READ_BYTES", 4_000_000)
  config = dataclasses.replace(CONFIG, hidden_size=256, n_routed_experts=32, moe_intermediate_size=96)
  make_release(tmp_path / "release", config)
  whole = 4 * dsv4.count(config, 1).parameters.total
  assert whole > 50e6
  for command in (lambda: convert.to_checkpoint(tmp_path / "release", tmp_path / "ours", part_bytes=4_000_000),
                  lambda: convert.to_release(tmp_path / "ours", tmp_path / "back", quantization="fp8+fp4")):
    tracemalloc.start()
    command()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < whole / 2, f"{peak:,} bytes of {whole:,}"


def test_command_line(tmp_path, capsys, monkeypatch):
  """Relative paths, a target that is an empty folder, the storage of the release by default."""
  make_release(tmp_path / "release")
  (tmp_path / "back").mkdir()
  monkeypatch.chdir(tmp_path)
  launch_convert("release", "ours", "orbax", None, None, False)
  launch_convert("ours", "back", "hf", None, None, False)
  assert "5 layers, 3 experts" in capsys.readouterr().out
  assert stored_bytes(tmp_path / "back") == stored_bytes(tmp_path / "release")
  launch_convert(str(tmp_path / "ours"), str(tmp_path / "plain"), "hf", "none", "float32", False)
  assert {dtype for dtype, _, _ in stored_bytes(tmp_path / "plain").values()} == {"float32", "int64"}
  with pytest.raises(ValueError, match="--quantization = 'fp8': expected --to hf beside it"):
    launch_convert("a", "b", "orbax", "fp8", None, False)
  with pytest.raises(ValueError, match="--drop_draft: expected --to orbax"):
    launch_convert("a", "b", "hf", None, None, True)
