#!/usr/bin/env python
"""Converts a Hugging Face Llama into a folder with an Orbax checkpoint."""

import argparse
import sys

from kvc_jax.checkpoint.convert import convert
from kvc_jax.checkpoint.dtypes import NAMES
from kvc_jax.errors import InputError


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("src", help="Hugging Face folder: config.json, safetensors and a tokenizer")
  parser.add_argument("dst", help="folder to write")
  parser.add_argument("--dtype", choices=NAMES, help="number format of the weights (default: as they are)")
  parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a model's folder")
  args = parser.parse_args()
  try:
    print(f"wrote {convert(args.src, args.dst, dtype=args.dtype, overwrite=args.overwrite)}")
  except InputError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"{parser.prog}: interrupted, nothing was written", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
