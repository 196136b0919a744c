"""The settings of on-policy distillation; `config.py` hands them on, and a run holds them as `RunConfig.distillation`."""

from __future__ import annotations

import dataclasses
from typing import Any

from deepseek_v4.config_checks import at_least, one_of, positive, refuse, typed
from deepseek_v4.config_training import DataConfig

STUDENT, TEXT = "student", "text"


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
  """One teacher: where its weights are and what it is asked about."""

  name: str  # in metrics and file names: letters, digits, "_" and "-"
  checkpoint: str  # folder of a run or of a converted release; any sizes, the student's token ids
  data: DataConfig = DataConfig()  # its documents: prompts from the training split, scores on the held-out one
  weight: float = 1.0  # of its KL in the loss

  def __post_init__(self) -> None:
    typed(self)
    if not self.name or not self.name.replace("_", "a").replace("-", "a").isalnum() or not self.name.isascii():
      refuse("name", self.name, "letters, digits, '_' and '-'")
    if not self.checkpoint:
      refuse("checkpoint", self.checkpoint, "a folder")
    positive(self, "weight")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
  """One student learns from several teachers on what it says itself (report 5.1.2, 5.2.2).

  A round is `steps_per_round` steps: their samples are drawn with the weights at its beginning, equally many per teacher. A
  step takes data.batch_size samples in passes of data.batch_size / data.accumulation rows of data.sequence_length tokens,
  each with samples of one teacher. Of the run's `data` only these numbers and the tokenizer count.
  """

  teachers: tuple[TeacherConfig, ...] = ()
  samples: str = STUDENT  # "student": its own replies; "text": the teachers' training text (off-policy, for comparisons)
  prompt_length: int = 128  # tokens of the longest prompts: beginnings of pieces of the teacher's training documents
  shortest_prompt: int = 128  # lengths are drawn between the two
  reply_length: int = 384  # tokens of a reply at most
  temperature: float = 1.0
  steps_per_round: int = 4
  decode_batch: int = 128  # replies that are sampled at a time
  hidden_dtype: str = "bfloat16"  # of the teachers' cached hidden states: "bfloat16" or "float32"

  def __post_init__(self) -> None:
    typed(self)
    object.__setattr__(self, "teachers", tuple(self.teachers))
    names = [teacher.name for teacher in self.teachers]
    if not names or len(set(names)) < len(names):
      refuse("teachers", names, "at least one, each with a name of its own")
    one_of(self, "samples", (STUDENT, TEXT))
    one_of(self, "hidden_dtype", ("bfloat16", "float32"))
    at_least(self, 1, "prompt_length", "shortest_prompt", "reply_length", "steps_per_round", "decode_batch")
    if self.prompt_length < 2:
      refuse("prompt_length", self.prompt_length, "at least 2, as rows of text are packed")
    if self.shortest_prompt > self.prompt_length:
      refuse("shortest_prompt", self.shortest_prompt, f"at most prompt_length = {self.prompt_length}")
    positive(self, "temperature")


def check(run: Any) -> None:
  """Refuses a RunConfig with a distillation that does not go with its other settings."""
  distillation, data = run.distillation, run.data
  teachers = distillation.teachers
  if data.batch_size % len(teachers):
    refuse("data.batch_size", data.batch_size, f"a multiple of the number of distillation.teachers, {len(teachers)}")
  longest = distillation.prompt_length + distillation.reply_length
  if distillation.samples == STUDENT and longest > data.sequence_length:
    refuse("distillation.prompt_length + distillation.reply_length", longest,
           f"at most data.sequence_length = {data.sequence_length}")
  for teacher in teachers:
    if teacher.data.tokenizer != data.tokenizer:
      refuse(f"distillation.teachers: {teacher.name}: data.tokenizer", teacher.data.tokenizer,
             f"that of the student, data.tokenizer = {data.tokenizer!r}")
