"""Takes a sequence out of the cache into host arrays, and puts it back into any free slot.

A snapshot is compact: only the KVs that are held, head after head, so it does not
depend on block size, slot or block ids. Each head's KVs keep their order, which makes
what follows an export and an import bit-identical to never having left.

KVs travel in pieces of a fixed number, so that nothing compiles anew with the length.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from kvc_jax.cache.alloc import blocks_held, pop_blocks
from kvc_jax.cache.state import NULL_BLOCK, CacheState
from kvc_jax.errors import InputError
from kvc_jax.kernels.scatter import apart, put

PIECE_KVS = 16_384
"""KVs that travel together: 8 MiB of bfloat16 at a head dimension of 128."""

_PIECES_IN_FLIGHT = 3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SequenceSnapshot:
  """One sequence's part of a cache, on the host.

  R is the number of KVs held, over all layers and heads: the KVs of layer 0's head 0
  in their order, then those of its head 1, and so on.

  Attributes:
    kv: [R, 2, D] keys (after RoPE) and values, in the pool's dtype.
    scores: f32 [R].
    positions: i32 [R].
    lengths: i32 [L, H] KVs held by each head; they add up to R.
    num_tokens: tokens seen by the sequence, evicted ones too.
    queries: [L, H*G, D] the last decode query, not scored yet; None where the cache keeps none.
    log_sums: f32 [L, H*G] its log-sum-exp; +inf where no query waits.
    kv_scales: f32 [L, H, 2] of an FP8 pool; None for others.
  """

  kv: np.ndarray
  scores: np.ndarray
  positions: np.ndarray
  lengths: np.ndarray
  num_tokens: int
  queries: np.ndarray | None = None
  log_sums: np.ndarray | None = None
  kv_scales: np.ndarray | None = None

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    arrays = (getattr(self, field.name) for field in dataclasses.fields(self))
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

  def blocks(self, block_size: int) -> int:
    """Blocks that the sequence takes in a cache of that block size."""
    return int((-(-self.lengths // block_size)).sum())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Piece:
  """Some neighbouring KVs of a snapshot: [K, 2, D], f32 [K], i32 [K]."""

  kv: Any
  scores: Any
  positions: Any


def export_sequence(state: CacheState, slot: int, *, piece: int = PIECE_KVS) -> SequenceSnapshot:
  """Copies a sequence to the host; the cache is unchanged (`release` frees its blocks).

  Args:
    state: the cache.
    slot: of the sequence.
    piece: KVs that travel together (static).

  Raises:
    InputError: there is no such slot.
  """
  if not 0 <= slot < state.num_slots:
    raise InputError(f"slot {slot} is outside the cache's {state.num_slots} slots; give one from 0")
  at = np.int32(slot)
  lengths, num_tokens, queries, log_sums = jax.tree.map(np.asarray, _slot_arrays(state, at))
  kvs = int(lengths.sum())
  out = _Piece(
      np.empty((kvs, *state.kv.shape[1:2], state.kv.shape[3]), state.kv.dtype),
      np.empty(kvs, np.float32), np.empty(kvs, np.int32))
  waiting: collections.deque[tuple[int, _Piece]] = collections.deque()
  for start in range(0, kvs, piece):
    part = read_piece(state, at, np.int32(start), size=piece)
    for array in jax.tree.leaves(part):
      array.copy_to_host_async()
    waiting.append((start, part))
    if len(waiting) == _PIECES_IN_FLIGHT:
      _store(out, *waiting.popleft())
  for start, part in waiting:
    _store(out, start, part)
  return SequenceSnapshot(
      kv=out.kv, scores=out.scores, positions=out.positions, lengths=lengths, num_tokens=int(num_tokens),
      queries=queries, log_sums=log_sums,
      kv_scales=None if state.kv_scales is None else np.asarray(state.kv_scales))


def _store(out: _Piece, start: int, part: _Piece) -> None:
  for target, source in zip(jax.tree.leaves(out), jax.tree.leaves(part), strict=True):
    rest = target[start : start + len(source)]
    rest[...] = np.asarray(source)[: len(rest)]


def import_sequence(
    state: CacheState, slot: int, snapshot: SequenceSnapshot, *, piece: int = PIECE_KVS
) -> tuple[CacheState, jax.Array]:
  """Puts a sequence into an empty slot, in blocks for exactly the KVs that it holds.

  Waits for the device only where the pool is FP8, to compare scales.

  Args:
    state: the cache; donated.
    slot: an empty one.
    snapshot: of a cache of the same layers, heads, dtype and, for FP8, scales; block
      size, number of blocks and slots may differ.
    piece: KVs that travel together (static).

  Returns:
    The new cache, and ok bool []: False where the pool has too few free blocks or the
    slot is taken, and the cache is as before.

  Raises:
    InputError: the snapshot does not fit this cache; it is not touched.
  """
  check_fits(state, snapshot)
  if not 0 <= slot < state.num_slots:
    raise InputError(f"slot {slot} is outside the cache's {state.num_slots} slots; give one from 0")
  at = np.int32(slot)
  state, ok = reserve(
      state, at, snapshot.lengths, np.int32(snapshot.num_tokens), snapshot.queries, snapshot.log_sums)
  for start, part in _pieces(snapshot, piece):
    state = write_piece(state, at, ok, np.int32(start), part)
  return state, ok


def _pieces(snapshot: SequenceSnapshot, size: int) -> Iterator[tuple[int, _Piece]]:
  """The snapshot's KVs, the last piece padded with zeros."""
  arrays = _Piece(snapshot.kv, snapshot.scores, snapshot.positions)

  def cut(array: np.ndarray, start: int) -> np.ndarray:
    part = np.zeros((size, *array.shape[1:]), array.dtype)  # fresh: the device may still read the one before
    rest = array[start : start + size]
    part[: len(rest)] = rest
    return part

  for start in range(0, len(snapshot.kv), size):
    yield start, jax.tree.map(functools.partial(cut, start=start), arrays)


def check_fits(state: CacheState, snapshot: SequenceSnapshot) -> None:
  """Checks that a snapshot and a cache belong together, whatever is free at the moment.

  Raises:
    InputError: naming what differs.
  """
  for name, theirs, ours in (
      ("layers and KV heads", snapshot.lengths.shape, (state.num_layers, state.num_kv_heads)),
      ("head dimension", snapshot.kv.shape[-1], state.kv.shape[-1]),
      ("dtype", snapshot.kv.dtype.name, state.kv.dtype.name),
      ("query heads", _query_heads(snapshot.queries), _query_heads(state.queries)),
  ):
    if theirs != ours:
      raise InputError(f"the saved sequence has {name} {theirs}, but the cache has {ours}; "
                       "use the model and the cache settings that it was saved with")
  scales = snapshot.kv_scales
  if state.kv_scales is not None and (scales is None or not np.array_equal(np.asarray(state.kv_scales), scales)):
    raise InputError("the saved sequence was stored with other FP8 scales than this cache has; "
                     "use the model and the cache settings that it was saved with")
  most = state.max_blocks_per_head * state.block_size
  if snapshot.lengths.max() > most:
    raise InputError(f"a head of the saved sequence holds {snapshot.lengths.max()} KVs, but the cache has room for "
                     f"{most}; raise max_model_len")


def _query_heads(queries: Any) -> int | None:
  return None if queries is None else queries.shape[-2]


@jax.jit
def _slot_arrays(state: CacheState, slot: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
  queries, log_sums = state.queries, state.log_sums
  return (state.lengths[:, slot], state.num_tokens[slot],
          None if queries is None else queries[:, slot], None if log_sums is None else log_sums[:, slot])


@functools.partial(jax.jit, static_argnames="size")
def read_piece(state: CacheState, slot: Int[Array, ""], start: Int[Array, ""], *, size: int) -> _Piece:
  """KVs start..start+size-1 of a slot, head after head; behind the last one anything."""
  blocks, offsets = _places(state, slot, start, size)
  return _Piece(state.kv[blocks, :, offsets], state.scores[blocks, offsets], state.positions[blocks, offsets])


@functools.partial(jax.jit, donate_argnames="state")
def write_piece(
    state: CacheState, slot: Int[Array, ""], ok: Bool[Array, ""], start: Int[Array, ""], piece: _Piece
) -> CacheState:
  """Stores KVs start.. of a slot that `reserve` gave its blocks; nothing where it was not ok.

  What a piece has behind the last KV is dropped.
  """
  blocks, offsets = _places(state, slot, start, piece.kv.shape[0])
  blocks = apart(blocks, ok & (blocks != NULL_BLOCK), state.num_blocks)
  return dataclasses.replace(
      state,
      kv=put(state.kv.at[blocks, :, offsets], piece.kv),
      scores=put(state.scores.at[blocks, offsets], piece.scores),
      positions=put(state.positions.at[blocks, offsets], piece.positions),
  )


def _places(state: CacheState, slot: jax.Array, start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Block and offset of KVs start..start+size-1 of a slot; the null block behind the last."""
  lengths = state.lengths[:, slot].reshape(-1)  # [L*H]
  ends = jnp.cumsum(lengths)
  flat = start + jnp.arange(size, dtype=jnp.int32)
  row = jnp.minimum(jnp.searchsorted(ends, flat, side="right", method="compare_all"), lengths.size - 1)
  held = flat < ends[-1]
  index = jnp.where(held, flat - (ends[row] - lengths[row]), 0)
  layer, head = lax.div(row, state.num_kv_heads), lax.rem(row, state.num_kv_heads)
  blocks = state.tables[layer, slot, head, lax.div(index, jnp.int32(state.block_size))]
  return jnp.where(held, blocks, NULL_BLOCK), lax.rem(index, jnp.int32(state.block_size))


@functools.partial(jax.jit, donate_argnames="state")
def reserve(
    state: CacheState,
    slot: Int[Array, ""],
    lengths: Int[Array, "layers kv_heads"],
    num_tokens: Int[Array, ""],
    queries: Array | None = None,
    log_sums: Array | None = None,
) -> tuple[CacheState, Bool[Array, ""]]:
  """Gives an empty slot blocks for KVs that `write_piece` brings, each head its own number.

  Args:
    state: the cache; donated.
    slot: i32 [].
    lengths: i32 [L, H] KVs of each head.
    num_tokens: i32 [] tokens seen.
    queries: [L, H*G, D] the query that waits to be scored, where the cache keeps queries.
    log_sums: f32 [L, H*G].

  Returns:
    The new cache, and ok bool []: False where blocks are too few, a head would pass M
    of them, or the slot is taken; the cache is as before. Where ok, positions, scores,
    keys and values are to be written before anything else.
  """
  need = blocks_held(lengths, state.block_size)
  ok = (jnp.sum(need) <= state.free_count) & jnp.all(need <= state.max_blocks_per_head)
  ok &= (slot >= 0) & (slot < state.num_slots) & (state.num_tokens[jnp.clip(slot, 0, state.num_slots - 1)] == 0)
  target = jnp.where(ok, slot, state.num_slots)  # one past the last slot: dropped
  need = jnp.where(ok, need, 0)[:, None]  # [L, 1, H]
  state = pop_blocks(state, target[None], jnp.zeros_like(need), need, state.max_blocks_per_head)
  state = dataclasses.replace(
      state,
      lengths=state.lengths.at[:, target].set(lengths, mode="drop"),
      num_tokens=state.num_tokens.at[target].set(num_tokens, mode="drop"),
  )
  if state.queries is not None and state.log_sums is not None and queries is not None:
    state = dataclasses.replace(
        state,
        queries=state.queries.at[:, target].set(queries, mode="drop"),
        log_sums=state.log_sums.at[:, target].set(log_sums, mode="drop"),
    )
  return state, ok
