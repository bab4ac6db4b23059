"""What an evaluation consists of: samples, and a score for each prediction."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from kvc_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """One question.

  Attributes:
    id: distinct within its task, and the same in every run.
    prompt: text, or token ids (what went through a chat template).
    max_new_tokens: most tokens to generate.
    references: right answers.
    group: samples that are also averaged apart, such as a length bucket; "" for none.
    extra: more that the score depends on or a reader wants; JSON values, written into the sample's record.
    stop_token_ids: ids that end the answer, beside the model's own.
  """

  id: str
  prompt: str | list[int]
  max_new_tokens: int
  references: tuple[str, ...]
  group: str = ""
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  stop_token_ids: tuple[int, ...] = ()


class Task(Protocol):
  """A set of samples with a metric. The runner, the tables and the plots know no more of it than this."""

  @property
  def name(self) -> str:
    """Of its files and its row in the table: letters, digits, '-', '_' and '.'."""

  @property
  def settings(self) -> Mapping[str, Any]:
    """All that the samples depend on, as JSON values; what was made under other settings is not continued."""

  def __len__(self) -> int:
    """Number of samples."""

  def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
    """The samples, made one by one, in the same order every time."""

  def score(self, prediction: str, sample: Sample) -> float:
    """Of a model's text, from 0 to 1."""
