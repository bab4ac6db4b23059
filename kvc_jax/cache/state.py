"""The paged cache: a pool of blocks, each of which belongs to one head of one layer.

Axes, always in this order (docs/architecture.md): L layers, S sequence slots,
H KV heads, G query heads per KV head, N blocks in the pool, P KV slots in a
block, M blocks that one head of one sequence can have, D head dimension,
T tokens, B sequences named by one call.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kvc_jax.errors import InputError

_DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn")

NULL_BLOCK = 0
"""Never allocated: table padding points at it, and scores and positions that `allocate` masks go to it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
  """Static shape of a cache.

  Attributes:
    num_layers: L.
    num_slots: S, sequences that can be held at once.
    num_kv_heads: H.
    head_dim: D.
    num_blocks: N, with the null block; N - 1 can be allocated.
    max_blocks_per_head: M; a head holds at most M * P KVs.
    block_size: P, KVs of one head in one block.
    dtype: of the keys and values; float8_e4m3fn stores them scaled (cache/quantize.py).
    num_heads: query heads H*G, for decode steps that keep scores up to date; None
      for a cache without them.
    sharing: whether blocks may have several holders (cache/share.py).
  """

  num_layers: int
  num_slots: int
  num_kv_heads: int
  head_dim: int
  num_blocks: int
  max_blocks_per_head: int
  block_size: int = 16
  dtype: DTypeLike = jnp.bfloat16
  num_heads: int | None = None
  sharing: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name in ("dtype", "sharing") or (field.name == "num_heads" and value is None):
        continue
      if not isinstance(value, int) or value < 1:
        raise InputError(f"CacheConfig: {field.name} is {value!r}, but a positive whole number is needed")
    if self.num_blocks < 2:
      raise InputError("CacheConfig: num_blocks must be at least 2, for block 0 is never allocated")
    if self.num_blocks * self.block_size >= 2**30:
      raise InputError("CacheConfig: num_blocks * block_size must stay below 2**30, for rows have 32-bit numbers")
    if jnp.dtype(self.dtype).name not in _DTYPES:
      raise InputError(f"CacheConfig: dtype is {jnp.dtype(self.dtype).name}; give one of {', '.join(_DTYPES)}")
    if self.num_heads is not None and self.num_heads % self.num_kv_heads:
      raise InputError(
          f"CacheConfig: {self.num_heads} query heads (num_heads) cannot share {self.num_kv_heads} KV heads evenly")

  @property
  def query_dtype(self) -> jnp.dtype:
    """Of queries that are kept: the pool's, but never FP8."""
    dtype = jnp.dtype(self.dtype)
    return dtype if dtype.itemsize > 1 else jnp.dtype(jnp.bfloat16)

  @property
  def heads_per_sequence(self) -> int:
    """Block tables that one sequence has: L * H."""
    return self.num_layers * self.num_kv_heads

  @property
  def bytes_per_block(self) -> int:
    """Bytes of one block: keys, values, scores and positions."""
    kv = 2 * self.block_size * self.head_dim * jnp.dtype(self.dtype).itemsize
    return kv + self.block_size * (4 + 4)

  def blocks_for(self, num_tokens: int) -> int:
    """Blocks that an uncompressed sequence of `num_tokens` holds over all layers and heads."""
    return self.heads_per_sequence * -(-num_tokens // self.block_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheState:
  """All mutable state of the cache; a pytree that every jitted step takes and returns.

  Invariants (`check_invariants` runs them):
    * live ids + the free stack + {0} are all ids 0..N-1; free ids are distinct and not live;
    * without sharing, live table entries are distinct; with it, those of one slot or `Held`
      are, extra_refs counts the live entries of each block beyond its first, and no two
      slots append to one block;
    * table entry m of a head is live exactly when m < ceil(length / P); others are 0;
    * the positions held by a head are distinct and below num_tokens of its slot;
    * scores of held KVs are finite and not negative;
    * a waiting query is finite, and its log_sum finite; +inf where none waits.

  Decode attention knows a query's probabilities only at its end, so they are added
  to the scores at the sequence's next step: `queries` and `log_sums` wait for it.

  Attributes:
    kv: [N, 2, P, D] keys (after RoPE) and values; kv[n, 0] keys, kv[n, 1] values.
    scores: f32 [N, P], what a KV is worth; low scores are evicted first.
    positions: i32 [N, P], position in its sequence of each KV's token.
    tables: i32 [L, S, H, M] block ids.
    lengths: i32 [L, S, H], KVs held by each head.
    num_tokens: i32 [S], tokens seen by each sequence, evicted ones too.
    free_ids: i32 [N], a stack; entries below free_count are the free blocks.
    free_count: i32 [].
    queries: [L, S, H*G, D] each sequence's last decode query after RoPE, its
      attention not yet added to the scores; None where the config has no num_heads.
    log_sums: f32 [L, S, H*G] their log-sum-exp; +inf for a sequence without one.
    kv_scales: f32 [L, H, 2] what the keys and the values of an FP8 pool are to be
      multiplied by; None for other pools. Constant.
    extra_refs: i32 [N] references to each block beyond the first, from tables and from
      `Held`s (cache/share.py); 0 for free blocks. None for a cache that shares none.
  """

  kv: jax.Array
  scores: jax.Array
  positions: jax.Array
  tables: jax.Array
  lengths: jax.Array
  num_tokens: jax.Array
  free_ids: jax.Array
  free_count: jax.Array
  queries: jax.Array | None = None
  log_sums: jax.Array | None = None
  kv_scales: jax.Array | None = None
  extra_refs: jax.Array | None = None

  @property
  def num_layers(self) -> int:
    return self.tables.shape[0]

  @property
  def num_slots(self) -> int:
    return self.tables.shape[1]

  @property
  def num_kv_heads(self) -> int:
    return self.tables.shape[2]

  @property
  def max_blocks_per_head(self) -> int:
    return self.tables.shape[3]

  @property
  def num_blocks(self) -> int:
    return self.kv.shape[0]

  @property
  def block_size(self) -> int:
    return self.kv.shape[2]


def init_cache(config: CacheConfig, kv_scales: jax.Array | np.ndarray | None = None) -> CacheState:
  """An empty cache: every block but the null block is free.

  Args:
    config: its shape.
    kv_scales: f32 [L, H, 2] of keys and values, for an FP8 pool; 1 by default
      (engine/calibrate.py finds better ones).

  Raises:
    InputError: scales that do not fit the config.
  """
  n, p = config.num_blocks, config.block_size
  rows = (config.num_layers, config.num_slots)
  heads = (*rows, config.num_kv_heads)
  observes = config.num_heads is not None
  kv_scales = _checked_scales(config, kv_scales)
  return CacheState(
      kv=jnp.zeros((n, 2, p, config.head_dim), config.dtype),
      scores=jnp.zeros((n, p), jnp.float32),
      positions=jnp.zeros((n, p), jnp.int32),
      tables=jnp.full((*heads, config.max_blocks_per_head), NULL_BLOCK, jnp.int32),
      lengths=jnp.zeros(heads, jnp.int32),
      num_tokens=jnp.zeros((config.num_slots,), jnp.int32),
      # Popped from the end: blocks come as 1, 2, 3, ...; entry N-1 is never live.
      free_ids=jnp.arange(n - 1, -1, -1, dtype=jnp.int32),
      free_count=jnp.asarray(n - 1, jnp.int32),
      queries=jnp.zeros((*rows, config.num_heads, config.head_dim), config.query_dtype) if observes else None,
      log_sums=jnp.full((*rows, config.num_heads), jnp.inf, jnp.float32) if observes else None,
      kv_scales=None if kv_scales is None else jnp.asarray(kv_scales, jnp.float32),
      extra_refs=jnp.zeros((n,), jnp.int32) if config.sharing else None,
  )


def _checked_scales(config: CacheConfig, scales: jax.Array | np.ndarray | None) -> np.ndarray | None:
  shape = (config.num_layers, config.num_kv_heads, 2)
  if jnp.dtype(config.dtype).itemsize > 1:
    if scales is not None:
      raise InputError(f"init_cache: kv_scales are for an FP8 cache, but this one is {jnp.dtype(config.dtype).name}")
    return None
  scales = np.ones(shape, np.float32) if scales is None else np.asarray(scales, np.float32)
  if scales.shape != shape or not (np.isfinite(scales) & (scales > 0)).all():
    raise InputError(f"init_cache: kv_scales must be {list(shape)} positive numbers, for keys and values of each head")
  return scales


def check_invariants(state: CacheState, held: Iterable[Any] = ()) -> None:
  """Checks the invariants of `CacheState` on the host.

  Args:
    state: the cache.
    held: all `Held`s (cache/share.py) that have not been dropped.

  Raises:
    AssertionError: naming the invariant that does not hold.
  """
  held = tuple(held)
  tables, lengths, num_tokens = (
      np.concatenate([np.asarray(ours), *(np.expand_dims(np.asarray(getattr(h, name)), axis) for h in held)], axis)
      for name, ours, axis in (
          ("tables", state.tables, 1), ("lengths", state.lengths, 1), ("num_tokens", state.num_tokens, 0)))
  p, m = state.block_size, state.max_blocks_per_head
  assert ((lengths >= 0) & (lengths <= m * p)).all(), "a length is negative or above M * P"
  live = np.arange(m) < -(-lengths[..., None] // p)
  assert (tables[~live] == NULL_BLOCK).all(), "a table entry behind a head's last block is not the null block"
  _check_references(state, tables, live, lengths)
  _check_kvs(state, tables, lengths, num_tokens)
  if state.queries is not None and state.log_sums is not None:
    log_sums = np.asarray(state.log_sums)
    assert (np.isfinite(log_sums) | (log_sums == np.inf)).all(), "a waiting query's log_sum is NaN or -inf"
    assert np.isfinite(np.asarray(state.queries, np.float32)).all(), "a waiting query is not finite"
    assert (log_sums[:, np.asarray(state.num_tokens) == 0] == np.inf).all(), "a query waits in an empty slot"


def _check_references(state: CacheState, tables: np.ndarray, live: np.ndarray, lengths: np.ndarray) -> None:
  """Of tables [L, S + K, H, M], where behind the S slots come K `Held`s."""
  n, free_count = state.num_blocks, int(state.free_count)
  assert 0 <= free_count < n, f"free_count {free_count} is outside 0..{n - 1}"
  references = np.bincount(tables[live], minlength=n)
  free = np.bincount(np.asarray(state.free_ids)[:free_count], minlength=n)
  assert not references[NULL_BLOCK], "the null block is held"
  assert not free[NULL_BLOCK], "the null block is free"
  places = (references > 0) + free
  assert (places[NULL_BLOCK + 1 :] == 1).all(), "a block is lost, free twice, or both free and held"
  if state.extra_refs is None:
    assert (references <= 1).all(), "a block is held twice"
    return
  assert (np.asarray(state.extra_refs) == np.maximum(references - 1, 0)).all(), "references are not as many as counted"
  for holder in range(tables.shape[1]):
    ids = tables[:, holder][live[:, holder]]
    assert len(np.unique(ids)) == len(ids), "a slot, or a Held, names a block twice"
  slots = state.num_slots
  last = np.maximum(-(-lengths // state.block_size) - 1, 0)[..., None]
  open_ids = np.take_along_axis(tables, last, axis=-1)[..., 0][:, :slots][lengths[:, :slots] % state.block_size > 0]
  assert len(np.unique(open_ids)) == len(open_ids), "two slots append to one block"


def _check_kvs(state: CacheState, tables: np.ndarray, lengths: np.ndarray, num_tokens: np.ndarray) -> None:
  positions, scores = np.asarray(state.positions)[tables], np.asarray(state.scores)[tables]
  held = np.arange(tables.shape[-1] * state.block_size) < lengths[..., None]  # [L, S, H, M*P]
  positions, scores = positions.reshape(held.shape), scores.reshape(held.shape)
  assert (lengths <= num_tokens[:, None]).all(), "a head holds more KVs than its sequence has tokens"
  inside = (positions >= 0) & (positions < num_tokens[:, None, None])
  assert inside[held].all(), "a held position is outside its sequence"
  ordered = np.sort(np.where(held, positions, -1 - np.arange(held.shape[-1])), axis=-1)
  assert (np.diff(ordered, axis=-1) != 0).all(), "a head holds one position twice"
  assert (np.isfinite(scores) & (scores >= 0))[held].all(), "a held score is negative or not finite"
