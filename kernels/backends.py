"""Which implementation of an op runs: one table, an override, and XLA where nothing else fits.

The choice is made while tracing, from the device that jit will compile for, the
pool's dtype and the static shapes. `use` overrides it and is part of jit's cache
key; the environment variable KVC_BACKEND does the same for a whole process.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

XLA = "xla"
_log = logging.getLogger(__name__)


_HALVES = frozenset({"bfloat16", "float16"})
_HALVES_AND_SINGLE = _HALVES | {"float32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """What the choice depends on.

  Attributes:
    dtype: name of the pool's dtype.
    query_dtype: name of the queries' dtype, which the output has too.
    head_dim: D.
    group: G, query heads per KV head.
    block_size: P.
    pool_bytes: of the pool.
    scored: whether decode keeps scores up to date.
  """

  dtype: str
  query_dtype: str
  head_dim: int
  group: int
  block_size: int
  pool_bytes: int = 0
  scored: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Support:
  """What one backend of one op can run; checked on the device by the tests marked gpu.

  Attributes:
    backend: its name, the end of the module's file name.
    capabilities: lowest and highest compute capability.
    dtypes: of the pool.
    query_dtypes: of the queries.
    head_dims: D.
    block_sizes: P.
    groups: G.
    scores: whether it keeps scores up to date, where the op does.
    unreachable: pools above the first and up to the second number of bytes are not taken.
  """

  backend: str
  capabilities: tuple[tuple[int, int], tuple[int, int]]
  dtypes: frozenset[str] = _HALVES_AND_SINGLE
  query_dtypes: frozenset[str] = _HALVES_AND_SINGLE
  head_dims: frozenset[int] = frozenset({64, 96, 128, 256})
  block_sizes: frozenset[int] = frozenset({8, 16, 32, 64})
  groups: frozenset[int] = frozenset(range(1, 17))
  scores: bool = True
  unreachable: tuple[int, int] = (0, 0)

  def lacks(self, capability: tuple[int, int], shape: Shape) -> str | None:
    """Why this backend cannot run it; None where it can."""
    low, high = self.capabilities
    if not low <= capability <= high:
      return f"compute capability {capability[0]}.{capability[1]}"
    if shape.dtype not in self.dtypes:
      return f"dtype {shape.dtype}"
    if shape.query_dtype not in self.query_dtypes:
      return f"queries of dtype {shape.query_dtype}"
    if shape.head_dim not in self.head_dims:
      return f"head_dim {shape.head_dim}"
    if shape.block_size not in self.block_sizes:
      return f"block_size {shape.block_size}"
    if shape.group not in self.groups:
      return f"{shape.group} query heads per KV head"
    if shape.scored and not self.scores:
      return f"scores of {shape.group} query heads per KV head"
    if self.unreachable[0] < shape.pool_bytes <= self.unreachable[1]:
      return f"a pool of {shape.pool_bytes} bytes"
    return None


_AMPERE, _ADA, _HOPPER, _NEWEST = (8, 0), (8, 9), (9, 0), (99, 0)

KEYS = Shape(dtype="uint32", query_dtype="float32", head_dim=1, group=1, block_size=1)
"""For ops that read a uint32 per KV, whatever the pool's shape."""

_KEYS_ON_TRITON = Support(
    backend="triton", capabilities=(_AMPERE, _NEWEST), dtypes=frozenset({"uint32"}), head_dims=frozenset({1}),
    block_sizes=frozenset({1}))


def _decode_on_mosaic(
    dtype: str, head_dim: int, groups: Iterable[int], *, scores: bool = True,
    block_sizes: frozenset[int] = Support.block_sizes,
) -> Support:
  """Queries in the pool's dtype, or in 16 bits beside e4m3; later GPUs have other matrix products."""
  query_dtypes = _HALVES if dtype == "float8_e4m3fn" else frozenset({dtype})
  return Support(
      backend="mosaic", capabilities=(_HOPPER, _HOPPER), dtypes=frozenset({dtype}), query_dtypes=query_dtypes,
      head_dims=frozenset({head_dim}), groups=frozenset(groups), scores=scores, block_sizes=block_sizes)


TABLE: dict[str, tuple[Support, ...]] = {
    # Without scores where they would take more registers than two CTAs of a multiprocessor have, as `make aot` says.
    "paged_decode": (
        _decode_on_mosaic("bfloat16", 128, (1, 2, 3, 4, 8)),
        _decode_on_mosaic("bfloat16", 128, range(1, 9), scores=False),
        _decode_on_mosaic("bfloat16", 64, range(1, 17)),
        _decode_on_mosaic("float16", 64, range(1, 5)),
        _decode_on_mosaic("bfloat16", 256, range(1, 3)),  # not timed
        _decode_on_mosaic("float8_e4m3fn", 128, range(1, 5), block_sizes=Support.block_sizes - {8}),
        _decode_on_mosaic("float8_e4m3fn", 128, range(1, 9), scores=False),
        _decode_on_mosaic("float8_e4m3fn", 64, (1, 2, 3, 4, 8)),
        _decode_on_mosaic("float8_e4m3fn", 64, range(1, 9), scores=False),
        Support(backend="triton", capabilities=(_AMPERE, _NEWEST), dtypes=_HALVES_AND_SINGLE | {"float8_e4m3fn"}),
    ),
    # Ampere has no e4m3, and this kernel leaves its conversion to Triton. Pallas counts single bytes in 32 signed
    # bits up to 4 GiB.
    "column_scores": (
        Support(backend="triton", capabilities=(_ADA, _NEWEST), dtypes=frozenset({"float8_e4m3fn"}),
                unreachable=(2 << 30, 4 << 30)),
        Support(backend="triton", capabilities=(_AMPERE, _NEWEST)),
    ),
    # cuDNN's flash attention takes head dimensions above 128 on Hopper and newer only.
    "paged_prefill": (
        Support(backend="cudnn", capabilities=(_AMPERE, _NEWEST), dtypes=_HALVES | {"float8_e4m3fn"},
                query_dtypes=_HALVES, head_dims=frozenset({64, 96, 128})),
        Support(backend="cudnn", capabilities=(_HOPPER, _NEWEST), dtypes=_HALVES | {"float8_e4m3fn"},
                query_dtypes=_HALVES, head_dims=frozenset({256})),
    ),
    "compact_kv": (
        Support(backend="triton", capabilities=(_AMPERE, _NEWEST), dtypes=_HALVES_AND_SINGLE | {"float8_e4m3fn"}),
    ),
    "count_at_most": (_KEYS_ON_TRITON,),
    "lowest_kvs": (_KEYS_ON_TRITON,),
}
"""Op -> its backends, the preferred one first. XLA stands behind them all."""


@dataclasses.dataclass(frozen=True)
class _Override:
  backend: str
  capability: tuple[int, int] | None


_override = jax.make_user_context(default_value=None)


@contextmanager
def use(backend: str, capability: tuple[int, int] | None = None) -> Iterator[None]:
  """Within it every op takes `backend` where it has it, else XLA.

  Args:
    backend: "auto", "xla", or a backend's name.
    capability: compute capability to choose for, instead of the device's; for
      compiling ahead of time without the device.

  Raises:
    ValueError: no op has such a backend.
  """
  _check_name(backend)
  with _override(_Override(backend, capability)):
    yield


def requested() -> str:
  """The backend that `use` or the environment variable KVC_BACKEND asks for; "auto" by default.

  Raises:
    ValueError: no op has such a backend.
  """
  override = _override.value
  return _check_name(override.backend if override else os.environ.get("KVC_BACKEND") or "auto")


def _check_name(backend: str) -> str:
  known = {XLA, "auto"} | {support.backend for entries in TABLE.values() for support in entries}
  if backend not in known:
    raise ValueError(f"{backend!r} is no backend (KVC_BACKEND or backends.use); give one of {', '.join(sorted(known))}")
  return backend


def choose(op: str, shape: Shape) -> str:
  """The backend that `op` takes for `shape` on the device that jit compiles for."""
  wanted = requested()
  if wanted == XLA:
    return XLA
  capability = target_capability()
  if capability is None:
    return XLA
  return _choose(op, shape, wanted, capability)


@functools.cache  # so that a refusal is logged once
def _choose(op: str, shape: Shape, wanted: str, capability: tuple[int, int]) -> str:
  reasons = []
  for support in TABLE.get(op, ()):
    if wanted not in ("auto", support.backend):
      continue
    lacking = support.lacks(capability, shape)
    if lacking is None:
      return support.backend
    reasons.append(f"{support.backend} does not take {lacking}")
  if reasons:
    _log.warning("%s runs on XLA, which is slower: %s", op, "; ".join(dict.fromkeys(reasons)))
  return XLA


def _device() -> jax.Device:
  device = jax.config.jax_default_device
  return device if isinstance(device, jax.Device) else jax.devices(device)[0]


def target_capability() -> tuple[int, int] | None:
  """Compute capability to choose for: that of `use`, else the device's."""
  override = _override.value
  return (override and override.capability) or device_capability()


def device_capability() -> tuple[int, int] | None:
  """Compute capability of the NVIDIA GPU that jit compiles for; None where it is no such GPU."""
  device = _device()
  text = getattr(device, "compute_capability", None)
  if device.platform != "gpu" or not isinstance(text, str):
    return None
  try:
    major, minor = text.split(".")
    return int(major), int(minor)
  except ValueError:  # an AMD GPU's is a name
    return None


_CORES = {(8, 0): 108, (8, 6): 84, (8, 9): 58, (9, 0): 132, (10, 0): 148}


def num_cores() -> int:
  """Multiprocessors of the GPU that jit compiles for; of a usual one where it is not there."""
  override = _override.value
  if override and override.capability:
    return _CORES.get(override.capability, 132)
  return getattr(_device(), "core_count", 132)


def device_kind() -> str:
  """Name of the device that jit compiles for, such as "NVIDIA H100 80GB HBM3"."""
  return str(getattr(_device(), "device_kind", ""))


def shape_of(
    kv: jax.Array, group: int, query_dtype: jax.typing.DTypeLike | None = None, *, scored: bool = False
) -> Shape:
  """The `Shape` of a pool [N, 2, P, D] and G."""
  _, _, block_size, head_dim = kv.shape
  return Shape(
      dtype=kv.dtype.name, query_dtype=jnp.dtype(kv.dtype if query_dtype is None else query_dtype).name,
      head_dim=head_dim, group=group, block_size=block_size, pool_bytes=kv.size * kv.dtype.itemsize, scored=scored)
