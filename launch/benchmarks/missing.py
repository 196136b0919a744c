"""What a row says where it has no figures: {"failed": why}, or {"left_out": why}, which is nobody's failure."""

from __future__ import annotations

from typing import Any, Mapping

NO_TIME = "the time of this bench was over"


def of_answer(answer: Mapping[str, Any]) -> dict[str, str]:
  """The part of a row that a compiler's answer without figures makes."""
  return {"left_out": answer["left_out"]} if "left_out" in answer else {"failed": answer["error"]}


def measured(row: Mapping[str, Any]) -> bool:
  """Whether a row has figures."""
  return "failed" not in row and "left_out" not in row


def said(row: Mapping[str, Any]) -> str:
  """A line on why it has none."""
  return f"left out: {row['left_out']}" if "left_out" in row else row["failed"].split("\n")[0]
