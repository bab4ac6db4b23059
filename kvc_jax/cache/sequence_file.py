"""A sequence's compressed cache as a safetensors file, to go on from in another process."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy the names of the small float formats)
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from kvc_jax.cache.snapshot import SequenceSnapshot
from kvc_jax.errors import InputError

_FORMAT, _VERSION = "kvc_jax.sequence", "1"
_DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn")
_QUERY_DTYPES = ("bfloat16", "float16", "float32")
_OPTIONAL = ("queries", "log_sums", "kv_scales")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SavedSequence:
  """What a file holds.

  Attributes:
    snapshot: the cache.
    token_ids: ids of prompt and output; the newest may not have gone through the cache yet.
    model: fingerprint of the model whose keys and values these are.
    settings: what the writer wished to keep beside it, such as how to compress on.
  """

  snapshot: SequenceSnapshot
  token_ids: list[int]
  model: str
  settings: dict[str, Any]


def save_sequence(
    path: str | pathlib.Path,
    snapshot: SequenceSnapshot,
    *,
    token_ids: list[int],
    model: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
  """Writes a sequence; an older file of that name is replaced only when the new one is complete.

  Args:
    path: file to write.
    snapshot: from `export_sequence`.
    token_ids: ids seen, evicted ones too; at least `snapshot.num_tokens` of them.
    model: `kvc_jax.model.fingerprint.fingerprint` of the model.
    settings: anything that JSON can hold.

  Raises:
    InputError: the file cannot be written, or the token ids are too few.
  """
  if len(token_ids) < snapshot.num_tokens:
    raise InputError(f"{len(token_ids)} token ids for a sequence of {snapshot.num_tokens} tokens; give all of them")
  path = pathlib.Path(path)
  tensors = _tensors(snapshot)
  tensors["token_ids"] = np.asarray(token_ids, np.int32)
  metadata = {
      "format": _FORMAT, "version": _VERSION, "model": model, "kv_dtype": snapshot.kv.dtype.name,
      "num_tokens": str(snapshot.num_tokens), "settings": json.dumps(dict(settings or {}))}
  metadata["sha256"] = _checksum(tensors, metadata)
  unfinished = None
  try:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, unfinished, metadata=metadata)
    os.replace(unfinished, path)
  except Exception as e:  # safetensors has an exception class of its own for what the system refuses
    raise InputError(f"{str(path)!r} cannot be written ({_one_line(e)}); give a path that can be written") from None
  finally:
    if unfinished is not None:
      with contextlib.suppress(OSError, ValueError):
        unfinished.unlink(missing_ok=True)


def _tensors(snapshot: SequenceSnapshot) -> dict[str, np.ndarray]:
  names = (field.name for field in dataclasses.fields(snapshot))
  tensors = {name: value for name in names if isinstance(value := getattr(snapshot, name), np.ndarray)}
  if snapshot.kv.dtype.itemsize == 1:
    tensors["kv"] = snapshot.kv.view(np.uint8)  # safetensors for NumPy knows no FP8
  return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
  digest = hashlib.sha256(json.dumps({k: v for k, v in sorted(metadata.items()) if k != "sha256"}).encode())
  for name, value in sorted(tensors.items()):
    digest.update(f"{name} {value.dtype.name} {value.shape}".encode())
    digest.update(value.view(np.uint8) if value.ndim and value.size else value.tobytes())
  return digest.hexdigest()


def load_sequence(path: str | pathlib.Path, *, model: str) -> SavedSequence:
  """Reads a sequence that `save_sequence` wrote.

  Args:
    path: the file.
    model: fingerprint of the model that is to go on with it.

  Raises:
    InputError: the file is missing, cut off, damaged, of another kind or version, or of
      another model.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"{path} is {'no file' if path.exists() else 'missing'}; give a file with a saved sequence")
  try:
    with safe_open(path, "numpy") as file:
      metadata = file.metadata() or {}
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
  except Exception as e:  # safetensors' own, and what NumPy says of a header that lies
    raise InputError(f"{path} is cut off or damaged ({_one_line(e)}); save the sequence again") from None
  if metadata.get("format") != _FORMAT:
    raise InputError(f"{path} holds no saved sequence; give a file that save_sequence wrote")
  if metadata.get("version") != _VERSION:
    raise InputError(f"{path} has version {metadata.get('version')} of the format, but this program reads {_VERSION}; "
                     "save the sequence again")
  if metadata.get("sha256") != _checksum(tensors, metadata):
    raise InputError(f"{path} is damaged: its checksum does not match; save the sequence again")
  if metadata.get("model") != model:
    raise InputError(f"{path} was saved with another model (fingerprint {metadata.get('model')}, not {model}); "
                     "load the model and the dtype that it was saved with")
  for fault in _faults(tensors, metadata):
    raise InputError(f"{path} is damaged: {fault}; save the sequence again")
  token_ids = tensors.pop("token_ids").tolist()
  tensors["kv"] = tensors["kv"].view(metadata["kv_dtype"])
  snapshot = SequenceSnapshot(**tensors, num_tokens=int(metadata["num_tokens"]))
  return SavedSequence(snapshot=snapshot, token_ids=token_ids, model=model, settings=json.loads(metadata["settings"]))


def _faults(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Iterator[str]:
  """What does not hang together; a checksum only says that nothing has changed since."""
  required = ("kv", "scores", "positions", "lengths", "token_ids")
  if missing := [name for name in required if name not in tensors]:
    yield f"{missing[0]} is missing"
  if unknown := [name for name in tensors if name not in (*required, *_OPTIONAL)]:
    yield f"{unknown[0]} has no place in it"
  if metadata.get("kv_dtype") not in _DTYPES or not metadata.get("num_tokens", "").isdecimal():
    yield "its metadata are incomplete"
  try:
    settings = json.loads(metadata.get("settings", ""))
  except ValueError:
    settings = None
  if not isinstance(settings, dict):
    yield "its settings are no JSON object"
  stored = "uint8" if metadata["kv_dtype"] == "float8_e4m3fn" else metadata["kv_dtype"]
  wanted = {"kv": (stored,), "scores": ("float32",), "positions": ("int32",), "lengths": ("int32",),
            "token_ids": ("int32",), "log_sums": ("float32",), "kv_scales": ("float32",), "queries": _QUERY_DTYPES}
  for name, array in tensors.items():
    if array.dtype.name not in wanted[name]:
      yield f"{name} is {array.dtype.name}"
  yield from _misfits(tensors, int(metadata["num_tokens"]))


def _misfits(tensors: Mapping[str, np.ndarray], num_tokens: int) -> Iterator[str]:
  lengths, kv, positions = tensors["lengths"], tensors["kv"], tensors["positions"]
  if lengths.ndim != 2 or kv.ndim != 3 or kv.shape[1] != 2 or tensors["token_ids"].ndim != 1:
    yield "an array has the wrong number of axes"
  if (lengths < 0).any() or (lengths > num_tokens).any():
    yield "a head holds more KVs than there are tokens"
  kvs = int(lengths.sum())
  if any(array.shape != (kvs,) for array in (tensors["scores"], positions)) or len(kv) != kvs:
    yield "its arrays hold different numbers of KVs"
  if (positions < 0).any() or (positions >= num_tokens).any() or len(tensors["token_ids"]) < num_tokens:
    yield "a position is outside the sequence"
  layers, heads = lengths.shape
  queries, log_sums = tensors.get("queries"), tensors.get("log_sums")
  if (queries is None) != (log_sums is None):
    yield "a waiting query lacks its log-sum-exp"
  if queries is not None and (
      queries.ndim != 3 or queries.shape[0] != layers or queries.shape[2] != kv.shape[2]
      or log_sums is None or log_sums.shape != queries.shape[:2]):
    yield "its queries have the wrong shape"
  if (scales := tensors.get("kv_scales")) is not None and scales.shape != (layers, heads, 2):
    yield "its FP8 scales have the wrong shape"


def _one_line(e: Exception) -> str:
  return " ".join(str(e).split())[:200] or type(e).__name__
