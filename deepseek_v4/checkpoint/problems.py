"""Everything that is wrong with a checkpoint in one error, by kind."""

from __future__ import annotations

Problems = dict[str, list[str]]  # kind of problem -> names


def refuse(what: str, problems: Problems) -> None:
  """Raises one ValueError that lists every problem by kind, if there is any."""
  lines = [f"  {kind} ({len(names)}): {', '.join(names)}" for kind, names in problems.items() if names]
  if lines:
    raise ValueError("\n".join([what, *lines]))
