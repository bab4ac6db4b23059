"""A task's results on disk: one JSON line a sample, beside the settings that they were made under."""

import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from kvc_jax.errors import InputError

Record = dict[str, Any]


def settings_path(path: pathlib.Path) -> pathlib.Path:
  """Of the settings that belong to `path`, a .jsonl file."""
  return path.with_suffix(".settings.json")


class RecordFile:
  """Records of one task, appended as they come; `open_records` makes it.

  Attributes:
    records: all of them, in the order of the file.
  """

  def __init__(self, file: BinaryIO, records: list[Record]):
    self._file, self.records = file, records

  def append(self, record: Record) -> None:
    """Adds a line and hands it to the operating system, so that only a fall of the machine can lose it."""
    self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    self._file.flush()
    self.records.append(record)


@contextmanager
def open_records(path: pathlib.Path, settings: Mapping[str, Any]) -> Iterator[RecordFile]:
  """Opens a task's results to go on with them; a last line that was not written to its end is cut off.

  Args:
    path: the .jsonl file; it and its folder are made where they are missing.
    settings: what the results depend on, JSON values.

  Raises:
    InputError: the file is damaged elsewhere than at its end, was made under other
      settings, or another run is writing to it.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with _locked(path) as file:
    records, whole = _parse(path, file.read())
    file.truncate(whole)
    if records:
      _check_settings(path, settings)
    else:
      _write_settings(path, settings)
    yield RecordFile(file, records)


def check_records(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Raises what `open_records` would for these arguments; makes and changes nothing."""
  if path.exists():
    with _locked(path) as file:
      if _parse(path, file.read())[0]:
        _check_settings(path, settings)


def check_can_write(folder: pathlib.Path) -> None:
  """Raises InputError unless files can be made in a folder, or the folder itself; makes nothing."""
  whole = folder.absolute()
  place = next(path for path in (whole, *whole.parents) if os.path.lexists(path))
  if not place.is_dir():
    raise InputError(f"{place} is no folder, so results cannot go to {folder}; give another --out")
  if not os.access(place, os.W_OK | os.X_OK):
    raise InputError(f"{place} cannot be written, so results cannot go to {folder}; give another --out")


@contextmanager
def _locked(path: pathlib.Path) -> Iterator[BinaryIO]:
  """The file from its start, which no other run may have."""
  with path.open("a+b") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError(f"{path} is being written by another run; let it end, or give another --out") from None
    file.seek(0)
    yield file


def read_records(path: pathlib.Path) -> list[Record]:
  """All whole records of a file.

  Raises:
    InputError: the file is missing, or damaged elsewhere than at its end.
  """
  try:
    return _parse(path, path.read_bytes())[0]
  except FileNotFoundError:
    raise InputError(f"{path} is missing; give a file of predictions") from None


def read_settings(path: pathlib.Path) -> dict[str, Any]:
  """The settings beside a .jsonl file.

  Raises:
    InputError: they are missing or damaged.
  """
  beside = settings_path(path)
  try:
    settings = json.loads(beside.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError(f"{beside} is missing, so {path.name} cannot be continued; remove {path.name} to start "
                     "over, or give another --out") from None
  except ValueError:
    settings = None
  if not isinstance(settings, dict):
    raise InputError(f"{beside} is damaged; remove it and {path.name} to start over")
  return settings


def _parse(path: pathlib.Path, data: bytes) -> tuple[list[Record], int]:
  """Records, and the bytes up to the end of the last whole one."""
  records: list[Record] = []
  whole = 0
  lines = _lines(data)
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
      record = None
    if not isinstance(record, dict):
      if number == len(lines):
        break
      raise InputError(f"{path}, line {number}, is no JSON object; remove the file, or that line, to go on")
    if not line.endswith(b"\n"):
      break
    records.append(record)
    whole += len(line)
  return records, whole


def _lines(data: bytes) -> list[bytes]:
  """Lines with their ends; `splitlines` would also split at a lone carriage return."""
  lines = [line + b"\n" for line in data.split(b"\n")]
  lines[-1] = lines[-1][:-1]
  return lines if lines[-1] else lines[:-1]


def _write_settings(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
  made = settings_path(path).with_suffix(".new")
  made.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
  os.replace(made, settings_path(path))


def _check_settings(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
  before, now = read_settings(path), json.loads(json.dumps(settings))
  for name in [*now, *before]:
    if before.get(name) != now.get(name):
      raise InputError(f"{path} was made with {name} = {json.dumps(before.get(name))}, not "
                       f"{json.dumps(now.get(name))}; give the same settings, another --out, or remove the file")
