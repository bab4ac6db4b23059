"""Finds the safetensors files of a Hugging Face folder, and says what is wrong with a broken one."""

import json
import pathlib
from typing import Any

from kvc_jax.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# safetensors refuses a file with any other dtype without naming the tensor.
_KNOWN_DTYPES = frozenset((
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ",
    "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"))


def find_shards(folder: pathlib.Path) -> list[pathlib.Path]:
  """The weight files of `folder`: one, or all that its index names, in their order.

  Raises:
    InputError: there are none, or a shard of the index is missing.
  """
  if (folder / SINGLE).exists():
    return [folder / SINGLE]
  weight_map = read_weight_map(folder)
  if weight_map is None:
    raise InputError(_why_no_weights(folder))
  files = [folder / name for name in sorted(set(weight_map.values()))]
  for file in files:
    if not file.exists():
      raise InputError(f"{file} is missing, but {INDEX} names it; copy it from the model's source")
  return files


def read_weight_map(folder: pathlib.Path) -> dict[str, str] | None:
  """Key to shard name, from the index; None where one file holds all.

  Raises:
    InputError: the index is not JSON, or not of the form that Hugging Face writes.
  """
  path = folder / INDEX
  if (folder / SINGLE).exists() or not path.exists():
    return None
  try:
    weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    names = set(weight_map.values())
  except (ValueError, LookupError, TypeError, AttributeError):
    raise InputError(f"{path} holds no weight_map; copy it again from its source") from None
  for name in names:
    # A path would let an index reach out of the folder.
    if not isinstance(name, str) or name in ("", "..") or pathlib.PurePath(name).name != name:
      raise InputError(
          f"{path} names the shard {name!r}, which is not a plain file name; copy it again from its source")
  if not names:
    raise InputError(f"{path} names no tensors; copy it again from its source")
  return weight_map


def _why_no_weights(folder: pathlib.Path) -> str:
  def holds(*patterns: str) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)

  if holds("*.safetensors"):
    return f"{folder} holds safetensors but neither {SINGLE} nor {INDEX}; copy the missing file from the model's source"
  if holds("*.bin", "*.pt", "*.pth"):
    return (f"{folder} holds PyTorch weights only; convert them to safetensors "
            "(save_pretrained of transformers) or take the model's safetensors files")
  if holds("*.gguf"):
    return f"{folder} holds GGUF weights only; take the model's safetensors files"
  return f"{folder} holds no weights ({SINGLE} or {INDEX}); give a folder with a Hugging Face model"


def broken_shard(file: pathlib.Path, cause: Exception) -> InputError:
  """The error for a shard that safetensors refused: its own words seldom name the fault."""
  remedy = "copy it again from its source"
  if isinstance(cause, OSError):
    return InputError(f"{file} cannot be read ({cause.strerror or cause}); check that it is a readable file")
  size = file.stat().st_size
  with file.open("rb") as stream:
    start = stream.read(8)
    if start == b"version ":
      return InputError(f"{file} is a Git LFS pointer and not the weights; run `git lfs pull` in its folder")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
      return InputError(f"{file} is cut off or is no safetensors file ({size} bytes); {remedy}")
    header = _parse_header(stream.read(length))
  if header is None:
    return InputError(f"{file} has a damaged header; {remedy}")
  for key, entry in header.items():
    if entry.get("dtype") not in _KNOWN_DTYPES:
      return InputError(f"{key} in {file} has the unknown dtype {entry.get('dtype')!r}; "
                        "save the model in BF16, F16 or F32")
  wanted = 8 + length + max((_end(entry) for entry in header.values()), default=0)
  if size < wanted:
    return InputError(f"{file} is cut off: it has {size} of {wanted} bytes; {remedy}")
  return InputError(f"{file} is damaged ({_one_line(cause)}); {remedy}")


def _parse_header(raw: bytes) -> dict[str, dict[str, Any]] | None:
  try:
    header = json.loads(raw)
  except ValueError:
    return None
  if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
    return None
  return {key: entry for key, entry in header.items() if key != "__metadata__"}


def _end(entry: dict[str, Any]) -> int:
  offsets = entry.get("data_offsets")
  return offsets[1] if isinstance(offsets, list) and len(offsets) == 2 and isinstance(offsets[1], int) else 0


def _one_line(cause: Exception) -> str:
  return " ".join(str(cause).split())
