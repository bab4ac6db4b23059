"""Compiles every kernel configuration of backends.TABLE for H200, A100 and L4, without any of them.

    python tests/aot/compile_kernels.py --site .aot [--targets h200] [--match decode] [--json FILE]

`--site` is a folder with the wheels of the extra `aot`; it is on the path of the
compiling processes alone, so that the CUDA plugin stays away from everything else.
Checked for every program: it compiles; no kernel spills more than SPILL_LIMIT, or takes
more registers than its CTAs have to share; what is donated is updated in place; no buffer
or copy comes near the size of the pool.
"""

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGETS = ("h200", "a100", "l4")
SPILL_LIMIT = 64
"""Bytes: ptxas parks a few registers to reach a number of warps. In a loop that spills in earnest it is thousands."""


def main() -> int:
  args = _arguments()
  if args.worker is not None:
    return _work(args)
  if not list(pathlib.Path(args.site).glob("jax_plugins/xla_cuda*/xla_cuda_plugin.so")):
    print(f"aot: skipped, for {args.site} does not hold the wheels of the extra 'aot' (no network?)")
    return 0
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as claims:
    rows = [row for worker in [_start_worker(args, claims) for _ in range(args.jobs)] for row in _rows_of(worker)]
  rows.sort(key=lambda row: (row["case"], row["target"]))
  _print(rows)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
  failed = [row for row in rows if row["faults"]]
  for row in failed:
    print(f"FAILED {row['target']} {row['case']}: {'; '.join(row['faults'])}")
  skipped = sum(row.get("skipped", False) for row in rows)
  print(f"aot: {len(rows) - skipped} programs compiled, {len(failed)} failed, {skipped} skipped for want of cuDNN, "
        f"{time.monotonic() - start:.0f} s")
  return 1 if failed or not rows else 0


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--site", required=True)
  parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
  parser.add_argument("--match", default="", help="only cases with this in their name")
  parser.add_argument("--json", help="write the rows there")
  parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
  parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
  return parser.parse_args()


def _start_worker(args: argparse.Namespace, claims: str) -> subprocess.Popen[str]:
  from compiled import ENVIRONMENT

  path = [str(pathlib.Path(args.site).resolve()), str(ROOT), os.environ.get("PYTHONPATH", "")]
  environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, path)),
                 "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ENVIRONMENT['XLA_FLAGS']}".strip()}
  return subprocess.Popen(
      [sys.executable, __file__, *sys.argv[1:], "--worker", claims], env=environment,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _rows_of(worker: subprocess.Popen[str]) -> list[dict[str, Any]]:
  output, log = worker.communicate()
  rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
  if worker.returncode:
    rows.append({"target": "", "case": "", "kernels": [], "seconds": 0,
                 "faults": [f"a compiling process ended with {worker.returncode}: {log[-2000:]}"]})
  return rows


def _work(args: argparse.Namespace) -> int:
  """Compiles the programs that no other worker has claimed, the longest first, and prints a JSON line for each."""
  warnings.filterwarnings("ignore", message=".*Pallas Triton backend is deprecated.*")
  from cases import cases
  from compiled import CAPABILITIES

  gc.freeze()  # JAX's modules stay: the collector need not go through them again and again
  todo = [(target, case) for target in args.targets for case in cases(CAPABILITIES[target]) if args.match in case.name]
  for target, case in sorted(todo, key=lambda item: item[1].shape is not None):  # steps are long
    if not _claim(args.worker / f"{target} {case.name}"):
      continue
    start = time.monotonic()
    try:
      row = _check(target, case)
    except Exception as error:  # one that does not compile must not hide the others
      reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
      skipped = "cuDNN not found" in reason  # JAX asks the library for its version while tracing
      row = {"kernels": [], "faults": [] if skipped else [reason], "skipped": skipped}
    row |= {"target": target, "case": case.name, "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(row), flush=True)
  return 0


def _claim(path: pathlib.Path) -> bool:
  """Whether this process is the first to make a file there."""
  try:
    path.touch(exist_ok=False)
  except FileExistsError:
    return False
  return True


def _check(target: str, case: Any) -> dict[str, Any]:
  from cases import POOL_BYTES
  from compiled import CAPABILITIES, compile_for

  from kvc_jax.kernels import backends

  with backends.use(case.backend, CAPABILITIES[target]):
    program = case.program()
    compiled = compile_for(target, program.run, program.args, program.donated, program.static)
  faults = [f"{kernel.name} spills {kernel.spills} bytes" for kernel in compiled.kernels
            if kernel.spills > SPILL_LIMIT]
  faults += [f"{kernel.name} takes {kernel.registers} registers, of {program.most_registers}"
             for kernel in _own(case.op, compiled.kernels) if kernel.registers > program.most_registers]
  if not _own(case.op, compiled.kernels):
    faults.append("no kernel of ours in it")
  if compiled.aliased < program.donated_bytes:
    faults.append(f"{compiled.aliased} bytes in place of {program.donated_bytes}")
  if compiled.temporary > POOL_BYTES // 4 or compiled.fresh > POOL_BYTES // 4:
    faults.append(f"{compiled.temporary} bytes of temporaries, {compiled.fresh} of fresh outputs")
  if max(compiled.copies, default=0) > POOL_BYTES // 64:
    faults.append(f"a copy of {max(compiled.copies)} bytes")
  return {"kernels": [dataclasses.asdict(kernel) for kernel in _own(case.op, compiled.kernels)],
          "temporary": compiled.temporary, "faults": faults}


def _own(op: str, kernels: Any) -> list[Any]:
  """Kernels written here: named after their op, or by Mosaic GPU."""
  return [kernel for kernel in kernels if kernel.name.startswith(op) or "mosaic_gpu" in kernel.name]


def _print(rows: list[dict[str, Any]]) -> None:
  """A line for each case: registers of each kernel, for each target."""
  for name in dict.fromkeys(row["case"] for row in rows):
    cells = []
    for row in rows:
      if row["case"] == name:
        registers = "+".join(str(kernel["registers"]) for kernel in row["kernels"])
        cells.append(f"{row['target']} {registers or '-'} regs {row['seconds']} s{' FAILED' if row['faults'] else ''}")
    print(f"{name:70s} {'   '.join(cells)}")


if __name__ == "__main__":
  sys.exit(main())
