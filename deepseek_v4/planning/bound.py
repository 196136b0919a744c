"""How fast a compiled step could be at best, and what share of the chips' peak its model can use then.

Time. Matmuls run at the chip's peak, kernels as fast as their own bounds allow; HBM moves what the program moves. These and
collectives that the program starts and waits for later go on together, so the longest of them counts. Collectives that it
waits for at once are added. A chip receives as many bytes as it sends, and an interconnect's rate is that of both together.

Model FLOPs. A token costs 6 for each matmul parameter that it meets (2 forward, 4 backward), and attention and index scores
three times what they cost forward. Nothing else counts: no recomputation, no masked pairs, no Newton-Schulz, nor the
multi-token-prediction block, so that the figure is that of the published parameter counts.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from deepseek_v4.analysis.count import count
from deepseek_v4.config import CSA, SLIDING, ModelConfig, RunConfig

TRAINING = 3  # passes in units of the forward one


@dataclasses.dataclass(frozen=True)
class Rates:
  """What one device does in a second.

  Attributes:
    flops: bfloat16 matmuls.
    hbm: bytes read and written.
    links: bytes sent and received, both together.
  """

  flops: float
  hbm: float
  links: float


@dataclasses.dataclass(frozen=True)
class Work:
  """What a program makes one device do.

  Attributes:
    matmul_flops: outside kernels.
    kernel_flops: of kernels, whatever they multiply.
    kernel_seconds: of kernels, which know their own bounds.
    hbm_bytes: read and written.
    exposed_bytes: received by collectives that the program waits for at once.
    hidden_bytes: received by those that it starts, and waits for later.
  """

  matmul_flops: float
  kernel_flops: float
  kernel_seconds: float
  hbm_bytes: float
  exposed_bytes: float
  hidden_bytes: float


def seconds(work: Work, rates: Rates) -> dict[str, float]:
  """Least times of a step: "matmuls", "kernels", "compute" (both), "hbm", "exposed" and "hidden" collectives, and "step"."""
  matmuls = work.matmul_flops / rates.flops
  found = {"matmuls": matmuls, "kernels": work.kernel_seconds, "compute": matmuls + work.kernel_seconds,
           "hbm": work.hbm_bytes / rates.hbm, "exposed": 2 * work.exposed_bytes / rates.links,
           "hidden": 2 * work.hidden_bytes / rates.links}
  return found | {"step": max(found["compute"], found["hbm"], found["hidden"]) + found["exposed"]}


def utilization(model_flops: float, devices: int, rates: Rates, step_seconds: float) -> float:
  """Model FLOPs of a step on all devices as a share of what these could do in the time."""
  return model_flops / (devices * rates.flops * step_seconds)


# ---- the model --------------------------------------------------------------------------------------------------------
def forward_flops(model: ModelConfig, length: int, attention_mode: str = "sparse") -> dict[str, float]:
  """FLOPs of a forward pass per token of a document of `length` tokens, the mean over its places.

  Args:
    attention_mode: with "dense" CSA layers attend to all entries that a query sees, and no index score is needed.

  Returns:
    "matmuls": 2 for each matmul parameter that a token meets, head included; "attention"; "indexer".
  """
  parts = count(model, 1).flops_per_token
  matmuls = sum(flops for part, flops in parts.items() if part not in ("attention", "indexer"))
  seen = np.arange(1, length + 1)
  pairs = model.num_hidden_layers * np.minimum(seen, model.sliding_window).mean()
  scored = 0.0
  for kind in {*model.layer_types} - {SLIDING}:
    layers, entries = model.layer_types.count(kind), seen // model.compress_rate(kind)
    sparse = kind == CSA and attention_mode == "sparse"
    pairs += layers * (np.minimum(entries, model.index_topk) if sparse else entries).mean()
    scored += layers * entries.mean() if sparse else 0.0
  return {"matmuls": float(matmuls), "attention": float(4 * model.num_attention_heads * model.head_dim * pairs),
          "indexer": float(model.index_n_heads * (2 * model.index_head_dim + 3) * scored)}


def step_flops(run_config: RunConfig) -> float:
  """Model FLOPs of a whole training step, every row one document."""
  data = run_config.data
  per_token = forward_flops(run_config.model, data.sequence_length, run_config.training.attention_mode)
  return TRAINING * sum(per_token.values()) * data.batch_size * data.sequence_length
