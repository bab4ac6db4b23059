"""What is compiled ahead of time: every backend in backends.TABLE, one number varied at a time; and whole steps."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from kvc_jax.attention import prefill
from kvc_jax.attention.prefill import init_observation
from kvc_jax.cache.state import CacheConfig, init_cache
from kvc_jax.config import LlamaConfig, RopeConfig
from kvc_jax.engine import steps
from kvc_jax.engine.packed import Packed
from kvc_jax.eviction.compression import MOST_KEPT_RANGES
from kvc_jax.eviction.score import ScoringRule
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.kernels import backends, paged_decode_mosaic, paged_prefill_xla
from kvc_jax.kernels.column_scores import column_scores
from kvc_jax.kernels.compact_kv import compact_kv
from kvc_jax.kernels.count_at_most import count_at_most
from kvc_jax.kernels.lowest_kvs import lowest_kvs
from kvc_jax.kernels.observed import Observed
from kvc_jax.kernels.paged_decode import paged_decode
from kvc_jax.kernels.paged_prefill import paged_prefill
from kvc_jax.model.llama import abstract_llama
from kvc_jax.sampling import SamplingArrays

POOL_BYTES = 5 << 30
_LAYERS, _SEQS, _HEADS, _BLOCKS_PER_HEAD, _QUERIES = 4, 8, 2, 64, 256
_GROUPS = {1, 3, 4, 8, 16}
_GROUPS_OF_MOSAIC = {*range(1, 9), 16}
"""Up to 8 its table lists groups by the registers that they take."""
_WITH_QUERIES = {"paged_decode", "paged_prefill", "column_scores"}
_MOST_REGISTERS = 255
"""That a thread can have."""
_ONCE = {"scored"}
"""Variants that are compiled for the commonest shape alone: they are part of others."""
_SCORED = {"scored", "scored, buffer"}


@dataclasses.dataclass(frozen=True)
class Program:
  """Something to compile.

  Attributes:
    run: the function.
    args: its arguments' shapes.
    donated: indices of the arguments that it must update in place.
    static: keyword arguments, where `run` is jitted already.
    most_registers: of a thread in our kernels.
  """

  run: Callable[..., Any]
  args: tuple[Any, ...]
  donated: tuple[int, ...] = ()
  static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  most_registers: int = _MOST_REGISTERS

  @property
  def donated_bytes(self) -> int:
    leaves = jax.tree.leaves([self.args[index] for index in self.donated])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class Case:
  """One program.

  Attributes:
    name: for people.
    op: a kernel of it must be in the compiled program.
    backend: to compile for; "auto" takes the table's first.
    shape: what it varies; None for a whole step.
    program: builds it.
  """

  name: str
  op: str
  backend: str
  shape: backends.Shape | None
  program: Callable[[], Program]


def cases(capability: tuple[int, int]) -> list[Case]:
  """All that the table promises to a device of `capability`, and the steps of the engine."""
  found = [
      case for op, entries in backends.TABLE.items() for support in entries
      if support.capabilities[0] <= capability <= support.capabilities[1] for case in _promised(op, support)]
  found += [Case(name, op, "auto", None, step) for name, (op, step) in _STEPS.items()
            if _FOR_ONE.get(name, capability) == capability]
  return list({case.name: case for case in found}.values())  # two entries may promise the same


def _promised(op: str, support: backends.Support) -> Iterator[Case]:
  base, *others = _shapes(support, vary_group=op in _WITH_QUERIES)
  for shape in (base, *others):
    for variant, build in _PROGRAMS[op].items():
      asked = dataclasses.replace(shape, scored=variant in _SCORED)
      if (shape == base or variant not in _ONCE) and (support.scores or not asked.scored):
        name = (f"{op}_{support.backend} {variant} {shape.query_dtype} on {shape.dtype} D{shape.head_dim} "
                f"G{shape.group} P{shape.block_size}")
        yield Case(name, op, support.backend, asked, functools.partial(build, asked))


def _shapes(support: backends.Support, *, vary_group: bool) -> Iterator[backends.Shape]:
  """The commonest shape, and each other value of each number beside it."""

  def preferred(values, *wanted):
    return next((value for value in wanted if value in values), min(values))

  def queries_of(dtype: str) -> str:
    return dtype if dtype in support.query_dtypes else preferred(support.query_dtypes, "bfloat16")

  dtype = preferred(support.dtypes, "bfloat16")
  base = backends.Shape(
      dtype=dtype, query_dtype=queries_of(dtype), head_dim=preferred(support.head_dims, 128),
      group=preferred(support.groups, 4), block_size=preferred(support.block_sizes, 16))
  yield base
  for other in sorted(support.dtypes - {dtype}):
    yield dataclasses.replace(base, dtype=other, query_dtype=queries_of(other))
  for head_dim in sorted(support.head_dims - {base.head_dim}):
    yield dataclasses.replace(base, head_dim=head_dim)
  for block_size in sorted(support.block_sizes - {base.block_size}):
    yield dataclasses.replace(base, block_size=block_size)
  groups = _GROUPS_OF_MOSAIC if support.backend == "mosaic" else _GROUPS
  for group in sorted(support.groups & groups - {base.group}) if vary_group else ():
    # The smallest blocks take the most registers.
    yield dataclasses.replace(base, group=group, block_size=min(support.block_sizes))


# --------------------------------------------------------------------------- programs


def _array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _pool(shape: backends.Shape) -> jax.ShapeDtypeStruct:
  """[N, 2, P, D] of POOL_BYTES."""
  block = 2 * shape.block_size * shape.head_dim * jnp.dtype(shape.dtype).itemsize
  return _array((POOL_BYTES // block, 2, shape.block_size, shape.head_dim), shape.dtype)


def _per_kv(shape: backends.Shape, dtype: Any) -> jax.ShapeDtypeStruct:
  return _array((_pool(shape).shape[0], shape.block_size), dtype)


_TABLES = _array((_LAYERS, _SEQS, _HEADS, _BLOCKS_PER_HEAD))
_LENGTHS = _array((_LAYERS, _SEQS, _HEADS))
_SCALAR = _array(())


def _decode(shape: backends.Shape, *, buffer: int | None) -> Program:
  """With scores where `buffer` is given."""
  heads = _HEADS * shape.group
  q = _array((_SEQS, heads, shape.head_dim), shape.query_dtype)
  args = (q, _pool(shape), _TABLES, _LENGTHS, _SCALAR)
  most = _registers_of_all_ctas(shape, buffer is not None) if backends.requested() == "mosaic" else _MOST_REGISTERS
  if buffer is None:
    return Program(lambda *args: paged_decode(*args, scale=0.1), args, most_registers=most)
  observed = Observed(
      scores=_per_kv(shape, jnp.float32), positions=_per_kv(shape, jnp.int32),
      queries=_array((_LAYERS, *q.shape), q.dtype), log_sums=_array((_LAYERS, _SEQS, heads), jnp.float32),
      query_positions=_array((_SEQS,)))
  return Program(lambda *args: paged_decode(*args, scale=0.1, buffer=buffer), (*args, observed), (len(args),),
                 most_registers=most)


def _registers_of_all_ctas(shape: backends.Shape, observes: bool) -> int:
  """How many a thread may take for all CTAs to be on the GPU at once."""
  columns = paged_decode_mosaic.query_columns(shape.group, observes)
  ctas = paged_decode_mosaic.default_config(_pool(shape), columns).ctas // backends.num_cores()
  return min(_MOST_REGISTERS, 65536 // (256 * ctas))


def _prefill(shape: backends.Shape) -> Program:
  q = _array((_QUERIES, _HEADS * shape.group, shape.head_dim), shape.query_dtype)
  k = _array((_QUERIES, _HEADS, shape.head_dim), shape.query_dtype)
  args = (q, k, k, _pool(shape), _TABLES, _array((_HEADS,)), _SCALAR, _SCALAR, _SCALAR)
  return Program(lambda *args: paged_prefill(*args, scale=0.1), args)


def _column_scores(shape: backends.Shape) -> Program:
  heads = _HEADS * shape.group
  args = (
      _array((_QUERIES, heads, shape.head_dim), shape.query_dtype), _array((_QUERIES, heads), jnp.float32),
      _array((_QUERIES,)), _pool(shape), _per_kv(shape, jnp.int32), _TABLES, _LENGTHS, _SCALAR, _SCALAR)
  return Program(lambda *args: column_scores(*args, scale=0.1, power=2, buffer=10), args)


def _compact(shape: backends.Shape) -> Program:
  rows = _LAYERS * _HEADS
  kvs = _BLOCKS_PER_HEAD * shape.block_size
  args = (
      _pool(shape), _per_kv(shape, jnp.float32), _per_kv(shape, jnp.int32), _array((rows, kvs), jnp.bool_),
      _array((rows, _BLOCKS_PER_HEAD)), _array((rows,)), _array((rows,)))
  return Program(compact_kv, args, (0, 1, 2))


def _count(shape: backends.Shape) -> Program:
  del shape
  return Program(count_at_most, (_array((256, 8192), jnp.uint32), _array((256, 15), jnp.uint32), _array((256,))))


def _lowest(shape: backends.Shape) -> Program:
  del shape  # keys are read in list order, whatever the pool's shape
  blocks, block_size = 512, 16
  args = (
      _array((256, blocks * block_size), jnp.uint32), _array((1 << 17, block_size)), _array((256, blocks)),
      _array((256,)), _array((256,)))
  return Program(lowest_kvs, args)


_PROGRAMS: dict[str, dict[str, Callable[[backends.Shape], Program]]] = {
    "paged_decode": {
        "plain": lambda shape: _decode(shape, buffer=None),
        "scored": lambda shape: _decode(shape, buffer=0),
        "scored, buffer": lambda shape: _decode(shape, buffer=10),
    },
    "paged_prefill": {"plain": _prefill},
    "column_scores": {"plain": _column_scores},
    "compact_kv": {"plain": _compact},
    "count_at_most": {"plain": _count},
    "lowest_kvs": {"plain": _lowest},
}
"""Op -> what is compiled of it. An op of the table that is missing here fails the run."""


def _state(dtype: Any = jnp.bfloat16) -> Any:
  """A cache of the 8B shape's heads, with a pool of POOL_BYTES."""
  blocks = POOL_BYTES // (2 * 16 * 128 * jnp.dtype(dtype).itemsize)
  config = CacheConfig(
      num_layers=_LAYERS, num_slots=_SEQS, num_kv_heads=8, head_dim=128, num_blocks=blocks,
      max_blocks_per_head=_BLOCKS_PER_HEAD, num_heads=32, dtype=dtype)
  return jax.eval_shape(lambda: init_cache(config))


def _model() -> Any:
  config = LlamaConfig(
      vocab_size=1024, hidden_size=1024, intermediate_size=2048, num_layers=_LAYERS, num_heads=32, num_kv_heads=8,
      head_dim=128, rms_norm_eps=1e-5, rope=RopeConfig())
  return abstract_llama(config, jnp.bfloat16, stacked=False)


def _decode_step(rule: WindowAttention | None, dtype: Any = jnp.bfloat16) -> Program:
  args = (_model(), _state(dtype), _array((_SEQS,)), _array((_SEQS,), jnp.bool_))
  return Program(steps.decode_step, args, (1,), {"rule": rule})


def _sampling(rows: int) -> SamplingArrays:
  floats, ints = jnp.zeros(rows), jnp.zeros(rows, jnp.int32)
  return SamplingArrays(floats, ints, floats, floats, jnp.zeros(rows, jnp.uint32), ints)


def _rows(most: int) -> Any:
  """As the engine gives them: in one array, and fewer than there are slots."""
  rows = _SEQS // 2

  def build() -> Packed[steps.DecodeRows]:
    ids, given, stop_ids = (jnp.zeros((rows, *more), jnp.int32) for more in ((), (most,), (16,)))
    return Packed.of(steps.DecodeRows(ids, ids, given, stop_ids, _sampling(rows), jnp.zeros(rows, bool)))

  return jax.eval_shape(build)


def _decode_loop(rule: WindowAttention | None) -> Program:
  return Program(steps.decode_loop, (_model(), _state(), _rows(8), _array(())), (1,), {"rule": rule})


def _mixed_step(decode_rule: ScoringRule | None) -> Program:
  """Of KVC-full, whose sums read the pool too; with XLA's attention of the chunk, for cuDNN's wants the library."""
  rule = FullAttention()

  def attend(*arrays, scale, most_prefix):
    del most_prefix
    return paged_prefill_xla.paged_prefill(*arrays, scale=scale)

  def run(model, state, observation, chunk, rows):
    with mock.patch.object(prefill, "paged_prefill", attend):
      return steps.mixed_step.__wrapped__(
          model, state, observation, chunk, rows, rule=rule, decode_rule=decode_rule, most_prefix=0)

  def chunk() -> Packed[steps.PromptChunk]:
    ids, one = jnp.zeros(_QUERIES, jnp.int32), jnp.int32(0)
    return Packed.of(steps.PromptChunk(ids, one, one, _sampling(1), jnp.zeros(1, bool)))

  observation = jax.eval_shape(lambda: init_observation(rule, _LAYERS, 32, 128, jnp.bfloat16))
  return Program(run, (_model(), _state(), observation, jax.eval_shape(chunk), _rows(1)), (1, 2))


def _evict_step() -> Program:

  def rows() -> Packed[steps.EvictRows]:
    row, keep = jnp.zeros(_SEQS, jnp.int32), jnp.zeros((_SEQS, MOST_KEPT_RANGES, 2), jnp.int32)
    return Packed.of(steps.EvictRows(row, row, row, row, row, keep, row, seen=row))

  static = {"rule": WindowAttention(), "allocation": "all"}
  return Program(steps.evict, (_state(), jax.eval_shape(rows)), (0,), static)


_STEPS: dict[str, tuple[str, Callable[[], Program]]] = {
    "decode_step": ("paged_decode", lambda: _decode_step(None)),
    "decode_step, scored": ("paged_decode", lambda: _decode_step(WindowAttention())),
    "decode_step, scored, e4m3 pool": (
        "paged_decode", lambda: _decode_step(WindowAttention(), jnp.float8_e4m3fn)),
    "decode_loop": ("paged_decode", lambda: _decode_loop(None)),
    "decode_loop, scored": ("paged_decode", lambda: _decode_loop(WindowAttention())),
    "mixed_step, scored": ("column_scores", lambda: _mixed_step(None)),
    "mixed_step, scored, with steps that score": ("column_scores", lambda: _mixed_step(FullAttention())),
    "evict": ("compact_kv", _evict_step),
}
"""Steps of the engine, with the op whose kernel must be found in them."""
_FOR_ONE = {name: (9, 0) for name in _STEPS if name.startswith(("mixed_step", "decode_loop"))}
"""Steps that are compiled for one capability alone: what they are for is the same on all, and they take long."""
