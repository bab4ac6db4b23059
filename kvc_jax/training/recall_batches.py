"""Batches of recall samples as token arrays, made by processes that know nothing of JAX."""

import dataclasses
import math
import multiprocessing
import pathlib
import queue
import random
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from kvc_jax.evaluation.recall_episodes import (
  TASKS,
  Draw,
  Episode,
  Parts,
  Question,
  labels,
  lay_out,
  needles,
  passages,
  value_lists,
  variables,
)
from kvc_jax.training.recall_corpus import BOS, EOS, Corpus

WEIGHTS = np.array([0.0, 0.5, 2.0, 4.0], np.float32)
"""Weight in the loss by code."""
NOTHING, TEXT, ANSWER, LOOKUP = range(4)
"""Codes: not counted, running text, an answer's other tokens, an answer's tokens that must be looked up first."""

_SHORT = 512
_AHEAD = 3  # batches per process


class Composer:
  """Makes training and evaluation samples of exact lengths from a tokenized text."""

  def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
    self._corpus, self._tokenizer = corpus, tokenizer
    self._offsets = corpus.lengths.offsets
    self._ids: dict[str, list[int]] = {}
    self._altered: dict[int, list[int]] | None = None

  def training_sample(self, rng: random.Random, length: int, copy_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens u16 [length] and codes u8 [length]; a code is that of the token to be predicted *from* this place.

    Args:
      rng: of this sample.
      length: number of tokens.
      copy_share: of the samples, if they are short, that are one stretch of text or of random tokens, repeated.
    """
    if length <= _SHORT and rng.random() < copy_share:
      return self._copy_sample(rng, length)
    self._altered = {} if rng.random() < _ALTERED else None
    draw = Draw(rng, self._corpus.lengths, digits=rng.choice(_DIGITS), alike=_ALIKE if rng.random() < _ALIKE else 0.0)
    tail = length - 64
    busy = int(length * (rng.uniform(0.35, 0.75) if length <= _SHORT else math.exp(rng.uniform(-2.5, -0.5))))
    kinds = [rng.choice(_KINDS)] if rng.random() < 0.5 else list(_KINDS)
    left = dict(_MOST_EPISODES)
    statements: list[list[int]] = []
    questions: list[tuple[list[int], list[int]]] = []
    used = tries = 0
    while (open_kinds := [kind for kind in kinds if left[kind]]) and tries < _MOST_TRIES:
      tries += 1
      kind = rng.choice(open_kinds)
      episode = _some_episode(rng, draw, kind, (busy - used) if used else tail)
      self._alter(rng, episode)
      told, asked = self._encoded(episode)
      size = sum(map(len, told)) + sum(len(tokens) for tokens, _ in asked)
      if used + size > (busy if used else tail):
        if used:
          break
        continue  # too large for a short sample
      left[kind] -= 1
      statements, questions, used = statements + told, questions + asked, used + size
      if used >= busy * 0.9:
        break
    rng.shuffle(questions)
    self._altered = None
    return self._assembled(rng, length, statements, questions, end=True)

  def evaluation_sample(self, rng: random.Random, task: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A sample as it is evaluated: one task, one question, `length` tokens with the answer; only its codes count."""
    episode = TASKS[task](Draw(rng, self._corpus.lengths))
    chosen = dataclasses.replace(episode, questions=(rng.choice(episode.questions),))
    told, asked = self._encoded(chosen)
    tokens, codes = self._assembled(rng, length, told, asked, end=False)
    return tokens, np.where(codes >= ANSWER, codes, NOTHING).astype(np.uint8)

  def _alter(self, rng: random.Random, episode: Episode) -> None:
    """Replaces some tokens of the sentences to be repeated, if this sample does.

    The model soon knows the text that it is trained on; a sentence as it stands could then be told without a look, and
    so could what follows a word that stands in it twice. On other text such places are told apart only by the tokens
    before, as many as it takes; so runs of an altered passage come again elsewhere.
    """
    if self._altered is None:
      return
    told: list[list[int]] = []
    for part in (part for parts in episode.statements for part in parts if isinstance(part, int)):
      ids = self._corpus.tokens[self._offsets[part]:self._offsets[part + 1]].tolist()
      ids = [
          rng.randrange(EOS + 1, self._tokenizer.get_vocab_size()) if place and rng.random() < _ALTERED_TOKENS else i
          for place, i in enumerate(ids)]
      told.append(ids)
      for _ in range(rng.choice(_ECHOES)):
        _echo(rng, rng.choice((ids, rng.choice(told))), ids)
      self._altered[part] = ids

  def _copy_sample(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
    period = rng.randint(16, length // 2)
    if rng.random() < 0.5:
      start = rng.randrange(len(self._corpus.tokens) - period)
      stretch = self._corpus.tokens[start:start + period]
    else:
      stretch = np.array([rng.randrange(EOS + 1, self._tokenizer.get_vocab_size()) for _ in range(period)], np.uint16)
    tokens = np.resize(stretch, length)
    tokens[0] = BOS
    codes = np.full(length, ANSWER, np.uint8)
    codes[:period] = TEXT
    codes[-1] = NOTHING
    return tokens, codes

  def _assembled(
      self, rng: random.Random, length: int, statements: list[list[int]], questions: list[tuple[list[int], list[int]]],
      *, end: bool,
  ) -> tuple[np.ndarray, np.ndarray]:
    closing = [EOS] if end else []
    taken = 1 + sum(map(len, statements)) + sum(len(tokens) for tokens, _ in questions) + len(closing)
    window = self._corpus.lengths.window(rng, length - taken)
    pieces: list[Any] = [[BOS]]
    laid = lay_out(rng, range(len(statements)), window)  # type: ignore[arg-type]
    for item in laid:
      if isinstance(item, range):
        start, stop = self._offsets[item.start], self._offsets[item.stop]
        pieces.append(self._corpus.tokens[start + (window.cut if item.start == window.first else 0):stop])
      else:
        pieces.append(statements[item])  # type: ignore[call-overload]
    for tokens, _ in questions:
      pieces.append(tokens)
    pieces.append(closing)
    row = np.concatenate([np.asarray(piece, np.uint16) for piece in pieces])
    codes = np.full(length + 1, TEXT, np.uint8)
    at = length - len(closing)
    for tokens, marks in reversed(questions):
      at -= len(tokens)
      codes[at:at + len(tokens)] = marks
    return row, np.append(codes[1:length], NOTHING).astype(np.uint8)

  def _encoded(self, episode: Episode) -> tuple[list[list[int]], list[tuple[list[int], list[int]]]]:
    return [self._tokens(parts) for parts in episode.statements], [self._question(q) for q in episode.questions]

  def _question(self, question: Question) -> tuple[list[int], list[int]]:
    tokens = self._tokens(question.ask)
    codes = [TEXT] * len(tokens)
    for place, part in enumerate(question.answer):
      ids = self._part(part)
      first = LOOKUP if place in question.lookups else ANSWER
      tokens, codes = [*tokens, *ids], [*codes, first, *[ANSWER] * (len(ids) - 1)]
    return tokens, codes

  def _tokens(self, parts: Parts) -> list[int]:
    return [i for part in parts for i in self._part(part)]

  def _part(self, part: str | int) -> list[int]:
    if isinstance(part, int):
      if self._altered is not None and part in self._altered:
        return self._altered[part]
      return self._corpus.tokens[self._offsets[part]:self._offsets[part + 1]].tolist()
    ids = self._ids.get(part)
    if ids is None:
      ids = self._ids[part] = self._tokenizer.encode(part, add_special_tokens=False).ids
    return ids


_KINDS = ("needles", "values", "variables", "passages", "passages", "labels")
_MOST_EPISODES = {"needles": 40, "values": 20, "variables": 4, "passages": 20, "labels": 1}
"""Of each kind in one sample: two mappings of labels would contradict each other, and variables' names are few."""
_MOST_TRIES = 64
_DIGITS = (3, 4, 4, 4, 5, 6)
"""Of a sample's values. If all had four, a head of its own might come to look the last one up."""
_ALIKE = 0.6
"""Share of the samples in which values begin alike, and of such values in them."""
_ALTERED, _ALTERED_TOKENS = 0.75, 0.2
"""Share of the samples that alter their passages, and of a passage's tokens that are replaced at random."""
_ECHOES, _ECHO_TOKENS = (0, 0, 1, 2, 3), (1, 1, 2, 3, 4, 6)
"""How many runs of an altered passage also stand elsewhere in it or in an earlier one, and of how many tokens."""


def _echo(rng: random.Random, source: list[int], passage: list[int]) -> None:
  """Puts a run of the source's tokens, other ones behind it, in place of as many of the passage."""
  size = min(rng.choice(_ECHO_TOKENS), len(source) // 2, len(passage) // 2)
  start, place = rng.randrange(len(source) - size), rng.randint(0, len(passage) - size)
  passage[place:place + size] = source[start:start + size]


def _some_episode(rng: random.Random, draw: Draw, kind: str, room: int) -> Episode:
  """An episode of the kind, of a random size that has a chance to fit."""
  def count(most: int, tokens: int) -> int:
    return rng.randint(1, max(1, min(most, room // tokens)))

  match kind:
    case "needles":
      return needles(draw, count(16, 26))
    case "values":
      values = rng.choice((2, 3, 4, 4))
      return value_lists(draw, count(2, values * 25), values)
    case "variables":
      hops = rng.choice((0, 1, 2, 2, 3))
      return variables(draw, count(4, (hops + 1) * 18), hops)
    case "passages":
      return passages(draw, count(4, 56))
    case _:
      examples = rng.choice((2, 3, 4, 4))
      asked = rng.randint(1, 4)
      return labels(draw, max(2, count(6, examples * 7 + asked * 6)), examples, asked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
  """A batch to be made: of training samples, or of one task's evaluation samples."""

  seed: int
  number: int
  batch: int
  length: int
  task: str | None = None
  copy_share: float = 0.0


def make_batch(composer: Composer, order: Order) -> tuple[np.ndarray, np.ndarray]:
  """Tokens u16 [batch, length] and codes u8 [batch, length]; the same for the same order."""
  rows = []
  for row in range(order.batch):
    rng = random.Random(f"{order.seed} {order.number} {row} {order.length} {order.task}")
    if order.task is None:
      rows.append(composer.training_sample(rng, order.length, order.copy_share))
    else:
      rows.append(composer.evaluation_sample(rng, order.task, order.length))
  return np.stack([tokens for tokens, _ in rows]), np.stack([codes for _, codes in rows])


class BatchMakers:
  """Processes that make batches ahead; they come back in the order asked for.

  `workers=0` makes them where `take` is called.
  """

  def __init__(self, folder: pathlib.Path, split: str, workers: int):
    self._orders: list[Order] = []
    self._done: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    self._asked = self._taken = 0
    self.ahead = max(1, workers * _AHEAD)
    self._local = load_composer(folder, split) if not workers else None
    if workers:
      context = multiprocessing.get_context("spawn")
      self._todo, self._results = context.Queue(), context.Queue()
      self._processes = [
          context.Process(target=_work, args=(folder, split, self._todo, self._results), daemon=True)
          for _ in range(workers)]
      for process in self._processes:
        process.start()

  def ask(self, order: Order) -> None:
    """Orders a batch."""
    if self._local:
      self._orders.append(order)
    else:
      self._todo.put((self._asked, order))
    self._asked += 1

  @property
  def waiting(self) -> int:
    """Batches asked for and not taken."""
    return self._asked - self._taken

  def take(self) -> tuple[np.ndarray, np.ndarray]:
    """The next batch.

    Raises:
      RuntimeError: a process that makes batches has ended.
    """
    if self._local:
      self._taken += 1
      return make_batch(self._local, self._orders.pop(0))
    while self._taken not in self._done:
      try:
        number, batch = self._results.get(timeout=20)
        self._done[number] = batch
      except queue.Empty:
        if not all(process.is_alive() for process in self._processes):
          raise RuntimeError("a process that makes batches has ended; see its message above") from None
    self._taken += 1
    return self._done.pop(self._taken - 1)

  def close(self) -> None:
    """Ends the processes."""
    if not self._local:
      for process in self._processes:
        process.terminate()
      for process in self._processes:
        process.join()


def load_composer(folder: pathlib.Path, split: str) -> Composer:
  """A composer for `train` or `held_out` of a prepared folder."""
  return Composer(Corpus.load(folder / f"{split}.npz"), Tokenizer.from_file(str(folder / "tokenizer.json")))


def _work(folder: pathlib.Path, split: str, todo: Any, results: Any) -> None:
  composer = load_composer(folder, split)
  while True:
    number, order = todo.get()
    results.put((number, make_batch(composer, order)))


