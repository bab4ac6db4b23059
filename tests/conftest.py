"""Shared by all tests: GPU tests are skipped without a GPU, the server's without the extra `serve`."""

import importlib.util
import os

# Two cores deadlock when several CPU devices are simulated; must be set before JAX starts.
os.environ.setdefault("NPROC", "16")

import jax
import pytest

collect_ignore = [] if importlib.util.find_spec("uvicorn") else ["serving"]


def pytest_collection_modifyitems(items):
  if jax.default_backend() == "gpu":
    return
  skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
  for item in items:
    if "gpu" in item.keywords:
      item.add_marker(skip)
