"""How long the first results of a fresh process take, and that a process that fails is told from one that is slow."""

import pytest

from launch.benchmarks import start


def test_the_import_is_timed_and_judged():
  lines = []
  rows = start.measure(lines.append, repeats=2, names=("import",))
  assert len(lines) == 1 and lines[0].startswith("import ")
  assert 0.1 < rows[0]["seconds"] <= rows[0]["slowest"]  # Python alone takes a tenth
  found, = start.targets(rows)
  assert found["value"] == rows[0]["seconds"] and found["reached"] == (found["value"] <= 3)


def test_a_process_that_fails_says_why():
  with pytest.raises(ValueError, match="start nothing: the process ended with code 1: KeyError: 'nothing'"):
    start.seconds_of("nothing")


MOST = {"import": 3.0, "forward": 40.0, "train": 200.0}  # seconds


@pytest.mark.long
def test_first_results_come_in_time():
  """The import within its target; the two that miss theirs, as the README says, within twice what it says of its slower
  machine, since another test runs beside this one."""
  for row in start.measure(print, repeats=2):
    assert row["seconds"] < MOST[row["case"]], row
