"""Messages to the text that the model reads, and what it writes back to a message; no JAX here.

A message is a dictionary with `role` and `content`, as OpenAI's interface has them. A release's wording (the prefix of an
effort, how tools and a response format are introduced) is data of that release: see `chat_template.py`. Everything else,
byte for byte, is the encoding of the V4 releases.
"""

from __future__ import annotations

import json
import re
from typing import Any, Mapping, Sequence

from deepseek_v4.config_checks import refuse
from deepseek_v4.text.chat_template import DEFAULT, DSML, NONE, THINK, THINK_END, ChatTemplate

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
TASKS = {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}
ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")

_CALLS_START, _CALLS_END = f"\n\n<{DSML}tool_calls>\n", f"\n</{DSML}tool_calls>"
_INVOKE_END = f"\n</{DSML}invoke>"
_INVOKE = re.compile(rf'<{DSML}invoke name="([^"\n]+)">\n')
_PARAMETER = re.compile(rf'<{DSML}parameter name="([^\n]+?)" string="(true|false)">(.*?)</{DSML}parameter>', re.DOTALL)


# ---- messages -> text --------------------------------------------------------------------------------------------------
def encode(messages: Sequence[Mapping[str, Any]], *, reasoning_effort: str | None = "high", drop_thinking: bool = True,
           template: ChatTemplate | None = None) -> str:
  """The text of a conversation, up to where the model goes on.

  Args:
    messages: dictionaries with `role` and `content`. Beside these: system and developer may hold `tools` and
      `response_format`; assistant `reasoning_content`, `tool_calls` and `wo_eos` (true: the turn goes on); user and
      assistant `task`; tool `tool_call_id`.
    reasoning_effort: "none", one of the template's levels, or None for the template's default.
    drop_thinking: leave out the thoughts (and developer messages) before the last user message; has no effect if any
      message has tools.
    template: wording; None = `DEFAULT`.

  Raises:
    ValueError: an unknown role, level or task, content of a wrong type or malformed tool calls; names the message.
  """
  return "".join(text for text, _ in parts(messages, reasoning_effort=reasoning_effort, drop_thinking=drop_thinking,
                                           template=template))


def parts(messages: Sequence[Mapping[str, Any]], *, reasoning_effort: str | None = "high", drop_thinking: bool = True,
          template: ChatTemplate | None = None) -> list[tuple[str, bool]]:
  """The text of `encode` cut into (text, whether the assistant wrote it), arguments and errors as there.

  The assistant writes its thought and what closes it, its answer, its tool calls and the end of its turn; the tokens that
  hand the turn to it, the opening of the thought among them, it is given.

  Raises:
    ValueError: a message or a level that the format has no place for.
  """
  template = DEFAULT if template is None else template
  effort = template.check_effort(reasoning_effort)
  thinking = effort != NONE
  if not messages:
    refuse("messages", messages, "at least one message")
  for i, message in enumerate(messages):
    _check(f"messages[{i}]", message)
  turns = _ordered(_merged(messages))
  drop = drop_thinking and not any(turn.get("tools") for turn in turns)
  if thinking and drop:
    last = _last_user(turns)
    turns = [turn for i, turn in enumerate(turns) if i >= last or turn["role"] != "developer"]
  last = _last_user(turns)
  pieces = [(BOS + (template.effort_prefix.get(effort, "") if thinking else ""), False)]
  for i, turn in enumerate(turns):
    thought = thinking and (not drop or i > last) and not (i and turns[i - 1].get("task"))
    pieces.append((_body(turn, template, thought), turn["role"] == "assistant"))
    if i + 1 == len(turns) or turns[i + 1]["role"] in ("assistant", "latest_reminder"):
      opens = thinking and (not drop or i >= last)
      pieces.append((_transition(turn, THINK if opens else THINK_END, THINK if thinking else THINK_END), False))
  return [(text, written) for text, written in pieces if text]


def to_ids(text: str, tokenizer: Any) -> list[int]:
  """Token ids of a text of `encode` or `parts`, as the model is trained on it and asked with it.

  The end of a turn is the token that ends a document, whatever the tokenizer would make of its spelling: it is what a reply
  is stopped at.
  """
  ids: list[int] = []
  for i, piece in enumerate(text.split(EOS)):
    ids += [tokenizer.document_end] * (i > 0) + list(tokenizer.encode(piece) if piece else ())
  return ids


def _check(where: str, message: Mapping[str, Any]) -> None:
  """Refuses what the encoding has no place for."""
  if not isinstance(message, Mapping) or message.get("role") not in ROLES:
    refuse(f"{where}.role", message.get("role") if isinstance(message, Mapping) else message, f"one of {', '.join(ROLES)}")
  if message.get("task") is not None and message["task"] not in TASKS:
    refuse(f"{where}.task", message["task"], f"one of {', '.join(TASKS)}")
  role, content = message["role"], message.get("content")
  if role == "developer" and not content:
    refuse(f"{where}.content", content, "a text (a developer message must not be empty)")
  blocks = (list, tuple) if role in ("user", "tool") else ()
  if not isinstance(content, (str, type(None), *blocks)):
    refuse(f"{where}.content", content, "a string" + (" or a list of blocks" if blocks else ""))
  for block in content if isinstance(content, blocks) else ():
    if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
      refuse(f"{where}.content", block, "blocks such as {'type': 'text', 'text': ...}")
  if not isinstance(message.get("reasoning_content"), (str, type(None))):
    refuse(f"{where}.reasoning_content", message["reasoning_content"], "a string")
  for i, call in enumerate(message.get("tool_calls") or ()):
    function = call.get("function") if isinstance(call, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    if not isinstance(function.get("name"), str) or not isinstance(function.get("arguments"), (str, Mapping)):
      refuse(f"{where}.tool_calls[{i}]", call, "{'id': ..., 'function': {'name': a string, 'arguments': a JSON string}}")
  for i, tool in enumerate(message.get("tools") or ()):
    if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
      refuse(f"{where}.tools[{i}]", tool, "{'type': 'function', 'function': {'name': ..., 'parameters': ...}}")


def _text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
  """Content as one text; blocks that are no text are named."""
  if content is None or isinstance(content, str):
    return content or ""
  return "\n\n".join(b.get("text") or "" if b["type"] == "text" else f"[Unsupported {b['type']}]" for b in content)


def _merged(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """User and tool messages that follow one another become one user turn of `blocks`: (id of the call or None, text).

  After a turn with a task only tool results may still join it; a user message begins a turn of its own.
  """
  turns: list[dict[str, Any]] = []
  for message in messages:
    role = message["role"]
    if role not in ("user", "tool"):
      turns.append(dict(message))
      continue
    text = _text(message.get("content"))
    block = (None, text) if role == "user" else (message.get("tool_call_id") or "", f"<tool_result>{text}</tool_result>")
    if turns and turns[-1]["role"] == "user" and (role == "tool" or not turns[-1].get("task")):
      turns[-1]["blocks"].append(block)
    else:
      kept = dict(message) if role == "user" else {}
      turns.append(kept | {"role": "user", "blocks": [block]})
  return turns


def _ordered(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The tool results of each user turn, in their places, in the order of the last assistant's calls."""
  order: dict[str, int] = {}
  for turn in turns:
    if turn["role"] == "assistant" and turn.get("tool_calls"):
      order = {call["id"]: i for i, call in enumerate(turn["tool_calls"]) if call.get("id")}
    elif turn["role"] == "user":
      results = iter(sorted((b for b in turn["blocks"] if b[0] is not None), key=lambda b: order.get(b[0], 0)))
      turn["blocks"] = [b if b[0] is None else next(results) for b in turn["blocks"]]
  return turns


def _last_user(turns: Sequence[Mapping[str, Any]]) -> int:
  """Place of the last user or developer turn; -1 without one."""
  return max((i for i, turn in enumerate(turns) if turn["role"] in ("user", "developer")), default=-1)


def _body(turn: Mapping[str, Any], template: ChatTemplate, thought: bool) -> str:
  """One turn, without what leads over to the next."""
  role, content = turn["role"], turn.get("content") or ""
  if role == "user":
    return USER + "\n\n".join(text for _, text in turn["blocks"])
  if role == "latest_reminder":
    return REMINDER + content
  if role == "assistant":
    reasoning = (turn.get("reasoning_content") or "") + THINK_END if thought else ""
    calls = _calls_text(turn["tool_calls"]) if turn.get("tool_calls") else ""
    return reasoning + content + calls + ("" if turn.get("wo_eos") else EOS)
  text = content if role == "system" else USER + content
  if turn.get("tools"):
    schemas = "\n".join(_json(tool["function"]) for tool in turn["tools"])
    text += "\n\n" + template.tools(schemas)
  if turn.get("response_format"):
    text += "\n\n" + template.response_format(_json(turn["response_format"]))
  return text


def _transition(turn: Mapping[str, Any], opening: str, task_opening: str) -> str:
  """What stands between a turn and the assistant's; a task is asked for by its token."""
  task = turn.get("task")
  if task:
    return (ASSISTANT + task_opening if task == "action" else "") + TASKS[task]
  return ASSISTANT + opening if turn["role"] in ("user", "developer") else ""


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)


def _calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
  invokes = []
  for call in calls:
    given = call["function"]["arguments"]
    try:
      arguments = given if isinstance(given, Mapping) else json.loads(given)
    except ValueError:
      arguments = None
    # What is no JSON object goes through as one parameter, so that a model sees what it once wrote.
    arguments = arguments if isinstance(arguments, Mapping) else {"arguments": given}
    lines = "\n".join(f'<{DSML}parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
                      f"{value if isinstance(value, str) else _json(value)}</{DSML}parameter>"
                      for name, value in arguments.items())
    invokes.append(f'<{DSML}invoke name="{call["function"]["name"]}">\n{lines}{_INVOKE_END}')
  return _CALLS_START + "\n".join(invokes) + _CALLS_END


# ---- text -> message ---------------------------------------------------------------------------------------------------
def parse(text: str, *, reasoning_effort: str | None, template: ChatTemplate | None = None) -> dict[str, Any]:
  """The assistant's message from what the model wrote after `encode`'s text.

  Args:
    text: with or without the closing end of sentence.
    reasoning_effort, template: those of the request; with a thought, `text` begins inside it.

  Returns:
    {"role": "assistant", "content", "reasoning_content", and "tool_calls" if there are any}; a call is {"id", "type",
    "function": {"name", "arguments": JSON string}}, with ids call_0, call_1, ... by their order.

  Raises:
    ValueError: a thought that is not closed, text after the end of sentence, or a malformed tool call.
  """
  template = DEFAULT if template is None else template
  reasoning = ""
  if template.check_effort(reasoning_effort) != NONE:
    reasoning, closed, text = text.partition(THINK_END)
    if not closed:
      refuse("text", _excerpt(reasoning[-40:]), f"a thought closed by {THINK_END}")
  text, _, behind = text.partition(EOS)
  if behind:
    refuse("text", _excerpt(behind), f"nothing after {EOS}")
  content, calls, rest = text.partition(_CALLS_START)
  if f"{DSML}tool_calls" in content:
    refuse("text", _excerpt(content[content.index(DSML):]), f"tool calls that begin with {_CALLS_START!r}")
  message: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": reasoning}
  if calls:
    message["tool_calls"] = _parse_calls(rest)
  return message


def _parse_calls(text: str) -> list[dict[str, Any]]:
  calls: list[dict[str, Any]] = []
  at = 0
  while not calls or not text.startswith(_CALLS_END, at):
    if calls:
      at = _skip(text, at, "\n")
    opening = _INVOKE.match(text, at) or _malformed(
      text, at, f'<{DSML}invoke name="FUNCTION"> and a new line, or the end of the block, {_CALLS_END!r}')
    at = opening.end()
    arguments: dict[str, str] = {}
    while not text.startswith(_INVOKE_END, at):
      if arguments:
        at = _skip(text, at, "\n")
      parameter = _PARAMETER.match(text, at) or _malformed(
        text, at, f'<{DSML}parameter name="NAME" string="true|false">VALUE</{DSML}parameter> or {_INVOKE_END!r}')
      name, is_text, value = parameter.groups()
      if name in arguments:
        _malformed(text, at, f"each parameter once, {name!r} among them")
      arguments[name] = _json(value) if is_text == "true" else _checked_json(value, text, at)
      at = parameter.end()
    at += len(_INVOKE_END)
    function = {"name": opening[1], "arguments": "{" + ", ".join(f"{_json(n)}: {v}" for n, v in arguments.items()) + "}"}
    calls.append({"id": f"call_{len(calls)}", "type": "function", "function": function})
  if text[at + len(_CALLS_END):]:
    _malformed(text, at + len(_CALLS_END), "nothing after the tool calls")
  return calls


def _checked_json(value: str, text: str, at: int) -> str:
  try:
    json.loads(value)
  except ValueError:
    _malformed(text, at, 'JSON where string="false"')
  return value


def _skip(text: str, at: int, expected: str) -> int:
  if not text.startswith(expected, at):
    _malformed(text, at, f"{expected!r} or the end of the block")
  return at + len(expected)


def _excerpt(text: str) -> str:
  return text if len(text) <= 60 else text[:57] + "..."


def _malformed(text: str, at: int, expected: str) -> Any:
  refuse(f"tool calls, character {at}", _excerpt(text[at:]), expected)
