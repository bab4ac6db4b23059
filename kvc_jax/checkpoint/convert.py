"""Converts a Hugging Face folder into one that holds an Orbax checkpoint."""

import pathlib
import shutil

from jax.typing import DTypeLike

from kvc_jax.checkpoint.dtypes import parse_dtype
from kvc_jax.checkpoint.hf_reader import read_params
from kvc_jax.checkpoint.staging import check_target, staged_folder
from kvc_jax.checkpoint.store import PARAMS, byte_bar, save_params
from kvc_jax.config import LlamaConfig
from kvc_jax.errors import InputError
from kvc_jax.tokenizer import TOKENIZER_FILES, check_tokenizer_files

_COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def convert(
    src: str | pathlib.Path, dst: str | pathlib.Path, *,
    dtype: DTypeLike | None = None, overwrite: bool = False, progress: bool = True,
) -> pathlib.Path:
  """Writes `dst` with the weights of `src` as an Orbax checkpoint, ready for `load_model`.

  `dst` appears complete or not at all. Host memory: about three times the largest
  stacked parameter, not the model.

  Args:
    src: folder with config.json, safetensors and a tokenizer.
    dst: folder to write: `params/`, and copies of the config and tokenizer files.
    dtype: bfloat16, float16 or float32; by default the one that most of the values have.
    overwrite: replace `dst` if it is a model's folder.
    progress: show a bar on stderr, if that is a terminal.

  Returns:
    The absolute path of `dst`.

  Raises:
    InputError: `src` is not a complete model that this package supports, or `dst`
      exists, overlaps `src` or cannot be written.
  """
  # Links in the last part stay: the folder is renamed to the name that was given.
  src, dst = pathlib.Path(src).absolute(), pathlib.Path(dst).absolute()
  asked = None if dtype is None else parse_dtype(dtype)
  _check_source(src)
  _check_apart(src, dst)
  check_target(dst, overwrite=overwrite)
  config = LlamaConfig.from_folder(src)
  check_tokenizer_files(src)
  with byte_bar(f"converting {src.name}", progress) as bar:
    params = read_params(
        src, config, choose_dtype=lambda own: own if asked is None else asked, on_bytes=bar.update)
    size = sum(param.nbytes for param in params.values())
    bar.reset(total=size)
    with staged_folder(dst, overwrite=overwrite, size=size) as folder:
      save_params(folder / PARAMS, params)
      _copy_files(src, folder)
  return dst


def _check_source(src: pathlib.Path) -> None:
  if not src.is_dir():
    raise InputError(f"{src} is {'a file' if src.exists() else 'missing'}; give a folder with a Hugging Face model")
  if (src / PARAMS).exists():
    raise InputError(f"{src} is converted already; give a folder with a Hugging Face model")


def _check_apart(src: pathlib.Path, dst: pathlib.Path) -> None:
  source, target = src.resolve(), dst.resolve()
  if source == target or source in target.parents or target in source.parents:
    raise InputError(f"{dst} overlaps the source {src}; give a folder outside it")


def _copy_files(src: pathlib.Path, folder: pathlib.Path) -> None:
  for name in _COPIED:
    if (src / name).is_file():
      shutil.copyfile(src / name, folder / name)
