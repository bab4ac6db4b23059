"""Converts models of llama2.c (version 0 export) into Hugging Face folders."""

import dataclasses
import json
import math
import pathlib
import shutil
import struct
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from kvc_jax.checkpoint.staging import staged_folder
from kvc_jax.errors import InputError

_HEADER = struct.Struct("<7i")
_VERSIONED_MAGIC = 0x616B3432  # "ak42": llama2.c's version 1 and 2 exports
_RMS_NORM_EPS = 1e-5  # both fixed in llama2.c's run.c
_ROPE_THETA = 10_000.0

_UNK, _BOS, _EOS = range(3)
_FIRST_BYTE, _FIRST_PIECE = 3, 259
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Header:
  dim: int
  hidden_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  vocab_size: int
  max_seq_len: int
  tied: bool

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads


def convert_llama2c(
    weights: str | pathlib.Path, tokenizer: str | pathlib.Path, dst: str | pathlib.Path, *, overwrite: bool = False,
) -> pathlib.Path:
  """Writes a Hugging Face folder from llama2.c's files.

  Args:
    weights: a version 0 export (`stories15M.bin` and its like), float32.
    tokenizer: its tokenizer (`tokenizer.bin`, `tok512.bin`).
    dst: folder to write; appears complete or not at all.
    overwrite: replace `dst` if it is a model's folder.

  Returns:
    The absolute path of `dst`.

  Raises:
    InputError: a file is missing, cut off or not of that format, the two do not
      belong together, or `dst` exists or cannot be written.
  """
  weights, tokenizer, dst = (pathlib.Path(path).absolute() for path in (weights, tokenizer, dst))
  header = _read_header(weights)
  pieces, scores = _read_vocabulary(tokenizer, header.vocab_size)
  tensors = _hf_tensors(weights, header)
  backend = _build_tokenizer(tokenizer, pieces, scores)
  with staged_folder(dst, overwrite=overwrite, size=weights.stat().st_size) as folder:
    backend.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", _model_config(header))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(header))
    _write_json(folder / "generation_config.json", _generation_config())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors keeps its files to their owner.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
  return dst


def _open_error(path: pathlib.Path, e: OSError) -> InputError:
  return InputError(f"{path} cannot be read ({e.strerror or e}); check the path")


def _read_header(path: pathlib.Path) -> _Header:
  try:
    with path.open("rb") as stream:
      raw = stream.read(_HEADER.size)
  except OSError as e:
    raise _open_error(path, e) from None
  if len(raw) < _HEADER.size:
    raise InputError(f"{path} is cut off: {len(raw)} bytes, less than the header; copy it again from its source")
  values = _HEADER.unpack(raw)
  if values[0] == _VERSIONED_MAGIC:
    raise InputError(f"{path} is an export of version {values[1]}; export the model with `--version 0`")
  dim, hidden_dim, num_layers, num_heads, num_kv_heads, vocab_size, max_seq_len = values
  header = _Header(
      dim=dim, hidden_dim=hidden_dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
      vocab_size=abs(vocab_size), max_seq_len=max_seq_len, tied=vocab_size > 0)
  if min(*values[:5], header.vocab_size, max_seq_len) < 1 or dim % (2 * num_heads) or num_heads % num_kv_heads:
    raise InputError(f"{path} is no llama2.c export of version 0: its header is {values}; check the file")
  return header


def _layout(header: _Header) -> list[tuple[str, tuple[int, ...]]]:
  """The file's tensors in order. A leading axis of length L is the layers'."""
  layers, dim, hidden = header.num_layers, header.dim, header.hidden_dim
  kv_dim = header.num_kv_heads * header.head_dim
  rope = (header.max_seq_len, header.head_dim // 2)
  layout: list[tuple[str, tuple[int, ...]]] = [
      ("embed", (header.vocab_size, dim)),
      ("attention_norm", (layers, dim)),
      ("wq", (layers, dim, dim)),
      ("wk", (layers, kv_dim, dim)),
      ("wv", (layers, kv_dim, dim)),
      ("wo", (layers, dim, dim)),
      ("ffn_norm", (layers, dim)),
      ("w1", (layers, hidden, dim)),
      ("w2", (layers, dim, hidden)),
      ("w3", (layers, hidden, dim)),
      ("norm", (dim,)),
      ("freq_cis_real", rope),
      ("freq_cis_imag", rope),
  ]
  return layout if header.tied else [*layout, ("wcls", (header.vocab_size, dim))]


def _read_arrays(path: pathlib.Path, header: _Header) -> dict[str, np.ndarray]:
  layout = _layout(header)
  wanted = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in layout)
  size = path.stat().st_size
  if size != wanted:
    fault = "is cut off" if size < wanted else "is too long"
    raise InputError(
        f"{path} {fault}: it has {size} bytes, its header asks for {wanted}; copy it again from its source")
  arrays: dict[str, np.ndarray] = {}
  offset = _HEADER.size
  for name, shape in layout:
    arrays[name] = np.memmap(path, "<f4", "r", offset, shape)
    offset += arrays[name].nbytes
  return arrays


# Hugging Face's name in a layer for each of llama2.c's tensors.
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


def _hf_tensors(path: pathlib.Path, header: _Header) -> dict[str, np.ndarray]:
  arrays = _read_arrays(path, header)
  tensors = {"model.embed_tokens.weight": arrays["embed"], "model.norm.weight": arrays["norm"]}
  if not header.tied:
    tensors["lm_head.weight"] = arrays["wcls"]
  for name, hf_name in _LAYER_NAMES.items():
    for layer, weight in enumerate(arrays[name]):
      if name in ("wq", "wk"):
        weight = _pairs_to_halves(weight, header.head_dim)
      tensors[f"model.layers.{layer}.{hf_name}.weight"] = weight
  return tensors


def _pairs_to_halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
  """Reorders the rows of each head, [out, in]: llama2.c rotates dimensions (2i, 2i + 1), Hugging Face (i, i + D/2)."""
  rows = np.arange(weight.shape[0]).reshape(-1, head_dim // 2, 2)
  return np.ascontiguousarray(weight[rows.transpose(0, 2, 1).ravel()])


def _read_vocabulary(path: pathlib.Path, size: int) -> tuple[list[str], list[float]]:
  """Pieces in Hugging Face's spelling and their scores, by token id."""
  try:
    data = path.read_bytes()
  except OSError as e:
    raise _open_error(path, e) from None
  pieces, scores, offset = [], [], 4  # behind the longest piece's length
  for token in range(size):
    if offset + 8 > len(data):
      raise InputError(f"{path} ends at token {token}, but the weights have {size}; give the tokenizer of this model")
    score, length = struct.unpack_from("<fi", data, offset)
    offset += 8
    if length < 0 or offset + length > len(data) or not np.isfinite(score):
      raise InputError(f"{path} is cut off or no llama2.c tokenizer (token {token}); copy it again from its source")
    pieces.append(_spelling(path, token, data[offset : offset + length]))
    scores.append(score)
    offset += length
  if offset != len(data):
    raise InputError(f"{path} has more tokens than the {size} of the weights; give the tokenizer of this model")
  _check_pieces(path, pieces)
  return pieces, scores


def _spelling(path: pathlib.Path, token: int, raw: bytes) -> str:
  if token < _FIRST_BYTE:
    return ("<unk>", "<s>", "</s>")[token]  # the export writes "\n<s>\n"
  try:
    return raw.decode("utf-8").replace(" ", _SPACE)
  except UnicodeDecodeError:
    raise InputError(f"{path}: token {token} ({raw!r}) is not UTF-8; copy it again from its source") from None


def _check_pieces(path: pathlib.Path, pieces: list[str]) -> None:
  byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
  if pieces[_FIRST_BYTE:_FIRST_PIECE] != byte_tokens:
    raise InputError(
        f"{path} has no byte tokens at ids {_FIRST_BYTE} to {_FIRST_PIECE - 1}; "
        "only sentencepiece vocabularies with byte fallback are supported")
  if len(set(pieces)) != len(pieces):
    twice = next(piece for i, piece in enumerate(pieces) if piece in pieces[:i])
    raise InputError(f"{path} has the token {twice!r} twice; copy it again from its source")


def _build_tokenizer(path: pathlib.Path, pieces: list[str], scores: list[float]) -> Tokenizer:
  """The byte-pair tokenizer of Llama 2 over the vocabulary."""
  ids = {piece: token for token, piece in enumerate(pieces)}
  model = models.BPE(
      vocab=ids, merges=_merges(pieces, scores, ids), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  tokenizer = Tokenizer(model)
  tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
  tokenizer.decoder = decoders.Sequence([
      decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
  tokenizer.post_processor = processors.TemplateProcessing(
      single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", _BOS)])
  tokenizer.add_special_tokens([AddedToken(pieces[i], normalized=False, special=True) for i in (_UNK, _BOS, _EOS)])
  return tokenizer


def _merges(pieces: list[str], scores: list[float], ids: dict[str, int]) -> list[tuple[str, str]]:
  """All ways to make a piece of two, best piece first: sentencepiece merges the pair whose result scores highest."""
  by_score = sorted(range(_FIRST_PIECE, len(pieces)), key=lambda token: (-scores[token], token))
  return [
      (piece[:cut], piece[cut:])
      for piece in map(pieces.__getitem__, by_score)
      for cut in range(1, len(piece))
      if piece[:cut] in ids and piece[cut:] in ids]


def _model_config(header: _Header) -> dict[str, Any]:
  return {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "vocab_size": header.vocab_size,
      "hidden_size": header.dim,
      "intermediate_size": header.hidden_dim,
      "num_hidden_layers": header.num_layers,
      "num_attention_heads": header.num_heads,
      "num_key_value_heads": header.num_kv_heads,
      "head_dim": header.head_dim,
      "max_position_embeddings": header.max_seq_len,
      "hidden_act": "silu",
      "rms_norm_eps": _RMS_NORM_EPS,
      "rope_theta": _ROPE_THETA,
      "attention_bias": False,
      "mlp_bias": False,
      "tie_word_embeddings": header.tied,
      "bos_token_id": _BOS,
      "eos_token_id": _EOS,
      "dtype": "float32",
  }


def _tokenizer_config(header: _Header) -> dict[str, Any]:
  return {
      # This class reads tokenizer.json as it stands.
      "tokenizer_class": "PreTrainedTokenizerFast",
      "bos_token": "<s>",
      "eos_token": "</s>",
      "unk_token": "<unk>",
      "clean_up_tokenization_spaces": False,
      "model_max_length": header.max_seq_len,
  }


def _generation_config() -> dict[str, Any]:
  # llama2.c's models are trained on texts with BOS between them, so BOS ends a text too.
  return {"bos_token_id": _BOS, "eos_token_id": [_EOS, _BOS]}


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
