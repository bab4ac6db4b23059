"""Pallas Mosaic GPU version of `paged_decode`, for Hopper GPUs.

One kernel. CTAs take equal shares of all tiles (stream_k); of those that share a pair,
(sequence, KV head), the last merges what the others leave in global memory. Each
CTA walks downwards through its share, so what it waits for was begun first, by a
CTA that was started earlier: nothing can wait for ever.

A CTA is two warpgroups. One warp of the producer reads block tables and copies K and V, block
by block, into a ring in shared memory (TMA); the consumer multiplies. Queries are few,
so they are the narrow side of the tensor core's products: logits [tile, columns] =
K q^T and output [D, columns] = V^T p^T. As in paged_decode_triton the observed
queries take columns beside the group's. What they add to scores goes to memory as
additions, made where the L2 cache is: no score is read.

e4m3 numbers are multiplied as float16, which holds each of them exactly: keys from
registers, values from a copy in shared memory, for only 16-bit numbers are multiplied
transposed.

Interpret mode knows neither semaphores nor these additions nor copies with a condition
nor products of registers: there merge_partials_triton's kernel merges, scores are read and
written, tiles are copied whole, and wide keys go through shared memory.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvc_jax.kernels import backends, merge_partials_triton, stream_k
from kvc_jax.kernels import paged_decode_triton as triton
from kvc_jax.kernels.observed import Observed

_LOG2E = math.log2(math.e)
_MATRIX = plgpu.Layout.WGMMA
_BY_HEAD = plgpu.Layout.WGMMA.reduce(0)
_BY_TOKEN = plgpu.Layout.WGMMA.reduce(1)
_Q_SLOTS = 2
"""The next pair's queries are copied while this one's are in use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is laid out.

  Attributes:
    tile: KVs per step, a multiple of 64 and of the block size.
    stages: tiles in the ring.
    ctas: CTAs that share the work.
  """

  tile: int = 64
  stages: int
  ctas: int


_SHARED_BYTES = 227 * 1024
"""Of a Hopper multiprocessor, for one CTA; two get a KiB less than half each."""


def default_config(kv: jax.ShapeDtypeStruct | jax.Array, columns: int) -> Config:
  """The measured choice for a pool [N, 2, P, D] and `columns` query rows of a tile, padded.

  Two CTAs share a multiprocessor where registers and at least two stages let them. More
  stages than keep memory busy make its queues longer, and multiprocessors less equal.
  """
  _, _, _, head_dim = kv.shape
  cores, tile, itemsize = backends.num_cores(), 64, kv.dtype.itemsize
  stage = tile * (2 * head_dim * itemsize + 4)  # with positions
  fixed = columns * (head_dim * ((_Q_SLOTS + 1) * 2 + 4) + tile * 2) + 4 * 1024
  if itemsize == 1:
    fixed += tile * head_dim * 2  # wide values
  for ctas in (2, 1) if columns <= 16 else (1,):
    stages = (_SHARED_BYTES // ctas - (ctas - 1) * 1024 - fixed) // stage
    if stages >= 2:
      break
  # Numbers of keys and values on their way to a multiprocessor: 64 Ki measured best on an H100, of 8 and of 16 bits;
  # others had 96 Ki, of 16 bits, when timed last.
  in_flight = (64 if backends.device_kind().startswith("NVIDIA H100 80GB") else 96) * 1024
  wanted = max(2, in_flight // (ctas * tile * 2 * head_dim))
  return Config(tile=tile, stages=min(stages, wanted, 6), ctas=ctas * cores)


def paged_decode(
    q: jax.Array,
    kv: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    observed: Observed | None = None,
    *,
    scale: float,
    power: int = 2,
    buffer: int = 0,
    every: int = 1,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Observed | None]:
  """See `paged_decode.paged_decode`; `interpret` runs on the CPU, for tests."""
  columns = query_columns(q.shape[1] // tables.shape[2], observed is not None)
  config = config or default_config(kv, columns)
  plan = triton.Plan.of(q, kv, tables, config, observed, scale, power, buffer, every)
  packed = stream_k.schedule(lengths, tile=config.tile, ctas=config.ctas)
  walk = (layer.reshape(1), tables.reshape(-1), lengths.reshape(-1), packed)
  results, observed = _attend(plan, q, kv, walk, observed, fused=not interpret, interpret=interpret)
  if interpret:  # it knows no semaphores
    return merge_partials_triton.merge(plan, results, walk, q, observed)
  out, *_ = results
  return out.reshape(q.shape), observed


def query_columns(group: int, observes: bool) -> int:
  """Query rows of a tile: the group, then the observed group, each padded, and both to the tensor core's columns.

  The observed group begins at a power of two, for which thread has which is then known in advance: that is some
  registers.
  """
  return max(8, pl.next_power_of_2(group) * (2 if observes else 1))


def _width(plan) -> int:
  return query_columns(plan.group, plan.observes)


def _tiled(shape, dtype):
  """Shared memory in the layout that the tensor core reads, in tiles of 64 columns."""
  itemsize = jnp.dtype(dtype).itemsize
  tiling, swizzle = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(64 * itemsize)  # type: ignore[abstract]
  return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def _row_layout(width):
  """A row [1, width] spread over a warpgroup's threads."""
  across = min(128, width)
  warps = (-3,) if across == 128 else (-3, plgpu.Replicated(128 // across))
  return plgpu.Layout.TILED(plgpu.Tiling(((1, across), (32,), (1,))), warp_dims=warps, lane_dims=(-2,), vector_dim=-1)


def _attend(plan, q, kv, walk, observed, *, fused, interpret):
  """The kernel's results and `observed`, updated.

  If fused: output [S*H*G, D], then scratch. Else partial outputs f32 [slots*G, D], maxima
  and sums f32 [slots*G]; of `observed` only the scores are new.
  """
  config, group, head_dim, heads = plan.config, plan.group, plan.head_dim, _width(plan)
  tile, stages, blocks = config.tile, config.stages, config.tile // plan.block_size
  copies = 2 * blocks
  scratch = {
      "q_raw": plgpu.SMEM((_Q_SLOTS, heads, head_dim), q.dtype),
      "q": _tiled((heads, head_dim), plan.dot_dtype),
      "k": _tiled((stages, tile, head_dim), kv.dtype),
      "v": _tiled((stages, tile, head_dim), kv.dtype),
      "p": _tiled((heads, tile), plan.dot_dtype),
      "out": plgpu.SMEM((head_dim, heads), jnp.float32),
      "by_head": plgpu.SMEM((heads,), jnp.float32),
  }
  if plan.packed:
    scratch |= {"wide": _tiled((tile, head_dim), plan.dot_dtype)}
  inputs = [q.reshape(-1, head_dim), kv.reshape(-1, head_dim), *walk]
  updated = {}
  if observed is not None:
    updated["scores"] = jax.new_ref(observed.scores)
    queries, log_sums = observed.queries.reshape(-1, head_dim), observed.log_sums.reshape(-1)
    if fused:
      queries, log_sums = updated["queries"], updated["log_sums"] = jax.new_ref(queries), jax.new_ref(log_sums)
    inputs += [queries, log_sums, observed.query_positions, observed.positions, updated["scores"]]
    scratch |= {"gains": plgpu.SMEM((tile,), jnp.float32)}
    if plan.buffer:
      copies += blocks
      scratch |= {"positions": plgpu.SMEM((stages, tile), jnp.int32)}
  scratch |= {
      "q_full": plgpu.Barrier(num_arrivals=2 if plan.observes else 1, num_barriers=_Q_SLOTS),
      "q_empty": plgpu.Barrier(num_barriers=_Q_SLOTS),
      "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      "empty": plgpu.Barrier(num_barriers=stages)}
  slots = plan.slots
  sizes = [(slots * head_dim, heads), (slots, heads), (slots, heads)] if fused else [
      (slots * group, head_dim), (slots * group,), (slots * group,)]
  outputs = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
  if fused:
    outputs.insert(0, jax.ShapeDtypeStruct((plan.pairs * group, head_dim), q.dtype))
  run = plgpu.kernel(
      functools.partial(_attend_kernel, plan=plan, fused=fused), out_type=outputs,
      scratch_types=[scratch], grid=(config.ctas,), grid_names=("cta",), num_threads=2, thread_name="warpgroup",
      # Barriers are where they are needed: the default puts one around each access to shared memory.
      compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
      interpret=plgpu.InterpretGPUParams() if interpret else None,
  )
  results = run(*inputs)
  if observed is not None:
    observed = observed._replace(
        **{name: jax.freeze(ref).reshape(getattr(observed, name).shape) for name, ref in updated.items()})
  return results, observed


@dataclasses.dataclass(frozen=True)
class _Cta:
  """What both warpgroups of one CTA walk through.

  Attributes:
    plan: static numbers.
    row: this layer's plan of work.
    layer: i32 [].
    index: i32 [] of this CTA.
    refs: global memory, by name.
    smem: shared memory and barriers, by name.
    partial_done: semaphores, one per pair: how many of its CTAs have left their partial results. None: not fused.
  """

  plan: Any
  row: stream_k.Row
  layer: jax.Array
  index: jax.Array
  refs: dict[str, Any]
  smem: dict[str, Any]
  partial_done: Any

  def for_each_pair(self, body):
    """Calls body(pair, table row, place of tile 0 in this CTA's ring, begin, end, how many pairs before).

    The place is below 0 where the pair's first tiles are another CTA's. Returns how many tiles and pairs there were.
    """
    first, stop, low, high = self.row.cta(self.index)

    def visit(step, count):
      pair = stop - 1 - step  # downwards, so that what others wait for is done first
      start = self.row.start(pair)
      begin, end = jnp.maximum(low - start, 0), jnp.minimum(high, self.row.start(pair + 1)) - start
      ring = high - start - end - begin
      pl.when(end > begin)(lambda: body(pair, self.layer * self.plan.pairs + pair, ring, begin, end, count))
      return count + (end > begin).astype(jnp.int32)

    return high - low, lax.fori_loop(0, stop - first, visit, jnp.int32(0))

  def blocks(self, table_row, tile):
    """Block ids of a tile; behind the table row's end any."""
    count = self.plan.config.tile // self.plan.block_size
    at = table_row * self.plan.max_blocks + tile * count
    tables = self.refs["tables"]
    if self.plan.max_blocks % count == 0:
      return tuple(tables[at + j] for j in range(count))
    return tuple(tables[jnp.minimum(at + j, tables.shape[0] - 1)] for j in range(count))


def _attend_kernel(*args, plan, fused):
  names = ["q", "kv", "layer", "tables", "lengths", "plan"]
  if plan.observes:
    names += ["queries", "log_sums", "query_positions", "positions", "scores"]
  names += ["merged"] * fused + ["out", "top", "sum"]
  *given, smem = args
  refs = dict(zip(names, given, strict=True))
  layer = refs["layer"][0]
  cta = _Cta(plan, plan.row(refs["plan"], layer), layer, lax.axis_index("cta"), refs, smem,
             pl.get_global(plgpu.SemaphoreType.REGULAR((plan.pairs,))) if fused else None)
  warpgroup = lax.axis_index("warpgroup")
  pl.when(warpgroup == 0)(lambda: _consume(cta))
  pl.when(warpgroup == 1)(lambda: _produce(cta))


# ---------------------------------------------------------------------------------- producer


def _produce(cta):
  """Copies queries of the pairs, and blocks of the tiles, as the rings become free; then zeroes what nobody visits."""

  @plgpu.warp_map
  def _(warp):
    # One warp alone. A waiting warp knows a barrier's phases apart by their parity, so one that sleeps
    # through a turn of the ring, as after a switch to another process, would wait for ever.
    pl.when(warp == 0)(lambda: _copy_all(cta))

  if cta.partial_done is not None:
    _zero_empty_pairs(cta)


def _copy_all(cta):
  smem, stages = cta.smem, cta.plan.config.stages

  def visit(pair, table_row, ring, begin, end, count):
    length = cta.refs["lengths"][table_row]
    _copy_queries(cta, pair, table_row, count)

    def tile_body(tile, blocks):
      slot = lax.rem(ring + tile, stages)
      following = cta.blocks(table_row, jnp.minimum(tile + 1, end - 1))  # long before they are needed
      pl.when(ring + tile >= stages)(lambda: plgpu.barrier_wait(smem["empty"].at[slot]))
      _copy_blocks(cta, blocks, slot, length - tile * cta.plan.config.tile)
      return following

    lax.fori_loop(begin, end, tile_body, cta.blocks(table_row, begin))

  tiles, pairs = cta.for_each_pair(visit)
  # A barrier's every phase must have been seen before the kernel ends.
  _wait_for_last(smem["empty"], tiles, stages)
  _wait_for_last(smem["q_empty"], pairs, _Q_SLOTS)


def _zero_empty_pairs(cta):
  """Nobody visits a pair that holds nothing; its output is zero."""
  plan = cta.plan
  zeros = plgpu.layout_cast(jnp.zeros((1, plan.head_dim), cta.refs["merged"].dtype), _row_layout(plan.head_dim))

  def body(step, carry):
    pair = cta.index + step * plan.config.ctas

    @pl.when(cta.refs["lengths"][cta.layer * plan.pairs + pair] == 0)
    def _():
      for g in range(plan.group):
        cta.refs["merged"].at[pl.ds(pair * plan.group + g, 1)][...] = zeros

    return carry

  lax.fori_loop(0, lax.div(plan.pairs - 1 - cta.index + plan.config.ctas, jnp.int32(plan.config.ctas)), body, None)


def _wait_for_last(barrier, uses, slots):
  def body(use, carry):
    plgpu.barrier_wait(barrier.at[lax.rem(use, slots)])
    return carry

  lax.fori_loop(jnp.maximum(uses - slots, 0), uses, body, None)


def _copy_queries(cta, pair, table_row, count):
  group, smem = cta.plan.group, cta.smem
  slot = lax.rem(count, _Q_SLOTS)
  pl.when(count >= _Q_SLOTS)(lambda: plgpu.barrier_wait(smem["q_empty"].at[slot]))
  sources = [(cta.refs["q"], pair)]
  if cta.plan.observes:
    sources.append((cta.refs["queries"], table_row))
  for i, (ref, index) in enumerate(sources):
    plgpu.copy_gmem_to_smem(
        ref.at[pl.ds(index * group, group)], smem["q_raw"].at[slot, pl.ds(i * cta.plan.padded_group, group)],
        smem["q_full"].at[slot])


def _copy_blocks(cta, blocks, slot, held):
  """Starts the copies of one tile's K, V and positions, of its first `held` KVs."""
  plan, refs, smem, size = cta.plan, cta.refs, cta.smem, cta.plan.block_size
  rows = [block * (2 * size) for block in blocks]
  value_rows = [block * (2 * size) + size for block in blocks]
  full = smem["full"].at[slot]

  for j, block in enumerate(blocks):
    to = pl.ds(j * size, size)
    # Short lists would else read much that is nobody's.
    wanted = held > j * size if j and cta.partial_done is not None else None
    plgpu.copy_gmem_to_smem(refs["kv"].at[pl.ds(rows[j], size)], smem["k"].at[slot, to], full, predicate=wanted)
    plgpu.copy_gmem_to_smem(refs["kv"].at[pl.ds(value_rows[j], size)], smem["v"].at[slot, to], full, predicate=wanted)
    if plan.observes and plan.buffer:
      # Without a tensor map, which would want the target aligned to 128 bytes.
      plgpu.copy_gmem_to_smem(refs["positions"].at[block], smem["positions"].at[slot, to], full,
                              oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS, predicate=wanted)


# ---------------------------------------------------------------------------------- consumer


def _consume(cta):
  """Attends to the tiles of one pair after the other."""
  plan, smem = cta.plan, cta.smem
  tile_size, heads, head_dim = plan.config.tile, _width(plan), plan.head_dim

  def visit(pair, table_row, ring, begin, end, count):
    q_slot = lax.rem(count, _Q_SLOTS)
    length = cta.refs["lengths"][table_row]
    sharers = cta.row.ctas_of(pair)  # long before they are needed
    behind = _Behind.of(cta, pair, table_row, length) if plan.observes else None
    plgpu.barrier_wait(smem["q_full"].at[q_slot])
    queries = plgpu.load(smem["q_raw"].at[q_slot].T, layout=_MATRIX, optimized=False)
    smem["q"].T[...] = queries.astype(plan.dot_dtype)
    if cta.partial_done is None:
      plgpu.barrier_arrive(smem["q_empty"].at[q_slot])
    plgpu.commit_smem()
    top = plgpu.layout_cast(jnp.full((heads,), -jnp.inf, jnp.float32), _BY_HEAD)
    found = (plgpu.layout_cast(jnp.zeros((head_dim, heads), jnp.float32), _MATRIX),
             top if behind is None else behind.log_sums(top),
             plgpu.layout_cast(jnp.zeros((heads,), jnp.float32), _BY_HEAD))
    if cta.partial_done is not None:
      # The CTA before this one, if it shares the pair, did its part first. Where that is likely done, it is fetched
      # now, behind copies that are on their way, and not at the end, when nothing else is.
      first, stop = sharers
      done = jnp.where((begin > 0) & (2 * (ring + begin) >= 3 * begin), stop - 1, first)
      found = _merge_others(cta, pair, first, done, found, at_once=1)
      sharers = done, stop
    acc, top, total = found
    row = plgpu.broadcasted_iota(jnp.int32, (tile_size, heads), 0, layout=_MATRIX)
    acc, top, total = lax.fori_loop(
        begin, end, functools.partial(_attend_tile, cta, table_row, ring, length, behind),
        (acc, top, jnp.where(row == 0, _over(total, tile_size), 0.0)))
    found = acc, top, jnp.sum(total, axis=0)
    if cta.partial_done is None:
      _store_partial(cta, pair, *found)
    else:
      _finish(cta, pair, sharers, table_row, q_slot, found)
      plgpu.barrier_arrive(smem["q_empty"].at[q_slot])

  cta.for_each_pair(visit)
  plgpu.wait_smem_to_gmem(0)


def _attend_tile(cta, table_row, ring, length, behind, tile, carry):
  """One tile: acc f32 [D, heads] and top f32 [heads] as usual, total f32 [tile, heads] not yet summed."""
  plan, smem = cta.plan, cta.smem
  size, heads, head_dim = plan.config.tile, _width(plan), plan.head_dim
  acc, top, total = carry
  slot = lax.rem(ring + tile, plan.config.stages)
  if behind is not None:
    blocks = cta.blocks(table_row, tile)
  plgpu.barrier_wait(smem["full"].at[slot])
  keys, values, held = smem["k"].at[slot], smem["v"].at[slot], length - tile * size
  if not plan.packed:
    _zero_behind_end(values, held)  # here, where few registers are in use

  def multiply_keys(ref):
    if not plan.packed:
      plgpu.wgmma(ref, keys, smem["q"].T)
      return ref[...]
    for part in _column_parts(head_dim):
      wide = _load_wide(keys.at[:, part])
      if cta.partial_done is None:  # interpret mode
        smem["wide"].at[:, part][...] = wide
        wide = smem["wide"].at[:, part]
      plgpu.wgmma(ref, wide, smem["q"].at[:, part].T)
    return ref[...]

  logits = pl.run_scoped(multiply_keys, plgpu.ACC((size, heads), jnp.float32)) * (plan.scale * _LOG2E)
  token = tile * size + plgpu.broadcasted_iota(jnp.int32, (size, heads), 0, layout=_MATRIX)
  logits = jnp.where(token < length, logits, -jnp.inf)
  new_top = jnp.maximum(top, jnp.max(logits, axis=0))
  if behind is not None:
    new_top = behind.keep(top, new_top)
  decay = jnp.exp2(top - new_top)
  weights = jnp.exp2(logits - _over(new_top, size))
  smem["p"].T[...] = weights.astype(smem["p"].dtype)
  if behind is not None:
    behind.gains(slot, tile, weights)
  if plan.packed:
    for part in _column_parts(head_dim):
      smem["wide"].at[:, part][...] = _load_wide(values.at[:, part])
    values = smem["wide"]
    _zero_behind_end(values, held)
  plgpu.commit_smem()
  if behind is not None:
    behind.add(blocks, tile)

  def multiply_values(ref):
    plgpu.wgmma(ref, values.T, smem["p"].T)
    return ref[...]

  acc = acc * _over(decay, head_dim) + pl.run_scoped(multiply_values, plgpu.ACC((head_dim, heads), jnp.float32))
  plgpu.barrier_arrive(smem["empty"].at[slot])
  return acc, new_top, total * _over(decay, size) + weights


def _over(by_head, rows):
  """[heads] -> [rows, heads]."""
  return lax.broadcast_in_dim(by_head, (rows, by_head.shape[0]), (1,))


def _column_parts(head_dim):
  """Slices of 64 columns each: few registers hold one, widened."""
  return [pl.ds(column, 64) for column in range(0, head_dim, 64)]


def _load_wide(ref):
  """e4m3 numbers in shared memory, as float16 for the tensor core."""
  loaded = plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)
  return plgpu.layout_cast(loaded, _MATRIX).astype(jnp.float16)


def _zero_behind_end(values, held):
  """Zeroes a tile's values [tile, D] from row `held` on: they may be anything, NaN too, and 0 * NaN is NaN."""
  rows, head_dim = values.shape
  parts = head_dim // 64

  def body(step, carry):  # a loop, to take few registers
    part = pl.ds(lax.div(step, parts) * 64, 64), pl.ds(lax.rem(step, parts) * 64, 64)
    old = plgpu.load(values.at[part], layout=_MATRIX)
    row = part[0].start + plgpu.broadcasted_iota(jnp.int32, old.shape, 0, layout=_MATRIX)
    values.at[part][...] = jnp.where(row < held, old, jnp.zeros_like(old))
    return carry

  pl.when(held < rows)(lambda: lax.fori_loop(0, rows // 64 * parts, body, None))


def _store_partial(cta, pair, acc, top, total):
  """Leaves what this CTA found for a pair: the first G columns of acc [D, heads], top and total [heads]."""
  group, refs, smem = cta.plan.group, cta.refs, cta.smem
  at = (cta.index + pair) * group
  smem["out"][...] = acc
  plgpu.commit_smem()
  for g in range(group):
    row = plgpu.load(smem["out"].at[:, pl.ds(g, 1)].T, layout=_row_layout(cta.plan.head_dim), optimized=False)
    refs["out"].at[pl.ds(at + g, 1)][...] = row
  for ref, values in ((refs["top"], top), (refs["sum"], total)):
    smem["by_head"][...] = values
    plgpu.commit_smem()
    for g in range(group):
      ref[at + g] = smem["by_head"][g]
    plgpu.commit_smem()


def _finish(cta, pair, sharers, table_row, q_slot, found):
  """Merges what the CTAs [first, stop) of a pair found, in the last of them; the others leave theirs to it."""
  refs, head_dim = cta.refs, cta.plan.head_dim
  first, stop = sharers

  @pl.when(cta.index < stop - 1)
  def _():
    slot = cta.index + pair
    acc, top, total = found
    refs["out"].at[pl.ds(slot * head_dim, head_dim)][...] = acc
    refs["top"].at[slot][...] = top
    refs["sum"].at[slot][...] = total
    plgpu.commit_smem()  # all threads are done
    plgpu.semaphore_signal(cta.partial_done.at[pair], memory_scope="gpu")

  @pl.when(cta.index == stop - 1)
  def _():
    # As many at once as registers allow.
    acc, top, total = _merge_others(cta, pair, first, stop - 1, found, at_once=max(1, 24 // found[1].shape[0]))
    _store_merged(cta, pair, acc * _over(1.0 / total, head_dim))
    if cta.plan.observes:
      _store_observed(cta, table_row, q_slot, (top + jnp.log2(total)) / _LOG2E)


def _merge_others(cta, pair, first, stop, found, *, at_once):
  """Waits for what CTAs [first, stop) found, and merges it with `found`: acc f32 [D, heads], top and total [heads].

  The loads of `at_once` of them do not wait for one another.
  """
  refs, head_dim = cta.refs, cta.plan.head_dim
  pl.when(stop > first)(lambda: plgpu.semaphore_wait(cta.partial_done.at[pair], stop - first, memory_scope="gpu"))

  def load(other):
    slot = jnp.minimum(other, stop - 1) + pair
    other_top = plgpu.load(refs["top"].at[slot], layout=_BY_HEAD, optimized=False)
    other_total = plgpu.load(refs["sum"].at[slot], layout=_BY_HEAD, optimized=False)
    other_acc = plgpu.load(refs["out"].at[pl.ds(slot * head_dim, head_dim)], layout=_MATRIX, optimized=False)
    most = plgpu.layout_cast(lax.broadcast(jnp.where(other < stop, jnp.inf, -jnp.inf), other_top.shape), _BY_HEAD)
    return other_acc, jnp.minimum(other_top, most), other_total

  def body(step, carry):
    acc, top, total = carry
    for other_acc, other_top, other_total in [load(first + step * at_once + i) for i in range(at_once)]:
      new_top = jnp.maximum(top, other_top)
      share, other_share = jnp.exp2(top - new_top), jnp.exp2(other_top - new_top)
      acc = acc * _over(share, head_dim) + other_acc * _over(other_share, head_dim)
      top, total = new_top, total * share + other_total * other_share
    return acc, top, total

  return lax.fori_loop(0, lax.div(stop - first + (at_once - 1), at_once), body, found)


def _store_merged(cta, pair, out):
  """Output rows [G, D] of a pair, from columns of [D, heads]."""
  group, refs, smem = cta.plan.group, cta.refs, cta.smem
  smem["out"][...] = out
  plgpu.commit_smem()
  for g in range(group):
    row = plgpu.load(smem["out"].at[:, pl.ds(g, 1)].T, layout=_row_layout(cta.plan.head_dim), optimized=False)
    refs["merged"].at[pl.ds(pair * group + g, 1)][...] = row.astype(refs["merged"].dtype)


def _store_observed(cta, table_row, q_slot, log_sums):
  """Leaves the pair's queries and their log-sum-exp [heads] for the next step."""
  group, smem = cta.plan.group, cta.smem
  at = table_row * group
  plgpu.copy_smem_to_gmem(smem["q_raw"].at[q_slot, pl.ds(0, group)], cta.refs["queries"].at[pl.ds(at, group)])
  smem["by_head"][...] = log_sums
  plgpu.commit_smem()
  for g in range(group):
    cta.refs["log_sums"][at + g] = smem["by_head"][g]
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@dataclasses.dataclass(frozen=True)
class _Behind:
  """The score update of one pair: the observed queries, G columns from `padded_group` on, are one step behind.

  Attributes:
    cta: as elsewhere.
    table_row: i32 [] of the pair.
    query_position: i32 [] of the observed query.
    length: i32 [] KVs of the pair; the last one is newer than the observed query. 0 where the query does not count.
  """

  cta: _Cta
  table_row: jax.Array
  query_position: jax.Array
  length: jax.Array

  @classmethod
  def of(cls, cta, pair, table_row, length):
    position = cta.refs["query_positions"][lax.div(pair, jnp.int32(cta.plan.heads))]
    return cls(cta, table_row, position, jnp.where(lax.rem(position, jnp.int32(cta.plan.every)) == 0, length, 0))

  def _head(self):
    return plgpu.broadcasted_iota(jnp.int32, (_width(self.cta.plan),), 0, layout=_BY_HEAD)

  def log_sums(self, top):
    """`top` with the observed columns' log-sum-exp, base 2: their weights are then probabilities."""
    group, padded, head = self.cta.plan.group, self.cta.plan.padded_group, self._head()
    for g in range(group):
      top = jnp.where(head == padded + g, self.cta.refs["log_sums"][self.table_row * group + g] * _LOG2E, top)
    return top

  def keep(self, top, new_top):
    """new_top, but in the observed columns `top`."""
    return jnp.where(self._head() < self.cta.plan.padded_group, new_top, top)

  def gains(self, slot, tile, weights):
    """Leaves in shared memory what the observed columns of weights [tile, heads] add to a tile's scores."""
    plan, smem, size = self.cta.plan, self.cta.smem, self.cta.plan.config.tile
    head = plgpu.broadcasted_iota(jnp.int32, weights.shape, 1, layout=_MATRIX)
    first = plan.padded_group
    chances = jnp.where((head >= first) & (head < first + plan.group), weights, 0.0)
    gain = jnp.sum(chances * chances if plan.power == 2 else chances, axis=1) * plan.every
    token = tile * size + plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=_BY_TOKEN)
    counted = token < self.length - 1
    if plan.buffer:
      positions = plgpu.load(smem["positions"].at[slot], layout=_BY_TOKEN, optimized=False)
      counted &= positions <= self.query_position - plan.buffer
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
    smem["gains"][...] = jnp.where(counted, gain, 0.0)

  def add(self, blocks, tile):
    """Adds a tile's gains to the scores of its blocks."""
    plan, size = self.cta.plan, self.cta.plan.block_size
    add_row = _add_row_in_l2 if self.cta.partial_done is not None else _add_row
    for j, block in enumerate(blocks):
      # Behind the end the table row may name another head's blocks.
      held = tile * plan.config.tile + j * size < self.length
      pl.when(held)(functools.partial(
          add_row, self.cta.refs["scores"].at[block], self.cta.smem["gains"].at[pl.ds(j * size, size)]))
    plgpu.commit_smem_to_gmem_group()


def _add_row(target, source):
  """Adds a row in shared memory to one in global memory."""
  target[...] += source[...]


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def _add_row_in_l2(context, target, source):
  """The same, begun by one thread and done by the copy engine in the L2 cache: a read would wait for memory.

  As PTX, because Pallas has it for copies with a tensor map alone, which would want the
  source aligned to 128 bytes.
  """
  del context
  (size,) = source.type.shape
  mgpu_utils.inline_ptx(
      f"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [$0], [$1], {size * 4};",
      mgpu_utils.memref_ptr(target), mgpu_utils.memref_ptr(source),
      predicate=mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP), has_side_effects=True)
