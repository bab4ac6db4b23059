#!/usr/bin/env bash
# Runs a small part of the GPU tests under compute-sanitizer's memcheck: reads and writes outside of arrays, and
# misaligned ones. On a GPU machine with the CUDA toolkit: `make sanitize`, or `scripts/sanitize.sh -k EXPRESSION`
# for other tests. A sanitized kernel is 10 to 100 times slower, so the choice is small.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
[ $# -gt 0 ] || set -- tests/kernels -k "128-16-bfloat16 or count_at_most"
# Plain allocations, each with its own bounds; from XLA's pool, one array's end is the next one's beginning.
export XLA_PYTHON_CLIENT_ALLOCATOR=platform
# CUDA graphs hide which kernel a fault belongs to.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer="
exec compute-sanitizer --tool memcheck --error-exitcode 1 --target-processes all --print-limit 20 \
  "$python" -m pytest -m gpu -q -p no:xdist "$@"
