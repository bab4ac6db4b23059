"""What the recall tasks hide in a text and what they ask: the same for training and for evaluation.

After RULER (Hsieh et al. 2024, arXiv 2404.06654): needles (one, several, several values of one key), variable
tracking; and beside them passages to repeat and few-shot labels. Values have four digits (3 to 6 in training). In two
thirds of the samples a value stands right behind its key, in the others " is" or " =" is between; a
question ends as the statement it asks for begins.

Text comes in parts, each beginning with a space, a line break or punctuation, or being digits, so that the
tokens of a text are those of its parts. A part that is a number stands for that sentence of the haystack.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

from kvc_jax.evaluation import recall_words as words
from kvc_jax.evaluation.haystack import SentenceLengths, Window

Parts = tuple[str | int, ...]

WORDING = 3
"""Goes up when questions of the same seed change; results of another are not gone on with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """How the prompt ends, and what is to follow. `lookups` index the parts of the answer that must be looked up."""

  ask: Parts
  answer: Parts
  lookups: frozenset[int] = frozenset({0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
  """Statements to hide anywhere, and questions about them."""

  statements: tuple[Parts, ...]
  questions: tuple[Question, ...]


class Draw:
  """Random choices for one sample: none comes twice, and the wording stays the same.

  Args:
    rng: of the sample.
    haystack: lengths of its sentences.
    digits: of a value.
    alike: share of the values that begin as an earlier one does, so that digits do not tell what follows them.
  """

  def __init__(self, rng: random.Random, haystack: SentenceLengths, *, digits: int = 4, alike: float = 0.0):
    self.rng, self._haystack, self._length, self._alike = rng, haystack, digits, alike
    self._values: list[str] = []
    self._used: set[object] = set()
    self.connector: Parts = rng.choices(((), (" is",), (" =",)), (65, 20, 15))[0]
    self.subject = rng.choice(words.SUBJECTS)
    self.opening = rng.choice((" The", " Note: the", " Remember: the", " Here the"))
    self.asking = rng.choice(("\nQuestion: the", "\nRecall: the", "\nAnswer: the"))

  def _new(self, draw: Callable[[], object]) -> object:
    for _ in range(10_000):
      value = draw()
      if value not in self._used:
        self._used.add(value)
        return value
    raise ValueError("a sample asks for more different words than there are")

  def key(self) -> Parts:
    """Two words."""
    choice = self.rng.choice
    return self._new(lambda: (" " + choice(words.ADJECTIVES), " " + choice(words.NOUNS)))  # type: ignore[return-value]

  def name(self) -> str:
    """Of a variable."""
    return self._new(lambda: " " + self.rng.choice(words.NAMES))  # type: ignore[return-value]

  def value(self) -> Parts:
    """Digits; the first brings the space."""
    digits: str = self._new(self._digits)  # type: ignore[assignment]
    self._values.append(digits)
    return (" " + digits[0], *digits[1:])

  def _digits(self) -> str:
    digits = f"{self.rng.randrange(10**self._length):0{self._length}d}"
    if self._alike and self._values and self.rng.random() < self._alike:
      shared = self._length - self.rng.choice((1, 1, 2, 3))
      return self.rng.choice(self._values)[:shared] + digits[shared:]
    return digits

  def passage(self) -> int:
    """A sentence of the haystack."""
    return self._new(lambda: self.rng.choice(self._haystack.passages))  # type: ignore[return-value]


def needles(draw: Draw, count: int) -> Episode:
  """`count` keys with a value each; any of them may be asked for."""
  statements, questions = [], []
  for _ in range(count):
    key, value = draw.key(), draw.value()
    told = (f" {draw.subject} of", *key, *draw.connector)
    statements.append((draw.opening, *told, *value, "."))
    questions.append(Question(ask=(draw.asking, *told), answer=value))
  return Episode(statements=tuple(statements), questions=tuple(questions))


def value_lists(draw: Draw, count: int, values: int = len(words.ORDINALS)) -> Episode:
  """`count` keys with several numbered values each, in statements of their own; all of a key's are asked for.

  The question says how many: without that, whether another follows is a search of its own at each value's end. And it
  ends as all of the statements do before their values, so that it points to each of these.
  """
  statements, questions = [], []
  for _ in range(count):
    key, answer, lookups = draw.key(), (), set()  # type: tuple[Parts, Parts, set[int]]
    for ordinal in words.ORDINALS[:values]:
      told = (f" {ordinal}", *key, *draw.connector)
      value = draw.value()
      statements.append((draw.opening, f" {draw.subject} of", *told, *value, "."))
      answer += (",", *told) if answer else told
      lookups.add(len(answer))
      answer += value
    questions.append(Question(
        ask=("\nList: all", f" {words.ORDINALS[values - 1]}", " of", *key, *draw.connector), answer=answer,
        lookups=frozenset(lookups)))
  return Episode(statements=tuple(statements), questions=tuple(questions))


def variables(draw: Draw, count: int, hops: int = 2) -> Episode:
  """`count` chains of variables, each set to the next and the last to a value; the answer retells the chain."""
  statements, questions = [], []
  for _ in range(count):
    names = [draw.name() for _ in range(hops + 1)]
    value = draw.value()
    answer: Parts = ()
    lookups = set()
    for name, target in zip(names, [(name,) for name in names[1:]] + [value], strict=True):
      statements.append((" VAR", name, *draw.connector, *target, "."))
      if answer:
        answer += (".", " VAR", name, *draw.connector)
      lookups.add(len(answer))
      answer += target
    questions.append(Question(
        ask=("\nTrace: VAR", names[0], *draw.connector), answer=answer, lookups=frozenset(lookups)))
  return Episode(statements=tuple(statements), questions=tuple(questions))


def passages(draw: Draw, count: int) -> Episode:
  """`count` sentences of text from elsewhere, each with a name, to be repeated word for word."""
  statements, questions = [], []
  colon = (":",) if draw.connector else ()
  for _ in range(count):
    told, text = (*draw.key(), *colon), draw.passage()
    statements.append((" Passage", *told, text))
    questions.append(Question(ask=("\nRepeat: Passage", *told), answer=(text,)))
  return Episode(statements=tuple(statements), questions=tuple(questions))


def labels(draw: Draw, categories: int, examples: int = 4, asked: int = 1) -> Episode:
  """Words of `categories` kinds, each kind with a label of this sample's own; `asked` new words are to be labelled.

  A label has two words: where the whole prompt is prefilled before it is compressed, an answer's first token comes from
  the full cache and tells nothing about what was kept.
  """
  statements, questions = [], []
  chosen, named = draw.rng.sample(words.CATEGORIES, categories), draw.rng.sample(words.LABELS, 2 * categories)
  for category, *label in zip(chosen, named[::2], named[1::2], strict=True):
    parts = tuple(f" {word}" for word in label)
    chosen_words = draw.rng.sample(category, examples + asked)
    for word in chosen_words[:examples]:
      statements.append((" Sort", f" {word}", *draw.connector, *parts, "."))
    for word in chosen_words[examples:]:
      questions.append(Question(ask=("\nSort", f" {word}", *draw.connector), answer=parts))
  return Episode(statements=tuple(statements), questions=tuple(questions))


TASKS: Mapping[str, Callable[[Draw], Episode]] = {
    "single": lambda draw: needles(draw, 1),
    "multi_key": lambda draw: needles(draw, 8),
    "multi_value": lambda draw: value_lists(draw, 1),
    "variables": lambda draw: variables(draw, 2),
    "repeat": lambda draw: passages(draw, 2),
    "labels": lambda draw: labels(draw, len(words.CATEGORIES)),
}
"""As evaluated; one question of each sample is asked."""


def lay_out(rng: random.Random, statements: Sequence[Parts], window: Window) -> list[range | Parts]:
  """The sentences of the window, in order, with the statements at random places between them, in random order."""
  gaps = sorted(rng.choices(range(window.first + 1, window.last + 1), k=len(statements)))
  laid: list[range | Parts] = []
  start = window.first
  for gap, statement in zip(gaps, rng.sample(statements, len(statements)), strict=True):
    if gap > start:
      laid.append(range(start, gap))
      start = gap
    laid.append(statement)
  if start < window.last:
    laid.append(range(start, window.last))
  return laid
