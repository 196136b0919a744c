"""The data pipeline: nothing lost or repeated, documents apart, exact positions, splits, and every refusal."""

import collections
import dataclasses
import itertools
import json
import math
import os

import numpy as np
import pytest

from deepseek_v4.config import DataConfig
from deepseek_v4.text import tokenize
from deepseek_v4.training import baselines, data, packing, sources

VOCAB = 320
BYTES = tokenize.load_tokenizer(None, VOCAB)
NAMES = ("tokens", "segment_ids", "positions", "loss_mask")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """60 texts of 0 to 250 bytes that name themselves, in two levels of folders, beside files that are none."""
  root = tmp_path_factory.mktemp("texts")
  rng = np.random.default_rng(0)
  for i in range(60):
    file = root / ("sub" if i % 3 == 0 else ".") / f"{i:02d}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"" if i == 7 else b"<%d>" % i + bytes(rng.integers(97, 123, rng.integers(0, 240), np.uint8)))
  (root / "binary").write_bytes(b"\xff\xfe\x00")
  (root / ".hidden").write_text("not read")
  return root


def text_config(folder, **changes):
  return dataclasses.replace(DataConfig(source="text", path=str(folder), sequence_length=64, batch_size=6, accumulation=2,
                                        held_out_percent=20, seed=3), **changes)


def epoch(config, split="train", **options):
  """The batches of one epoch; the training split's last one is cut at the epoch's end, as rows [rows, S] by name."""
  batches = data.make_dataset(config, VOCAB, split=split, **options)
  taken = list(itertools.islice(batches, -(-batches.rows // batches.batch_size)))
  rows = {name: np.concatenate([b[name].reshape(-1, config.sequence_length) for b in taken]) for name in NAMES}
  return batches, {name: x[:batches.rows] for name, x in rows.items()}


def segments(rows):
  """The pieces of all rows, as tuples of ids."""
  return [tuple(tokens[ids == s]) for tokens, ids in zip(rows["tokens"], rows["segment_ids"], strict=True)
          for s in range(1, ids.max() + 1)]


def pieces(documents, length):
  """What the pieces should be: each document with its end, cut every `length` ids."""
  return [tuple(d[i:i + length]) for d in documents for i in range(0, len(d), length)]


def all_texts(folder):
  return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.txt") if p.stat().st_size}


def in_order(batches):
  return [np.stack([b[name] for name in NAMES]) for b in batches]


# ---- rows ---------------------------------------------------------------------------------------------------------------
def test_every_token_once_and_documents_apart(folder):
  config = text_config(folder)
  batches, rows = epoch(config)
  texts = sources.read_texts(config, "train").texts
  documents = [BYTES.encode(t) + [BYTES.document_end] for t in texts]
  assert collections.Counter(segments(rows)) == collections.Counter(pieces(documents, 64))
  assert batches.tokens == sum(map(len, documents)) == (rows["segment_ids"] > 0).sum()
  assert batches.documents == len(texts) and batches.text_bytes == sum(map(len, texts))
  assert batches.targets == rows["loss_mask"].sum()
  assert batches.fill == batches.tokens / rows["tokens"].size > 0.95
  assert batches.tokens_per_byte == batches.tokens / batches.text_bytes


def test_row_arrays(folder):
  config = text_config(folder)
  batch = next(iter(data.make_dataset(config, VOCAB)))
  assert list(batch) == list(NAMES)
  assert all(x.shape == (2, 3, 64) and x.dtype == np.int32 for x in batch.values())
  _, rows = epoch(config)
  ids, positions = rows["segment_ids"], rows["positions"]
  assert (ids[:, 0] == 1).all()
  step = np.diff(ids, axis=1)
  # Segments ascend by one; after the last one there is nothing but padding.
  assert ((step == 0) | (step == 1) | (ids[:, 1:] == 0)).all() and (ids[:, 1:][ids[:, :-1] == 0] == 0).all()
  first = np.pad(step != 0, ((0, 0), (1, 0)), constant_values=True)
  assert (positions[first] == 0).all() and (np.diff(positions, axis=1)[~first[:, 1:] & (ids[:, 1:] > 0)] == 1).all()
  # A target is a token whose predecessor is in the same segment.
  assert (rows["loss_mask"] == ((ids > 0) & ~first)).all()
  assert all((rows[name][ids == 0] == 0).all() for name in NAMES)


@pytest.mark.parametrize("length", [2, 7, 64, 10_000])
def test_packing_of_any_length(length):
  lengths = np.random.default_rng(length).integers(0, 300, 80)
  packed = packing.pack(lengths, length)
  seen = collections.Counter()
  for row in range(packed.rows):
    part = slice(packed.offset[row], packed.offset[row + 1])
    assert 0 < packed.length[part].sum() <= length
    for document, start, n in zip(packed.document[part], packed.start[part], packed.length[part], strict=True):
      seen.update((document, start + i) for i in range(n))
  assert seen == collections.Counter((d, i) for d, n in enumerate(lengths) for i in range(n))
  # No document is cut that fits a row, and no two rows would fit into one.
  assert np.bincount(packed.document, minlength=80)[(lengths > 0) & (lengths <= length)].max(initial=1) == 1
  used = np.sort(np.add.reduceat(packed.length, packed.offset[:-1]))
  assert len(used) < 2 or used[0] + used[1] > length


def test_epochs_are_permutations_that_differ(folder):
  config = text_config(folder, batch_size=1, accumulation=1)
  batches = data.make_dataset(config, VOCAB)
  keys = [b["tokens"].tobytes() for b in itertools.islice(batches, 3 * batches.rows)]
  epochs = [keys[i:i + batches.rows] for i in range(0, len(keys), batches.rows)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
  assert epochs[0] != epochs[1] != epochs[2]
  other = data.make_dataset(dataclasses.replace(config, seed=4), VOCAB)
  other_keys = [b["tokens"].tobytes() for b in itertools.islice(other, batches.rows)]
  assert sorted(other_keys) == sorted(epochs[0]) and other_keys not in epochs


# ---- position -----------------------------------------------------------------------------------------------------------
def test_resume_is_exact_everywhere(folder):
  batches = data.make_dataset(text_config(folder), VOCAB)
  n = 3 * batches.rows // batches.batch_size  # past two borders of epochs, which fall inside batches
  assert batches.rows % batches.batch_size
  iterator, states, run = iter(batches), [], []
  for _ in range(n + 3):
    states.append(json.dumps(iterator.get_state()))
    run += in_order([next(iterator)])
  for at in range(n):
    resumed = iter(data.make_dataset(text_config(folder), VOCAB))
    if at % 2:
      next(resumed)  # an iterator that has already moved goes there as well
    resumed.set_state(json.loads(states[at]))
    assert json.dumps(resumed.get_state()) == states[at]
    np.testing.assert_array_equal(in_order(itertools.islice(resumed, 3)), run[at:at + 3])
  assert len(states[-1]) < 200


def test_processes_share_the_batch(folder):
  config = text_config(folder, batch_size=12)
  whole = iter(data.make_dataset(config, VOCAB))
  for count in (2, 3):
    rows = [range(6)[i::count] for i in range(count)]  # neighbours go to different ones
    parts = [iter(data.make_dataset(config, VOCAB, rows=mine)) for mine in rows]
    state = whole.get_state()
    for part in parts:
      part.set_state(state)  # a position saved by another number of processes
    for _ in range(4):
      expected = next(whole)
      got = [next(part) for part in parts]
      assert got[0]["tokens"].shape == (2, 6 // count, 64)
      for name in NAMES:
        for mine, part in zip(rows, got, strict=True):
          np.testing.assert_array_equal(part[name], expected[name][:, mine])
    assert all(part.get_state() == whole.get_state() for part in parts)


def test_position_survives_another_batch_size(folder):
  """No row twice and none left out when a run goes on with other batches: 2 of 6 rows, then 4 of 3."""
  iterator = iter(data.make_dataset(text_config(folder), VOCAB))
  taken = [next(iterator) for _ in range(2)]
  smaller = iter(data.make_dataset(text_config(folder, batch_size=3, accumulation=1), VOCAB))
  smaller.set_state(iterator.get_state())
  np.testing.assert_array_equal(np.concatenate([next(smaller)["tokens"] for _ in range(4)], axis=1).reshape(-1, 64),
                                np.concatenate([next(iterator)["tokens"] for _ in range(2)]).reshape(-1, 64))
  assert smaller.get_state() == iterator.get_state() and len(taken) == 2


def test_position_of_other_data_is_refused(folder, tmp_path):
  state = iter(data.make_dataset(text_config(folder), VOCAB)).get_state()
  for field, value in (("seed", 9), ("sequence_length", 32), ("fim_rate", 0.5)):
    iterator = iter(data.make_dataset(text_config(folder, **{field: value}), VOCAB))
    with pytest.raises(ValueError, match=f"data position: {field} = .*expected {value}"):
      iterator.set_state(state)
  with pytest.raises(ValueError, match="data position: documents = .* data.held_out_percent have changed"):
    iter(data.make_dataset(text_config(folder, held_out_percent=10), VOCAB)).set_state(state)
  with pytest.raises(ValueError, match="data position: split = 'train'; expected 'held_out'"):
    iter(data.make_dataset(text_config(folder), VOCAB, split="held_out")).set_state(state)
  for wrong in (None, {}, {"row": -1}, {**state, "row": "4"}, {**state, "row": True}):
    with pytest.raises(ValueError, match="data position = .*: expected a dictionary with 'row'"):
      iter(data.make_dataset(text_config(folder), VOCAB)).set_state(wrong)


# ---- splits and sources -------------------------------------------------------------------------------------------------
def test_splits_are_disjoint_and_cover_all(folder):
  config = text_config(folder)
  train, held_out = (sources.read_texts(config, split) for split in sources.SPLITS)
  assert not set(train.names) & set(held_out.names) and len(held_out.names) > 3
  assert dict(zip(train.names + held_out.names, train.texts + held_out.texts)) == all_texts(folder)
  assert train.names == sorted(train.names)
  # A higher share only adds to the held-out names.
  assert set(held_out.names) < set(sources.read_texts(text_config(folder, held_out_percent=60), "held_out").names)


def test_held_out_is_one_pass_in_a_fixed_order(folder):
  config = text_config(folder, fim_rate=1.0)
  batches, rows = epoch(config, "held_out")
  documents = [BYTES.encode(t) + [1] for t in sources.read_texts(config, "held_out").texts]  # not rearranged
  assert collections.Counter(segments(rows)) == collections.Counter(pieces(documents, 64))
  found = list(batches)
  assert len(found) == math.ceil(batches.rows / 6) and batches.rows % 6
  last = found[-1]["segment_ids"].reshape(6, 64)
  assert (last[batches.rows % 6:] == 0).all() and (last[:batches.rows % 6, 0] == 1).all()
  again = list(data.make_dataset(text_config(folder, seed=11), VOCAB, split="held_out"))
  np.testing.assert_array_equal(in_order(found), in_order(again))
  config = text_config(folder, batch_size=12)
  parts = [list(data.make_dataset(config, VOCAB, split="held_out", rows=rows)) for rows in ((0, 1, 2), (3, 4, 5))]
  assert len(parts[0]) == len(parts[1]) == math.ceil(batches.rows / 12)  # also where one process has no row left


def test_file_glob_and_folder_name_documents_alike(folder):
  by_folder = text_config(folder)
  by_glob = text_config(folder / "**" / "*.txt")
  for split in sources.SPLITS:
    one, other = (sources.read_texts(config, split) for config in (by_folder, by_glob))
    assert (one.names, one.texts) == (other.names, other.texts)
  single = text_config(folder / "01.txt", held_out_percent=0)
  assert sources.read_texts(single, "train").names == ["01.txt"]


def test_json_lines(tmp_path):
  lines = [f"text {i} é☃" for i in range(40)]
  (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": t, "id": 1}) for t in lines[:25]) + "\n\n", "utf-8")
  (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": t}, ensure_ascii=False) for t in lines[25:]), "utf-8")
  (tmp_path / "notes.txt").write_text("not read")
  config = DataConfig(source="jsonl", path=str(tmp_path), text_field="body", sequence_length=16, batch_size=2,
                      held_out_percent=30)
  train, held_out = (sources.read_texts(config, split) for split in sources.SPLITS)
  assert sorted(train.texts + held_out.texts) == sorted(t.encode() for t in lines) and train.texts and held_out.texts
  assert set(train.names + held_out.names) == {f"a.jsonl#{i}" for i in range(1, 26)} | {f"b.jsonl#{i}" for i in range(1, 16)}
  _, rows = epoch(config)
  assert collections.Counter(segments(rows)) == collections.Counter(pieces([BYTES.encode(t) + [1] for t in train.texts], 16))


def record_config(path, **changes):
  return dataclasses.replace(DataConfig(source="array_record", path=str(path), sequence_length=16, batch_size=2,
                                        held_out_percent=25), **changes)


@pytest.fixture
def records(tmp_path):
  """Two files of 30 documents, with and without the index that makes starts fast."""
  rng = np.random.default_rng(1)
  documents = [rng.integers(0, 300, n).tolist() for n in rng.integers(0, 40, 60)]
  sources.write_array_record(tmp_path / "a.array_record", documents[:30])
  sources.write_array_record(tmp_path / "b.array_record-00000-of-00001", (np.array(d, np.int16) for d in documents[30:]))
  os.remove(tmp_path / "b.array_record-00000-of-00001.index.npz")
  return tmp_path, documents


def test_array_record(records):
  path, documents = records
  batches, rows = epoch(record_config(path))
  _, held_out = epoch(record_config(path), "held_out")
  expected = pieces([d + [1] for d in documents if d], 16)
  train = segments(rows)
  assert collections.Counter(train + segments(held_out)) == collections.Counter(expected) and len(train) < len(expected)
  assert batches.text_bytes is None and batches.tokens_per_byte is None
  # Reading ahead with threads does not blur the position.
  iterator = iter(batches)
  run = []
  for _ in range(2 * batches.rows // 2 + 3):
    run.append((iterator.get_state(), next(iterator)))
  for at in (1, 7, len(run) - 2):
    resumed = iter(data.make_dataset(record_config(path), VOCAB))
    resumed.set_state(run[at][0])
    np.testing.assert_array_equal(in_order([next(resumed), next(resumed)]), in_order([run[at][1], run[at + 1][1]]))
    resumed.close()
  iterator.close()


def test_array_record_rearranged(tmp_path):
  """With a tokenizer that knows the tokens; documents that do not fit a row with them stay as they are."""
  import tokenizers
  words = {f"w{i}": i for i in range(VOCAB)} | {"</s>": 1}
  names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
  words = {word: i for word, i in words.items() if i not in (1, *BYTES.fim)} | {"</s>": 1} | dict(zip(names, BYTES.fim))
  tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
  documents = [list(range(i, 2 * i)) for i in range(1, 40)]
  sources.write_array_record(tmp_path / "x.array_record", documents)
  config = record_config(tmp_path, fim_rate=1.0, sequence_length=32, held_out_percent=0,
                         tokenizer=str(tmp_path / "tokenizer.json"))
  found = segments(epoch(config)[1])
  rearranged = [s for s in found if s[0] == BYTES.fim[0]]
  assert sorted(_restored(s) for s in rearranged) == sorted(tuple(d) for d in documents if len(d) <= 28)
  assert sum(len(s) for s in found) == sum(len(d) + (4 if len(d) <= 28 else 1) for d in documents)
  with pytest.raises(ValueError, match=r"data.fim_rate = 1.0: expected 0, .* ids: a data.tokenizer that has them"):
    data.make_dataset(dataclasses.replace(config, tokenizer=None), VOCAB)


def test_ids_end_with_the_models_own_end(tmp_path):
  sources.write_array_record(tmp_path / "x.array_record", [[5, 6], [7, 8, 9]])
  config = record_config(tmp_path, sequence_length=8, batch_size=1, accumulation=1, held_out_percent=0)
  rows = next(iter(data.make_dataset(config, 100, document_end=42)))["tokens"][0, 0]  # no byte would fit 100 ids
  assert sorted(rows.tolist()) == [0, 5, 6, 7, 8, 9, 42, 42]
  for wrong in (None, 100):
    with pytest.raises(ValueError, match=f"model.eos_token_id = {wrong}: expected an id below model.vocab_size = 100"):
      data.make_dataset(config, 100, document_end=wrong)


def test_array_record_changed_under_its_index(records):
  """Same size, other ids: named when the record is read, before an id outside the vocabulary reaches the model."""
  path, documents = records
  file = path / "a.array_record"
  index = sources._index(file)
  with open(index, "wb") as out:
    np.savez(out, lengths=np.array([len(d) for d in documents[:30]], np.int64), largest=3, size=file.stat().st_size)
  (found,) = [f for f in sources.open_records(record_config(path), VOCAB) if f.name == file.name]
  record = next(i for i, d in enumerate(documents[:30]) if d and max(d) > 3)
  with pytest.raises(ValueError, match=rf"a.array_record, record {record}: expected ids from 0 to 3, found .* has changed"):
    found.read(record)


def test_array_record_index_of_another_file_is_not_used(records):
  path, documents = records
  file = path / "a.array_record"
  other = path / "c.array_record"
  sources.write_array_record(other, documents[:10])
  os.replace(sources._index(other), sources._index(file))
  (found,) = [f for f in sources.open_records(record_config(path), VOCAB) if f.name == file.name]
  assert found.lengths.tolist() == [len(d) for d in documents[:30]] and found.largest == max(sum(documents[:30], []))


def test_tokenizer_file(folder, tmp_path):
  """Words as tokens: the pipeline takes ids as they come and closes documents with the tokenizer's own end."""
  import tokenizers
  words = {"</s>": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "texts").mkdir()
  (tmp_path / "texts" / "one").write_text("a b c what a")
  (tmp_path / "texts" / "two").write_text("c c")
  config = text_config(tmp_path / "texts", tokenizer=str(tmp_path / "tokenizer.json"), sequence_length=8, batch_size=1,
                       accumulation=1, held_out_percent=0)
  batches = data.make_dataset(config, 1 << 17)
  assert batches.tokenizer.name.endswith("tokenizer.json")
  assert sorted(segments(epoch(config)[1])) == [(2, 3, 4, 1, 2, 0), (4, 4, 0)]
  with pytest.raises(ValueError, match="data.fim_rate = 0.5: expected 0, since no fill-in-the-middle tokens are known"):
    data.make_dataset(dataclasses.replace(config, fim_rate=0.5), 1 << 17)


# ---- fill in the middle -------------------------------------------------------------------------------------------------
def _restored(ids):
  """prefix middle suffix of a closed document, from begin prefix hole suffix end middle document-end."""
  ids = list(ids)
  begin, hole, end = BYTES.fim
  assert ids[0] == begin and ids[-1] == 1
  at_hole, at_end = ids.index(hole), ids.index(end)
  return tuple(ids[1:at_hole] + ids[at_end + 1:-1] + ids[at_hole + 1:at_end])


def test_fill_in_the_middle_gives_the_documents_back(folder):
  config = text_config(folder, fim_rate=0.5, sequence_length=512)  # longer than any text
  _, rows = epoch(config)
  found = segments(rows)
  rearranged = [s for s in found if s[0] == BYTES.fim[0]]
  texts = sources.read_texts(config, "train").texts
  assert sorted([_restored(s) for s in rearranged] + [s[:-1] for s in found if s[0] != BYTES.fim[0]]) == sorted(
    tuple(BYTES.encode(t)) for t in texts)
  assert 0.25 * len(texts) < len(rearranged) < 0.75 * len(texts)
  # Cuts at all sorts of places, the same ones in every run, others with another seed.
  assert len({s.index(BYTES.fim[1]) for s in rearranged}) > 5
  assert sorted(segments(epoch(config)[1])) == sorted(found)
  assert sorted(segments(epoch(dataclasses.replace(config, seed=8))[1])) != sorted(found)


def test_fill_in_the_middle_order_and_share():
  ids = np.arange(10, 20)
  once = packing.fill_in_the_middle(ids, (1, 2, 3), "name", 0)
  hole, end = (once.tolist().index(i) for i in (2, 3))
  prefix, suffix, middle = once[1:hole], once[hole + 1:end], once[end + 1:]
  assert once[0] == 1 and np.concatenate([prefix, middle, suffix]).tolist() == ids.tolist()
  assert sum(packing.fim_chosen(f"n{i}", 0.3, 0) for i in range(2000)) == pytest.approx(600, abs=80)
  assert all(packing.fim_chosen(f"n{i}", 1.0, 0) for i in range(50))


# ---- what is refused ----------------------------------------------------------------------------------------------------
def test_wrong_arguments(folder):
  with pytest.raises(ValueError, match="split = 'test': expected one of 'train', 'held_out'"):
    data.make_dataset(text_config(folder), VOCAB, split="test")
  for rows in ((), (0, 0), (-1,), (0, 3)):
    with pytest.raises(ValueError, match=r"rows = .*: expected different ones, from 0 to .* - 1 = 2"):
      data.make_dataset(text_config(folder), VOCAB, rows=rows)
  with pytest.raises(ValueError, match="model.vocab_size = 200: expected at least 259"):
    data.make_dataset(text_config(folder), 200)
  with pytest.raises(ValueError, match=r"data.fim_rate = 0.1: expected 0, .* model.vocab_size of 262 or more"):
    data.make_dataset(text_config(folder, fim_rate=0.1), 260)


def test_no_data(folder, tmp_path):
  for source, files in (("text", "files"), ("jsonl", ".jsonl or .ndjson files"), ("array_record", ".array_record files")):
    with pytest.raises(ValueError, match=f"data.path = '.*': expected a file, a glob or a folder with {files}; found none"):
      data.make_dataset(text_config(tmp_path, source=source), VOCAB)
  with pytest.raises(ValueError, match="nowhere.*expected a file, a glob or a folder"):
    data.make_dataset(text_config(tmp_path / "nowhere"), VOCAB)
  for name in "abc":
    (tmp_path / name).write_bytes(b"")
  (tmp_path / "binary").write_bytes(b"\x80\x81" * 1000)
  with pytest.raises(ValueError, match="data.path = .*: expected training text, found no document that is not empty"):
    data.make_dataset(text_config(tmp_path), VOCAB)
  with pytest.raises(ValueError, match="data.held_out_percent = 0: expected at least 1, since a run is scored on"):
    data.make_dataset(text_config(folder, held_out_percent=0), VOCAB, split="held_out")
  (tmp_path / "two").mkdir()
  for name in ("a", "b"):
    (tmp_path / "two" / name).write_text("text " * 99)
  with pytest.raises(ValueError, match="data.held_out_percent = 1: expected a percentage that holds out at least"):
    data.make_dataset(text_config(tmp_path / "two", held_out_percent=1), VOCAB, split="held_out")
  for split, percent in (("held_out", 1), ("train", 99)):
    with pytest.raises(ValueError, match="expected two files or more, since a file is training or held-out text as a whole"):
      data.make_dataset(text_config(tmp_path / "two" / "a", held_out_percent=percent), VOCAB, split=split)
  with pytest.raises(ValueError, match="expected at least one byte"):
    baselines.measure(text_config(folder, held_out_percent=0))


def test_too_few_tokens(folder):
  rows = data.make_dataset(text_config(folder), VOCAB).rows
  data.make_dataset(text_config(folder, batch_size=rows, accumulation=1), VOCAB)
  with pytest.raises(ValueError, match=f"data.batch_size = {rows + 1}: expected at most {rows}, the rows that the .* tokens "
                                       "of data.path = .* fill with data.sequence_length = 64"):
    data.make_dataset(text_config(folder, batch_size=rows + 1, accumulation=1), VOCAB)


def test_unreadable_file(tmp_path):
  (tmp_path / "good.txt").write_text("text")
  (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="data.path: cannot read .*gone.txt: No such file"):
    data.make_dataset(text_config(tmp_path, held_out_percent=0), VOCAB)


@pytest.mark.parametrize("line, what", [
  ('{"text": "a"', "JSONDecodeError"), ('["a"]', "TypeError"), ('{"body": "a"}', "KeyError: 'text'"),
  ('{"text": 3}', "AttributeError"), (b'{"text": "\xff"}', "UnicodeDecodeError"),
  ('{"text": "\\ud800"}', "UnicodeEncodeError"),
])
def test_bad_json_line(tmp_path, line, what):
  good = b'{"text": "fine"}\n\n'
  (tmp_path / "x.jsonl").write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
  with pytest.raises(ValueError, match=f"data.path: .*x.jsonl, line 3: .*data.text_field = 'text'; {what}"):
    data.make_dataset(text_config(tmp_path, source="jsonl"), VOCAB)


def test_bad_records(records):
  from array_record.python import array_record_module
  path, _ = records
  file = path / "a.array_record"
  for pattern in ("a.*", "b.*"):  # with an index and without
    with pytest.raises(ValueError, match=rf"{pattern}, record \d+: token id 29\d; expected ids below .* = 290"):
      data.make_dataset(record_config(path / pattern), 290)
  with pytest.raises(ValueError, match=r"documents\[1\]: expected a list of token ids"):
    sources.write_array_record(path / "n.array_record", [[1], [-1]])
  whole = file.read_bytes()
  for name, content in (("cut", whole[:len(whole) // 2]), ("text", b"hello " * 100), ("empty", b"")):
    bad = path / f"{name}.array_record"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.array_record: expected an ArrayRecord file"):
      data.make_dataset(record_config(bad), VOCAB)
  flipped = bytearray(whole)
  flipped[100:140] = b"x" * 40
  (path / "flipped.array_record").write_bytes(bytes(flipped))
  with pytest.raises(ValueError, match="flipped.array_record, record 0 or after it: damaged; "):
    data.make_dataset(record_config(path / "flipped.array_record"), VOCAB)
  for name, record, message in (("odd", b"12345", "record 1: expected int32 ids, found 5 bytes"),
                                ("minus", np.array([-4], "<i4").tobytes(), "record 1: token id -4; expected ids from 0")):
    writer = array_record_module.ArrayRecordWriter(str(path / f"{name}.array_record"), "group_size:1")
    writer.write(np.zeros(3, "<i4").tobytes())
    writer.write(record)
    writer.close()
    with pytest.raises(ValueError, match=f"{name}.array_record, {message}"):
      data.make_dataset(record_config(path / f"{name}.array_record"), VOCAB)
  with pytest.raises(ValueError, match="data.source = 'array_record': expected a source of text"):
    sources.read_texts(record_config(path), "held_out")


# ---- the default corpus -------------------------------------------------------------------------------------------------
def test_standard_library():
  config = DataConfig()
  batches = data.make_dataset(config, VOCAB)
  held_out = data.make_dataset(config, VOCAB, split="held_out")
  assert batches.fill > 0.99 and held_out.fill > 0.98
  assert batches.text_bytes > 5e6 and 0.01 < held_out.text_bytes / batches.text_bytes < 0.2
  names = sources.find_files(config)[1]
  assert "json/decoder.py" in names and names == sorted(names)
  assert not [n for n in names if "site-packages" in n or "__pycache__" in n or not n.endswith(".py")]
  text = BYTES.decode(next(iter(batches))["tokens"][0, 0])
  assert text.isprintable() or "\n" in text
  found = baselines.measure(config)
  assert 3 < found["bigram"] < 4.5 and 1 < found["zlib"] < found["zlib_by_file"] < 3
