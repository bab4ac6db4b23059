"""Text to token ids and back, over the tokenizer files of a model's folder."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvc_jax.errors import InputError

_VOCABULARY = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    _VOCABULARY, _CONFIG, "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json")
"""What belongs to a tokenizer in a model's folder; some of it is optional."""

_JSON_FILES = tuple(name for name in TOKENIZER_FILES if name.endswith(".json"))
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_CONTEXT_TOKENS = 16  # of a prompt; enough for any character, all of whose bytes may be tokens
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def check_tokenizer_files(folder: str | pathlib.Path) -> None:
  """Checks that `folder` has a tokenizer and that its JSON files are JSON.

  Raises:
    InputError: a file is missing or damaged; the message names it.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise InputError(f"{folder} is {'a file' if folder.exists() else 'missing'}; give a folder with a model")
  for name in (_VOCABULARY, _CONFIG):
    if not (folder / name).is_file():
      raise InputError(f"{folder} lacks {name}; {_how_to_get(folder, name)}")
  for name in _JSON_FILES:
    if (folder / name).is_file():
      _read_json(folder / name)


def _how_to_get(folder: pathlib.Path, name: str) -> str:
  if name == _VOCABULARY and (folder / "tokenizer.model").is_file():
    return "make it from tokenizer.model with transformers (save_pretrained, with sentencepiece installed)"
  return "copy it from the model's source"


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as e:
    raise InputError(f"{path} is damaged ({_one_line(e)}); copy it again from its source") from None
  if not isinstance(value, dict):
    raise InputError(f"{path} holds no JSON object; copy it again from its source")
  return value


class Tokenizer:
  """A model's tokenizer.

  Attributes:
    bos_id: token that starts a sequence, or None.
    eos_ids: tokens that end a sequence, from generation_config.json, config.json and the tokenizer.
    vocab_size: number of ids the tokenizer knows, added tokens included.
  """

  def __init__(self, backend: Any, eos_ids: Iterable[int] = ()):
    """Wraps a transformers fast tokenizer; `from_folder` is the usual way to one."""
    self._backend = backend
    # Our engine checks lengths itself; past this number the backend would log a warning.
    backend.model_max_length = 1 << 30
    self.bos_id: int | None = backend.bos_token_id
    own = () if backend.eos_token_id is None else (backend.eos_token_id,)
    self.eos_ids = frozenset((*own, *eos_ids))
    self.vocab_size: int = len(backend)
    self._special_ids = frozenset(i for i, token in backend.added_tokens_decoder.items() if token.special)
    self._rust = _rust_of(backend)
    self._texts: dict[tuple[int, bool], str] = {}

  @classmethod
  def from_folder(cls, path: str | pathlib.Path) -> "Tokenizer":
    """Loads the tokenizer of a model's folder; nothing is downloaded and no code of the folder is run.

    Raises:
      InputError: a file is missing or damaged; the message names it.
    """
    folder = pathlib.Path(path).absolute()
    check_tokenizer_files(folder)
    eos_ids = _eos_ids(folder)
    try:
      backend = _transformers().AutoTokenizer.from_pretrained(
          str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # the Rust side raises bare Exception
      raise InputError(
          f"{folder / _VOCABULARY} cannot be used ({_one_line(e)}); copy it again from its source") from None
    return cls(backend, eos_ids)

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of `text`, with BOS and the like where the tokenizer adds them.

    With `add_special_tokens` the result is never empty: an empty text gives [BOS].

    Raises:
      InputError: `text` is not valid Unicode text, or is empty and there is no BOS token.
    """
    if not isinstance(text, str):
      raise InputError(f"a text is needed, not {type(text).__name__}")
    try:
      ids = self._backend.encode(text, add_special_tokens=add_special_tokens)
    except (UnicodeError, TypeError):
      raise InputError("the text is not valid Unicode (a lone surrogate); decode it with errors='replace'") from None
    if ids or not add_special_tokens:
      return ids
    if self.bos_id is None:
      raise InputError("the text is empty and the tokenizer has no BOS token; give some text")
    return [self.bos_id]

  def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    """The text of `ids`, exactly (spaces before punctuation stay).

    Ids beyond the vocabulary give no text: embeddings are often padded with rows for them.

    Raises:
      InputError: an id is negative.
    """
    ids = [int(i) for i in ids]
    if ids and min(ids) < 0:
      raise InputError(f"token id {min(ids)} is negative")
    if self._rust is not None:
      return self._rust.decode(ids, skip_special_tokens=skip_special_tokens)
    return self._backend.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

  def decode_one(self, token_id: int, skip_special_tokens: bool = True) -> str:
    """As `decode` of a single id, remembered."""
    key = token_id, skip_special_tokens
    if key not in self._texts:
      self._texts[key] = self.decode((token_id,), skip_special_tokens)
    return self._texts[key]

  @property
  def has_chat_template(self) -> bool:
    """Whether the folder brings a chat template."""
    return bool(self._backend.chat_template)

  def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, ready for the assistant's answer.

    Args:
      messages: each with "role" and "content".

    Raises:
      InputError: the folder has no chat template, or the template refuses the messages.
    """
    if not self.has_chat_template:
      raise InputError(
          "the model's folder has no chat template; give a plain prompt, or use an instruction-tuned model")
    if not messages:
      raise InputError("the conversation is empty; give at least one message")
    for message in messages:
      if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
        raise InputError(f"a message is {message!r}; each needs a 'role' and a 'content' text")
    try:
      return self._backend.apply_chat_template(
          [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as e:  # a template raises what it likes
      raise InputError(f"the chat template refuses the messages ({_one_line(e)})") from None

  def token(self, token_id: int) -> str | None:
    """The vocabulary's entry for an id, such as "▁the"; None if there is none."""
    return self._backend.convert_ids_to_tokens(token_id) if token_id >= 0 else None

  def is_special(self, token_id: int) -> bool:
    """Whether `decode` leaves the token out by default."""
    return token_id in self._special_ids


class IncrementalDecoder:
  """Text of a growing sequence of tokens, piece by piece.

  The pieces together, with that of `flush`, are `tokenizer.decode` of all ids. A
  piece is held back while its last character may be incomplete. Raw-byte tokens
  are held back until another kind of token follows, because one invalid byte
  changes how the whole run of them decodes.

  Each step decodes only the tokens since the last complete text and those of
  the piece before it, which is enough context for the rule that drops the space
  at the start of a text.
  """

  def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, context: Sequence[int] = ()):
    """Starts a text, or goes on from the tokens of `context`, a prompt.

    Behind a prompt the first piece keeps its leading space: prompt and pieces
    put together read as one text.
    """
    self._tokenizer = tokenizer
    self._skip_special_tokens = skip_special_tokens
    self._context = [i for i in context[-_CONTEXT_TOKENS:] if not tokenizer.is_special(i)]
    self._context_text = self._decode(self._context)
    self._pending: list[int] = []

  def add(self, token_id: int) -> str:
    """Takes the next token and returns the text that is now certain; may be empty."""
    token = self._tokenizer.token(token_id)
    if token is None or (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
      return ""
    self._pending.append(token_id)
    if _BYTE_TOKEN.fullmatch(token):
      return ""
    text = self._decode(self._context + self._pending)
    return "" if text.endswith(_INCOMPLETE) else self._release(text)

  def peek(self) -> str:
    """What `flush` would return now; later tokens may change it."""
    return self._decode(self._context + self._pending)[len(self._context_text):] if self._pending else ""

  def flush(self) -> str:
    """Returns what was held back; an incomplete character comes as U+FFFD."""
    return self._release(self._decode(self._context + self._pending)) if self._pending else ""

  def _release(self, text: str) -> str:
    piece = text[len(self._context_text):]
    if not piece:  # a context without text would make the next piece the start of a text
      return ""
    self._context, self._pending = self._pending, []
    self._context_text = self._decode(self._context)
    return piece

  def _decode(self, ids: list[int]) -> str:
    if len(ids) == 1:
      return self._tokenizer.decode_one(ids[0], self._skip_special_tokens)
    return self._tokenizer.decode(ids, self._skip_special_tokens)


def _rust_of(backend: Any) -> Any:
  """What `decode` of transformers ends in, after too many checks for each token apart; None for a kind with its own."""
  base = _transformers().PreTrainedTokenizerFast
  kind = type(backend)
  plain = isinstance(backend, base) and kind.decode is base.decode and kind._decode is base._decode
  return backend.backend_tokenizer if plain else None


def _transformers() -> Any:
  # Imported late, as it takes seconds; it would advise on stderr that there is no PyTorch.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  return transformers


def _eos_ids(folder: pathlib.Path) -> tuple[int, ...]:
  """Ids that end a sequence as the first of the two config files that names some."""
  for name in ("generation_config.json", "config.json"):
    if not (folder / name).is_file():
      continue
    eos = _read_json(folder / name).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) for i in ids):
      raise InputError(f"{folder / name}: eos_token_id is {eos!r}; give a token id or a list of them")
    if ids:
      return tuple(ids)
  return ()


def _one_line(e: Exception) -> str:
  return " ".join(str(e).split())[:200] or type(e).__name__
