"""Run files, released dictionaries, refusals and overrides; no JAX."""

import ast
import copy
import dataclasses
import json
import typing
from pathlib import Path

import pytest

from deepseek_v4 import config
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, ModelConfig, RunConfig, Yarn, load, override

ROOT = Path(__file__).resolve().parents[1]
RUNS = sorted((ROOT / "configs").glob("*.py"))
DEBUG = [path for path in RUNS if path.stem.startswith("debug")]
RELEASED = json.loads((ROOT / "tests/golden/released_configs.json").read_text(encoding="utf-8"))
# How weights are stored, started and computed with: not in a released dictionary, or not in the one that to_hf writes.
NOT_ARCHITECTURE = ("quantization", "init_std", "mhc_init", "compute_dtype", "qat", "scan_layers", "remat",
                    "expert_exchange", "loss_chunk_size")
NAMES = [name for name in RELEASED if "/" not in name]


def released(name="DeepSeek-V4-Flash", **changes):
  return copy.deepcopy(RELEASED[name]) | changes


def normalised(name):
  """A release dictionary with its layer fields in the form that transformers turns them into."""
  raw = released(name)
  for field in ("compress_ratios", "num_hash_layers", "rope_scaling", "qk_rope_head_dim"):
    del raw[field]
  return raw | RELEASED[f"{name}/hf_normalised"]


# ---- run files ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_file_loads_and_names_its_command(path):
  assert isinstance(load(path), RunConfig)
  docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
  command = "train" if load(path).distillation is None else "distill"
  assert f"python -m launch.{command} --config configs/{path.name}" in docstring


@pytest.mark.parametrize("path", DEBUG, ids=lambda path: path.stem)
def test_debug_runs_take_ten_steps_and_differ_from_their_base(path):
  run = load(path)
  assert run.training.steps == 10
  assert (run == load(ROOT / "configs/debug.py")) == (path.stem == "debug")


@pytest.mark.parametrize("stem, name", [("v4_pro", "DeepSeek-V4-Pro"), ("v4_flash", "DeepSeek-V4-Flash")])
def test_pro_and_flash_are_the_released_models(stem, name):
  run = load(ROOT / f"configs/{stem}.py").model
  for source in (RELEASED[name], RELEASED[f"{name}-Base"], normalised(name)):
    ours = {name: getattr(run, name) for name in NOT_ARCHITECTURE}
    assert dataclasses.replace(ModelConfig.from_hf(source), **ours) == run
  assert (run.compute_dtype, run.remat) == ("bfloat16", "block")


@pytest.mark.parametrize("stem, tokens, batch", [("v4_flash", 32e12, 75_497_472), ("v4_pro", 33e12, 94_371_840)])
def test_stages_of_pro_and_flash_are_the_published_ones(stem, tokens, batch):
  """Report 4.2.2: lengths, dense first (Flash for 1T tokens, Pro for longer), sparse from 64K on behind a warm-up."""
  run = load(ROOT / f"configs/{stem}.py")
  data = [stage.data_of(run.data) for stage in run.stages]
  assert [x.sequence_length for x in data] == [4096, 16384, 65536, 65536, 1048576]
  assert [stage.attention_mode or run.training.attention_mode for stage in run.stages] == ["dense"] * 3 + ["sparse"] * 2
  assert [stage.trainable for stage in run.stages] == ["all_but_indexer"] * 2 + ["indexer", None, None]
  assert all(x.sequence_length * x.batch_size == batch for x, stage in zip(data, run.stages) if stage.trainable != "indexer")
  whole = sum(stage.tokens or stage.steps * x.batch_size * x.sequence_length for x, stage in zip(data, run.stages))
  assert whole == pytest.approx(tokens, rel=1e-3)
  dense = sum(stage.tokens for stage in run.stages[:2])
  assert dense == 1e12 if stem == "v4_flash" else dense > 1e12
  assert (run.loss.mtp_weight, run.loss.mtp_weight_final) == (0.3, 0.1) and not any(s.mtp_weight for s in run.stages)
  assert run.stages[0].ramp_from and (run.optimizer.warmup_steps, run.optimizer.final_fraction) == (2000, 0.1)


@pytest.mark.parametrize("name", ["tiny", "tiny_stages"])
def test_tiny_has_every_kind_of_layer(name):
  run = load(ROOT / f"configs/{name}.py")
  model = run.model
  assert {spec.attention for spec in model.layer_specs} == {SLIDING, CSA, HCA}
  assert {spec.router for spec in model.layer_specs} == {HASH, LEARNED}
  assert model.num_nextn_predict_layers == 1 and model.hc_mult > 1 and model.rope_scaling is not None
  assert run.mesh.emulated_devices == (8 if name == "tiny" else 0)


@pytest.mark.long
@pytest.mark.parametrize("path", DEBUG, ids=lambda path: path.stem)
def test_debug_runs_train(path, tmp_path):
  from deepseek_v4.sharding import make_mesh
  from deepseek_v4.training import loop
  run = load(path)
  summary = loop.train(run, tmp_path / "run", make_mesh(run.mesh))
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  losses = [line["next_token"] for line in lines if line["split"] == "train"]
  assert len(losses) == 10 and losses[-1] < losses[0]
  assert summary["held_out"]["bits_per_byte"] < 8.5


# ---- released dictionaries ---------------------------------------------------------------------------------------------
def test_released_models_are_read_right():
  pro, flash = (ModelConfig.from_hf(RELEASED[f"DeepSeek-V4-{name}"]) for name in ("Pro", "Flash"))
  assert (pro.num_hidden_layers, flash.num_hidden_layers) == (61, 43)
  assert [pro.layer_types.count(kind) for kind in (SLIDING, CSA, HCA)] == [0, 30, 31]
  assert [flash.layer_types.count(kind) for kind in (SLIDING, CSA, HCA)] == [2, 21, 20]
  assert pro.mlp_layer_types == (HASH,) * 3 + (LEARNED,) * 58
  assert (pro.csa_compress_rate, pro.hca_compress_rate, pro.qk_rope_head_dim) == (4, 128, 64)
  assert flash.rope_scaling == Yarn(16.0, 65536, 32.0, 1.0) and flash.num_nextn_predict_layers == 1
  assert [ModelConfig.from_hf(RELEASED[name]).quantization for name in NAMES] == ["fp8+fp4", "fp8", "fp8+fp4", "fp8"]


@pytest.mark.parametrize("name", ["DeepSeek-V4-Pro", "DeepSeek-V4-Flash"])
def test_release_and_normalised_form_say_the_same(name):
  assert ModelConfig.from_hf(normalised(name)) == ModelConfig.from_hf(released(name))


@pytest.mark.parametrize("model", [
  *[ModelConfig.from_hf(RELEASED[name]) for name in NAMES],
  load(ROOT / "configs/tiny.py").model,
  *[load(path).model for path in DEBUG],
])
def test_to_hf_and_back(model, tmp_path):
  written = model.to_hf()
  (tmp_path / "config.json").write_text(json.dumps(written))
  ours = {name: getattr(model, name) for name in NOT_ARCHITECTURE}
  for source in (written, tmp_path / "config.json", tmp_path, str(tmp_path)):
    assert dataclasses.replace(ModelConfig.from_hf(source), **ours) == model


def test_sources_that_are_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match="expected a config.json or a folder"):
    ModelConfig.from_hf(tmp_path)


def test_draft_stages_of_later_releases_are_no_layers():
  raw = released()
  raw["compress_ratios"] = raw["compress_ratios"] + [0, 0]
  read = ModelConfig.from_hf(raw | {"dspark_block_size": 4})
  assert read == dataclasses.replace(ModelConfig.from_hf(released()), num_nextn_predict_layers=0)


def test_the_same_said_twice_is_fine_and_other_rates_may_have_names():
  once = ModelConfig.from_hf(released())
  nested = RELEASED["DeepSeek-V4-Flash/hf_normalised"]["rope_parameters"]
  for twice in ({"layer_types": list(once.layer_types)}, {"mlp_layer_types": list(once.mlp_layer_types)},
                {"compress_rate_csa": 4, "compress_rates": {CSA: 4}}, {"rope_parameters": nested}):
    assert ModelConfig.from_hf(released(**twice)) == once
  ratios = [8 if ratio == 4 else ratio for ratio in RATIOS]
  other = ModelConfig.from_hf(released(compress_ratios=ratios, compress_rates={CSA: 8, HCA: 128}))
  assert other == dataclasses.replace(once, csa_compress_rate=8)


def test_defaults_are_a_run():
  assert RunConfig().optimizer.warmup_steps < RunConfig().training.steps


# ---- refusals ----------------------------------------------------------------------------------------------------------
RATIOS = RELEASED["DeepSeek-V4-Flash"]["compress_ratios"]
REFUSED = [  # (changes to the released Flash dictionary, field, value, what was expected)
  ({"compress_ratios": RATIOS[:4] + [8] + RATIOS[5:]}, "compress_ratios[4]", "8", "0 (sliding), 4 (CSA) or 128 (HCA)"),
  ({"compress_ratios": RATIOS[:40]}, "compress_ratios", "40 entries", "num_hidden_layers = 43"),
  ({"compress_ratios": RATIOS[:43] + [4]}, "compress_ratios", "[4] after the layers", "one 0 (MTP block)"),
  ({"compress_ratios": None}, "compress_ratios", "None", "this list or layer_types"),
  ({"layer_types": [SLIDING] * 42, "compress_ratios": None}, "layer_types", "42 entries", "num_hidden_layers = 43"),
  ({"layer_types": [SLIDING] * 42 + ["full_attention"], "compress_ratios": None}, "layer_types[42]", "full_attention", CSA),
  ({"mlp_layer_types": [LEARNED] * 44, "num_hash_layers": None}, "mlp_layer_types", "44 entries", "num_hidden_layers = 43"),
  ({"mlp_layer_types": [LEARNED] * 42 + ["dense"], "num_hash_layers": None}, "mlp_layer_types[42]", "dense", HASH),
  ({"num_hash_layers": -1}, "num_hash_layers", "-1", "at least 0"),
  ({"num_hash_layers": 99}, "num_hash_layers", "99", "at most num_hidden_layers = 43"),
  ({"compress_ratios": 4}, "compress_ratios", "4", "a list of numbers"),
  ({"compress_rates": {CSA: 8}}, "compress_ratios[2]", "4", "0 (sliding), 8 (CSA) or 128 (HCA)"),
  ({"compress_rates": {CSA: 4}, "compress_rate_csa": 8}, "compress_rate_csa", "8", "4, as compress_rates says"),
  ({"layer_types": [SLIDING] * 43}, "layer_types[2]", SLIDING, f"{CSA}, as compress_ratios say"),
  ({"mlp_layer_types": [LEARNED] * 43}, "mlp_layer_types[0]", LEARNED, f"{HASH}, as num_hash_layers = 3 says"),
  ({"rope_parameters": {"main": {}}}, "rope_parameters", "main", "exactly main and compress"),
  ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta", "10000", "5.0, as rope_parameters says"),
  ({"rope_parameters": {"partial_rotary_factor": 0.9}}, "partial_rotary_factor", "0.9", "the same share"),
  ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_scaling", "16", "what rope_parameters say: Yarn(factor=4"),
  ({"expert_dtype": "int4", "quantization_config": None}, "expert_dtype", "int4", "fp4 or fp8"),
  ({"quantization_config": {"bits": 3}}, "quantization_config", "bits", "only quant_method"),
  ({"sliding_window": "128"}, "sliding_window", "128", "int"),
  ({"sliding_window": 1.5}, "sliding_window", "1.5", "int"),
  ({"index_topk": None}, "index_topk", "None", "int"),
  ({"o_groups": 7}, "o_groups", "7", "a divisor of num_attention_heads = 64"),
  ({"qk_rope_head_dim": 63}, "qk_rope_head_dim", "63", "an even number"),
  ({"qk_rope_head_dim": 1024}, "qk_rope_head_dim", "1024", "at most head_dim = 512"),
  ({"qk_rope_head_dim": 256}, "qk_rope_head_dim", "256", "at most index_head_dim = 128"),
  ({"partial_rotary_factor": 0.25}, "qk_rope_head_dim", "64", "partial_rotary_factor * head_dim = 128"),
  ({"num_experts_per_tok": 257}, "num_experts_per_tok", "257", "at most n_routed_experts = 256"),
  ({"sliding_window": 0}, "sliding_window", "0", "at least 1"),
  ({"index_topk": 0}, "index_topk", "0", "at least 1"),
  ({"hc_mult": 0}, "hc_mult", "0", "at least 1"),
  ({"compress_rates": {CSA: 1}, "compress_ratios": [ratio == 4 for ratio in RATIOS]}, "csa_compress_rate", "1",
   "at least 2"),
  ({"compress_rates": {CSA: 4, "full_attention": 2}}, "compress_rates", "full_attention", f"only the keys {CSA}"),
  ({"model_type": "deepseek_v41"}, "model_type", "deepseek_v41", "'deepseek_v4'"),
  ({"n_shared_experts": 2}, "n_shared_experts", "2", "1"),
  ({"norm_topk_prob": False}, "norm_topk_prob", "False", "True"),
  ({"topk_method": "greedy"}, "topk_method", "greedy", "'noaux_tc'"),
  ({"scoring_func": "softmax"}, "scoring_func", "softmax", "'sqrtsoftplus', 'sigmoid'"),
  ({"num_key_value_heads": 8}, "num_key_value_heads", "8", "1"),
  ({"hidden_act": "gelu"}, "hidden_act", "gelu", "'silu'"),
  ({"attention_bias": True}, "attention_bias", "True", "False"),
  ({"tie_word_embeddings": True}, "tie_word_embeddings", "True", "False"),
  ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers", "2", "0, 1"),
  ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type", "linear", "yarn or default"),
  ({"rope_scaling": {"type": "yarn", "mscale": 1.0}}, "rope_scaling", "mscale", "only factor"),
  ({"rope_scaling": {"type": "yarn", "attention_factor": 1.2}}, "attention_factor", "1.2", "1.0"),
  ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor", "0.5", "at least 1"),
  ({"rope_parameters": {"main": {"rope_theta": 5e3}, "compress": {}}}, "rope_theta", "10000", "5000.0"),
  ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method", "gptq", "'fp8'"),
  ({"quantization_config": {"weight_block_size": [64, 64]}}, "weight_block_size", "[64, 64]", "[128, 128]"),
  ({"expert_dtype": "int4"}, "expert_dtype", "int4", "fp4 or fp8"),
  ({"eos_token_id": 129280}, "eos_token_id", "129280", "below vocab_size = 129280"),
  ({"sparse_ratio": 3}, "sparse_ratio", "3", "without a meaning here"),
]


@pytest.mark.parametrize("changed, field, value, expected", REFUSED, ids=[f"{r[1]}={r[2]}"[:60] for r in REFUSED])
def test_refused_dictionaries(changed, field, value, expected):
  with pytest.raises(ValueError) as refused:
    ModelConfig.from_hf(released(**changed))
  message = str(refused.value)
  assert field in message and value in message and expected in message, message


REFUSED_RUNS = [
  ("optimizer.learning_rate=0", "learning_rate", "0.0", "above 0"),
  ("optimizer.momentum=1", "momentum", "1.0", "[0, 1)"),
  ("optimizer.momentum_dtype=float16", "momentum_dtype", "'float16'", "'bfloat16'"),
  ("optimizer.warmup_steps=2000", "warmup_steps", "2000", "at most training.steps = 10"),
  ("optimizer.muon_split=row", "muon_split", "'row'", "'none', 'head'"),
  ("loss.mtp_weight=-1", "mtp_weight", "-1.0", "at least 0"),
  ("model.loss_chunk_size=0", "loss_chunk_size", "0", "at least 1"),
  ("data.source=web", "source", "'web'", "'array_record'"),
  ("data.source=jsonl", "path", "None", "a folder, file or glob"),
  ("data.path=somewhere", "path", "'somewhere'", "None for source 'stdlib'"),
  ("data.accumulation=3", "batch_size", "8", "a multiple of accumulation = 3"),
  ("data.held_out_percent=100", "held_out_percent", "100", "0 to 99"),
  ("data.fim_rate=1.5", "fim_rate", "1.5", "[0, 1]"),
  ("data.sequence_length=4096", "data.sequence_length", "4096", "model.max_position_embeddings = 1024"),
  ("mesh.fsdp=0", "fsdp", "0", "at least 1, or -1"),
  ("mesh.dcn_data=0", "dcn_data", "0", "at least 1, or -1"),
  ("training.gradient_reduction=fp8", "gradient_reduction", "'fp8'", "'float32', 'bfloat16'"),
  ("mesh.fsdp=-1", "mesh", "-1", "at most one axis"),
  ("training.steps=0", "steps", "0", "at least 1"),
  ("training.kernels=cuda", "kernels", "'cuda'", "'blockwise'"),
  ("model.compute_dtype=float16", "compute_dtype", "'float16'", "'bfloat16'"),
  ("model.mhc_init=random", "mhc_init", "'random'", "'identity', 'zero'"),
  ("model.remat=layer", "remat", "'layer'", "'none', 'mhc', 'block', 'offload', 'full'"),
  ("model.expert_exchange=ring", "expert_exchange", "'ring'", "'auto', 'gather', 'all_to_all'"),
]


@pytest.mark.parametrize("setting, field, value, expected", REFUSED_RUNS, ids=[r[0] for r in REFUSED_RUNS])
def test_refused_settings(setting, field, value, expected):
  with pytest.raises(ValueError) as refused:
    load(ROOT / "configs/debug.py", [setting])
  message = str(refused.value)
  assert field in message and value in message and expected in message, message


# ---- overrides ---------------------------------------------------------------------------------------------------------
BASE = load(ROOT / "configs/debug.py")


@pytest.mark.parametrize("setting, read, value", [
  ("training.steps=20", lambda c: c.training.steps, 20),
  ("optimizer.learning_rate=1", lambda c: c.optimizer.learning_rate, 1.0),
  ("optimizer.learning_rate=2.5e-4", lambda c: c.optimizer.learning_rate, 2.5e-4),
  ("model.scan_layers=false", lambda c: c.model.scan_layers, False),
  ("model.remat=block", lambda c: c.model.remat, "block"),
  ("model.pad_token_id=None", lambda c: c.model.pad_token_id, None),
  ("model.pad_token_id=5", lambda c: c.model.pad_token_id, 5),
  (f'model.layer_types=("{CSA}", "{HCA}")', lambda c: c.model.layer_types, (CSA, HCA)),
  (" data.tokenizer = files/tokenizer.json ", lambda c: c.data.tokenizer, "files/tokenizer.json"),
])
def test_overrides_are_typed(setting, read, value):
  found = read(override(BASE, [setting]))
  assert found == value and type(found) is type(value)


def test_settings_apply_together():
  # each alone is refused: the layers' lists are too short, the warm-up too long
  run = override(BASE, ["optimizer.warmup_steps=50", "training.steps=60", "data.source=text", "data.path=a=b"])
  assert (run.optimizer.warmup_steps, run.training.steps, run.data.path) == (50, 60, "a=b")
  assert run.model == BASE.model


def test_fewer_layers_by_number_alone():
  run = load(ROOT / "configs/v4_flash.py", ["model.num_hidden_layers=4"])
  assert run.model.layer_types == (SLIDING, SLIDING, CSA, HCA) and run.model.mlp_layer_types == (HASH,) * 3 + (LEARNED,)
  with pytest.raises(ValueError, match="num_hidden_layers = 44: expected 1 to 43"):
    load(ROOT / "configs/v4_flash.py", ["model.num_hidden_layers=44"])


@pytest.mark.parametrize("setting, expected", [
  ("training.step=5", r"TrainingConfig has no field 'training.step'; it has steps, seed, init_from, kernels"),
  ("optimiser.momentum=0.9", r"RunConfig has no field 'optimiser'; it has model, optimizer"),
  ("training.steps", r"--set = 'training.steps': expected KEY=VALUE"),
  ("loss.mtp_weight=1e999", r"loss.mtp_weight = '1e999': expected float"),
  ("training.steps=many", r"training.steps = 'many': expected int"),
  ("training.steps=1.5", r"training.steps = '1.5': expected int"),
  ("optimizer.momentum=True", r"optimizer.momentum = 'True': expected float"),
  ("model.scan_layers=1", r"model.scan_layers = '1': expected bool"),
  ("model.vocab_size.rows=1", r"model.vocab_size = .*expected a field with fields of its own"),
])
def test_wrong_overrides_say_what_there_is(setting, expected):
  with pytest.raises(ValueError, match=expected):
    override(BASE, [setting])


@pytest.mark.parametrize("settings", [("model=3", "model.hc_mult=2"), ("model.hc_mult=2", "model=3")])
def test_a_setting_and_one_inside_it_are_refused(settings):
  with pytest.raises(ValueError, match=f"--set = '{settings[1]}': expected a setting of 'model' or of its fields, not both"):
    override(RunConfig(), settings)


def test_run_files_that_are_none(tmp_path):
  with pytest.raises(FileNotFoundError, match="expected a Python file with get_config"):
    load(tmp_path / "missing.py")
  (tmp_path / "empty.py").write_text("")
  with pytest.raises(ValueError, match="expected a Python file that defines get_config"):
    load(tmp_path / "empty.py")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_dictionaries_of_runs_and_back(path):
  run = load(path)
  assert config.from_dict(RunConfig, json.loads(json.dumps(config.to_dict(run)))) == run


# ---- every setting does something --------------------------------------------------------------------------------------
SECTIONS = {field.name for field in dataclasses.fields(RunConfig)} | {"yarn", "spec"}


def config_reads(root=ROOT, folders=("deepseek_v4", "launch")):
  """Names of all attributes that the code reads from something called a config, or after one of its sections."""
  reads = set()
  for path in (path for folder in folders for path in (root / folder).rglob("*.py")):
    if path.name.startswith("config"):  # what only checks or copies a field does not use it
      continue
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        owner = getattr(node.value, "id", None) or getattr(node.value, "attr", "")
        if owner.endswith("config") or owner in SECTIONS:
          reads.add(node.attr)
  return reads


def config_classes():
  return [kind for kind in vars(config).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


def test_every_field_is_read_somewhere():
  assert {kind.__name__ for kind in config_classes()} >= {"ModelConfig", "OptimizerConfig", "RunConfig", "TrainingConfig"}
  reads = config_reads()
  # Properties of config.py, and the list of mesh axes that sharding.py walks through, stand for fields.
  through = {"layer_specs": ("layer_types", "mlp_layer_types"), "compress_rate": ("csa_compress_rate", "hca_compress_rate"),
             "length": ("steps", "tokens"), "batch_sizes": ("ramp_from", "ramp_steps")}
  reads |= {field for name, fields in through.items() if name in reads for field in fields}
  reads |= set(config.MeshConfig.axis_names)
  # Special ids are for whoever exports the model: the data have their tokenizer's.
  exported = {"bos_token_id", "eos_token_id", "pad_token_id"}
  assert exported <= set(BASE.model.to_hf())
  unread = [f"{kind.__name__}.{field.name}" for kind in config_classes() for field in dataclasses.fields(kind)
            if field.name not in reads | exported]
  assert not unread


def test_reads_are_told_from_checks_and_from_other_attributes(tmp_path):
  (tmp_path / "deepseek_v4").mkdir()
  code = ["self.config.hc_mult", "run_config.data.seed", "parser.path", "config.hc_eps = 1"]
  (tmp_path / "deepseek_v4/model.py").write_text("\n".join(code))
  (tmp_path / "deepseek_v4/config.py").write_text("config.vocab_size\n")
  assert config_reads(tmp_path) == {"hc_mult", "data", "seed"}


def test_every_field_has_a_type_that_overrides_can_read():
  for kind in config_classes():
    for name, hint in typing.get_type_hints(kind).items():
      if typing.get_origin(hint) is not typing.ClassVar and not name.startswith("_"):
        options = typing.get_args(hint) or (hint,)
        simple = (int, float, bool, str, type(None), ...)
        assert all(option in simple or dataclasses.is_dataclass(option) for option in options), (kind, name)
