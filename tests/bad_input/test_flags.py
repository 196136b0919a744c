"""Command lines: the mains are called in this process, up to what they refuse."""

from pathlib import Path

import pytest
from absl import flags

from launch import processes
from launch.benchmarks.maxtext import run as plan_run
from tests.bad_input.table import check, table
from tests.launch.in_process import program

ROOT = Path(__file__).resolve().parents[2]
CONFIG, WORKDIR = ("--config", str(ROOT / "configs/debug.py")), ("--workdir", "runs/nothing")
NO_RUN_FILE = str(ROOT / "deepseek_v4/config_checks.py")


def command(name, *arguments):
  """A main with its flags read, as `python -m launch.NAME` does it."""
  def run(_):
    with program(name) as module:
      module.main(flags.FLAGS([name, *arguments]))
  return run


def joining(coordinator=None, number=None, this=None, distributed=False):
  """`processes.plan` of flags, with nothing in the environment."""
  return lambda _: processes.plan(coordinator, number, this, distributed, 300, {})


WRONG = table(
  ("workdir", "None", "must have a value", command("train", *CONFIG)),
  ("--config", "'runs/none.py'", "a Python file with get_config()", command("train", "--config", "runs/none.py", *WORKDIR)),
  ("--config", "config_checks.py'", "a Python file that defines get_config()",
   command("train", "--config", NO_RUN_FILE, *WORKDIR)),
  ("--set", "'training.steps'", "KEY=VALUE", command("train", *CONFIG, *WORKDIR, "--set", "training.steps")),
  ("RunConfig", "'trainin'", "it has model, optimizer", command("train", *CONFIG, *WORKDIR, "--set", "trainin.steps=1")),
  ("unknown arguments", "extra", "extra", command("train", *CONFIG, *WORKDIR, "extra")),
  ("Unknown command line flag", "'confg'", "config", command("train", "--confg", "x", *WORKDIR)),
  ("--process_id", "3", "0 to --num_processes - 1 = 1", joining("host:1", 2, 3)),
  ("--num_processes", "0", "at least 1", joining("host:1", 0, 0)),
  ("--coordinator", "'host'", "HOST:PORT with a port from 1 to 65535", joining("host", 2, 0)),
  ("--coordinator", "'host:99999'", "HOST:PORT", joining("host:99999", 2, 0)),
  ("--num_processes", "--process_id", "all or none", joining("host:1")),
  ("--distributed", "--coordinator", "expected none of", joining("host:1", 2, 0, True)),
  ("initialization_timeout", "0", "a positive integer", command(
    "train", *CONFIG, *WORKDIR, "--initialization_timeout", "0")),
  ("--config", "'x.py'", "a Python file with get_config()", command("distill", "--config", "x.py", *WORKDIR)),
  ("to", "pytorch", "orbax|hf", command("convert", "--source", "a", "--target", "b", "--to", "pytorch")),
  ("--quantization", "'fp8'", "--to hf beside it", command(
    "convert", "--source", "a", "--target", "b", "--to", "orbax", "--quantization", "fp8")),
  ("--drop_draft", "--drop_draft", "--to orbax beside it", command(
    "convert", "--source", "a", "--target", "b", "--to", "hf", "--drop_draft")),
  ("config.json", "nowhere", "a folder that holds one", command(
    "convert", "--source", "nowhere", "--target", "b", "--to", "orbax")),
  ("dtype", "float16", "float32|bfloat16", command(
    "convert", "--source", "a", "--target", "b", "--to", "orbax", "--dtype", "float16")),
  ("--set", "['a=1']", "a run file (.py)", command("count", "--config", "config.json", "--set", "a=1")),
  ("config.json", "nowhere", "a config.json or a folder", command("count", "--config", "nowhere")),
  ("context", "-1", "at least", command("count", *CONFIG, "--context", "-1")),
  ("drafts", "-2", "at least 0", command("count", *CONFIG, "--drafts", "-2")),
  ("context", "'many'", "int()", command("count", *CONFIG, "--context", "many")),
  ("--json", "'no/such/x.json'", "a file in a folder that exists", command("count", *CONFIG, "--json", "no/such/x.json")),
  ("--prompt", "--prompts", "one of", command("generate", "--checkpoint", "runs/none")),
  ("--prompts", "'none.txt'", "a file with a prompt on each line", command(
    "generate", "--checkpoint", "runs/none", "--prompts", "none.txt")),
  ("--drafts", "2", "--speculative with it", command("generate", "--checkpoint", "x", "--prompt", "a", "--drafts", "2")),
  ("--drift", "--inference_rounding", "one of them", command(
    "generate", "--checkpoint", "x", "--prompt", "a", "--drift", "--inference_rounding")),
  ("max_new_tokens", "0", "a positive integer", command(
    "generate", "--checkpoint", "x", "--prompt", "a", "--max_new_tokens", "0")),
  ("cache_storage", "fp8", "compute|mixed", command(
    "generate", "--checkpoint", "x", "--prompt", "a", "--cache_storage", "fp8")),
  ("checkpoint", "runs/none/checkpoints", "no checkpoint there", command(
    "generate", "--checkpoint", "runs/none", "--prompt", "a")),
  ("measurement", "'speed'", "one of forward, train", command("bench", "speed")),
  ("--against", "'transformers'", "nothing for kernels", command("bench", "kernels", "--against", "transformers")),
  ("--lengths", "'0'", "whole numbers from 1", command("bench", "forward", "--lengths", "0")),
  ("--lengths", "'100'", "multiples of 128", command("bench", "kernels", "--topology", "v5p:2x2x1", "--lengths", "100")),
  ("--topology", "'gpu:1'", "a chip and the shape of a slice", command("bench", "kernels", "--topology", "gpu:1")),
  ("--ops", "'matmul'", "some of attention", command("bench", "kernels", "--topology", "v5p:2x2x1", "--ops", "matmul")),
  ("--chunks", "a,b", "two different numbers of tokens", command("bench", "context", "--chunks", "a,b")),
  ("--checkpoint", "'runs/none'", "the checkpoints of a run", command("bench", "overlap", "--checkpoint", "runs/none")),
  ("--json", "'no/such/x.json'", "a file in a folder that exists", command("bench", "train", "--json", "no/such/x.json")),
  ("--json", "bench_config.json'", "a file that launch.bench plan wrote", command(
    "bench", "plan", "--json", str(ROOT / "launch/benchmarks/bench_config.json"), "--resume")),
  ("--json", "bench_config.json'", "a file that launch.bench all wrote", command(
    "bench", "all", "--json", str(ROOT / "launch/benchmarks/bench_config.json"), "--resume")),
  ("--resume", "True", "--json, the file to go on from", command("bench", "all", "--resume")),
  ("repeats", "0", "a positive integer", command("bench", "forward", "--repeats", "0")),
  ("miniature", "'hanoi'", "one of", command("miniature", "hanoi", *WORKDIR)),
  ("--workdir", "config_checks.py'", "a folder", command("miniature", "depth", "--workdir", NO_RUN_FILE)),
  ("--workdir", "config_checks.py/a'", "a folder", command("miniature", "depth", "--workdir", f"{NO_RUN_FILE}/a")),
  ("workdir", "config_checks.py'", "a folder", command("train", *CONFIG, "--workdir", NO_RUN_FILE)),
  ("workdir", "config_checks.py/a'", "a folder", command("train", *CONFIG, "--workdir", f"{NO_RUN_FILE}/a")),
  ("workdir", "config_checks.py/a'", "a folder", command(
    "distill", "--config", str(ROOT / "configs/tiny_distill.py"), "--workdir", f"{NO_RUN_FILE}/a",
    "--set", "mesh.data=-1")),
  ("--workdir", "config_checks.py'", "a folder", command("faults", "--workdir", NO_RUN_FILE)),
  ("config_checks.py/checkpoints", "config_checks.py", "no checkpoint there", command(
    "generate", "--checkpoint", NO_RUN_FILE, "--prompt", "a")),
  ("--kills, --stops, --full_disks", "0", "one of them above 0", command(
    "faults", "--kills", "0", "--stops", "0", "--full_disks", "0")),
  ("--workdir", "tests'", "a folder that does not exist yet", command("faults", "--workdir", str(ROOT / "tests"))),
  ("topology", "'v5p:0x0'", "a slice that libtpu knows", command("plan", *CONFIG, "--topology", "v5p:0x0")),
  ("stage", "'last'", "expected", command("plan", *CONFIG, "--topology", "v5p:2x2x1", "--stage", "last")),
)


def test_a_file_in_the_place_of_a_folder_is_named_once():
  """Nothing behind it: the folder may well exist, the file is what is in the way."""
  with pytest.raises(SystemExit) as refused:
    command("faults", "--workdir", f"{NO_RUN_FILE}/a")(None)
  assert str(refused.value) == f"error: --workdir = '{NO_RUN_FILE}/a': expected a folder; {NO_RUN_FILE} is a file"


@pytest.mark.parametrize("text", ['{"parts": {}}', '{"rows": [{"case": "a", "side": "ours"}]}', '{"rows": 3}', "[]", "no"])
def test_a_file_of_another_bench_is_not_gone_on_from(text, tmp_path):
  file = tmp_path / "bench.json"
  file.write_text(text)
  said = "--json = .*bench.json': expected, with --resume, a file that launch.bench plan wrote"
  with pytest.raises(ValueError, match=said):
    plan_run.read_rows(str(file))


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_refused(wrong, tmp_path, compiled):
  check(wrong, tmp_path, compiled)
