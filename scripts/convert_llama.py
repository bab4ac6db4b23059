#!/usr/bin/env python
"""Converts a Hugging Face Llama into a folder with an Orbax checkpoint: `kvc convert SRC DST`."""

import sys

from kvc_jax.cli import main

if __name__ == "__main__":
  sys.exit(main(["convert", *sys.argv[1:]]))
