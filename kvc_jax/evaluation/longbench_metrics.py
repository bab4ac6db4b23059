"""LongBench's metrics (Bai et al. 2023, arXiv 2308.14508, section 3), number for number those of its own scorer.

Each takes a prediction, one reference and the classes of the set, and returns a score from 0 to 1.
"""

import collections
import functools
import importlib.util
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from kvc_jax.errors import InputError
from kvc_jax.evaluation.lcs import lcs_items, lcs_length

Metric = Callable[[str, str, Sequence[str]], float]

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.")  # noqa: RUF001
_DROPPED = dict.fromkeys(map(ord, string.punctuation))
_DROPPED_CHINESE = _DROPPED | dict.fromkeys(map(ord, _CHINESE_PUNCTUATION))


def qa_f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
  """F1 of the words, as bags, without case, punctuation and articles."""
  return _f1(_english_words(prediction), _english_words(reference))


def qa_f1_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
  """F1 of jieba's words, as bags, without case and punctuation."""
  return _f1(*([word for raw in _segmented(text) if (word := _plain_chinese(raw))] for text in (prediction, reference)))


def rouge_l(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
  """ROUGE-L as the package `rouge` 1.x gives it: of the distinct words on a longest common subsequence of any
  sentence of the one text with any of the other.

  Sentences end at full stops alone. An empty text scores 0. (The package gives up, and LongBench's scorer says 0,
  where two sentences have some 1,000 words together; here they are scored.)
  """
  hypothesis, truth = _sentences(prediction), _sentences(reference)
  if not hypothesis or not truth:
    return 0.0
  common = {word for b in truth for a in hypothesis for word in lcs_items(b, a)}
  recall = len(common) / len({word for sentence in truth for word in sentence})
  precision = len(common) / len({word for sentence in hypothesis for word in sentence})
  return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def rouge_l_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
  """`rouge_l` of jieba's words."""
  return rouge_l(" ".join(_segmented(prediction)), " ".join(_segmented(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
  """One over the number of classes that the text names, where the right one is among them.

  A class whose name is part of the right one's does not count. As in the original, which shortens the list that
  it walks, the class behind one that was struck out is not looked at.
  """
  named = [name for name in classes if name in prediction]
  at = 0
  while at < len(named):
    if named[at] in reference and named[at] != reference:
      named.remove(named[at])
    at += 1
  return 1.0 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
  """Share of the numbers in the text that are the right one."""
  numbers = re.findall(r"\d+", prediction)
  return numbers.count(str(reference)) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, classes: Sequence[str] = (), *, word: str = "Paragraph ") -> float:
  """Share of the numbers in the text that are the right paragraph's."""
  found = re.search(rf"{word}(\d+)", reference)
  if not found:
    raise InputError(f"a reference is {reference!r}; give {word}and a number, as LongBench does")
  return count(prediction, found[1])


def retrieval_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
  """`retrieval` of 段落."""
  return retrieval(prediction, reference, word="段落")


def code_similarity(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
  """Edit similarity, in whole percent, of the first line that is neither a comment nor a fence.

  That of fuzzywuzzy with python-Levenshtein: insertions and deletions over the lengths' sum. Without
  python-Levenshtein, fuzzywuzzy falls back on difflib and gives other numbers.
  """
  lines = prediction.lstrip("\n").split("\n")
  line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
  if line == reference:
    return 1.0
  if not line or not reference:
    return 0.0
  both = len(line) + len(reference)
  edits = both - 2 * lcs_length(line, reference)
  return round(100 * (1.0 - edits / both)) / 100  # in this order: a half is rounded as its floats fall


def _f1(prediction: list[str], reference: list[str]) -> float:
  same = (collections.Counter(prediction) & collections.Counter(reference)).total()
  if not same:
    return 0.0
  precision, recall = same / len(prediction), same / len(reference)
  return (2 * precision * recall) / (precision + recall)


def _english_words(text: str) -> list[str]:
  return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_DROPPED)).split()


def _plain_chinese(text: str) -> str:
  return "".join(text.lower().translate(_DROPPED_CHINESE).split())


def _sentences(text: str) -> list[list[str]]:
  # A sentence of spaces alone counts, with one empty word.
  return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _segmented(text: str) -> list[str]:
  return list(_jieba().cut(text, cut_all=False))


def check_can_segment(name: str) -> None:
  """Raises InputError where jieba, which a Chinese set is scored with, is missing."""
  if importlib.util.find_spec("jieba") is None:
    raise InputError(f"{name} is scored by the words that jieba finds, and it is missing; run: "
                     "pip install 'kvc_jax[eval]', or leave the Chinese sets out with --set")


@functools.cache
def _jieba() -> Any:
  check_can_segment("a Chinese set")
  import jieba

  jieba.setLogLevel("WARNING")  # its dictionary is loaded at the first text, with a line on stderr
  return jieba
