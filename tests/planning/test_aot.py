"""Whole train steps through the real TPU compiler, by the command that a user calls; mistakes are named before that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from deepseek_v4.analysis.count import cache_bytes
from deepseek_v4.config import load
from tests.launch.in_process import program

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments, timeout=120):
  """Ends another Python, without the flags that the tests give to XLA's CPU compiler."""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
                        check=False, timeout=timeout)


def plan(config, *arguments, timeout=120):
  """Ends `python -m launch.plan`."""
  return python("-m", "launch.plan", "--config", f"configs/{config}.py", *arguments, timeout=timeout)


MISTAKES = [
  ("none", ["--topology", "v5p:2x2x1"], "configs/none.py"),
  ("debug", ["--topology", "v9:2x2"], "topology = 'v9:2x2': expected a slice that libtpu knows, such as v5p:4x4x4"),
  ("v4_pro_slice", ["--topology", "v5p:2x2x1", "--set", "mesh.tensor=64"],
   "64 devices, expected at most the 4 of v5p:2x2x1"),
  ("debug", ["--topology", "v5p:2x2x1", "--set", "mesh.dcn_data=-1", "--set", "mesh.data=1"],
   "mesh.dcn_data = -1: expected the number of slices v5p:2x2x1"),
  ("debug", ["--topology", "v5p:2x2x1", "--set", "mesh.dcn_data=2", "--set", "mesh.data=1"],
   "the product must be the number of devices, 8"),
  ("v4_pro_slice", ["--topology", "v5p:2x2x1", "--set", "mesh.data=2"],
   "data.batch_size / data.accumulation = 1: expected a multiple of dcn_data x data x fsdp x expert = 2"),
  ("debug", ["--topology", "v5p:2x2x1", "--json", "nowhere/x.json"], "--json = 'nowhere/x.json'"),
  ("v4_flash", ["--topology", "v5p:2x2x1", "--stage", "sparse"], "stage = 'sparse': expected one of dense_4k, dense_16k, "),
  ("debug", ["--topology", "v5p:2x2x1", "--step", "decode", "--set", "mesh.data=2", "--set", "mesh.context=2"],
   "mesh.context = 2: expected 1 for prefill and decode"),
  ("debug", ["--topology", "v5p:2x2x1", "--step", "prefill", "--chunk_size", "129"],
   "tokens = 129: expected 1 to data.sequence_length = 128"),
  ("debug", ["--topology", "v5p:2x2x1", "--step", "decode", "--set", "data.batch_size=6"],
   "data.batch_size = 6: expected a multiple of dcn_data x data x fsdp x expert = 4"),
  ("debug", ["--topology", "v5p:2x2x1", "--search", "--step", "decode"],
   "--step = 'decode': expected 'train' with --search"),
]
IDS = ["config", "topology", "too many devices", "slices", "less than the slices", "batch", "json", "stage",
       "cache on context", "chunk", "rows", "search"]
ENDS = "what each main exited with: "


def say_ends():
  """Calls the command's main for all mistakes in turn; in a process of its own, which libtpu may end."""
  said = []
  for config, arguments, _ in MISTAKES:
    with program("plan") as module, pytest.raises(SystemExit) as end:
      flags.FLAGS(["plan", "--config", f"configs/{config}.py", *arguments])
      module.main(["plan"])
    said.append(end.value.code)
  print(ENDS + json.dumps(said), flush=True)


@pytest.fixture(scope="module")
def ends():
  """What the command exits with, of each mistake."""
  result = python("-c", "from tests.planning.test_aot import say_ends; say_ends()")
  assert result.returncode == 0, result.stderr[-3000:]
  return dict(zip(IDS, json.loads(result.stdout.split(ENDS)[1]), strict=True))


@pytest.mark.parametrize("name, message", [(name, message) for name, (_, _, message) in zip(IDS, MISTAKES)], ids=IDS)
def test_mistakes_are_named_before_anything_is_compiled(name, message, ends):
  assert isinstance(ends[name], str) and message in ends[name]  # Python prints a text and exits with 1


def test_the_command_names_a_mistake_and_ends():
  config, arguments, message = MISTAKES[0]
  result = plan(config, *arguments)
  assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr, result.stderr


DECODING = ("--topology", "v5p:2x2x1", "--step", "decode", "--set", "mesh.data=1", "--set", "mesh.fsdp=2", "--set",
            "mesh.expert=2")


def planned(path, config, *options, timeout=120):
  """The figures that the command writes."""
  result = plan(config, *options, "--json", str(path), timeout=timeout)
  assert result.returncode == 0, result.stderr[-3000:]
  return json.loads(path.read_text())


@pytest.fixture(scope="module")
def decoding(tmp_path_factory):
  """Of a step of decoding, compiled."""
  return planned(tmp_path_factory.mktemp("plan") / "plan.json", "debug_csa", *DECODING)


def test_a_decode_step_compiles_and_says_what_it_takes(decoding):
  figures = decoding
  assert figures["fits"] and figures["mesh"]["expert"] == 2 and figures["host_bytes"] > 2**28
  model = load(ROOT / "configs/debug_csa.py")
  # Eight rows of 128 tokens on four devices: what the cache's own arrays take, in float32, and two counters a row.
  whole = sum(cache_bytes(model.model, model.data.sequence_length, "compute").values())
  assert figures["state"]["cache"] == 2 * (whole + 2 * 4)
  assert figures["flops"]["hardware"] > 0 and figures["bounds"]["step"] >= figures["bounds"]["hbm"] > 0
  # A token asks: attention is plain XLA, as `sparse_attention.forms` says, and everything else a kernel.
  assert set(figures["kernels"]) == {"experts_hidden", "experts_down", "index_select", "hyper_collapse", "hyper_expand",
                                     "hyper_expand_collapse", "sinkhorn"}
  assert all(row["calls"] for row in figures["kernels"].values())


def check_layout(compiled, laid_out):
  """That a step which is only laid out has the figures of the compiled one; temporaries by the smaller of two rulers."""
  assert (compiled["layout"], laid_out["layout"]) == (False, True)
  for name in ("kernels", "traffic", "flops", "bounds", "hbm_bytes_moved", "state", "utilization", "mesh", "fits"):
    assert compiled[name] == laid_out[name], name
  for name in ("arguments", "outputs", "aliased"):
    assert compiled["memory"][name] == laid_out["memory"][name], name
  assert 0 < laid_out["memory"]["temporaries"] <= compiled["memory"]["temporaries"]


def test_a_plan_by_layout_has_the_figures_of_the_compiled_one(decoding, tmp_path):
  laid_out = planned(tmp_path / "plan.json", "debug_csa", *DECODING, "--layout")
  check_layout(decoding, laid_out)
  assert laid_out["host_bytes"] > 2**28  # of the compiler's process


@pytest.mark.long
def test_a_plan_by_layout_has_the_figures_of_a_compiled_step_that_sends_tokens_to_experts(tmp_path):
  """Ragged exchanges, and loops that keep results for the backward pass, which the compiler's own figures count again."""
  options = ["--topology", "v5p:2x2x1", "--set", "mesh.data=1", "--set", "mesh.expert=4", "--set",
             "model.expert_exchange=all_to_all"]
  compiled, laid_out = (planned(tmp_path / f"{number}.json", "debug", *options, *more, timeout=600)
                        for number, more in enumerate(([], ["--layout"])))
  assert "ragged-all-to-all" in compiled["traffic"]
  check_layout(compiled, laid_out)


@pytest.mark.long
def test_a_step_that_the_compiler_refuses_while_it_lays_it_out():
  """Embeddings of a billion tokens."""
  result = plan("debug_csa", *DECODING, "--layout", "--set", "model.vocab_size=1073741824")
  assert result.returncode == 1 and "error: RESOURCE_EXHAUSTED" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.long
def test_a_search_compiles_and_ranks(tmp_path):
  path = tmp_path / "plan.json"
  result = plan("debug_csa", "--topology", "v5p:2x2x1", "--search", "--compiles", "2", "--jobs", "2", "--bundles",
                "--json", str(path), timeout=1000)
  assert result.returncode == 0, result.stderr[-3000:]
  rows = json.loads(path.read_text())["rows"]
  assert len(rows) == 2 and all(row["fits"] for row in rows) and "candidates may fit" in result.stdout
  assert rows[0]["bounds"]["step"] <= rows[1]["bounds"]["step"] and "[2/2]" in result.stdout


ON_64_CHIPS = ["model.n_routed_experts=384", "mesh.fsdp=8", "mesh.expert=8", "data.batch_size=64"]


@pytest.mark.long
@pytest.mark.parametrize("topology, settings, selects", [
  ("v5p:2x2x1", [], False),
  ("v5p:4x4x4", ON_64_CHIPS, False),
  ("v5p:4x4x4", [*ON_64_CHIPS, "data.sequence_length=8192"], True),  # up to 4,096 tokens every entry is kept
], ids=["8 experts on one chip", "384 experts on 64 chips", "8192 tokens"])
def test_the_step_of_four_layers_of_pro_compiles_with_all_kernels(topology, settings, selects, tmp_path):
  path = tmp_path / "plan.json"
  result = plan("v4_pro_slice", "--topology", topology, "--json", str(path),
                *(part for setting in settings for part in ("--set", setting)), timeout=3000)
  assert result.returncode == 0, result.stderr[-3000:]
  figures = json.loads(path.read_text())
  wanted = {"experts_d_down", "experts_d_gate_up", "experts_d_hidden", "experts_d_rows", "experts_down",
            "experts_hidden", *(name + end for end in ("", "_backward") for name in (
              "masked_attention", "index_loss", "hyper_collapse", "hyper_expand", "hyper_expand_collapse"))}
  wanted |= {"index_select"} if selects else set()
  assert wanted <= set(figures["kernels"]), wanted - set(figures["kernels"])
  assert figures["fits"] and figures["largest_gather"] <= figures["dense_layer"]
  assert figures["flops"]["hardware"] > figures["flops"]["model"] > 0 and 0 < figures["utilization"] < 1
  assert all(row["calls"] for row in figures["kernels"].values())
