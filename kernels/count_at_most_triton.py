"""Pallas-Triton version of `count_at_most`, for Ampere GPUs and newer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is laid out.

  Attributes:
    chunk: keys of one CTA, all in registers; a power of two.
    num_warps: of a CTA.
  """

  chunk: int = 4096
  num_warps: int = 4


def count_at_most(
    keys: jax.Array,
    thresholds: jax.Array,
    lengths: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
  """See `count_at_most.count_at_most`; `interpret` runs on the CPU, for tests."""
  config = config or Config()
  rows, kvs = keys.shape
  groups, wanted = thresholds.shape
  chunks = pl.cdiv(kvs, config.chunk)
  counts = pl.pallas_call(
      functools.partial(
          _kernel, kvs=kvs, chunk=config.chunk, chunks=chunks, wanted=wanted, heads=rows // groups),
      out_shape=jax.ShapeDtypeStruct((rows * chunks * wanted,), jnp.int32), grid=(rows, chunks), interpret=interpret,
      name="count_at_most", compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
  )(keys.reshape(-1), thresholds.reshape(-1), lengths)
  return jnp.sum(counts.reshape(rows, chunks, wanted), axis=1)


def _kernel(keys_ref, thresholds_ref, lengths_ref, counts_ref, *, kvs, chunk, chunks, wanted, heads):
  row, column = pl.program_id(0), pl.program_id(1)
  at = (row * chunks + column) * wanted
  held = lengths_ref[row] - column * chunk

  @pl.when(held > 0)
  def _():
    lane = jnp.arange(chunk, dtype=jnp.int32)
    keys = plt.load(keys_ref.at[row * kvs + column * chunk + lane], mask=lane < held, other=0)
    for i in range(wanted):
      below = (keys <= thresholds_ref[lax.div(row, jnp.int32(heads)) * wanted + i]) & (lane < held)
      counts_ref[at + i] = jnp.sum(below.astype(jnp.int32))

  @pl.when(held <= 0)
  def _():
    for i in range(wanted):
      counts_ref[at + i] = jnp.int32(0)
