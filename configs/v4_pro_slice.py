"""Four layers of V4-Pro at their real widths, one of each kind (HCA and CSA with hash routing, HCA and CSA with learned).

command   python -m launch.train --config configs/v4_pro_slice.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/v4_pro_slice.py --topology v5p:2x2x1
hardware  64 TPU v5p with all experts: --topology v5p:4x4x4 and --set model.n_routed_experts=384 --set mesh.fsdp=8
          --set mesh.expert=8 --set data.batch_size=64; as it is, with 8 of them, one chip
duration  none: nobody has trained this file
result    the compiler accepts both steps, kernels and Muon included (tests/planning/test_aot.py); on one chip it fits since
          updates are made in place: 77.7 of 95.7 GiB on 2026-11-27 (81%; arguments 48.0, temporaries 29.3, held at one
          time 73.4; jax 0.10.2, libtpu 0.0.42.1, 9 minutes with 6.8 GiB of the host), 106 before
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import CSA, HASH, HCA, LEARNED, MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  pro = load(Path(__file__).with_name("v4_pro.py"))
  model = dataclasses.replace(
    pro.model,
    num_hidden_layers=4,
    layer_types=(HCA, CSA, HCA, CSA),
    mlp_layer_types=(HASH, HASH, LEARNED, LEARNED),
    n_routed_experts=8,
    num_nextn_predict_layers=0,
  )
  return dataclasses.replace(
    pro, model=model, mesh=MeshConfig(data=1),
    data=dataclasses.replace(pro.data, sequence_length=4096, batch_size=1, accumulation=1),
    training=dataclasses.replace(pro.training, kernels="pallas", attention_mode="sparse"), stages=())
