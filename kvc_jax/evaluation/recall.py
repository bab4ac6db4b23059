"""Recall tasks of any length from a text, as tasks of the evaluation's runner."""

import hashlib
import pathlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvc_jax.errors import InputError, check_count
from kvc_jax.evaluation.haystack import SentenceLengths, held_out_sentences, is_plain, read_text, split_sentences
from kvc_jax.evaluation.recall_episodes import TASKS, WORDING, Draw, Parts, lay_out
from kvc_jax.evaluation.task import Sample
from kvc_jax.tokenizer import Tokenizer

DEFAULT_LENGTHS = (1024, 2048, 4096, 8192)
SHORTEST = 512
"""The largest task's statements take about 250 tokens of a small model's tokenizer."""

_SPARE_TOKENS = 4  # for models that start their answer with a space or a line


class RecallTask:
  """One recall task at several lengths, as `run_task` takes it; samples are grouped by length."""

  def __init__(
      self, name: str, sentences: Sequence[str], *, lengths: Sequence[int] = DEFAULT_LENGTHS, count: int = 50,
      seed: int = 0, builders: "Builders | None" = None,
  ):
    """Describes the task; samples are made when asked for.

    Args:
      name: of `TASKS`.
      sentences: text to hide things in, such as `held_out_sentences()`.
      lengths: most tokens of prompt and answer together; the text is cut to come close to it.
      count: samples of each length.
      seed: other seeds give other samples.
      builders: of the same sentences, where several tasks share them.

    Raises:
      InputError: there is no such task, or a number is out of range.
    """
    check_task_names([name])
    for length in lengths:
      check_count("length", length, at_least=SHORTEST)
    check_count("count", count, at_least=1)
    check_count("seed", seed, at_least=0)
    self.name = f"recall-{name}"
    self._task, self._lengths, self._count, self._seed = name, lengths, count, seed
    self._builders = builders or Builders(sentences)
    digest = hashlib.sha256("\n".join(sentences).encode()).hexdigest()
    self.settings: Mapping[str, Any] = {
        "text": digest[:16], "lengths": list(lengths), "count": count, "seed": seed, "wording": WORDING}

  def __len__(self) -> int:
    return self._count * len(self._lengths)

  def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
    builder = self._builders.of(tokenizer)
    for length in self._lengths:
      for number in range(self._count):
        yield builder.sample(self._task, length, number, seed=self._seed)

  def score(self, prediction: str, sample: Sample) -> float:
    return score(self._task, prediction, sample.references[0])


def recall_tasks(
    names: Sequence[str] = (), *, text: str | pathlib.Path | None = None,
    lengths: Sequence[int] = DEFAULT_LENGTHS, count: int = 50, seed: int = 0,
) -> list[RecallTask]:
  """The tasks by name, all of them where none is given.

  Args:
    names: of `TASKS`.
    text: file with text to hide things in; by default the one that comes with the project.
    lengths: see `RecallTask`.
    count: see `RecallTask`.
    seed: see `RecallTask`.

  Raises:
    InputError: a name is unknown, the text cannot be read, or a number is out of range.
  """
  check_task_names(names)
  sentences = held_out_sentences() if text is None else split_sentences(read_text(text))
  builders = Builders(sentences)
  return [
      RecallTask(name, sentences, lengths=lengths, count=count, seed=seed, builders=builders)
      for name in dict.fromkeys(names) or tuple(TASKS)]


def check_task_names(names: Sequence[str]) -> None:
  """Raises InputError unless all names are of `TASKS`."""
  for name in names:
    if name not in TASKS:
      raise InputError(f"there is no recall task {name!r}; give {', '.join(TASKS)}")


class Builders:
  """A text's `SampleBuilder` for the tokenizer at hand, made once for all tasks and runs that ask for it."""

  def __init__(self, sentences: Sequence[str]):
    self._sentences = sentences
    self._last: tuple[Tokenizer, SampleBuilder] | None = None

  def of(self, tokenizer: Tokenizer) -> "SampleBuilder":
    """The builder; another tokenizer's is forgotten."""
    if self._last is None or self._last[0] is not tokenizer:
      self._last = tokenizer, SampleBuilder(self._sentences, tokenizer)
    return self._last[1]


class SampleBuilder:
  """Makes samples of a text for one tokenizer; the text is tokenized once."""

  def __init__(self, sentences: Sequence[str], tokenizer: Tokenizer):
    self._sentences, self._tokenizer = sentences, tokenizer
    self._haystack = SentenceLengths(
        [self._count(" " + sentence) for sentence in sentences], [is_plain(sentence) for sentence in sentences])
    self._special = len(tokenizer.encode("a")) - self._count("a")
    newline = tokenizer.encode("\n", add_special_tokens=False)
    self._stop = tuple(newline) if len(newline) == 1 else ()

  def sample(self, task: str, length: int, number: int, *, seed: int) -> Sample:
    """The sample with this number; the same for the same arguments, text and tokenizer.

    Its prompt and answer have `length` tokens at most, and only a few less.

    Raises:
      InputError: the text is too short for it, or the length for what the task hides.
    """
    rng = random.Random(f"{task} {length} {number} {seed}")
    episode = TASKS[task](Draw(rng, self._haystack))
    question = rng.choice(episode.questions)
    ask, answer = self._text(question.ask), self._text(question.answer)
    hidden = sum(self._count(self._text(parts)) for parts in episode.statements)
    room = length - hidden - self._count(ask) - self._count(answer) - self._special
    if room < 1:
      raise InputError(f"length {length} is too short for what task {task} hides; give at least {length - room + 64}")
    window = self._haystack.window(rng, room)
    laid = lay_out(rng, episode.statements, window)
    first = laid[0]
    assert isinstance(first, range)  # statements stand behind sentences
    opening, rest = self._sentences[first[0]].split(), self._text_of([first[1:], *laid[1:]]) + ask
    return Sample(
        id=f"{length}-{number}", prompt=self._fitted(opening, rest, length - self._count(answer)),
        max_new_tokens=self._count(answer) + _SPARE_TOKENS, references=(answer_of(task, answer),), group=str(length),
        extra={"length": length}, stop_token_ids=self._stop)

  def _fitted(self, opening: list[str], rest: str, most: int) -> str:
    """The opening sentence's end, as much as fits, and the rest."""
    low, high = 0, len(opening)
    while low < high:
      middle = (low + high) // 2
      if len(self._tokenizer.encode(_joined(opening[middle:], rest))) <= most:
        high = middle
      else:
        low = middle + 1
    return _joined(opening[low:], rest)

  def _count(self, text: str) -> int:
    return len(self._tokenizer.encode(text, add_special_tokens=False))

  def _text(self, parts: Parts) -> str:
    return "".join(part if isinstance(part, str) else " " + self._sentences[part] for part in parts)

  def _text_of(self, laid: Sequence[range | Parts]) -> str:
    return "".join(self._text(tuple(parts)) for parts in laid)


def _joined(opening: Sequence[str], rest: str) -> str:
  return "".join(" " + word for word in opening) + rest


def answer_of(task: str, text: str) -> str:
  """What counts of an answer's text: its numbers, or all of it."""
  return " ".join(_numbers(text)) if task in _BY_NUMBERS else " ".join(text.split())


def score(task: str, prediction: str, reference: str) -> float:
  """1 if the prediction begins with the whole answer, else 0.

  Numbers are read wherever they stand, with or without spaces between their digits; a task with several asks for
  all of them in order. Labels are compared without case, passages word for word.
  """
  if task in _BY_NUMBERS:
    wanted = reference.split()
    return float(_numbers(prediction)[:len(wanted)] == wanted)
  wanted, found = reference.split(), prediction.split()[:len(reference.split())]
  if task == "labels":
    return float([word.strip(".,:;!\"'").casefold() for word in found] == [word.casefold() for word in wanted])
  return float(found == wanted)


_BY_NUMBERS = frozenset({"single", "multi_key", "multi_value", "variables"})


def _numbers(text: str) -> list[str]:
  return re.findall(r"(?<!\d)\d{4}(?!\d)", re.sub(r"(?<=\d)\s+(?=\d)", "", text))


