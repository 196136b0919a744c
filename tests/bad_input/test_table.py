"""How much the rooms of bad input hold, and that the count of compiled programs counts."""

import re

import jax
import numpy as np
import pytest

from tests.bad_input import (
  test_config_fields,
  test_damaged_checkpoints,
  test_dtypes,
  test_empty_data,
  test_files,
  test_flags,
  test_meshes,
  test_numbers,
  test_shapes,
  test_tokenizers,
)
from tests.bad_input.table import check, table
from tests.documents import ROOT

ROOMS = {
  "config fields": test_config_fields.WRONG, "flags": test_flags.WRONG, "files": test_files.WRONG,
  "shapes": test_shapes.WRONG, "dtypes": test_dtypes.WRONG, "token ids": test_numbers.TOKENS,
  "positions": test_numbers.POSITIONS, "segment ids": test_numbers.SEGMENTS, "meshes": test_meshes.WRONG,
  "damaged checkpoints": test_damaged_checkpoints.WRONG, "tokenizers": test_tokenizers.WRONG,
  "empty data": test_empty_data.WRONG}


def test_every_room_has_fifteen_fields_and_causes_and_all_together_many_more():
  kinds = {room: {one.kind for one in wrong} for room, wrong in ROOMS.items()}
  assert not {room: len(found) for room, found in kinds.items() if len(found) < 15}
  assert len(set.union(*kinds.values())) >= 300


def test_the_readme_says_how_many():
  """In words that stay true for a while: "more than 400"."""
  (number,) = re.findall(r"`pytest\s+tests/bad_input`\s+tries more than (\d+)", (ROOT / "README.md").read_text("utf-8"))
  assert int(number) < sum(map(len, ROOMS.values())) < int(number) + 50


def test_a_place_or_a_word_of_the_same_message_makes_no_new_kind():
  said = lambda *row: table((*row[:3], None, *row[3:]))[0].kind
  assert said("x[0, 4]", "1", "at least 2") == said("x[1, 5]", "7", "at least 2") == ("x", "at least 2")
  assert said("x", "-1", "0 to 7", "negative") == ("x", "negative")


def test_a_program_that_is_compiled_first_is_noticed(tmp_path, compiled):
  def late(_):
    jax.jit(lambda x: x * 3 + 1)(np.ones(7, np.float32))
    raise ValueError("x = 1: expected 2")
  with pytest.raises(AssertionError, match="programs were compiled before"):
    check(*table(("x", "1", "2", late)), tmp_path, compiled)


@pytest.mark.parametrize("said", ["x: expected 2", "x = 1: no", "y = 1: 2"])
def test_a_message_without_field_value_or_expectation_is_noticed(said, tmp_path, compiled):
  def refuse(_):
    raise ValueError(said)
  with pytest.raises(AssertionError, match="not in"):
    check(*table(("x", "1", "2", refuse)), tmp_path, compiled)
