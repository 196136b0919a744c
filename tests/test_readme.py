"""What README.md says can be done and found: its commands are understood and run, its paths, links and names exist."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from absl import flags

import deepseek_v4 as dsv4
from deepseek_v4 import config as c
from launch import bench, miniatures
from tests import documents
from tests.checkpoint.releases import make_release
from tests.documents import ROOT, Command
from tests.launch.in_process import program

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = documents.commands(TEXT)
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / ".github").glob("*.md"),
                                                                  *(ROOT / "pallas_kernels").glob("*.md")))
MAINS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if "app.run(main)" in path.read_text(encoding="utf-8"))
RELEASE = "DeepSeek-V4-Flash"  # stands for a folder that a reader has downloaded
CODE = [*documents.spans(TEXT), *(content for _, content in documents.blocks(TEXT))]

# Placeholders in a command, by the flag in front of them ("" = none): what a test puts there.
FILLED = {("config", "FILE"): "configs/debug.py", ("json", "FILE"): "figures.json", ("workdir", "DIR"): "runs/filled",
          ("", "NAME"): "optimizers", ("coordinator", "HOST:PORT"): "localhost:12355", ("num_processes", "N"): "1",
          ("process_id", "I"): "0"}


def filled(command: Command) -> Command:
  """The command with something in the place of its placeholders."""
  words = []
  for before, word in zip(("", *command.words), command.words):
    words.append(FILLED.get((before.removeprefix("--") if before.startswith("--") else "", word), word))
  return Command(tuple(words))


def made_before(folder: str, command: Command) -> bool:
  """Whether a command further up makes the folder."""
  earlier = COMMANDS[:COMMANDS.index(command)]
  made = [other.value_of(flag) for other in earlier for flag in ("workdir", "target")]
  return folder == RELEASE or any(folder == name or folder.startswith(f"{name}/") for name in made if name)


# ---- commands ----------------------------------------------------------------------------------------------------------
def test_there_are_commands_and_the_parser_sees_them():
  assert {command.main for command in COMMANDS} >= {"train", "generate", "convert", "count", "plan", "bench"}
  text = "```\npip install x && python -m launch.a --b \\\n  'c d'  # e\n```\n`python -m launch.f g`\n"
  text += "```python\npip no\n```\n"
  assert [command.words for command in documents.commands(text)] == [
    ("pip", "install", "x"), ("python", "-m", "launch.a", "--b", "c d"), ("python", "-m", "launch.f", "g")]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.main], ids=str)
def test_a_command_is_understood(command):
  """Its flags exist and have values of their kind, its config file is there and takes its settings."""
  with program(command.main) as module:
    rest = flags.FLAGS([command.main, *filled(command).arguments])[1:]
    known = {"bench": bench.KINDS, "miniature": miniatures.NAMES}.get(command.main, ())
    assert set(rest) <= set(known) and len(rest) == bool(known), rest
    value = {name: flags.FLAGS[name].value for name in flags.FLAGS}
  assert module.__doc__ and f"python -m launch.{command.main}" in module.__doc__
  run_file = value.get("config")
  if run_file and run_file.endswith(".py"):
    c.load(ROOT / run_file, value.get("set") or ())
  for folder in (value.get("checkpoint"), value.get("source"), run_file):
    assert folder is None or (ROOT / folder).exists() or made_before(folder, command), folder


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.main], ids=str)
def test_a_command_of_another_program_is_right(command):
  """pip's extras are those of setup.py; a script has no mistake in its grammar and knows its word."""
  program, *arguments = command.words
  if program == "bash":
    script = ROOT / arguments[0]
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert all(re.search(rf"^\s*{word}\)", script.read_text("utf-8"), re.M) for word in arguments[1:])
  elif program == "hf":  # of huggingface_hub, which nothing here needs: where the releases lie
    assert arguments[0] == "download" and arguments[1].startswith("deepseek-ai/") and arguments[2] == "--local-dir"
    assert arguments[3] == RELEASE
  elif program == "pip":
    setup = (ROOT / "setup.py").read_text("utf-8")
    assert arguments[:2] == ["install", "-e"]
    extras = re.findall(r"\[([\w,]+)\]", arguments[2])
    assert all(f'"{extra}":' in setup for extra in ",".join(extras).split(",") if extra)
  else:
    assert program == "pytest"
    words, text = iter(arguments), "".join(path.read_text("utf-8") for word in arguments for path in files_of(word))
    for word in words:
      if word == "-m":
        assert re.search(rf"^  {next(words)}: ", (ROOT / ".pytest.ini").read_text("utf-8"), re.M)
      elif word == "-k":
        wanted = set(re.findall(r"\w+", next(words))) - {"and", "or", "not"}
        assert all(name in text for name in wanted), wanted  # of a test or of a parameter
      elif word == "-n":
        assert next(words).isdigit()
      else:
        assert word in ("-s", "-v", "--durations=0") or files_of(word), word


def files_of(word: str) -> list:
  """The files of tests that a word of pytest's command line means."""
  path = ROOT / word
  return [path] if path.is_file() else sorted(path.rglob("test_*.py")) if path.is_dir() else []


# What the README says of a model is in the last lines that `launch.count` prints.
COUNTED = {
  RELEASE: ("284,332,240,471", "6,610,048,891"),
  "configs/v4_flash.py": ("284,332,240,471", "6,610,048,891", "10.0%", "7.2%", "12.1% all operations", "7.3% scales too"),
  "configs/v4_pro.py": ("1,572,997,201,763", "25,840,145,979", "26.5%", "10.3%", "26.0% all operations",
                        "10.5% scales too")}


def test_count_runs_as_it_stands(tmp_path, monkeypatch, capsys):
  """The commands that take seconds; the others run in the long tests."""
  released = json.loads((ROOT / "tests/golden/released_configs.json").read_text("utf-8"))[RELEASE]
  (tmp_path / RELEASE).mkdir()
  (tmp_path / RELEASE / "config.json").write_text(json.dumps(released))
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)
  counted = {command.value_of("config"): command for command in COMMANDS if command.main == "count"}
  assert counted.keys() == COUNTED.keys()
  for of, command in counted.items():
    with program("count") as module:
      module.main(flags.FLAGS(["count", *filled(command).arguments]))
    said = capsys.readouterr().out
    for number in COUNTED[of]:
      assert number in said, (of, number)
      assert number.split(" ")[0] in TEXT, number


# ---- what is named -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_links_exist(document):
  text = (ROOT / document).read_text(encoding="utf-8")
  folder = (ROOT / document).parent
  missing = [path for path in documents.paths(text) if not (documents.exists(path) or documents.exists(path, folder))]
  missing += [link for link in documents.links(text) if link and "://" not in link and not (folder / link).exists()]
  # files of an example, and those that a reader is told to make
  assert not [path for path in missing if path not in ("my_module.py", "configs/debug_NAME.py")]


def test_the_tree_is_the_repository():
  named = documents.tree(TEXT)
  assert len(named) > 15
  assert not [path for path in named if not (ROOT / path).exists()]
  rooms = {path.relative_to(ROOT).as_posix() for path in (ROOT / "deepseek_v4").iterdir() if path.is_dir()} - {
    "deepseek_v4/__pycache__"}
  assert rooms <= set(named)


def test_the_list_of_files_is_the_repository():
  """`python -m tests.documents` makes it so."""
  found = documents.listed(TEXT)
  assert found == documents.listing()
  folder, named = "", set()
  for line in found.splitlines()[1:-1]:
    name = line.split(" ")[0]
    if name.endswith("/"):
      folder = name
    elif line.startswith("  ") and (match := re.match(r"  (\w+\.py) ", line)):
      named.add(folder + match[1])
  there = {path.relative_to(ROOT).as_posix() for top in ("deepseek_v4", "pallas_kernels")
           for path in (ROOT / top).rglob("*.py") if path.name != "__init__.py"}
  assert there and there <= named


def test_public_names_exist():
  names = {name for code in CODE for name in re.findall(r"\bdsv4((?:\.\w+)+)", code)}
  assert {".DeepseekV4", ".training.make_train_step"} <= names
  for name in names:
    found = dsv4
    for part in name.strip(".").split("."):
      found = getattr(found, part)
  outputs = {name for code in CODE for name in re.findall(r"\bout\.(\w+)", code)}
  assert outputs <= {field.name for field in dataclasses.fields(dsv4.ModelOutput)}


def test_settings_exist():
  """section.field, SectionConfig.field and stages.NAME.field, wherever code names them."""
  sections = {field.name: type(getattr(c.RunConfig(), field.name)) for field in dataclasses.fields(c.RunConfig)}
  sections |= {"stages": None, "distillation": c.DistillationConfig, "reinforcement": c.ReinforcementConfig}
  code = " ".join([*documents.spans(TEXT), *(content for language, content in documents.blocks(TEXT) if not language)])
  has = lambda kind, name: hasattr(kind, name) or name in {field.name for field in dataclasses.fields(kind)}
  found = [(kind, name) for section, kind in sections.items() if kind
           for name in re.findall(rf"(?<![\w./]){section}\.(\w+)(?![\w/]*\.py)", code)]
  found += [(c.StageConfig, name) for name in re.findall(r"\bstages\.\w+\.(\w+)", code)]
  found += [(getattr(c, kind), name) for kind, name in re.findall(r"\b([A-Z]\w*Config)\.(\w+)", code)]
  assert len(found) > 15
  assert not [(kind.__name__, name) for kind, name in found if not (has(kind, name) or hasattr(dsv4.DeepseekV4, name))]


def test_flags_exist():
  known = set()
  for main in MAINS:
    with program(main):
      known |= set(flags.FLAGS)
  ours = [span for span in documents.spans(TEXT) if not span.startswith("pytest ")]
  given = {name for span in ours for name in re.findall(r"(?<!\S)--([a-z]\w*)", span)}
  assert len(given) > 5
  assert not {name for name in given if name not in known and name.removeprefix("no") not in known}


# ---- everything, whole where that takes less than an hour --------------------------------------------------------------
# What is added to a command: () = it runs as it stands; else what makes it short. None: hours, and tests of its own run it
# in small (tests/launch).
ADDED = {
  "train": (), "generate": (), "convert": (), "count": (), "miniature": (), "distill": (),
  "plan": ("--set", "model.num_hidden_layers=1"), "faults": ("--kills", "0", "--stops", "1", "--full_disks", "0"),
  "bench forward": (), "bench train": (), "bench decode": (), "bench remat": (), "bench context": (), "bench start": (),
  "bench overlap": (),
  "bench kernels": ("--lengths", "512", "--models", "flash", "--ops", "select", "--noothers"),
  "bench memory": ("--lengths", "512", "--noothers"), "bench exchange": ("--lengths", "512"), "bench plan": None,
  "bench all": None}


def added(command: Command) -> tuple[str, ...] | None:
  """What is added to a command, so that it takes less than an hour; None: it is not run."""
  words = ADDED[f"bench {command.arguments[0]}" if command.main == "bench" else command.main]
  if command.value_of("coordinator") is None:
    return words
  # Half of the files are held out, so that there are some of both whatever they are called.
  settings = ["data.source=text", f"data.path={ROOT / 'deepseek_v4'}", "data.held_out_percent=50"]
  return tuple(word for setting in settings for word in ("--set", setting))


def missing(command: Command) -> bool:
  """Whether a command needs what is not installed here, as with the newer Python or outside of Linux (see conftest.py)."""
  needed = ["torch"] * (command.value_of("against") is not None) + ["libtpu"] * (command.value_of("topology") is not None)
  return any(importlib.util.find_spec(name) is None for name in needed)


def test_every_command_is_run_or_has_a_reason():
  for command in COMMANDS:
    if command.main:
      assert (f"bench {command.arguments[0]}" if command.main == "bench" else command.main) in ADDED, command


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  """A folder that looks like the checkout, in which later commands find what earlier ones made."""
  folder = tmp_path_factory.mktemp("checkout")
  for path in ROOT.iterdir():
    if path.name not in ("runs", ".git"):
      (folder / path.name).symlink_to(path)
  make_release(folder / RELEASE)
  return folder


@pytest.mark.long
@pytest.mark.parametrize("command", [command for command in map(filled, COMMANDS) if command.main and
                                     added(command) is not None and not missing(command)], ids=str)
def test_a_command_runs(command, checkout):
  """In the order of the file; `-v` shows how far they are."""
  environment = os.environ | {"PYTHONPATH": str(checkout)}
  environment.pop("XLA_FLAGS", None)
  done = subprocess.run([sys.executable, *command.words[1:], *added(command)], cwd=checkout, env=environment, text=True,
                        capture_output=True, timeout=3600, stdin=subprocess.DEVNULL)  # a conversation ends at once
  assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
