"""Teachers: what is cached of them, that they come one after another, and what is refused before anything is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import MeshConfig
from deepseek_v4.posttraining import teachers as teachers_lib
from deepseek_v4.posttraining.distillation_step import Pass, Steps
from deepseek_v4.posttraining.prompts import in_passes
from deepseek_v4.posttraining.teachers import Library, Resident, open_teacher
from deepseek_v4.sharding import make_mesh
from tests.posttraining.small import STUDENT, TEACHER, random_rows, random_state, run_config, write_run

PASSES = in_passes(random_rows(TEACHER, [[(3, 20)], [(4, 30), (2, 8)], [(1, 47)]]), 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Folders of two runs, one of them of another architecture, and their states."""
  root = tmp_path_factory.mktemp("teachers")
  return root, {"same": write_run(root / "same", STUDENT, 1), "other": write_run(root / "other", TEACHER, 2)}


def library(folder, tmp_path, **settings):
  root, _ = folder
  run = run_config([(name, root / name, root, 1.0) for name in ("same", "other")], STUDENT, **settings)
  return run, Library(run, tmp_path / "cache"), [open_teacher(run, t) for t in run.distillation.teachers]


@pytest.mark.parametrize("name, model, dtype", [
  ("other", TEACHER, "float32"), ("other", TEACHER, "bfloat16"),
  pytest.param("same", STUDENT, "float32", marks=pytest.mark.long)])
def test_what_is_cached_is_what_the_head_multiplies(folder, tmp_path, name, model, dtype):
  """Hidden states times head are the teacher's own logits: exactly what its forward pass gives, or that in bfloat16, whose
  8 bits leave an error of 0.4% of each factor; a head has the student's number of columns."""
  _, books, opened = library(folder, tmp_path, hidden_dtype=dtype)
  teacher = opened[name == "other"]
  put = lambda rows: jax.device_put(rows)
  found = books.hidden(teacher, 0, PASSES, put)
  assert found.shape == (2, 2, 48, model.hidden_size) and found.dtype == jnp.dtype(dtype)
  state = folder[1][name]
  head = books.head(teacher)
  assert head.shape == (model.hidden_size, STUDENT.vocab_size) and not head[:, model.vocab_size:].any()
  variables = jax.tree.map(jnp.asarray, {"params": state.params, "router": state.router})
  run = jax.jit(lambda *rows: dsv4.DeepseekV4(model).apply(variables, *rows).logits)
  for rows, hidden in zip(PASSES, found):
    want = np.asarray(run(rows["tokens"], rows["positions"], rows["segment_ids"]))
    logits = (hidden.astype(np.float32) @ head.astype(np.float32))[..., :model.vocab_size]
    error = np.abs(logits - want)[rows["segment_ids"] > 0].max()
    assert error < (1e-4 if dtype == "float32" else 0.02 * np.abs(want).max())


def test_it_is_computed_once_and_again_for_other_samples(folder, tmp_path, monkeypatch):
  _, books, (teacher, _) = library(folder, tmp_path)
  reads, restore = [], teachers_lib.restore_variables
  monkeypatch.setattr(teachers_lib, "restore_variables", lambda *a, **k: reads.append(a) or restore(*a, **k))
  first = np.array(books.hidden(teacher, 0, PASSES, jax.device_put))
  assert np.array_equal(books.hidden(teacher, 0, PASSES, jax.device_put), first) and len(reads) == 1
  assert not list((tmp_path / "cache").rglob("*.unfinished"))
  other = [{**PASSES[0], "tokens": PASSES[0]["tokens"][:, ::-1]}, PASSES[1]]
  assert not np.array_equal(books.hidden(teacher, 0, other, jax.device_put), first) and len(reads) == 2
  # an interrupted computation leaves nothing that counts
  def interrupt():
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    books.hidden(teacher, 1, PASSES, jax.device_put, interrupt)
  assert np.array_equal(books.hidden(teacher, 1, PASSES, jax.device_put), first) and len(reads) == 4
  books.forget(1)
  assert [path.name for path in (tmp_path / "cache").glob("round_*")] == ["round_000001"]


def test_eleven_teachers_one_at_a_time(tmp_path):
  """One program for all of them, the weights of at most one and a single head on the devices."""
  for i in range(11):
    write_run(tmp_path / str(i), TEACHER, i)
  run = run_config([(f"t{i}", tmp_path / str(i), tmp_path, 1.0) for i in range(11)], STUDENT, data=dataclasses.replace(
    run_config([("a", "b", "c", 1.0)]).data, batch_size=22, accumulation=11))
  books = Library(run, tmp_path / "cache")
  steps = Steps(run)
  opened = [open_teacher(run, teacher) for teacher in run.distillation.teachers]
  weights = sum(x.nbytes for x in jax.tree.leaves(write_run(tmp_path / "size", TEACHER).params))
  programs, before = teachers_lib._hidden._cache_size(), sum(x.nbytes for x in jax.live_arrays())
  held = lambda: sum(x.nbytes for x in jax.live_arrays()) - before
  most = []
  found = [books.hidden(t, 0, PASSES[:1], steps.put_rows, lambda: most.append(held())) for t in opened]
  assert teachers_lib._hidden._cache_size() <= programs + 1
  assert weights <= max(most) < 1.5 * weights and held() < weights / 10
  assert len({x.tobytes() for x in found}) == 11
  resident, heads = Resident(books, steps.put_head), []
  for teacher in [*opened, opened[-1]]:
    heads.append(resident.head(teacher))
    np.testing.assert_array_equal(np.asarray(heads[-1]), books.head(teacher))
    assert held() <= 1.01 * heads[-1].nbytes
  assert resident.loads == 11 and all(x.is_deleted() for x in heads[:-2]) and heads[-1] is heads[-2]
  _add_up(run, steps, resident, opened, found)


def _add_up(run, steps, resident, opened, hidden):
  """A step with a pass of each teacher: one program, and loss and gradients are the sums of what each pass gives alone."""
  state = jax.tree.map(lambda x: jnp.array(x, copy=True), random_state(run))
  rows = steps.put_rows(PASSES[0])
  counts = {name: 11 * x for name, x in jax.device_get(steps.count(rows)).items()}
  part = lambda t: Pass(rows, steps.put_hidden(hidden[t][0]), resident.head(opened[t]), np.float32(t + 1),
                        TEACHER.vocab_size)
  sums, alone, kl = steps.start(), [], []
  for t in range(11):
    alone.append(jax.device_get(steps.add(state, steps.start(), part(t), counts)[0]))
    sums, found = steps.add(state, sums, part(t), counts)
    kl.append(float(found))
  assert steps._add.jitted._cache_size() <= 2  # one for sums that nobody has placed, one for those of a pass
  assert len(set(kl)) == 11 and min(kl) > 0
  assert sums.values["distillation"] == pytest.approx(
    sum((t + 1) * x for t, x in enumerate(kl)) / counts["distillation"], rel=1e-5)
  for x, *parts in zip(*(jax.tree.leaves(one.grads) for one in (sums, *alone)), strict=True):
    want = np.sum(parts, 0, np.float64)
    np.testing.assert_allclose(x, want, atol=5e-6 * max(1, np.abs(want).max()))  # float32 sums of eleven
  assert resident.loads == 22


@pytest.mark.long
def test_on_a_mesh_the_same_numbers(folder, tmp_path):
  run, books, (teacher, _) = library(folder, tmp_path)
  mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
  with jax.set_mesh(mesh):
    spread = Library(run, tmp_path / "other", mesh).hidden(open_teacher(run, teacher.config, mesh), 0, PASSES,
                                                           Steps(run, mesh).put_rows)
  alone, counts = books.hidden(teacher, 0, PASSES, jax.device_put), np.stack([x["segment_ids"] for x in PASSES]) > 0
  np.testing.assert_allclose(spread[counts], alone[counts], atol=2e-5)


def test_teachers_that_cannot_be_asked(folder, tmp_path):
  root, _ = folder
  run = run_config([("gone", tmp_path / "nothing", root, 1.0)])
  with pytest.raises(FileNotFoundError, match="gone: checkpoint = .*: expected the folder of a run or of a conv"):
    open_teacher(run, run.distillation.teachers[0])
  short = dataclasses.replace(TEACHER, max_position_embeddings=32)
  write_run(tmp_path / "short", short)
  run = run_config([("short", tmp_path / "short", root, 1.0)])
  with pytest.raises(ValueError, match="short: max_position_embeddings = 32: expected at least data.sequence_length = 48"):
    open_teacher(run, run.distillation.teachers[0])
