"""Plain text to hide things in, as sentences."""

import bisect
import gzip
import itertools
import pathlib
import random
import re
from collections.abc import Sequence

from kvc_jax.errors import InputError

SHIPPED_TEXT = pathlib.Path(__file__).parents[1] / "assets" / "recall-text" / "a-tale-of-two-cities.txt.gz"
"""Held out: no model of this project was trained on it."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'])\s+")
_PLAIN = str.maketrans({
    "“": '"', "”": '"', "\N{LEFT SINGLE QUOTATION MARK}": "'", "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "—": "--", "_": None, "*": None})
_WORDS = range(4, 61)


def split_sentences(text: str) -> list[str]:
  """Sentences of 4 to 60 words, in order, in ASCII and without digits; the others are left out.

  Digits are what the tasks hide, so the text has none of its own.
  """
  pieces = (" ".join(piece.split()) for piece in _SENTENCE_END.split(text.translate(_PLAIN)))
  return [
      piece for piece in pieces
      if piece.isascii() and not any(c.isdigit() for c in piece) and len(piece.split()) in _WORDS
      and (piece[0].isupper() or piece[0] in "\"'")]


def is_plain(sentence: str) -> bool:
  """Whether a sentence has no quotation marks."""
  return sentence[0].isalpha() and '"' not in sentence


def read_text(path: str | pathlib.Path) -> str:
  """A text file's contents, UTF-8, gzipped where its name ends in .gz.

  Raises:
    InputError: it cannot be read.
  """
  path = pathlib.Path(path)
  try:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
  except (OSError, EOFError, UnicodeDecodeError) as e:
    raise InputError(f"{path} cannot be read as text ({e}); give a UTF-8 file, gzipped if it ends in .gz") from None


def held_out_sentences() -> list[str]:
  """Those of the text that comes with the project."""
  return split_sentences(read_text(SHIPPED_TEXT))


class Window:
  """Consecutive sentences `first` to `last` - 1, of which the first `cut` tokens are too many."""

  def __init__(self, first: int, last: int, cut: int):
    self.first, self.last, self.cut = first, last, cut


class SentenceLengths:
  """How many tokens each sentence has, behind a space.

  Attributes:
    offsets: running sums, one more than there are sentences.
    passages: indices of sentences that are fit to be repeated: plain ones of 8 to 32 tokens.
  """

  def __init__(self, lengths: Sequence[int], plain: Sequence[bool]):
    """Raises InputError where there is too little text to choose from."""
    self.offsets = [0, *itertools.accumulate(int(length) for length in lengths)]
    self.passages = [i for i, length in enumerate(lengths) if 8 <= length <= 32 and plain[i]]
    if len(self.passages) < 32:
      raise InputError(
          f"the text has {len(self.passages)} sentences of 8 to 32 tokens; at least 32 are needed, give more text")

  def window(self, rng: random.Random, tokens: int) -> Window:
    """A random stretch with at least so many tokens (1 or more), and no sentence more than that takes.

    Raises:
      InputError: the whole text is shorter.
    """
    if tokens > self.offsets[-1]:
      raise InputError(
          f"the text has {self.offsets[-1]} tokens, but {tokens} are needed; give a longer text or a shorter length")
    last = rng.randint(bisect.bisect_left(self.offsets, tokens), len(self.offsets) - 1)
    first = bisect.bisect_right(self.offsets, self.offsets[last] - tokens) - 1
    return Window(first, last, self.offsets[last] - self.offsets[first] - tokens)
