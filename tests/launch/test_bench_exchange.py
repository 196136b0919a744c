"""What `launch.bench exchange` compiles and how it is told; the compiler itself: tests/model/test_aot.py."""

from launch.benchmarks import exchange
from launch.benchmarks.exchange import Case


def test_rows_that_a_device_has_room_for():
  """Pro's 6 experts of a device: 16 waves of 256 tokens of 64 devices may all come; of 4,096 tokens sent 30,720 rows."""
  assert Case("gather", 4096, 64).rows == 16384 * 6 + 6 * 128
  assert Case("all_to_all", 4096, 64).rows == 24576 * 5 // 4 + 6 * 256
  assert Case("all_to_all", 16384, 64).rows == Case("all_to_all", 4096, 64).rows


def test_the_table_has_figures_or_the_compilers_words():
  moved = {"ragged-all-to-all": {"count": 4, "started": 0, "bytes": 3 * 2**29, "more": 2**29}, "all-gather": {
    "count": 1, "started": 0, "bytes": 2**10, "more": 0}}
  answers = {"ok": True, "memory": {"temp": 5 * 2**30}, "traffic": moved, "seconds": 1.0}, {"ok": False, "error": "no\nroom"}
  rows = [exchange.row_of(Case(form, 4096, 64), answer) for form, answer in zip(exchange.FORMS, answers)]
  _, first, second = (list(map(str.strip, line.split("  "))) for line in exchange.table(rows).splitlines())
  assert "5.00 GiB" in first and first[-1] == "ragged-all-to-all 1.50 GiB (+ 0.50), 0 of 4 beside other work"
  assert "no" in second and rows[1]["failed"] == "no\nroom"
