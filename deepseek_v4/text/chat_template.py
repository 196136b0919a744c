"""The wording of a release's chat format as data: effort prefixes, how tools and response formats are introduced.

It is read from the encoder file beside the weights (`ChatTemplate.from_checkpoint`); `DEFAULT` is short wording of our own.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any, Mapping

from deepseek_v4.config_checks import refuse

THINK, THINK_END = "<think>", "</think>"
DSML = "｜DSML｜"
NONE = "none"  # the effort without a thought
# Tokens of thought before the decoder closes it: the context windows in which the report evaluates the efforts.
THINKING_BUDGET = {"low": 131_072, "high": 131_072, "max": 393_216}

_CONSTANTS = {"dsml_token": DSML, "thinking_start_token": THINK, "thinking_end_token": THINK_END}
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w*)\}")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """The wording of a release.

  Attributes:
    effort_prefix: level of reasoning effort -> text before the first message. The level without a text is "high" if none is
      named.
    tools_template: introduces tools; {tool_schemas} is replaced, as are {dsml_token}, {thinking_start_token} and
      {thinking_end_token}. A doubled brace is a brace.
    format_template: introduces a response format; {schema} is replaced.
    thinking_budget: level -> most tokens of a thought; a level without an entry, as a later release may have, gets the
      largest of the entries.
    default_effort: level of requests that name none.
  """

  effort_prefix: Mapping[str, str]
  tools_template: str
  format_template: str
  thinking_budget: Mapping[str, int] = dataclasses.field(default_factory=lambda: THINKING_BUDGET)
  default_effort: str = "high"

  def __post_init__(self) -> None:
    for level, text in self.effort_prefix.items():
      if not isinstance(text, str) or (level == NONE and text):
        refuse(f"effort_prefix[{level!r}]", text, "a string, empty for 'none'")
    for level, tokens in self.thinking_budget.items():
      if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        refuse(f"thinking_budget[{level!r}]", tokens, "a number of tokens, at least 0")
    if self.default_effort not in self.efforts:
      refuse("default_effort", self.default_effort, f"one of {', '.join(self.efforts)}")
    for field, wanted in (("tools_template", "tool_schemas"), ("format_template", "schema")):
      _fill(field, getattr(self, field), dict.fromkeys((*_CONSTANTS, wanted), ""))
      if f"{{{wanted}}}" not in getattr(self, field):
        refuse(field, getattr(self, field), f"a text with {{{wanted}}}")

  @property
  def efforts(self) -> tuple[str, ...]:
    """Every level of reasoning effort that this template knows, "none" first."""
    plain = () if "" in self.effort_prefix.values() else ("high",)
    return tuple(dict.fromkeys((NONE, *plain, *self.effort_prefix)))

  def check_effort(self, reasoning_effort: str | None) -> str:
    """The level itself, for None the default one; or a ValueError that lists those there are.

    Raises:
      ValueError: there is no such level.
    """
    if reasoning_effort is None:
      return self.default_effort
    if reasoning_effort not in self.efforts:
      refuse("reasoning_effort", reasoning_effort, f"one of {', '.join(self.efforts)}")
    return reasoning_effort

  def budget(self, reasoning_effort: str | None) -> int | None:
    """Most tokens of a thought at this level: 0 without thinking, None (no limit) if no level has a budget."""
    effort = self.check_effort(reasoning_effort)
    return 0 if effort == NONE else self.thinking_budget.get(effort, max(self.thinking_budget.values(), default=None))

  def tools(self, tool_schemas: str) -> str:
    """The introduction of tools with these schemas."""
    return _fill("tools_template", self.tools_template, _CONSTANTS | {"tool_schemas": tool_schemas})

  def response_format(self, schema: str) -> str:
    """The introduction of a response format with this schema."""
    return _fill("format_template", self.format_template, _CONSTANTS | {"schema": schema})

  @staticmethod
  def from_checkpoint(folder: str | Path) -> "ChatTemplate":
    """The wording in a released folder's encoder file (`encoding/*.py`), read as literals: nothing in it is executed.

    Releases of two kinds are known: REASONING_EFFORT_MAX (levels high, without a prefix, and max), or a dictionary
    REASONING_EFFORT_PROMPTS of all levels with DEFAULT_REASONING_EFFORT.

    Raises:
      FileNotFoundError: no encoder file there.
      ValueError: none of the files has all the constants as plain literals; says which are missing.
    """
    files = sorted((Path(folder) / "encoding").glob("*.py"))
    if not files:
      raise FileNotFoundError(f"{Path(folder) / 'encoding'}: expected the release's encoder file (encoding_dsv4.py)")
    missing = {}
    for file in files:
      found = _literals(file)
      prompts = found.get("REASONING_EFFORT_PROMPTS")
      if prompts is None and "REASONING_EFFORT_MAX" in found:
        prompts = {"high": "", "max": found["REASONING_EFFORT_MAX"]}
      parts = {"REASONING_EFFORT_MAX or REASONING_EFFORT_PROMPTS": prompts, "TOOLS_TEMPLATE": found.get("TOOLS_TEMPLATE"),
               "response_format_template": found.get("response_format_template")}
      missing[file.name] = [name for name, value in parts.items() if value is None]
      if not missing[file.name]:
        if not isinstance(prompts, dict):
          refuse(f"{file}: REASONING_EFFORT_PROMPTS", prompts, "a dictionary of level -> text")
        default = found.get("DEFAULT_REASONING_EFFORT", "high")
        return ChatTemplate(prompts, found["TOOLS_TEMPLATE"], found["response_format_template"], default_effort=default)
    lines = "; ".join(f"{name} lacks {', '.join(lacks)}" for name, lacks in missing.items())
    raise ValueError(f"{Path(folder) / 'encoding'}: expected the wording as literals in one file, but {lines}")


def _literals(file: Path) -> dict[str, Any]:
  """Values of a Python file's top-level assignments that are literals."""
  found: dict[str, Any] = {}
  for node in ast.parse(file.read_text(encoding="utf-8"), str(file)).body:
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
      continue
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    if len(targets) == 1 and isinstance(targets[0], ast.Name):
      try:
        found[targets[0].id] = ast.literal_eval(node.value)
      except (ValueError, TypeError, SyntaxError):  # an expression: none of the constants that are looked for
        continue
  return found


def _fill(field: str, template: str, values: Mapping[str, str]) -> str:
  """`template` with its {names} replaced, in one pass, so that replaced text is never read again."""
  def replace(match: re.Match[str]) -> str:
    if match.group() in ("{{", "}}"):
      return match.group()[0]
    if match[1] not in values:
      refuse(field, match.group(), f"only the placeholders {', '.join(values)}")
    return values[match[1]]

  if not isinstance(template, str):
    refuse(field, template, "a string")
  return _PLACEHOLDER.sub(replace, template)


DEFAULT = ChatTemplate(
  effort_prefix={"high": "", "max": "Think as long as the task needs, and check every step before you answer.\n\n"},
  tools_template=(
    "You can call these functions, one JSON schema a line:\n{tool_schemas}\n\nA call is written\n"
    '<{dsml_token}tool_calls>\n<{dsml_token}invoke name="FUNCTION">\n'
    '<{dsml_token}parameter name="NAME" string="true|false">VALUE</{dsml_token}parameter>\n'
    "</{dsml_token}invoke>\n</{dsml_token}tool_calls>\n"
    'with string="true" for text as it is and string="false" for JSON.'),
  format_template="Answer with JSON of this schema:\n{schema}")
