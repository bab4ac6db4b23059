"""Shared by all tests: GPU tests are skipped without a GPU, the server's without the extra `serve`,
and compiling is cheap.

Most of the tests' time is XLA's. What one test, worker or child process compiled, the others read from a cache
that lasts for the run; with JAX_COMPILATION_CACHE_DIR set, it stays. And XLA leaves out the costly part of
optimising, which changes no more than rounding: a module whose tests compare programs bit for bit says
`pytestmark = pytest.mark.optimized` and gets what users get. With `-m "not optimized"` XLA leaves out more, which
can be chosen only for a process as a whole: `make test` runs the optimized modules by themselves.
"""

import gc
import importlib.util
import os
import pathlib
import shutil
import tempfile

# Two cores deadlock when several CPU devices are simulated; must be set before JAX starts.
os.environ.setdefault("NPROC", "16")
# Nobody reads where in the source each operation of a program comes from, and looking it up is a tenth of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest

collect_ignore = [] if importlib.util.find_spec("uvicorn") else ["serving"]

CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}

CHEAP = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_multi_thread_eigen=false")
"""Steps of a model compile much faster: those emitters go through MLIR. The workers keep all cores busy by
themselves: compiling in 32 pieces, and threads that wait for pieces of small operations, are work on top."""


def pytest_configure(config):
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else given, or by the process that started this worker
    config.own_cache = tempfile.mkdtemp(prefix="kvc-jax-compiled-")
    os.environ |= CACHE | {"JAX_COMPILATION_CACHE_DIR": config.own_cache}
  flags = os.environ.get("XLA_FLAGS", "")
  if config.option.markexpr == "not optimized" and CHEAP not in flags:  # read once, when an import makes an array
    os.environ["XLA_FLAGS"] = f"{flags} {CHEAP}".strip()
  jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_unconfigure(config):
  if hasattr(config, "own_cache"):
    shutil.rmtree(config.own_cache, ignore_errors=True)
    del os.environ["JAX_COMPILATION_CACHE_DIR"]


def pytest_collection_modifyitems(items):
  # The longest modules are optimized ones: first, so that the other workers find something to do beside them.
  items.sort(key=lambda item: item.get_closest_marker("optimized") is None)
  if jax.default_backend() == "gpu":
    jax.config.update("jax_enable_compilation_cache", False)  # kernels are tested as they come from the compiler
    return
  skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
  for item in items:
    if "gpu" in item.keywords:
      item.add_marker(skip)


MOST_MAPPINGS = 20_000
"""Of a process's memory, in which every compiled program has some; Linux gives it 65,530, and XLA crashes beyond."""


@pytest.fixture(autouse=True, scope="module")
def few_programs_in_memory():
  """Forgets compiled programs when they are many; those that are wanted again come from the cache on disk."""
  mappings = pathlib.Path("/proc/self/maps")
  if mappings.exists() and len(mappings.read_bytes().splitlines()) > MOST_MAPPINGS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def compiled_cheaply(request):
  """Sets how much XLA optimises, in child processes too. Jitted functions do not know it: a change makes them anew."""
  cheap = jax.default_backend() == "cpu" and request.node.get_closest_marker("optimized") is None
  if jax.config.read("jax_disable_most_optimizations") != cheap:
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", cheap)
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(cheap))


@pytest.fixture
def compiled():
  """Grows by an entry for every program that JAX compiles."""
  found = []

  def on_event(name, seconds, **_):
    if name == "/jax/core/compile/backend_compile_duration":
      found.append(name)

  jax.monitoring.register_event_duration_secs_listener(on_event)
  yield found
  jax.monitoring.unregister_event_duration_listener(on_event)
