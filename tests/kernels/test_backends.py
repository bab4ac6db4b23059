"""Which backend runs an op: the table, the override, the environment variable."""

import dataclasses
import logging
import pathlib

import jax
import jax.numpy as jnp
import pytest

from kvc_jax import LLM, InputError
from kvc_jax.kernels import backends

SHAPE = backends.Shape(dtype="bfloat16", query_dtype="bfloat16", head_dim=128, group=4, block_size=16)


def test_the_cpu_runs_xla():
  if jax.default_backend() != "cpu":
    pytest.skip("a GPU is here")
  assert {backends.choose(op, SHAPE) for op in backends.TABLE} == {"xla"}


@pytest.mark.parametrize(("capability", "change", "expected"), [
    ((9, 0), {}, "mosaic"),
    ((8, 0), {}, "triton"),
    ((8, 9), {}, "triton"),
    ((7, 5), {}, "xla"),
    ((9, 0), {"dtype": "float32", "query_dtype": "float32"}, "triton"),
    ((9, 0), {"dtype": "float8_e4m3fn"}, "mosaic"),
    ((9, 0), {"dtype": "float8_e4m3fn", "head_dim": 96}, "triton"),
    ((9, 0), {"dtype": "float8_e4m3fn", "scored": True}, "mosaic"),
    ((9, 0), {"dtype": "float8_e4m3fn", "group": 8}, "mosaic"),
    ((9, 0), {"dtype": "float8_e4m3fn", "group": 8, "scored": True}, "triton"),
    ((9, 0), {"head_dim": 80}, "xla"),
    ((9, 0), {"block_size": 4}, "xla"),
    ((9, 0), {"group": 32}, "xla"),
])
def test_decode_by_device_and_shape(capability, change, expected):
  with backends.use("auto", capability):
    assert backends.choose("paged_decode", dataclasses.replace(SHAPE, **change)) == expected


def test_a_refusal_is_logged_once(caplog):
  odd = dataclasses.replace(SHAPE, head_dim=77)
  with caplog.at_level(logging.WARNING), backends.use("auto", (8, 0)):
    assert [backends.choose("paged_decode", odd) for _ in range(3)] == ["xla"] * 3
  (record,) = caplog.records
  assert record.getMessage() == (
      "paged_decode runs on XLA, which is slower: mosaic does not take compute capability 8.0; "
      "triton does not take head_dim 77")


def test_mosaic_runs_where_it_is_asked_for():
  with backends.use("mosaic", (9, 0)):
    assert backends.choose("paged_decode", SHAPE) == "mosaic"
    assert backends.choose("compact_kv", SHAPE) == "xla"


def test_pools_that_pallas_cannot_address_run_on_xla():
  small = dataclasses.replace(SHAPE, dtype="float8_e4m3fn", pool_bytes=2 << 30)
  with backends.use("auto", (9, 0)):
    chosen = [backends.choose("column_scores", dataclasses.replace(small, pool_bytes=n))
              for n in (2 << 30, 3 << 30, (4 << 30) + 1)]
  assert chosen == ["triton", "xla", "triton"]


def test_an_override_retraces():
  traced = []

  @jax.jit
  def run(x):
    traced.append(backends.choose("paged_decode", SHAPE))
    return x

  for backend in ("xla", "triton", "triton"):
    with backends.use(backend, (9, 0)):
      run(jnp.ones(1))
  assert traced == ["xla", "triton"]


def test_unknown_names(monkeypatch):
  with pytest.raises(ValueError, match="'cuda' is no backend"), backends.use("cuda"):
    pass
  monkeypatch.setenv("KVC_BACKEND", "")
  assert backends.requested() == "auto"
  monkeypatch.setenv("KVC_BACKEND", "foo")
  stories = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
  with pytest.raises(InputError, match="'foo' is no backend"):
    LLM(stories)
