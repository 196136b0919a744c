"""Chat text byte for byte: golden conversations, hashes of the release's own encodings, and there and back."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepseek_v4 as dsv4
from deepseek_v4.text import chat

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chat_golden.json").read_text(encoding="utf-8"))
TEMPLATE = chat.ChatTemplate(**GOLDEN["template"])
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_golden_conversations(number):
  case = GOLDEN["cases"][number]
  before = json.dumps(case["messages"])
  text = chat.encode(case["messages"], reasoning_effort=case["reasoning_effort"], drop_thinking=case["drop_thinking"],
                     template=TEMPLATE)
  assert text == case["text"]
  assert json.dumps(case["messages"]) == before, "the caller's messages were changed"


@pytest.mark.parametrize("messages, effort, digest", [  # first 16 digits of sha256, from the release's encoder
  ([{"role": "user", "content": "hi"}], "none", "e5fb4d722e8d6624"),
  ([{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}], "high", "decbd40c4a387e73"),
  ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "R1"},
    {"role": "user", "content": "c"}], "high", "a1c8f038ddb09941"),
])
def test_texts_without_wording_have_the_releases_hashes(messages, effort, digest):
  assert hashlib.sha256(dsv4.chat.encode(messages, reasoning_effort=effort).encode()).hexdigest()[:16] == digest


def test_default_wording_names_tools_and_format():
  text = chat.encode([{"role": "system", "content": "S", "tools": [TOOL, TOOL], "response_format": {"a": "{schema}"}},
                      {"role": "user", "content": "hi"}], reasoning_effort="max")
  assert text.startswith(chat.BOS + chat.DEFAULT.effort_prefix["max"] + "S\n\n")
  assert "\n".join([json.dumps(TOOL["function"])] * 2) in text and '{"a": "{schema}"}' in text
  assert "<｜DSML｜tool_calls>" in text and "{dsml_token}" not in text


# ---- a release's encoder file -------------------------------------------------------------------------------------------
PREVIEW = '''
import os
open("executed", "w").write("the file ran")
eos_token: str = "e"
made = eos_token + "x"
REASONING_EFFORT_MAX = (
    "Much.\\n"
    "More.\\n\\n"
)
TOOLS_TEMPLATE = """T {{x}} <{dsml_token}> {thinking_start_token}{thinking_end_token} {tool_schemas}"""
response_format_template: str = "F {schema}"
'''
PROMPTS = 'REASONING_EFFORT_PROMPTS = {"low": "", "high": "Much.", "max": "Much More."}'
OFFICIAL = PREVIEW.replace("REASONING_EFFORT_MAX = (", PROMPTS + '\nDEFAULT_REASONING_EFFORT = "low"\nnothing = (')


def encoder(folder, text, name="encoding_dsv4.py"):
  (folder / "encoding").mkdir(exist_ok=True)
  (folder / "encoding" / name).write_text(text, encoding="utf-8")
  return folder


def test_preview_encoder_has_high_and_max(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  encoder(tmp_path, "print(1)", "another.py")
  template = chat.ChatTemplate.from_checkpoint(encoder(tmp_path, PREVIEW))
  assert not (tmp_path / "executed").exists()
  assert template.efforts == ("none", "high", "max")
  hello = [{"role": "system", "content": "S", "tools": [TOOL]}, {"role": "user", "content": "u"}]
  schema = json.dumps(TOOL["function"])
  assert chat.encode(hello, reasoning_effort="max", template=template) == (
    f"{chat.BOS}Much.\nMore.\n\nS\n\nT {{x}} <｜DSML｜> <think></think> {schema}<｜User｜>u<｜Assistant｜><think>")
  assert "Much" not in chat.encode(hello, reasoning_effort="high", template=template)
  assert "Much" not in chat.encode(hello, reasoning_effort="none", template=template)


def test_later_encoder_defines_its_own_levels(tmp_path):
  template = chat.ChatTemplate.from_checkpoint(encoder(tmp_path, OFFICIAL))
  assert template.efforts == ("none", "low", "high", "max")
  hello = [{"role": "user", "content": "u"}]
  texts = [chat.encode(hello, reasoning_effort=level, template=template) for level in template.efforts]
  assert chat.encode(hello, reasoning_effort=None, template=template) == texts[1]
  assert len(set(texts)) == 4 and "Much." in texts[2] and "More." not in texts[2] and "More." in texts[3]


def test_encoder_files_that_do_not_serve(tmp_path):
  with pytest.raises(FileNotFoundError, match="encoder file"):
    chat.ChatTemplate.from_checkpoint(tmp_path)
  encoder(tmp_path, PREVIEW.replace("response_format_template: str = ", "response_format_template: str = eos_token + "))
  with pytest.raises(ValueError, match="encoding_dsv4.py lacks response_format_template"):
    chat.ChatTemplate.from_checkpoint(tmp_path)
  encoder(tmp_path, PREVIEW.replace("{tool_schemas}", "{os}"))
  with pytest.raises(ValueError, match=r"tools_template = '\{os\}': expected only .*tool_schemas"):
    chat.ChatTemplate.from_checkpoint(tmp_path)


def test_budgets_are_data():
  assert [chat.DEFAULT.budget(level) for level in ("none", "high", "max")] == [0, 131072, 393216]
  own = chat.ChatTemplate({"deep": "D"}, "{tool_schemas}", "{schema}", {"high": 5, "low": 3})
  assert own.efforts == ("none", "high", "deep") and own.budget(None) == 5
  assert (own.budget("high"), own.budget("deep"), own.budget("none")) == (5, 5, 0)  # an unknown level: the largest
  assert chat.ChatTemplate({"deep": "D"}, "{tool_schemas}", "{schema}", {}).budget("deep") is None
  named = chat.ChatTemplate({"low": "", "deep": "D"}, "{tool_schemas}", "{schema}", default_effort="deep")
  assert named.efforts == ("none", "low", "deep") and named.budget(None) == 393216 and named.budget("low") == 131072
  with pytest.raises(ValueError, match="default_effort = 'high': expected one of none, low, deep"):
    chat.ChatTemplate({"low": "", "deep": "D"}, "{tool_schemas}", "{schema}")
  with pytest.raises(ValueError, match="thinking_budget"):
    chat.ChatTemplate({}, "{tool_schemas}", "{schema}", {"high": -1})


# ---- back ---------------------------------------------------------------------------------------------------------
def text_without(*tokens):
  return st.text(max_size=30).filter(lambda s: not any(t in s for t in tokens))


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.one_of(text_without("DSML"), st.integers(), st.booleans(), st.none(),
                   st.lists(st.dictionaries(st.text(max_size=4), NUMBERS), max_size=2))
ARGUMENTS = st.dictionaries(st.from_regex(r"[a-z\u00e9]{1,5}", fullmatch=True), VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), ARGUMENTS), max_size=3)


@given(text_without("DSML", chat.EOS), text_without(chat.THINK_END), CALLS, st.sampled_from(["none", "high", "max"]))
def test_what_encode_writes_parse_reads(content, reasoning, calls, effort):
  ask = [{"role": "user", "content": "q"}]
  answer = {"role": "assistant", "content": content, "reasoning_content": reasoning if effort != "none" else ""}
  if calls:
    answer["tool_calls"] = [{"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(
      arguments, ensure_ascii=False)}} for i, (name, arguments) in enumerate(calls)]
  prompt = chat.encode(ask, reasoning_effort=effort)
  whole = chat.encode([*ask, answer], reasoning_effort=effort)
  assert whole.startswith(prompt) and whole.endswith(chat.EOS)
  for completion in (whole[len(prompt):], whole[len(prompt):-len(chat.EOS)]):
    assert chat.parse(completion, reasoning_effort=effort) == answer


PARAMETER = '<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>'
CALL = f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n{PARAMETER}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'


def test_a_call_in_openais_form():
  message = chat.parse("so" + CALL, reasoning_effort="none")
  assert message == {"role": "assistant", "content": "so", "reasoning_content": "", "tool_calls": [
    {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}


@pytest.mark.parametrize("text, effort, said", [
  ("never closed", "high", "a thought closed by </think>"),
  ("a" + chat.EOS + "b", "none", "nothing after"),
  ("a" + CALL[1:], "none", "tool calls that begin with"),
  (CALL.replace('"false">1', '"false">one'), "none", "JSON where string"),
  (CALL.replace('"false"', '"no"'), "none", "parameter name="),
  (CALL.replace(' name="f"', ""), "none", "invoke name="),
  (CALL[:-1], "none", "the end of the block"),
  (CALL + "more", "none", "nothing after the tool calls"),
  (CALL.replace(PARAMETER, PARAMETER + "\n" + PARAMETER), "none", "each parameter once"),
  (CALL.replace(PARAMETER, PARAMETER + " "), "none", "the end of the block"),
])
def test_malformed_completions(text, effort, said):
  with pytest.raises(ValueError) as error:
    chat.parse(text, reasoning_effort=effort)
  assert said in str(error.value)


@pytest.mark.parametrize("message, said", [
  ({"role": "bot", "content": ""}, r"messages\[1\].role = 'bot': expected one of system, developer, user, assistant, tool"),
  ({"role": "user", "content": "a", "task": "sing"}, "task = 'sing': expected one of action, query, authority"),
  ({"role": "developer", "content": ""}, "must not be empty"),
  ({"role": "system", "content": [{"type": "text", "text": "a"}]}, "content = .*: expected a string"),
  ({"role": "user", "content": 3}, "expected a string or a list of blocks"),
  ({"role": "user", "content": ["a"]}, "expected blocks such as"),
  ({"role": "assistant", "content": "", "reasoning_content": 3}, "reasoning_content = 3"),
  ({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, r"tool_calls\[0\] = .*'name': a string"),
  ({"role": "system", "content": "", "tools": [{"name": "f"}]}, r"tools\[0\] = .*'type': 'function'"),
])
def test_messages_without_a_place(message, said):
  with pytest.raises(ValueError, match=said):
    chat.encode([{"role": "user", "content": "a"}, message])


def test_unknown_levels_list_those_there_are():
  for call in (lambda: chat.encode([{"role": "user", "content": "a"}], reasoning_effort="medium"),
               lambda: chat.parse("a", reasoning_effort="medium"), lambda: chat.DEFAULT.budget("medium")):
    with pytest.raises(ValueError, match="reasoning_effort = 'medium': expected one of none, high, max"):
      call()
  with pytest.raises(ValueError, match="at least one message"):
    chat.encode([])
