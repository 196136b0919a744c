"""The journal of samples: what it keeps, and what it makes of damage."""

import warnings

import pytest

from deepseek_v4.generation.decode import Drawn
from deepseek_v4.posttraining.journal import Journal, file_of, forget

ASKED = {"prompts": 7, "temperature": 0.1}
FIRST = [Drawn(0, (5, 6), (-0.1, -0.2)), Drawn(2, (7,), (-1 / 3,))]
SECOND = [Drawn(0, (8,), (-0.5,)), Drawn(1, (9, 9, 9), (-1.0, -2.0, -3.0))]


@pytest.fixture
def written(tmp_path):
  with Journal(tmp_path, 3, ASKED, 3) as journal:
    journal.add(FIRST)
    journal.add(SECOND)
    assert journal.count == 7
  return tmp_path


def read(folder, asked=ASKED, requests=3):
  with Journal(folder, 3, asked, requests) as journal:
    return journal.tokens, journal.logprobs


def test_what_must_be_whole_stays_as_it_is(written):
  """A round that is half learnt from: whoever asks otherwise, or finds it cut short, is told and loses nothing."""
  (file,) = written.iterdir()
  sound = file.read_bytes()
  with pytest.warns(UserWarning, match="other prompts"), pytest.raises(FileNotFoundError, match="the settings that it had"):
    Journal(written, 3, {"other": "settings"}, 3, whole=True)
  assert file.read_bytes() == sound
  file.write_bytes(sound[:-4])
  with pytest.warns(UserWarning, match="damaged"), pytest.raises(FileNotFoundError, match="as the run left them"):
    Journal(written, 3, ASKED, 3, whole=True)
  assert file.read_bytes() == sound[:-4]
  file.write_bytes(sound)
  with Journal(written, 3, ASKED, 3, whole=True) as journal:
    assert journal.count == 7


def test_what_was_added_is_there_again(written):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert read(written) == ([[5, 6, 8], [9, 9, 9], [7]], [[-0.1, -0.2, -0.5], [-1.0, -2.0, -3.0], [-1 / 3]])
    with Journal(written, 3, ASKED, 3) as journal:
      journal.add([Drawn(2, (1, 2), (-0.1, -0.1))])
    assert read(written)[0] == [[5, 6, 8], [9, 9, 9], [7, 1, 2]]


def test_it_is_on_disk_before_the_file_is_closed(tmp_path):
  with Journal(tmp_path, 0, ASKED, 3) as journal:
    journal.add(FIRST)
    assert len(file_of(tmp_path, 0).read_bytes().splitlines()) == 2


@pytest.mark.parametrize("damage, line, left", [
  (lambda text: text[:-1], 3, [[5, 6], [], [7]]),  # the last line was cut off
  (lambda text: text[:-40], 3, [[5, 6], [], [7]]),
  (lambda text: text + b"0000", 4, [[5, 6, 8], [9, 9, 9], [7]]),  # a line that had just begun
  (lambda text: text + b"\x00" * 100, 4, [[5, 6, 8], [9, 9, 9], [7]]),  # as file systems leave it after a power cut
  (lambda text: text.replace(b"[5,6]", b"[5,7]"), 2, [[], [], []]),  # other tokens: the checksum says so
  (lambda text: text[9:], 1, [[], [], []]),
], ids=["newline", "half a line", "begun", "zeros", "changed", "head"])
def test_a_damaged_tail_is_named_and_cut_off(written, damage, line, left):
  path = file_of(written, 3)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.warns(UserWarning, match=rf"000003\.jsonl, line {line}: damaged \(.*\); what stands there and behind it"):
    assert read(written)[0] == left
  # what is added then stands where the damage was
  with Journal(written, 3, ASKED, 3) as journal:
    journal.add([Drawn(2, (4,), (-1.0,))])
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert read(written)[0] == [left[0], left[1], left[2] + [4]]


def test_a_line_that_does_not_go_on_where_its_reply_ends_is_damage(written):
  path = file_of(written, 3)
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join([lines[0], lines[2]]))  # the line between is lost
  with pytest.warns(UserWarning, match="token 2 of request 0 behind 0 tokens"):
    assert read(written)[0] == [[], [], []]


@pytest.mark.parametrize("other", [dict(asked={"prompts": 8}), dict(requests=4)])
def test_another_round_begins_anew(written, other):
  with pytest.warns(UserWarning, match="come from other prompts, settings or weights; all are sampled again"):
    assert not any(read(written, **other)[0])
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert not any(read(written, **other)[0])


def test_old_rounds_are_forgotten(tmp_path):
  for number in (0, 1, 2, 10):
    Journal(tmp_path, number, ASKED, 1).__exit__()
  forget(tmp_path, 2)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["000002.jsonl", "000010.jsonl"]
  with pytest.raises(ValueError, match="requests = 0: expected at least 1"):
    Journal(tmp_path, 0, ASKED, 0)
