"""Saves parameters with Orbax, and loads models from either kind of folder."""

import asyncio
import contextlib
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from kvc_jax.checkpoint.dtypes import check_float16_range, compute_dtype, parse_dtype
from kvc_jax.checkpoint.hf_reader import param_shapes, read_params
from kvc_jax.checkpoint.hf_rules import Path
from kvc_jax.checkpoint.lazy import LazyArray
from kvc_jax.config import LlamaConfig
from kvc_jax.errors import InputError
from kvc_jax.model.llama import Llama, abstract_llama

PARAMS = "params"
"""Name of the Orbax checkpoint inside a converted folder."""

_SIZES = "file_sizes.json"
_CHUNK_BYTES = 64 << 20


class _OneByOneHandler(ocp.type_handlers.NumpyHandler):
  """Reads and writes one `LazyArray` after the other, where Orbax would hold all of them at once."""

  async def serialize(
      self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None,
  ) -> Sequence[Any]:
    for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
      for commit in await super().serialize([value.load()], [info], [arg]):
        try:
          await asyncio.to_thread(commit.result)
        except Exception as e:  # TensorStore's own error, with the system's words at its end
          raise OSError(f"{info.name}: {str(e).rsplit(': ', 1)[-1]}") from None
    return []


def save_params(folder: str | pathlib.Path, params: Mapping[Path, LazyArray | np.ndarray | jax.Array]) -> None:
  """Writes an Orbax checkpoint that holds `params`.

  It can be read with plain Orbax as well. Host memory: about three times the largest parameter.

  Args:
    folder: where to write; must not exist.
    params: by path in the model's state, as `nnx.to_flat_state(nnx.state(model))` names them.

  Raises:
    InputError: `folder` exists.
    OSError: a file cannot be written; `folder` does not exist then.
  """
  folder = pathlib.Path(folder).absolute()
  if folder.exists():
    raise InputError(f"{folder} exists; give the name of a new folder")
  tree = nnx.traversals.unflatten_mapping({path: _as_lazy(value) for path, value in params.items()})
  # Chunks bound what is copied at a time. No OCDBT: it writes its index anew behind each parameter.
  # No compression: it saves a fifth of the disk, doubles the memory and loads more slowly.
  save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
  registry = ocp.type_handlers.create_type_handler_registry(
      (LazyArray, _OneByOneHandler()))
  with _quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(
      type_handler_registry=registry, use_ocdbt=False, use_compression=False)) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=save_args))
  sizes = {str(file.relative_to(folder)): file.stat().st_size for file in _files(folder)}
  (folder / _SIZES).write_text(json.dumps(sizes, indent=1, sort_keys=True), encoding="utf-8")


def _as_lazy(value: LazyArray | np.ndarray | jax.Array) -> LazyArray:
  if isinstance(value, LazyArray):
    return value
  return LazyArray(shape=tuple(value.shape), dtype=np.dtype(value.dtype), load=lambda: np.asarray(value))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(file for file in folder.rglob("*") if file.is_file())


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
  """Orbax warns of its own defaults, and logs the tracebacks of errors that it raises as well."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)


def load_model(path: str | pathlib.Path, dtype: DTypeLike | None = None, *, progress: bool = False) -> Llama:
  """Loads a model onto the default device.

  Args:
    path: a folder written by `kvc_jax.checkpoint.convert.convert`, or a Hugging Face folder.
    dtype: of all parameters: bfloat16, float16 or float32. By default the one that most
      of the checkpoint's values have, but bfloat16 for a float16 checkpoint.
    progress: show a bar on stderr, if that is a terminal.

  Raises:
    InputError: the folder is missing, empty, incomplete or damaged, its config.json is
      not supported or belongs to other weights, or the dtype is not supported.
  """
  folder = pathlib.Path(path).absolute()
  if not folder.is_dir():
    raise InputError(f"{folder} is {'a file' if folder.exists() else 'missing'}; give a folder with a model")
  if not any(folder.iterdir()):
    raise InputError(f"{folder} is empty; give a folder with a Hugging Face or converted model")
  asked = None if dtype is None else parse_dtype(dtype)
  choose = compute_dtype if asked is None else lambda own: asked
  config = LlamaConfig.from_folder(folder)
  read = _read_orbax if (folder / PARAMS).exists() else _read_hf
  with byte_bar(f"loading {folder.name}", progress) as bar:
    return _build(config, read(folder, config, choose, bar))


def _build(config: LlamaConfig, params: dict[Path, jax.Array]) -> Llama:
  dtype = params["embed", "embedding"].dtype
  graph, _ = nnx.split(abstract_llama(config, dtype))
  return nnx.merge(graph, nnx.from_flat_state({path: nnx.Param(value) for path, value in params.items()}))


def _read_hf(
    folder: pathlib.Path, config: LlamaConfig, choose_dtype: Callable[[np.dtype], np.dtype], bar: tqdm,
) -> dict[Path, jax.Array]:
  params = read_params(folder, config, choose_dtype=choose_dtype, on_bytes=bar.update)
  bar.reset(total=sum(param.nbytes for param in params.values()))
  # One at a time, so that the host holds one parameter beside those on the device.
  return {path: jax.device_put(param.load()) for path, param in params.items()}


def byte_bar(what: str, progress: bool) -> tqdm:
  """A progress bar counting bytes; silent when not asked for, or when stderr is no terminal."""
  return tqdm(
      desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None if progress else True)


def _read_orbax(
    folder: pathlib.Path, config: LlamaConfig, choose_dtype: Callable[[np.dtype], np.dtype], bar: tqdm,
) -> dict[Path, jax.Array]:
  _check_files(checkpoint := folder / PARAMS)
  with _quiet_orbax():
    stored = _stored_params(checkpoint)
    _check_shapes(checkpoint, config, stored)
    dtype = choose_dtype(_own_dtype(stored))
    bar.reset(total=sum(math.prod(leaf.shape) for leaf in stored.values()) * dtype.itemsize)
    params = _restore(checkpoint, stored, dtype, bar)
  if dtype == np.float16:
    for path, value in params.items():
      check_float16_range(np.asarray(value), ".".join(path))
  return params


def _check_files(checkpoint: pathlib.Path) -> None:
  """Every file is there in full: Orbax itself notices some losses only while threads are reading."""
  list_file = checkpoint / _SIZES
  try:
    sizes = json.loads(list_file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError(f"{list_file} is missing; convert the model again") from None
  except (OSError, ValueError):
    sizes = None
  if not isinstance(sizes, dict):
    raise InputError(f"{list_file} is damaged; convert the model again")
  for name, size in sizes.items():
    file = checkpoint / name
    if not file.is_file():
      raise InputError(f"{file} is missing; convert the model again")
    if file.stat().st_size != size:
      raise InputError(f"{file} is damaged: it has {file.stat().st_size} of {size} bytes; convert the model again")


def _stored_params(checkpoint: pathlib.Path) -> dict[Path, Any]:
  """Shape and dtype of each parameter in the checkpoint, by path."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    metadata = checkpointer.metadata(checkpoint).item_metadata
  if metadata is None:
    raise InputError(f"{checkpoint} is damaged (Orbax cannot read its metadata); convert the model again")
  return nnx.traversals.flatten_mapping(metadata.tree)


def _check_shapes(checkpoint: pathlib.Path, config: LlamaConfig, stored: dict[Path, Any]) -> None:
  wanted = param_shapes(config)
  for path in sorted(wanted.keys() | stored.keys()):
    name = ".".join(path)
    if path not in stored:
      raise InputError(f"{checkpoint} lacks {name}, which config.json asks for; use the config.json of this model")
    if path not in wanted:
      raise InputError(
          f"{checkpoint} holds {name}, which config.json has no place for; use the config.json of this model")
    if tuple(stored[path].shape) != wanted[path]:
      raise InputError(
          f"{name} in {checkpoint} has shape {list(stored[path].shape)}, but config.json asks for "
          f"{list(wanted[path])}; use the config.json of this model")


def _own_dtype(stored: dict[Path, Any]) -> np.dtype:
  largest = max(stored.values(), key=lambda leaf: math.prod(leaf.shape))
  return np.dtype(largest.dtype)


def _restore(
    checkpoint: pathlib.Path, stored: dict[Path, Any], dtype: np.dtype, bar: tqdm,
) -> dict[Path, jax.Array]:
  """Restores one parameter after the other: bounds host memory, and tells which one is damaged."""
  args = ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=jnp.zeros(()).sharding, dtype=dtype)
  params = {}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    for path, leaf in stored.items():
      try:
        tree = checkpointer.restore(checkpoint, args=ocp.args.PyTreeRestore(
            item=nnx.traversals.unflatten_mapping({path: leaf}),
            restore_args=nnx.traversals.unflatten_mapping({path: args}), partial_restore=True))
      except Exception as e:  # Orbax and TensorStore raise all kinds, bare Exception among them
        raise InputError(
            f"{'.'.join(path)} in {checkpoint} is damaged ({_first_line(e)}); convert the model again") from None
      params[path] = nnx.traversals.flatten_mapping(tree)[path]
      bar.update(params[path].nbytes)
  return params


def _first_line(e: Exception) -> str:
  return (str(e) or type(e).__name__).splitlines()[0][:200]
