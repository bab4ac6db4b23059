"""Tokenizer and tokenized text for `scripts/train_recall.py`."""

import dataclasses
import json
import pathlib
import random
from collections.abc import Sequence

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kvc_jax.errors import InputError
from kvc_jax.evaluation import recall_words as words
from kvc_jax.evaluation.haystack import SentenceLengths, is_plain, split_sentences
from kvc_jax.evaluation.recall_episodes import Draw, labels, needles, passages, value_lists, variables

BOS, EOS = 0, 1
_SPECIAL = ("<s>", "</s>")
_WORD_REPEATS = 3000  # so that each of the tasks' words gets a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """A tokenized text.

  Attributes:
    tokens: u16 [n], sentences behind each other, each with the space before it.
    lengths: SentenceLengths.
  """

  tokens: np.ndarray
  lengths: SentenceLengths

  @classmethod
  def load(cls, path: pathlib.Path) -> "Corpus":
    """Reads what `tokenize` wrote.

    Raises:
      InputError: there is no such file, or it is none of ours.
    """
    try:
      with np.load(path) as arrays:
        lengths = SentenceLengths(arrays["lengths"].tolist(), arrays["plain"].tolist())
        return cls(tokens=arrays["tokens"], lengths=lengths)
    except (OSError, ValueError, KeyError) as e:
      raise InputError(f"{path} cannot be read ({e}); make it with `train_recall.py prepare`") from None


def without_held_out(sentences: Sequence[str], held_out: Sequence[str]) -> list[str]:
  """The sentences that are not in the held-out text, wherever they stand."""
  held = frozenset(held_out)
  return [sentence for sentence in sentences if sentence not in held]


def train_tokenizer(sentences: Sequence[str], vocab_size: int) -> Tokenizer:
  """A byte-level BPE in which every digit is one token with a space before it, whether the text has one or not.

  So a value's first digit stands right behind its key and is the same token as the later ones. The
  decoder takes the spaces between digits out again: "4 8 3 9" and "4839" both come back as "4839".
  """
  tokenizer = Tokenizer(models.BPE())
  # One rule a digit: a match without a width would be shorter, but panics at the start of a text.
  tokenizer.normalizer = normalizers.Sequence([
      normalizers.Replace(Regex(f" ?{digit}"), f" {digit}") for digit in range(10)])
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
  tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex(r"(?<=\d) (?=\d)"), "")])
  trainer = trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[AddedToken(token, special=True) for token in _SPECIAL],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
  tokenizer.train_from_iterator([*_task_text(), *sentences], trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
      single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
  return tokenizer


def _task_text() -> list[str]:
  """The tasks' words, often enough, and their wording."""
  listed = [*words.ADJECTIVES, *words.NOUNS, *words.NAMES, *words.LABELS, *words.ORDINALS,
            *(word for category in words.CATEGORIES for word in category)]
  line = "".join(f" {word}" for word in listed) + " 0 1 2 3 4 5 6 7 8 9"
  rng, lengths = random.Random(0), SentenceLengths([20] * 4096, [True] * 4096)
  wording = []
  for _ in range(2000):
    draw = Draw(rng, lengths)
    episodes = (needles(draw, 1), value_lists(draw, 1), variables(draw, 1), passages(draw, 1), labels(draw, 2))
    for episode in episodes:
      for parts in (*episode.statements, *(question.ask for question in episode.questions)):
        wording.append("".join(part for part in parts if isinstance(part, str)))
  return [line] * _WORD_REPEATS + wording


def tokenizer_config(max_length: int) -> dict[str, object]:
  """Contents of tokenizer_config.json."""
  return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _SPECIAL[BOS], "eos_token": _SPECIAL[EOS],
          "clean_up_tokenization_spaces": False, "model_max_length": max_length}


def tokenize(tokenizer: Tokenizer, sentences: Sequence[str]) -> dict[str, np.ndarray]:
  """Arrays of a `Corpus`, for np.savez."""
  encoded = tokenizer.encode_batch([" " + sentence for sentence in sentences], add_special_tokens=False)
  lengths = np.array([len(item.ids) for item in encoded], np.uint16)
  tokens = np.fromiter((i for item in encoded for i in item.ids), np.uint16, int(lengths.sum()))
  return {"tokens": tokens, "lengths": lengths, "plain": np.array([is_plain(sentence) for sentence in sentences])}


def prepare(
    train_text: str, held_out_text: str, folder: pathlib.Path, *, vocab_size: int = 4096,
) -> dict[str, int]:
  """Writes tokenizer.json, train.npz and held_out.npz into the folder.

  Args:
    train_text: sentences that are also in the held-out text are left out.
    held_out_text: the text for evaluation.
    folder: is made if need be.
    vocab_size: of the tokenizer; 2 special tokens and 256 bytes among them.

  Returns:
    Numbers of sentences and tokens, for the log.

  Raises:
    InputError: a text is too short.
  """
  held_out = split_sentences(held_out_text)
  training = without_held_out(split_sentences(train_text), held_out)
  tokenizer = train_tokenizer(training, vocab_size)
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  numbers = {}
  for name, sentences in (("train", training), ("held_out", held_out)):
    arrays = tokenize(tokenizer, sentences)
    SentenceLengths(arrays["lengths"].tolist(), arrays["plain"].tolist())  # refuses too short a text
    np.savez_compressed(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    numbers[f"{name}_sentences"], numbers[f"{name}_tokens"] = len(sentences), len(arrays["tokens"])
  (folder / "prepared.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
  return numbers
