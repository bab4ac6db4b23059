"""Reads the weights of a Hugging Face folder, one stacked parameter at a time.

Going parameter by parameter (and not shard by shard) keeps one parameter on the
host instead of the model; each shard is opened for just the tensors that are
needed, because its memory map counts as resident for as long as it is open.
"""

import collections
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable

import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from kvc_jax.checkpoint import hf_rules
from kvc_jax.checkpoint.dtypes import cast_into
from kvc_jax.checkpoint.lazy import LazyArray
from kvc_jax.checkpoint.shards import broken_shard, find_shards, read_weight_map
from kvc_jax.config import LlamaConfig
from kvc_jax.errors import InputError
from kvc_jax.model.llama import abstract_llama

# safetensors' names; float64 is rounded, as JAX has no float64 by default.
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """What a shard's header says of one tensor."""

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: str


def read_headers(folder: pathlib.Path) -> dict[str, Tensor]:
  """All tensors in the safetensors files of `folder`, by key.

  Raises:
    InputError: there are no safetensors, a shard is missing or damaged, or the
      index and the shards do not agree.
  """
  tensors: dict[str, Tensor] = {}
  for file in find_shards(folder):
    for key, tensor in _read_header(file).items():
      if key in tensors:
        raise InputError(
            f"{key} is in both {tensors[key].file.name} and {file.name} of {folder}; remove one of the two")
      tensors[key] = tensor
  return tensors


def _read_header(file: pathlib.Path) -> dict[str, Tensor]:
  try:
    with safe_open(file, framework="numpy") as shard:
      slices = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118  (no dict)
      return {
          key: Tensor(file=file, shape=tuple(part.get_shape()), dtype=str(part.get_dtype()))
          for key, part in slices.items()}
  except (SafetensorError, OSError) as e:
    raise broken_shard(file, e) from None


def check_index(folder: pathlib.Path, tensors: dict[str, Tensor], config: LlamaConfig) -> None:
  """Holds the index file, if there is one, against what the shards hold.

  Raises:
    InputError: the index places a key in a shard without it, or leaves out a key.
  """
  weight_map = read_weight_map(folder)
  if weight_map is None:
    return
  for key, name in weight_map.items():
    if key not in tensors or tensors[key].file.name != name:
      raise InputError(
          f"model.safetensors.index.json of {folder} places {key} in {name}, which does not hold it; "
          "copy both again from their source")
  for key, tensor in tensors.items():
    if key not in weight_map and not hf_rules.is_ignorable(key, config):
      raise InputError(
          f"{tensor.file} holds {key}, which model.safetensors.index.json does not name; "
          "copy both again from their source")


def own_dtype(tensors: Iterable[Tensor]) -> np.dtype:
  """The dtype that holds most of the values (norms are often kept wider than the rest)."""
  values: collections.Counter[str] = collections.Counter()
  for tensor in tensors:
    values[_DTYPES[tensor.dtype]] += math.prod(tensor.shape)
  return np.dtype(values.most_common(1)[0][0])


def read_params(
    folder: pathlib.Path,
    config: LlamaConfig,
    *,
    choose_dtype: Callable[[np.dtype], np.dtype] = lambda own: own,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> dict[hf_rules.Path, LazyArray]:
  """The model's parameters, checked by their headers and ready to be read one by one.

  Args:
    folder: holds `model.safetensors`, or its index and shards.
    config: of the model in `folder`.
    choose_dtype: maps the checkpoint's own dtype to the one wanted.
    on_bytes: called for each tensor read, with the bytes it takes in its parameter.

  Returns:
    A `LazyArray` for every parameter of `Llama(config)`; its shape is the stacked one.

  Raises:
    InputError: besides what `read_headers` and `check_index` refuse, a tensor is
      missing, left over, of another shape than config.json says, or not of a float dtype.
  """
  tensors = read_headers(folder)
  check_index(folder, tensors, config)
  rules = hf_rules.rules_for(config)
  shapes = param_shapes(config)
  used = _check_keys(folder, config, rules, tensors)
  for rule in rules:
    for key in rule.keys(config.num_layers):
      _check_tensor(key, tensors[key], rule.tensor_shape(shapes[rule.path]))
  dtype = choose_dtype(own_dtype(tensors[key] for key in used))
  return {
      rule.path: LazyArray(
          shape=shapes[rule.path], dtype=dtype,
          load=functools.partial(_fill, rule, config.num_layers, shapes[rule.path], dtype, tensors, on_bytes))
      for rule in rules}


def param_shapes(config: LlamaConfig) -> dict[hf_rules.Path, tuple[int, ...]]:
  state = nnx.to_flat_state(nnx.state(abstract_llama(config, np.float32)))
  return {path: variable.shape for path, variable in state}


def _check_keys(
    folder: pathlib.Path, config: LlamaConfig, rules: tuple[hf_rules.Rule, ...], tensors: dict[str, Tensor],
) -> list[str]:
  """Every key of the rules is there, and nothing else. Returns the keys of the rules."""
  wanted = [key for rule in rules for key in rule.keys(config.num_layers)]
  missing = [key for key in wanted if key not in tensors]
  if missing:
    hint = "; set tie_word_embeddings in config.json if the model shares its embeddings" if (
        missing == ["lm_head.weight"]) else "; config.json belongs to another model, or the copy is incomplete"
    raise InputError(f"{folder} lacks {_some(missing)}{hint}")
  left = [key for key in tensors.keys() - set(wanted) if not hf_rules.is_ignorable(key, config)]
  if left:
    key = min(left)
    raise InputError(
        f"{tensors[key].file} holds {_some(sorted(left))}, which a model of this config.json does not have; "
        "check num_hidden_layers and the bias fields in config.json")
  return wanted


def _some(keys: list[str]) -> str:
  return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more tensors"


def _check_tensor(key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
  if tensor.dtype not in _DTYPES:
    raise InputError(
        f"{key} in {tensor.file} has dtype {tensor.dtype}; weights must be "
        f"{', '.join(_DTYPES)} (quantised models are not supported)")
  if tensor.shape != shape:
    raise InputError(
        f"{key} in {tensor.file} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}; "
        "use the config.json of this model")


def _fill(
    rule: hf_rules.Rule, num_layers: int, shape: tuple[int, ...], dtype: np.dtype,
    tensors: dict[str, Tensor], on_bytes: Callable[[int], object],
) -> np.ndarray:
  """Reads the tensors of one parameter into one buffer of the parameter's shape."""
  buffer = np.empty(shape, dtype)
  slots = buffer if rule.stacked else buffer[None]
  by_file: dict[pathlib.Path, list[tuple[int, str]]] = {}
  for slot, key in enumerate(rule.keys(num_layers)):
    by_file.setdefault(tensors[key].file, []).append((slot, key))
  for file, members in by_file.items():
    try:
      with safe_open(file, framework="numpy") as shard:
        for slot, key in members:
          values = shard.get_tensor(key)
          cast_into(slots[slot], values.T if rule.transpose else values, ".".join(rule.path))
          on_bytes(slots[slot].nbytes)
    except (SafetensorError, OSError) as e:
      raise broken_shard(file, e) from None
  return buffer
