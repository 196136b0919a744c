"""The real folders from shapes alone, and a folder with all of Flash's tensors at narrow widths, both ways."""

import collections
import dataclasses
import json
from pathlib import Path

import pytest

from deepseek_v4.checkpoint import convert
from deepseek_v4.checkpoint.hf_write import release_plan
from deepseek_v4.checkpoint.safetensors_files import Planned, split_files, total_bytes
from deepseek_v4.config import ModelConfig
from tests.checkpoint.releases import make_release, stored_bytes

RELEASED = json.loads((Path(__file__).parents[1] / "golden" / "released_configs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name, size, number", [
  ("DeepSeek-V4-Flash", 159_609_485_896, 69_187), ("DeepSeek-V4-Pro", 864_704_792_696, 145_116),  # the published indices
  ("DeepSeek-V4-Flash-Base", 292_502_338_120, 69_187), ("DeepSeek-V4-Pro-Base", 1_602_033_600_632, 145_116)])
def test_plan_of_the_real_folders(name, size, number):
  config = ModelConfig.from_hf(RELEASED[name])
  plan = release_plan(config, config.quantization)
  assert (total_bytes(plan), len(plan)) == (size, number)
  d, f = config.hidden_size, config.moe_intermediate_size
  last = f"layers.{config.num_hidden_layers - 1}"
  expert = {"layers.3.ffn.experts.7.w2.weight": Planned("F8_E4M3", (d, f)),
            "layers.3.ffn.experts.7.w2.scale": Planned("F8_E8M0", (d // 128, f // 128))}
  if config.quantization == "fp8+fp4":
    expert = {"layers.3.ffn.experts.7.w2.weight": Planned("I8", (d, f // 2)),
              "layers.3.ffn.experts.7.w2.scale": Planned("F8_E8M0", (d, f // 32))}
  expected = expert | {
    "embed.weight": Planned("BF16", (129280, d)), "hc_head_scale": Planned("F32", (1,)),
    "layers.2.ffn.gate.tid2eid": Planned("I64", (129280, 6)),
    f"{last}.ffn.gate.bias": Planned("F32", (256 if d == 4096 else 384,)),
    f"{last}.attn.wo_a.weight": Planned("F8_E4M3", (config.o_groups * 1024, 4096)),
    f"{last}.attn.wq_b.scale": Planned("F8_E8M0", (config.num_attention_heads * 4, config.q_lora_rank // 128)),
    f"{last}.attn.indexer.compressor.ape": Planned("F32", (4, 256)),
    f"{last}.attn.compressor.wkv.weight": Planned("BF16", (1024, d)),
    "mtp.0.h_proj.weight": Planned("F8_E4M3", (d, d)), "mtp.0.hc_attn_fn": Planned("F32", (24, 4 * d))}
  assert {n: plan[n] for n in expected} == expected
  assert max(total_bytes({n: plan[n] for n in names}) for names in split_files(plan)) <= 5 * 10**9


def test_dtypes_of_flash():
  """How many tensors of each dtype the release's headers show."""
  census = collections.Counter(p.dtype for p in release_plan(ModelConfig.from_hf(RELEASED["DeepSeek-V4-Flash"]),
                                                             "fp8+fp4").values())
  assert census == {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34167, "I64": 3, "I8": 33792}


@pytest.mark.long
def test_all_tensors_of_flash_both_ways(tmp_path):
  """43 layers, 256 experts, the prediction block, real names and dtypes; only the widths are small."""
  config = dataclasses.replace(
    ModelConfig.from_hf(RELEASED["DeepSeek-V4-Flash"]), vocab_size=300, hidden_size=32, num_attention_heads=8, head_dim=16,
    qk_rope_head_dim=8, q_lora_rank=16, o_lora_rank=8, index_n_heads=2, index_head_dim=8, moe_intermediate_size=16)
  make_release(tmp_path / "release", config, max_file_bytes=5_000_000)
  before = stored_bytes(tmp_path / "release")
  assert len(before) == 69_187
  convert.to_checkpoint(tmp_path / "release", tmp_path / "ours", part_bytes=8_000_000)
  convert.to_release(tmp_path / "ours", tmp_path / "back", quantization="fp8+fp4", max_file_bytes=3_000_000)
  assert stored_bytes(tmp_path / "back") == before
  assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "release" / "config.json").read_bytes()
