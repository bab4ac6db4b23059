"""The two conversion scripts as a user runs them: one line for every fault, never a traceback."""

import pathlib
import subprocess
import sys

import pytest
from hf_folders import ASSET, write_folder

from kvc_jax.checkpoint.store import load_model

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


def run(script, *args):
  return subprocess.run(
      [sys.executable, str(SCRIPTS / script), *map(str, args)], capture_output=True, text=True, check=False)


def test_convert_llama(tmp_path):
  result = run("convert_llama.py", ASSET, tmp_path / "out", "--dtype", "bfloat16")
  assert (result.returncode, result.stdout, result.stderr) == (0, f"wrote {tmp_path / 'out'}\n", "")
  assert load_model(tmp_path / "out").embed.embedding.dtype == "bfloat16"
  result = run("convert_llama.py", ASSET, tmp_path / "out", "--overwrite")
  assert result.returncode == 0
  assert load_model(tmp_path / "out").embed.embedding.dtype == "float32"


def test_convert_llama_names_the_fault(tmp_path):
  source = write_folder(tmp_path / "hf")
  (source / "model.safetensors").write_bytes(b"")
  result = run("convert_llama.py", source, tmp_path / "out")
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr.startswith(f"kvc: error: {source / 'model.safetensors'} is cut off")
  assert result.stderr.count("\n") == 1


def test_convert_llama2c_names_the_fault(tmp_path):
  result = run("convert_llama2c.py", tmp_path / "absent.bin", tmp_path / "tok.bin", tmp_path / "out")
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr == (
      f"convert_llama2c.py: error: {tmp_path / 'absent.bin'} cannot be read (No such file or directory); "
      "check the path\n")


@pytest.mark.parametrize("script", ["convert_llama.py", "convert_llama2c.py"])
def test_missing_arguments(script):
  result = run(script)
  assert result.returncode == 2
  assert "the following arguments are required" in result.stderr
  assert "Traceback" not in result.stderr


@pytest.mark.parametrize("script", ["convert_llama.py", "convert_llama2c.py"])
def test_help(script):
  result = run(script, "--help")
  assert result.returncode == 0
  assert "--overwrite" in result.stdout
