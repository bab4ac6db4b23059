"""Conversion of whole folders: complete or not at all."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hf_folders import ASSET, edit_json, hf_config, hf_shapes, truncate, write_folder

import kvc_jax.checkpoint.convert as convert_module
from kvc_jax.checkpoint.convert import convert
from kvc_jax.checkpoint.store import load_model
from kvc_jax.errors import InputError
from kvc_jax.tokenizer import Tokenizer


def refusal(src, dst, **options):
  """The message with which a conversion is refused; it must leave nothing behind."""
  before = sorted(dst.parent.iterdir()) if dst.parent.is_dir() else None
  with pytest.raises(InputError) as error:
    convert(src, dst, progress=False, **options)
  assert "\n" not in str(error.value)
  assert before == (sorted(dst.parent.iterdir()) if dst.parent.is_dir() else None)
  return str(error.value)


@pytest.fixture
def source(tmp_path):
  return write_folder(tmp_path / "hf")


def test_the_folder_holds_all_a_model_needs(source, tmp_path):
  (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
  (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
  (source / "README.md").write_text("not copied")
  target = convert(source, tmp_path / "deep" / "er" / "converted", progress=False)
  assert target == tmp_path / "deep" / "er" / "converted"
  assert sorted(path.name for path in target.iterdir()) == [
      "chat_template.jinja", "config.json", "generation_config.json", "params", "tokenizer.json",
      "tokenizer_config.json"]
  for path in target.glob("*.*"):
    assert path.read_bytes() == (source / path.name).read_bytes()
  assert Tokenizer.from_folder(target).eos_ids == {2, 5}
  assert [path.name for path in target.parent.iterdir()] == ["converted"]


def test_relative_paths(source, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert convert("hf", "converted", progress=False) == tmp_path / "converted"
  assert load_model("converted").config == load_model("hf").config


def test_links_as_in_a_download_cache(source, tmp_path):
  (tmp_path / "snapshot").mkdir()
  for path in source.iterdir():
    (tmp_path / "snapshot" / path.name).symlink_to(path)
  target = convert(tmp_path / "snapshot", tmp_path / "converted", progress=False)
  assert not any(path.is_symlink() for path in target.rglob("*"))


def test_the_new_folder_can_be_read_by_whom_the_users_umask_allows(source, tmp_path):
  old = os.umask(0o022)
  try:
    target = convert(source, tmp_path / "converted", progress=False)
  finally:
    os.umask(old)
  assert target.stat().st_mode & 0o777 == 0o755


# The destination.


def test_an_existing_destination_is_refused_and_kept(source, tmp_path):
  target = convert(source, tmp_path / "converted", progress=False)
  assert f"{target} exists; give the name of a new folder" in refusal(source, target)
  load_model(target)


def test_overwrite_replaces_a_model(source, tmp_path):
  target = convert(source, tmp_path / "converted", progress=False)
  other = write_folder(tmp_path / "other", hf_config(num_hidden_layers=2))
  convert(other, target, overwrite=True, progress=False)
  assert load_model(target).config.num_layers == 2
  assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "hf", "other"]


def test_a_failed_overwrite_keeps_the_old_model(source, tmp_path):
  target = convert(source, tmp_path / "converted", progress=False)
  bad = write_folder(tmp_path / "bad", hf_config(num_hidden_layers=2))
  truncate(bad / "model.safetensors", 4)
  assert "is cut off" in refusal(bad, target, overwrite=True)
  assert load_model(target).config.num_layers == 3


def test_overwrite_spares_a_folder_that_is_no_model(source, tmp_path):
  (tmp_path / "home").mkdir()
  (tmp_path / "home" / "thesis.tex").touch()
  assert "is not a model's folder (no config.json) and is not overwritten" in refusal(
      source, tmp_path / "home", overwrite=True)
  assert (tmp_path / "home" / "thesis.tex").exists()


def test_overwrite_fills_an_empty_folder(source, tmp_path):
  (tmp_path / "converted").mkdir()
  load_model(convert(source, tmp_path / "converted", overwrite=True, progress=False))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_place_of_the_destination(source, tmp_path, overwrite):
  (tmp_path / "converted").touch()
  assert f"{tmp_path / 'converted'} is a file" in refusal(source, tmp_path / "converted", overwrite=overwrite)


def test_a_destination_below_a_file(source, tmp_path):
  (tmp_path / "file").touch()
  assert f"cannot write {tmp_path / 'file' / 'x'}" in refusal(source, tmp_path / "file" / "x")


@pytest.mark.parametrize("below", ["", "converted", "a/b"])
def test_a_destination_that_is_or_lies_in_the_source(source, below):
  assert "overlaps the source" in refusal(source, source / below, overwrite=True)


def test_a_source_that_lies_in_the_destination(source, tmp_path):
  (tmp_path / "config.json").write_text("{}")
  assert "overlaps the source" in refusal(source, tmp_path, overwrite=True)


def test_a_link_to_the_source_as_destination(source, tmp_path):
  (tmp_path / "link").symlink_to(source)
  assert "overlaps the source" in refusal(source, tmp_path / "link", overwrite=True)


def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, monkeypatch):
  def interrupt(src, folder):
    assert (folder / "params").is_dir()
    raise KeyboardInterrupt

  monkeypatch.setattr(convert_module, "_copy_files", interrupt)
  with pytest.raises(KeyboardInterrupt):
    convert(source, tmp_path / "converted", progress=False)
  assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_weights_that_vanish_while_being_read(source, tmp_path, monkeypatch):
  def read_and_remove(src, config, **options):
    params = read_params(src, config, **options)
    (src / "model.safetensors").unlink()
    return params

  read_params = convert_module.read_params
  monkeypatch.setattr(convert_module, "read_params", read_and_remove)
  assert f"{source / 'model.safetensors'} cannot be read" in refusal(source, tmp_path / "converted")


def test_a_model_that_does_not_fit_the_disk(source, tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 2_000, 8_000))
  assert f"cannot write {tmp_path / 'converted'} (0.0 GB, of which" in refusal(source, tmp_path / "converted")


def test_a_disk_that_fills_up_under_orbax(source, tmp_path):
  """A limit on file sizes stands for the full disk: TensorStore reports both through its own errors."""
  big = write_folder(tmp_path / "big", hf_config(vocab_size=9000))
  code = (
      "import resource, signal, sys\n"
      "from kvc_jax.checkpoint.convert import convert\n"
      "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
      "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
      "try:\n"
      "  convert(*sys.argv[1:])\n"
      "except Exception as e:\n"
      "  print(type(e).__name__, e)\n")
  target = tmp_path / "converted"
  run = subprocess.run(
      [sys.executable, "-c", code, str(big), str(target)], check=True, capture_output=True, text=True)
  assert run.stdout.startswith(f"InputError cannot write {target} (embed.embedding: File too large"), run
  assert run.stderr == ""
  assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "hf"]


def test_a_disk_without_space(source, tmp_path, monkeypatch):
  def full(src, folder):
    raise OSError(28, "No space left on device", str(folder / "config.json"))

  monkeypatch.setattr(convert_module, "_copy_files", full)
  assert re.search(r"cannot write .*converted \(No space left on device: .*config.json\); free space",
                   refusal(source, tmp_path / "converted"))


# The source.


def test_a_missing_source(tmp_path):
  assert f"{tmp_path / 'absent'} is missing" in refusal(tmp_path / "absent", tmp_path / "converted")


def test_a_weight_file_in_place_of_the_source(source, tmp_path):
  file = source / "model.safetensors"
  assert f"{file} is a file; give a folder" in refusal(file, tmp_path / "converted")


def test_a_converted_source(source, tmp_path):
  target = convert(source, tmp_path / "converted", progress=False)
  assert f"{target} is converted already" in refusal(target, tmp_path / "again")


def test_a_source_without_a_config(source, tmp_path):
  (source / "config.json").unlink()
  assert f"{source / 'config.json'} is missing" in refusal(source, tmp_path / "converted")


def test_a_source_without_a_tokenizer(source, tmp_path):
  (source / "tokenizer.json").unlink()
  assert f"{source} lacks tokenizer.json" in refusal(source, tmp_path / "converted")


def test_a_source_without_a_tokenizer_config(source, tmp_path):
  (source / "tokenizer_config.json").unlink()
  assert f"{source} lacks tokenizer_config.json" in refusal(source, tmp_path / "converted")


@pytest.mark.parametrize(("changes", "words"), [
    ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
    ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
    ({"num_hidden_layers": None}, "num_hidden_layers is None"),
    ({"head_dim": 5}, "head_dim is 5, but a positive even number is needed"),
    ({"head_dim": -2}, "head_dim is -2, but a positive even number is needed"),
    ({"head_dim": "four"}, "config.json has a field of the wrong kind"),
    ({"rms_norm_eps": "small"}, "config.json has a field of the wrong kind"),
    ({"rope_scaling": "linear"}, "config.json has a field of the wrong kind"),
])
def test_a_config_that_is_not_supported(source, tmp_path, changes, words):
  edit_json(source / "config.json", **changes)
  assert words in refusal(source, tmp_path / "converted")


def test_a_dtype_that_is_not_supported(source, tmp_path):
  assert "dtype 'int8' is not supported" in refusal(source, tmp_path / "converted", dtype="int8")


# Memory.

MEASURE = """
import pathlib, sys
import jax
from kvc_jax.checkpoint.convert import convert
from kvc_jax.checkpoint.store import load_model

def peak():
  fields = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
  return int(fields["VmHWM"].split()[0]) * 1024

warm_up, source, target = sys.argv[1:]
convert(warm_up, target + "-small", progress=False)
before = peak()
convert(source, target, progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_conversion_never_holds_the_model(source, tmp_path):
  config = hf_config(
      vocab_size=8000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
      num_attention_heads=8, num_key_value_heads=4, head_dim=128)
  values = np.random.default_rng(0).integers(0, 2**16, 8000 * 1024, np.uint16) & 0xBFFF  # any bf16 but NaN
  tensors = {
      key: values[: int(np.prod(shape))].view("bfloat16").reshape(shape)
      for key, shape in hf_shapes(config).items()}
  big, target = write_folder(tmp_path / "big", config, tensors), tmp_path / "converted"
  size = (big / "model.safetensors").stat().st_size
  assert size > 300e6
  run = subprocess.run(
      [sys.executable, "-c", MEASURE, str(source), str(big), str(target)], check=True, capture_output=True, text=True)
  for folder in (big, target):  # pytest keeps tmp_path for a while
    shutil.rmtree(folder)
  grown = int(run.stdout)
  assert grown < 0.8 * size, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


def test_the_packaged_model_converts(tmp_path):
  target = convert(ASSET, tmp_path / "converted", progress=False)
  assert load_model(target).config.num_layers == 5
