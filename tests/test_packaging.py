"""The wheel holds everything and works outside the checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built from a copy of the tracked folders, so that no stale build folder can help."""
  source = tmp_path_factory.mktemp("source")
  for name in ("kvc_jax", "kernels", "assets"):
    shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  out = tmp_path_factory.mktemp("wheel")
  subprocess.run(
      [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
      check=True, capture_output=True)
  (built,) = out.glob("*.whl")
  return built


def test_wheel_holds_kernels_model_and_nothing_else(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  for kernel in (ROOT / "kernels").glob("*.py"):
    assert f"kvc_jax/kernels/{kernel.name}" in names
  for module in (ROOT / "kvc_jax").rglob("*.py"):
    assert module.relative_to(ROOT).as_posix() in names
  assert "kvc_jax/assets/stories260K/model.safetensors" in names
  assert "kvc_jax/assets/stories260K/LICENSE" in names
  assert "kvc_jax/assets/recall-7m/model.safetensors" in names
  assert "kvc_jax/assets/longbench/dataset2prompt.json" in names
  assert "kvc_jax/assets/longbench/LICENSE" in names
  assert "kvc_jax/py.typed" in names
  assert "kvc_jax/serving/status.html" in names
  # A top-level package called `kernels` would clash with Hugging Face's.
  assert "kvc = kvc_jax.cli:main" in zipfile.ZipFile(wheel).read("kvc_jax-0.1.0.dist-info/entry_points.txt").decode()
  assert {name.split("/")[0] for name in names} <= {"kvc_jax", "kvc_jax-0.1.0.dist-info"}


def test_installed_wheel_generates_outside_the_checkout(wheel, tmp_path):
  """Unpacked into an empty folder, it runs from there, not from the checkout."""
  site = tmp_path / "site"
  zipfile.ZipFile(wheel).extractall(site)
  model = site / "kvc_jax" / "assets" / "stories260K"
  program = (
      "import sys, kvc_jax, kvc_jax.cli; assert kvc_jax.__file__.startswith(sys.argv[1]), kvc_jax.__file__; "
      "sys.exit(kvc_jax.cli.main(sys.argv[2:]))")
  command = [sys.executable, "-c", program, str(site), "generate", str(model), "-p", "", "--max-tokens", "20"]
  done = subprocess.run(
      command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("Once upon a time")
