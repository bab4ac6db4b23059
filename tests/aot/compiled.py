"""Compiling for a GPU that is not there, and what the compiler says about the result.

XLA compiles without a device when it is told the device's figures (`targets/`). It
runs ptxas with -v and logs the answer, from which registers and spills are read; so
does Mosaic GPU.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

TARGETS = pathlib.Path(__file__).parent / "targets"
CAPABILITIES = {"h200": (9, 0), "a100": (8, 0), "l4": (8, 9)}

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "subprocess_compilation=5",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}
"""Must be set when a process starts, for `compile_for` to find what ptxas said. The last two save time: XLA would
compile each kernel of its own once more, to choose between several, which it cannot time here; and JAX would look up
where in the source each operation comes from."""


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One kernel as ptxas made it; spills are the bytes of both stores and loads."""

  name: str
  registers: int
  spills: int
  stack: int


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What is asserted about a program.

  Attributes:
    kernels: of XLA too.
    aliased: bytes of outputs that take the place of donated inputs.
    fresh: bytes of outputs that do not.
    temporary: bytes of buffers within the program.
    copies: bytes of each copy in the optimized program.
  """

  kernels: tuple[Kernel, ...]
  aliased: int
  fresh: int
  temporary: int
  copies: tuple[int, ...]


def compile_for(
    target: str, run: Callable[..., Any], args: Sequence[Any], donated: Sequence[int], static: Mapping[str, Any],
) -> Compiled:
  """Compiles `run(*args, **static)` for the GPU `target` (a key of CAPABILITIES).

  Args:
    target: a key of CAPABILITIES.
    run: any function; one that is jitted keeps its own options.
    args: pytrees of shapes.
    donated: indices of args, where `run` is not jitted.
    static: keyword arguments, where it is.
  """
  config = (TARGETS / f"{target}.txtpb").read_text(encoding="utf-8")
  topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
  mesh = topologies.make_mesh(topology, (1,), ("x",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tuple(args))
  jitted = run if hasattr(run, "lower") else jax.jit(run, donate_argnums=tuple(donated))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jitted.lower(*placed, **static)
  with tempfile.TemporaryDirectory() as folder:
    log = pathlib.Path(folder) / "xla.log"
    with _stderr_to(log):
      executable = lowered.compile()
    said = log.read_text(encoding="utf-8", errors="replace")
  memory = executable.memory_analysis()
  return Compiled(
      kernels=tuple(kernels_in(said)), aliased=memory.alias_size_in_bytes,
      fresh=memory.output_size_in_bytes - memory.alias_size_in_bytes, temporary=memory.temp_size_in_bytes,
      copies=tuple(copies_in(executable.as_text())))


@contextlib.contextmanager
def _stderr_to(path: pathlib.Path) -> Iterator[None]:
  """C++ writes to file descriptor 2, which sys.stderr cannot redirect."""
  kept = os.dup(2)
  try:
    with path.open("wb") as file:
      os.dup2(file.fileno(), 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)


_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL)


def kernels_in(log: str) -> list[Kernel]:
  """The kernels that ptxas -v names, each once; XLA may compile one several times."""
  found = {}
  for match in _KERNEL.finditer(log):
    found[match["name"]] = Kernel(
        match["name"], int(match["registers"]), int(match["stores"]) + int(match["loads"]), int(match["stack"]))
  return list(found.values())


_COPY = re.compile(r"= \(?(?P<dtype>[a-z][a-z0-9]*)\[(?P<shape>[\d,]*)\][^=(\n]* (?:copy|copy-start)\(")


def copies_in(hlo: str) -> Iterator[int]:
  """Bytes of each copy in an optimized program, those within fusions too."""
  for match in _COPY.finditer(hlo):
    size = math.prod(int(n) for n in match["shape"].split(",") if n)
    bits = re.search(r"\d+", match["dtype"])
    yield size * max(8, int(bits[0]) if bits else 8) // 8
