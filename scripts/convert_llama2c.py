#!/usr/bin/env python
"""Converts a llama2.c model (export version 0) into a Hugging Face folder."""

import argparse
import sys

from kvc_jax.checkpoint.llama2c import convert_llama2c
from kvc_jax.errors import InputError


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("weights", help="weights, such as stories15M.bin")
  parser.add_argument("tokenizer", help="its tokenizer, such as tokenizer.bin")
  parser.add_argument("dst", help="folder to write")
  parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a model's folder")
  args = parser.parse_args()
  try:
    print(f"wrote {convert_llama2c(args.weights, args.tokenizer, args.dst, overwrite=args.overwrite)}")
  except InputError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"{parser.prog}: interrupted, nothing was written", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
