"""Many small arrays as one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvc_jax.engine.packed import Packed, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  counts: jax.Array | np.ndarray
  weights: jax.Array | np.ndarray
  seeds: jax.Array | np.ndarray
  wanted: jax.Array | np.ndarray
  missing: jax.Array | None = None


def _rows(xp):
  return Rows(
      xp.array([[1, -2, 3]], dtype=xp.int32), xp.array([0.5, -np.inf, np.nan], dtype=xp.float32),
      xp.array(0xFFFFFFFE, dtype=xp.uint32), xp.array([True, False]))


@pytest.mark.parametrize("xp", [np, jnp])
def test_comes_back_as_it_was(xp):
  packed = Packed.of(_rows(xp))
  assert (packed.words.shape, packed.words.dtype) == ((9,), np.int32)
  for given, back in zip(jax.tree.leaves(_rows(np)), jax.tree.leaves(jax.jit(unpack)(packed)), strict=True):
    assert (back.shape, back.dtype) == (given.shape, given.dtype)
    np.testing.assert_array_equal(back, given)


def test_one_program_for_all_values_of_a_layout():
  traced = []

  @jax.jit
  def total(packed):
    traced.append(packed)
    return unpack(packed).counts.sum()

  first = _rows(np)
  other = dataclasses.replace(first, counts=first.counts + 4)
  assert [int(total(Packed.of(rows))) for rows in (first, other)] == [2, 14]
  assert len(traced) == 1
  assert int(total(Packed.of(dataclasses.replace(first, counts=first.counts[0])))) == 2
  assert len(traced) == 2


def test_takes_no_other_sizes():
  with pytest.raises(TypeError, match="32 bits and bools, not int8"):
    Packed.of(np.zeros(3, np.int8))


def test_what_is_not_packed_stays():
  rows = _rows(np)
  assert unpack(rows) is rows
