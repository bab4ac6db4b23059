"""Writes a folder so that it appears complete or not at all."""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from kvc_jax.errors import InputError

_MODEL_FILE = "config.json"


@contextlib.contextmanager
def staged_folder(dst: pathlib.Path, *, overwrite: bool, size: int = 0) -> Iterator[pathlib.Path]:
  """Yields an empty folder beside `dst` that takes its name when the block ends well.

  If the block raises, the folder is removed and `dst` is as it was.

  Args:
    dst: absolute path of the folder to make.
    overwrite: replace `dst` if it is a model's folder.
    size: bytes that will be written, to be refused at once if they do not fit.

  Raises:
    InputError: `dst` exists and is not to be overwritten, or is something other than
      a model's folder; its parent cannot be written; the disk is full.
  """
  check_target(dst, overwrite=overwrite)
  try:
    dst.parent.mkdir(parents=True, exist_ok=True)
    holder = pathlib.Path(tempfile.mkdtemp(prefix=f".{dst.name}.", suffix=".partial", dir=dst.parent))
  except OSError as e:
    raise InputError(f"cannot write {dst} ({_reason(e)}); choose another destination") from None
  try:
    _check_space(holder, dst, size)
    staged = holder / "new"
    staged.mkdir()
    yield staged
    _swap(staged, dst, holder / "old")
  except OSError as e:
    raise InputError(f"cannot write {dst} ({_reason(e)}); free space or choose another destination") from None
  finally:
    shutil.rmtree(holder, ignore_errors=True)


def _check_space(holder: pathlib.Path, dst: pathlib.Path, size: int) -> None:
  free = shutil.disk_usage(holder).free
  if free < size:
    raise InputError(
        f"cannot write {dst} ({size / 1e9:.1f} GB, of which the disk has {free / 1e9:.1f} GB free); "
        "free space or choose another destination")


def _swap(staged: pathlib.Path, dst: pathlib.Path, old: pathlib.Path) -> None:
  if dst.exists():
    dst.rename(old)
  try:
    staged.rename(dst)
  except OSError:
    if old.exists():
      old.rename(dst)
    raise


def _reason(e: OSError) -> str:
  return f"{e.strerror}: {e.filename}" if e.filename else str(e)


def check_target(dst: pathlib.Path, *, overwrite: bool) -> None:
  """Refuses a destination that exists, unless it may be and is fit to be overwritten.

  Raises:
    InputError: see `staged_folder`.
  """
  if not dst.exists():
    return
  if not dst.is_dir():
    raise InputError(f"{dst} is a file; give the name of a new folder")
  if not overwrite:
    raise InputError(f"{dst} exists; give the name of a new folder, or overwrite it (--overwrite)")
  # Guards a home folder from a slip of the hand.
  if any(dst.iterdir()) and not (dst / _MODEL_FILE).is_file():
    raise InputError(f"{dst} is not a model's folder (no {_MODEL_FILE}) and is not overwritten; remove it yourself")
