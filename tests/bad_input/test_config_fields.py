"""Settings of a run, alone and beside each other."""

import dataclasses
from pathlib import Path

import pytest

from deepseek_v4 import config as c
from tests.bad_input.table import check, table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUN = c.load(CONFIGS / "debug.py")


def setting(*overrides, of=RUN):
  """Applies overrides to a run."""
  return lambda _: c.override(of, overrides)


def run(**sections):
  """A run with other sections."""
  return lambda _: dataclasses.replace(RUN, **sections)


REWARDS, DISTILL = c.load(CONFIGS / "tiny_rewards.py"), c.load(CONFIGS / "tiny_distill.py")
STAGES = c.load(CONFIGS / "debug_stages.py")
TEACHER = c.TeacherConfig("one", "runs/one")

WRONG = table(
  ("vocab_size", "0", "at least 1", setting("model.vocab_size=0")),
  ("hidden_size", "-8", "at least 1", setting("model.hidden_size=-8")),
  ("hidden_size", "'wide'", "int", setting("model.hidden_size=wide")),
  ("rms_norm_eps", "0.0", "a finite number above 0", setting("model.rms_norm_eps=0.0")),
  ("swiglu_limit", "-1.0", "a finite number above 0", setting("model.swiglu_limit=-1.0")),
  ("init_std", "inf", "a finite number above 0", lambda _: dataclasses.replace(RUN.model, init_std=float("inf"))),
  ("qat", "'fp8'", "one of None, 'fp4'", setting("model.qat=fp8")),
  ("index_head_dim", "12", "a power of two with qat = 'fp4'", setting(
    "model.qat=fp4", "model.index_head_dim=12", of=c.load(CONFIGS / "debug_csa.py"))),
  ("model.inference_rounding", "True", "False in a run", setting("model.inference_rounding=True")),
  ("layer_types[0]", "'dense'", "one of sliding_attention", lambda _: dataclasses.replace(
    RUN.model, layer_types=("dense", *RUN.model.layer_types[1:]))),
  ("beta_slow", "64.0", "at most beta_fast", lambda _: c.Yarn(beta_slow=64.0)),
  ("factor", "0.5", "at least 1", lambda _: c.Yarn(factor=0.5)),
  ("weight_decay", "-0.1", "at least 0", setting("optimizer.weight_decay=-0.1")),
  ("adam_b2", "1.0", "a number in [0, 1)", setting("optimizer.adam_b2=1.0")),
  ("final_fraction", "1.5", "a number in [0, 1]", setting("optimizer.final_fraction=1.5")),
  ("newton_schulz_dtype", "'float16'", "one of 'float32', 'bfloat16'", setting("optimizer.newton_schulz_dtype=float16")),
  ("matrix_owner", "'sgd'", "one of 'muon', 'adamw'", setting("optimizer.matrix_owner=sgd")),
  ("matrix_owner", "'adamw'", "muon where muon_split", setting("optimizer.matrix_owner=adamw", "optimizer.muon_split=head")),
  ("balance_weight", "-1.0", "at least 0", setting("loss.balance_weight=-1.0")),
  ("sequence_length", "1", "at least 2", setting("data.sequence_length=1")),
  ("chat_template", "'folder'", "None for source 'stdlib'", setting("data.chat_template=folder")),
  ("fim_rate", "0.5", "0 for source 'chat'", setting("data.source=chat", "data.path=x", "data.fim_rate=0.5")),
  ("emulated_devices", "-1", "at least 0", setting("mesh.emulated_devices=-1")),
  ("expert", "-2", "at least 1, or -1", setting("mesh.expert=-2")),
  ("policy", "'ignore'", "one of 'skip', 'repeat'", setting("anomalies.policy=ignore")),
  ("deviations", "0.0", "a finite number above 0", setting("anomalies.deviations=0.0")),
  ("window", "1", "at least 2", setting("anomalies.window=1")),
  ("grace_seconds", "0.0", "a finite number above 0", setting("training.grace_seconds=0.0")),
  ("attention_mode", "'full'", "one of 'sparse', 'dense'", setting("training.attention_mode=full")),
  ("trainable", "'heads'", "one of 'all', 'indexer'", setting("training.trainable=heads")),
  ("init_from", "''", "a folder, or None", lambda _: dataclasses.replace(RUN.training, init_from="")),
  ("keep_checkpoints", "0", "at least 1", setting("training.keep_checkpoints=0")),
  ("training.trainable", "'indexer'", "no layer of the model has an indexer", lambda _: dataclasses.replace(
    RUN, model=dataclasses.replace(RUN.model, layer_types=(c.HCA,) * RUN.model.num_hidden_layers),
    training=dataclasses.replace(RUN.training, trainable="indexer"))),
  ("stages: name", "'1st'", "letters, digits, _ and -", lambda _: c.StageConfig("1st", steps=1)),
  ("stages.warm.steps", "None", "one of them", lambda _: c.StageConfig("warm")),
  ("ramp_steps", "3", "above 0 with ramp_from, else 0", lambda _: c.StageConfig("warm", steps=9, ramp_steps=3)),
  ("learning_rate", "None", "warmup_steps or decay_steps of its own",
   lambda _: c.StageConfig("warm", steps=9, warmup_steps=3)),
  ("stages", "'a'", "different names", run(stages=(c.StageConfig("a", steps=1), c.StageConfig("a", steps=2)))),
  ("training.steps", "'7'", "set stages.NAME.steps", setting("training.steps=7", of=STAGES)),
  ("name", "'a b'", "letters, digits", lambda _: c.TeacherConfig("a b", "runs/one")),
  ("checkpoint", "''", "a folder", lambda _: c.TeacherConfig("one", "")),
  ("teachers", "[]", "at least one", lambda _: c.DistillationConfig()),
  ("teachers", "['one', 'one']", "each with a name of its own", lambda _: c.DistillationConfig((TEACHER, TEACHER))),
  ("shortest_prompt", "200", "at most prompt_length = 128", lambda _: c.DistillationConfig((TEACHER,), shortest_prompt=200)),
  ("distillation.prompt_length + distillation.reply_length", "100128", "at most data.sequence_length",
   lambda _: dataclasses.replace(DISTILL, distillation=dataclasses.replace(
     DISTILL.distillation, prompt_length=128, shortest_prompt=128, reply_length=100_000))),
  ("top_p", "0.0", "above 0, at most 1", lambda _: c.ReinforcementConfig(top_p=0.0)),
  ("replies", "1", "at least 2", lambda _: c.ReinforcementConfig(replies=1)),
  ("minibatches", "7", "a divisor of problems x replies", lambda _: c.ReinforcementConfig(minibatches=7)),
  ("rewards", "()", "at least one function", lambda _: c.ReinforcementConfig(rewards=())),
  ("training.trainable", "'indexer'", "'all' beside reinforcement", setting("training.trainable=indexer", of=REWARDS)),
  ("loss.mtp_weight", "0.5", "0.3, the default, beside reinforcement", setting("loss.mtp_weight=0.5", of=REWARDS)),
  ("loss.mtp_weight_final", "0.0", "0.1, the default, beside distillation", setting("loss.mtp_weight_final=0", of=DISTILL)),
  ("anomalies.anticipation_delay", "5", "less than training.checkpoint_every = 5", setting(
    "anomalies.policy=anticipate", "anomalies.anticipation_delay=5")),
  ("data.source", "'stdlib'", "'chat' with reinforcement", run(reinforcement=c.ReinforcementConfig())),
  ("reinforcement", "given", "one of them is a run", lambda _: dataclasses.replace(
    DISTILL, reinforcement=c.ReinforcementConfig())),
)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_refused(wrong, tmp_path, compiled):
  check(wrong, tmp_path, compiled)
