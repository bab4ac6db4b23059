#!/usr/bin/env bash
# Runs a small part of the GPU tests under compute-sanitizer's memcheck: reads and writes outside of arrays, and
# misaligned ones, in the kernels of this project. On a GPU machine with the CUDA toolkit: `make sanitize`, or
# `scripts/sanitize.sh -k EXPRESSION` for other tests.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
# cuDNN's own kernels are not ours to check, and end in a segmentation fault under the sanitizer.
[ $# -gt 0 ] || set -- tests/kernels -k \
  "(128-16-bfloat16 or count_at_most and 15 or lowest_kvs and 16-700) and not prefill"

# Plain allocations, each with its own bounds; in XLA's pool one array's end is the next one's beginning.
export XLA_PYTHON_CLIENT_ALLOCATOR=platform
# CUDA graphs hide which kernel a fault belongs to; autotuning would run hundreds of kernels that are not ours.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"

filters=()
for name in paged_decode column_scores compact_kv count_at_most lowest_kvs mosaic; do
  filters+=(--kernel-name "kernel_substring=$name")
done
sanitize() {
  compute-sanitizer --tool memcheck --error-exitcode 99 --print-limit 20 "${filters[@]}" "$@"
}

# A kernel that writes behind its array must be caught, or the rest means nothing.
control=$(cat <<'PYTHON'
import warnings
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
warnings.filterwarnings("ignore", category=DeprecationWarning)

def kernel(out_ref):
  plt.store(out_ref.at[(1 << 22) + jnp.arange(64, dtype=jnp.int32)], jnp.ones(64, jnp.float32))

jax.block_until_ready(jax.jit(pl.pallas_call(
    kernel, out_shape=jax.ShapeDtypeStruct((64,), jnp.float32), name="paged_decode_control",
    compiler_params=plt.CompilerParams()))())
PYTHON
)
status=0
sanitize "$python" -c "$control" >/dev/null 2>&1 || status=$?
if [ "$status" != 99 ]; then
  echo "sanitize: compute-sanitizer did not catch a write outside of an array (exit $status)" >&2
  exit 1
fi
sanitize "$python" -m pytest -m gpu -q "$@"
